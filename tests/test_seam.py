"SEAM: the official numbers, what trains what, the module on any network, and what is refused."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adcam.baselines.seam import (PCMHead, SEAM, SEAMConfig, add_pcm, inner_maps, pcm, pcm_views, seam, seam_forward, seam_losses,
                                  seam_merge, seam_views, train_seam, winners)
from adcam.branches import TwoBranch
from adcam.cnn import CamNet, class_features, class_weights, resnet_mini
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import METHODS, class_maps, extract, extract_dataset, view

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture(scope="module")
def g16(golden): return dict(np.load(golden / "related/g16_seam.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def g16b(golden): return dict(np.load(golden / "related/g16b_seam_loss.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def log(golden): return json.loads((golden / "related/related_log.json").read_text())


@pytest.fixture(scope="module")
def nrm(rules): return lambda *a: torch.from_numpy(rules.nrm(*a))


@pytest.fixture(scope="module")
def maps_of(rules): return lambda *seeds: torch.from_numpy(np.stack([rules.cam_map(*s) for s in seeds]))


@pytest.fixture(scope="module")
def head(rules):
    head = PCMHead((512, 1024))
    for part, k in ((head.low, "f8_3"), (head.middle, "f8_4"), (head.embed, "f9")):
        part.weight.data = torch.from_numpy(rules.fill(f"seam.{k}.weight", tuple(part.weight.shape)))
    return head


def close(a, b, tolerance=1e-5): assert np.abs(a.detach().numpy() - b).max() <= tolerance*np.abs(b).max()


def stats(t):
    v = t.detach().double().numpy()
    return [v.mean(), v.std(), np.sqrt((v**2).sum()), np.abs(v).sum(), v.min(), v.max()]


# ---- the official numbers (g16, g16b) ----

def test_golden_seam_pcm(head, nrm, maps_of, g16):
    "Maps of the features' size and of half of it; smooth features; no embedding"
    with torch.no_grad():
        e, c5 = head.embed(nrm(814, (2, 195, 12, 14))), maps_of((817, 5, 6, 7), (818, 5, 6, 7))
        close(pcm(maps_of((815, 21, 12, 14), (816, 21, 12, 14)), e), g16["pcm_same"])
        close(pcm(c5, e), g16["pcm_up"])
        close(pcm(c5, head.embed(maps_of((819, 195, 12, 14), (820, 195, 12, 14)))), g16["pcm_smooth"])
        close(pcm(c5, nrm(808, (2, 64, 12, 14)) + 2*maps_of((809, 64, 12, 14))), g16["pcm_identity"])


def test_golden_seam_head(head, rules, nrm, g16, log):
    """Normalized maps, the 195 channels, both outputs, and which weights learn from the PCM's output.
    A mean hardly changes its sum, so that gradient is what a cancellation leaves over: ours in float32 and in float64 differ by 13 %, and the
    reference's float32 lies between the two."""
    inner = [F.relu(nrm(811 + i, (2, c, 12, 14))).requires_grad_() for i, c in enumerate((512, 1024, 4096))]
    cam = F.conv2d(inner[2], torch.from_numpy(rules.fill("seam.fc8.weight", (21, 4096, 1, 1))))
    x, n = nrm(810, (2, 3, 96, 112)), winners(cam[:, 1:])
    rv = pcm(n, head(x, inner[0], inner[1], (12, 14)))
    close(n, g16["net_cam_norm"]); close(rv, g16["net_pcm_out"])
    up = lambda m: F.interpolate(m, (96, 112), mode="bilinear", align_corners=True)
    for m, k in ((up(cam), "cam"), (up(rv), "rv")):
        close(m[..., ::8, ::8], g16[f"net_{k}_ds8"])
        np.testing.assert_allclose(stats(m), g16[f"net_{k}_stats"], rtol=1e-4, atol=1e-4*g16[f"net_{k}_stats"][1])
    np.testing.assert_allclose(stats(head.joined(x, inner[0], inner[1], (12, 14))), g16["net_f_stats"], rtol=1e-4, atol=1e-4*g16["net_f_stats"][1])
    head.zero_grad()
    up(rv).sum().backward()
    want = log["seam_grad_from_cam_rv"]
    for part, k in ((head.low, "f8_3"), (head.middle, "f8_4"), (head.embed, "f9")):
        assert float(part.weight.grad.norm()) == pytest.approx(want[f"{k}.weight"], rel=.2)
    assert all(m.grad is None for m in inner) and all(want[k] is None for k in ("conv4", "conv5", "conv6", "fc8.weight"))
    head.zero_grad()


def test_golden_seam_losses_and_gradients(nrm, g16b, log):
    want = log["seam_loss"]
    blocky = lambda seed, H, W: nrm(seed, (2, 21, H//8, W//8)).repeat_interleave(8, 2).repeat_interleave(8, 3) + nrm(seed + 1, (2, 21, H, W), .3)
    c1, r1, c2, r2 = (t.clone().requires_grad_() for t in (blocky(822, 80, 96), F.relu(blocky(824, 80, 96) + .6), blocky(826, 24, 32)[..., :28],
                                                           F.relu(blocky(828, 24, 32)[..., :28] + .6)))
    y = torch.zeros(2, 20)
    for i, ks in enumerate(want["labels"]): y[i, ks] = 1
    assert list(c2.shape) == [want["img2"][0], 21, *want["img2"][2:]]
    L = seam_losses((c1[:, 1:], c2[:, 1:]), (r1, r2), y)
    L["loss"].backward()
    assert float(L["cls"].detach()) == pytest.approx((want["loss_cls1"] + want["loss_cls2"])/2, rel=1e-5)
    assert float(L["quiet"].detach()) == pytest.approx((want["loss_rvmin1"] + want["loss_rvmin2"])/2, rel=1e-5)
    for k in ("er", "ecr"): assert float(L[k].detach()) == pytest.approx(want[f"loss_{k}"], rel=1e-5)
    assert float(L["loss"].detach()) == pytest.approx(want["loss"], rel=1e-5)
    for t, k in ((c1, "cam1"), (r1, "rv1"), (c2, "cam2"), (r2, "rv2")):
        assert float(t.grad.norm()) == pytest.approx(want[f"grad_norm_{k}"], rel=1e-4)
        assert float(t.grad[:, 0].norm()) == pytest.approx(want[f"grad_norm_bg_{k}"], rel=1e-4)
    close(c1.grad[..., ::4, ::4], g16b["loss_grad_cam1_ds4"], 1e-4); close(r1.grad[..., ::4, ::4], g16b["loss_grad_rv1_ds4"], 1e-4)


def test_golden_seam_merge(nrm, g16):
    views = []
    for i in range(8):
        m = nrm(830 + i, (1, 21, *((6, 7), (11, 14), (17, 21), (22, 28))[i//2]), .5) + .3
        m = F.interpolate(m, (40, 52), mode="bilinear")[0, 1:][g16["infer_keys"]]
        views.append(m.flip(-1) if i % 2 else m)
    close(seam_merge(views, (40, 52)), g16["infer_norm"])


# ---- the module ----

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(2, 5), st.integers(1, 30))
def test_every_cell_is_a_mean_of_cells(seed, h, w, block):
    "Between minimum and maximum, constant where the map is, and the same in any blocks"
    g = torch.Generator().manual_seed(seed)
    y, e = torch.rand(2, 3, h, w, generator=g), torch.randn(2, 5, h, w, generator=g)
    for o in ({}, dict(center=True), dict(power=3), dict(top=2)):
        out = pcm(y, e, **o)
        assert (out <= y.amax((2, 3), keepdim=True) + 1e-5).all() and (out >= y.amin((2, 3), keepdim=True)*.99 - 1e-5).all()
        assert torch.allclose(pcm(y, e, block=block, **o), out, atol=1e-5)
    assert torch.allclose(pcm(torch.ones_like(y), e), torch.ones_like(y), atol=1e-4)


def test_centering_undoes_the_blur_of_features_that_are_nowhere_negative():
    y, f = torch.rand(1, 1, 8, 8), torch.rand(1, 32, 8, 8) + 1
    assert pcm(y, f).std() < .05*y.std() < .5*pcm(y, f, center=True, power=4).std()


def test_only_the_winner_survives():
    n = winners(torch.tensor([[[[2., -1., 1.]], [[1., -1., 4.]]]]))                    # (1,2,1,3)
    assert torch.allclose(n[0, :, 0], torch.tensor([[0., 1., 0.], [1., 0., 0.], [0., 0., 1.]]), atol=1e-4)


# ---- on networks ----

@pytest.fixture
def net():
    torch.manual_seed(0)
    return add_pcm(resnet_mini(10)).eval()


def test_inner_maps_and_the_class_map_come_from_one_pass(net):
    x, calls = torch.randn(1, 3, 64, 48), []
    hook = net.backbone_net.register_forward_pre_hook(lambda *_: calls.append(1))
    net.backbone_net.layer1.register_forward_pre_hook(lambda *_: calls.append(2))
    with torch.no_grad(): cam, (low, middle) = inner_maps(net, x)
    hook.remove()
    assert calls.count(2) == 1
    with torch.no_grad(): assert torch.allclose(cam, net.maps(x).cam, atol=1e-5)
    assert (low.shape[1], middle.shape[1]) == (net.pcm.low.in_channels, net.pcm.middle.in_channels)
    assert not [h for m in net.modules() for h in m._forward_hooks.values()], "a hook was left behind"


@pytest.mark.parametrize("mode", [True, False])
def test_attaching_a_head_leaves_the_network_as_it_was(mode):
    "BatchNorm statistics too: the probe must not be learned from"
    net = resnet_mini(10).train(mode)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    add_pcm(net)
    assert net.training == mode and all(v.equal(before[k]) for k, v in net.state_dict().items() if k in before)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
def test_any_timm_cnn(name):
    net = add_pcm(CamNet(name, 4)).eval()
    with torch.no_grad(): cam, rv = seam_forward(net, torch.randn(2, 3, 96, 64))
    assert rv.shape == (2, 5, *cam.shape[2:]) and torch.isfinite(rv).all()


TINY = SEAMConfig(epochs=1, batch=4, crop=64, resize=None, lr_backbone=1e-3, lr_head=1e-2)


def test_head_only_moves_nothing_else(net):
    before, frozen = {k: v.clone() for k, v in net.state_dict().items()}, {n: p.requires_grad for n, p in net.named_parameters()}
    history = train_seam(net, Scenes("train", 8, 64), TINY, head_only=True, progress=False)
    assert {k for k, v in net.state_dict().items() if not v.equal(before[k])} == {"pcm.low.weight", "pcm.middle.weight", "pcm.embed.weight"}
    assert {n: p.requires_grad for n, p in net.named_parameters()} == frozen and not net.training and len(history) == 2


def test_ecr_teaches_the_head_alone(net):
    "As the official gradients say: nothing of ECR arrives at backbone or classifier"
    task = SEAM(net)
    L = task(torch.randn(2, 3, 64, 64), torch.eye(10)[[1, 4]])
    (L["ecr"] + L["quiet"]).backward()
    assert all(p.grad is None or not p.grad.any() for n, p in net.named_parameters() if not n.startswith("pcm."))
    assert all(p.grad is not None for n, p in net.named_parameters() if n.startswith("pcm."))
    task(torch.randn(2, 3, 64, 64), torch.ones(2, 10))["er"].backward()
    assert net.classifier.weight.grad.any()


def test_training_resumes(tmp_path):
    ds, config = Scenes("train", 8, 64), SEAMConfig(epochs=2, batch=4, crop=64, resize=None, lr_backbone=1e-3, lr_head=1e-2)
    fresh = lambda: (torch.manual_seed(0), add_pcm(resnet_mini(10)))[1]
    def cut(model, done, history):
        if done == 1: raise KeyboardInterrupt
    whole, again = fresh(), fresh()
    history = train_seam(whole, ds, config, progress=False)
    with pytest.raises(KeyboardInterrupt): train_seam(fresh(), ds, config, out=tmp_path, callback=cut, progress=False)
    assert [h["loss"] for h in train_seam(again, ds, config, out=tmp_path, progress=False)] == [h["loss"] for h in history]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))


# ---- as methods of seeds ----

@pytest.fixture(scope="module")
def picture(): return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def hot(*classes, K=10): return torch.zeros(K).index_fill(0, torch.tensor(classes), 1)


@pytest.mark.parametrize("build", [lambda: conformer_mini(10), lambda: TwoBranch("test_resnet", "test_vit", 10), lambda: resnet_mini(10)],
                         ids=["Conformer", "TwoBranch", "CamNet"])
def test_pcm_on_every_network(build, picture):
    torch.manual_seed(0)
    net = build().eval()
    got = class_maps("pcm", net, picture, hot(0, 1, 2), flip=True, scales=(.5, 1.))
    assert got.shape == (10, 16, 16) and torch.isfinite(got).all() and not got[3:].any()
    with torch.no_grad():
        f = class_features(net, x := view(picture, 1., net.stride))
        want = pcm(F.conv2d(f, class_weights(net)[[0, 1], :, None, None]).relu(), f, center=True)[0]
    assert torch.allclose(pcm_views(net, picture, [0, 1])[0], want, atol=1e-5) and x.shape[0] == 1


def test_seam_is_a_method(net, picture):
    assert {"seam", "pcm"} <= set(METHODS)
    got = seam(net, picture, hot(1, 3), flip=True)
    assert got.equal(class_maps("seam", net, picture, hot(1, 3), flip=True)) and not got[[0, 2]].any()
    with torch.no_grad(): rv = seam_forward(net, view(picture, 1., 8))[1][0, [2, 4]]
    assert torch.allclose(seam_views(net, picture, [1, 3], floor=False)[0], rv)
    assert torch.allclose(seam_views(net, picture, [1, 3])[0], rv - rv.amin((1, 2), keepdim=True))


def test_data_set_resumes_per_image(net, tmp_path):
    ds = Scenes("val", 2, 64)
    go = lambda **o: extract_dataset(net, ds, tmp_path, "pcm", progress=False, **o)
    assert go()["computed"] == 2
    first = {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")}
    (tmp_path / f"{ds.ids[1]}.npz").unlink()
    assert go()["computed"] == 1 and {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")} == first
    with pytest.raises(ValueError, match="power: None there, 2 now"): go(power=2)


# ---- what is refused ----

def test_what_is_refused(net, picture):
    plain = resnet_mini(10).eval()
    with pytest.raises(ValueError, match="has no PCM head"): seam(plain, picture, hot(1))
    with pytest.raises(ValueError, match="label vector is empty"): seam(net, picture, hot(1)*0)
    with pytest.raises(ValueError, match="class 4 is not in the image's label"): seam(net, picture, hot(1), classes=[4])
    with pytest.raises(ValueError, match="power is 0"): extract(plain, picture, hot(1), "pcm", power=0)
    with pytest.raises(ValueError, match="top is 0"): extract(plain, picture, hot(1), "pcm", top=0)
    with pytest.raises(ValueError, match="half precision"): extract(plain, picture, hot(1), "pcm", precision="bf16")
    with pytest.raises(ValueError, match="half precision"): pcm_views(resnet_mini(10).half().eval(), picture, [1])
    with pytest.raises(ValueError, match="eval"): pcm_views(resnet_mini(10).train(), picture, [1])
    with pytest.raises(ValueError, match="no list of stages"): add_pcm(conformer_mini(10))
    with pytest.raises(ValueError, match=r"model.float\(\)"): train_seam(resnet_mini(10).half(), Scenes("train", 8))


def test_nan_names_the_picture(net, picture):
    with torch.no_grad(): net.classifier.weight.fill_(float("nan"))
    for f in (pcm_views, seam_views):
        with pytest.raises(ValueError, match="2007_000032 at scale 1: the network gives NaN"): f(net, picture, [1], name="2007_000032")


def test_weights_with_a_head_come_back(net, tmp_path):
    from adcam.baselines.seam import load_seam
    from adcam.classifier import save_weights
    path = save_weights(net, tmp_path / "seam.safetensors")
    again = load_seam(resnet_mini(10), path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    with pytest.raises(ValueError, match="does not fit|knows 10 classes"): load_seam(resnet_mini(7), path)


# ---- from a terminal ----

def test_the_command_trains_and_seeds_read_it(tmp_path, capsys):
    "`train-seam` goes on from a CAM network; `seeds --method seam` takes its weights, and those of the CAM network are refused"
    from adcam.cli import main
    from adcam.classifier import save_weights
    from adcam.cnn import resnet_mini
    def run(*words):
        with pytest.raises(SystemExit) as stop: main([str(w) for w in words])
        return stop.value.code or 0, "".join(capsys.readouterr())
    some = ["--data", "mini", "--n", 2, "--network", "resnet_mini"]
    cam, net = save_weights(resnet_mini(10), tmp_path / "cam.safetensors"), tmp_path / "run/weights.safetensors"
    code, text = run("train-seam", *some, "--weights", cam, "--epochs", 1, "--batch", 2, "--crop", 64, "--head-only", "--out", tmp_path / "run")
    assert code == 0 and "1 steps" in text and net.exists()
    seeds = ["seeds", *some, "--split", "train", "--method", "seam", "--scales", 1, "--no-flip"]
    assert run(*seeds, "--weights", net, "--out", tmp_path / "seeds")[0] == 0
    code, text = run(*seeds, "--weights", cam, "--out", tmp_path / "none")
    assert code == 2 and "has no PCM head" in text


def test_the_command_refuses_a_conformer(tmp_path, capsys):
    from adcam.cli import main
    with pytest.raises(SystemExit) as stop: main(["train-seam", "--data", "mini", "--n", "2", "--network", "mini", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "needs a CamNet" in capsys.readouterr().err
