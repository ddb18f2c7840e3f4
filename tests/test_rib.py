"""RIB: golden numbers, and that the network is left alone whatever happens."""
import hashlib
import json
import subprocess
import sys
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adcam.baselines import rib as module
from adcam.baselines.rib import PRESETS, View, gndp, rib, rib_batch, rib_learns, rib_steps, rib_views
from adcam.branches import TwoBranch
from adcam.cnn import CamNet, cam_resnet50, resnet_mini
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import extract, extract_dataset

TINY = dict(batch=2, crop=48, resize=(48, 80), steps=3, lr=1e-3, lr_head=1e-2)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return resnet_mini().eval()


@pytest.fixture(scope="module")
def scenes():
    return Scenes("val", 8, size=64)


@pytest.fixture(scope="module")
def sample(scenes):
    return scenes[0]


def classes(s):
    return np.flatnonzero(s.label).tolist()


def everything(model):
    "All that a method could change, byte by byte"
    tensors = {n: t.detach().numpy().tobytes() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {n: (p.requires_grad, p.grad is None, id(p), p.data_ptr()) for n, p in model.named_parameters()}
    return tensors, flags, [m.training for m in model.modules()], list(model._modules)


# ---------------------------------------------------------------- golden numbers

@pytest.fixture(scope="module")
def official(golden, golden_rules):
    hot = lambda *rows: torch.stack([torch.zeros(20).index_fill(0, torch.tensor(r), 1) for r in rows])
    nrm = golden_rules("irn/rules").nrm
    return dict(want=np.load(golden / "irn/g09_rib.npz"), log=json.loads((golden / "irn/rib_log.json").read_text()),
                z6=torch.tensor(nrm(90, (6, 20, 7, 9)), requires_grad=True), y6=hot(*[[3, 11]] * 6),
                z4=torch.tensor(nrm(91, (4, 20, 8, 8))), y4=hot([0], [5, 6], [19], [1, 8]))


def test_golden_pooling(official):
    g = official
    np.testing.assert_allclose(gndp(g["z6"], g["y6"]).detach(), g["want"]["gndp_target"], atol=1e-6)
    np.testing.assert_allclose(gndp(g["z4"], g["y4"]), g["want"]["gndp_batch"], atol=1e-6)
    assert set(g["want"].files) == {"gndp_target", "gndp_batch", "grad_ch3", "grad_ch4_absmax"}  # all of them are compared here


def test_golden_losses_and_gradient(official):
    g = official
    target = (g["y6"] * gndp(g["z6"], g["y6"])).sum()
    loss = -target - (g["y4"] * gndp(g["z4"], g["y4"])).sum()
    assert target.item() == pytest.approx(g["log"]["target_loss"], abs=1e-6)
    assert loss.item() == pytest.approx(g["log"]["loss"], abs=1e-6)
    grad, = torch.autograd.grad(loss, g["z6"])
    np.testing.assert_allclose(grad[:, 3], g["want"]["grad_ch3"], atol=1e-6)
    assert grad[:, 4].abs().max() == g["want"]["grad_ch4_absmax"] == 0


@given(st.integers(0, 10**6), st.floats(.05, 1.))
@settings(max_examples=40, deadline=None)
def test_pooling_leaves_the_strong_positions_out(seed, theta):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(2, 3, 3, 4, generator=g), (torch.rand(2, 3, generator=g) < .5).float()
    out = gndp(z, y, theta)
    for b, k in np.ndindex(2, 3):
        m, top = z[b, k], z[b, k].max()
        kept = m[m / top < theta] if y[b, k] else m.flatten()
        assert out[b, k].item() == pytest.approx(kept.sum().item() / 12, abs=1e-6)


# ---------------------------------------------------------------- what learns

def test_learning_stages(net):
    assert {n.split(".")[1] for n in rib_learns(net)["backbone"]} == {"layer3", "layer4"}
    resnet = rib_learns(cam_resnet50(20))
    assert {n.split(".")[1] for n in resnet["backbone"]} == {"layer3", "layer4"} and resnet["head"] == ["classifier.weight"]
    assert rib_learns(cam_resnet50(20, detach_after="bn1")) == resnet  # flags from training do not matter


def test_learning_parts_of_two_branch_networks():
    two = TwoBranch("resnet10t", "vit_tiny_patch16_224", 5, depth=1)
    assert {n.split(".")[1] for n in rib_learns(two)["backbone"]} == {"layer3", "layer4"}
    assert rib_learns(two)["head"] == ["conv_cls_head.weight"]
    parts = rib_learns(conformer_mini(5))
    assert {n.split(".")[0] for n in parts["backbone"]} == {f"conv_trans_{i}" for i in range(3, 7)}
    assert not set(parts["backbone"]) & set(conformer_mini(5).param_groups()["vit"])


def test_learning_by_name(net):
    assert all(n.startswith("resnet.layer4.1.") for n in rib_learns(net, ("resnet.layer4.1",))["backbone"])
    assert rib_learns(net, ())["backbone"] == [] and rib_learns(net, ("classifier",))["backbone"] == []
    with pytest.raises(ValueError, match="no parameter begins so"): rib_learns(net, ("layer4",))
    with pytest.raises(ValueError, match="stages are"): rib_learns(CamNet(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1)), 3))


# ---------------------------------------------------------------- the maps

def test_first_map_is_cam(net, sample):
    plain = extract(net, sample.image, sample.label, "cam", scales=(1., .5), flip=True)
    ours = extract(net, sample.image, sample.label, "rib", scales=(1., .5), flip=True, steps=1)
    np.testing.assert_allclose(ours.high_res, plain.high_res, atol=1e-5)


@pytest.mark.parametrize("mode,size", [("pad", (58, 51)), ("exact", (58, 51)), ("round", (58, 51)), ("square", (58, 51))])
def test_every_size_mode_agrees_with_cam(net, sample, mode, size):
    image = sample.image[:size[0], :size[1]]
    plain, ours = (extract(net, image, sample.label, m, flip=True, size_mode=mode, **o) for m, o in (("cam", {}), ("rib", dict(steps=1))))
    np.testing.assert_allclose(ours.high_res, plain.high_res, atol=1e-5)


def test_steps_add_up_and_change_the_map(net, scenes, sample):
    one, three = (rib_views(net, sample.image, classes(sample), others=scenes, **TINY | dict(steps=n))[0] for n in (1, 3))
    x = View(1., module.view(sample.image, 1., 8), None)
    found = list(rib_steps(net, [x], classes(sample), rib_batch(scenes, sample.image, classes(sample), 2, 48, (48, 80)), steps=3, lr=1e-3, lr_head=1e-2))
    assert len(found) == 3 and torch.equal(found[0].maps[0], one) and torch.equal(sum(s.maps[0] for s in found), three)
    assert not torch.equal(found[1].maps[0], one)


def test_a_step_is_gradient_descent_on_the_loss(net, scenes, sample):
    "The second map by hand: gradient of the whole loss at once, plain SGD with the first rate of the polynomial"
    keys, (x, y) = classes(sample), rib_batch(scenes, sample.image, classes(sample), 2, 48, (48, 80))
    view = module.view(sample.image, 1., 8)
    pair = torch.cat([view, view.flip(-1)])
    got = [s.maps for s in rib_steps(net, [View(.5, pair[..., ::2, ::2], None), View(1., pair, None)], keys, (x, y), steps=2, lr=1e-2, lr_head=1e-1,
                                     weight_decay=1e-3)]
    groups, hand = rib_learns(net), resnet_mini().eval()
    hand.load_state_dict(net.state_dict())
    label = torch.from_numpy(sample.label)[None].expand(2, -1)
    loss = sum(-(l * gndp(hand.maps(v).cam, l)).sum() for v, l in ((pair, label), (x, y)))  # the mirror image pools the same
    loss.backward()
    with torch.no_grad():
        for g, rate in (("backbone", 1e-2), ("head", 1e-1)):
            for n in groups[g]: hand.get_parameter(n).sub_(rate * (hand.get_parameter(n).grad + 1e-3 * hand.get_parameter(n)))
        z = hand.maps(pair).cam[:, keys].relu()
    torch.testing.assert_close(got[1][1], z[0] + z[1].flip(-1), rtol=1e-4, atol=1e-5)


def test_brakes(net, sample):
    x = View(1., module.view(sample.image, 1., 8), None)
    run = lambda **o: list(rib_steps(net, [x], classes(sample), steps=4, **o))
    logits, cover = run(stop_logits=1e-9), run(stop_cover=0.)
    assert [s.stop for s in logits] == ["logits"] and logits[0].used
    assert [s.stop for s in cover] == ["", "cover"] and not cover[1].used  # step 0 is CAM and always counts
    assert torch.equal(rib_views(net, sample.image, classes(sample), stop_cover=0.)[0], cover[0].maps[0])
    assert [s.stop for s in run()] == [""] * 4


def test_logits_brake_counts_rows(net, sample):
    "One row at the limit does not stop; the official 600 are 100 for each of six rows"
    view = module.view(sample.image, 1., 8)
    views = [View(s, torch.cat([view, view.flip(-1)]), None) for s in (1., .5, 1.5, 2.)]
    pooled = next(rib_steps(net, views, classes(sample), steps=2)).pooled
    for limit, stop in ((abs(pooled) / 6 * 1.01, ""), (abs(pooled) / 6 * .99, "logits")):
        assert next(rib_steps(net, views, classes(sample), steps=2, stop_logits=limit)).stop == stop
    assert PRESETS["voc"]["stop_logits"] * 6 == 600 and PRESETS["coco"]["stop_logits"] * 6 == pytest.approx(1000)


def test_nan_keeps_the_good_maps(net, sample):
    with pytest.warns(UserWarning, match="not finite.*smaller lr"):
        kept = rib_views(net, sample.image, classes(sample), steps=6, lr=1e30, lr_head=1e30, stop_logits=np.inf, stop_cover=1.)
    assert kept[0].isfinite().all() and torch.equal(kept[0], rib_views(net, sample.image, classes(sample), steps=1)[0])


def test_broken_weights_are_an_error(sample):
    bad = resnet_mini().eval()
    with torch.no_grad(): bad.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="before anything was changed"): rib_views(bad, sample.image, classes(sample))


# ---------------------------------------------------------------- the network is left alone

def test_nothing_changes(net, scenes, sample):
    frozen = net.get_parameter("resnet.layer3.0.conv1.weight")
    frozen.requires_grad_(False)
    before = everything(net)
    rib_views(net, sample.image, classes(sample), others=scenes, scales=(1., .5), flip=True, **TINY)
    assert everything(net) == before
    frozen.requires_grad_(True)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["gndp", "PolySGD.step", "_push"])
def test_nothing_changes_when_it_breaks(net, scenes, sample, error, where):
    calls, owner, name = [], *((module.PolySGD, "step") if "." in where else (module, where))
    real = getattr(owner, name)

    def late(*args, **kw):
        calls.append(1)
        if len(calls) == 2: raise error  # in the middle: one update has been made
        return real(*args, **kw)

    before = everything(net)
    with patch.object(owner, name, late), pytest.raises(type(error)):
        rib_views(net, sample.image, classes(sample), others=scenes, **TINY)
    assert len(calls) == 2 and everything(net) == before


def test_a_generator_left_in_the_middle(net, sample):
    before, x = everything(net), View(1., module.view(sample.image, 1., 8), None)
    walk = rib_steps(net, [x], classes(sample), lr=1e-3)
    next(walk), next(walk)
    assert everything(net) == before and not torch.is_inference_mode_enabled()
    with torch.no_grad():
        next(walk)
        assert not torch.is_grad_enabled()  # what the steps switch on stays inside
    del walk
    assert everything(net) == before


@pytest.mark.parametrize("build", [lambda: conformer_mini(10), lambda: TwoBranch("resnet10t", "vit_tiny_patch16_224", 10, depth=1)])
def test_two_branch_networks(build, scenes, sample):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad(): model.conv_cls_head.weight.abs_()  # features are positive after a ReLU, so the maps are too
    before = everything(model)
    options = TINY | dict(lr=1e-2, stop_cover=1., stop_logits=np.inf)
    maps = rib(model, sample.image, sample.label, others=scenes, **options)
    assert maps.shape == (10, 16, 16) and everything(model) == before
    assert not maps[sample.label == 0].any() and maps.isfinite().all()
    moved = rib_views(model, sample.image, classes(sample), **options)[0] - 3 * rib_views(model, sample.image, classes(sample), steps=1)[0]
    assert moved.abs().max() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_outside(net, sample, mode):
    plain = rib_views(net, sample.image, classes(sample), **TINY)
    with mode(): assert torch.equal(rib_views(net, sample.image, classes(sample), **TINY)[0], plain[0])


# ---------------------------------------------------------------- other pictures

def test_batch_is_disjoint_and_labeled(scenes, sample):
    keys = classes(sample)
    x, y = rib_batch(scenes, sample.image, keys, 99, 48, None)
    fits = [i for i in range(8) if not scenes[i].label[keys].any()]
    assert len(x) == len(y) == len(fits) > 0 and not y[:, keys].any() and y.any(1).all()
    assert rib_batch(scenes, sample.image, list(range(10)), 4, 48, None) is None
    assert rib_batch(scenes, sample.image, keys, 0, 48, None) is None


class Faulty:
    "Scenes of which some cannot be read and some have no label"
    def __init__(self, ds, unreadable=(), unlabeled=()):
        self.ds, self.ids, self.classes, self.unreadable, self.unlabeled = ds, ds.ids, ds.classes, unreadable, unlabeled
    def __len__(self): return len(self.ds)
    def __getitem__(self, i):
        if i in self.unreadable: raise OSError(f"image {i} is cut short")
        s = self.ds[i]
        return s._replace(label=s.label * (i not in self.unlabeled))
    def fingerprint(self): return "faulty"


def test_batch_passes_over_what_it_cannot_use(scenes, sample):
    fits = [i for i in range(8) if not scenes[i].label[classes(sample)].any()]
    got = rib_batch(Faulty(scenes, fits[:1], fits[1:2]), sample.image, classes(sample), 99, 48, None)
    assert (0 if got is None else len(got[0])) == len(fits) - 2


class Cheap(Faulty):
    "A data set that knows labels without images, and counts the images read"
    read = 0
    def label(self, i): return self.ds[i].label
    def weak(self, i):
        self.read += 1
        s = self[i]
        return s.image, s.label


def test_labels_first(scenes, sample):
    ds = Cheap(scenes)
    x, _ = rib_batch(ds, sample.image, classes(sample), 1, 48, None)
    assert ds.read == len(x) == 1
    assert torch.equal(x, rib_batch(scenes, sample.image, classes(sample), 1, 48, None)[0])


def test_draw_depends_on_content_and_seed(scenes, sample):
    draw = lambda image, seed=0: rib_batch(scenes, image, classes(sample), 2, 48, (48, 80), seed)[0]
    assert torch.equal(draw(sample.image), draw(sample.image.copy()))
    assert not torch.equal(draw(sample.image), draw(sample.image, 1))
    other = sample.image.copy()
    other[0, 0, 0] ^= 1
    assert not torch.equal(draw(sample.image), draw(other))


def test_files_do_not_depend_on_order_or_processes(net, tmp_path):
    ds, options = Scenes("val", 4, size=64), TINY | dict(steps=2)
    run = lambda name, **kw: extract_dataset(net, ds, tmp_path / name, "rib", progress=False, **options, **kw)
    run("one")
    for rank in (1, 0): run("shards", shard=(rank, 2))
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.npz")}
    assert len(files) == 4 and files == {p.name: p.read_bytes() for p in (tmp_path / "shards").glob("*.npz")}
    assert run("one") == dict(computed=0, cached=4, skipped=[], unlabeled=[])


def drawn(seed):
    "Hash of a draw, for another process"
    torch.set_num_threads(1)
    scenes = Scenes("val", 8, size=64)
    x, y = rib_batch(scenes, scenes[0].image, classes(scenes[0]), 2, 48, (48, 80), seed)
    return hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()


def test_another_process_draws_the_same(root):
    code = f"import sys; sys.path[:0] = [{str(root / 'tests')!r}]; from test_rib import drawn; print(drawn(3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.split()[-1] == drawn(3) != drawn(4)


# ---------------------------------------------------------------- faults

def test_half_precision_and_training_mode(sample):
    for net, words in ((resnet_mini().eval().half(), "call model.float"), (resnet_mini().eval().bfloat16(), "call model.float"),
                       (resnet_mini().train(), "call model.eval")):
        with pytest.raises(ValueError, match=words): rib_views(net, sample.image, classes(sample))


def test_bad_settings(net, scenes, sample):
    for options, words in ((dict(scales=(.5,)), "so add 1.0"), (dict(steps=0), "at least 1"), (dict(lr=-1.), "negative"), (dict(lr=float("nan")), "negative"),
                           (dict(theta=0.), "share of the maximum"), (dict(size_mode="crop"), "size_mode"), (dict(learn=("x",)), "no parameter begins so"),
                           (dict(others=Scenes("val", 1), batch=-1), "batch"), (dict(stop_logits=0), "stop_logits"), (dict(stop_cover=2), "stop_cover")):
        with pytest.raises(ValueError, match=words): rib_views(net, sample.image, classes(sample), **options)
    with pytest.raises(ValueError, match="keys is empty"): rib_views(net, sample.image, [])
    few = Faulty(scenes)
    few.classes = ("cat",)
    with pytest.raises(ValueError, match="others has 1 classes, the network 10"): rib_views(net, sample.image, [0], others=few)


def test_bad_labels(net, sample):
    with pytest.raises(ValueError, match="empty"): rib(net, sample.image, np.zeros(10))
    absent = [k for k in range(10) if not sample.label[k]]
    with pytest.raises(ValueError, match="not in the image's label"): rib(net, sample.image, sample.label, classes=absent[:1])
    with pytest.raises(ValueError, match="no option 'speed'"): rib(net, sample.image, sample.label, speed=2)
    with pytest.raises(ValueError, match="no linear classifier"): rib_views(torch.nn.Conv2d(3, 4, 1).eval(), sample.image, [0])


def test_no_warnings_on_good_input(net, scenes, sample):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rib(net, sample.image, sample.label, others=scenes, **TINY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu(net, scenes, sample):
    cpu = rib_views(net, sample.image, classes(sample), others=scenes, **TINY)[0]
    gpu = rib_views(_on_gpu(net), sample.image, classes(sample), others=scenes, **TINY)[0]
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-2, atol=1e-3)


def _on_gpu(net):
    other = resnet_mini().eval()
    other.load_state_dict(net.state_dict())
    return other.cuda()
