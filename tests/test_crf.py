"adcam.crf: stored results of the reference, the exact kernel, pydensecrf2 on photographs, properties, faults."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adcam import crf
from adcam.crf import (DEEPLAB, GETAM, IRN, PSA, ExactKernel, Lattice, bilateral_features, crf_memory, dense_crf, mean_field, position_features,
                       refine_labels, unary_from_labels, unary_from_logits, unary_from_probabilities)


def picture(h, w, seed=0):
    "Flat colored cells with a little noise: (h,w,3) uint8"
    r = np.random.default_rng(seed)
    cells = r.integers(0, 230, (-(-h // 8), -(-w // 8), 3)).repeat(8, 0).repeat(8, 1)[:h, :w]
    return (cells + r.integers(0, 20, (h, w, 3))).astype(np.uint8)


def energies(c, h, w, seed=0): return (2 * np.random.default_rng(seed).random((c, h, w))).astype(np.float32)


# ---- stored results of the reference ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def g14(golden, golden_rules):
    rules = golden_rules("irn/rules")
    with np.load(golden / "irn/g14_crf.npz", allow_pickle=False) as f: stored = dict(f)
    return stored, rules.rgb_image(700, 40, 52), rules.cam_map(701, 2, 40, 52), rules.nrm(702, (3, 40, 52))


@pytest.mark.parametrize("which", ["fg", "bg"])
def test_ir_label_crf_of_the_reference(g14, which):
    stored, image, *_ = g14
    q = dense_crf(unary_from_labels(stored[f"crf_{which}_in"], 3), image, **IRN)
    assert (q.argmax(0) == stored[f"crf_{which}_out"]).mean() >= .999


def test_beliefs_of_the_reference_irn(g14):
    stored, image, *_ = g14
    q = dense_crf(unary_from_labels(stored["crf_fg_in"], 3), image, **IRN)
    assert (q.argmax(0) == stored["Q_irn"].argmax(0)).mean() >= .999
    assert np.abs(q - stored["Q_irn"]).max() < 1e-3


def test_beliefs_of_the_reference_psa(g14):
    stored, image, cam, _ = g14
    p = np.concatenate([(1 - cam.max(0, keepdims=True)) ** 4, cam])
    q = dense_crf(unary_from_probabilities(p), image, **PSA)
    assert (q.argmax(0) == stored["Q_psa"].argmax(0)).mean() >= .999
    assert np.abs(q - stored["Q_psa"]).max() < 1e-3


def test_beliefs_of_the_reference_deeplab(g14):
    stored, image, _, z = g14
    q = dense_crf(unary_from_logits(z), image, **DEEPLAB)
    assert (q.argmax(0) == stored["Q_deeplab"].argmax(0)).mean() >= .995
    assert np.abs(q - stored["Q_deeplab"]).mean() < 1e-3


def test_unaries_of_the_reference(g14, golden):
    import json
    stored, _, cam, z = g14
    log = json.loads((golden / "irn/crf_log.json").read_text())
    for name, u in [("crf_irn", unary_from_labels(stored["crf_fg_in"], 3)), ("crf_deeplab", unary_from_logits(z)),
                    ("crf_psa", unary_from_probabilities(np.concatenate([(1 - cam.max(0, keepdims=True)) ** 4, cam])))]:
        assert abs(u.sum() / log[name]["unary_sum"] - 1) < 1e-5


def test_presets_are_those_of_the_reference(golden):
    import json
    log = json.loads((golden / "irn/crf_log.json").read_text())
    order = ("sxy_gauss", "compat_gauss", "sxy_bilateral", "srgb", "compat_bilateral", "iterations")
    for preset, name in [(IRN, "crf_irn"), (PSA, "crf_psa"), (DEEPLAB, "crf_deeplab")]:
        assert [preset[k] for k in order] == log[name]["params(sxy_g,compat_g,sxy_b,srgb,compat_b,iters)"]
    assert GETAM == dict(sxy_gauss=3, compat_gauss=3, sxy_bilateral=83, srgb=5, compat_bilateral=4, iterations=20)


# ---- against the C++ package, on photographs --------------------------------------------------------------------

@pytest.mark.parametrize("labels,preset", [(3, IRN), (5, PSA), (3, DEEPLAB), (3, GETAM)])
def test_lattice_equals_pydensecrf_on_photographs(coco_mini, labels, preset):
    pytest.importorskip("pydensecrf")
    for file in sorted((coco_mini / "JPEGImages").glob("*.jpg"))[:2]:
        image = np.array(Image.open(file).convert("RGB"))[:120, :160].copy()
        cells = np.random.default_rng(0).integers(0, labels, (8, 10)).repeat(16, 0).repeat(16, 1)[:image.shape[0], :image.shape[1]]
        u = unary_from_labels(cells, labels)
        ours, theirs = (dense_crf(u, image, **preset, backend=b) for b in ("lattice", "pydensecrf"))
        assert (ours.argmax(0) == theirs.argmax(0)).mean() >= .999
        assert np.abs(ours - theirs).mean() < 1e-3


def test_pydensecrf_backend_takes_batches_and_kernels_that_are_off():
    pytest.importorskip("pydensecrf")
    u, image = np.stack([energies(3, 20, 24, s) for s in (0, 1)]), np.stack([picture(20, 24, s) for s in (0, 1)])
    for off in ({}, {"compat_gauss": 0}, {"compat_bilateral": 0}):
        np.testing.assert_allclose(dense_crf(u, image, backend="pydensecrf", **off), dense_crf(u, image, **off), atol=2e-3)


def test_without_pydensecrf_the_message_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match="pydensecrf2.*lattice"): dense_crf(energies(2, 4, 4), picture(4, 4), backend="pydensecrf")


# ---- the kernels ------------------------------------------------------------------------------------------------

def test_exact_kernel_is_the_formula_and_blocks_do_not_matter():
    f, x = torch.rand(5, 70) * 3, torch.rand(70, 4)
    K = torch.exp(-.5 * ((f[:, :, None] - f[:, None]) ** 2).sum(0).double())
    n = K.sum(1, keepdim=True).rsqrt()
    for block in (16, 70, 1000):
        torch.testing.assert_close(ExactKernel(f, block=block).filter(x).double(), K @ x.double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ExactKernel(f, block=block).normalize_(2.5).filter(x).double(), 2.5 * n * (K @ (n * x.double())), atol=1e-5, rtol=1e-5)


def dictionary_filter(f, x):
    "Splat, blur, slice over a dictionary, written from the paper with numpy: (d,N), (N,) -> (N,)"
    d, N = f.shape
    scale = np.sqrt(2 / 3) * (d + 1) / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2))
    g = f * scale[:, None]
    v = np.stack([g[j:].sum(0) - (j * g[j - 1] if j else 0) for j in range(d + 1)])
    corners, table = [], {}
    for i in range(N):
        base = np.round(v[:, i] / (d + 1)).astype(int) * (d + 1)
        gap = v[:, i] - base
        order = np.argsort(-gap, kind="stable")
        s = base.sum() // (d + 1)
        if s > 0: base[order[d + 1 - s:]] -= d + 1
        if s < 0: base[order[:-s]] += d + 1
        gap = v[:, i] - base
        order = np.argsort(-gap, kind="stable")
        t = gap[order] / (d + 1)
        for r in range(d + 1):
            w = 1 - t[0] + t[d] if r == 0 else t[d - r] - t[d - r + 1]
            key = base + r
            key[order[d + 1 - r:]] -= d + 1
            corners.append((i, tuple(key), w))
            table[tuple(key)] = table.get(tuple(key), 0) + w * x[i]
    for j in range(d + 1):
        step = np.array([d if i == j else -1 for i in range(d + 1)])
        table = {k: a + .5 * (table.get(tuple(k + step), 0) + table.get(tuple(k - step), 0)) for k, a in table.items()}
    y = np.zeros(N)
    for i, key, w in corners: y[i] += w * table[key]
    return y, len(table)


@settings(max_examples=12, deadline=None)
@given(d=st.integers(1, 5), n=st.integers(1, 60), spread=st.floats(.1, 20), seed=st.integers(0, 99))
def test_lattice_equals_the_dictionary(d, n, spread, seed):
    r = np.random.default_rng(seed)
    f, x = (r.standard_normal((d, n)) * spread).astype(np.float32), r.random(n).astype(np.float32)
    lattice = Lattice(torch.from_numpy(f))
    y, vertices = dictionary_filter(f.astype(float), x)
    assert lattice.vertices == vertices
    np.testing.assert_allclose(lattice.filter(torch.from_numpy(x)[:, None])[:, 0], y, atol=2e-3, rtol=2e-3)


def test_lattice_is_close_to_the_gaussian_in_two_dimensions():
    f = position_features((31, 31), 5)
    x = torch.rand(961, 1)
    ours, exact = (k.normalize_().filter(x) for k in (Lattice(f), ExactKernel(f)))
    assert (ours - exact).abs().mean() < .02 * exact.mean()


def test_groups_do_not_meet():
    f, x = torch.rand(3, 40), torch.rand(40, 2)
    group = torch.arange(40) // 20
    for kind in (Lattice, ExactKernel):
        both = kind(f, group).filter(x)
        for g in (0, 1): torch.testing.assert_close(both[group == g], kind(f[:, group == g]).filter(x[group == g]), atol=1e-4, rtol=1e-4)


def test_normalization_is_symmetric_and_fused():
    f, x = torch.rand(5, 50) * 2, torch.rand(50, 3)
    n = Lattice(f).filter(torch.ones(50, 1)).rsqrt()
    torch.testing.assert_close(Lattice(f).normalize_(3).filter(x), 3 * n * Lattice(f).filter(n * x), atol=1e-5, rtol=1e-4)


def test_the_gpu_path_of_sorting_and_searching_gives_the_same(monkeypatch):
    "On a GPU torch sorts and searches instead of numpy; here the same calls run on the CPU."
    f, x = torch.rand(5, 400) * 3, torch.rand(400, 2)
    here = Lattice(f).filter(x)
    monkeypatch.setattr(crf, "_argsort", torch.argsort)
    monkeypatch.setattr(crf, "_search", lambda table, x: torch.searchsorted(table, x).clamp_(max=len(table) - 1))
    torch.testing.assert_close(Lattice(f).filter(x), here, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu():
    u, image = torch.from_numpy(energies(4, 40, 50)), picture(40, 50)
    q = dense_crf(u.cuda(), image)
    assert q.is_cuda
    assert (q.cpu().argmax(0) == dense_crf(u, image).argmax(0)).float().mean() > .999


# ---- mean field -------------------------------------------------------------------------------------------------

def test_lattice_agrees_with_the_exact_crf():
    image, u = picture(30, 36), energies(3, 30, 36)
    u += unary_from_labels((image.sum(-1) > 380).astype(int), 3)
    a, b = (dense_crf(u, image, **PSA, backend=k) for k in ("exact", "lattice"))
    assert (a.argmax(0) == b.argmax(0)).mean() > .97


def test_mean_field_is_the_update_equation():
    f, U = torch.rand(2, 30) * 3, torch.rand(1, 3, 30)
    K = torch.exp(-.5 * ((f[:, :, None] - f[:, None]) ** 2).sum(0))
    n = K.sum(1).rsqrt()
    q = torch.softmax(-U[0], 0)
    for _ in range(4): q = torch.softmax(-U[0] + 2 * (q * n) @ K * n, 0)
    torch.testing.assert_close(mean_field(U, [ExactKernel(f).normalize_(2)], 4)[0], q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("labels", [1, 2, 15, 16, 21])
def test_many_labels_and_few_take_the_same_way(labels):
    u, image = energies(labels, 12, 14), picture(12, 14)
    q = dense_crf(u, image, backend="exact")
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(dense_crf(np.concatenate([u, np.full((20, 12, 14), 90, np.float32)]), image, backend="exact")[:labels], q, atol=1e-4)


@pytest.mark.parametrize("backend", ["lattice", "exact"])
@pytest.mark.parametrize("labels", [3, 17])
def test_batches_are_single_calls(backend, labels):
    u = np.stack([energies(labels, 16, 20, s) for s in range(3)])
    images = np.stack([picture(16, 20, s) for s in range(3)])
    one, own = dense_crf(u, images[0], backend=backend), dense_crf(u, images, backend=backend)
    for i in range(3):
        np.testing.assert_allclose(one[i], dense_crf(u[i], images[0], backend=backend), atol=2e-3)
        np.testing.assert_allclose(own[i], dense_crf(u[i], images[i], backend=backend), atol=2e-3)


def test_no_iteration_and_no_kernel_is_the_softmax():
    u, image = energies(4, 9, 11), picture(9, 11)
    soft = torch.softmax(-torch.from_numpy(u), 0).numpy()
    np.testing.assert_allclose(dense_crf(u, image, iterations=0), soft, atol=1e-6)
    np.testing.assert_allclose(dense_crf(u, image, compat_gauss=0, compat_bilateral=0), soft, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(c=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99), preset=st.sampled_from([IRN, PSA, DEEPLAB, GETAM]))
def test_beliefs_are_probabilities_and_labels_have_no_order(c, h, w, seed, preset):
    u, image = energies(c, h, w, seed), picture(h, w, seed)
    q = dense_crf(u, image, **preset)
    assert q.shape == u.shape and q.dtype == np.float32 and np.isfinite(q).all() and (q >= 0).all()
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(dense_crf(u[::-1].copy(), image, **preset)[::-1], q, atol=5e-3)


def test_a_constant_added_to_a_pixel_changes_nothing():
    u, image = energies(3, 10, 12), picture(10, 12)
    np.testing.assert_allclose(dense_crf(u + energies(1, 10, 12, 5) * 30, image), dense_crf(u, image), atol=5e-3)


def test_the_kind_of_the_unary_is_the_kind_of_the_answer():
    u, image = energies(2, 6, 7), picture(6, 7)
    assert isinstance(dense_crf(u, image), np.ndarray)
    t = dense_crf(torch.from_numpy(u).double(), torch.from_numpy(image))
    assert isinstance(t, torch.Tensor) and t.dtype == torch.float32
    np.testing.assert_allclose(t, dense_crf(u, image), atol=1e-6)
    before, seen = u.copy(), image.copy()
    dense_crf(u, image)
    assert (u == before).all() and (image == seen).all()


def test_mirrored_and_read_only_arrays():
    u, image = energies(2, 8, 9), picture(8, 9)
    image.flags.writeable = False
    np.testing.assert_allclose(dense_crf(u[:, ::-1], image[::-1]), dense_crf(u[:, ::-1].copy(), image[::-1].copy()), atol=1e-6)


def test_same_input_same_answer():
    u, image = energies(3, 30, 40), picture(30, 40)
    assert (dense_crf(u, image) == dense_crf(u, image)).all()


# ---- unaries ----------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(c=st.integers(2, 6), g=st.floats(.01, .99), seed=st.integers(0, 99))
def test_unary_from_labels(c, g, seed):
    labels = np.random.default_rng(seed).integers(0, c, (3, 4))
    p = np.exp(-unary_from_labels(labels, c, g))
    np.testing.assert_allclose(p.sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(p, labels[None], 0), g, rtol=1e-5)


def test_unaries_take_batches_tensors_and_unknown_pixels():
    labels = torch.tensor([[[0, 255], [1, 1]]] * 2)
    u = unary_from_labels(labels, 2, ignore=255)
    assert u.shape == (2, 2, 2, 2) and torch.allclose(u[:, :, 0, 1], torch.tensor(2.).log())
    assert unary_from_labels(np.zeros((2, 2), np.uint8), 1).shape == (1, 2, 2)
    assert unary_from_logits(torch.zeros(2, 3, 4, 5)).shape == (2, 3, 4, 5)
    np.testing.assert_allclose(unary_from_probabilities(np.zeros((2, 1, 1))), -np.log(1e-5), rtol=1e-6)


@pytest.mark.parametrize("call,words", [
    (lambda: unary_from_labels(np.array([[0, 255]]), 2), "label 255 in a map of 2 labels.*ignore="),
    (lambda: unary_from_labels(np.array([[-1, 0]]), 2), "label -1"),
    (lambda: unary_from_labels(np.zeros((2, 2)), 2), "give integers"),
    (lambda: unary_from_labels(np.zeros((2, 2), int), 2, gt_prob=1), "probability between 0 and 1"),
    (lambda: unary_from_labels(np.zeros((2, 2), int), 0), "at least one label"),
    (lambda: unary_from_probabilities(np.array([[[1.2]]])), "in \\[0,1\\]"),
    (lambda: unary_from_probabilities(np.array([[[-.1]]])), "in \\[0,1\\]"),
    (lambda: unary_from_probabilities(np.array([[[np.nan]]])), "finite"),
    (lambda: unary_from_probabilities(np.array([[[.5]]]), clip=0), "clip=0"),
    (lambda: unary_from_logits(np.array([[[np.inf]]])), "NaN or infinity"),
])
def test_wrong_unaries(call, words):
    with pytest.raises(ValueError, match=words): call()


# ---- faults -----------------------------------------------------------------------------------------------------

U, I = energies(3, 8, 9), picture(8, 9)


@pytest.mark.parametrize("unary,image,options,words", [
    (np.full((3, 8, 9), np.nan, np.float32), I, {}, "NaN or infinity"),
    (np.full((3, 8, 9), np.inf, np.float32), I, {}, "NaN or infinity"),
    (U[0], I, {}, r"shape \(8, 9\)"),
    (U.astype(int), I, {}, "unary_from_labels"),
    (np.zeros((3, 0, 9), np.float32), np.zeros((0, 9, 3), np.uint8), {}, r"\(3, 0, 9\)"),
    (np.zeros((0, 8, 9), np.float32), I, {}, r"\(0, 8, 9\)"),
    (U, I[:, :8], {}, "unary is 8x9 pixels, the image 8x8"),
    (U, I[..., 0], {}, "image has shape"),
    (U, np.dstack([I, I[..., :1]]), {}, "image has shape"),
    (U, I.astype(np.float32), {}, "dtype torch.float32.*uint8"),
    (U, I.astype(np.int64), {}, "uint8"),
    (np.stack([U, U]), np.stack([I] * 3), {}, "2 unaries for 3 images"),
    (U, I, {"sxy_gauss": 0}, "sxy_gauss=0"),
    (U, I, {"sxy_bilateral": -3}, "sxy_bilateral=-3"),
    (U, I, {"srgb": float("nan")}, "srgb=nan"),
    (U, I, {"srgb": 1e-7}, "larger kernel widths"),
    (U, I, {"compat_gauss": -1}, "compat_gauss=-1"),
    (U, I, {"iterations": -1}, "iterations=-1"),
    (U, I, {"iterations": 1.5}, "iterations=1.5"),
    (U, I, {"backend": "cuda"}, "choose one of lattice, exact, pydensecrf"),
    (U, I, {"max_memory": 1000}, "GiB, more than max_memory"),
])
def test_faults(unary, image, options, words):
    with pytest.raises(ValueError, match=words): dense_crf(unary, image, **options)


def test_tiny_widths_that_still_fit_keep_pixels_apart():
    "A kernel much narrower than a pixel connects nobody: each pixel hears itself, more sure than before, with the same label."
    q = dense_crf(U, I, sxy_gauss=.01, sxy_bilateral=.01, srgb=1)
    assert (q.argmax(0) == U.argmin(0)).all()


def test_huge_pictures_are_refused_at_once_and_the_exact_kernel_is_for_small_ones():
    image = np.broadcast_to(np.uint8(0), (4001, 4001, 3))
    with pytest.raises(ValueError, match="4001x4001 pixels with 2 labels need about .* GiB"): dense_crf(torch.zeros(1, 1, 1).expand(2, 4001, 4001), image)
    with pytest.raises(ValueError, match="use backend='lattice'"):
        dense_crf(np.zeros((2, 150, 150), np.float32), np.zeros((150, 150, 3), np.uint8), backend="exact")


def test_a_long_strip_is_no_problem():
    q = dense_crf(energies(2, 3, 4200), picture(3, 4200))
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_the_estimate_of_memory_is_not_far_off(root):
    "Peak of a fresh process, 300x400, against `crf_memory`"
    code = ("import re, numpy as np, torch\nfrom adcam.crf import dense_crf\ntorch.set_num_threads(1)\n"
            "y, x = np.mgrid[:300, :400]\nimage = np.stack([y % 200, x % 250, (x * y) % 97], -1).astype(np.uint8)\n"
             "u = np.random.default_rng(0).random((8, 300, 400), np.float32)\n"
            "dense_crf(u[:, :9, :9], image[:9, :9])\nr = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
             "b = r()\ndense_crf(u, image, iterations=2)\nprint(r() - b)")
    used = 1024 * int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout)
    assert .3 < used / crf_memory((300, 400), 8) < 3


def test_an_unknown_lattice_input():
    with pytest.raises(ValueError, match="give \\(d,N\\)"): Lattice(torch.zeros(5, 0))
    with pytest.raises(ValueError, match="finite"): Lattice(torch.full((2, 3), torch.inf))
    assert bilateral_features(I, 50, 5).shape == (5, 72)


# ---- masks in, masks out ----------------------------------------------------------------------------------------

def test_refine_labels_keeps_class_numbers_and_decides_unknown_pixels():
    image = np.full((20, 30, 3), 40, np.uint8)
    image[:, 15:] = 200
    labels = np.where(image[..., 0] > 100, 20, 7).astype(np.uint8)
    holes = labels.copy()
    holes[5:12, 10:20] = 255
    out = refine_labels(holes, image, **IRN)
    assert out.dtype == np.uint8 and (out == labels).all()
    assert (refine_labels(labels, image, iterations=0) == labels).all()


@pytest.mark.parametrize("labels,words",
                         [(np.full((8, 9), 255), "nothing to refine"), (np.zeros((8, 9)), "give integers"), (np.zeros((2, 8, 9), int), "give integers"),
                                          (np.zeros((8, 8), int), "resize the map")])
def test_refine_labels_faults(labels, words):
    with pytest.raises(ValueError, match=words): refine_labels(labels, I)
