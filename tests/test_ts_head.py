"""TS-CAM's patch head on the Conformer, and TS-CAM and TransCAM made from its maps."""
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from adcam.cam import crop_maps, normalize, trans_cam, ts_cam
from adcam.classifier import HEADS, HeadsConfig, TrainConfig, cached_features, freeze_backbone, save_weights, train, train_heads
from adcam.conformer import Conformer, PatchHead, VARIANTS, conformer_mini, load_checkpoint, load_pretrained
from adcam.scenes import Scenes
from adcam.seeds import extract, extract_dataset

TINY = dict(channels=(16, 32), depths=(1, 2), embed_dim=24, stem_width=8)
GOLDEN = Path(os.environ.get("ADCAM_GOLDEN", Path(__file__).parent/"golden"))


def patchy(K=10, **kw):
    torch.manual_seed(0)
    return conformer_mini(K, trans_head="patch", **TINY, **kw)


@cache
def patchy_eval(last_block): return patchy(3, last_block=last_block).eval()


# ---- the head

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
def test_logits_are_the_means_of_the_maps(h, w, B):
    head, grid = PatchHead(6, 4), torch.randn(B, 6, h, w)
    torch.testing.assert_close(head(head.windows(grid)), head.maps(grid).mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_maps_are_a_padded_3x3_convolution():
    head, grid = PatchHead(2, 1).double(), torch.randn(1, 2, 3, 4).double()
    padded, out = F.pad(grid[0], (1, 1, 1, 1)), head.maps(grid)[0, 0]
    for i in range(3):
        for j in range(4): assert abs(out[i, j]-(head.weight[0]*padded[:, i:i+3, j:j+3]).sum()-head.bias[0]) < 1e-12


@pytest.mark.parametrize("last_block", ["drop", "stride1", "keep"])
@torch.no_grad()
def test_semantic_maps_stand_on_the_token_grid(last_block):
    model, x = patchy_eval(last_block), torch.randn(2, 3, 48, 77)  # 77: the stem rounds up to 80
    maps, logits = model.maps(x, reduce="mean", layers=1), model(x)
    assert maps.semantic.shape==(2, 3, 6, 10) and maps.attn.shape[-1]==61
    torch.testing.assert_close(maps.semantic.mean((2, 3)), maps.trans_logits)
    torch.testing.assert_close(logits, (maps.conv_logits, maps.trans_logits), rtol=1e-4, atol=1e-5)
    tokens = model.trans_norm([s.tokens for s in model.walk(x)][-1])[:, 1:]        # row by row, 10 to a row
    by_hand = F.conv2d(tokens.reshape(2, 6, 10, 24).permute(0, 3, 1, 2), model.trans_cls_head.weight, model.trans_cls_head.bias, padding=1)
    torch.testing.assert_close(maps.semantic, by_hand, rtol=1e-4, atol=1e-5)


def test_the_class_token_head_is_as_before():
    model, x = conformer_mini(3, **TINY).eval(), torch.randn(1, 3, 32, 32)
    assert model.trans_head=="token" and isinstance(model.trans_cls_head, torch.nn.Linear)
    maps = model.maps(x)
    assert maps.semantic is None and maps._replace(cam=maps.cam).semantic is None
    names = list(model.state_dict())
    assert list(patchy(3).state_dict())==names and patchy(3).trans_cls_head.weight.shape==(3, 24, 3, 3)
    assert patchy(3).param_groups()==conformer_mini(3, **TINY).param_groups()


def test_unknown_head():
    with pytest.raises(ValueError, match="trans_head is 'cls'; it must be one of token, patch"): conformer_mini(trans_head="cls")


def test_start_values():
    head = Conformer(VARIANTS["mini"], 10, trans_head="patch").trans_cls_head
    assert not head.bias.any() and .01 < head.weight.std() < .03


# ---- training

def test_gradients_stay_in_their_branch():
    model, x = patchy(3), torch.randn(2, 3, 32, 32)
    conv, trans = model(x)
    trans.square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max()>0}
    assert {"trans_cls_head.weight", "trans_cls_head.bias"} <= reached
    assert not {n for n in reached if n.split(".")[0] not in ("conv1", "bn1")} & set(model.param_groups()["cnn"])


def test_it_trains_like_any_other():
    model, ds = patchy(), Scenes("train", 4)
    before = model.trans_cls_head.weight.clone()
    rows = train(model, ds, TrainConfig(epochs=1, batch=2, crop=32, resize=(40, 48)), progress=False)
    assert len(rows)==2 and all(np.isfinite(r["loss"]) for r in rows) and not torch.equal(before, model.trans_cls_head.weight)


def test_frozen_backbone_and_heads_alone():
    model, ds = patchy(), Scenes("train", 6)
    assert freeze_backbone(model)==[n for n, _ in model.named_parameters() if n.split(".")[0] in HEADS]
    model.requires_grad_(True)
    f = cached_features(model, ds, 64, progress=False)
    assert f.token.shape==(6, 9*24)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = train_heads(model, f, HeadsConfig(steps=20))
    assert rows[-1]["trans"] < rows[0]["trans"]
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed==set(HEADS)
    with torch.no_grad():  # the features stand for the images: same logits
        x = torch.randn(2, 3, 64, 64)
        conv, windows = model.features(x)
        torch.testing.assert_close(model.heads(conv.mean((2, 3), keepdim=True), windows[:, :1]), model(x))


# ---- files

def test_round_trip_and_errors_in_words(tmp_path):
    model, plain = patchy(4), conformer_mini(4, **TINY)
    files = dict(patch=save_weights(model, tmp_path/"patch.safetensors"), token=save_weights(plain, tmp_path/"token.safetensors"))
    same = patchy(4, checkpoint=files["patch"])
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="trans_head='patch'"): load_checkpoint(plain, files["patch"])
    with pytest.raises(ValueError, match="trans_head='token'"): load_checkpoint(patchy(4), files["token"])
    with pytest.raises(ValueError, match="trans_head='token'"): load_checkpoint(patchy(5), files["token"])
    fresh = patchy(4)
    start = fresh.trans_cls_head.weight.clone()
    assert load_pretrained(fresh, files["token"])==["trans_cls_head.bias", "trans_cls_head.weight"]
    assert torch.equal(fresh.trans_cls_head.weight, start) and torch.equal(fresh.conv_cls_head.weight, plain.conv_cls_head.weight)


# ---- TS-CAM

@pytest.fixture(scope="module")
def maps():
    with torch.no_grad(): return patchy_eval("drop").maps(torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(1)))


def test_ts_cam_by_hand(maps):
    attention = maps.attn[:, :, 0, 1:].sum(1).view(2, 1, 5, 6)
    torch.testing.assert_close(ts_cam(maps, head="patch"), attention*maps.semantic.relu())
    torch.testing.assert_close(ts_cam(maps, head="patch", relu=False), attention*maps.semantic)
    torch.testing.assert_close(ts_cam(maps, head="token"), attention*maps.cam.relu())
    torch.testing.assert_close(ts_cam(maps, head="patch", classes=[2], layers=1), maps.attn[:, -1, 0, 1:].view(2, 1, 5, 6)*maps.semantic[:, 2:].relu())
    stretched = normalize(ts_cam(maps, head="patch", relu=False), "minmax")
    assert stretched.min()==0 and .99 < stretched.max() <= 1
    half = ts_cam(maps, head="patch", prenorm="max")
    torch.testing.assert_close(half, attention*normalize(maps.semantic.relu()))


def test_ts_cam_without_a_patch_head(maps):
    for without in (maps._replace(semantic=None), SimpleNamespace(cam=maps.cam, attn=maps.attn)):
        with pytest.raises(ValueError, match="no patch head; build a Conformer with trans_head='patch'"): ts_cam(without, head="patch")
        assert ts_cam(without).shape==(2, 3, 5, 6)
    with pytest.raises(ValueError, match="head='cls' is unknown: choose one of 'token', 'patch'"): ts_cam(maps, head="cls")


def test_ts_cam_checks_its_own_grid(maps):
    with pytest.raises(ValueError, match="maps.semantic"): ts_cam(maps._replace(semantic=maps.semantic[:1]), head="patch")
    coarse = maps._replace(cam=maps.cam[..., ::2, ::2])  # last_block="keep": the class map of the CNN is coarser, the patch head does not care
    assert ts_cam(coarse, head="patch").shape==(2, 3, 5, 6)
    with pytest.raises(ValueError, match="outside the 3 classes"): ts_cam(maps, head="patch", classes=[3])


def test_padding_is_cut_out_of_semantic_maps(maps):
    for m in (maps, SimpleNamespace(**maps._asdict())):
        cut = crop_maps(m, (4, 3), start=(0, 3))
        assert torch.equal(cut.semantic, maps.semantic[..., :4, 3:]) and cut.attn.shape[-1]==13
        assert ts_cam(cut, head="patch").shape==(2, 3, 4, 3)
    assert crop_maps(maps._replace(semantic=None), (4, 3)).semantic is None


def test_seeds_of_the_patch_head():
    model, s = patchy().eval(), Scenes("val", 1)[0]
    one = extract(model, s.image, s.label, "ts_cam", head="patch")
    assert one.high_res.shape==(int(s.label.sum()), *s.mask.shape) and np.isfinite(one.cam).all()
    with torch.no_grad(): m = model.maps(_view(s.image))
    want = ts_cam(m, head="patch", classes=one.keys.tolist())
    want = F.interpolate(want, s.mask.shape, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(one.high_res, (want/(want.amax((1, 2), keepdim=True)+1e-5)).detach().numpy(), atol=1e-4)


def test_seeds_with_flip():
    "The mirrored view goes through the network in the same batch; its semantic maps must be its own"
    model, s = patchy().eval(), Scenes("val", 1)[0]
    a = extract(model, s.image, s.label, "ts_cam", head="patch", flip=True)
    b = extract(model, s.image[:, ::-1].copy(), s.label, "ts_cam", head="patch", flip=True)
    np.testing.assert_allclose(a.high_res, b.high_res[:, :, ::-1], atol=2e-4)


def _view(image):
    from adcam.data import to_tensor
    return to_tensor(image)[None]


# ---- TransCAM

@pytest.mark.parametrize("size", ["ti"])
def test_trans_cam_golden(size, golden_rules):
    "The coupling of TransCAM on its network (last_block='stride1'), against the official numbers"
    rules, want = golden_rules("rules_conformer"), np.load(GOLDEN/f"conformer_{size}_224x224.npz", allow_pickle=False)
    model = Conformer(VARIANTS["tiny"], 1000, conv_head_bias=True, last_block="stride1").double().eval()
    model.load_state_dict({k: torch.from_numpy(np.asarray(rules.tensor(k, tuple(v.shape)))) for k, v in model.state_dict().items()})
    with torch.no_grad(): maps = model.maps(torch.from_numpy(rules.image(len(want["conv_logits"]), 224, 224)).double())
    maps = maps._replace(cam=maps.cam[:1], attn=maps.attn[:1])
    for direction, name in (("pull", "stride1_transcam20_s0"), ("push", "stride1_attnagg20_s0")):
        ours, theirs = trans_cam(maps, direction=direction, classes=range(20))[0].numpy(), want[name].clip(0)
        assert np.abs(ours-theirs).max() <= 1e-6*np.abs(want[name]).max()
