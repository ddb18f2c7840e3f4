"GETAM: golden class maps and PAMR, the class row against the whole matrix, every kind of transformer, refusals in words"
import inspect
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from adcam.baselines import getam as module
from adcam.baselines.getam import couple, getam, getam_maps, getam_views, pamr, pamr_weights
from adcam.branches import TwoBranch
from adcam.cnn import CamNet
from adcam.conformer import conformer_mini
from adcam.data import to_tensor
from adcam.pipeline import checkpoint_path
from adcam.scenes import Scenes
from adcam.seeds import class_maps, extract, extract_dataset, load_seed, merge

torch.set_num_threads(1)
SIZES = dict(channels=(8, 16), depths=(1, 3), embed_dim=24, heads=3)  # a Conformer of 3 blocks without the last


class WriteOut(TorchFunctionMode):
    "Oracle: attention by the formula, all of it in the graph"
    def __init__(self): super().__init__(); self.A = []

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is not F.scaled_dot_product_attention: return f(*args, **(kwargs or {}))
        q, k, v = args[:3]
        mask, z = (kwargs or {}).get("attn_mask"), q @ k.mT * q.shape[-1]**-.5
        self.A.append((z if mask is None else z + mask).softmax(-1))
        return self.A[-1] @ v


def oracle(run, x, classes, start, prefix, has_class, grid):
    "The formula on whole matrices: (B,n,h,w)"
    out = []
    for c in classes:
        with WriteOut() as seen: z = run(x)
        G = torch.autograd.grad(z[:, c].sum(), seen.A[start:])
        C = sum((g * a).relu().mean(1) * g.relu().mean(1) for a, g in zip(seen.A[start:], G))  # (B,n,n)
        C = C[:, 0] if has_class else C[:, prefix:].mean(1)
        out.append(C[:, prefix:].relu().unflatten(1, grid))
    return torch.stack(out, 1).detach()


def mini(seed=0, **options):
    torch.manual_seed(seed)
    net = conformer_mini(4, **SIZES, **options).eval()
    for p in net.parameters():  # uneven attention, logits that depend on everything
        if p.ndim > 1: p.data.mul_(3).add_(.05 * torch.randn_like(p))
    return net


def scene(): return Scenes("val", 4, 64)[3]
def close(a, b, tol=1e-4): return torch.allclose(a, b, rtol=0, atol=tol * b.abs().max().item())


# ---- the golden file

@pytest.fixture(scope="module")
def g10(golden): return np.load(golden / "irn/g10_getam_pamr.npz", allow_pickle=False)


@pytest.mark.parametrize("start", (0, 6))
def test_golden_class_map(g10, golden_rules, start):
    nrm = golden_rules("irn/rules").nrm
    A = [torch.from_numpy(nrm(100 + l, (2, 3, 31, 31))).softmax(-1) for l in range(start, 12)]
    G = [torch.from_numpy(nrm(120 + l, (2, 3, 31, 31), .01)) for l in range(start, 12)]
    rows = sum(couple(a[:, :, :1], g[:, :, :1]) for a, g in zip(A, G))[:, 0, 1:]       # what getam_maps does
    whole = sum(couple(a, g) for a, g in zip(A, G))[:, 0, 1:]
    assert torch.equal(rows, whole)
    for b in (0, 1): assert close(rows[b], torch.from_numpy(g10[f"getam_start{start}_b{b}"][0]), 1e-5)


def test_golden_pamr(g10, golden_rules):
    rules = golden_rules("irn/rules")
    image = torch.from_numpy(rules.rgb_image(140, 40, 48)).permute(2, 0, 1).float()
    assert close(pamr(image, torch.from_numpy(rules.cam_map(141, 2, 10, 12))), torch.from_numpy(g10["pamr_out"]), 1e-5)


# ---- class maps

@pytest.mark.parametrize("stop_grad", ("input", "none"))
def test_conformer_equals_the_whole_matrix(stop_grad):
    net, x = mini(stop_grad=stop_grad), torch.randn(2, 3, 32, 48)
    assert net.depth == 3
    for start in (0, 1, 2):
        want = oracle(lambda x: net(x)[1], x, [0, 3], start, 1, True, (4, 6))
        for batched in (False, True): assert close(getam_maps(net, x, [0, 3], start_layer=start, batched=batched), want)
    assert torch.equal(getam_maps(net, x, [3]), getam_maps(net, x, [3], start_layer=1))  # the second half of 3 blocks
    assert want.max() > 0


def test_images_of_a_batch_do_not_meet():
    net, x = mini(), torch.randn(2, 3, 32, 32)
    both = getam_maps(net, x, [1, 2])
    for b in (0, 1): assert close(getam_maps(net, x[b:b + 1], [1, 2]), both[b:b + 1])


VITS = [("deit_tiny_distilled_patch16_224", {}, 2, True), ("vit_small_patch14_reg4_dinov2", {}, 5, True),
        ("vit_base_r50_s16_384", dict(embed_dim=96, num_heads=3, dynamic_img_size=True), 1, True),
        ("vit_little_patch16_reg4_gap_256", {}, 4, False), ("eva02_tiny_patch14_224", {}, 1, True),
        ("beit_base_patch16_224", dict(img_size=(32, 48), embed_dim=96, num_heads=3), 1, True)]


@pytest.mark.parametrize("name, options, prefix, has_class", VITS, ids=[v[0] for v in VITS])
def test_vits_of_timm(name, options, prefix, has_class):
    torch.manual_seed(0)
    vit = timm.create_model(name, depth=2, num_classes=4, **(options or dict(dynamic_img_size=True))).eval()
    for p in vit.parameters():
        if p.ndim > 1: p.data.add_(.02 * torch.randn_like(p))
    s = vit.patch_embed.feat_ratio()
    x, cfg = torch.randn(2, 3, 2 * s, 3 * s), vit.pretrained_cfg
    mean, std, m, d = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225), cfg["mean"], cfg["std"]))
    want = oracle(lambda x: vit((x * std + mean - m) / d), x, [1, 2], 0, prefix, has_class, (2, 3))
    assert want.shape == (2, 2, 2, 3) and want.max() > 0
    for fused in (True, False):  # with the kernel, and as with TIMM_FUSED_ATTN=0
        for b in vit.blocks: b.attn.fused_attn = fused
        assert close(getam_maps(vit, x, [1, 2], start_layer=0), want)


def test_two_branch_needs_its_vit_only():
    torch.manual_seed(1)
    net = TwoBranch("test_resnet", "deit_tiny_distilled_patch16_224", 4, depth=2).eval()
    x = torch.randn(1, 3, 32, 48)
    want = oracle(lambda x: net(x)[1], x, [0, 2], 1, 2, True, (2, 3))
    net.cnn.forward_features = None  # calling it would fail
    assert close(getam_maps(net, x, [0, 2]), want)


def test_network_is_left_as_it_was():
    net, x = mini(), torch.randn(1, 3, 32, 32)
    net.cls_token.requires_grad_(False)
    before = {n: (id(t), t.requires_grad, t.clone()) for n, t in [*net.named_parameters(), *net.named_buffers()]}
    for inner in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with inner(): maps = getam_maps(net, x, [0])
        assert not maps.requires_grad
    with pytest.raises(ValueError): getam_maps(net, x * torch.nan, [0])
    for n, t in [*net.named_parameters(), *net.named_buffers()]:
        assert (id(t), t.requires_grad) == before[n][:2] and torch.equal(t, before[n][2]) and t.grad is None
    assert not net.training


def test_early_blocks_leave_no_graph():
    "What waits for the backward pass shrinks with start_layer, and is far less than whole matrices"
    net, x = mini(), torch.randn(1, 3, 128, 128)

    def kept(run):
        sizes = {}
        def keep(t): sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = run()
        return sum(sizes.values()), out

    def whole():
        with WriteOut(): return net(x)[1]
    late, mid, early, all_ = (kept(f)[0] for f in (lambda: module._run(net, x, 2), lambda: module._run(net, x, 1), lambda: module._run(net, x, 0), whole))
    assert late < mid < early < .5 * all_


# ---- refusals

@pytest.mark.parametrize("make, message", [
    (lambda: CamNet("test_resnet", 4).eval(), "CamNet has no attention between patches"),
    (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, depths=(1, 1, 1, 1)).eval(), "has no attention between patches"),
    (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).eval(), "num_classes=0"),
    (lambda: TwoBranch("test_resnet", "vit_small_patch14_dinov2", None, depth=1, img_size=28).eval(), "train its head"),
    (lambda: mini().half(), "half precision"), (lambda: mini().bfloat16(), "half precision"), (lambda: mini().train(), "training mode")])
def test_models_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message): getam_maps(make(), torch.randn(1, 3, 32, 32), [0])


def test_bad_arguments_are_named():
    net, x, s = mini(), torch.randn(1, 3, 32, 32), scene()
    for classes in ([4], [-1], []):
        with pytest.raises(ValueError, match="give at least one of 0 to 3"): getam_maps(net, x, classes)
    for start in (-1, 3):
        with pytest.raises(ValueError, match="3 blocks"): getam_maps(net, x, [0], start_layer=start)
    with pytest.raises(ValueError, match="NaN"): getam_maps(net, x * torch.nan, [0])
    with pytest.raises(ValueError, match="prenorm='min'"): getam_views(net, s.image, [0], prenorm="min")
    image, m = torch.rand(3, 8, 8), torch.rand(1, 4, 4)
    for bad in (dict(iterations=-1), dict(dilations=()), dict(dilations=(0, 2))):
        with pytest.raises(ValueError, match="at least"): pamr(image, m, **bad)
        with pytest.raises(ValueError, match="at least"): getam_views(net, s.image, [0], **bad)


# ---- PAMR

def naive_pamr(image, m, iterations, dilations):
    H, W = m.shape
    at = lambda y, x: (min(max(y, 0), H - 1), min(max(x, 0), W - 1))
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for _ in range(iterations):
        new = np.zeros((H, W))
        for y in range(H):
            for x in range(W):
                all_ = np.stack([image[(slice(None), *at(y + a, x + b))] for a, b in steps])            # (9D,3)
                near = [at(y + a, x + b) for a, b in steps if a or b]
                z = np.array([-np.mean(np.abs(image[:, y, x] - image[:, i, j]) / (1e-8 + .1 * all_.std(0, ddof=1))) for i, j in near])
                w = np.exp(z - z.max())
                new[y, x] = sum(a * m[i, j] for a, (i, j) in zip(w / w.sum(), near))
        m = new
    return m


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(2, 6), st.sampled_from([(1,), (1, 2), (3, 1)]))
def test_pamr_equals_loops(seed, h, w, dilations):
    r = np.random.default_rng(seed)
    image, m = r.integers(0, 256, (3, h, w)).astype(np.float64), r.random((h, w))
    got = pamr(torch.from_numpy(image), torch.from_numpy(m)[None], 2, dilations)[0]
    assert np.allclose(got, naive_pamr(image, m, 2, dilations), atol=1e-6)


def test_pamr_on_a_flat_picture_is_a_mean_and_keeps_constants():
    flat, m = torch.full((3, 9, 9), 7.), torch.rand(1, 9, 9)
    assert torch.allclose(pamr_weights(flat, (1,)), torch.tensor(1 / 8), atol=1e-6)
    mean = F.avg_pool2d(F.pad(m[None], (1,) * 4, mode="replicate"), 3, 1)[0] * 9 / 8 - m / 8
    assert torch.allclose(pamr(flat, m, 1, (1,)), mean, atol=1e-6)
    image = 255 * torch.rand(3, 9, 9)
    assert torch.allclose(pamr(image, torch.full((1, 3, 3), .4)), torch.tensor(.4), atol=1e-5)


def test_pamr_without_iterations_resizes_corner_on_corner():
    m = torch.rand(2, 3, 4)
    got = pamr(torch.rand(3, 9, 13), m, 0)
    assert torch.allclose(got[:, ::4, ::4], m, atol=1e-6)


def test_pamr_does_not_cross_an_edge():
    image = torch.zeros(3, 16, 16); image[:, :, 8:] = 255
    m = torch.zeros(1, 16, 16); m[:, :, :8] = 1
    out = pamr(image, m)
    assert out[0, :, :8].min() > .99 and out[0, :, 8:].max() < .01


# ---- views and seeds

def test_views_are_one_stack_per_scale_or_one_refined():
    net, s = mini(), scene()
    keys = [1, 2]
    plain = getam_views(net, s.image, keys, scales=(1., .5), flip=True, iterations=0)
    assert [tuple(v.shape) for v in plain] == [(2, 8, 8), (2, 4, 4)]
    rgb = torch.from_numpy(s.image).permute(2, 0, 1).float()
    (once,) = getam_views(net, s.image, keys, scales=(1., .5), flip=True)
    assert once.shape == (2, 64, 64) and close(once, sum(pamr(rgb, v) for v in plain), 1e-4)
    assert torch.allclose(plain[0].amax((1, 2)), torch.ones(2))
    raw = getam_views(net, s.image, keys, scales=(1., .5), iterations=0, prenorm="none")
    assert torch.allclose(torch.stack([v.amax((1, 2)) for v in raw]).amax(0), torch.ones(2))


def test_flip_adds_the_mirrored_map():
    net, s = mini(), scene()
    x = to_tensor(s.image)[None]
    want = getam_maps(net, x, [0])[0] + getam_maps(net, x.flip(-1), [0])[0].flip(-1)
    assert close(getam_views(net, s.image, [0], flip=True, iterations=0)[0], want / want.max())
    a, b = (getam_views(net, i, [0], flip=True)[0] for i in (s.image, s.image[:, ::-1].copy()))
    assert close(a, b.flip(-1), 1e-3)  # a mirrored picture has a mirrored map


@pytest.mark.parametrize("size_mode", ("round", "pad", "pad16", "square"))
@pytest.mark.parametrize("iterations", (0, 2))
def test_sizes_that_do_not_fit(size_mode, iterations):
    net, image = mini(), scene().image[:45, :61]
    label = np.array([1, 0, 1, 0], np.float32)
    seed = extract(net, image, label, "getam", size_mode=size_mode, scales=(1., 1.5), flip=True, iterations=iterations)
    assert seed.high_res.shape == (2, 45, 61) and seed.cam.shape == (2, 12, 16)
    assert np.isfinite(seed.high_res).all() and seed.high_res.max() > .99


def test_padding_is_cut_before_the_maps_meet():
    net, image = mini(), scene().image[:44, :60]  # 6 x 8 tokens; 4 pixels of padding at each side, half a token: kept
    (m,) = getam_views(net, image[:43], [1], size_mode="pad", iterations=0)
    assert m.shape == (1, 6, 8) and torch.equal(m[:, 5], m[:, 4])  # the last row shows mostly padding: the row above stands in


def test_tiny_maps_reach_one():
    "Entries of 1e-6 and smaller must survive IRN's division by maximum + 1e-5"
    net, s = mini(), scene()
    with torch.no_grad(): net.trans_cls_head.weight.mul_(1e-4)
    assert 0 < getam_maps(net, to_tensor(s.image)[None], [1]).max() < 1e-5
    label = np.array([0, 1, 0, 0], np.float32)
    for iterations in (0, 10): assert extract(net, s.image, label, "getam", iterations=iterations).high_res.max() > .999


def test_a_map_of_zeros_stays_zero():
    net, s = mini(), scene()
    with torch.no_grad(): net.trans_cls_head.weight[2] = 0
    (m,) = getam_views(net, s.image, [1, 2])
    assert m[0].max() > .5 and not m[1].any() and merge([m], (64, 64))[1].isfinite().all()


def test_getam_has_the_shape_of_the_design():
    net, s = mini(), scene()
    label = np.array([0, 1, 1, 0], np.float32)
    maps = getam(net, s.image, label)
    assert maps.shape == (4, 16, 16) and maps.dtype == torch.float32 and 0 <= maps.min() and maps.max() <= 1
    assert not maps[[0, 3]].any() and maps[[1, 2]].amax((1, 2)).min() > .9
    assert torch.equal(maps, class_maps("getam", net, s.image, label))
    assert not getam(net, s.image, label, classes=[2])[1].any()
    with pytest.raises(ValueError, match="not in the image's label"): getam(net, s.image, label, classes=[0])
    with pytest.raises(ValueError, match="empty"): getam(net, s.image, 0 * label)
    with pytest.raises(ValueError, match="no option 'start'"): getam(net, s.image, label, start=1)
    with pytest.raises(ValueError, match="precision"): extract(net, s.image, label, "getam", precision="bf16")


def test_a_plain_vit_is_enough():
    vit = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=4, dynamic_img_size=True).eval()
    for mode in ("round", "square"): assert getam(vit, scene().image, np.array([0, 1, 0, 0]), size_mode=mode)[1].max() > .9


def test_options_are_keywords_with_defaults():
    p = inspect.signature(getam_views).parameters
    assert list(p)[:3] == ["model", "image", "keys"]
    assert all(v.kind is v.KEYWORD_ONLY and v.default is not v.empty for v in list(p.values())[3:])


def test_data_set_is_extracted_and_resumed(tmp_path):
    ds = Scenes("val", 2, 64)
    torch.manual_seed(0)
    net = conformer_mini(**SIZES).eval()
    first = extract_dataset(net, ds, tmp_path, "getam", start_layer=1, iterations=2, dilations=(1, 2), progress=False)
    again = extract_dataset(net, ds, tmp_path, "getam", start_layer=1, iterations=2, dilations=(1, 2), progress=False)
    assert (first["computed"], again["computed"], again["cached"]) == (2, 0, 2)
    seed, s = load_seed(tmp_path / f"{ds.ids[0]}.npz"), ds[0]
    want = extract(net, s.image, s.label, "getam", start_layer=1, iterations=2, dilations=(1, 2))
    assert np.allclose(seed.cam, want.cam, atol=1e-6)
    with pytest.raises(ValueError, match="other settings"): extract_dataset(net, ds, tmp_path, "getam", start_layer=0, progress=False)


def test_trained_network_tells_two_classes_apart():
    "On a scene with a horse and a bird (val 3) more of each map lies on its own object than on the other"
    net, s = conformer_mini(checkpoint=checkpoint_path(0)).eval(), Scenes("val", 4)[3]
    keys = s.label.nonzero()[0].tolist()
    maps = extract(net, s.image, s.label, "getam", start_layer=2).high_res
    on = np.array([[m[s.mask == c + 1].sum() / m.sum() for c in keys] for m in maps])
    assert len(keys) == 2 and on[0, 0] > on[0, 1] and on[1, 1] > on[1, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same():
    net, s = mini(), scene()
    cpu, gpu = getam(net, s.image, [0, 1, 0, 0]), getam(net.cuda(), s.image, [0, 1, 0, 0])
    assert torch.allclose(cpu, gpu.cpu(), atol=1e-3)
