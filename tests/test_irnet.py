"adcam.irnet against the goldens of official IRN, and what it does with bad input."
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from adcam import irnet, walk
from adcam.classifier import PolySGD
from adcam.data import to_tensor


@pytest.fixture(scope="module")
def irn(golden):
    "`irn('g01_pathindex')` -> arrays, `irn('irn_log')` -> dict"
    def load(name):
        if name.endswith("log") or name.startswith("manifest"):
            return json.loads((golden / f"irn/{name}.json").read_text())
        with np.load(golden / f"irn/{name}.npz", allow_pickle=False) as z:
            return {k: z[k] for k in z}
    return load


@pytest.fixture(scope="module")
def rules(golden_rules):
    return golden_rules("irn/rules")


# ---------------------------------------------------------------- geometry, affinity

@pytest.mark.parametrize("radius,size", [(5, (12, 17)), (10, (24, 31))])
def test_path_index_matches_official(irn, radius, size):
    g, index = irn("g01_pathindex"), irnet.path_index(radius, size)
    name = f"r{radius}_{size[0]}x{size[1]}"
    np.testing.assert_array_equal(index.dst, g[f"search_dst_r{radius}"])
    np.testing.assert_array_equal(index.src, g[f"src_{name}"])
    np.testing.assert_array_equal(index.to, g[f"dst_{name}"])
    for n in {len(p) for p in index.paths}:
        paths = np.stack([p for p in index.paths if len(p) == n])
        np.testing.assert_array_equal(paths, g[f"paths_r{radius}_len{n}"])
        if f"pathidx_{name}_len{n}" in g:
            np.testing.assert_array_equal((paths @ (size[1], 1))[..., None] + index.src, g[f"pathidx_{name}_len{n}"])


def test_path_index_hashes_of_large_maps(irn):
    from hashlib import sha256
    for name, want in irn("irn_log")["pathindex"].items():
        r, size = name[1:].split("_")
        index = irnet.path_index(int(r), tuple(map(int, size.split("x"))))
        assert sha256(index.src.astype(np.int64).tobytes()).hexdigest() == want["sha256_src_int64"]
        assert sha256(np.ascontiguousarray(index.to, np.int64).tobytes()).hexdigest() == want["sha256_dst_int64"]
        assert sum(len(p) for p in index.paths) * len(index.src) == want["path_indices_elems"]


def test_affinity_matches_official(irn, rules):
    g = irn("g02_affinity")
    a = irnet.affinity(torch.from_numpy(rules.edge_map(2, 14, 19)), 5)
    np.testing.assert_allclose(a.numpy(), g["aff"], atol=1e-6)
    A = np.eye(14 * 19)
    index = irnet.path_index(5, (14, 19))
    A[np.broadcast_to(index.src, index.to.shape), index.to] = A[index.to, np.broadcast_to(index.src, index.to.shape)] = a.numpy()
    np.testing.assert_allclose(A, g["dense"], atol=1e-6)
    T = A**10 / (A**10).sum(0)
    np.testing.assert_allclose(T, g["T_beta10_times0"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.matrix_power(T, 256), g["T_beta10_times8"], atol=1e-4 * g["T_beta10_times8"].max())


def test_matrix_is_the_same_on_inner_pairs(irn, rules):
    "The matrix of all pairs agrees with the official one wherever that has a pair."
    g, A = irn("g02_affinity"), irnet.affinity_matrix(rules.edge_map(2, 14, 19), 5, 1).toarray()
    there = g["dense"] > 0
    np.testing.assert_allclose(A[there], g["dense"][there], atol=1e-6)


# ---------------------------------------------------------------- walk

@pytest.mark.parametrize("method", ["chebyshev", "products"])
@pytest.mark.parametrize("radius,beta,exp", [(5, 10, 8), (5, 8, 4), (5, 10, 0), (3, 10, 8)])
def test_walk_matches_official(irn, rules, method, radius, beta, exp):
    want = irn("g03_propagate")[f"rw_r{radius}_b{beta}_e{exp}"]
    got = irnet.random_walk(rules.cam_map(30, 3, 24, 31)[:, None], rules.edge_map(31, 24, 31), radius, beta, exp, method=method)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-4 * want.max())


def test_walk_of_a_photograph(irn, rules):
    want = irn("g03b_propagate_94x125")["rw"]
    cam, edge = rules.cam_map(600, 2, 94, 125), rules.edge_map(601, 94, 125)
    got = irnet.random_walk(cam, edge)
    np.testing.assert_allclose(got, want, atol=1e-4 * want.max())
    np.testing.assert_allclose(got, irnet.random_walk(cam, edge, method="products"), atol=1e-6 * want.max())


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 8))
def test_chebyshev_equals_products_on_any_map(data, h, w, radius, exp):
    unit = st.floats(0, 1, width=32)
    edge, cam = data.draw(arrays(np.float32, (h, w), elements=unit)), data.draw(arrays(np.float32, (2, h, w), elements=unit))
    a, b = (irnet.random_walk(cam, edge, radius, 10, exp, method=m) for m in ("products", "chebyshev"))
    np.testing.assert_allclose(a, b, atol=2e-6)
    start = cam * (1 - edge)
    assert (a.min((1, 2)) >= start.min((1, 2)) - 1e-6).all() and (a.max((1, 2)) <= start.max((1, 2)) + 1e-6).all()


def test_matrix_by_brute_force():
    "Narrow maps, where several neighbors fall on one diagonal."
    rng = np.random.default_rng(0)
    for h, w, r in ((1, 1, 5), (1, 7, 5), (7, 1, 5), (4, 2, 5), (3, 5, 4), (6, 3, 10)):
        edge, want = rng.random((h, w)), np.eye(h * w)
        for y in range(h):
            for x in range(w):
                for dy, dx in walk._half_disk(r):
                    if y + dy < h and 0 <= x + dx < w:
                        i, j = y * w + x, (y + dy) * w + x + dx
                        want[i, j] = want[j, i] = 1 - max(edge[y + a, x + b] for a, b in walk._path(dy, dx))
        np.testing.assert_allclose(irnet.affinity_matrix(edge, r, 1).toarray(), want, atol=1e-15)


@pytest.mark.parametrize("change,text", [
    (dict(edge=np.zeros((5, 7))), "edge map is 5x7, the cam 6x7"), (dict(edge=np.full((6, 7), np.nan)), "NaN"),
    (dict(edge=np.full((6, 7), 1.5)), "outside"), (dict(cam=np.full((1, 6, 7), np.nan)), "NaN"), (dict(exp_times=20), "exp_times"),
    (dict(beta=0), "beta"), (dict(radius=0), "radius"), (dict(method="dense"), "method"), (dict(cam=np.zeros(3)), "no map")])
def test_walk_names_bad_input(change, text):
    with pytest.raises(ValueError, match=text):
        irnet.random_walk(**dict(dict(cam=np.zeros((1, 6, 7)), edge=np.zeros((6, 7))), **change))


# ---------------------------------------------------------------- network, losses, optimizer

@pytest.fixture(scope="module")
def filled(rules, irn):
    "IRNet with the golden weights"
    net, shapes = irnet.IRNet(), dict(irn("manifest_irnet")["keys"])
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == shapes
    net.load_state_dict({k: torch.from_numpy(np.asarray(rules.fill(k, s))) for k, s in shapes.items()})
    return net


def test_irnet_matches_official(irn, rules, filled):
    g, net = irn("g04_irnet"), filled.eval()
    with torch.no_grad():
        for seed, (h, w) in ((40, (64, 96)), (41, (65, 97))):
            edge, dp = net(torch.from_numpy(rules.nrm(seed, (2, 3, h, w))))
            np.testing.assert_allclose(edge, g[f"edge_{h}x{w}"], atol=1e-4)
            np.testing.assert_allclose(dp, g[f"dp_{h}x{w}"], atol=1e-4)


def test_losses_match_official(irn, rules, filled):
    want, net = irn("irn_log")["irn_loss"], filled.train()
    label = torch.stack([torch.from_numpy(rules.label_map(s, 24, 24, 3)) for s in (44, 45)])
    losses = irnet.irn_loss(*net(torch.from_numpy(rules.nrm(43, (2, 3, 96, 96)))), label)
    for name in ("bg_pos", "fg_pos", "pos", "neg", "dp_fg", "dp_bg"):
        assert losses[name].item() == pytest.approx(want[name], rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(want["total"], rel=1e-4)
    losses["loss"].backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert len(grads) == want["n_params_with_grad"]
    for name, norm in want["grad_norms"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4), name


def test_pair_labels_match_official(irn, rules):
    g = irn("g05_afflabels")
    got = irnet.pair_labels(torch.from_numpy(rules.label_map(5, 24, 31, 4))[None], 10)
    for name, mine in zip(("bg_pos", "fg_pos", "neg"), got):
        np.testing.assert_array_equal(mine[0].numpy(), g[name].astype(bool))


def test_edge_inference_matches_official(irn, rules, filled):
    g, net, x = irn("g04_irnet"), filled.eval(), torch.from_numpy(rules.nrm(42, (3, 101, 119)))
    edge, dp = irnet.edge_displacement(net, x, pad_to=128)
    np.testing.assert_allclose(edge, g["EdgeDisplacement_edge_101x119"][0], atol=1e-4)
    np.testing.assert_allclose(dp, g["EdgeDisplacement_dp_101x119"], atol=1e-4)
    free = irnet.edge_map(net, x)
    assert free.shape == (26, 30) and np.abs(free - edge).max() < 0.2  # no padding: the same picture, other statistics
    with pytest.raises(ValueError, match="larger than pad_to"):
        irnet.edge_map(net, x, pad_to=100)


def test_poly_sgd_matches_official(irn):
    poly = irn("irn_log")["poly"]
    p, q = torch.nn.Parameter(torch.tensor([1., -2.])), torch.nn.Parameter(torch.tensor([.5]))
    opt = PolySGD([dict(params=[p], lr=.1), dict(params=[q], lr=1.)], total=10)
    assert opt.param_groups[0]["momentum"] == poly["group0"]["momentum"] == 1e-4
    for want in poly["trace_lr0_lr1_p0_p1_q"]:
        opt.zero_grad()
        (0.5 * (p**2).sum() + ((q - .1)**2).sum()).backward()
        opt.step()
        np.testing.assert_allclose([*(g["lr"] for g in opt.param_groups), *p.tolist(), *q.tolist()], want, rtol=1e-5)


# ---------------------------------------------------------------- labels and masks

def test_ir_label_matches_official(irn, rules):
    g = irn("g14_crf")
    got = irnet.ir_label(rules.cam_map(701, 2, 40, 52), g["keys"][1:] - 1, rules.rgb_image(700, 40, 52))
    assert set(np.unique(got)) <= {0, 5, 9, 255}
    assert (got == g["ir_label"]).mean() > 0.999


@pytest.mark.parametrize("background", [0.25, 0.05, 0.6])
def test_labels_of_the_walk_match_official(irn, background):
    g = irn("g03_propagate")
    walked, size, keys = g["rw_r5_b10_e8"][:, 0], tuple(g["size"]), g["keys"]
    np.testing.assert_allclose(irnet.upsample_walk(walked, size)[:, ::8, ::8], g["up_norm_ds8"], atol=1e-5)
    np.testing.assert_array_equal(irnet.walk_label(walked, keys, size, background), g[f"label_bg{background}"])


class Photos:
    "Six photographs of one or two squares, in memory; can be pickled"
    classes = ("red", "green", "blue")
    ids = [f"p{i}" for i in range(6)]

    def __len__(self): return len(self.ids)
    def fingerprint(self): return "photos"

    def __getitem__(self, i):
        if not 0 <= i < 6: raise IndexError(i)
        rng = np.random.default_rng(i)
        h, w = 40 + 3*i, 61 - 2*i
        image, mask, label = rng.integers(0, 60, (h, w, 3), dtype=np.uint8), np.zeros((h, w), np.uint8), np.zeros(3, np.float32)
        for k in {i % 3, (i*i + 1) % 3}:
            y, x = (6, 4 + 20*k) if h % 2 else (14, 2 + 18*k)
            image[y:y + 18, x:x + 14, k] += 150
            mask[y:y + 18, x:x + 14] = k + 1
            label[k] = 1
        return irnet_sample(self.ids[i], image, label, mask)


def irnet_sample(*a):
    from adcam.scenes import Sample
    return Sample(*a)


def seed_of(sample):
    "A blurred, shrunken mask: what a seed would be"
    from adcam.seeds import Seed
    keys = np.flatnonzero(sample.label)
    H, W = sample.mask.shape
    yy, xx = np.mgrid[:H, :W]
    maps = []
    for k in keys:
        y, x = np.argwhere(sample.mask == k + 1).mean(0) - 2
        maps.append(np.exp(-((yy - y)**2 + (xx - x)**2)/60))
    high = np.stack(maps).astype(np.float32)
    return Seed(keys.astype(np.int64), np.ascontiguousarray(high[:, ::4, ::4]), high)


def perfect(sample): return .95*irnet.mask_edges(sample.mask)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    from adcam.seeds import save_seed
    folder = tmp_path_factory.mktemp("seeds")
    for s in Photos(): save_seed(folder/f"{s.id}.npz", seed_of(s))
    return folder


def read(path):
    from PIL import Image
    with Image.open(path) as im:
        assert im.mode == "P" and im.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
        return np.array(im)


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_folders_by_two_processes_equal_one(seeds, tmp_path):
    ds = Photos()
    for name, make in (("labels", lambda out, n: irnet.make_ir_labels(ds, seeds, out, processes=n, progress=False)),
                       ("masks", lambda out, n: irnet.make_pseudo_masks(ds, seeds, perfect, out, processes=n, progress=False, crf=True))):
        for n in (1, 2): assert make(tmp_path/f"{name}{n}", n) == dict(computed=6, cached=0, empty=0, skipped=[])
        one, two = files(tmp_path/f"{name}1"), files(tmp_path/f"{name}2")
        assert one == two and len(one) == 7


def test_folder_continues_and_redoes_damaged_files(seeds, tmp_path, capsys):
    ds, out = Photos(), tmp_path/"masks"
    make = lambda **kw: irnet.make_pseudo_masks(ds, seeds, perfect, out, processes=1, progress=False, **kw)  # noqa: E731
    make()
    good = files(out)
    (out/"p1.png").unlink()
    (out/"p2.png").write_bytes(good["p2.png"][:60])
    assert make() == dict(computed=2, cached=4, empty=0, skipped=[]) and files(out) == good
    assert "p2.png" in capsys.readouterr().out
    with pytest.raises(ValueError, match="background: 0.25 there, 0.4 now"):
        make(background=.4)
    assert files(out) == good
    assert make(background=.4, force=True)["computed"] == 6 and files(out) != good


def test_an_image_that_fails_in_a_worker_is_named_and_the_others_are_made(seeds, tmp_path):
    def torn(sample): return perfect(sample)[:-1] if sample.id == "p3" else perfect(sample)
    for n in (1, 2):
        done = irnet.make_pseudo_masks(Photos(), seeds, torn, tmp_path/f"m{n}", processes=n, progress=False)
        assert done["computed"] == 5 and [i for i, _ in done["skipped"]] == ["p3"] and "edge map is" in done["skipped"][0][1]
        left = files(tmp_path/f"m{n}")
        assert len([f for f in left if f.endswith(".png")]) == 5 and "p3.png" not in left and not [f for f in left if f.endswith(".tmp")]
        for f in left:
            if f.endswith(".png"): read(tmp_path/f"m{n}"/f)


def copy_seeds(seeds, folder):
    folder.mkdir()
    for p in seeds.iterdir(): (folder/p.name).write_bytes(p.read_bytes())
    return folder


@pytest.mark.parametrize("fault,error,text", [
    ("missing", FileNotFoundError, "lacks 1 of 6 seeds, first p4.npz"), ("other image", ValueError, "p4.npz.*belongs to another image"),
    ("other class", ValueError, "p4.npz.*which image p4 does not have"), ("unknown class", ValueError, "p4.npz.*there are 3 classes"),
    ("nan", ValueError, "p4.npz.*NaN"), ("torn", ValueError, "p4.npz"), ("zero", None, "p4.npz is zero everywhere")])
def test_folder_names_the_bad_seed(seeds, tmp_path, fault, error, text):
    from adcam.seeds import save_seed
    ds, bad = Photos(), copy_seeds(seeds, tmp_path/"seeds")
    path, seed = bad/"p4.npz", seed_of(ds[4])
    if fault == "missing": path.unlink()
    elif fault == "other image": path.write_bytes((bad/"p3.npz").read_bytes())
    elif fault == "torn": path.write_bytes(path.read_bytes()[:200])
    elif fault == "nan": np.savez(path, keys=seed.keys, cam=seed.cam*np.nan, high_res=seed.high_res*np.nan)
    else: save_seed(path, {"other class": seed._replace(keys=np.flatnonzero(1 - ds[4].label)[:1], cam=seed.cam[:1], high_res=seed.high_res[:1]),
                           "unknown class": seed._replace(keys=seed.keys + 7),
                           "zero": seed._replace(cam=0*seed.cam, high_res=0*seed.high_res)}[fault])
    for make in (irnet.make_ir_labels, lambda *a, **kw: irnet.make_pseudo_masks(a[0], a[1], perfect, *a[2:], **kw)):
        out = tmp_path/f"out{make.__name__}"
        if error is FileNotFoundError:
            with pytest.raises(error, match=text): make(ds, bad, out, processes=1, progress=False)
        elif error:
            ((name, why),) = make(ds, bad, out, processes=1, progress=False)["skipped"]
            assert name == "p4" and re.search(text, why) and len(list(out.glob("*.png"))) == 5 and not (out/"p4.png").exists()
        else:
            with pytest.warns(UserWarning, match=text): assert make(ds, bad, out, processes=1, progress=False)["empty"] == 1
            assert not read(out/"p4.png").any()


def test_sizes_from_one_pixel_to_too_many():
    one = np.ones((1, 1, 1), np.float32)
    assert irnet.pseudo_mask(one, [2], np.zeros((1, 1)), (1, 1)).tolist() == [[3]]
    assert irnet.ir_label(one, [2], np.zeros((1, 1, 3), np.uint8)).tolist() == [[3]]
    assert irnet.mask_edges(np.zeros((1, 1), np.uint8)).shape == (1, 1)
    for size in ((4001, 8), (8, 5000)):
        with pytest.raises(ValueError, match="up to 4000 per side"):
            irnet.pseudo_mask(np.zeros((1, *((n + 3)//4 for n in size))), [0], None, size)


def test_official_form_and_back(seeds, tmp_path):
    "Written as official IRN reads it; read back there (another process), converted there, imported here"
    import subprocess, sys
    from adcam.seeds import load_seed
    for p in seeds.iterdir(): irnet.write_official(tmp_path/f"official/{p.stem}.npy", load_seed(p))
    look = """
import sys, numpy as np, torch
d = np.load(sys.argv[1], allow_pickle=True).item()
assert set(d) == {"keys", "cam", "high_res"}
assert isinstance(d["keys"], torch.Tensor) and d["keys"].dtype == torch.int64 and d["keys"].ndim == 1
assert isinstance(d["cam"], torch.Tensor) and d["cam"].dtype == torch.float32 and tuple(d["cam"].shape) == (len(d["keys"]), 10, 16)
assert isinstance(d["high_res"], np.ndarray) and d["high_res"].dtype == np.float32 and d["high_res"].shape == (len(d["keys"]), 40, 61)
assert np.pad(d["keys"] + 1, (1, 0), mode="constant").tolist() == [0, *(d["keys"] + 1).tolist()]
"""
    with pytest.raises(ValueError, match="never read here"):
        irnet.import_official(Photos(), tmp_path/"official", tmp_path/"ours")
    subprocess.run([sys.executable, "-c", irnet.CONVERT_OFFICIAL + look.replace("sys.argv[1]", "sys.argv[1] + '/p0.npy'"), tmp_path/"official"], check=True)
    assert irnet.import_official(Photos(), tmp_path/"official", tmp_path/"ours") == Photos.ids
    for p in seeds.iterdir():
        for a, b in zip(load_seed(p), load_seed(tmp_path/f"ours/{p.name}")):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_settings_of_the_methods():
    assert {k: tuple(v.values()) for k, v in irnet.SETTINGS.items()} == dict(
        irn=(.3, .05, 1, .25), recam=(.35, .1, 1, .28), recam_coco=(.35, .1, 1, .25), advcam=(.35, .15, 1.5, .25), rib=(.35, .17, 1.3, .27),
        rib_coco=(.35, .17, 1.3, .22))


# ---------------------------------------------------------------- training

class Stages(torch.nn.Module):
    "Five maps for nothing: pooled colors"
    channels, strides = (3, 3, 6, 6, 6), (4, 4, 8, 16, 16)

    def forward(self, x):
        pool = lambda s: torch.nn.functional.avg_pool2d(x, s, ceil_mode=True)  # noqa: E731
        return [pool(4), pool(4).abs(), *(torch.cat([pool(s), pool(s).abs()], 1) for s in (8, 16, 16))]


QUICK = irnet.IRNetConfig(epochs=2, batch=2, crop=48, scale=(.8, 1.2), radius=4)


def small(displacement=True):
    torch.manual_seed(1)
    return irnet.IRNet(Stages(), displacement, 8, (8, 8, 8, 8, 8))


def true_mask(sample): return sample.mask


def test_training_lowers_the_loss_and_leaves_the_backbone_alone():
    from dataclasses import replace
    net = small()
    history = irnet.train_irnet(net, Photos(), true_mask, replace(QUICK, epochs=12), progress=False)
    mean = lambda rows: np.mean([r["loss"] for r in rows])  # noqa: E731
    assert len(history) == 36 and mean(history[-6:]) < mean(history[:6])
    assert not net.training and net.mean_shift.running_mean.abs().sum() > 0
    assert all(not p.requires_grad for p in net.stages.parameters())
    x = torch.zeros(1, 3, 20, 22)
    assert small(False)(x)[1] is None and small(False)(x)[0].shape == (1, 1, 5, 6)


@pytest.mark.parametrize("workers", [0, 1])
def test_mean_shift_is_the_mean_of_batch_means(workers):
    net, ds = small(), Photos()
    before = torch.get_rng_state()
    irnet.set_mean_shift(net, ds, crop=40, batch=4, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    means = []
    for part in ([0, 1, 2, 3], [4, 5]):
        x = torch.zeros(len(part), 3, 40, 40)
        for j, i in enumerate(part):
            p = to_tensor(ds[i].image[:40, :40].copy())
            x[j, :, :p.shape[1], :p.shape[2]] = p
        with torch.no_grad(): means.append(net(x)[1].mean((0, 2, 3)) + net.mean_shift.running_mean)
    torch.testing.assert_close(net.mean_shift.running_mean, torch.stack(means).mean(0))


@pytest.mark.parametrize("precision, tensor_cores", [("fp32", False), ("tf32", True), ("bf16", True)])
def test_the_mean_shift_is_computed_in_the_trainings_arithmetic_but_not_in_half_precision(monkeypatch, precision, tensor_cores):
    from dataclasses import replace
    seen = []
    def shift(model, *args):
        seen.append((torch.backends.cudnn.allow_tf32, model(torch.zeros(1, 3, 20, 20))[1].dtype))
    monkeypatch.setattr("adcam.boundaries.set_mean_shift", shift)
    irnet.train_irnet(small(), Photos(), true_mask, replace(QUICK, epochs=1, mixed_precision=precision), progress=False)
    assert seen == [(tensor_cores, torch.float32)]


def test_views_keep_image_and_label_together():
    "Red, green and blue squares stay under their labels, whatever scale, flip and window"
    views = irnet.IRViews(Photos(), true_mask, 48, (.7, 1.4), 3)
    again = irnet.IRViews(Photos(), true_mask, 48, (.7, 1.4), 3)
    seen = 0
    for epoch in range(3):
        views.set_epoch(epoch); again.set_epoch(epoch)
        for i in range(6):
            (x, y), (x2, y2) = views[i], again[i]
            assert torch.equal(x, x2) and torch.equal(y, y2) and x.shape == (3, 48, 48) and y.shape == (12, 12)
            inside = x[:, 2::4, 2::4]
            for k in range(3):
                if (y == k + 1).sum() > 4:
                    seen += 1
                    assert (inside[:, y == k + 1].mean(1).argmax() == k)
            assert (x[:, (torch.nn.functional.interpolate(y[None, None].float(), scale_factor=4)[0, 0] == 255)] == 0).float().mean() > .5 if (y
                == 255).any() else True
    assert seen > 10


def test_checkpoints(tmp_path):
    net = small()
    irnet.train_irnet(net, Photos(), true_mask, QUICK, out=tmp_path, progress=False)
    again = irnet.load_irnet(small(), tmp_path/"irnet.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="does not fit"): irnet.load_irnet(small(False), tmp_path/"irnet.safetensors")
    with pytest.raises(FileNotFoundError, match="train_irnet"): irnet.load_irnet(small(), tmp_path/"none.safetensors")
    (tmp_path/"last.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="delete it to start again"): irnet.train_irnet(small(), Photos(), true_mask, QUICK, out=tmp_path, progress=False)


def test_official_checkpoint_with_its_three_names(tmp_path, filled):
    net = filled
    state = {k: v + .5 if k.startswith("fc_edge6") else v for k, v in net.state_dict().items()}
    copies = {f"stage1.{k}": v for k, v in state.items() if k.startswith("resnet50.conv1")} | {k.replace("resnet50.", "backbone."): v for k,
        v in state.items() if k.startswith("resnet50.bn1")}
    torch.save({f"module.{k}": v for k, v in (state | copies).items()}, tmp_path/"irn.pth")
    assert torch.equal(irnet.load_irnet(net, tmp_path/"irn.pth").fc_edge6.bias, state["fc_edge6.bias"])


@pytest.mark.parametrize("change,text",
                         [(dict(crop=50), "multiple of 4"), (dict(crop=24), "no cell with all neighbors"), (dict(lr_edge=0), "lr_edge"),
                          (dict(epochs=0), "epochs"), (dict(scale=(0, 1)), "scale")])
def test_training_names_bad_settings(change, text):
    from dataclasses import replace
    with pytest.raises(ValueError, match=text): irnet.train_irnet(small(), Photos(), true_mask, replace(QUICK, **change), progress=False)


def test_missing_and_foreign_labels_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make_ir_labels"): irnet.IRViews(Photos(), tmp_path, 48)[0]
    irnet.save_mask(tmp_path/"p0.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match="IR label of p0"): irnet.IRViews(Photos(), tmp_path, 48)[0]


SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from accelerate import Accelerator
from test_irnet import Photos, QUICK, small, true_mask, irnet
history = irnet.train_irnet(small(), Photos(), true_mask, QUICK, out=Path({out!r}), progress=False)
assert Accelerator().num_processes == 2
if os.environ["RANK"] == "0": Path({out!r}, "history.json").write_text(json.dumps(history))
"""


def test_two_processes_train_as_one(tmp_path):
    "gloo on CPU: the losses are ratios over the whole batch, so two processes must give the numbers of one"
    import os, socket, subprocess, sys
    script = SCRIPT.format(tests=os.path.dirname(__file__), out=str(tmp_path/"out"))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    both = [subprocess.Popen([sys.executable, "-c", script], env=dict(env, RANK=r, LOCAL_RANK=r), stderr=subprocess.PIPE, text=True) for r in "01"]
    said = [p.communicate(timeout=300)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said[0][-2000:]
    two, one = json.loads((tmp_path/"out/history.json").read_text()), irnet.train_irnet(small(), Photos(), true_mask, QUICK, progress=False)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for k in a: assert a[k] == pytest.approx(b[k], rel=2e-4, abs=1e-6), k
