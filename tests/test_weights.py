"""Published weights: every form of an official file, every wrong file, and any size of input, by the fill rule of the golden numbers."""
import os
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch

from adcam.cam import ad_cam, trans_cam
from adcam.conformer import FCUDown, FCUUp, conformer_mini, conformer_small, conformer_tiny, load_checkpoint, load_pretrained
from test_conformer import GOLDEN, rules

MM = ((".norm1.", ".ln1."), (".norm2.", ".ln2."), (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))


@cache
def official_state():
    "What the official Conformer-Ti file would hold if the fill rule had made it"
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in conformer_tiny(1000, last_block="keep", conv_head_bias=True).state_dict().items()}
    return {k: torch.from_numpy(np.asarray(rules().tensor(k, shape))) for k, shape in shapes.items()}


def mmpretrain(state):
    out = {}
    for k, v in state.items():
        for old, new in MM: k = k.replace(old, new)
        out[("head." if "cls_head" in k else "backbone.") + k] = v
    return out


FORMS = dict(bare=lambda s: s, model=lambda s: dict(model=s, epoch=300), mmpretrain=lambda s: dict(meta={}, state_dict=mmpretrain(s)))


@pytest.fixture(scope="module", params=FORMS)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")/f"{request.param}.pth"
    torch.save(FORMS[request.param](official_state()), path)
    yield path
    path.unlink()


def close(got, want, limit=2e-5): assert np.abs(got.numpy()-want).max() <= limit*np.abs(want).max()


@torch.no_grad()
def test_official_file_gives_the_official_numbers(file):
    "Every form, loaded from disk; each form is checked with one reading of the dropped block, at 224 or 384"
    last_block, side = dict(bare=("keep", 224), model=("drop", 384), mmpretrain=("stride1", 224))[file.stem]
    model = load_checkpoint(conformer_tiny(1000, last_block=last_block, conv_head_bias=True), file).eval()
    want = np.load(GOLDEN/f"conformer_ti_{side}x{side}.npz", allow_pickle=False)
    maps = model.maps(torch.from_numpy(rules().image(len(want["conv_logits"]), side, side)), reduce="mean")
    prefix = dict(keep="", drop="drop12_", stride1="stride1_")[last_block]
    close(maps.conv_logits, want[f"{prefix}conv_logits"])
    if last_block!="stride1": close(maps.trans_logits, want[f"{prefix}trans_logits"])
    if last_block=="drop":
        close(maps.cam[:, :20], want["drop12_cam20_raw"])
        row = 1 + side//16 + 2
        close(maps.attn[0, 0, row], want["attn_mean11_row_1_2"])  # reduced by the network itself
    if last_block=="stride1":
        close(maps.cam[0, :20], want["stride1_cam20_raw_s0"])
        signed = maps._replace(cam=maps.cam[:1, :20], attn=maps.attn[:1])
        close(12*trans_cam(signed)[0], np.maximum(want["stride1_transcam20_s0"], 0))  # the sum over 12 blocks, from their mean


def test_imagenet_file_starts_a_20_class_network(file):
    model = conformer_tiny(20)
    left = load_pretrained(model, file)
    assert left==["conv_cls_head.bias", "conv_cls_head.weight", "trans_cls_head.bias", "trans_cls_head.weight"]
    assert torch.equal(model.conv_trans_11.trans_block.mlp.fc1.weight, official_state()["conv_trans_11.trans_block.mlp.fc1.weight"])


# ---- the wrong file

@pytest.fixture(scope="module")
def p32(tmp_path_factory):
    state = {k: v.half() if v.is_floating_point() else v for k, v in official_state().items()}
    state["trans_patch_conv.weight"] = torch.zeros(384, 64, 8, 8)
    torch.save(state, path := tmp_path_factory.mktemp("p32")/"p32.pth")
    return path


def test_p32(p32):
    with pytest.raises(ValueError, match=r"patches are 32 pixels wide, the model's 16: take the patch-16 file.*adcam weights"):
        load_checkpoint(conformer_tiny(1000, last_block="keep", conv_head_bias=True), p32)
    with pytest.raises(ValueError, match="patches are 32 pixels"): load_pretrained(conformer_tiny(20), p32)


def test_wrong_variant(p32):
    with pytest.raises(ValueError, match="size 'tiny'; build the model with conformer_tiny"): load_pretrained(conformer_small(20), p32)


@pytest.mark.parametrize("state,words", [
    ({"layer1.0.conv1.weight": 0, "fc.weight": 0}, "a ResNet; it is a CNN branch for adcam.branches"),
    ({"backbone.layer1.0.conv1.weight": 0}, "a ResNet"),
    ({"patch_embed.proj.weight": 0, "cls_token": 0}, r"vision transformer \(DeiT, ViT, DINOv2\).*adcam.branches"),
    ({"backbone.patch_embed.projection.weight": 0}, "mmpretrain's names"),
    ({"encoder.stages.0.weight": 0}, "another network; `adcam weights` lists")])
def test_other_networks(tmp_path, state, words):
    torch.save(dict(model={k: torch.zeros(1) for k in state}), tmp_path/"w.pth")
    for load in (load_checkpoint, load_pretrained):
        with pytest.raises(ValueError, match=words): load(conformer_mini(4, depths=(1, 1)), tmp_path/"w.pth")


def test_transcam_head_is_named(tmp_path):
    state = conformer_mini(4).state_dict()
    torch.save(state | {"conv_cls_head.weight": torch.zeros(21, 128, 3, 3)}, tmp_path/"w.pth")
    with pytest.raises(ValueError, match="a convolution, as in TransCAM.*load_pretrained"): load_checkpoint(conformer_mini(4), tmp_path/"w.pth")
    assert "conv_cls_head.weight" in load_pretrained(conformer_mini(4), tmp_path/"w.pth")


# ---- any size

@torch.no_grad()
@pytest.mark.parametrize("make,h,w", [(conformer_tiny, 96, 176), (conformer_small, 80, 48)])
def test_non_square_and_the_readings_of_the_dropped_block(make, h, w):
    """The three readings are one network. Dropping block 12 leaves the maps of block 11. Without its strides, block 12 computes
    what it computes with them and more: every second row and column is the official map. Holds at any size."""
    models = {last_block: make(20, last_block=last_block).eval() for last_block in ("keep", "drop", "stride1")}
    state = {k: torch.from_numpy(np.asarray(rules().tensor(k, tuple(v.shape)))) for k, v in models["keep"].state_dict().items()}
    for model in models.values(): model.load_state_dict({k: state[k] for k in model.state_dict()})
    x = torch.from_numpy(rules().image(1, h, w))
    official = list(models["keep"].walk(x, attention=True))
    drop, stride1 = models["drop"].maps(x), models["stride1"].maps(x)
    assert drop.cam.shape==(1, 20, h//16, w//16) and drop.attn.shape==(1, 11, 1+h*w//256, 1+h*w//256) and stride1.attn.shape[1]==12
    close(drop.cam, torch.einsum("bchw,kc->bkhw", official[10].conv, models["drop"].conv_cls_head.weight).numpy())
    close(models["stride1"].features(x)[0][..., ::2, ::2], official[11].conv.numpy())
    torch.testing.assert_close(stride1.attn, torch.stack([s.attn for s in official], 1), rtol=1e-3, atol=1e-6)
    mean = models["drop"].maps(x, reduce="mean")
    torch.testing.assert_close(ad_cam(mean, k=8, classes=[0, 3]), ad_cam(drop, k=8, classes=[0, 3]), rtol=0, atol=0)


def test_bridges_keep_rows_and_columns_apart():
    "3 x 5 tokens: on a square grid, where the golden numbers live, a mix-up of height and width could hide"
    down, up, h, w = FCUDown(2, 8, 2), FCUUp(8, 2, 2).eval(), 3, 5
    x2, t = torch.randn(1, 2, 2*h, 2*w), torch.randn(1, 1+h*w, 8)
    for i, j in ((0, 4), (2, 1)):
        patch = down.conv_project(x2)[0, :, 2*i:2*i+2, 2*j:2*j+2].mean((1, 2))
        torch.testing.assert_close(down(x2, t)[0, 1+i*w+j], torch.nn.functional.gelu(down.ln(patch)))
        token = up.bn(up.conv_project(t[:, 1+i*w+j, :, None, None])).relu()[0, :, 0, 0]
        torch.testing.assert_close(up(t, h, w)[0, :, 2*i, 2*j], token)
        torch.testing.assert_close(up(t, h, w)[0, :, 2*i+1, 2*j+1], token)


# ---- the mean over blocks, and its memory

@torch.no_grad()
@pytest.mark.parametrize("layers", [None, 2, [0, -1], [3, 1], [1, 1, 2]])
def test_reduced_is_the_mean_of_the_unreduced(layers):
    model, x = conformer_mini(4, last_block="stride1", channels=(16, 32), embed_dim=24).eval(), torch.randn(2, 3, 32, 48)
    full, reduced = model.maps(x, layers=layers), model.maps(x, reduce="mean", layers=layers)
    assert full.attn.shape[1]==(model.depth if layers is None else 2 if layers==2 else len(layers)) and reduced.attn.shape[1]==1
    torch.testing.assert_close(reduced.attn[:, 0], full.attn.double().mean(1), rtol=1e-12, atol=1e-12)
    every = model.maps(x)
    torch.testing.assert_close(full.attn, every.attn[:, layers] if isinstance(layers, list) else every.attn[:, -(layers or 0):])
    for got in (full, reduced):
        for name in ("cam", "conv_logits", "trans_logits"): torch.testing.assert_close(getattr(got, name), getattr(every, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kw,words", [(dict(reduce="sum"), "reduce is 'sum'"), (dict(layers=0), "layers=0"), (dict(layers=9), "the last 1 to 6"),
                                      (dict(layers=[6]), "out of range"), (dict(layers=[]), "out of range"), (dict(layers="last"), "pass 'all'")])
def test_bad_reduction(kw, words):
    with pytest.raises(ValueError, match=words): conformer_mini(4).maps(torch.zeros(1, 3, 32, 32), **kw)


def test_gradients_through_the_mean():
    model, x = conformer_mini(4, channels=(16, 32), embed_dim=24), torch.randn(1, 3, 32, 32)
    grads = []
    for reduce in (None, "mean"):
        model.zero_grad()
        model.maps(x, reduce=reduce).attn.double().mean(1)[:, 0].square().sum().backward()
        grads.append(model.conv_trans_3.trans_block.attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-9)
    assert grads[0].abs().max() > 0


MEMORY = """
import pathlib, re, sys, torch
def peak():  # of this program: ru_maxrss would still hold the peak of the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
from adcam.conformer import conformer_mini
torch.set_num_threads(1)
model = conformer_mini(4, depths=(2, int(sys.argv[1])), channels=(8, 16), embed_dim=24).eval()
with torch.no_grad():
    model.maps(torch.zeros(1, 3, 64, 64), reduce="mean")
    before = peak()
    model.maps(torch.zeros(1, 3, 320, 320), reduce=None if sys.argv[2]=="all" else "mean")
print((peak() - before)/2**10)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_blocks():
    "1,601 tokens: one matrix in float32 is 10 MB; sixteen more blocks are 160 MB more if all are kept, nothing if they are added up"
    import subprocess, sys
    def grown(*args):
        return float(subprocess.run([sys.executable, "-c", MEMORY, *args], capture_output=True, text=True, check=True,
                                    env=dict(os.environ, OMP_NUM_THREADS="1")).stdout)
    few, many, kept = grown("4", "mean"), grown("20", "mean"), grown("20", "all")
    assert many < few + 30, f"{few:.0f} MB with 5 blocks, {many:.0f} MB with 21"
    assert kept > many + 100, f"{kept:.0f} MB if every matrix is kept, {many:.0f} MB as a mean"
