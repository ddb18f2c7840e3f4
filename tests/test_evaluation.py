"""adcam.evaluation: golden numbers, sweep = loops to the pixel, the identity of Table 3, bad input, speed."""
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from adcam import evaluation as E
from adcam.evaluation import Sweep, confusion, scores, seed_mask, side_by_side, sweep

few = settings(max_examples=60, deadline=None)
GRID = np.arange(60) / 100


def naive_mask(cam, keys, t):
    "argmax of [t, cam] with every channel there, in float32"
    stack = np.concatenate([np.full((1, *cam.shape[1:]), t, np.float32), cam.astype(np.float32)])
    return np.concatenate([[0], np.asarray(keys) + 1])[stack.argmax(0)]


def naive_sweep(seeds, thresholds, K):
    out = np.zeros((len(thresholds), K + 1, K + 1), np.int64)
    for cam, keys, gt in seeds:
        for j, t in enumerate(thresholds):
            pred = naive_mask(cam, keys, t)
            for g, p in zip(gt[gt != 255], pred[gt != 255]): out[j, g, p] += 1
    return out


# ---- golden numbers

@pytest.fixture(scope="module")
def g12(golden, golden_rules):
    "(arrays, [(cam, keys, gt)], [(pred, gt)]) by the rules of golden/README.md, section 6"
    rules, seeds, pairs = golden_rules("irn/rules"), [], []
    for i in range(6):
        gt = rules.label_map(200 + i, 37 + 3*i, 45 - 2*i, 21, cell=7)
        pred, r = gt.copy(), np.random.default_rng(300 + i)
        wrong = r.random(gt.shape) < .35
        pred[wrong] = r.integers(0, 21, size=wrong.sum())
        pairs.append((pred, gt))
        classes = np.setdiff1d(gt, [0, 255])
        u = np.random.default_rng(400 + i).random((len(classes), *gt.shape))
        cam = np.array([.5 * (gt == k) + .5 * u[j] for j, k in enumerate(classes)]).astype(np.float32)
        seeds.append((cam / cam.max((1, 2), keepdims=True), classes - 1, gt))
    with np.load(golden / "irn/g12_eval.npz", allow_pickle=False) as z: return dict(z), seeds, pairs


def test_golden_confusion_and_scores(g12):
    z, _, pairs = g12
    C = sum(confusion(np.where(p == 255, 0, p), gt, 20) for p, gt in pairs)
    assert (C == z["confusion"]).all() and C.dtype == np.int64
    assert (sum(confusion(p, gt, 20) for p, gt in pairs) == C).all()  # a predicted 255 is background
    for absent, prefix in (("skip", ""), ("zero", "seam_")):
        s = scores(C, absent)
        for name, key in (("iou", "iou"), ("fp", "fp_per_class"), ("fn", "fn_per_class")):
            np.testing.assert_allclose(s[key], z[prefix + name], rtol=0, atol=1e-9)


def test_golden_sweep(g12):
    z, seeds, _ = g12
    swept = sweep(seeds)
    got = [[a["t"], a["miou"], b["miou"]] for a, b in zip(swept.table(), swept.table("zero"))]
    np.testing.assert_allclose(got, z["sweep"], rtol=0, atol=1e-9)


# ---- scores

@few
@given(st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_confusion_equals_loops(K, seed, small):
    r = np.random.default_rng(seed)
    pred, gt = r.choice([*range(K + 1), 255], (2, 9, 7)).astype(np.uint8 if small else np.int64)
    C = np.zeros((K + 1, K + 1), int)
    for p, g in zip(pred.ravel().tolist(), gt.ravel().tolist()):
        if g != 255: C[g, 0 if p == 255 else p] += 1
    assert (confusion(pred, gt, K) == C).all()


@few
@given(st.integers(1, 8), st.integers(0, 2**31), st.floats(0, .8))
def test_identity_of_table_3(K, seed, empty):
    r = np.random.default_rng(seed)
    C = r.integers(0, 30, (K + 1, K + 1))
    gone = np.flatnonzero(r.random(K) < empty) + 1  # classes that are nowhere
    C[gone], C[:, gone] = 0, 0
    C[0, 0] += 1
    s, there = scores(C), int(((C.sum(0) + C.sum(1)) > 0)[1:].sum())
    if not there:
        assert np.isnan(s["fp"]) and s["miou"] == 1
        return
    assert s["miou"] + s["fp"] + s["fn"] == pytest.approx(1 + (s["iou_bg"] - np.nanmean(s["iou"][1:])) / (there + 1), abs=1e-12)
    assert s["miou"] + s["fp_all"] + s["fn_all"] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose((s["iou"] + s["fp_per_class"] + s["fn_per_class"])[~np.isnan(s["iou"])], 1)
    np.testing.assert_allclose(s["f1_per_class"], 2 * s["iou"] / (1 + s["iou"]))


def test_scores_by_hand_and_absent_classes():
    C = np.array([[60, 10, 5, 0], [6, 14, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # class 2 only predicted, class 3 nowhere
    s, z = scores(C), scores(C, "zero")
    np.testing.assert_allclose(s["iou"], [60/81, 14/30, 0, np.nan])
    np.testing.assert_allclose(s["fp_per_class"], [6/81, 10/30, 1, np.nan])
    np.testing.assert_allclose(s["fn_per_class"], [15/81, 6/30, 0, np.nan])
    assert s["miou"] == pytest.approx((60/81 + 14/30) / 3) and z["miou"] == pytest.approx((60/81 + 14/30) / 4)
    assert s["fp"] == pytest.approx((10/30 + 1) / 2) and s["fn"] == pytest.approx((6/30) / 2)
    assert s["fp_all"] == pytest.approx((6/81 + 10/30 + 1) / 3) and s["iou_bg"] == s["iou"][0]
    assert s["pixel_accuracy"] == 74 / 95
    assert z["iou"][3] == z["fp_per_class"][3] == z["fn_per_class"][3] == 0


# ---- the sweep

def random_seed(r, K, on_edges, thresholds):
    keys = r.permutation(K)[:r.integers(1, min(K, 4) + 1)]
    shape = (len(keys), 6, 7)
    cam = r.random(shape, dtype=np.float32)
    if on_edges:  # values on a threshold, one float32 step below or above, equal between classes, 0 and 1
        t = np.asarray(thresholds, np.float32)
        pool = np.concatenate([t, np.nextafter(t, np.float32(0)), np.nextafter(t, np.float32(1)), [0, 1]]).astype(np.float32).clip(0, 1)
        cam = r.choice(pool, shape)
    return cam, keys, r.choice([*range(K + 1), 255], shape[1:])


@few
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans(), st.sampled_from([GRID, GRID[::7], [0., 1.], [.3], [.2, .2000001, .5], [1e-4, .5, .50001]]))
def test_sweep_equals_loops_to_the_pixel(seed, K, on_edges, thresholds):
    r = np.random.default_rng(seed)
    seeds = [random_seed(r, K, on_edges, thresholds) for _ in range(2)]
    assert (sweep(seeds, thresholds, K).confusions() == naive_sweep(seeds, thresholds, K)).all()


@few
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40, unique=True), st.lists(st.floats(0, 1, width=32), max_size=50))
def test_bins(edges, values):
    edges = np.sort(np.array(edges, np.float32))
    values = np.concatenate([edges, values]).astype(np.float32)
    assert (E._Bins(edges)(values) == np.searchsorted(edges, values)).all()


@few
@given(st.integers(0, 2**31))
def test_seed_mask_equals_argmax_with_background(seed):
    r = np.random.default_rng(seed)
    cam, keys = r.integers(0, 5, (3, 6, 6)).astype(np.float32) / 4, r.permutation(9)[:3]
    for t in (0, .25, .3, 1): assert (seed_mask(cam, keys, t) == naive_mask(cam, keys, t)).all()


def test_merge_in_any_order():
    r = np.random.default_rng(0)
    seeds = [random_seed(r, 5, False, GRID) for _ in range(6)]
    whole, a, b = sweep(seeds, num_classes=5), sweep(seeds[1::2], num_classes=5), sweep(seeds[::2], num_classes=5)
    assert (a.merge(b).hist == whole.hist).all()


def test_best_at_and_side_by_side():
    r = np.random.default_rng(1)
    here, there = (sweep([random_seed(r, 3, False, GRID) for _ in range(4)], num_classes=3) for _ in range(2))
    rows = here.table()
    assert [row["t"] for row in rows] == GRID.tolist() and here.best()["miou"] == max(row["miou"] for row in rows)
    oracle, fixed = side_by_side(here, there)
    assert fixed["t"] == there.best()["t"] and fixed["miou"] == here.at(fixed["t"])["miou"] <= oracle["miou"]
    assert [row["rule"] for row in side_by_side(here, .15)] == ["oracle", "fixed"] and side_by_side(here, .15)[1]["t"] == .15


def test_float16_and_torch_maps():
    torch = pytest.importorskip("torch")
    cam, keys, gt = random_seed(np.random.default_rng(2), 4, False, GRID)
    half = cam.astype(np.float16)
    want = sweep([(half.astype(np.float32), keys, gt)], num_classes=4).hist
    assert (sweep([(half, keys, gt)], num_classes=4).hist == want).all()
    assert (sweep([(torch.from_numpy(half).float(), torch.from_numpy(keys), torch.from_numpy(gt))], num_classes=4).hist == want).all()


# ---- speed: a ratio inside one run

def test_sixty_thresholds_cost_less_than_two():
    r = np.random.default_rng(0)
    cam, gt = r.random((3, 192, 192), dtype=np.float32), r.integers(0, 4, (192, 192)).astype(np.uint8)
    many, keys = Sweep(20), np.arange(3)

    def best(f):
        times = []
        for _ in range(15): start = time.perf_counter(); f(); times.append(time.perf_counter() - start)
        return min(times)
    assert best(lambda: many.update(cam, keys, gt)) < 2 * best(lambda: confusion(seed_mask(cam, keys, .3), gt, 20))


# ---- bad input: the value and the remedy are named

CAM, KEYS, GT = np.full((2, 4, 5), .5, np.float32), [1, 3], np.zeros((4, 5), np.uint8)
BAD = [
    (lambda: confusion(GT[1:], GT, 4), r"pred is \(3, 5\), gt \(4, 5\)"),
    (lambda: confusion(GT + 9, GT, 4), r"pred has labels \[9\] outside the classes"),
    (lambda: confusion(GT, GT + 254, 4), r"gt has labels \[254\]"),
    (lambda: confusion(GT, GT.astype(int) - 1, 4), "gt has labels from -1 to -1"),
    (lambda: confusion(GT, GT.astype(int) + 300, 4), "gt has labels from 300"),
    (lambda: confusion(GT, GT * 1., 4), "dtype float64"),
    (lambda: scores(np.zeros((5, 5))), "no pixel was counted"),
    (lambda: scores(np.zeros((5, 4))), r"\(5, 4\)"),
    (lambda: scores(np.eye(5), absent="nan"), "'skip' or 'zero'"),
    (lambda: Sweep(4, [.3, .3]), "increasing"),
    (lambda: Sweep(4, [.3, 1.5]), r"in \[0,1\]"),
    (lambda: Sweep(4, [float("nan")]), "increasing"),
    (lambda: Sweep(4, []), "increasing"),
    (lambda: Sweep(0), "num_classes=0"),
    (lambda: Sweep(255), "num_classes=255"),
    (lambda: Sweep(4).update(CAM, [], GT), "a class has no seed"),
    (lambda: Sweep(4).update(CAM, [1], GT), "for 1 keys"),
    (lambda: Sweep(4).update(CAM, [1, 1], GT), "different integers"),
    (lambda: Sweep(4).update(CAM, [1., 2.], GT), "different integers"),
    (lambda: Sweep(4).update(CAM, [1, 4], GT), "up to 3"),
    (lambda: Sweep(4).update(CAM, [-1, 2], GT), "outside the classes"),
    (lambda: Sweep(4).update(CAM, KEYS, GT.T), r"gt \(5, 4\)"),
    (lambda: Sweep(4).update(CAM, KEYS, GT + 7), r"labels \[7\]"),
    (lambda: Sweep(4).update(CAM * np.nan, KEYS, GT), "NaN"),
    (lambda: Sweep(4).update(CAM * 3, KEYS, GT), r"outside \[0,1\]"),
    (lambda: Sweep(4).update(-CAM, KEYS, GT), r"outside \[0,1\]"),
    (lambda: Sweep(4).update(CAM[:, :0], KEYS, GT[:0]), "expected"),
    (lambda: seed_mask(CAM[0], KEYS, .3), r"expected \(n, H, W\)"),
    (lambda: Sweep(4).merge(Sweep(5)), "cannot merge"),
    (lambda: Sweep(4).merge(Sweep(4, [.1])), "cannot merge"),
    (lambda: Sweep(4).at(.155), "nearest is 0.15"),
    (lambda: Sweep(4).best(), "no pixel was counted"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_refused_image_leaves_the_counts_alone():
    s = Sweep(4).update(CAM, KEYS, GT)
    before = s.hist.copy()
    with pytest.raises(ValueError): s.update(CAM, KEYS, GT + 7)
    assert (s.hist == before).all()


def test_ignore_is_configurable():
    gt = GT.copy(); gt[0] = 200
    assert Sweep(4, ignore=200).update(CAM, KEYS, gt).hist.sum() == 15
    assert confusion(GT, gt, 4, ignore=200).sum() == 15
