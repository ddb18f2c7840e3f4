"""adcam.cnn: networks of any kind, IRN's ResNet-50 against its golden numbers, training by SGD and AdamW, one and two processes."""
import json, os, signal, subprocess, sys
from dataclasses import asdict, replace

import numpy as np, pytest, torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from hypothesis import given, settings, strategies as st
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from adcam.branches import TwoBranch
from adcam.classifier import PolySGD, TrainConfig, fit, save_weights, train
from adcam.cnn import (MINI_PRETRAIN, MINI_TRAIN, CamNet, CamTask, SGDConfig, SingleCam, cam_resnet50, check_differentiable, class_features, class_weights,
                       load_backbone, load_cam, mini_path, poly_sgd, pretrain_cam, pretrain_mini, resnet_mini, train_cam, train_mini)
from adcam.cam import cam_map
from adcam.conformer import conformer_mini
from adcam.pipeline import profiles
from adcam.run import train_config
from adcam.scenes import Scenes
from adcam.seeds import extract, merge, view_maps
from test_classifier import Photos

QUICK = SGDConfig(epochs=3, batch=4, crop=32, resize=(24, 40), lr_backbone=.01, lr_head=.1)


def net(seed=0, classes=3, **options):
    "A ResNet of four blocks that is trained within a second"
    torch.manual_seed(seed)
    return CamNet(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 4, 8, 8)), classes, **options)


def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---- the official network

@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture(scope="module")
def manifest(golden): return {k: tuple(s) for k, s in json.loads((golden/"irn/manifest_cam_resnet50.json").read_text())["keys"]}


@pytest.fixture(scope="module")
def official(rules, manifest):
    model = cam_resnet50()
    model.load_state_dict({k: torch.from_numpy(np.asarray(rules.fill(k, s))) for k, s in manifest.items()})
    return model.eval()


@pytest.fixture(scope="module")
def g06(golden): return np.load(golden/"irn/g06_cam.npz", allow_pickle=False)


def close(a, b): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_names_and_shapes_of_the_manifest(official, manifest):
    assert {k: tuple(v.shape) for k, v in official.state_dict().items()}==manifest
    assert sum(p.numel() for p in official.parameters())==23_548_992 and official.stride==16


@torch.no_grad()
def test_golden_logits_and_maps(official, rules, g06):
    x = torch.from_numpy(rules.nrm(50, (3, 81, 110)))
    close(official(torch.stack([x, x.flip(-1)])).numpy(), g06["logit"])
    close(view_maps(official, x[None], list(range(20)), cam_map, flip=True).numpy(), g06["cam_81x110"])
    o = official.maps(torch.stack([x, x.flip(-1)])).cam.relu()
    close((o[0]+o[1].flip(-1)).numpy(), g06["cam_81x110"])


def test_golden_merge(rules, g06):
    views = [torch.from_numpy(np.maximum(rules.nrm(60+i, (20, *s)), 0))[g06["merge_keys"]] for i, s in enumerate([(6, 7), (3, 4), (8, 11), (11, 14)])]
    strided, full = merge(views, (81, 110), up=16)
    close(strided.numpy(), g06["merge_strided"])
    close(full[:, ::4, ::4].numpy(), g06["merge_highres_ds4"])
    close(full.sum((1, 2)).numpy(), g06["merge_highres_sum"])


def test_official_checkpoint_with_its_copies(official, tmp_path):
    "The reference implementation saves each tensor of the backbone three times, DistributedDataParallel puts `module.` before it"
    state = official.state_dict()
    copies = {f"{p}{k.removeprefix('resnet50.')}": v for k, v in state.items() for p in ("stage4.0.", "backbone.0.")}
    torch.save({f"module.{k}": v for k, v in (state | copies | {"newly_added.0.weight": state["classifier.weight"]}).items()}, tmp_path/"official.pth")
    assert equal(load_cam(cam_resnet50(), tmp_path/"official.pth"), official)


def test_imagenet_file(tmp_path):
    "A file of torchvision's names, with its classifier, becomes the backbone"
    import timm
    timm_net = timm.create_model("resnet50.tv_in1k")
    torch.save(timm_net.state_dict(), tmp_path/"resnet50.pth")
    model = cam_resnet50(weights=tmp_path/"resnet50.pth")
    assert torch.equal(model.resnet50.layer4[0].conv2.weight, timm_net.layer4[0].conv2.weight)
    (tmp_path/"other.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="other.pth does not fit resnet50"): cam_resnet50(weights=tmp_path/"other.pth")
    with pytest.raises(FileNotFoundError, match="no weight file"): cam_resnet50(weights=tmp_path/"none.pth")


@pytest.mark.parametrize("last,first", [("layer2", "layer3"), ("bn1", "layer1")])
def test_no_gradient_below_the_cut_but_in_the_image(last, first):
    model = net(detach_after=last)
    x = torch.randn(2, 3, 40, 40, requires_grad=True)
    model(x).square().sum().backward()
    layers = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    for i, name in enumerate(layers):
        grads = [p.grad for p in getattr(model.backbone, name).parameters()]
        assert all((g is None)==(i<layers.index(first)) for g in grads), name
    assert x.grad.abs().sum()>0


def test_the_cut_of_the_two_recipes(official):
    learn = lambda m: {n.split(".")[1] for n, p in m.named_parameters() if p.requires_grad and not n.startswith("classifier")}
    assert learn(official)=={"layer3", "layer4"}
    assert learn(cam_resnet50(detach_after="bn1"))=={"layer1", "layer2", "layer3", "layer4"}
    with pytest.raises(ValueError, match="no layer 'layer7'; it has conv1, bn1"): net(detach_after="layer7")


# ---- any network

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
@torch.no_grad()
def test_any_size(H, W):
    for model in (SMALL, PATCHY):
        maps, s = model.maps(torch.randn(1, 3, H, W)), model.stride
        assert maps.cam.shape==(1, 3, -(-H//s), -(-W//s)) and maps.attn is None and maps.trans_logits is None
        torch.testing.assert_close(maps.cam.mean((2, 3)), maps.conv_logits, rtol=1e-4, atol=1e-5)


class Patches(nn.Module):
    "A module that simply returns a map, and drops pixels at the border"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 5, 8, stride=8)
    def forward(self, x): return self.conv(x)


SMALL, PATCHY = net().eval(), CamNet(Patches(), 3).eval()


def test_stride_and_padding_are_found():
    assert (SMALL.stride, SMALL._pads, PATCHY.stride, PATCHY._pads)==(32, False, 8, True)


@pytest.mark.parametrize("name,frozen", [("resnet10t", 0), ("convnext_atto", 2), ("mobilenetv3_small_050", 2)])
def test_timm_networks_by_name(name, frozen):
    model = CamNet(name, 4).eval()
    with torch.no_grad(): assert model.maps(torch.randn(1, 3, 65, 33)).cam.shape==(1, 4, 3, 2)
    assert sum(not p.requires_grad for p in model.parameters())==frozen       # layers behind the map
    assert set(model.param_groups()["cnn"])=={n for n, _ in model.named_parameters()}
    assert model.training is False and CamNet(name, 4).training


def test_errors_in_words():
    with pytest.raises(ValueError, match="no feature map"): CamNet("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="Linear has no feature map"): CamNet(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no model 'resnet5O'; nearest"): CamNet("resnet5O")
    with pytest.raises(ValueError, match="num_classes is 0"): CamNet(Patches(), 0)
    with pytest.raises(ValueError, match="needs x\\[None\\]"): SMALL(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="to_tensor"): SMALL(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="needs attention"): extract(SMALL, np.zeros((40, 40, 3), np.uint8), [1, 0, 0], "ad_cam")


# ---- features and weights

@pytest.mark.parametrize("make", [net, lambda: conformer_mini(3, channels=(8, 16), depths=(2, 2), embed_dim=12, stem_width=8),
                                  lambda: TwoBranch("resnet10t", "vit_tiny_patch16_224", 3, depth=1)])
@torch.no_grad()
def test_features_times_weights_are_the_map(make):
    torch.manual_seed(1)
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    cam = torch.einsum("kc,bchw->bkhw", class_weights(model), class_features(model, x))
    if isinstance(model, TwoBranch): cam = F.interpolate(cam, model.maps(x).cam.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(cam, model.maps(x).cam, rtol=1e-4, atol=1e-4)


def test_no_head():
    class Conv(nn.Module):
        def __init__(self): super().__init__(); self.conv_cls_head = nn.Conv2d(4, 2, 3)
        def features(self, x): return x
    for f in (class_weights, lambda m: class_features(m, torch.zeros(1, 3, 8, 8))):
        with pytest.raises(ValueError, match="Linear has no linear classifier on averaged features"): f(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a 3x3 convolution"): class_weights(Conv())


def test_check_differentiable():
    check_differentiable(SMALL)
    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=r"is torch.*16.*call model.float\(\)"): check_differentiable(net().to(half).eval())
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"): check_differentiable(net())


# ---- weights

def test_weights_files(tmp_path):
    file = save_weights(SMALL, tmp_path/"w.safetensors", torch.float16)
    same = load_cam(net(seed=1), file)
    assert same.classifier.weight.dtype==torch.float32
    torch.testing.assert_close(same.classifier.weight, SMALL.classifier.weight, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="knows 3 classes, the network 7; build it with num_classes=3"): load_cam(net(classes=7), file)
    other = net(seed=2, classes=7)
    head = other.classifier.weight.clone()
    assert torch.equal(load_backbone(other, file).classifier.weight, head)
    torch.testing.assert_close(other.backbone.conv1.weight, SMALL.backbone.conv1.weight, rtol=1e-3, atol=1e-3)
    for load in (load_cam, load_backbone):
        with pytest.raises(ValueError, match="does not fit ResNet.*tensors"): load(resnet_mini(3), file)
        with pytest.raises(FileNotFoundError): load(net(), tmp_path/"none.safetensors")


@pytest.mark.parametrize("which", [0, 1, 2, "pretrained"])
def test_shipped_weights(which):
    model = resnet_mini(checkpoint=mini_path(which)).eval()
    assert model.stride==8 and sum(p.numel() for p in model.parameters())==703_000
    scenes = Scenes("pretrain" if which=="pretrained" else "val", n=8)
    with torch.no_grad():
        seeds = [extract(model, s.image, s.label, "cam", flip=True) for s in scenes]
    found = [s.mask.flat[m.argmax()]==k+1 for s, seed in zip(scenes, seeds) for k, m in zip(seed.keys, seed.high_res)]
    assert np.mean(found)>.5


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="resnet_mini_seed7.*none of resnet_mini"): mini_path(7, tmp_path)


# ---- training

def run(model=None, config=QUICK, **kw): return train_cam(net() if model is None else model, Photos(), config, progress=False, **kw)


def test_loss_is_torchs_soft_margin():
    model, x, y = net().eval(), torch.randn(2, 3, 32, 32), torch.tensor([[1., 0, 0], [0, 1, 1]])
    with torch.no_grad(): assert torch.equal(CamTask(model)(x, y)["loss"], F.multilabel_soft_margin_loss(model(x), y))
    with torch.no_grad(): torch.testing.assert_close(SingleCam(model)(x, y[[0, 0]])["loss"], -model(x).log_softmax(1)[:, 0].mean())
    with pytest.raises(ValueError, match="exactly one class per image"): SingleCam(model)(x, y)


def test_recipes():
    c = SGDConfig()
    assert (c.lr_backbone, c.lr_head, c.weight_decay, c.power, c.crop, c.resize, c.batch, c.epochs,
            c.freeze_bn)==(.1, 1., 1e-4, .9, 512, (320, 640), 16, 5, True)
    assert asdict(MINI_TRAIN)==asdict(train_config(profiles["mini"]))
    assert (MINI_PRETRAIN.crop, MINI_PRETRAIN.resize)==(profiles["mini"].crop, profiles["mini"].resize)


def test_groups_of_sgd():
    model = net(detach_after="bn1")
    opt = CamTask(model).optimizer(SGDConfig(momentum=.9), 10)
    assert isinstance(opt, PolySGD) and [g["name"] for g in opt.param_groups]==["backbone", "head"]
    assert [(g["start"], g["momentum"], g["weight_decay"]) for g in opt.param_groups]==[(.1, .9, 1e-4), (1., .9, 1e-4)]
    assert {id(p) for g in opt.param_groups for p in g["params"]}=={id(p) for p in model.parameters() if p.requires_grad}
    assert opt.param_groups[1]["params"][0] is model.classifier.weight
    assert CamTask(model).optimizer(TrainConfig(), 10) is None


def test_a_run_by_hand():
    "Three epochs of `train_cam` equal the plain loop: loss, backward, torch's SGD with the decayed rate"
    model, slow = net(), net()
    views = []
    class Seen(CamTask):
        def forward(self, x, y): views.append((x.detach().clone(), y.clone())); return super().forward(x, y)
    rows = fit(Seen(model), Photos(), QUICK, progress=False)
    slow.to(memory_format=torch.channels_last).eval()
    head, rest = [slow.classifier.weight], [p for n, p in slow.named_parameters() if n!="classifier.weight"]
    opt = torch.optim.SGD([dict(params=rest), dict(params=head)], lr=1., momentum=1e-4, weight_decay=1e-4)
    for t, ((x, y), row) in enumerate(zip(views, rows)):
        for g, lr in zip(opt.param_groups, (.01, .1)): g["lr"] = lr*(1-t/9)**.9
        loss = F.multilabel_soft_margin_loss(slow(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        assert row["loss"]==pytest.approx(loss.item(), rel=1e-5) and row["lr_head"]==pytest.approx(opt.param_groups[1]["lr"])
    for a, b in zip(model.parameters(), slow.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [QUICK, replace(QUICK, momentum=.9), TrainConfig(epochs=3, batch=4, crop=32, resize=(24, 40))])
def test_resume_is_exact(tmp_path, config):
    def stop(model, epochs_done, history):
        if epochs_done==1: raise KeyboardInterrupt
    whole, again = net(), net()
    rows = run(whole, config)
    with pytest.raises(KeyboardInterrupt): run(net(), config, out=tmp_path, callback=stop)
    assert run(again, config, out=tmp_path)==rows and equal(again, whole)
    with pytest.raises(ValueError, match="epochs: 3 there, 4 now"): run(net(), replace(config, epochs=4), out=tmp_path)


def test_frozen_layers_and_statistics_stay():
    model, before = net(detach_after="layer2"), net().state_dict()
    run(model)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved and not any("running" in n for n in moved)
    assert {n.split(".")[1] for n in moved if n.startswith("backbone.")}=={"layer3", "layer4"}


def test_errors_of_training():
    with pytest.raises(ValueError, match="the data set has 3 classes, the network 5"): run(net(classes=5))
    with pytest.raises(ValueError, match="lr_head is 0"): run(config=replace(QUICK, lr_head=0))
    with pytest.raises(ValueError, match="gives one logit per class, not two: train it with adcam.cnn.train_cam"):
        train(net(), Photos(), replace(QUICK, epochs=1), progress=False)
    with pytest.raises(ValueError, match="every parameter of the network is frozen"): run(net().requires_grad_(False))
    model = net()
    with torch.no_grad(): model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="lower the learning rates .lr_backbone 0.01, lr_head 0.1"): run(model)


def test_small_recipes(tmp_path):
    tiny = dict(epochs=1, batch=2, crop=32, resize=None)
    first, rows = pretrain_mini(Scenes("pretrain", n=4, size=48), replace(MINI_PRETRAIN, **tiny), progress=False)
    assert len(rows)==2 and not first.training
    start = save_weights(first, tmp_path/"pretrained.safetensors")
    second, rows = train_mini(Scenes("train", n=4, size=48), start, 1, replace(MINI_TRAIN, **tiny), progress=False)
    assert len(rows)==2 and not equal(first, second)
    with pytest.raises(ValueError, match="exactly one class"): pretrain_cam(net(), Photos(), replace(QUICK, epochs=1), progress=False)


# ---- two processes

class Double(CamNet):
    "In float64 rounding can neither hide a mistake nor grow"
    def features(self, x): return super().features(x.double())


def double(): return Double(net().backbone, 3, detach_after="bn1").double()


CASES = dict(sgd=lambda m, **kw: run(m, replace(QUICK, epochs=2), **kw), parts=lambda m, **kw: run(m, replace(QUICK, epochs=2), accumulate=2, **kw))
SCRIPT = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_cnn import CASES, double
for name in CASES:
    torch.manual_seed(0)
    model = double()
    CASES[name](model, out=Path({out!r})/name)
    if os.environ["RANK"]=="0": torch.save(model.state_dict(), Path({out!r})/name/"model.pt")
"""


def test_two_processes_equal_one(tmp_path):
    "Really started by `accelerate launch` on CPU (gloo)"
    (tmp_path/"script.py").write_text(SCRIPT.format(tests=os.path.dirname(__file__), out=str(tmp_path)))
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", str(tmp_path/"script.py")]
    job = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try: _, said = job.communicate(timeout=300)
    finally:
        if job.poll() is None: os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode==0, said[-3000:]
    for name, call in CASES.items():
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        model = double()
        rows = call(model) if name=="sgd" else run(model, replace(QUICK, epochs=2), accumulate=4)
        two = [json.loads(line) for line in (tmp_path/name/"log.jsonl").read_text().splitlines()]
        assert json.loads((tmp_path/name/"settings.json").read_text())["processes"]==2
        for n in ("loss", "lr_backbone", "lr_head"): np.testing.assert_allclose([r[n] for r in two], [r[n] for r in rows], rtol=1e-6)
        for n, v in torch.load(tmp_path/name/"model.pt", weights_only=True).items():
            torch.testing.assert_close(v, model.state_dict()[n], rtol=1e-9, atol=1e-9, msg=n)


# ---- from a terminal

@pytest.mark.parametrize("backbone, asked, frozen", [("mobilenetv3_small_050", None, False), ("resnet18", None, True), ("mobilenetv3_small_050", "bn1", True)])
def test_a_cnn_without_irns_layers_is_trained_whole_unless_a_layer_is_named(backbone, asked, frozen):
    "IRN keeps what lies below layer3; a network that has no such layer learns everything"
    from adcam.cli import _new_cnn
    model = _new_cnn(backbone, 3, None, asked, 0)
    first = next(model.backbone_net.parameters())
    assert first.requires_grad != frozen
    with pytest.raises(ValueError, match="no layer 'layer9'"): _new_cnn(backbone, 3, None, "layer9", 0)
