"AdvCAM: the reference's numbers, the closed form against the two-pass way, independence of classes, and what is refused."
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adcam.baselines.advcam import Step, _frozen, ad_loss, advcam, advcam_views, climb, climb_two_pass, move, regions
from adcam.branches import TwoBranch
from adcam.cnn import CamNet, cam_resnet50, class_weights, resnet_mini
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import class_maps, extract, extract_dataset, merge, view

C = 12  # class of the golden run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small():
    "A random ResNet of four 8-channel stages, 5 classes, 32 pixels per position"
    torch.manual_seed(0)
    net = CamNet("test_resnet", 5).eval()
    with torch.no_grad(): net.classifier.weight.copy_(torch.randn(net.classifier.weight.shape) + .5)   # a map for every class
    return net


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def hot(*classes, K=5):
    return torch.zeros(K).index_fill(0, torch.tensor(classes), 1)


# ---- the reference implementation's numbers (g08) ----

@pytest.fixture(scope="module")
def g08(golden, golden_rules):
    rules = golden_rules("irn/rules")
    net = cam_resnet50().eval()
    net.load_state_dict({k: torch.as_tensor(rules.fill(k, tuple(v.shape))) for k, v in net.state_dict().items()})
    log = json.loads((golden / "irn/advcam_log.json").read_text())
    assert log["class"] == C
    with np.load(golden / "irn/g08_advcam.npz") as z: arrays = {k: z[k] for k in z.files}
    return net, torch.tensor(rules.nrm(80, (3, 80, 96)))[None], arrays, log


def runs_of(net, x):
    "The same climb with sums in different orders (threads, kernels): see `test_golden_climb`"
    for threads, mkldnn in ((2, True), (1, True), (3, True), (1, False)):
        torch.set_num_threads(threads)
        with torch.backends.mkldnn.flags(enabled=mkldnn): yield list(climb(net, x, [C], iterations=5))
    torch.set_num_threads(1)


def differences(steps, x, arrays):
    "Of the four maps, relative; of the three stored pictures, absolute"
    pair = torch.cat([x, x.flip(-1)])
    maps = [float((s.region[0] - torch.tensor(r)).abs().max() / r.max()) for s, r in zip(steps, arrays["regions"])]
    images = [float(np.abs((steps[1].images[0] - pair).numpy() - arrays["pert_step0_minus_img_f16"]).max())]
    images += [float(np.abs(steps[t].images[0, :, :, ::4, ::4].numpy() - arrays[k]).max()) for t, k in ((2, "img_after_step1_sub"), (4, "img_after_step3_sub"))]
    return maps, images


@pytest.fixture(scope="module")
def climbs(g08):
    "Climbs by different orders of float32 sums, with their differences from the reference's maps and pictures."
    net, x, arrays, _ = g08
    return [(steps, *differences(steps, x, arrays)) for steps in runs_of(net, x)]


def test_golden_climb_begins_as_the_reference(climbs):
    """Maps to 1e-4 and pictures to 1e-3, up to the second picture. There one activation lies so near zero that the order of the sums decides whether ReLU
    lets its gradient through; afterwards the pictures part by up to 0.006."""
    for _, maps, images in climbs:
        assert max(maps[:3]) < 1e-4
        assert max(images[:2]) < 1e-3


def test_golden_climb_stays_near_in_every_order(climbs):
    for _, maps, images in climbs:
        assert maps[3] < 1e-3
        assert images[2] < 1e-2


def agreed(climbs):
    "The steps of a climb that is the reference's to the end."
    return next((steps for steps, maps, images in climbs if max(maps) < 1e-4 and max(images) < 1e-3), None)


def test_golden_climb_is_reached_by_one_order(climbs):
    assert agreed(climbs) is not None


LOGGED = {  # name in the reference's log: (our number, from a step and the sum of its scores of the class; tolerance)
    "logit_c": (lambda s, own: own.tolist(), dict(rel=1e-4)),
    "logit_loss": (lambda s, own: float(s.scores.sum() - 2 * own.sum()), dict(rel=1e-4)),
    "L_AD": (lambda s, own: float(s.ad[0]), dict(rel=1e-4, abs=1e-9)),
    "mask_px": (lambda s, own: int(s.mask.sum()), dict(abs=0)),
    "grad_absmax": (lambda s, own: float(s.grad.abs().max()), dict(rel=1e-3)),
}


@pytest.mark.parametrize("name", LOGGED)
def test_golden_climb_logs_the_same(climbs, g08, name):
    number, tolerance = LOGGED[name]
    for s, want in zip(agreed(climbs), g08[3]["advcam"]):
        assert number(s, s.scores[0, :, C]) == pytest.approx(want[name], **tolerance)


def test_golden_climb_minimizes_the_reference_loss(climbs, g08):
    for s, want in zip(agreed(climbs), g08[3]["advcam"]):
        ours = s.scores.sum() - 2 * s.scores[0, :, C].sum() + 7 * s.ad[0]
        assert float(ours) == pytest.approx(-want["loss"], rel=1e-4, abs=0.1)


@pytest.fixture(scope="module")
def scores(g08):
    "Scores of the pair, picture and mirror image: (2,20,5,6)"
    net, x, _, _ = g08
    with torch.no_grad(): return net.maps(torch.cat([x, x.flip(-1)])).cam


def test_golden_number_of_positive_positions(g08, scores):
    log = g08[3]
    assert list(scores.shape) == log["out_shape"]
    assert (scores > 0).sum((0, 2, 3)).tolist() == log["npos_all"]
    assert (scores[:, C] > 0).sum((1, 2)).tolist() == log["advcam"][0]["n_pos_positions"]


def test_golden_number_of_positive_weights(g08):
    assert int((class_weights(g08[0])[C] > 0).sum()) == g08[3]["advcam"][0]["P_c"]


def test_golden_regions_where_all_positions_are_positive(g08, scores):
    "Then half of all are positive, and the mirror image comes back turned"
    positive = (class_weights(g08[0]) > 0).sum(1)
    each = regions(scores[:, None].transpose(0, 1), torch.tensor([C]), positive)
    one = scores[:, C].relu() * .5 / positive[C]
    assert torch.allclose(each[0], one[0] + one[1].flip(-1), atol=1e-8)
    assert float(one.max()) == pytest.approx(g08[3]["advcam"][0]["raw_max"], rel=1e-4)


def test_golden_closed_form_error(g08):
    "The reference measured 3e-9 between grad-CAM and the closed form; so do we, between our two ways"
    net, x, _, log = g08
    slow, fast = next(climb_two_pass(net, x, C, iterations=1)), next(climb(net, x, [C], iterations=1))
    assert float((slow.region - fast.region).abs().max()) < 2e-8
    assert max(s["closed_form_maxabs_err"] for s in log["advcam"]) < 2e-8


def test_golden_step(golden, golden_rules):
    nrm = golden_rules("irn/rules").nrm
    x, g = torch.tensor(nrm(81, (2, 3, 5, 6))), torch.tensor(nrm(82, (2, 3, 5, 6), .01))
    want = json.loads((golden / "irn/advcam_log.json").read_text())["adv_climb_alone"]
    y = move(x[None], g[None], .08)[0]
    assert float(y.sum()) == pytest.approx(want["sum"], rel=1e-5) and float(y.max()) == pytest.approx(want["max"], rel=1e-6)
    free = x + .08 * (g / g.abs().max())
    assert free.max() < x.max() and free.min() > x.min()              # nothing leaves the range here;
    assert int((y != free).sum()) == want["n_clamped"]                # the log counts entries that differ at all: by the order of two roundings


# ---- the closed form is grad-CAM ----

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2]), st.integers(1, 6), st.integers(1, 6), st.integers(1, 12))
def test_closed_form_is_grad_cam(seed, p, h, w, channels):
    "On any features and weights; three classes in one call are three calls"
    r = torch.Generator().manual_seed(seed)
    f, weight = torch.randn(p, channels, h, w, generator=r).requires_grad_(), torch.randn(3, channels, generator=r)
    z = torch.einsum("kc,pchw->pkhw", weight, f)
    got = regions(z[None].expand(3, -1, -1, -1, -1), torch.arange(3), (weight > 0).sum(1))
    for c in range(3):
        g, = torch.autograd.grad(z[:, c].relu().sum(), f, retain_graph=True)
        alpha = g.sum((2, 3), keepdim=True) / (g > 0).sum().clamp_min(1)
        want = (alpha * f).sum(1).relu()
        if (g > 0).any(): assert torch.allclose(got[c], want[0] + (want[1].flip(-1) if p == 2 else 0), atol=1e-5)
        assert torch.isfinite(got[c]).all()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_fast_equals_slow(small, flip, whole):
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    slow, fast = list(climb_two_pass(small, x, 2, flip, iterations=5, whole=whole)), list(climb(small, x, [2], flip, iterations=5))
    small.zero_grad()
    assert len(slow) == len(fast) == 5 and float(fast[0].region.max()) > 0
    for a, b in zip(slow, fast):
        for name in ("region", "images", "scores", "ad"): assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-5), name
        assert a.mask.equal(b.mask)
        assert b.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5 * float(a.grad.abs().max()))
    assert float((fast[-1].images - fast[0].images).abs().max()) > .05


def test_climbing_climbs(small):
    "The score of the class rises, and more with L_AD off than its mask allows; both pictures of the pair go their own way"
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    steps = list(climb(small, x, [2], iterations=8, ad_coefficient=0))
    goal = lambda s: float((2 * s.scores[0, :, 2] - s.scores[0].sum(1)).sum())
    assert goal(steps[-1]) > goal(steps[0])
    assert not torch.allclose(steps[-1].images[0, 0], steps[-1].images[0, 1].flip(-1), atol=1e-6)
    held = list(climb(small, x, [2], iterations=8, ad_coefficient=1e4))
    inside = lambda run: float(run[-1].ad)
    assert inside(held) < inside(steps)


def test_ad_loss_is_flat_through_the_mask():
    R = torch.tensor([[[.1, .6, 1.]]], requires_grad=True)
    loss, mask = ad_loss(R, torch.tensor([[[.1, .5, 1.2]]]))
    loss.sum().backward()
    assert mask.tolist() == [[[False, True, True]]] and R.grad.tolist() == [[[0., 1., -1.]]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 10))
def test_a_step_stays_in_the_range(seed, size):
    r = torch.Generator().manual_seed(seed)
    X, g = torch.randn(2, 2, 3, 4, 5, generator=r), torch.randn(2, 2, 3, 4, 5, generator=r)
    Y = move(X, g, size)
    for i in range(2):
        assert Y[i].min() >= X[i].min() and Y[i].max() <= X[i].max() and (Y[i] - X[i]).abs().max() <= size * 1.0001
    assert move(X, torch.zeros_like(g)).equal(X)


# ---- classes, batches, scales, pictures ----

@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize("flip", [True, False])
def test_batches_change_nothing(small, picture, batch, flip):
    "Each class is what it is alone: the closed form's constant belongs to the pair"
    run = lambda keys, b: advcam_views(small, picture, keys, scales=(.5, 1.), flip=flip, iterations=4, batch=b)
    alone = [torch.cat(v) for v in zip(*(run([k], 1) for k in (0, 2, 3)))]
    for a, b in zip(alone, run([0, 2, 3], batch)): assert torch.allclose(a, b, atol=1e-5 * float(a.max()))


def test_half_as_many_steps_at_half_the_size(small, picture):
    for scale, n in ((.5, 3), (1., 7)):
        got, = advcam_views(small, picture, [2], scales=(scale,), flip=True, iterations=7)
        x = view(picture, scale, small.stride)
        assert torch.allclose(got, sum(s.region for s in climb(small, x, [2], iterations=n)), atol=1e-6)
    one, = advcam_views(small, picture, [2], scales=(.5,), iterations=1)
    assert one.max() > 0


def test_one_iteration_is_cam(small, picture):
    "Without the mirror image; with it the two count by their shares of positive positions"
    a, b = (extract(small, picture, hot(0, 2), m, **o) for m, o in (("cam", {}), ("advcam", dict(iterations=1))))
    assert a.cam.max() > .9 and np.abs(a.cam - b.cam).max() < .01                     # the divisor has 1e-5 beside a maximum of about 0.1
    with torch.no_grad(): z = small.maps(torch.cat([x := view(picture, 1., small.stride), x.flip(-1)])).cam[:, 2].relu()
    n = (z > 0).sum((1, 2))
    want = (z[0] * n[0] + z[1].flip(-1) * n[1]) / (n.sum() * (class_weights(small)[2] > 0).sum())
    assert torch.allclose(advcam_views(small, picture, [2], flip=True, iterations=1)[0][0], want, atol=1e-6)


def test_without_flip_the_picture_climbs_alone(small, picture):
    "Stated in words: the same formula with one picture, not the left half of a pair"
    x = view(picture, 1., small.stride)
    got, = advcam_views(small, picture, [2], iterations=3, flip=False)
    want = sum(s.region for s in climb_two_pass(small, x, 2, flip=False, iterations=3))
    small.zero_grad()
    assert torch.allclose(got, want, atol=1e-5 * float(want.max()))
    assert next(climb(small, x, [2], flip=False)).images.shape[1] == 1


def test_mirrored_picture_gives_the_mirrored_map(small, picture):
    a, b = (advcam_views(small, p, [2], flip=True, iterations=3)[0] for p in (picture, picture[:, ::-1].copy()))
    assert torch.allclose(a, b.flip(-1), atol=1e-4 * float(a.max()))


def test_wrapper_and_method_are_one(small, picture):
    got = advcam(small, picture, hot(1, 3), scales=(1.,), flip=False, iterations=2)
    assert got.shape == (5, 16, 24) and 0 <= got.min() and got.max() <= 1 and not got[[0, 2, 4]].any()
    assert got.equal(class_maps("advcam", small, picture, hot(1, 3), iterations=2))
    views = advcam_views(small, picture, [1, 3], iterations=2)
    assert torch.allclose(got[[1, 3]], merge(views, picture.shape[:2])[0])
    assert torch.allclose(got[3], advcam(small, picture, hot(1, 3), classes=[3], scales=(1.,), flip=False, iterations=2)[3])


def test_published_defaults(small, picture):
    "advcam(...) alone: four scales with the mirror image"
    views = advcam_views(small, picture, [2], scales=(.5, 1., 1.5, 2.), flip=True, iterations=2)
    assert torch.allclose(advcam(small, picture, hot(2), iterations=2)[2], merge(views, picture.shape[:2])[0][0])


def test_padding_has_no_map_of_its_own(small):
    image = np.random.default_rng(1).integers(0, 256, (70, 100, 3), dtype=np.uint8)   # 3x4 positions, of which 2x3 are picture
    got, = advcam_views(small, image, [2], iterations=2, size_mode="pad")
    assert got.shape == (1, 3, 4) and got[:, 2].equal(got[:, 1]) and got[:, :, 3].equal(got[:, :, 2])
    exact, = advcam_views(small, image, [2], iterations=2, size_mode="exact")
    assert exact.shape == (1, 3, 4)


@pytest.mark.parametrize("build", [lambda: conformer_mini(5), lambda: TwoBranch("test_resnet", "test_vit", 5), lambda: resnet_mini(5)],
                         ids=["Conformer", "TwoBranch", "CamNet"])
def test_every_network(build):
    torch.manual_seed(0)
    net, image = build().eval(), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    got = advcam(net, image, hot(0, 1, 2, 3, 4), scales=(1.,), iterations=3)
    assert got.shape == (5, 16, 16) and torch.isfinite(got).all() and got.max() > .5
    start, after = list(climb(net, view(image, 1., net.stride), [0], iterations=2))
    assert float((after.images - start.images).abs().max()) == pytest.approx(.08, rel=1e-3)


def test_data_set_resumes_per_image(tmp_path):
    "One file per image; what is there is not climbed again, and the options are part of the folder's settings"
    torch.manual_seed(0)
    net, ds = CamNet("test_resnet", 10).eval(), Scenes("val", 2)
    go = lambda **o: extract_dataset(net, ds, tmp_path, "advcam", progress=False, **dict(iterations=2) | o)
    assert go()["computed"] == 2
    first = {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")}
    (tmp_path / f"{ds.ids[0]}.npz").unlink()
    done = go()
    assert (done["computed"], done["cached"]) == (1, 1) and {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")} == first
    with pytest.raises(ValueError, match="iterations"): go(iterations=3)


# ---- the network stays as it was ----

def test_network_untouched(small, picture):
    small.classifier.weight.requires_grad_(False)
    try:
        before = {n: (t.clone(), t.requires_grad) for n, t in [*small.named_parameters(), *small.named_buffers()]}
        advcam(small, picture, hot(1, 2), iterations=3)
        next(climb(small, view(picture, 1., small.stride), [1]))                      # left in the middle
        with pytest.raises(ZeroDivisionError), _frozen(small):
            assert not any(p.requires_grad for p in small.parameters())
            1 / 0
        for n, t in [*small.named_parameters(), *small.named_buffers()]: assert t.equal(before[n][0]) and t.requires_grad == before[n][1] and t.grad is None, n
        assert not small.training
    finally: small.classifier.weight.requires_grad_(True)


def test_gradient_mode_of_the_caller_is_kept(small, picture):
    with torch.no_grad():
        advcam_views(small, picture, [1], iterations=2)
        assert not torch.is_grad_enabled()


# ---- what is refused, and what goes wrong ----

class Faulty(nn.Module):
    "Random features; from call `bad` on the forward pass, or the backward pass, gives NaN for row `row`"
    stride = 8

    def __init__(self, bad, row=0, backward=False):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.conv_cls_head, self.num_classes = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5, bias=False), 5
        self.bad, self.row, self.backward, self.calls = bad, row, backward, 0

    def features(self, x):
        f, self.calls = self.body(x).relu(), self.calls + 1
        if self.calls < self.bad: return f
        nan = torch.ones(len(x), 1, 1, 1).index_fill(0, torch.tensor([self.row]), float("nan"))
        if self.backward: f.register_hook(lambda g: g * nan)
        return f if self.backward else f * nan


def run(net, classes, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps = list(climb(net.eval(), torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(0)), classes, **options))
    return steps, [str(w.message) for w in said]


def test_nan_map_keeps_the_last_good_one():
    good, _ = run(Faulty(99), [3], iterations=3)
    steps, said = run(Faulty(4), [3], iterations=27, name="2007_000032")
    assert len(said) == 1 and all(part in said[0] for part in ("2007_000032", "class 3", "the map is NaN", "step 3 of 27", "first 3 maps"))
    assert torch.allclose(sum(s.region for s in steps), sum(s.region for s in good)) and len(steps) == 4


def test_nan_gradient_stops_after_the_map():
    good, _ = run(Faulty(99), [3], iterations=3)
    steps, said = run(Faulty(3, backward=True), [3], iterations=27)
    assert len(said) == 1 and "the gradient is NaN" in said[0] and "step 2 of 27" in said[0] and "first 3 maps" in said[0]
    assert torch.allclose(sum(s.region for s in steps), sum(s.region for s in good)) and len(steps) == 3


def test_one_class_stops_the_other_goes_on():
    "Row 2 of the batch is the first picture of the second class"
    good, _ = run(Faulty(99), [1, 3], iterations=6)
    steps, said = run(Faulty(4, row=2), [1, 3], iterations=6)
    assert len(said) == 1 and "class 3" in said[0] and len(steps) == 6
    total, want = (sum(s.region for s in r) for r in (steps, good))
    assert torch.allclose(total[0], want[0]) and torch.allclose(total[1], sum(s.region for s in good[:3])[1])


def test_the_warning_names_the_scale(picture):
    with pytest.warns(UserWarning, match="2007_000032 at scale 1, class 3: .* step 2 of 9"):
        maps, = advcam_views(Faulty(3).eval(), picture, [3], iterations=9, name="2007_000032")
    assert torch.isfinite(maps).all()


def test_nan_from_the_start_is_an_error():
    with pytest.raises(ValueError, match="class 3: the network gives NaN or infinity for the unchanged picture"): run(Faulty(1), [3])


@pytest.mark.parametrize("options, words",
                         [(dict(iterations=0), "at least 1"), (dict(iterations=2.5), "whole number"), (dict(ad_coefficient=-1), "0 .no L_AD. or more"),
                                            (dict(step_size=0), "positive"), (dict(step_size=float("nan")), "positive"),
                                            (dict(threshold=1), "share of the maximum"), (dict(batch=0), "at least 1")])
def test_wrong_constants(small, picture, options, words):
    with pytest.raises(ValueError, match=words): advcam(small, picture, hot(1), **options)


def test_unknown_option(small, picture):
    with pytest.raises(ValueError, match="no option 'lambda_'"): advcam(small, picture, hot(1), lambda_=7)


def test_labels(small, picture):
    with pytest.raises(ValueError, match="label vector is empty"): advcam(small, picture, hot(1) * 0)
    with pytest.raises(ValueError, match="class 4 is not in the image's label"): advcam(small, picture, hot(1), classes=[4])
    with pytest.raises(ValueError, match="class 5 is none of the network's 5"): advcam_views(small, picture, [5])
    with pytest.raises(ValueError, match="classes is empty"): list(climb(small, view(picture, 1., 32), []))


def test_networks_that_cannot_climb(small, picture):
    x = view(picture, 1., 32)
    with pytest.raises(ValueError, match="half precision"): list(climb(resnet_mini(5).to(torch.bfloat16).eval(), x, [1]))
    with pytest.raises(ValueError, match="half precision"): list(climb(small, x.half(), [1]))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="half precision"): list(climb(small, x, [1]))
    with pytest.raises(ValueError, match="half precision"): extract(small, picture, hot(1), "advcam", precision="bf16")
    with pytest.raises(ValueError, match="eval"): list(climb(resnet_mini(5).train(), x, [1]))
    with pytest.raises(ValueError, match="linear classifier"): list(climb(nn.Conv2d(3, 4, 1).eval(), x, [1]))
    with pytest.raises(ValueError, match="one normalized picture"): list(climb(small, torch.cat([x, x]), [1]))


def test_step_is_complete(small, picture):
    s = next(climb(small, view(picture, 1., 32), [1, 4]))
    assert isinstance(s, Step) and [tuple(v.shape) for v in s] == [(2, 2, 3), (2, 2, 3, 64, 96), (2, 2, 5), (2,), (2, 2, 3), (2, 2, 3, 64, 96)]
