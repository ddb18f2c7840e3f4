"""adcam.segment on a network of a thousand weights: views, masks, exact resume, guards, prediction, files, the archive."""
import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import adcam.segment as segment
from adcam.crf import DEEPLAB
from adcam.data import to_tensor
from adcam.evaluation import scores
from adcam.irnet import save_mask
from adcam.scenes import Sample
from adcam.segment import (RECIPES, SegConfig, SegViews, Stream, check_masks, confusions, enlarge, load_mask, predict, predict_dataset, predict_logits,
                           probabilities, refine, score_predictions, train_segmentation, training_view, voc_archive)


class Net(nn.Module):
    "Two classes and the background, stride 4, with dropout and BatchNorm"
    num_classes, pad_value, freeze_bn, preprocess = 3, (0., 0., 0.), False, staticmethod(to_tensor)

    def __init__(self, dropout=.1):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        z = self.head(self.body(x))
        return [z, z[..., ::2, ::2]] if self.training else z

    def groups(self, lr, weight_decay):
        return [dict(params=list(self.body.parameters()), lr=lr, weight_decay=weight_decay),
                dict(params=list(self.head.parameters()), lr=2*lr, weight_decay=0.)]


class Blobs:
    "Gray noise with a red and a green square, of several sizes"
    classes, has_masks = ("red", "green"), True

    def __init__(self, n=8, masks=True):
        self.ids, self.masks = [f"blob_{i:03d}" for i in range(n)], masks

    def __len__(self): return len(self.ids)
    def fingerprint(self): return f"{len(self)} blobs"

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        h, w = 40 + 4*(i % 3), 48 - 5*(i % 2)
        image, mask = rng.integers(90, 130, (h, w, 3)).astype(np.uint8), np.zeros((h, w), np.uint8)
        for k, x in ((1, 4), (2, 24)):
            y = int(rng.integers(2, 16))
            mask[y:y + 14, x:x + 14], image[y:y + 14, x:x + 14] = k, np.eye(3)[k - 1]*200
        return Sample(self.ids[i], image, np.ones(2, np.float32), mask if self.masks else None)


def truth(sample): return sample.mask


ds = Blobs()
QUICK = SegConfig(iterations=14, batch=4, accumulate=2, crop=32, scales=(.75, 1., 1.25), lr=.05, check=4)


@pytest.fixture(scope="module")
def trained():
    "(network, history) of a run that is long enough to know red from green"
    torch.set_num_threads(1)
    net = Net()
    return net, train_segmentation(net, ds, truth, replace(QUICK, iterations=60), progress=False)


# views and order

@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.sampled_from([(1.,), (.5, 1.5), (.5, .75, 1., 1.25, 1.5)]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_view_is_scale_pad_crop_flip_in_this_order(H, W, crop, scales, seed):
    rng = np.random.default_rng(seed)
    image, mask, pad = rng.integers(0, 256, (H, W, 3)).astype(np.uint8), rng.integers(0, 3, (H, W)).astype(np.uint8), (.1, .2, .3)
    x, y = training_view(image, mask, crop, scales, np.random.default_rng(seed), to_tensor, pad)
    rng = np.random.default_rng(seed)
    factor = scales[rng.integers(len(scales))]
    h, w = max(1, round(H*factor)), max(1, round(W*factor))
    big_x, big_y = torch.tensor(pad).view(3, 1, 1).repeat(1, max(h, crop), max(w, crop)), torch.full((max(h, crop), max(w, crop)), 255)
    big_x[:, :h, :w] = to_tensor(np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)))
    big_y[:h, :w] = torch.tensor(np.array(Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST)))
    top, left = (int(rng.integers(n - crop + 1)) for n in big_y.shape)
    want = big_x[:, top:top + crop, left:left + crop], big_y[top:top + crop, left:left + crop]
    if rng.random() < .5: want = want[0].flip(-1), want[1].flip(-1)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, want[0]) and torch.equal(y, want[1])


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 5), st.integers(1, 12), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_the_stream_has_no_memory_and_no_gaps(n, share, start, length, world):
    whole = list(Stream(n, share*world, 3, 0, start + length))
    assert list(Stream(n, share*world, 3, start, start + length)) == whole[start:]
    parts = [list(Stream(n, share*world, 3, 0, start + length, r, world)) for r in range(world)]
    assert [sum(b, []) for b in zip(*parts)] == whole
    line = sum(whole, [])
    for e in range(len(line)//n): assert sorted(line[e*n:(e + 1)*n]) == [(e, i) for i in range(n)]


def test_views_depend_on_seed_epoch_and_index_only():
    views, again = (SegViews(ds, truth, Net(), QUICK) for _ in range(2))
    again[3, 1]
    assert torch.equal(views[2, 5][0], again[2, 5][0])
    assert not torch.equal(views[2, 5][0], views[3, 5][0])
    assert not torch.equal(views[2, 5][0], SegViews(ds, truth, Net(), replace(QUICK, seed=1))[2, 5][0])
    assert torch.equal(SegViews(ds, truth, Net(), QUICK, [5, 6])[2, 0][0], views[2, 5][0])


# masks

def write_masks(folder, n=8, **odd):
    for i in range(n): save_mask(folder/f"{ds.ids[i]}.png", odd.get(f"m{i}", ds[i].mask))
    return folder


def test_masks_of_a_folder_and_of_a_function_are_the_same(tmp_path):
    a, b = check_masks(ds, write_masks(tmp_path), 3), check_masks(ds, truth, 3)
    assert a.usable == b.usable == list(range(8)) and (a.pixels == b.pixels).all() and a.pixels[1] == a.pixels[2] == 8*14*14


@pytest.mark.parametrize("odd,words",
                         [(dict(m2=ds[2].mask*9), r"blob_002.png holds class ids \[9, 18\]"),
                          (dict(m2=None), "no mask .*blob_002.png; make it by make_pseudo_masks")])
def test_a_wrong_mask_file_is_named_before_training(tmp_path, odd, words):
    write_masks(tmp_path, **{k: v for k, v in odd.items() if v is not None})
    if odd["m2"] is None: (tmp_path/"blob_002.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=words): train_segmentation(Net(), ds, tmp_path, QUICK, progress=False)


def test_a_mask_of_other_size_is_named(tmp_path):
    write_masks(tmp_path, m3=ds[3].mask[:-2])
    with pytest.raises(ValueError, match="blob_003.png is 38x43, its image 40x43"): train_segmentation(Net(), ds, tmp_path, QUICK, progress=False)
    with pytest.raises(ValueError, match=r"mask of blob_000 has shape \(39, 48\)"): load_mask(lambda s: s.mask[1:], ds[0], 3)
    with pytest.raises(ValueError, match="dtype float32"): load_mask(lambda s: s.mask.astype(np.float32), ds[0], 3)
    with pytest.raises(ValueError, match=r"class ids \[-1\]"): load_mask(lambda s: s.mask.astype(int) - 1, ds[0], 3)


def test_a_colored_mask_is_refused(tmp_path):
    write_masks(tmp_path)
    Image.fromarray(ds[1].image).save(tmp_path/"blob_001.png")
    with pytest.raises(ValueError, match="color mode RGB; class ids need a palette"): check_masks(ds, tmp_path, 3)


def test_masks_of_255_are_left_out_and_named(tmp_path):
    write_masks(tmp_path, m5=np.full_like(ds[5].mask, 255))
    with pytest.warns(UserWarning, match="1 of 8 masks are 255 everywhere and are left out, first blob_005"): found = check_masks(ds, tmp_path, 3)
    assert found.usable == [0, 1, 2, 3, 4, 6, 7] and found.void == ["blob_005"]
    with pytest.warns(UserWarning, match="blob_005"): history = train_segmentation(Net(), ds, tmp_path, QUICK, progress=False)
    assert all(np.isfinite(r["loss"]) for r in history)


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no image can be trained on: the masks hold 8 masks of nothing but 255"):
        train_segmentation(Net(), ds, lambda s: np.full_like(s.mask, 255), QUICK, progress=False)
    with pytest.raises(ValueError, match="no object in any of 8 masks"): train_segmentation(Net(), ds, lambda s: 0*s.mask, QUICK, progress=False)
    with pytest.raises(ValueError, match="the data set is empty"): train_segmentation(Net(), Blobs(0), truth, QUICK, progress=False)


def test_a_part_that_is_all_255_adds_nothing():
    def corner(s):
        return np.where(np.add.outer(np.arange(s.mask.shape[0]), np.arange(s.mask.shape[1])) < 8, s.mask, 255).astype(np.uint8) if s.id < "blob_006" else s.mask
    history = train_segmentation(Net(), ds, corner, replace(QUICK, batch=2, crop=12, iterations=30, patience=99), progress=False)
    assert all(np.isfinite(r["loss"]) for r in history) and min(r["loss"] for r in history) == 0


# settings

@pytest.mark.parametrize("change,words",
                         [(dict(iterations=0), "iterations is 0"), (dict(batch=5), "a multiple of 2"), (dict(lr=0.), "lr is 0.0"),
                          (dict(scales=()), "one or more factors"),
    (dict(optimizer="adam"), "'sgd' or 'adamw'"), (dict(mixed_precision="half"), "one of fp32, tf32, bf16, fp16"), (dict(crop=0), "crop is 0"),
    (dict(patience=0), "patience is 0"), (dict(warmup=-1), "warmup is -1")])
def test_settings_that_cannot_work(change, words):
    with pytest.raises(ValueError, match=words): train_segmentation(Net(), ds, truth, replace(QUICK, **change), progress=False)


def test_the_network_must_fit_the_data():
    net = Net(); net.num_classes = 5
    with pytest.raises(ValueError, match="the network has 5 classes, the data 2 and the background; build it with num_classes=3"):
        train_segmentation(net, ds, truth, QUICK)
    with pytest.raises(ValueError, match="Linear has no num_classes"): train_segmentation(nn.Linear(2, 2), ds, truth, QUICK)


def test_rates_are_those_of_the_golden_trace(golden):
    trace = json.loads((golden/"irn/deeplab_log.json").read_text())["poly_lr_after_iter"]
    c = RECIPES["deeplabv2_voc"]
    optimizer = segment._optimizer(Net(), c)
    for step, lr in trace.items():
        segment._set_rates(optimizer, int(step), c)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr, 2*lr], rel=1e-12, abs=1e-20)
    assert optimizer.defaults["momentum"] == .9 and c.weight_decay == 5e-4 and (c.batch, c.accumulate, c.crop, c.iterations) == (10, 2, 321, 20_000)


def test_warm_up_and_adamw():
    history = train_segmentation(Net(), ds, truth, replace(QUICK, optimizer="adamw", lr=.01, warmup=4, power=1., update=1), progress=False)
    assert [r["lr"] for r in history[:3]] == pytest.approx([.01*(t + 1)/5*(1 - t/14) for t in range(3)])


# the loop

@pytest.mark.parametrize("together", [True, False])
def test_parts_of_a_batch_average_their_losses(together):
    "One SGD step with two parts equals a step with the mean of the two losses, whether they share a pass or not"
    c, net, other = replace(QUICK, iterations=1, momentum=0., weight_decay=0., together=together), Net(0.), Net(0.)
    net.freeze_bn = other.freeze_bn = True
    history = train_segmentation(net, ds, truth, c, progress=False)
    views = SegViews(ds, truth, other, c)
    places = next(iter(Stream(8, 4)))
    segment._begin(other, c)
    losses = [segment.segmentation_loss(other(torch.stack([views[p][0] for p in part])),
                                        torch.stack([views[p][1] for p in part])) for part in (places[:2], places[2:])]
    (sum(losses)/2).backward()
    assert history[0]["loss"] == pytest.approx(sum(losses).item()/2, rel=1e-5)
    with torch.no_grad(): other.head.weight -= .1*other.head.weight.grad
    torch.testing.assert_close(net.head.weight, other.head.weight)


@pytest.mark.parametrize("change, sizes", [(dict(freeze_bn=True, together=True), [4]), (dict(freeze_bn=True), [2, 2]), (dict(freeze_bn=True, together=False), [2, 2]), (dict(freeze_bn=False, together=True), [2, 2])])
def test_parts_share_a_pass_only_where_batchnorm_stands_still(change, sizes):
    net, seen = Net(), []
    net.body.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    train_segmentation(net, ds, truth, replace(QUICK, iterations=1, **change), progress=False)
    assert seen == sizes


class Killed(Exception): pass


@pytest.mark.parametrize("at", [1, 7, 13])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, at):
    whole, step = train_segmentation(net := Net(), ds, truth, QUICK, progress=False), segment._gradients
    left = iter(range(at))
    def power_cut(*args):
        if next(left, None) is None: raise Killed
        return step(*args)
    monkeypatch.setattr(segment, "_gradients", power_cut)
    with pytest.raises(Killed): train_segmentation(Net(), ds, truth, QUICK, out=tmp_path, progress=False)
    monkeypatch.setattr(segment, "_gradients", step)
    torch.rand(17)                                                  # another random state, which must not matter
    again = train_segmentation(other := Net(), ds, truth, QUICK, out=tmp_path, progress=False)
    assert again == whole and [json.loads(r) for r in (tmp_path/"log.jsonl").read_text().splitlines()] == whole
    for a, b in zip(net.state_dict().values(), other.state_dict().values()): assert torch.equal(a, b)
    written = load_file(tmp_path/"weights.safetensors")
    for k, v in net.state_dict().items(): assert torch.equal(written[k], v)


def test_workers_change_nothing():
    c = replace(QUICK, iterations=3)
    assert train_segmentation(Net(), ds, truth, replace(c, workers=1), progress=False) == train_segmentation(Net(), ds, truth, c, progress=False)


def test_a_finished_run_is_not_overwritten(tmp_path):
    c = replace(QUICK, iterations=4)
    first = train_segmentation(Net(), ds, truth, c, out=tmp_path, progress=False)
    stamp = (tmp_path/"weights.safetensors").stat().st_mtime_ns
    assert train_segmentation(Net(), ds, truth, c, out=tmp_path, progress=False) == first
    assert (tmp_path/"weights.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="holds a finished run; choose another folder, or pass force=True"):
        train_segmentation(Net(), ds, truth, c, out=tmp_path, resume=False, progress=False)
    with pytest.raises(ValueError, match=r"holds a finished run with other settings \(lr: 0.05 there, 0.1 now\)"):
        train_segmentation(Net(), ds, truth, replace(c, lr=.1), out=tmp_path, progress=False)
    (tmp_path/"last.pt").unlink()                                   # even without it
    for config in (c, replace(c, lr=.1)):
        with pytest.raises(ValueError, match="finished run"): train_segmentation(Net(), ds, truth, config, out=tmp_path, progress=False)
    forced = train_segmentation(Net(), ds, truth, replace(c, lr=.1), out=tmp_path, force=True, progress=False)
    assert forced[1]["loss"] != first[1]["loss"] and json.loads((tmp_path/"settings.json").read_text())["lr"] == .1


def test_another_class_count_in_the_folder_is_named(tmp_path):
    train_segmentation(Net(), ds, truth, replace(QUICK, iterations=4), out=tmp_path, progress=False)
    net, other = Net(), Blobs()
    net.num_classes, other.classes, net.head = 4, ("red", "green", "blue"), nn.Conv2d(16, 4, 1)
    with pytest.raises(ValueError, match="num_classes: 3 there, 4 now"):
        train_segmentation(net, other, truth, replace(QUICK, iterations=4), out=tmp_path, progress=False)


def test_a_torn_checkpoint_is_named(tmp_path):
    train_segmentation(Net(), ds, truth, replace(QUICK, iterations=4), out=tmp_path, progress=False)
    (tmp_path/"last.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="last.pt .*force=True to start again"):
        train_segmentation(Net(), ds, truth, replace(QUICK, iterations=4), out=tmp_path, progress=False)


def test_a_loss_that_is_no_number_stops_at_the_last_good_weights(monkeypatch):
    net, seen = Net(), []
    def broken(*a, **k):
        seen.append({k: v.clone() for k, v in net.named_parameters()})
        return loss(*a, **k)*(float("nan") if len(seen) > 4 else 1)
    loss = segment.segmentation_loss
    monkeypatch.setattr(segment, "segmentation_loss", broken)
    with pytest.raises(FloatingPointError, match="the loss became {'loss': nan, .* in step 3; lower lr"):
        train_segmentation(net, ds, truth, QUICK, progress=False)
    for k, v in net.named_parameters(): assert torch.equal(v, seen[4][k])
    assert not net.training


def test_only_background_stops_with_the_reason():
    net = Net()
    nn.init.zeros_(net.head.weight); net.head.bias.data = torch.tensor([9., 0., 0.])
    with pytest.raises(ValueError, match=r"only background for 5 iterations, since 0 of 14: .*objects are \d+\.\d % of their pixels"):
        train_segmentation(net, ds, truth, replace(QUICK, lr=1e-9, patience=5), progress=False)


def test_best_and_last(tmp_path):
    net = Net()
    history = train_segmentation(net, ds, truth, replace(QUICK, iterations=12), out=tmp_path, val=Blobs(4), progress=False)
    measured = {r["step"]: r["miou"] for r in history if "miou" in r}
    assert list(measured) == [4, 8, 12]
    best = Net().eval(); best.load_state_dict(load_file(tmp_path/"best.safetensors"))
    assert scores(confusions(best, Blobs(4), (False,))[False])["miou"] == pytest.approx(max(measured.values()))
    assert scores(confusions(net, Blobs(4), (False,))[False])["miou"] == pytest.approx(measured[12])


def test_tensorboard_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = train_segmentation(Net(), ds, truth, replace(QUICK, iterations=6), out=tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path/"tensorboard")).Reload().Scalars("loss")
    assert [e.step for e in events] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events] == pytest.approx([r["loss"] for r in history], rel=1e-6)


def test_tensorboard_is_only_looked_for_with_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)    # as if it were not installed
    c = replace(QUICK, iterations=2)
    train_segmentation(Net(), ds, truth, c, progress=False)
    with pytest.warns(UserWarning, match="pip install tensorboard"): train_segmentation(Net(), ds, truth, c, out=tmp_path, progress=False)
    assert not (tmp_path/"tensorboard").exists() and (tmp_path/"weights.safetensors").exists()


def test_bf16_follows_float32():
    a = train_segmentation(Net(), ds, truth, QUICK, progress=False)
    AcceleratorState._reset_state()                                 # accelerate keeps one precision per process
    try: b = train_segmentation(Net(), ds, truth, replace(QUICK, mixed_precision="bf16"), progress=False)
    finally: AcceleratorState._reset_state()
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], rel=.1) and a != b


@pytest.mark.parametrize("freeze", [True, False])
def test_batchnorm_keeps_or_follows(freeze):
    net = Net()
    before = net.body[1].running_mean.clone()
    train_segmentation(net, ds, truth, replace(QUICK, iterations=3, freeze_bn=freeze), progress=False)
    assert torch.equal(before, net.body[1].running_mean) is freeze


# prediction

def test_it_learns(trained):
    net, history = trained
    assert not net.training and history[-1]["loss"] < .5*history[0]["loss"]
    assert scores(confusions(net, Blobs(4), (False,))[False])["miou"] > .7


@given(st.integers(4, 40), st.integers(4, 40), st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_size(trained, H, W, crf):
    image = np.random.default_rng(H*W).integers(0, 256, (H, W, 3)).astype(np.uint8)
    labels, p = predict(trained[0], image, crf=crf), probabilities(trained[0], image, crf=crf)
    assert labels.shape == (H, W) and labels.dtype == np.uint8 and labels.max() <= 2
    assert p.shape == (3, H, W) and (p.argmax(0) == labels).all()
    np.testing.assert_allclose(p.sum(0), 1, atol=2e-3)


def test_the_crf_sees_the_real_image_and_deeplabs_settings(trained, monkeypatch):
    seen = {}
    def spy(unary, image, **options):
        seen.update(unary=unary, image=image, options=options)
        return crf(unary, image, **options)
    crf = segment.dense_crf
    monkeypatch.setattr(segment, "dense_crf", spy)
    predict(trained[0], ds[0].image, floor=0, srgb=5)
    assert (seen["image"] == ds[0].image).all() and seen["image"].dtype == np.uint8 and seen["options"] == DEEPLAB | dict(srgb=5)
    z = enlarge(predict_logits(trained[0], ds[0].image), ds[0].image.shape[:2])
    torch.testing.assert_close(seen["unary"], -z.log_softmax(0))


def test_improbable_classes_change_nothing():
    torch.manual_seed(0)
    z = nn.functional.interpolate(torch.randn(1, 3, 5, 6)*3, (40, 48), mode="bilinear")[0]
    z = torch.cat([z, torch.full((6, 40, 48), -9.)])                # six classes that are nowhere
    fast, slow = (refine(z, ds[0].image, floor=f) for f in (1e-3, 0))
    assert (fast[3:] == 0).all() and slow[3:].max() < 1.1e-3
    assert (fast.argmax(0) == slow.argmax(0)).float().mean() > .999
    with pytest.raises(ValueError, match="floor is 0.5"): refine(z, ds[0].image, floor=.5)


def test_a_picture_of_one_class_needs_no_crf():
    z = torch.full((3, 7, 9), -20.); z[1] = 20
    assert (refine(z, np.zeros((7, 9, 3), np.uint8)).argmax(0) == 1).all()


def test_what_cannot_be_predicted(trained):
    net = trained[0]
    with pytest.raises(ValueError, match="training mode"): predict(Net().train(), ds[0].image)
    with pytest.raises(ValueError, match=r"give uint8 \(H,W,3\)"): predict(net, ds[0].image/255)
    with pytest.raises(ValueError, match="up to 4000 per side"): predict(net, np.zeros((4, 4001, 3), np.uint8))
    sick = Net().eval(); sick.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"): predict(sick, ds[0].image)
    with pytest.raises(ValueError, match="blob_000 has no mask"): confusions(net, Blobs(2, masks=False))


# files

@pytest.fixture
def predicted(trained, tmp_path):
    "A network, images without masks, and the folder of its predictions"
    net, few = trained[0], Blobs(5, masks=False)
    assert predict_dataset(net, few, tmp_path/"a", processes=1, progress=False) == dict(computed=5, cached=0, skipped=[])
    return net, few, tmp_path/"a"


def test_predictions_of_a_folder_are_those_of_single_images(predicted):
    net, few, folder = predicted
    with Image.open(folder/"blob_001.png") as im:
        assert im.mode == "P" and (np.array(im) == predict(net, few[1].image)).all()


def test_torn_and_lost_predictions_are_made_again_by_any_number_of_processes(predicted, capsys):
    net, few, folder = predicted
    data = (folder/"blob_001.png").read_bytes()
    (folder/"blob_001.png").write_bytes(data[:60]); (folder/"blob_003.png").unlink()
    assert predict_dataset(net, few, folder, processes=2, progress=False) == dict(computed=2, cached=3, skipped=[])
    assert (folder/"blob_001.png").read_bytes() == data and "redone" in capsys.readouterr().out


def test_predictions_with_other_settings_are_refused_and_replaced_by_force(predicted):
    net, few, folder = predicted
    again = partial(predict_dataset, net, few, folder, crf=False, processes=1, progress=False)
    with pytest.raises(ValueError, match="crf: True there, False now"): again()
    assert again(force=True)["computed"] == 5


def test_predictions_of_another_network_are_refused(predicted):
    _, few, folder = predicted
    with pytest.raises(ValueError, match="network:"): predict_dataset(Net(), few, folder, processes=1, progress=False)


def test_shards_make_the_whole(trained, tmp_path):
    few = Blobs(5)
    assert [predict_dataset(trained[0], few, tmp_path, crf=False, shard=(r, 2), processes=1, progress=False)["computed"] for r in (0, 1)] == [3, 2]
    assert predict_dataset(trained[0], few, tmp_path, crf=False, processes=1, progress=False) == dict(computed=0, cached=5, skipped=[])
    with pytest.raises(ValueError, match="shard is"): predict_dataset(trained[0], few, tmp_path, shard=(2, 2))


def test_scores_of_files_are_those_of_the_network(trained, tmp_path):
    few = Blobs(3)
    predict_dataset(trained[0], few, tmp_path, processes=1, progress=False)
    a, b = score_predictions(tmp_path, few), scores(confusions(trained[0], few, (True,))[True])
    assert {"miou", "iou", "f1", "pixel_accuracy"} <= a.keys() and len(a["iou"]) == 3
    np.testing.assert_allclose(a["iou"], b["iou"])
    with pytest.raises(FileNotFoundError, match="blob_003.png; run predict_dataset"): score_predictions(tmp_path, Blobs(4))
    with pytest.raises(ValueError, match="blob_000 has no mask"): score_predictions(tmp_path, Blobs(3, masks=False))


def test_nothing_to_predict(trained, tmp_path):
    with pytest.raises(ValueError, match="the list of images is empty"): predict_dataset(trained[0], Blobs(0), tmp_path)


# the archive

@pytest.mark.parametrize("name,listing",
                         [("a.zip", lambda f: zipfile.ZipFile(f).namelist()), ("a.tar.gz", lambda f: tarfile.open(f).getnames()),
                          ("a.tgz", lambda f: tarfile.open(f).getnames())])
def test_the_archive_has_the_servers_paths(tmp_path, name, listing):
    write_masks(tmp_path, 3)
    file = voc_archive(tmp_path, ds.ids[:3], tmp_path/name)
    assert listing(file) == [f"results/VOC2012/Segmentation/comp6_test_cls/{i}.png" for i in ds.ids[:3]]
    voc_archive(tmp_path, ds.ids[:3], tmp_path/name, competition="comp5", image_set="val")
    assert listing(file)[0] == "results/VOC2012/Segmentation/comp5_val_cls/blob_000.png"


def test_the_archive_holds_the_files_unchanged(tmp_path):
    write_masks(tmp_path, 2)
    with tarfile.open(voc_archive(tmp_path, ds.ids[:2], tmp_path/"a.tar.gz", sizes=lambda i: ds[ds.ids.index(i)].mask.shape)) as t:
        for member in t: assert t.extractfile(member).read() == (tmp_path/member.name.split("/")[-1]).read_bytes()


def test_what_the_server_would_refuse(tmp_path):
    write_masks(tmp_path, 3, m1=np.full((4, 4), 255))
    cases = [("blob_007.png; run predict_dataset", dict(ids=[ds.ids[0], "blob_007"])), ("class id 255; VOC has 0", dict(ids=ds.ids[:2])),
             ("no known suffix", dict(file=tmp_path/"a.rar")),
             ("is empty", dict(ids=[])), ("choose comp5 or comp6", dict(competition="comp7")), ("stands twice", dict(ids=[ds.ids[0]]*2)),
             ("its image 9x9", dict(sizes=lambda i: (9, 9)))]
    for words, options in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words): voc_archive(tmp_path, **(dict(ids=ds.ids[:1], file=tmp_path/"a.zip") | options))
    for mode in ("RGB", "L"):
        Image.fromarray(ds[0].mask).convert(mode).save(tmp_path/"blob_000.png")
        with pytest.raises(ValueError, match=f"color mode {mode}; the server wants a palette PNG"): voc_archive(tmp_path, ds.ids[:1], tmp_path/"a.zip")
    (tmp_path/"blob_000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="delete it and predict again"): voc_archive(tmp_path, ds.ids[:1], tmp_path/"a.zip")
    assert not (tmp_path/"a.zip").exists()
