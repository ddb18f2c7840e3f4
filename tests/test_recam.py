"ReCAM: the official numbers, what the loss and the shift promise, training that can be interrupted, extraction, and errors in words."
import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adcam.baselines.recam import (KEY, ReActivation, ReCAMConfig, add_recam_head, class_vectors, load_recam, normalized_cams, reactivated,
                                   reactivation_loss, recam, recam_views, recam_weights, shift_head, train_recam)
from adcam.branches import TwoBranch
from adcam.cam import ad_cam, cam_map
from adcam.classifier import save_weights
from adcam.cnn import CamNet, cam_resnet50, class_features, class_weights
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import extract_dataset, load_seed, merge, model_fingerprint, view_maps

torch.set_num_threads(1)
LABELS = ((2, 14), (0, 7, 19))


class Small(nn.Module):
    "Two convolutions, 8 pixels per position"
    def __init__(self, channels=6):
        super().__init__()
        self.first, self.bn, self.second = nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5), nn.Conv2d(5, channels, 2, 2)
    def forward(self, x): return self.second(self.bn(self.first(x)).relu()).relu()


def small(seed=0, classes=10):
    torch.manual_seed(seed)
    return CamNet(Small(), classes)


TINY = ReCAMConfig(epochs=2, batch=4, crop=32, resize=(48, 64), lr_recam=.1, lr_cnn=1e-2)


@pytest.fixture(scope="module")
def scenes(): return Scenes("train", 8, 64)


@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture(scope="module")
def g07(golden): return np.load(golden/"irn/g07_recam.npz")


@pytest.fixture(scope="module")
def log(golden): return json.loads((golden/"irn/recam_log.json").read_text())


@pytest.fixture(scope="module")
def labels():
    y = torch.zeros(2, 20)
    for row, present in zip(y, LABELS): row[list(present)] = 1
    return y


@pytest.fixture(scope="module")
def official(rules):
    "The official network, every weight from its name"
    model = add_recam_head(cam_resnet50(20, detach_after="bn1"))
    model.load_state_dict({k: torch.from_numpy(np.asarray(rules.fill(k, tuple(v.shape)))) for k, v in model.state_dict().items()})
    return model.eval()


def close(a, b, eps=1e-4):
    "Largest difference, relative to the largest value"
    b = torch.as_tensor(b)
    assert a.shape == b.shape
    assert (a.detach() - b).abs().max() <= eps*b.abs().max()


# ---------------------------------------------------------------- official numbers

def test_small_part_matches(rules, g07, log, labels):
    f = torch.from_numpy(rules.nrm(71, (2, 64, 6, 7))).relu()
    w, w2 = (torch.from_numpy(rules.nrm(seed, (20, 64), .2)) for seed in (72, 73))
    close(normalized_cams(w, f), g07["small_cam_norm"])
    close(class_vectors(w, f), g07["small_camfeat"])
    assert reactivation_loss(w2, class_vectors(w, f), labels).item() == pytest.approx(log["recam_small"]["loss_ce"], rel=1e-4)


def test_whole_network_matches(official, rules, g07, labels):
    assert torch.equal(labels, torch.from_numpy(g07["label"]))
    x = torch.from_numpy(rules.nrm(70, (2, 3, 96, 112)))
    with torch.no_grad(): f, logits = class_features(official, x), official(x)
    w = class_weights(official).detach()
    close(logits, g07["logit"])
    close(normalized_cams(w, f), g07["cams_norm"])
    close(class_vectors(w, f)[:, :, ::16], g07["camfeat_ch0_2048_16"])


def test_extraction_matches(official, rules, g07):
    x = torch.from_numpy(rules.nrm(50, (1, 3, 81, 110)))
    with torch.no_grad(): maps = view_maps(reactivated(official), x, list(range(20)), cam_map, flip=True)
    close(maps, g07["recam_cam_81x110"])


def norms(model, x, y):
    "Losses and gradient norms, as in recam_log.json"
    model.zero_grad()
    losses = ReActivation(model)(x, y)
    losses["loss"].backward()
    named = dict(grad_norm_predictor=KEY, grad_norm_classifier="classifier.weight", grad_norm_layer4_0_conv1="resnet50.layer4.0.conv1.weight",
                 grad_norm_layer1_0_conv1="resnet50.layer1.0.conv1.weight")
    gradients = {k: model.get_parameter(n).grad.norm().item() for k, n in named.items()}
    return dict(loss_cls=losses["cls"].item(), loss_ce=losses["ce"].item(), total=losses["loss"].item(), **gradients)


def test_losses_and_gradients_match(official, rules, log, labels):
    x, g = torch.from_numpy(rules.nrm(70, (2, 3, 96, 112))), torch.Generator().manual_seed(0)
    want = {k: v for k, v in log["recam"].items() if k != "acc"}
    got = norms(official, x, labels)
    last = "grad_norm_layer1_0_conv1"
    for k in want.keys() - {last}: assert got[k] == pytest.approx(want[k], rel=1e-4), k
    # One unit of the lowest stage sits on the kink of its ReLU: rounding of the input (1e-7) moves this norm by up to 7e-4. The official value
    # must lie in the range that rounding spans.
    spread = [got[last]] + [norms(official, x*(1 + 1e-7*torch.randn(x.shape, generator=g)), labels)[last] for _ in range(4)]
    assert max(spread)/min(spread) < 1 + 1e-3
    assert min(spread)*(1 - 1e-4) <= want[last] <= max(spread)*(1 + 1e-4)
    assert official.resnet50.conv1.weight.grad is None and official.resnet50.bn1.weight.grad is None  # the stem stays


# ---------------------------------------------------------------- loss

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5), st.integers(1, 6))
def test_loss_is_the_loop(seed, B, K, C):
    g = torch.Generator().manual_seed(seed)
    w, w2, f = torch.randn(K, C, generator=g), torch.randn(K, C, generator=g), torch.rand(B, C, 3, 4, generator=g)
    y = (torch.rand(B, K, generator=g) < .5).float()
    total = torch.zeros(())
    for b in range(B):
        rows = [k for k in range(K) if y[b, k]]
        for k in rows:
            m = (w[k, :, None, None]*f[b]).sum(0).relu()
            v = (m/(m.max() + 1e-5)*f[b]).mean((1, 2))
            total = total - F.log_softmax(w2 @ v, 0)[k]/len(rows)/B
    assert torch.allclose(reactivation_loss(w2, class_vectors(w, f), y), total, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_shift_changes_no_loss_and_turns_no_sign(seed):
    g = torch.Generator().manual_seed(seed)
    model = add_recam_head(small(seed % 7), seed)
    with torch.no_grad(): recam_weights(model).normal_(generator=g)
    x, y = torch.randn(2, 3, 16, 24, generator=g), torch.eye(10)[:2]
    before, w2 = ReActivation(model)(x, y)["ce"].item(), recam_weights(model).detach().clone()
    shift_head(model)
    assert ReActivation(model)(x, y)["ce"].item() == pytest.approx(before, abs=1e-4)
    assert (recam_weights(model) >= 0).all()
    w, new = class_weights(model).detach(), recam_weights(model).detach()
    assert not ((w < 0) & (w*new > 0)).any() and ((w < 0) & (w*w2 > 0)).any()


def test_gradient_flows_through_maximum_map_and_weights():
    g = torch.Generator().manual_seed(0)
    w, w2, f = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 4), (3, 4), (2, 4, 3, 3)))
    y = torch.tensor([[1., 0, 1], [0, 1, 0]])
    assert torch.autograd.gradcheck(lambda a, b, c: reactivation_loss(b, class_vectors(a, c), y), [t.requires_grad_() for t in (w, w2, f.abs().detach())])


def test_images_without_label_add_nothing():
    model, x = add_recam_head(small()).eval(), torch.rand(3, 3, 16, 16)
    y = torch.zeros(3, 10); y[1, 4] = 1
    one = ReActivation(model)(x[1:2], y[1:2])["ce"].item()
    assert ReActivation(model)(x, y)["ce"].item() == pytest.approx(one/3, rel=1e-5)
    losses = ReActivation(model)(x, torch.zeros(3, 10))
    losses["loss"].backward()
    assert losses["ce"].item() == 0
    assert model.get_parameter(KEY).grad.abs().max() == 0  # a gradient, and not none, so that several processes stay in step


# ---------------------------------------------------------------- training

def test_groups_and_rates_of_the_official_recipe(official):
    o = ReActivation(official).optimizer(ReCAMConfig(), 2644)
    assert [(g["name"], g["lr"], g["weight_decay"], g["momentum"]) for g in o.param_groups] == [("recam", 5e-4, 1e-4, 1e-4), ("cnn", 5e-5, 1e-4, 1e-4)]
    names = {id(p): n for n, p in official.named_parameters()}
    there = [{names[id(p)] for p in g["params"]} for g in o.param_groups]
    assert there[0] == {KEY} and "classifier.weight" in there[1]
    assert not {n for n in there[1] if n.startswith(("resnet50.conv1", "resnet50.bn1"))} and "resnet50.layer1.0.bn1.weight" in there[1]


def test_training_learns_and_resumes_to_the_bit(scenes, tmp_path):
    whole, history = small(), []
    history = train_recam(whole, scenes, TINY, out=tmp_path/"a", progress=False)
    assert len(history) == 4 and history[-1].keys() >= {"loss", "cls", "ce", "lr_recam", "lr_cnn"}
    assert history[0]["loss"] == pytest.approx(history[0]["cls"] + history[0]["ce"], rel=1e-6)

    def stop(model, epochs, rows):
        if epochs == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_recam(small(), scenes, TINY, out=tmp_path/"b", progress=False, callback=stop)
    again = small()
    rows = train_recam(again, scenes, TINY, out=tmp_path/"b", progress=False)
    assert rows == history and model_fingerprint(again) == model_fingerprint(whole)
    assert not whole.training and torch.equal(whole.backbone_net.bn.running_mean, torch.zeros(5))  # the statistics are frozen
    with pytest.raises(ValueError, match="ce_weight"): train_recam(small(), scenes, replace(TINY, ce_weight=.1), out=tmp_path/"b", progress=False)


def test_more_weight_on_the_second_question_answers_it_better(scenes):
    loss = lambda weight: train_recam(small(), scenes, replace(TINY, batch=8, epochs=6, lr_recam=10., ce_weight=weight), progress=False)[-1]["ce"]
    assert loss(1.) < loss(0.) - .05


def test_shift_at_the_end_is_the_same_training(scenes):
    a, b = small(), small()
    assert train_recam(a, scenes, TINY, progress=False) == train_recam(b, scenes, replace(TINY, shift=True), progress=False)
    assert torch.equal(recam_weights(shift_head(a)), recam_weights(b)) and recam_weights(b).min() == 0


@pytest.mark.parametrize("build", [lambda: conformer_mini(10), lambda: TwoBranch("resnet18", "vit_tiny_patch16_224", 10, img_size=32, depth=1)],
                         ids=["conformer", "two_branch"])
def test_two_branches_keep_both_losses(build, scenes, tmp_path):
    torch.manual_seed(0)
    model = build()
    history = train_recam(model, scenes, replace(TINY, epochs=1, batch=8), progress=False)
    assert {"lr_recam", "lr_cnn", "lr_vit"} <= history[0].keys() and history[0]["cls"] > 1  # two BCE losses of about 0.7
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 32)
        want = torch.einsum("kc,bchw->bkhw", class_weights(model)*recam_weights(model), class_features(model, x))
        got = reactivated(model).maps(x)
    assert got.cam.shape[-2:] != want.shape[-2:] or torch.allclose(got.cam, want, atol=1e-5)
    assert ad_cam(got, k=2, clip_k=True).shape == got.cam.shape  # AD-CAM on top of ReCAM


def test_no_half_precision_and_no_nan(scenes):
    with pytest.raises(ValueError, match="model.float"): train_recam(small().half(), scenes, TINY)
    broken = small()
    with torch.no_grad(): broken.classifier.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="lower the learning rates"): train_recam(broken, scenes, TINY, progress=False)


# ---------------------------------------------------------------- extraction

@pytest.fixture(scope="module")
def trained(scenes):
    model = small(1)
    train_recam(model, scenes, TINY, progress=False)
    return model


def test_views_are_weighted_maps(trained, scenes):
    s, before = scenes[0], model_fingerprint(trained)
    keys = np.flatnonzero(s.label).tolist()
    views = recam_views(trained, s.image, keys, scales=(1., .5), flip=True)
    assert [tuple(v.shape) for v in views] == [(len(keys), 8, 8), (len(keys), 4, 4)]
    from adcam.seeds import view
    x = view(s.image, 1., 8, "round")
    with torch.no_grad():
        o = torch.einsum("kc,bchw->bkhw", class_weights(trained)*recam_weights(trained), class_features(trained, torch.cat([x, x.flip(-1)]))).relu()
    assert torch.allclose(views[0], (o[0] + o[1].flip(-1))[keys], atol=1e-5)
    maps = recam(trained, s.image, s.label, scales=(1., .5), flip=True)
    assert maps.shape == (10, 16, 16) and torch.allclose(maps[keys], merge(views, (64, 64))[0]) and not maps[[k for k in range(10) if k not in keys]].any()
    assert model_fingerprint(trained) == before and all(p.requires_grad for p in trained.parameters())


def test_files_of_two_processes_are_those_of_one(trained, scenes, tmp_path):
    few = Scenes("train", 2, 64)
    for n in (1, 2): assert extract_dataset(trained, few, tmp_path/str(n), "recam", processes=n, progress=False)["computed"] == 2
    for p in (tmp_path/"1").glob("*.npz"): assert p.read_bytes() == (tmp_path/"2"/p.name).read_bytes()
    assert load_seed(p).cam.max() <= 1


def test_saved_and_loaded(trained, scenes, tmp_path):
    path, s = save_weights(trained, tmp_path/"recam.safetensors"), scenes[1]
    assert torch.allclose(recam(load_recam(small(7), path).eval(), s.image, s.label), recam(trained, s.image, s.label), atol=1e-5)
    other = small(7, classes=4)
    with pytest.raises(ValueError, match="classes|does not fit"): load_recam(other, path)
    assert not hasattr(other, "recam_predictor")
    plain = save_weights(small(), tmp_path/"plain.safetensors")
    with pytest.raises(ValueError, match="not trained by ReCAM"): load_recam(small(), plain)
    conformer = add_recam_head(conformer_mini(10), seed=4)
    path = save_weights(conformer, tmp_path/"conformer.safetensors")
    assert model_fingerprint(load_recam(conformer_mini(10), path)) == model_fingerprint(conformer)


def test_errors_in_words(trained, scenes):
    s = scenes[0]
    absent = int(np.flatnonzero(np.asarray(s.label) == 0)[0])
    with pytest.raises(ValueError, match=r"train_recam\(model, ds\)"): recam(small().eval(), s.image, s.label)
    with pytest.raises(ValueError, match="label vector is empty"): recam(trained, s.image, np.zeros(10))
    with pytest.raises(ValueError, match="not in the image's label"): recam(trained, s.image, s.label, classes=[absent])
    with pytest.raises(ValueError, match="training mode"): recam(copy.deepcopy(trained).train(), s.image, s.label)
    with pytest.raises(ValueError, match="no linear classifier"): add_recam_head(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="no option 'k'"): recam(trained, s.image, s.label, k=3)
