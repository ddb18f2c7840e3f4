"""adcam.classifier: losses, settings, the loop, exact continuation, several processes."""
import json, math, os, subprocess, sys
from dataclasses import replace

import numpy as np, pytest, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings, strategies as st
from torch import nn

from adcam.classifier import (EpochBatches, Features, HeadsConfig, MultiLabel, PretrainConfig, SingleLabel, TrainConfig, bce_loss, cached_features, fit,
                              freeze_backbone, learning_rate, pretrain, random_mask, save_weights, square_colors, train, train_heads)
from adcam.conformer import conformer_mini, load_checkpoint
from adcam.data import to_tensor
from adcam.scenes import Sample

TINY = dict(channels=(8, 16), depths=(2, 2), embed_dim=12, stem_width=8)
QUICK = TrainConfig(epochs=3, batch=4, lr_vit=1e-3, lr_cnn=1e-3, drop_path=0.3, crop=32, resize=(24, 40))


class Photos:
    "Twelve noisy images; class k is a bright channel k"
    def __init__(self, single=False): self.single, self.classes, self.ids = single, ("red", "green", "blue"), [str(i) for i in range(12)]
    def __len__(self): return 12
    def fingerprint(self): return f"photos-{self.single}"
    def __getitem__(self, i):
        label = np.eye(3, dtype=np.float32)[i % 3] if self.single else np.array([i & 1, i >> 1 & 1, 1], np.float32)
        image = np.random.default_rng(i).integers(0, 120, (36, 36, 3)) + (label*130).astype(int)
        return Sample(str(i), image.astype(np.uint8), label, None)


def fresh(stop_grad="input", seed=0, **kw):
    torch.manual_seed(seed)
    return conformer_mini(3, stop_grad=stop_grad, **TINY, **kw)


def run(model=None, config=QUICK, **kw): return train(fresh() if model is None else model, Photos(), config, progress=False, **kw)
def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---- losses

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
def test_bce_is_equation_1_with_brackets(b, k, seed):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(0, 3, (b, k)), rng.integers(0, 2, (b, k)).astype(float)
    s, total = 1/(1+np.exp(-z)), 0.
    for i in range(b):
        for j in range(k): total -= (y[i, j]*math.log(s[i, j]) + (1-y[i, j])*math.log(1-s[i, j]))/(b*k)
    assert abs(bce_loss(torch.tensor(z), torch.tensor(y)).item()-total) < 1e-9


def test_bce_errors():
    with pytest.raises(ValueError, match="classes of the data set"): bce_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="from 0 to 255"): bce_loss(torch.zeros(1, 2), torch.tensor([[0., 255.]]))


def test_each_branch_has_its_own_loss():
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([[1., 0, 0], [0, 1, 1]])
    task = MultiLabel(fresh())
    losses, (conv, trans) = task(x, y), task.model(x)
    torch.testing.assert_close(losses["loss"], bce_loss(conv, y)+bce_loss(trans, y))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.floats(0, 0.99))
def test_random_mask_hides_the_same_number_everywhere(b, h, w, ratio):
    hidden = random_mask(b, h, w, ratio)
    assert hidden.shape==(b, h, w) and (hidden.flatten(1).sum(1)==round(ratio*h*w)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_square_colors_by_loops(h, w, grid, times):
    s = grid*times
    x = torch.randn(2, 3, h*s, w*s, dtype=torch.float64)
    got = square_colors(x, h, w, grid).view(2, h*w, 3, grid, grid)
    for i in range(h):
        for j in range(w):
            for a in range(grid):
                for b in range(grid):
                    part = x[:, :, i*s+a*times:i*s+(a+1)*times, j*s+b*times:j*s+(b+1)*times]
                    torch.testing.assert_close(got[:, i*w+j, :, a, b], part.mean((2, 3)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0, 0.99))
def test_larger_squares_are_hidden_as_a_whole(h, w, square, ratio):
    hidden = random_mask(2, h, w, ratio, square)
    rows, cols = math.ceil(h/square), math.ceil(w/square)
    for mask in hidden:
        parts = [mask[i*square:(i+1)*square, j*square:(j+1)*square] for i in range(rows) for j in range(cols)]
        assert all(p.all() or not p.any() for p in parts) and sum(p.any().item() for p in parts)==round(ratio*rows*cols)


def test_hidden_pixels_reach_nothing():
    "The network's output does not depend on what is hidden"
    task, x = SingleLabel(fresh("none").eval(), mask_ratio=.5), torch.randn(1, 3, 32, 32)
    y = torch.tensor([[1., 0, 0]])
    torch.manual_seed(5)
    hidden = random_mask(1, 4, 4, .5).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    losses = []
    for changed in (x, torch.where(hidden, x+1, x)):
        torch.manual_seed(5)
        losses.append(task(changed, y))
    assert losses[0]["conv"]==losses[1]["conv"] and losses[0]["trans"]==losses[1]["trans"] and losses[0]["mask"]!=losses[1]["mask"]


def test_mask_term_trains_the_transformer():
    task = SingleLabel(fresh("none"), mask_ratio=.5, mask_weight=2.)
    losses = task(torch.randn(2, 3, 32, 32), torch.eye(3)[:2])
    torch.testing.assert_close(losses["loss"], (losses["conv"]+losses["trans"])/2 + 2*losses["mask"])
    losses["mask"].backward()
    assert task.model.trans_1.attn.qkv.weight.grad.abs().sum()>0 and task.colors.weight.grad.abs().sum()>0


def test_single_label_errors():
    with pytest.raises(ValueError, match="exactly one class per image"): SingleLabel(fresh("none"))(torch.randn(1, 3, 32, 32), torch.ones(1, 3))


# ---- settings, rates, order

def test_published_settings():
    c = TrainConfig()
    assert (c.epochs, c.lr_vit, c.lr_cnn, c.power, c.crop, c.resize)==(5, 2e-4, 5e-4, 0.9, 384, (320, 640))
    assert (c.batch, c.weight_decay, c.drop_path, c.freeze_bn)==(16, 5e-4, 0.1, False)
    with pytest.raises(AttributeError): c.epochs = 6


def test_rates_in_the_log():
    history = run()
    assert len(history)==9 and [h["step"] for h in history]==list(range(1, 10))
    assert all(h["lr_vit"]==1e-3 for h in history)
    assert np.allclose([h["lr_cnn"] for h in history], [1e-3*(1-t/9)**0.9 for t in range(9)])


def test_warmup_and_cosine():
    rates = [learning_rate(t, 100, 1., "cosine", warmup=9) for t in range(100)]
    assert rates[0]==pytest.approx(.1) and max(rates)<1 and np.argmax(rates)==9 and rates[-1]<1e-3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_order_is_shared_among_processes(n, share, world, epoch):
    batch = share*world
    if n<batch:
        with pytest.raises(ValueError, match="do not fill one batch"): EpochBatches(n, batch)
        return
    def lists(**kw):
        order = EpochBatches(n, batch, seed=1, **kw)
        order.epoch = epoch
        return list(order)
    one, many = lists(), [lists(rank=r, world=world) for r in range(world)]
    assert [sum(parts, []) for parts in zip(*many)]==one and all(len(b)==batch for b in one)
    seen = sum(one, [])
    assert len(seen)==len(set(seen))==n//batch*batch and set(seen)<=set(range(n))


@pytest.mark.parametrize("kw,words", [
    (dict(epochs=0), "epochs is 0"), (dict(batch=0), "batch is 0"), (dict(lr_vit=0.), "lr_vit is 0"), (dict(weight_decay=-1), "weight_decay is -1"),
    (dict(schedule_vit="step"), "constant, poly, cosine"), (dict(mixed_precision="half"), "one of fp32, tf32, bf16, fp16"),
    (dict(batch=13), "do not fill one batch"),
    (dict(drop_path=1.), "below 1"), (dict(crop=34), "does not fit")])
def test_bad_settings(kw, words):
    with pytest.raises(ValueError, match=words): run(config=replace(QUICK, **kw))


@pytest.mark.parametrize("kw,words",
                         [(dict(mask_ratio=1.), "mask_ratio is 1.0"), (dict(mask_grid=0), "mask_grid is 0"),
                          (dict(mask_square=0), "mask_square is 0"), (dict(crop=36), "crop 36 is not a multiple")])
def test_bad_pretrain_settings(kw, words):
    with pytest.raises(ValueError, match=words): pretrain(fresh("none"), Photos(True), PretrainConfig(**{**dict(batch=4, crop=32), **kw}), progress=False)


def test_wrong_network():
    with pytest.raises(ValueError, match="3 classes, the network 4"): run(conformer_mini(4, **TINY))
    with pytest.raises(ValueError, match=r"set_stop_grad\('none'\)"): pretrain(fresh(), Photos(True), PretrainConfig(batch=4, crop=32))


# ---- the loop

def test_it_learns():
    history = run(config=replace(QUICK, epochs=10, lr_vit=1e-2, lr_cnn=1e-2, drop_path=0.))
    assert np.mean([h["loss"] for h in history[-6:]]) < 0.8*history[0]["loss"]


def test_pretrain_logs_every_term():
    history = pretrain(fresh("none"), Photos(True), PretrainConfig(epochs=2, batch=4, crop=32, resize=None, mask_ratio=.4), progress=False)
    assert set(history[0])=={"step", "epoch", "loss", "conv", "trans", "mask", "lr_vit", "lr_cnn"} and len(history)==6


@pytest.mark.parametrize("stop_after", [1, 2])
def test_exact_resume(tmp_path, stop_after):
    "Also when the interrupted run used random numbers of its own between the epochs"
    straight, broken, resumed = fresh(), fresh(), fresh()
    history = run(straight)
    def stop(model, epochs_done, history):
        torch.rand(7)
        if epochs_done==stop_after: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(broken, out=tmp_path, callback=stop)
    assert len((tmp_path/"log.jsonl").read_text().splitlines())==3*stop_after
    assert run(resumed, out=tmp_path)==history and equal(straight, resumed)
    assert [json.loads(line) for line in (tmp_path/"log.jsonl").read_text().splitlines()]==history
    assert run(fresh(), out=tmp_path)==history  # a finished run is only read
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_false_starts_again(tmp_path):
    history = run(out=tmp_path)
    assert run(fresh(seed=1), out=tmp_path, resume=False)!=history


def test_workers_change_nothing():
    assert run(config=replace(QUICK, epochs=1))==run(config=replace(QUICK, epochs=1, workers=1))


def test_other_settings_or_data_are_refused(tmp_path):
    run(config=replace(QUICK, epochs=1), out=tmp_path)
    with pytest.raises(ValueError, match="epochs: 1 there, 3 now.*use another folder"): run(out=tmp_path)
    with pytest.raises(ValueError, match="stop_grad: 'input' there, 'none' now"): run(fresh("none"), replace(QUICK, epochs=1), out=tmp_path)
    with pytest.raises(ValueError, match="data: 'photos-False' there"): train(fresh(), Photos(True), replace(QUICK, epochs=1), out=tmp_path, progress=False)


@pytest.mark.parametrize("data", [b"", b"half a file", b"PK\x03\x04torn"])
def test_torn_state(tmp_path, data):
    (tmp_path/"last.pt").write_bytes(data)
    with pytest.raises(ValueError, match="delete it to start again"): run(out=tmp_path)


def test_nan_stops_with_the_last_good_weights():
    model = fresh()
    with torch.no_grad(): model.trans_norm.weight[0] = math.nan
    before = model.conv1.weight.clone()
    with pytest.raises(FloatingPointError, match="trans.*nan.*lower the learning rates"): run(model)
    assert torch.equal(model.conv1.weight, before)


def test_freeze_bn():
    model = fresh()
    before = {n: b.clone() for n, b in model.named_buffers()}
    run(model, replace(QUICK, epochs=1, freeze_bn=True))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    run(model, replace(QUICK, epochs=1))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_output_leaves_the_bridges_alone():
    model = fresh("output")
    before = model.conv_trans_2.squeeze_block.conv_project.weight.clone()
    run(model, replace(QUICK, epochs=1))
    assert torch.equal(model.conv_trans_2.squeeze_block.conv_project.weight, before)


def test_clipping():
    assert run(config=replace(QUICK, epochs=1, clip_norm=1e-3))[0]==run(config=replace(QUICK, epochs=1))[0]  # the first loss is the same,
    assert run(config=replace(QUICK, epochs=1, clip_norm=1e-3))[-1]!=run(config=replace(QUICK, epochs=1))[-1]  # the second is not


def test_bf16():
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    try:
        model = fresh()
        history = run(model, replace(QUICK, epochs=1, mixed_precision="bf16"))
    finally: AcceleratorState._reset_state(reset_partial_state=True)
    assert {p.dtype for p in model.parameters()}=={torch.float32} and all(math.isfinite(h["loss"]) for h in history)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is allowed here")
def test_fp16_needs_a_gpu():
    with pytest.raises(ValueError, match="precision fp16 needs a GPU; on a CPU use fp32 or bf16"): run(config=replace(QUICK, mixed_precision="fp16"))


def test_loss_scale_of_fp16_changes_nothing_and_is_kept(tmp_path):
    "The scaled path of fp16, run in float32: scaling by a power of two is exact, and a resumed run has the scale where it was"
    def scaled(**kw):
        acc = Accelerator(cpu=True)
        acc.scaler = torch.amp.GradScaler("cpu", init_scale=2.**10, growth_interval=2)
        model = fresh()
        history = run(model, accelerator=acc, **kw)
        return model, [h["loss"] for h in history], acc.scaler.get_scale()
    def stop(model, done, history):
        if done==1: raise KeyboardInterrupt
    plain = fresh()
    losses = [h["loss"] for h in run(plain)]
    model, got, scale = scaled()
    assert got==losses and equal(model, plain) and scale==2.**14
    with pytest.raises(KeyboardInterrupt): scaled(out=tmp_path, callback=stop)
    model, got, scale = scaled(out=tmp_path)
    assert got==losses and equal(model, plain) and scale==2.**14


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(parts):
    config = replace(QUICK, freeze_bn=True, drop_path=0., clip_norm=.5)
    a, b = fresh(), fresh()
    one, many = run(a, config), run(b, config, accumulate=parts)
    assert np.allclose([h["loss"] for h in one], [h["loss"] for h in many], rtol=1e-4)
    assert one[0]["loss"]==pytest.approx(many[0]["loss"], rel=1e-6)


def test_accumulation_is_part_of_a_run(tmp_path):
    with pytest.raises(ValueError, match="accumulate is 3; it must divide the 4 images"): run(accumulate=3)
    run(config=replace(QUICK, epochs=1), out=tmp_path)
    assert "accumulate" not in json.loads((tmp_path/"settings.json").read_text())
    with pytest.raises(ValueError, match="accumulate: None there, 2 now"): run(config=replace(QUICK, epochs=1), out=tmp_path, accumulate=2)


# ---- any network, and heads alone

class TwoTowers(nn.Module):
    "The smallest network with the contract: shares nothing with the Conformer"
    num_classes, stride = 3, 8
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cnn, self.vit = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.ReLU()), nn.Conv2d(3, 5, 8, 8)
        self.conv_cls_head, self.trans_cls_head = nn.Linear(6, 3), nn.Linear(5, 3)
    def features(self, x): return self.cnn(x), self.vit(x).flatten(2).mean(2)[:, None].tanh()
    def heads(self, conv, tokens): return self.conv_cls_head(conv.mean((2, 3))), self.trans_cls_head(tokens[:, 0])
    def forward(self, x): return self.heads(*self.features(x))
    def param_groups(self):
        names = [n for n, _ in self.named_parameters()]
        return dict(vit=[n for n in names if n[0] in "vt"], cnn=[n for n in names if n[0]=="c"])


class Mirrored(Photos):
    "Of sizes that differ, and the same after a flip"
    def __init__(self, size=None): super().__init__(); self.size = size
    def fingerprint(self): return f"mirrored-{self.size}"
    def __getitem__(self, i):
        s = super().__getitem__(i)
        h, w = (self.size, self.size) if self.size else (24+8*(i % 2), 32)
        return s._replace(image=np.concatenate([s.image[:h, :w//2], s.image[:h, :w//2][:, ::-1]], 1))


def test_any_network_trains(tmp_path):
    model, again = TwoTowers(), TwoTowers()
    history = run(model, replace(QUICK, lr_vit=1e-2, lr_cnn=1e-2, epochs=10), out=tmp_path)
    assert history[-1]["loss"]<history[0]["loss"] and json.loads((tmp_path/"settings.json").read_text())["stop_grad"] is None
    assert run(again, replace(QUICK, lr_vit=1e-2, lr_cnn=1e-2, epochs=10), out=tmp_path)==history and equal(model, again)


def test_two_branch_trains():
    branches = pytest.importorskip("adcam.branches")
    torch.manual_seed(0)
    model = branches.TwoBranch("resnet10t", "vit_tiny_patch16_224", num_classes=3)
    ds, before = Mirrored(32), model.conv_cls_head.weight.detach().clone()
    assert len(run(model, replace(QUICK, epochs=1, crop=64, resize=(64, 64))))==3 and not torch.equal(model.conv_cls_head.weight, before)
    history = train_heads(model, ds, HeadsConfig(size=64, steps=10), progress=False)
    assert history[-1]["conv"]<history[0]["conv"] and history[-1]["trans"]<history[0]["trans"]


@pytest.mark.parametrize("broken,words",
                         [(lambda m: None, "no param_groups and no num_classes"),
                          (lambda m: dict(vit=[], cnn=["x"]), r"every parameter once.*look at \['cnn.0.bias'")])
def test_contract_errors(broken, words):
    model = TwoTowers()
    if "param_groups and" in words: model = nn.Linear(2, 2)
    else: model.param_groups = lambda: broken(model)
    with pytest.raises(ValueError, match=words): run(model)


def test_frozen_parts_stay():
    model = TwoTowers()
    assert freeze_backbone(model)==["conv_cls_head.weight", "conv_cls_head.bias", "trans_cls_head.weight", "trans_cls_head.bias"]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    run(model, replace(QUICK, epochs=1))
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed==freeze_backbone(model)  # statistics of the frozen BatchNorm are not among them
    with pytest.raises(ValueError, match="every parameter of the network is frozen"): run(model.requires_grad_(False))


@pytest.mark.parametrize("make", [fresh, TwoTowers])
def test_heads_alone_are_training_with_a_frozen_backbone(make):
    "Same losses in every step, same heads: whole images that a flip does not change, all of them in every step"
    slow, fast = make(), make()
    freeze_backbone(slow)
    c = TrainConfig(epochs=8, batch=12, lr_vit=.01, lr_cnn=.01, schedule_cnn="constant", weight_decay=.1, drop_path=0., crop=32, resize=None)
    a = train(slow, Mirrored(32), c, progress=False)
    b = train_heads(fast, Mirrored(32), HeadsConfig(solver="adamw", steps=8, lr=.01, weight_decay=.1), progress=False)
    assert np.allclose([[r["conv"], r["trans"]] for r in a], [[r["conv"], r["trans"]] for r in b], rtol=1e-5)
    for (n, v), w in zip(fast.state_dict().items(), slow.state_dict().values()): torch.testing.assert_close(v, w, rtol=1e-4, atol=1e-5, msg=n)
    assert all(p.requires_grad and p.grad is None for p in fast.parameters()) and not fast.training


def test_features_by_loop():
    "Images of two sizes in batches of three are what each of them is alone"
    model, ds = TwoTowers().eval(), Mirrored()
    f = cached_features(model, ds, batch=3, progress=False)
    for i in range(12):
        with torch.no_grad(): conv, tokens = model.features(to_tensor(ds[i].image)[None])
        torch.testing.assert_close(f.conv[i], conv.mean((2, 3))[0]); torch.testing.assert_close(f.token[i], tokens[0, 0])
        assert torch.equal(f.labels[i], torch.from_numpy(ds[i].label))


def test_solvers():
    f = cached_features(TwoTowers(), Mirrored(), progress=False)
    a, b, c = TwoTowers(), TwoTowers(), TwoTowers()
    best = train_heads(a, f, HeadsConfig(steps=300))
    assert train_heads(b, f, HeadsConfig(steps=300))==best and equal(a, b) and len(best)<300  # deterministic, and it stops by itself
    many = train_heads(c, f, HeadsConfig(solver="adamw", steps=300, lr=.03, weight_decay=0.))
    assert all(r["step"]==i+1 for i, r in enumerate(best)) and best[-1]["loss"]<best[0]["loss"] and many[-1]["loss"]<many[0]["loss"]
    w = {n: p.detach().clone().double().requires_grad_() for n, p in a.named_parameters() if "head" in n}
    z = [x.double()@w[f"{n}.weight"].T+w[f"{n}.bias"] for n, x in (("conv_cls_head", f.conv), ("trans_cls_head", f.token))]
    total = sum(bce_loss(v, f.labels.double()) for v in z)+.0015*sum(v.square().sum() for n, v in w.items() if n.endswith("weight"))
    total.backward()
    assert max(v.grad.abs().max() for v in w.values())<2e-3  # the minimum of loss and penalty


class Counted(Mirrored):
    reads = 0
    def __getitem__(self, i): Counted.reads += 1; return super().__getitem__(i)


def test_cache(tmp_path):
    model, ds, folder = TwoTowers(), Counted(), tmp_path/"with space é"
    def reads(**kw):
        Counted.reads = 0
        f = cached_features(model, ds, cache=folder, progress=False, **kw)
        return f, Counted.reads
    first, n = reads()
    assert n==12 and len(list(folder.iterdir()))==1
    train_heads(model, ds, cache=folder, progress=False)
    again, n = reads()  # the heads are others now, the backbone is not
    assert n==0 and all(torch.equal(a, b) for a, b in zip(first, again))
    assert reads(size=64)[1]==12
    with torch.no_grad(): model.vit.bias.add_(1)
    assert reads()[1]==12 and len(list(folder.iterdir()))==3
    for path in folder.iterdir(): path.write_bytes(b"PK\x03\x04torn")
    with pytest.warns(UserWarning, match="not a readable features file"): assert reads()[1]==12
    assert reads()[1]==0 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("kw,words",
                         [(dict(solver="sgd"), "'lbfgs' or 'adamw'"), (dict(steps=0), "steps is 0"), (dict(batch=0), "batch is 0"), (dict(lr=0.), "lr is 0"),
                                      (dict(weight_decay=-1.), "weight_decay -1"), (dict(size=0), "size is 0")])
def test_bad_heads_settings(kw, words):
    with pytest.raises(ValueError, match=words): train_heads(TwoTowers(), Mirrored(), HeadsConfig(**kw), progress=False)


def test_heads_errors():
    f = cached_features(TwoTowers(), Mirrored(), progress=False)
    with pytest.raises(ValueError, match="no parameters under conv_cls_head or trans_cls_head"): freeze_backbone(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="4 classes, the network 3"): train_heads(TwoTowers(), f._replace(labels=torch.zeros(12, 4)))
    with pytest.raises(FloatingPointError, match="nan in step 1"): train_heads(TwoTowers(), f._replace(conv=f.conv*math.nan))


# ---- files

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_weights(tmp_path, dtype):
    model = fresh()
    run(model, replace(QUICK, epochs=1))
    path = save_weights(model, tmp_path/"deep/w.safetensors", dtype)
    again = load_checkpoint(fresh(seed=5), path)
    for (n, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a.to(dtype).to(a.dtype) if n in dict(model.named_parameters()) else a, b), n
    assert not list((tmp_path/"deep").glob("*.tmp"))


def test_save_weights_refuses_what_does_not_fit(tmp_path):
    model = fresh()
    with torch.no_grad(): model.cls_token[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="not finite as torch.float16.*cls_token"): save_weights(model, tmp_path/"w.safetensors", torch.float16)
    assert save_weights(model, tmp_path/"w.safetensors").exists()


# ---- several processes

SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_classifier import *
model = fresh()
history = train(model, Photos(), {config}, out={out!r}, progress=False)
if int(__import__("os").environ.get("RANK", 0))==0: save_weights(model, {out!r}+"/w.safetensors")
"""


def test_two_processes_equal_one(tmp_path):
    "With the same whole batch. BatchNorm statistics are frozen (they would come from half a batch each), drop path is off (each process draws its own)"
    config = replace(QUICK, epochs=2, freeze_bn=True, drop_path=0.)
    one = fresh()
    history = run(one, config)
    script = tmp_path/"script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), config=repr(config), out=str(tmp_path)))
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
                          env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode==0, done.stderr[-3000:]
    two = load_checkpoint(fresh(seed=3), tmp_path/"w.safetensors")
    rows = [json.loads(line) for line in (tmp_path/"log.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path/"settings.json").read_text())["processes"]==2
    assert np.allclose([r["loss"] for r in rows], [r["loss"] for r in history], rtol=1e-5)
    for (n, a), b in zip(one.state_dict().items(), two.state_dict().values()): torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=n)
    with pytest.raises(ValueError, match="processes: 2 there, 1 now"): run(config=config, out=tmp_path)


def test_lbfgs_does_not_stall_on_features_of_different_scale():
    rng = torch.Generator().manual_seed(0)
    conv, token = .1*torch.randn(60, 6, generator=rng).relu(), 4*torch.randn(60, 5, generator=rng)
    labels = torch.stack([conv[:, 0] > .05, token[:, 0] > 0, conv[:, 1] > conv[:, 2]], 1).float()
    model, f, penalty = TwoTowers(), Features(conv, token, labels), 1e-3
    train_heads(model, f, HeadsConfig(steps=200, weight_decay=penalty))
    heads = [model.conv_cls_head, model.trans_cls_head]
    size = sum(h.weight.square().sum() for h in heads)
    total = sum(torch.nn.functional.binary_cross_entropy_with_logits(h(x), labels) for h, x in zip(heads, (conv, token))) + penalty/2*size
    gradient = torch.autograd.grad(total, [p for h in heads for p in h.parameters()])
    assert max(g.abs().max() for g in gradient) < 1e-3  # the problem is convex: where the gradient is nearly nothing, there is the minimum
