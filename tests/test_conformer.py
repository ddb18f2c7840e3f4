"""adcam.conformer against the numbers of the official implementation, and its switches and errors."""
import json, os
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch
from conftest import load_script
from hypothesis import given, settings, strategies as st
from torch import nn

from adcam.conformer import (Conformer, STOP_GRAD, VARIANTS, Variant, conformer_base, conformer_mini, conformer_small,
                             conformer_tiny, load_checkpoint, load_pretrained)

GOLDEN = Path(os.environ.get("ADCAM_GOLDEN", Path(__file__).parent/"golden"))
FILES = sorted(GOLDEN.glob("conformer_*_*x*.npz"))
TINY = dict(channels=(16, 32), depths=(2, 3), embed_dim=24, stem_width=8)
VARIANT_OF = dict(ti="tiny", s="small", b="base")


@cache
def rules():
    return load_script(GOLDEN/"rules_conformer.py")


@cache
def filled(key, shape): return torch.from_numpy(np.asarray(rules().tensor(key, shape)))


def by_rule(size, dtype, **switches):
    model = Conformer(VARIANTS[size], 1000, conv_head_bias=True, **switches).to(dtype).eval()
    model.load_state_dict({k: filled(k, tuple(v.shape)) for k, v in model.state_dict().items()})
    return model


def stats(a): return np.array([a.mean(), a.std(), np.linalg.norm(a), np.abs(a).sum(), a.min(), a.max()])


def stack(values): return np.stack([np.asarray(v) for v in values])


@torch.no_grad()
def everything(size, x):
    "Every array of a golden file, under its name there"
    dtype, w = x.dtype, x.shape[3]//16
    model = by_rule(size, dtype, last_block="keep")
    stem = model.stem(x).numpy()
    out = dict(stem_stats=stats(stem), stem_slice=stem[0, :8, :4, :4])
    steps = [(s.conv.numpy(), s.tokens.numpy(), s.attn.numpy()) for s in model.walk(x, attention=True)]
    features = model.features(x)  # by the fused attention kernel, as in forward
    conv, trans = model.heads(*features)
    out |= dict(conv_logits=conv.numpy(), trans_logits=trans.numpy())
    out |= dict(x_shapes=stack(c.shape for c, _, _ in steps), x_stats=stack(stats(c) for c, _, _ in steps),
                x_probe=stack(c[0, :8, c.shape[2]//2, 1] for c, _, _ in steps), x11_slice=steps[10][0][0, :4], x12_slice=steps[11][0][0, :8])
    out |= dict(t_cls_stats=stack(stats(t[:, 0]) for _, t, _ in steps), t_patch_stats=stack(stats(t[:, 1:]) for _, t, _ in steps),
                t_cls_probe=stack(t[0, 0, :8] for _, t, _ in steps), t_patch_probe=stack(t[0, 1+w+2, :8] for _, t, _ in steps),
                tokens_normed_slice=features[1][0, :, :4].numpy())
    attn = stack(a[0] for _, _, a in steps)
    out |= dict(attn_cls_row=attn[:, 0], attn_recv=attn.mean(1), attn_diag=attn.diagonal(axis1=1, axis2=2), attn_row_1_2=attn[:, 1+w+2],
                attn_block_sq=stack((a**2).sum() for _, _, a in steps), attn_mean11=attn[:11].mean(0), attn_mean11_row_1_2=attn[:11].mean(0)[1+w+2])
    maps = by_rule(size, dtype, last_block="drop").maps(x)
    out |= dict(drop12_conv_logits=maps.conv_logits.numpy(), drop12_trans_logits=maps.trans_logits.numpy(), drop12_cam20_raw=maps.cam[:, :20].numpy())
    model = by_rule(size, dtype, last_block="stride1")
    x12, maps = model.features(x)[0].numpy(), model.maps(x)
    cam, A = maps.cam[0, :20].numpy(), maps.attn[0].sum(0)[1:, 1:].numpy()
    flat = cam.reshape(20, -1).T
    out |= dict(stride1_x12_stats=stats(x12), stride1_x12_slice=x12[0, :4], stride1_conv_logits=maps.conv_logits.numpy(), stride1_cam20_raw_s0=cam,
                stride1_transcam20_s0=(A @ flat).T.reshape(cam.shape), stride1_attnagg20_s0=(A.T @ flat).T.reshape(cam.shape))
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_golden_forward(path, dtype):
    want = np.load(path, allow_pickle=False)
    _, size, dims = path.stem.split("_")
    h, w = map(int, dims.split("x"))
    image = rules().image(len(want["conv_logits"]), h, w)
    assert np.array_equal(image.ravel()[:8], want["input_first8"]), "the fill rule differs, not the network"
    got = everything(VARIANT_OF[size], torch.from_numpy(image).to(dtype))
    names = [k for k in want.files if not k.startswith(("sentinel__", "input_"))]
    assert set(names) <= set(got), "a golden array is not checked"
    for k in names:
        limit = 2e-5 if dtype==torch.float32 else 1e-9 if want[k].dtype==np.float64 and dims=="224x224" else 1e-6
        if want[k].dtype==np.int64: assert np.array_equal(got[k], want[k]), k
        else: assert np.abs(got[k]-want[k]).max() <= limit*np.abs(want[k]).max(), k


@pytest.mark.parametrize("path", FILES[:1], ids=lambda p: p.stem)
def test_golden_sentinels(path):
    want = np.load(path, allow_pickle=False)
    state = by_rule("tiny", torch.float32, last_block="keep").state_dict()
    for k in (k for k in want.files if k.startswith("sentinel__")):
        assert np.array_equal(state[k.removeprefix("sentinel__")].flatten()[:4].numpy(), want[k]), k


@pytest.fixture
def shapes_only(monkeypatch):
    "Build networks without memory and start values"
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda t, **kw: t)
    with torch.device("meta"): yield


@pytest.mark.parametrize("short,make", [("ti", conformer_tiny), ("s", conformer_small), ("b", conformer_base)])
def test_manifest(short, make, shapes_only):
    manifest = json.loads((GOLDEN/f"conformer_{short}_manifest.json").read_text())
    state = make(1000, last_block="keep", conv_head_bias=True).state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()]==list(manifest.items())


def test_parameter_counts(shapes_only):
    model, no_bias = conformer_small(20, conv_head_bias=True), conformer_small(20)
    published = [sum(p.numel() for p in f(1000, last_block="keep", conv_head_bias=True).parameters())
                 for f in (conformer_tiny, conformer_small, conformer_base)]
    assert published==[23_524_704, 37_673_424, 83_289_136]
    count = {n: p.numel() for n, p in model.named_parameters()}
    groups = {g: sum(count[n] for n in names) for g, names in model.param_groups().items()}
    assert groups==dict(vit=20_498_324, cnn=10_535_316) and sum(count.values())==31_033_640
    assert sum(p.numel() for p in no_bias.parameters())==31_033_640-20


def test_mini_fits_the_package():
    model = conformer_mini()
    assert (model.stride, model.num_classes)==(8, 10)
    assert 6*2*sum(p.numel() for p in model.parameters()) < 12e6  # six files in float16


@pytest.mark.parametrize("make", [conformer_small, conformer_mini])
def test_norm_eps(make, shapes_only):
    model = make(last_block="keep")
    eps = {n: m.eps for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))}
    assert eps.pop("bn1")==eps.pop("trans_norm")==1e-5 and set(eps.values())=={1e-6}


def test_attention_rows_and_fused_kernel():
    model, x = conformer_mini(**TINY).eval(), torch.randn(2, 3, 48, 80)
    with torch.no_grad(): maps, (conv, trans) = model.maps(x), model(x)
    assert maps.attn.shape==(2, 4, 61, 61) and maps.cam.shape==(2, 10, 6, 10)
    torch.testing.assert_close(maps.attn.sum(-1), torch.ones(2, 4, 61))
    torch.testing.assert_close((maps.conv_logits, maps.trans_logits), (conv, trans), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps.cam.mean((2, 3)), conv, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last_block,blocks,side", [("drop", 4, 8), ("stride1", 5, 8), ("keep", 5, 4)])
def test_last_block(last_block, blocks, side):
    maps = conformer_mini(last_block=last_block, **TINY).maps(torch.randn(1, 3, 64, 64))
    assert maps.attn.shape[1]==blocks and maps.cam.shape[2:]==(side, side)


# ---- stop-gradient

def reached(model, x, branch):
    "Names of the parameters that the loss of one branch reaches"
    model.zero_grad()
    model(x)[branch].square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max()>0}


def model_and_image(stop_grad, **kw):
    torch.manual_seed(0)
    return conformer_mini(3, stop_grad=stop_grad, **TINY, **kw), torch.randn(2, 3, 32, 32)


def test_stop_grad_input_separates_the_branches():
    model, x = model_and_image("input")
    groups, stem = {k: set(v) for k, v in model.param_groups().items()}, {"conv1.weight", "bn1.weight", "bn1.bias"}
    cnn, vit = reached(model, x, 0), reached(model, x, 1)
    assert not cnn & groups["vit"] and vit & groups["cnn"]==stem
    assert any("expand_block" in n for n in cnn) and any("squeeze_block" in n for n in vit)
    assert cnn | vit==set(dict(model.named_parameters()))  # everything is trained by some loss


def test_stem_grad_cnn_only():
    model, x = model_and_image("input", stem_grad="cnn_only")
    assert not reached(model, x, 1) & set(model.param_groups()["cnn"])


def test_stop_grad_output_silences_the_bridges():
    model, x = model_and_image("output")
    assert not any("squeeze" in n or "expand" in n for n in reached(model, x, 0) | reached(model, x, 1))


@pytest.mark.parametrize("stop_grad,cnn_to_vit,vit_to_cnn", [("none", True, True), ("only_down", True, False), ("only_up", False, True)])
def test_one_direction(stop_grad, cnn_to_vit, vit_to_cnn):
    model, x = model_and_image(stop_grad)
    assert any("trans_block" in n for n in reached(model, x, 0))==cnn_to_vit
    assert any("cnn_block" in n for n in reached(model, x, 1))==vit_to_cnn


def test_class_token_gradient_is_not_halved():
    grads = []
    for cut in STOP_GRAD:
        model, x = model_and_image(cut)
        block = model.eval().conv_trans_2.squeeze_block
        t = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (block(torch.ones(1, 4, 8, 8), t) + t)[:, 0].sum().backward()
        grads.append(t.grad)
    assert all(torch.equal(g[:, 0], torch.full((1, 24), 2.)) and not g[:, 1:].any() for g in grads)


def test_forward_is_the_same_for_every_setting():
    outs = []
    for cut in STOP_GRAD:
        model, x = model_and_image(cut)
        outs.append(torch.cat(model(x)))
        model.set_stop_grad("none")
        model.set_stop_grad(cut)
        assert model.stop_grad==cut
    assert all(torch.equal(o, outs[0]) for o in outs)


# ---- sizes and switches

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70))
def test_every_size_works_or_says_what_fits(h, w):
    model, x = _sizes_model(), torch.zeros(1, 3, h, w)
    fits = all((n+3)//4 % 2==0 for n in (h, w))
    if fits: assert model(x)[0].shape==(1, 10)
    else:
        with pytest.raises(ValueError, match="multiples of 8"): model(x)


@cache
def _sizes_model(): return conformer_mini(**TINY).eval()


def test_stem_without_pooling():
    model = conformer_mini(stem_stride=2, **TINY)
    assert model.stride==4 and model.maps(torch.randn(1, 3, 32, 24)).cam.shape[2:]==(8, 6)


def test_drop_path_rises_to_the_undropped_end():
    model = conformer_mini(drop_path=0.4, **TINY)  # 5 blocks, the last one dropped
    rates = [model.trans_1.drop_path.drop_prob] + [b.trans_block.drop_path.drop_prob for b in model.coupled_blocks()]
    assert np.allclose(rates, [0, .1, .2, .3])


@pytest.mark.parametrize("bad,words", [
    (dict(stop_grad="both"), "'both'; it must be one of none, input"), (dict(last_block="cut"), "'cut'; it must be one of drop"),
    (dict(stem_grad="vit"), "cnn_only"), (dict(drop_path=1.), "below 1"), (dict(heads=5), "over 5 heads"), (dict(patch=3), "patch 3"),
    (dict(channels=(10, 32)), "multiples of 4"), (dict(depths=(2,)), "same stages"), (dict(stem_stride=3), "stem_stride is 3")])
def test_bad_settings(bad, words):
    with pytest.raises(ValueError, match=words): conformer_mini(**bad)


@pytest.mark.parametrize("x,words",
                         [(torch.zeros(3, 32, 32), r"x\[None\]"), (torch.zeros(1, 1, 32, 32), r"\(B,3,H,W\)"), (torch.zeros(1, 3, 32, 32).byte(), "to_tensor")])
def test_bad_input(x, words):
    with pytest.raises(ValueError, match=words): _sizes_model()(x)


# ---- files

def save(model, path, wrap=None, dtype=None):
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({wrap: state} if wrap else state, path)
    return path


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_load_round_trip(tmp_path, wrap):
    source = conformer_mini(4, last_block="keep", **TINY)
    path = save(source, tmp_path/"w.pth", wrap)
    same = conformer_mini(4, last_block="keep", checkpoint=path, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), source.state_dict().values()))
    dropped = load_checkpoint(conformer_mini(4, **TINY), path)  # the dropped block in the file is fine
    assert torch.equal(dropped.cls_token, source.cls_token)


def test_float16_is_upcast(tmp_path):
    path = save(conformer_mini(4, **TINY), tmp_path/"w.pth", dtype=torch.float16)
    assert {p.dtype for p in load_checkpoint(conformer_mini(4, **TINY), path).parameters()}=={torch.float32}


def test_mmpretrain_names(tmp_path):
    source, port = conformer_mini(4, **TINY), {}
    for k, v in source.state_dict().items():
        for old, new in ((".norm1.", ".ln1."), (".norm2.", ".ln2."), (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1.")):
            k = k.replace(old, new)
        port["head."+k if "cls_head" in k else "backbone."+k] = v
    torch.save(dict(state_dict=port), tmp_path/"mm.pth")
    model = load_checkpoint(conformer_mini(4, **TINY), tmp_path/"mm.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


@pytest.mark.parametrize("file,model,words", [
    (dict(num_classes=4), dict(num_classes=5), "knows 4 classes, the model 5; use load_pretrained"),
    (dict(num_classes=4, patch=4), dict(num_classes=4), "patches are 16 pixels wide, the model's 8"),
    (dict(num_classes=4, embed_dim=48), dict(num_classes=4), "tokens are 48 wide, the model's 24"),
    (dict(num_classes=4), dict(num_classes=4, last_block="keep"), "lacks the last block; build the model with last_block='drop'"),
    (dict(num_classes=4, conv_head_bias=True), dict(num_classes=4), "conv_head_bias"),
    (dict(num_classes=4, depths=(3, 3)), dict(num_classes=4), "another network")])
def test_wrong_checkpoint(tmp_path, file, model, words):
    path = save(conformer_mini(**{**TINY, **file}), tmp_path/"w.pth")
    with pytest.raises(ValueError, match=words): load_checkpoint(conformer_mini(**{**TINY, **model}), path)


def test_wrong_variant_is_named(tmp_path):
    path = save(conformer_mini(), tmp_path/"w.pth")
    with pytest.raises(ValueError, match="size 'mini'; build the model with conformer_mini"): load_checkpoint(conformer_mini(**TINY), path)


def test_unreadable_files(tmp_path):
    model = conformer_mini(4, **TINY)
    with pytest.raises(FileNotFoundError, match="nowhere"): load_checkpoint(model, tmp_path/"nowhere.pth")
    for name, data in (("a.pth", b""), ("b.pth", b"garbage"), ("c.safetensors", b"1234")):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match="not a readable weights file"): load_checkpoint(model, tmp_path/name)
    torch.save(dict(epoch=3), tmp_path/"d.pth")
    with pytest.raises(ValueError, match="holds no state_dict"): load_checkpoint(model, tmp_path/"d.pth")


class _Evil:
    def __reduce__(self): return (os.system, ("true",))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(_Evil(), tmp_path/"evil.pth")
    with pytest.raises(ValueError, match="tensors only"): load_checkpoint(conformer_mini(4, **TINY), tmp_path/"evil.pth")


def test_load_pretrained_reports_what_it_left(tmp_path):
    source = conformer_mini(4, conv_head_bias=True, last_block="keep", **TINY)
    path, model = save(source, tmp_path/"w.pth", "model"), conformer_mini(6, **TINY)
    head = model.trans_cls_head.weight.clone()
    assert load_pretrained(model, path)==["conv_cls_head.bias", "conv_cls_head.weight", "trans_cls_head.bias", "trans_cls_head.weight"]
    assert torch.equal(model.trans_cls_head.weight, head) and torch.equal(model.conv1.weight, source.conv1.weight)
    same = conformer_mini(4, **TINY)
    assert load_pretrained(same, path)==["conv_cls_head.bias"] and torch.equal(same.conv_cls_head.weight, source.conv_cls_head.weight)


def test_load_pretrained_is_strict_about_the_body(tmp_path):
    path = save(conformer_mini(4, **{**TINY, "embed_dim": 48}), tmp_path/"w.pth")
    with pytest.raises(ValueError, match="tokens are 48 wide"): load_pretrained(conformer_mini(6, **TINY), path)


def test_variant_defaults_are_small(): assert VARIANTS["small"]==Variant()
