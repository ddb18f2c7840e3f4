"Score-CAM: the numbers of three implementations, groups that change nothing, and what is refused."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adcam.baselines.score_cam import ORDERS, READINGS, activation_masks, branch_logits, channel_weights, masked_logits, minmax, score_cam, score_cam_views
from adcam.branches import TwoBranch
from adcam.cnn import CamNet, class_features, resnet_mini
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import METHODS, class_maps, extract, extract_dataset, load_seed, merge, view

torch.set_num_threads(1)
DEAD = 7


class Tiny(nn.Module):
    "The network of g15; counts what goes through it"
    stride, num_classes = 4, 5

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 12), (12, 10)))
        self.classifier, self.batches = nn.Linear(10, 5), []

    def features(self, x):
        self.batches.append(len(x))
        for conv in (self.conv1, self.conv2): x = F.max_pool2d(conv(x).relu(), 2)
        return self.conv3(x).relu()


@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture
def tiny(rules):
    net = Tiny().eval()
    named = lambda n: n.replace("classifier", "fc")
    state = {n: torch.from_numpy(rules.fill(f"scorecam.{named(n)}", p.shape)) for n, p in net.named_parameters()}
    for n in ("conv1", "conv2", "conv3"): state[f"{n}.weight"] *= 2
    state["classifier.weight"] *= .5
    state["conv3.bias"][DEAD] = -100
    net.load_state_dict(state)
    return net


@pytest.fixture
def g15(golden): return np.load(golden / "related/g15_scorecam.npz", allow_pickle=False)


@pytest.fixture
def x(rules): return torch.from_numpy(rules.nrm(800, (1, 3, 40, 48)))


@pytest.fixture(scope="module")
def picture(): return np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def hot(*classes, K=5): return torch.zeros(K).index_fill(0, torch.tensor(classes), 1)


def run(net, x, reading):
    "Channels, and logits of every masked picture"
    masks = {n: v for n, v in READINGS[reading].items() if n in ("order", "align_corners", "eps")}
    with torch.no_grad():
        A = class_features(net, x)[0]
        return A, masked_logits(net, x, A, **masks)


def weighted(alpha, A): return torch.einsum("nc,chw->nhw", alpha, A).relu()


# ---- the numbers of three implementations (g15) ----

def test_golden_score_cam_network(tiny, x, g15):
    with torch.no_grad(): logits, A = branch_logits(tiny, x), class_features(tiny, x)
    np.testing.assert_allclose(logits, g15["logits"], atol=1e-5)
    np.testing.assert_allclose(A, g15["feat"], atol=1e-5)
    np.testing.assert_allclose(run(tiny, x, "paper")[1][1][None], g15["logits_zero"], atol=1e-5)


def test_golden_score_cam_authors(tiny, x, g15):
    "Class probability as weight, constant channels left out, enlarged before the final min-max"
    A, (logits, _) = run(tiny, x, "authors")
    live = [j for j in range(10) if j != DEAD]
    np.testing.assert_allclose(logits[live], g15["hw_masked_logits"], atol=1e-5, rtol=1e-5)
    alpha = channel_weights(logits, range(5), **READINGS["authors"])
    np.testing.assert_allclose(alpha[:, live], g15["hw_scores"], rtol=1e-5, atol=1e-7)
    maps = minmax(F.interpolate(weighted(alpha, A)[None], (40, 48), mode="bilinear")[0])
    np.testing.assert_allclose(maps, g15["hw_maps"], atol=1e-5)
    np.testing.assert_allclose(maps.double().sum((1, 2)), g15["hw_maps_sum"], rtol=1e-5)


@pytest.mark.parametrize("score, prefix", [("logit", "tc"), ("sigmoid", "tc_sig")])
def test_golden_score_cam_torchcam(tiny, x, g15, score, prefix):
    "Baseline is the picture itself; masks are stretched before they are enlarged; maps stay on the feature grid"
    A, (logits, _) = run(tiny, x, "torchcam")
    with torch.no_grad(): alpha = channel_weights(logits, range(5), score, baseline=branch_logits(tiny, x)[0])
    np.testing.assert_allclose(alpha, g15[f"{prefix}_weights"], rtol=1e-5)
    np.testing.assert_allclose(minmax(weighted(alpha, A), 1e-8), g15[f"{prefix}_norm"], atol=1e-5)
    if score == "logit": np.testing.assert_allclose(weighted(alpha, A), g15["tc_raw"], atol=1e-5)


@pytest.mark.parametrize("score, prefix", [("logit", "gc"), ("sigmoid", "gc_sig")])
def test_golden_score_cam_pytorch_grad_cam(tiny, x, g15, score, prefix):
    "Enlarged with aligned corners; the map is stretched, enlarged, and stretched again"
    A, (logits, _) = run(tiny, x, "gradcam")
    alpha = channel_weights(logits, range(5), score)
    np.testing.assert_allclose(alpha, g15[f"{prefix}_weights"], rtol=1e-5)
    maps = minmax(F.interpolate(minmax(weighted(alpha, A), 1e-7)[None], (40, 48), mode="bilinear")[0], 1e-7)
    np.testing.assert_allclose(maps, g15[f"{prefix}_maps"], atol=1e-5)
    np.testing.assert_allclose(maps.double().sum((1, 2)), g15[f"{prefix}_maps_sum"], rtol=1e-5)


def test_golden_score_cam_readings_differ(tiny, x, golden):
    "The three are not one method: up to 0.36 of the maximum, as the reference's log has it"
    import json
    log = json.loads((golden / "related/related_log.json").read_text())["scorecam"]
    assert log["dead_channel"] == DEAD
    maps = {}
    for r in ("authors", "gradcam"):
        A, (logits, _) = run(tiny, x, r)
        maps[r] = minmax(F.interpolate(weighted(channel_weights(logits, range(5), **{k: v for k, v in READINGS[r].items()
            if k in ("score", "channel_softmax")}), A)[None], (40, 48), mode="bilinear")[0])
    np.testing.assert_allclose((maps["authors"] - maps["gradcam"]).abs().amax((1, 2)), log["hw_vs_gc_maxabs"], atol=.01)


# ---- properties ----

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(2, 6), st.sampled_from(ORDERS), st.booleans())
def test_a_stencil_lies_between_0_and_1(seed, h, w, order, align):
    A = torch.randn(4, h, w, generator=torch.Generator().manual_seed(seed))
    A[2] = 3.
    m = activation_masks(A, (13, 17), order, align)
    assert m.shape == (4, 13, 17) and m.min() >= 0 and m.max() <= 1 + 1e-6 and not m[2].any()
    if order == "upsample_first": assert torch.allclose(m[[0, 1, 3]].amax((1, 2)), torch.ones(3))


def test_weights_of_probabilities_are_nearly_flat():
    "No weight is more than e times another, whatever the logits"
    alpha = channel_weights(torch.randn(50, 3)*20, [0, 1, 2], "sigmoid")
    assert float((alpha.amax(1)/alpha.amin(1)).max()) <= np.e + 1e-4


@pytest.mark.parametrize("baseline", ["black", "picture"])
def test_a_baseline_cancels_in_the_channel_softmax_and_not_without(tiny, picture, baseline):
    run = lambda **o: score_cam_views(tiny, picture, [0, 3], **o)[0]
    assert torch.allclose(run(baseline=baseline), run(), atol=1e-5)
    assert not torch.allclose(run(baseline=baseline, channel_softmax=False), run(channel_softmax=False), atol=1e-3)


@pytest.mark.parametrize("group", [1, 3, 9, 100])
def test_groups_change_nothing_and_bound_the_batch(tiny, picture, group):
    want = score_cam_views(tiny, picture, [1, 2])[0]
    tiny.batches.clear()
    assert torch.allclose(score_cam_views(tiny, picture, [1, 2], group=group)[0], want, atol=1e-5)
    assert max(tiny.batches) <= max(group, 1) and sum(tiny.batches) == 9 + 2    # nine live channels, the black picture, the picture itself


def test_classes_cost_nothing_and_do_not_depend_on_each_other(tiny, picture):
    one, = score_cam_views(tiny, picture, [3])
    tiny.batches.clear()
    three, = score_cam_views(tiny, picture, [0, 3, 4])
    assert sum(tiny.batches) == 11 and torch.equal(three[1], one[0])


def test_a_dead_channel_does_not_move_the_map(tiny, picture):
    "It takes part of the softmax, but adds zero: after the division by the maximum nothing is left of it"
    seed = extract(tiny, picture, hot(0, 2), "score_cam")
    with torch.no_grad():
        x = view(picture, 1., 4)
        A = class_features(tiny, x)[0]
        A = A[[j for j in range(10) if j != DEAD]]
        m = weighted(channel_weights(masked_logits(tiny, x, A)[0], [0, 2]), A)
    np.testing.assert_allclose(merge([m - m.amin((1, 2), keepdim=True)], (40, 48))[1], seed.high_res, atol=1e-4)


def test_channels_takes_those_that_vary_most(tiny, picture):
    with torch.no_grad(): A = class_features(tiny, view(picture, 1., 4))[0]
    tiny.batches.clear()
    got, = score_cam_views(tiny, picture, [0], channels=3)
    assert sum(tiny.batches) == 3 + 2
    best = A.flatten(1).var(1).topk(3).indices.sort().values
    with torch.no_grad(): m = weighted(channel_weights(masked_logits(tiny, view(picture, 1., 4), A[best])[0], [0]), A[best])
    assert torch.allclose(got, m - m.amin((1, 2), keepdim=True), atol=1e-6)
    assert torch.equal(score_cam_views(tiny, picture, [0], channels=99)[0], score_cam_views(tiny, picture, [0])[0])


def test_the_floor_is_the_minimum_of_each_view(tiny, picture):
    high, low = (score_cam_views(tiny, picture, [0, 1], floor=f)[0] for f in (False, True))
    assert (high.amin((1, 2)) > 0).all() and not low.amin((1, 2)).any()
    assert torch.allclose(high - high.amin((1, 2), keepdim=True), low)


def test_flip_adds_the_mirrored_map(tiny, picture):
    one = lambda p: score_cam_views(tiny, p, [0, 1])[0]
    both, = score_cam_views(tiny, picture, [0, 1], flip=True)
    assert torch.allclose(both, one(picture) + one(picture[:, ::-1].copy()).flip(-1), atol=1e-5)


@pytest.mark.parametrize("build",
                         [lambda: conformer_mini(5), lambda: TwoBranch("test_resnet", "test_vit", 5), lambda: resnet_mini(5), lambda: CamNet("test_resnet", 5)],
                         ids=["Conformer", "TwoBranch", "resnet_mini", "timm"])
def test_every_network(build):
    torch.manual_seed(0)
    net, image = build().eval(), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    got = score_cam(net, image, hot(1, 4), channels=20)
    assert got.shape == (5, 16, 16) and torch.isfinite(got).all() and got[[1, 4]].amax((1, 2)).min() > .9 and not got[[0, 2, 3]].any()


def test_padding_has_no_map_of_its_own(picture):
    torch.manual_seed(0)
    net = CamNet("test_resnet", 5).eval()                                             # 32 pixels per position
    got, = score_cam_views(net, np.resize(picture, (70, 100, 3)), [2], size_mode="pad", channels=4)
    assert got.shape == (1, 3, 4) and got[:, 2].equal(got[:, 1]) and got[:, :, 3].equal(got[:, :, 2])


# ---- in the pipeline ----

def test_it_is_a_method(tiny, picture):
    assert "score_cam" in METHODS
    got = score_cam(tiny, picture, hot(1, 3), scales=(.5, 1.), flip=True)
    assert got.equal(class_maps("score_cam", tiny, picture, hot(1, 3), scales=(.5, 1.), flip=True)) and 0 <= got.min() and got.max() <= 1
    views = score_cam_views(tiny, picture, [1, 3], scales=(.5, 1.), flip=True)
    assert torch.allclose(got[[1, 3]], merge(views, (40, 48))[0])


def test_data_set_resumes_per_image(tmp_path):
    torch.manual_seed(0)
    net, ds = resnet_mini(10).eval(), Scenes("val", 2, 48)
    go = lambda **o: extract_dataset(net, ds, tmp_path, "score_cam", progress=False, **dict(channels=4) | o)
    assert go()["computed"] == 2
    first = {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")}
    (tmp_path / f"{ds.ids[0]}.npz").unlink()
    done = go()
    assert (done["computed"], done["cached"]) == (1, 1) and {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")} == first
    with pytest.raises(ValueError, match="channels: 4 there, 5 now"): go(channels=5)


def test_two_shards_make_the_bytes_of_one_run(tmp_path):
    torch.manual_seed(0)
    net, ds = resnet_mini(10).eval(), Scenes("val", 2, 48)
    for name, shard in (("one", (0, 1)), ("two", (0, 2)), ("two", (1, 2))):
        extract_dataset(net, ds, tmp_path / name, "score_cam", channels=4, shard=shard, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert load_seed(tmp_path / f"one/{ds.ids[0]}.npz").high_res.max() > .9


def test_the_callers_gradient_mode_and_network_stay(tiny, picture):
    before = {n: p.clone() for n, p in tiny.named_parameters()}
    score_cam_views(tiny, picture, [0])
    assert torch.is_grad_enabled() and all(p.equal(before[n]) and p.grad is None for n, p in tiny.named_parameters())


def test_an_estimate_asks_four_channels_and_no_more():
    "With 2,048 of them, two whole pictures would be hours before the first seed"
    from adcam.cost import plan_probe, probe_seeds
    torch.manual_seed(0)
    net, ds, passed = resnet_mini(10).eval(), Scenes("val", 2, 48), []
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(lambda m, x: passed.append(len(x[0])))
    work = plan_probe(ds, (1.,), net.stride)
    few, all_ = (probe_seeds(net, ds, work, "score_cam", (1.,), **o) for o in (dict(channels=4), {}))
    assert sum(passed) == 2*2*(4 + 2) and all_.seconds > 5*few.seconds               # 130 passes of a picture, asked from 6


# ---- what is refused ----

def test_labels(tiny, picture):
    with pytest.raises(ValueError, match="label vector is empty"): score_cam(tiny, picture, hot(1)*0)
    with pytest.raises(ValueError, match="class 4 is not in the image's label"): score_cam(tiny, picture, hot(1), classes=[4])


@pytest.mark.parametrize("options, words",
                         [(dict(score="probability"), "choose one of logit"), (dict(order="both"), "choose one of upsample_first"),
                          (dict(baseline="white"), "choose one of none"),
                                            (dict(group=0), "at least 1"), (dict(channels=0), "at least 1"), (dict(channels=1.5), "whole number"),
                                            (dict(k=3), "no option 'k'")])
def test_wrong_options(tiny, picture, options, words):
    with pytest.raises(ValueError, match=words): score_cam(tiny, picture, hot(1), **options)


def test_networks_that_cannot_answer(tiny, picture):
    with pytest.raises(ValueError, match=r"call model.float\(\) first"): score_cam_views(resnet_mini(5).to(torch.bfloat16).eval(), picture, [0])
    with pytest.raises(ValueError, match="half precision"): extract(tiny, picture, hot(1), "score_cam", precision="bf16")
    with pytest.raises(ValueError, match="eval"): score_cam_views(resnet_mini(5).train(), picture, [0])
    with pytest.raises(ValueError, match="linear classifier"): score_cam_views(nn.Conv2d(3, 4, 1).eval(), picture, [0])


def test_nan_names_the_picture_and_the_scale(tiny, picture):
    with torch.no_grad(): tiny.classifier.weight[2, 0] = float("nan")
    with pytest.raises(ValueError, match="2007_000032 at scale 1: the network gives NaN or infinity for .* masked pictures"):
        score_cam_views(tiny, picture, [0], name="2007_000032")


def test_one_bad_channel_of_the_picture_is_found(tiny, picture, monkeypatch):
    "The masked pictures give sound scores; only the map itself would be NaN"
    features = tiny.features
    monkeypatch.setattr(tiny, "features", lambda x: features(x).index_fill(1, torch.tensor([3]), float("inf")) if len(x) == 1 and x.any() else features(x))
    with pytest.raises(ValueError, match="features hold NaN or infinity"): score_cam_views(tiny, picture, [0])


def test_nan_stops_a_data_set(tmp_path):
    net, ds = resnet_mini(10).eval(), Scenes("val", 1, 48)
    with torch.no_grad(): net.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"): extract_dataset(net, ds, tmp_path, "score_cam", channels=2, progress=False)
