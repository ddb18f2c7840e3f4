"""adcam.cam: golden numbers, the loops of the equations, properties, exactness of the grid, bad input."""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from adcam import cam as C
from adcam.cam import (ad_cam, ad_cam_grid, att_diffu, attention_received, attention_report, cam_map, co_neighbor, crop_maps, diffuse, neighbors,
                       normalize, patch_attention, refine, same_object_auc, top_k, trans_cam, ts_cam)

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def stochastic(seed, n, sharp=2., batch=1):
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(batch, n, n, generator=g, dtype=torch.float64)).softmax(-1)


def random_maps(seed=0, h=5, w=4, K=3, L=3, B=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    attn = (2 * torch.randn(B, L, 1 + h*w, 1 + h*w, generator=g, dtype=torch.float64)).softmax(-1)
    return SimpleNamespace(cam=torch.randn(B, K, h, w, generator=g, dtype=torch.float64).to(dtype), attn=attn.to(dtype))


# ---- the equations as loops, written again independently of the notebook

def loops_similarity(A):
    n = len(A)
    return [[math.fsum(math.sqrt(A[i][l] * A[j][l]) for l in range(n)) for j in range(n)] for i in range(n)]


def loops_keep(S, k, self_):
    keep = []
    for i, row in enumerate(S):
        order = sorted((j for j in range(len(row)) if self_ == "in" or j != i), key=lambda j: (-row[j], j))[:k]
        keep.append(set(order) | ({i} if self_ == "extra" else set()))
    return keep


def loops_refine(A, S, k, mask, self_):
    out = []
    for i, chosen in enumerate(loops_keep(S, k, self_)):
        row = [A[i][j] * (S[i][j] if mask == "weight" else 1) if j in chosen else 0. for j in range(len(A))]
        out.append([a / sum(row) for a in row])
    return out


def loops_diffuse(m, A, steps, direction):
    n = len(m)
    for _ in range(steps): m = [sum((A[j][i] if direction == "push" else A[i][j]) * m[j] for j in range(n)) for i in range(n)]
    return m


# ---- golden numbers

@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "adcam_math_n36_k8.npz", allow_pickle=False) as z: return {k: torch.from_numpy(z[k]) for k in z.files}


@pytest.fixture
def golden_maps(arrays):
    return SimpleNamespace(cam=arrays["M0"].view(1, 3, 6, 6), attn=arrays["A_full"][None, None])


def test_golden_every_array(arrays, golden_maps):
    maps = golden_maps
    A, seen = patch_attention(maps.attn), 2  # A_full and M0 are inputs
    for name, want in arrays.items():
        part = name.split("_")
        if name == "S": got = co_neighbor(A)[0]
        elif part[0] == "Atilde": got = refine(A, 8, part[1], part[2])[0]
        elif name.startswith("M_attdiffu"): got = att_diffu(maps, int(part[2][1:]))[0].flatten(1)
        elif part[0] == "M": got = ad_cam(maps, 8, int(part[4][1:]), part[1], part[2], part[3])[0].flatten(1)
        else: continue
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")
        seen += 1
    assert seen == len(arrays) == 48


def test_golden_input_follows_its_rule(arrays, golden_rules):
    generator = golden_rules("rules_conformer").generator
    A = np.exp(1.5 * generator("adcam:A").standard_normal((37, 37)))
    np.testing.assert_allclose(A / A.sum(1, keepdims=True), arrays["A_full"], atol=1e-12)
    M = np.maximum(generator("adcam:M").standard_normal((3, 36)), 0)
    np.testing.assert_allclose(M / M.max(1, keepdims=True), arrays["M0"], atol=1e-12)


@pytest.mark.parametrize("mask", ["binary", "weight"])
@pytest.mark.parametrize("self_", ["in", "excluded", "extra"])
def test_golden_grid(arrays, golden_maps, mask, self_):
    for (k, T, d), got in ad_cam_grid(golden_maps, [8], [1, 2, 4], ["push", "pull"], mask=mask, self_=self_).items():
        torch.testing.assert_close(got[0].flatten(1), arrays[f"M_{d}_{mask}_{self_}_T{T}"], rtol=0, atol=1e-10)


# ---- equal to the loops

@pytest.mark.parametrize("mask", ["binary", "weight"])
@pytest.mark.parametrize("self_", ["in", "excluded", "extra"])
def test_equals_loops(mask, self_):
    maps = random_maps(B=1)
    full = maps.attn[0].mean(0)[1:, 1:]
    A = (full / full.sum(1, keepdim=True)).tolist()
    S = loops_similarity(A)
    R = loops_refine(A, S, 6, mask, self_)
    np.testing.assert_allclose(co_neighbor(patch_attention(maps.attn))[0], S, atol=1e-12)
    np.testing.assert_allclose(refine(patch_attention(maps.attn), 6, mask, self_)[0], R, atol=1e-12)
    for direction in ("push", "pull"):
        got = ad_cam(maps, 6, 3, direction, mask, self_)[0].flatten(1)
        np.testing.assert_allclose(got, [loops_diffuse(m.relu().flatten().tolist(), R, 3, direction) for m in maps.cam[0]], atol=1e-12)


@few
@given(seeds, st.integers(1, 12), st.integers(1, 4))
def test_top_k_rule_with_ties(seed, k, levels):
    S = torch.randint(0, levels, (2, 12, 12), generator=torch.Generator().manual_seed(seed)).float()
    want = torch.zeros_like(S, dtype=torch.bool)
    for b, i in np.ndindex(2, 12): want[b, i, sorted(range(12), key=lambda j: (-S[b, i, j], j))[:k]] = True
    assert torch.equal(top_k(S, k), want)
    assert torch.equal(C._ranks(S) < k, want)


# ---- properties

@few
@given(seeds, st.integers(2, 15), st.floats(.1, 6))
def test_similarity_is_hellinger(seed, n, sharp):
    A = stochastic(seed, n, sharp)[0]
    A[-1] = A[0]
    S = co_neighbor(A)
    distance = (A.sqrt()[:, None] - A.sqrt()).square().sum(-1) / 2
    torch.testing.assert_close(1 - S, distance, rtol=0, atol=1e-12)
    assert S.min() >= 0 and S.max() <= 1 + 1e-12
    torch.testing.assert_close(S, S.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(S.diagonal(), torch.ones(n, dtype=S.dtype), rtol=0, atol=1e-12)
    equal = (A[:, None] - A).abs().amax(-1) < 1e-9
    assert torch.equal(S > 1 - 1e-14 * n, equal) or (S[equal] > 1 - 1e-12).all() and (S[~equal] < 1).all()


@few
@given(st.integers(2, 20), st.data())
def test_theorem_4_1(N, data):
    n = data.draw(st.integers(1, N))
    pick = st.lists(st.integers(0, N - 1), min_size=n, max_size=n, unique=True)
    a, b = set(data.draw(pick)), set(data.draw(pick))
    A = torch.zeros(N, N, dtype=torch.float64)
    A[:, 0] = 1
    for i, s in ((0, a), (1, b)): A[i] = torch.tensor([1 / n if j in s else 0. for j in range(N)], dtype=A.dtype)
    J = len(a & b) / len(a | b)
    S = co_neighbor(A)[0, 1].item()
    assert S == pytest.approx(2 * J / (1 + J), abs=1e-12) and S == pytest.approx(2 * len(a & b) / (2 * n), abs=1e-12)


@few
@given(seeds, st.integers(2, 20), st.integers(0, 5), st.sampled_from(["binary", "weight"]), st.sampled_from(["in", "excluded", "extra"]), st.data())
def test_mass_and_range(seed, n, T, mask, self_, data):
    k = data.draw(st.integers(1, n if self_ == "in" else n - 1))
    A = refine(stochastic(seed, n), k, mask, self_)
    torch.testing.assert_close(A.sum(-1), torch.ones(1, n, dtype=A.dtype), rtol=0, atol=1e-12)
    assert ((A > 0).sum(-1) == k + (self_ == "extra")).all()
    assert A.diagonal(dim1=1, dim2=2).eq(0).all() or self_ != "excluded"
    M = torch.rand(1, 2, 1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    push, pull = diffuse(M, A, T), diffuse(M, A, T, "pull")
    torch.testing.assert_close(push.sum((-2, -1)), M.sum((-2, -1)), rtol=1e-12, atol=1e-12)
    assert (push >= 0).all()
    assert (pull.amin((-2, -1)) >= M.amin((-2, -1)) - 1e-12).all() and (pull.amax((-2, -1)) <= M.amax((-2, -1)) + 1e-12).all()
    torch.testing.assert_close(diffuse(torch.full_like(M, .7), A, T, "pull"), torch.full_like(M, .7), rtol=0, atol=1e-12)


@few
@given(seeds)
def test_diffusion_is_linear_and_a_power(seed):
    A, M = stochastic(seed, 12, batch=2), torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for d in ("push", "pull"):
        torch.testing.assert_close(diffuse(3 * M + M.flip(1), A, 2, d), 3 * diffuse(M, A, 2, d) + diffuse(M, A, 2, d).flip(1))
        torch.testing.assert_close(diffuse(M, A, 5, d), diffuse(diffuse(M, A, 2, d), A, 3, d))
        assert torch.equal(diffuse(M, A, 0, d), M)


def test_all_neighbors_is_att_diffu():
    maps = random_maps()
    for d in ("push", "pull"): torch.testing.assert_close(ad_cam(maps, 20, 2, d), att_diffu(maps, 2, d))


# ---- the grid and the selection of classes are the same numbers

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, dict(mask="weight"), dict(self_="excluded"), dict(self_="extra"), dict(prenorm="max"), dict(relu_before=False),
                                     dict(renorm="per_layer", layers=2), dict(classes=[2, 0])])
def test_grid_equals_single_calls_exactly(dtype, options):
    maps = random_maps(dtype=dtype)
    grid = ad_cam_grid(maps, (1, 5, 19), (3, 0, 1), ("push", "pull"), **options)
    assert set(grid) == {(k, T, d) for k in (1, 5, 19) for T in (0, 1, 3) for d in ("push", "pull")}
    for (k, T, d), got in grid.items(): assert torch.equal(got, ad_cam(maps, k, T, d, **options))


def test_grid_modes():
    maps = random_maps()
    grid = ad_cam_grid(maps, (50, 300), (2,), k_mode="ratio")
    for k in (50, 300): assert torch.equal(grid[k, 2, "push"], ad_cam(maps, neighbors(k, 20, "ratio"), 2))
    assert torch.equal(ad_cam_grid(maps, (99,), clip_k=True)[99, 2, "push"], ad_cam(maps, 20))


@pytest.mark.parametrize("method", [cam_map, ts_cam, trans_cam, att_diffu, lambda m, **kw: ad_cam(m, 5, **kw)])
def test_methods_share_a_contract(method):
    maps = random_maps()
    out = method(maps)
    assert out.shape == (2, 3, 5, 4) and out.dtype == torch.float64 and (out >= 0).all()
    torch.testing.assert_close(method(maps, classes=torch.tensor([2, 1])), out[:, [2, 1]])
    one = [method(SimpleNamespace(cam=maps.cam[b:b+1], attn=maps.attn[b:b+1])) for b in (0, 1)]
    torch.testing.assert_close(torch.cat(one), out)
    with pytest.raises(TypeError, match="unexpected keyword"): method(maps, stepz=3)
    with pytest.raises(ValueError, match="outside the 3 classes"): method(maps, classes=[3])
    with pytest.raises(ValueError, match="classes is empty"): method(maps, classes=[])


def test_trans_cam_and_ts_cam_by_hand():
    maps = random_maps()
    A = maps.attn.sum(1)
    torch.testing.assert_close(trans_cam(maps).flatten(2), torch.einsum("bij,bkj->bki", A[:, 1:, 1:], maps.cam.flatten(2)).relu())
    torch.testing.assert_close(trans_cam(maps, direction="push").flatten(2), torch.einsum("bji,bkj->bki", A[:, 1:, 1:], maps.cam.flatten(2)).relu())
    torch.testing.assert_close(ts_cam(maps), A[:, 0, 1:].view(2, 1, 5, 4) * maps.cam.relu())


def test_renorm_and_layers():
    attn = random_maps().attn
    cut = attn[..., 1:, 1:]
    torch.testing.assert_close(patch_attention(attn, renorm="none"), cut.mean(1))
    torch.testing.assert_close(patch_attention(attn, renorm="per_layer"), (cut / cut.sum(-1, keepdim=True)).mean(1))
    assert (patch_attention(attn, renorm="none").sum(-1) < 1).all()
    for layers, index in ((2, [1, 2]), ([0], [0]), ([2, 0], [2, 0]), ("all", [0, 1, 2]), (np.array([0, 1]), [0, 1])):
        torch.testing.assert_close(patch_attention(attn, layers), patch_attention(attn[:, index]))


def test_rows_may_sum_to_less_than_one_but_not_to_more():
    "Networks with further prefix tokens, and padded views, cut columns out before they come here"
    attn = random_maps().attn
    scaled = attn * torch.linspace(.1, 1., attn.shape[2], dtype=attn.dtype)[:, None]
    for method in (ts_cam, trans_cam, att_diffu, lambda m: ad_cam(m, 5)): assert method(SimpleNamespace(cam=random_maps().cam, attn=scaled)).isfinite().all()
    torch.testing.assert_close(patch_attention(scaled), patch_attention(attn))  # a row's own factor goes away
    for bad in (attn * 1.02, attn * 0):
        with pytest.raises(ValueError, match="rows of attn sum to"): patch_attention(bad)


@few
@given(seeds, st.data())
def test_crop_maps_is_the_matrix_cut_by_hand(seed, data):
    maps = random_maps(seed)                                             # 5 x 4 tokens
    (y, x), h, w = (data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    if y + h > 5 or x + w > 4:
        with pytest.raises(ValueError, match="a grid of 5x4 tokens"): crop_maps(maps, (h, w), (y, x))
        return
    part, keep = crop_maps(maps, (h, w), (y, x)), [(y + i) * 4 + x + j for i in range(h) for j in range(w)]
    A = maps.attn.mean(1)[:, 1:, 1:][:, keep][:, :, keep]
    torch.testing.assert_close(patch_attention(part.attn), A / A.sum(-1, keepdim=True))
    torch.testing.assert_close(part.attn[:, :, 0, 1:], maps.attn[:, :, 0, 1:][:, :, keep])
    assert torch.equal(part.cam, maps.cam[..., y:y + h, x:x + w]) and part.attn.shape[-1] == 1 + h*w
    torch.testing.assert_close(trans_cam(part).flatten(2), (part.cam.flatten(2) @ maps.attn.sum(1)[:, 1:, 1:][:, keep][:, :, keep].mT).relu())


def test_inputs_are_not_changed():
    "Memory is reused only where it is our own"
    maps = random_maps(L=1)
    before, S = [t.clone() for t in (maps.cam, maps.attn)], co_neighbor(patch_attention(maps.attn))
    A, kept = patch_attention(maps.attn), S.clone()
    for f in (lambda: patch_attention(maps.attn, renorm="per_layer"), lambda: trans_cam(maps), lambda: refine(A, 5, "weight", S=S),
              lambda: ad_cam(maps, 5), lambda: crop_maps(maps, (2, 2))): f()
    assert torch.equal(maps.cam, before[0]) and torch.equal(maps.attn, before[1]) and torch.equal(S, kept) and torch.equal(A, patch_attention(maps.attn))


def test_prenorm_changes_only_the_scale():
    maps = random_maps()
    torch.testing.assert_close(normalize(ad_cam(maps, 5, prenorm="max"), eps=0), normalize(ad_cam(maps, 5), eps=0))


def test_normalize():
    cam = torch.tensor([[[[0., 2.], [4., 1.]], [[0., 0.], [0., 0.]]]])
    torch.testing.assert_close(normalize(cam)[0, 0], cam[0, 0] / (4 + 1e-5))
    assert (normalize(cam)[0, 1] == 0).all() and (normalize(cam, "minmax")[0, 1] == 0).all()
    low = normalize(cam + 3, "minmax")[0, 0]
    assert low.min() == 0 and low.max() == pytest.approx(1, abs=1e-4)


# ---- precision

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    maps = random_maps(dtype=torch.float32)
    half = SimpleNamespace(cam=maps.cam.to(dtype), attn=maps.attn.to(dtype))
    wide = SimpleNamespace(cam=half.cam.float(), attn=half.attn.float())
    for method in (cam_map, ts_cam, trans_cam, att_diffu, lambda m: ad_cam(m, 5)):
        assert method(half).dtype == torch.float32
        assert torch.equal(method(half), method(wide))
    assert co_neighbor(half.attn[:, 0]).dtype == torch.float64


@pytest.mark.parametrize("sharp", [1, 1e-2, 1e-4])
def test_float32_maps_choose_the_same_neighbors_as_the_loops(sharp):
    "1e-4: the attention of an untrained network, where S in float32 would be all ties"
    g = torch.Generator().manual_seed(3)
    maps = SimpleNamespace(cam=torch.randn(1, 2, 6, 6, generator=g), attn=(sharp * torch.randn(1, 2, 37, 37, generator=g)).softmax(-1))
    A = maps.attn[0].double().mean(0)[1:, 1:]
    A = (A / A.sum(1, keepdim=True)).tolist()
    S = loops_similarity(A)
    R = loops_refine(A, S, 9, "binary", "in")
    assert [set(row.nonzero().flatten().tolist()) for row in refine(patch_attention(maps.attn), 9)[0]] == loops_keep(S, 9, "in")
    want = [loops_diffuse(m.relu().flatten().tolist(), R, 2, "push") for m in maps.cam[0]]
    got = ad_cam(maps, 9)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].flatten(1), want, rtol=1e-6, atol=1e-7)


def test_a_row_without_attention_keeps_what_it_has():
    A = torch.tensor([[0., 1., 0.], [0., 0., 1.], [.5, .5, 0.]])  # rows 0 and 1 share nothing with anybody but themselves
    R = refine(A, 1)                                              # each keeps itself only, and gives itself nothing
    torch.testing.assert_close(R, torch.eye(3, dtype=R.dtype))


def test_gradients_pass():
    maps = random_maps()
    maps.cam.requires_grad_(); maps.attn.requires_grad_()
    ad_cam(maps, 5).sum().backward()
    assert maps.cam.grad.isfinite().all() and maps.attn.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu():
    maps = random_maps()
    gpu = SimpleNamespace(cam=maps.cam.cuda(), attn=maps.attn.cuda())
    torch.testing.assert_close(ad_cam(gpu, 5).cpu(), ad_cam(maps, 5))


# ---- why it helps or not

def loops_auc(A, label):
    out = []
    for i in [i for i, c in enumerate(label) if 0 < c != 255]:
        P = [j for j, c in enumerate(label) if c == label[i] and j != i]
        Q = [j for j, c in enumerate(label) if c not in (label[i], 255)]
        if P and Q: out.append(sum((A[i][p] > A[i][q]) + .5 * (A[i][p] == A[i][q]) for p in P for q in Q) / len(P) / len(Q))
    return sum(out) / len(out) if out else float("nan")


@few
@given(seeds, st.booleans())
def test_auc_equals_loops(seed, ties):
    g = torch.Generator().manual_seed(seed)
    A = torch.randint(0, 4, (2, 14, 14), generator=g).double() if ties else torch.rand(2, 14, 14, generator=g, dtype=torch.float64)
    mask = torch.tensor([0, 0, 1, 2, 255])[torch.randint(0, 5, (2, 14), generator=g)]
    np.testing.assert_allclose(same_object_auc(A, mask), [loops_auc(a.tolist(), m.tolist()) for a, m in zip(A, mask)], atol=1e-12)


@few
@given(seeds)
def test_auc_equals_scipy_ranks(seed):
    from scipy.stats import rankdata
    g = torch.Generator().manual_seed(seed)
    A, label = torch.randint(0, 6, (15, 15), generator=g).double(), torch.tensor([1] * 6 + [0] * 9)
    want = []
    for i in range(6):
        others = [j for j in range(15) if j != i]
        rank, pos = rankdata(A[i, others]), np.array(others) < 6
        want.append((rank[pos].sum() - 15) / (5 * 9))
    assert same_object_auc(A, label).item() == pytest.approx(np.mean(want), abs=1e-12)


HALF = torch.tensor([1, 1, 1, 0, 0, 0])


def test_auc_of_perfect_and_of_reversed_knowledge():
    know = (HALF[:, None] == HALF).double()
    assert same_object_auc(know, HALF).item() == 1
    assert same_object_auc(1 - know, HALF).item() == 0


def test_auc_of_no_knowledge_is_a_half():
    assert same_object_auc(torch.ones(6, 6), HALF).item() == .5


@pytest.mark.parametrize("label", [torch.zeros(6), torch.ones(6)])
def test_auc_without_object_or_background_is_nan(label):
    assert same_object_auc(torch.ones(6, 6), label).isnan()


@pytest.mark.parametrize("label", [HALF, torch.tensor([1, 1, 255, 0, 0, 255])])
def test_attention_received_is_a_ratio_and_leaves_ignored_patches_out(label):
    A = torch.tensor([3., 3, 3, 1, 1, 1]).expand(6, 6) / 12
    assert attention_received(A, label).item() == pytest.approx(3)


def test_attention_received_without_background_is_nan():
    assert attention_received(torch.ones(6, 6) / 6, torch.ones(6)).isnan()


def test_report():
    maps = random_maps()
    mask = torch.tensor([0, 1] * 10).view(5, 4).expand(2, 5, 4)
    rows = attention_report(maps.attn, mask, k=5)
    assert [(r["block"], r["matrix"]) for r in rows] == [(b, m) for b in (0, 1, 2, "mean") for m in ("A", "S", "A~")]
    assert rows[-3]["auc"] == pytest.approx(same_object_auc(patch_attention(maps.attn), mask).mean().item())
    assert rows[5]["received"] == pytest.approx(attention_received(refine(patch_attention(maps.attn, [1]), 5), mask).mean().item())


# ---- bad input: the value and the remedy are named

BAD = [
    (lambda m: ad_cam(m, 21), "k=21: a patch can keep 1 to 20.*k_mode='ratio'"),
    (lambda m: ad_cam(m, 20, self_="excluded"), "k=20: a patch can keep 1 to 19"),
    (lambda m: ad_cam(m, 0), "k=0"),
    (lambda m: ad_cam(m, 0, clip_k=True), "k=0"),
    (lambda m: ad_cam(m, -3, k_mode="ratio"), "k=-3"),
    (lambda m: top_k(co_neighbor(patch_attention(m.attn)), 21), "k=21"),
    (lambda m: ad_cam_grid(m, (5, 21)), "k=21"),
    (lambda m: ad_cam(m, 5, -1), "steps=-1"),
    (lambda m: att_diffu(m, -2), "steps=-2"),
    (lambda m: ad_cam_grid(m, (5,), (1, -1)), "steps=-1"),
    (lambda m: ad_cam(m, 5, direction="up"), "direction='up'.*'push', 'pull'"),
    (lambda m: ad_cam(m, 5, mask="soft"), "mask='soft'"),
    (lambda m: ad_cam_grid(m, (5,), mask="soft"), "mask='soft'"),
    (lambda m: ad_cam(m, 5, self_="out"), "self_='out'"),
    (lambda m: ad_cam(m, 5, k_mode="auto"), "k_mode='auto'"),
    (lambda m: ad_cam(m, 5, renorm="row"), "renorm='row'"),
    (lambda m: ad_cam(m, 5, prenorm="min"), "prenorm='min'"),
    (lambda m: normalize(m.cam, "sum"), "how='sum'"),
    (lambda m: ad_cam(m, 5, layers=4), "returned 3 blocks"),
    (lambda m: ad_cam(m, 5, layers=0), "layers=0"),
    (lambda m: ad_cam(m, 5, layers=[3]), "out of range"),
    (lambda m: ad_cam(m, 5, layers=[]), "out of range"),
    (lambda m: ad_cam(m, 5, layers="last"), "layers='last'"),
    (lambda m: ad_cam(SimpleNamespace(cam=m.cam[..., :3], attn=m.attn), 5), r"20 patch tokens on a grid of h\*w = 5\*3 = 15"),
    (lambda m: trans_cam(SimpleNamespace(cam=m.cam[:1], attn=m.attn)), "maps.attn is"),
    (lambda m: ad_cam(SimpleNamespace(cam=m.cam, attn=m.attn * float("nan")), 5), "NaN"),
    (lambda m: ts_cam(SimpleNamespace(cam=m.cam, attn=m.attn * float("nan"))), "NaN"),
    (lambda m: ad_cam(SimpleNamespace(cam=m.cam, attn=-m.attn), 5), "negative attention"),
    (lambda m: ad_cam(SimpleNamespace(cam=m.cam, attn=m.attn * 2), 5), "rows of attn sum to 2"),
    (lambda m: patch_attention(m.attn[:, 0]), r"expected \(B, L, 1\+N, 1\+N\)"),
    (lambda m: patch_attention(m.attn[..., 1:]), r"expected \(B, L, 1\+N, 1\+N\)"),
    (lambda m: co_neighbor(m.attn[:, 0, 1:]), "expected"),
    (lambda m: co_neighbor(m.attn[:, 0] - 1), "non-negative"),
    (lambda m: diffuse(m.cam[0], m.attn[:, 0], 1), r"expected \(B, K, h, w\)"),
    (lambda m: diffuse(m.cam, m.attn[:, 0], 1), "one row per patch"),
    (lambda m: cam_map(SimpleNamespace(cam=m.cam[0])), r"expected \(B, K, h, w\)"),
    (lambda m: top_k(m.attn[:, 0] * float("nan"), 3), "NaN"),
    (lambda m: same_object_auc(m.attn[:, 0, 1:, 1:], torch.zeros(7)), "mask has 7 labels"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call(random_maps())


def test_one_overflowing_block_is_found():
    maps = random_maps()
    maps.attn[1, 2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match="infinite"): ad_cam(maps, 5)


def test_module_imports_nothing_of_the_project():
    source = Path(C.__file__).read_text()
    assert not [line for line in source.splitlines() if line.lstrip().startswith(("import", "from"))
                and line.split()[1].split(".")[0] not in ("contextlib", "operator", "threading", "torch")]
