"PSA: the official numbers, pairs and gradients, the walk on any backbone, files that survive, and what is refused."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adcam.baselines.psa import (FROZEN, AffinityConfig, AffinityHead, AffinityNet, AffinityTask, affinity_features, affinity_scores, background,
                                 confident_labels, feature_matrix, load_affinity,
                                 load_scores, make_affinity_masks, make_affinity_scores, pair_affinity, power_at, psa_label, psa_loss, psa_shares, psa_walk,
                                 save_scores, train_affinity)
from adcam.cnn import resnet_mini
from adcam.conformer import conformer_mini
from adcam.irnet import ConformerStages, ResNetStages, TimmStages, pair_labels, path_index, walk_on
from adcam.scenes import Scenes
from adcam.seeds import Seed, extract_dataset, load_seed, save_seed

torch.set_num_threads(1)
KEYS = [4, 11]


@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture(scope="module")
def g11(golden): return dict(np.load(golden / "irn/g11_psa.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def g18(golden): return dict(np.load(golden / "related/g18_psa_full.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def log(golden): return json.loads((golden / "related/related_log.json").read_text())


@pytest.fixture(scope="module")
def head(rules):
    head = AffinityHead((512, 1024, 4096))
    for w, k in zip([*head.branches, head.mix], ("f8_3", "f8_4", "f8_5", "f9")):
        w.weight.data = torch.from_numpy(rules.fill(f"psa.{k}.weight", tuple(w.weight.shape)))
    return head


@pytest.fixture(scope="module")
def features(rules): return lambda seed, h, w, B: [torch.from_numpy(np.maximum(rules.nrm(seed + i, (B, c, h, w)), 0)) for i, c in enumerate((512, 1024, 4096))]


def by_rows(a, size):
    "Neighbors in rows, as the official code has them, from IRN's order"
    return np.asarray(a)[..., np.lexsort(path_index(5, size).dst.T[::-1]), :]


def scores_of(rules, alphas, size=104):
    cam = rules.cam_map(874, 2, size, size)**2
    return torch.from_numpy(np.stack([background(cam, a) for a in alphas]))


# ---- the official numbers (g11, g18) ----

def test_golden_psa_affinity_of_given_features(rules, g11):
    a = pair_affinity(torch.from_numpy(rules.nrm(150, (1, 32, 13, 16))))[0]
    np.testing.assert_allclose(by_rows(a, (13, 16)), g11["aff"], atol=1e-5)


def test_golden_psa_head(head, features, g18):
    "Concatenation, features and affinities of two images"
    with torch.no_grad():
        maps = features(870, 13, 16, 2)
        joined, f = head.joined(maps), head(maps)
    for got, want in ((joined, g18["cat448_b0_4x4"]), (f, g18["feat448_b0_2x2"])):
        part = got[0][:, :3:2][:, :, :3:2]
        np.testing.assert_allclose(part, want, atol=1e-5*np.abs(want).max())
    np.testing.assert_allclose(by_rows(pair_affinity(f), (13, 16)), g18["aff_13x16"], atol=1e-5)


def test_golden_psa_labels_without_crf(rules, g18):
    padded = scores_of(rules, (4, 32))
    padded[..., -16:] = 0
    label = confident_labels(padded)
    np.testing.assert_array_equal(label, g18["lab_raw_4_32"])
    np.testing.assert_array_equal(confident_labels(scores_of(rules, (4, 24))), g18["lab_raw_4_24_nopad"])
    for got, name in zip(pair_labels(label[None], 5, 254), ("bg", "fg", "neg")):
        np.testing.assert_array_equal(by_rows(got[0], (13, 13)), g18[f"lab_raw_{name}"])


@pytest.mark.parametrize("high", [24, 32])
def test_golden_psa_labels_with_crf(rules, g18, high):
    "The lattice may move two cells"
    image, cam = rules.rgb_image(873, 104, 104), rules.cam_map(874, 2, 104, 104)**2
    s = affinity_scores(cam, image, 4, high)
    assert (confident_labels(torch.from_numpy(s)).numpy() != g18[f"lab_crf_4_{high}"]).sum() <= 2
    if high == 24:
        assert (s[0].argmax(0) != g18["crf_la_argmax"]).mean() < .01 and (s[1].argmax(0) != g18["crf_ha_argmax"]).mean() < .01
        assert np.abs(s[0][:, ::4, ::4] - g18["crf_la_scores_ds4"]).mean() < .01


def test_golden_psa_loss_and_gradients(head, features, g18, log):
    want, maps = log["psa_loss"], [m.requires_grad_() for m in features(876, 13, 13, 1)]
    label = torch.from_numpy(g18["lab_raw_4_32"].astype(np.int64))[None]
    head.zero_grad()
    losses = psa_loss(head(maps), label)
    for name, key in (("bg", "bg_loss"), ("fg", "fg_loss"), ("neg", "neg_loss"), ("loss", "loss")):
        assert float(losses[name].detach()) == pytest.approx(want[key], rel=1e-5)
    losses["loss"].backward()
    for w, k in zip([*head.branches, head.mix], ("f8_3", "f8_4", "f8_5", "f9")):
        assert float(w.weight.grad.norm()) == pytest.approx(want[f"grad_norm_{k}.weight"], rel=1e-4)
    for m, k in zip(maps, ("conv4", "conv5", "conv6")): assert float(m.grad.norm()) == pytest.approx(want[f"grad_norm_{k}"], rel=1e-4)
    assert [int(p.sum()) for p in pair_labels(label, 5, 254)] == [round(want[f"{n}_count"]) for n in ("bg", "fg", "neg")]
    head.zero_grad()


@pytest.fixture(scope="module")
def inference(rules, features, head):
    "Features of g18's image and its seed"
    L = rules.label_map(885, 13, 16, 3, cell=6, ignore_frac=0.)
    mark = lambda m: (torch.arange(m.shape[1])[:, None, None] % 3 == torch.from_numpy(L)).float()
    with torch.no_grad(): f = head([m*.3 + 2*mark(m) for m in features(882, 13, 16, 1)])[0]
    up = np.repeat(np.repeat(L, 8, 0), 8, 1)[:101, :126]
    return f, np.stack([.5*(up == n + 1) + .05*rules.uni(880 + n, (101, 126)) for n in (0, 1)]).astype(np.float32)


def test_golden_psa_matrix(inference, g18):
    A = feature_matrix(inference[0], beta=1, pairs="official").toarray()
    np.testing.assert_allclose(A.sum(1), g18["dense_rowsum"], rtol=1e-5)
    np.testing.assert_allclose(A[[0, 100, 207]], g18["dense_rows_0_100_207"], atol=1e-5)
    np.testing.assert_array_equal((A > 0).sum(1), g18["dense_nnz_row"])
    assert ((A > 0).sum(1) == 1).sum() == 10, "ten cells without a neighbor"
    everyone = feature_matrix(inference[0], beta=1).toarray()
    assert ((everyone > 0).sum(1) > 1).all() and np.allclose(everyone[A > 0], A[A > 0])


@pytest.mark.parametrize("name, alpha, logt", [("psa", 16, 8), ("seam", 6, 6)])
def test_golden_psa_walk(inference, g18, name, alpha, logt):
    f, cams = inference
    walked, want = psa_walk(cams, f, alpha=alpha, exp_times=logt, pairs="official"), g18[f"rw_{name}"]
    np.testing.assert_allclose(walked, want, atol=1e-4*want.max())
    assert (psa_label(walked, KEYS, (101, 126)) != g18[f"pred_{name}"]).mean() <= .001


def test_golden_psa_walk_of_given_features(rules, g11):
    "g11: background is (1 - max of the others)^16"
    f, cam = torch.from_numpy(rules.nrm(150, (1, 32, 13, 16)))[0], rules.cam_map(151, 2, 104, 128)
    walked = psa_walk(cam, f, pairs="official")
    np.testing.assert_allclose(walked, g11["rw_cls0_4_12"], atol=1e-4*g11["rw_cls0_4_12"].max())
    np.testing.assert_array_equal(np.array([0, 4, 12])[walked.argmax(0)], g11["pred"])


# ---- pairs ----

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(0, 4), st.integers(0, 4), st.integers(1, 3))
def test_pair_affinity_is_the_formula(seed, radius, more_h, more_w, batch):
    size = radius + more_h, 2*radius - 1 + more_w
    f = torch.randn(batch, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    index, flat = path_index(radius, size), f.flatten(2)
    want = torch.exp(-(flat[..., index.src][:, :, None] - flat[..., index.to]).abs().mean(1))
    got, g = pair_affinity(f, radius), torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(got, want, atol=1e-12)
    a, b = (torch.autograd.grad((v*g).sum(), f, retain_graph=True)[0] for v in (got, want))
    assert torch.allclose(a, b, atol=1e-12)


def test_an_empty_set_counts_as_zero():
    f = torch.randn(1, 4, 8, 12, requires_grad=True)
    out = psa_loss(f, torch.full((1, 8, 12), 255))
    assert all(float(v.detach()) == 0 for v in out.values())
    only = psa_loss(f.detach(), torch.zeros(1, 8, 12, dtype=torch.long))
    assert float(only["fg"]) == float(only["neg"]) == 0 < float(only["bg"]) and float(only["loss"]) == pytest.approx(float(only["bg"])/4)


def test_two_processes_have_the_loss_of_the_whole_batch():
    f, label = torch.randn(4, 6, 8, 12), torch.randint(0, 3, (4, 8, 12))
    label[2:] = 255; label[3, :4] = 1
    whole, parts = psa_loss(f, label), [(f[:2], label[:2]), (f[2:], label[2:])]
    counts = sum(torch.stack([p.sum() for p in pair_labels(l, 5, 254)]).float() for _, l in parts)
    halves = [psa_loss(a, l, reduce=lambda n: counts, processes=2) for a, l in parts]
    for k in whole: assert float(sum(h[k] for h in halves)/2) == pytest.approx(float(whole[k]), rel=1e-5)


# ---- labels ----

def test_background_is_one_where_no_class_is():
    b = background(np.array([[[0., 1., .5]], [[0., 0., .25]]]), 2)
    np.testing.assert_allclose(b[:, 0], [[1, 0, .25], [0, 1, .5], [0, 0, .25]])


def test_sure_background_wins_over_a_sure_object():
    s = torch.zeros(2, 3, 8, 24)
    s[0, 1] = 1; s[1, 0, :, :8] = 1; s[1, 1, :, 8:16] = 1                              # low says class 1; high says background, class 1, nothing
    s[:, :, :, 16:] = 0
    assert confident_labels(s).tolist() == [[0, 1, 255]]


def test_scores_come_back_from_a_file(tmp_path):
    s = np.random.default_rng(0).random((2, 3, 9, 7), np.float32)
    np.testing.assert_allclose(load_scores(save_scores(tmp_path / "a.npz", s)), s, atol=1e-3)
    good = (tmp_path / "a.npz").read_bytes()
    for bad in (good[:-40], b"", good[:60]):
        (tmp_path / "a.npz").write_bytes(bad)
        with pytest.raises(ValueError, match="a.npz is not a readable file of scores"): load_scores(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError): load_scores(tmp_path / "b.npz")


# ---- network and training ----

def stages(seed=0):
    torch.manual_seed(seed)
    return ResNetStages(resnet_mini(10).eval().backbone_net)


def small(seed=0): return AffinityNet(stages(seed), (8, 8, 8))


@pytest.mark.parametrize("build, stride", [(stages, 4), (lambda: TimmStages("resnet10t"), 8), (lambda: TimmStages("mobilenetv3_small_050"), 8),
                                           (lambda: ConformerStages(conformer_mini(10).eval()), 4)],
                                           ids=["resnet_mini", "resnet10t", "mobilenetv3", "conformer_mini"])
def test_any_stages(build, stride):
    net = AffinityNet(build()).eval()
    assert net.stride == stride
    f = affinity_features(net, np.zeros((49, 70, 3), np.uint8))
    assert f.shape == (448, -(-49//stride), -(-70//stride)) and torch.isfinite(f).all()


def test_first_layers_and_batchnorm_stand_still():
    net, bn = small().train(), [m for m in small().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bn and not any(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    task = AffinityTask(net)
    opt = task.optimizer(AffinityConfig(lr=1.), 10)
    assert [g["lr"]/1. for g in opt.param_groups] == [1, 10] and {g["weight_decay"] for g in opt.param_groups} == {5e-4}
    task(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 16, 16)))["loss"].backward(); opt.step()
    moved = {n for n, t in net.state_dict().items() if not t.equal(before[n])}
    assert any("layer2" in n for n in moved) and any("mix" in n for n in moved)
    assert not [n for n in moved if n.split(".")[2] in FROZEN or "bn" in n or "running" in n]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Seeds and scores of four scenes"
    folder, ds = tmp_path_factory.mktemp("psa"), Scenes("train", 4, 64)
    torch.manual_seed(0)
    extract_dataset(resnet_mini(10).eval(), ds, folder / "seeds", "cam", progress=False)
    done = make_affinity_scores(ds, folder / "seeds", folder / "scores", processes=1, progress=False)
    assert (done["computed"], done["cached"]) == (4, 0)
    return folder, ds


TINY = AffinityConfig(epochs=2, batch=2, crop=48, lr=.01)


def test_training_resumes_to_the_bit(made, tmp_path):
    folder, ds = made
    net, whole = small(), None
    whole = train_affinity(net, ds, folder / "scores", TINY, tmp_path / "a", progress=False)
    class Cut(Exception): pass
    left = [5]
    def scores(s):
        left[0] -= 1
        if left[0] < 0: raise Cut
        return load_scores(folder / f"scores/{s.id}.npz")
    with pytest.raises(Cut): train_affinity(small(), ds, scores, TINY, tmp_path / "b", progress=False)
    scores.__name__, left[0] = "scores", 10**6
    again = small()
    assert train_affinity(again, ds, scores, TINY, tmp_path / "b", progress=False) == whole
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    loaded = load_affinity(small(1), tmp_path / "a/affinity.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    with pytest.raises(ValueError, match="was trained with other settings .*lr: 0.01 there, 0.02 now"):
        train_affinity(small(), ds, folder / "scores", AffinityConfig(epochs=2, batch=2, crop=48, lr=.02), tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="does not fit this AffinityNet"): load_affinity(AffinityNet(stages()), tmp_path / "a/affinity.safetensors")


def test_a_run_in_half_precision_trains_its_affinities_so(made, tmp_path, monkeypatch):
    "`adcam run --refine psa --precision bf16`: the network in bfloat16, pairs and loss in float32"
    import shutil
    import adcam.run
    from adcam.pipeline import profiles
    folder, ds = made
    monkeypatch.setattr(adcam.run, "PSA_MINI", TINY)
    losses = {}
    for precision in ("fp32", "bf16"):
        shutil.copytree(folder / "scores", tmp_path / precision / "psa_scores")
        net, _ = adcam.run.affinity_stage(profiles["mini"], ds, tmp_path / precision, progress=False, precision=precision)
        assert json.loads((tmp_path / precision / "psa/settings.json").read_text())["precision"] == precision
        losses[precision] = [json.loads(line)["loss"] for line in (tmp_path / precision / "psa/log.jsonl").read_text().splitlines()]
    assert losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp32"], rel=.05) and next(net.parameters()).dtype == torch.float32


def test_what_training_refuses(made, tmp_path):
    folder, ds = made
    with pytest.raises(ValueError, match="multiple of the stride, 4"): train_affinity(small(), ds, folder / "scores", AffinityConfig(crop=46))
    with pytest.raises(ValueError, match="larger crop or a smaller radius"): train_affinity(small(), ds, folder / "scores", AffinityConfig(crop=24))
    with pytest.raises(FileNotFoundError, match="no weights"): load_affinity(small(), tmp_path / "none.safetensors")
    bad = small()
    with torch.no_grad(): bad.head.mix.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="lower lr"): train_affinity(bad, ds, folder / "scores", TINY, progress=False)


# ---- masks ----

def test_masks_are_files_that_survive(made, tmp_path):
    folder, ds = made
    net, out = small().eval(), tmp_path / "masks"
    go = lambda **o: make_affinity_masks(ds, folder / "seeds", net, out, processes=1, progress=False, **o)
    assert go()["computed"] == 4
    first = {p.name: p.read_bytes() for p in out.glob("*.png")}
    (out / f"{ds.ids[0]}.png").unlink(); (out / f"{ds.ids[1]}.png").write_bytes(b"torn")
    assert go()["computed"] == 2 and {p.name: p.read_bytes() for p in out.glob("*.png")} == first
    with pytest.raises(ValueError, match="alpha: 16 there, 8 now"): go(alpha=8)
    assert go(alpha=8, force=True)["computed"] == 4
    mask = np.array(Image.open(out / f"{ds.ids[0]}.png"))
    assert mask.shape == (64, 64) and set(np.unique(mask)) <= {0, *(load_seed(folder / f"seeds/{ds.ids[0]}.npz").keys + 1)}


def test_two_processes_make_the_same_masks(made, tmp_path):
    folder, ds = made
    net = small().eval()
    for n in (1, 2): make_affinity_masks(ds, folder / "seeds", net, tmp_path / str(n), processes=n, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "1").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "2").iterdir()}


def test_a_seed_of_another_image_is_left_out_and_named(made, tmp_path):
    folder, ds = made
    other = next(i for i in range(len(ds)) if (ds[0].label*(1 - ds[i].label)).any())
    for i, name in enumerate(ds.ids): (tmp_path / f"{name}.npz").write_bytes((folder / f"seeds/{ds.ids[0 if i == other else i]}.npz").read_bytes())
    done = make_affinity_scores(ds, tmp_path, tmp_path / "out", processes=1, progress=False)
    assert done["computed"] == 3 and [n for n, _ in done["skipped"]] == [ds.ids[other]] and "belongs to another image" in done["skipped"][0][1]
    (tmp_path / f"{ds.ids[2]}.npz").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 4 seeds"):
        make_affinity_masks(ds, tmp_path, small(), tmp_path / "out2", processes=1, progress=False)


def test_an_empty_seed_gives_background_and_a_warning(made, tmp_path):
    _, ds = made
    for s in ds:
        n = int(s.label.sum())
        save_seed(tmp_path / f"seeds/{s.id}.npz", Seed(np.flatnonzero(s.label), np.zeros((n, 16, 16), np.float32), np.zeros((n, 64, 64), np.float32)))
    with pytest.warns(UserWarning, match="zero everywhere: its mask is all background"):
        assert make_affinity_masks(ds, tmp_path / "seeds", small(), tmp_path / "masks", processes=1, progress=False)["empty"] == 4
    assert not np.array(Image.open(tmp_path / f"masks/{ds.ids[0]}.png")).any()


def test_nan_in_features_or_seeds(inference):
    f, cams = inference
    with pytest.raises(ValueError, match="NaN or infinity: look at the network's weights"): psa_walk(cams, f*float("nan"))
    with pytest.raises(ValueError, match="the seed holds NaN"): affinity_scores(cams*np.nan, np.zeros((101, 126, 3), np.uint8))
    with pytest.raises(ValueError, match="do not fit an image of 101x126 pixels at stride 4"): psa_walk(cams, f, 4)
    with pytest.raises(ValueError, match="choose 'all' or 'official'"): feature_matrix(f, pairs="some")
    with pytest.raises(ValueError, match="0 < low <= high"): affinity_scores(cams, np.zeros((101, 126, 3), np.uint8), 8, 4)
    with pytest.raises(ValueError, match="training mode"): affinity_features(small().train(), np.zeros((32, 32, 3), np.uint8))


def test_shares_at_one_half_are_the_largest_map(inference):
    f, cams = inference
    walked = psa_walk(cams, f)
    up = torch.nn.functional.interpolate(torch.from_numpy(walked)[None], scale_factor=8, mode="bilinear")[0, :, :101, :126].argmax(0).numpy()
    np.testing.assert_array_equal(psa_label(walked, KEYS, (101, 126)), np.array([0, 5, 12])[up])
    assert 0 <= psa_shares(walked, (101, 126)).min() and psa_shares(walked, (101, 126)).max() <= 1


def test_the_walk_on_any_matrix():
    A = feature_matrix(torch.randn(3, 6, 7), 3)
    x, P = np.random.default_rng(0).random((2, 42)), A.toarray()/A.sum(1)[:, None]
    for m in ("chebyshev", "products"): np.testing.assert_allclose(walk_on(A, x, 32, method=m), x @ np.linalg.matrix_power(P, 32).T, atol=1e-5)
    with pytest.raises(ValueError, match="choose 'chebyshev' or 'products'"): walk_on(A, x, 2, method="dense")
    with pytest.raises(ValueError, match="at least 1"): walk_on(A, x, 0)




@given(st.floats(.01, .99))
def test_at_its_power_the_background_is_as_high_as_the_map(t):
    scores = background(np.full((1, 1, 1), t), power_at(t))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)
