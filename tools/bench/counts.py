"""What a GPU would have to do, counted without one: operations to start, times the processor waits for an answer, bytes to move.

    python tools/bench/counts.py [--before CHECKOUT]

The networks are as published and the sizes those of `make bench-gpu`, but all tensors are on PyTorch's *meta* device: they have a shape and
no numbers, so that a batch of sixteen photographs at four scales costs seconds. Such tensors are passed off as those of a GPU, and the code
takes the ways that it takes there. An operation is one call of a kernel that PyTorch knows (no views, no empty memory); fused attention is
one, and so is one update of a list of all weights; what adds in any order on a GPU, by PyTorch's documentation, is named. A wait is a number,
a truth value or the length of a selection that Python asks for, or a tensor that it sends and stays with until it has arrived. Bytes are those
of all arguments and results of all operations: what goes through the memory if nothing stays in a cache. PyTorch's autocast knows no meta
device, so bf16 is cast here, by the lists that it has for GPUs.

These are counts, not times. Times of a GPU are in results/bench/gpu.json. `--before CHECKOUT` counts another checkout beside this one.
"""
import argparse
import inspect
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torch.optim.optimizer as _optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]
PHOTO, SCALES, BATCH = (375, 500), (1.0, 0.5, 1.5, 2.0), 16


# ------------------------------------------------------------------------------------------------------------ the counter

ANY_ORDER = ("upsample_bilinear2d_backward", "scatter_add_", "nll_loss2d_forward", "attention_backward", "_adaptive_avg_pool2d_backward")  # torch.use_deterministic_algorithms
_NO_WORK = ("empty", "new_empty", "_unsafe_view", "detach", "promote_types", "device", "_record_function")


class Operations(TorchDispatchMode):
    "Counts operations that a GPU would have to start, their bytes, and what would wait for it. `device`: only what touches tensors of this kind"

    def __init__(self, device=None, truths=(False,)):
        super().__init__()
        self.device, self.truths, self.count, self.bytes, self.waits, self.any_order = device, itertools.cycle(truths), 0, 0, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, self.answer(func, args, kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if self.device and not any(t.device.type == self.device for t in tensors):
            return out
        travels = name == "_to_copy" and (out.device.type == "cpu") != (args[0].device.type == "cpu") and not (kwargs or {}).get("non_blocking")
        if travels or name in ("_local_scalar_dense", "nonzero", "equal") or self.selects(name, args):
            self.waits.append(name)
        if name != "_local_scalar_dense" and not name.startswith(_NO_WORK) and not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.count += 1
            if not (name.startswith("nll_loss") and args[3] == 0):          # a loss per pixel adds nothing
                self.any_order |= {name} & set(ANY_ORDER)
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out

    @staticmethod
    def selects(name, args):
        return name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])

    def answer(self, func, args, kwargs):
        "Numbers that a meta tensor does not have are 0, truth values what `truths` says in turn, and a selection by them takes everything"
        name, first = func.overloadpacket.__name__, next((t for t in tree_leaves(args) if isinstance(t, torch.Tensor)), None)
        if first is not None and first.is_meta:
            if name == "_local_scalar_dense":
                return next(self.truths) if first.dtype == torch.bool else 0
            if name.startswith("_fused_"):
                return None
            if name == "_to_copy" and kwargs.get("device") == torch.device("cpu"):
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if self.selects(name, args):
                return first.new_empty(args[1][0].numel(), *first.shape[args[1][0].ndim:])
            if name == "_index_put_impl_" or name == "index_put_":
                return first
        return func(*args, **kwargs)


@torch.library.custom_op("counts::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


@torch.library.custom_op("counts::attention_backward", mutates_args=())
def attention_backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    raise NotImplementedError


attention.register_fake(lambda q, k, v: torch.empty_like(v))
attention_backward.register_fake(lambda g, q, k, v: [torch.empty_like(t) for t in (q, k, v)])
attention.register_autograd(lambda ctx, g: tuple(attention_backward(g, *ctx.saved_tensors)), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


_IN_HALF = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.mm, torch.addmm, torch.einsum}
_IN_FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.Tensor.log_softmax, torch.sum, torch.Tensor.sum, F.binary_cross_entropy_with_logits,
            F.cross_entropy, F.smooth_l1_loss, F.l1_loss, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.pow, torch.Tensor.pow, torch.rsqrt, torch.Tensor.rsqrt}


class Autocast(TorchFunctionMode):
    "`torch.autocast` of a GPU in bf16, for meta tensors: what is cast in which operation, and weights once until the outermost context is left"

    def __init__(self):
        super().__init__()
        self.on, self.depth, self.weights = False, 0, {}

    @contextmanager
    def asked(self, device="meta", dtype=None, enabled=True, **_):
        before, self.on, self.depth = self.on, enabled, self.depth + 1
        try:
            yield
        finally:
            self.on, self.depth = before, self.depth - 1
            if not self.depth:
                self.weights.clear()

    def half(self, t):
        if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
            return t
        if not (t.is_leaf and t.requires_grad):
            return t.bfloat16()
        if id(t) not in self.weights:
            self.weights[id(t)] = t.bfloat16()
        return self.weights[id(t)]

    @staticmethod
    def full(t):
        return t.float() if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 else t

    def __torch_function__(self, func, types, args=(), kwargs=None):
        cast = self.on and (self.half if func in _IN_HALF else self.full if func in _IN_FULL else None)
        if cast:
            args, kwargs = tree_map(cast, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def on_paper():
    "Tensors of the meta device are those of a GPU; fused attention is one operation there. Gives the `Autocast`"
    with ExitStack() as stack:
        autocast = Autocast()
        for where, name, new in ((torch.Tensor, "is_cuda", property(lambda t: t.device.type == "meta")), (F, "scaled_dot_product_attention", attention),
                                 (_optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"]), (torch, "autocast", autocast.asked), (torch.amp, "is_autocast_available", lambda kind: True),
                                 (torch, "is_autocast_enabled", lambda kind: autocast.on), (torch, "get_autocast_dtype", lambda kind: torch.bfloat16), (torch.cuda, "Event", mock.MagicMock()), (torch.cuda, "current_stream", mock.MagicMock())):
            stack.enter_context(mock.patch.object(where, name, new))
        yield stack.enter_context(autocast)


# ------------------------------------------------------------------------------------------------------------------ seeds

@torch.no_grad()
def seeds(method, scales, flip, size, batch=BATCH, precision="fp32", **options):
    "One batch of photographs of one size, from bytes to the maps on their way back: the counter"
    from adcam import seeds as S
    from adcam.conformer import conformer_small
    with torch.device("meta"):
        net = conformer_small(20).eval()
    one = S.Prepared(0, None, size, [3, 7], torch.zeros(sum(3 * h * w for (h, w), _ in S._plans(size, scales, net.stride, "round")), dtype=torch.uint8))
    group = [one._replace(i=i) for i in range(batch)]
    S._work.update(model=net, ds=SimpleNamespace(ids=list(map(str, range(batch)))), options=dict(method=method, scales=scales, flip=flip, size_mode="round", precision=precision, **options))
    try:
        with on_paper(), Operations("meta") as seen:
            assert len(S._extract_group(group, set(range(batch)), mock.MagicMock())) == batch
    finally:
        S._work.clear()
    return seen


# --------------------------------------------------------------------------------------------------------------- training

class Late:
    "Stands for numbers that have not come: they are 0"
    event = mock.MagicMock()

    def __init__(self, values):
        self.n = len(values)

    def tolist(self):
        return [0.] * self.n


class Kept:
    "Bytes that the network's way back needs of its way there, without the weights: the most that is alive at once"

    def __init__(self, net):
        self.weights, self.alive, self.most = {p.untyped_storage()._cdata for p in net.parameters()}, {}, 0

    def look(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.weights:
            self.alive[storage._cdata] = storage                        # holding it keeps its number from being used again
        return t

    def backward(self, loss):
        self.most = max(self.most, sum(s.nbytes() for s in self.alive.values()))
        self.alive.clear()
        loss.backward()


def step(build, half=False, **options):
    "The second step of the loop of 03b, when the optimizer has its state: the counter, with `kept`"
    from adcam import training as T
    net, optimizer, batch, gradients = build()
    kept = Kept(net)
    acc = SimpleNamespace(device=torch.device("meta"), num_processes=1, process_index=0, backward=kept.backward, no_sync=lambda net: nullcontext(), reduce=lambda v, *how: v)
    with on_paper() as autocast, mock.patch.object(T, "Late", Late), torch.autograd.graph.saved_tensors_hooks(kept.look, lambda t: t):
        forward = net.forward
        def cast(*args):                                                # as accelerate wraps a network
            with autocast.asked(enabled=half):
                out = forward(*args)
            return tree_map(autocast.full, out)
        net.forward = cast
        for _ in range(2):
            for g in optimizer.param_groups:
                g["foreach"] = not g["fused"]                           # what PyTorch does by itself on a GPU
            with Operations("meta", **options) as seen:
                T.take_steps(acc, optimizer, dict(history=[]), [batch], lambda b: gradients(acc, net, b), bar=mock.MagicMock(), remedy=str)
    seen.kept = kept.most
    return seen


def classifier(device="meta", net=None, batch=16, crop=384):
    "Conformer-S: views as bytes, two losses, AdamW. Network, optimizer, batch, and what `take_steps` calls"
    from adcam import classifier as K
    from adcam.conformer import conformer_small
    with torch.device(device):
        net = (net or conformer_small(20)).to(device, memory_format=torch.channels_last)
    c = K.TrainConfig()
    net.set_drop_path(c.drop_path)
    task = K.MultiLabel(net).train()
    views = torch.zeros(batch, crop, crop, 3, dtype=torch.uint8), torch.tensor([[0, crop, 0, crop]] * batch)
    return task, K._optimizer(task, c), (views, torch.zeros(batch, net.num_classes)), lambda acc, task, b: K._gradients(acc, task, *K._to_device(acc, *b), 1)


def boundaries(device="meta", stages=None, batch=16, crop=512):
    "IRNet on ResNet-50, with displacements"
    from adcam import boundaries as R
    with torch.device(device):
        net = R.IRNet(stages or R.ResNet50Stages()).to(device).train()
    c = R.IRNetConfig(batch=batch, crop=crop)
    views = torch.zeros(batch, 3, crop, crop)
    if "pixels" in inspect.signature(R.IRViews).parameters:             # an earlier commit has sent floats
        views = torch.zeros(batch, crop, crop, 3, dtype=torch.uint8), torch.tensor([[0, crop, 0, crop]] * batch)
    optimizer = R.PolySGD([dict(params=p, lr=1e-3) for p in net.heads().values()], 100, c.weight_decay, c.power, c.momentum)
    return net, optimizer, (views, torch.zeros(batch, crop // 4, crop // 4, dtype=torch.int64)), lambda acc, net, b: R._gradients(acc, net, b, c, 20)


def segmentation(device="meta", net=None, batch=10, crop=321):
    "DeepLabV2: a batch in two parts, three scales and their maximum"
    from adcam import segment as G
    from adcam.deeplab import DeepLabV2
    with torch.device(device):
        net = (net or DeepLabV2(21)).to(device, memory_format=torch.channels_last)
    c = G.SegConfig(batch=batch, crop=crop, together=True)
    G._begin(net, c)
    return net, G._optimizer(net, c), (torch.zeros(batch, 3, crop, crop), torch.zeros(batch, crop, crop, dtype=torch.int64)), lambda acc, net, b: G._gradients(acc, net, *b, c)


# ------------------------------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def prediction(size=PHOTO, classes=21):
    "DeepLabV2 and the CRF of one photograph. The lattice of the CRF has as many corners as the colors ask for, so that part is done with real numbers"
    from adcam import segment as G
    from adcam.deeplab import DeepLabV2
    y, x = np.indices(size)
    image = np.stack([255 * y // size[0], 255 * x // size[1], (y // 50 + x // 50) % 2 * 200], -1).astype(np.uint8)
    with torch.device("meta"):
        net = DeepLabV2(classes).eval()
    with on_paper(), Operations("meta", truths=(True,)) as network:       # the logits are numbers
        G.enlarge(G.predict_logits(net, image, on_device=True), size)
    with Operations() as crf:
        G.refine(torch.randn(classes, *size, generator=torch.Generator().manual_seed(0)), image)
    return network, crf


# ------------------------------------------------------------------------------------------------------------------- rows

def counted():
    "{name: (value, unit, details)} of everything"
    out = {}

    def add(name, seen, per, of):
        order = dict(any_order=sorted(seen.any_order)) if of == "step" else {}
        out[f"{name}: operations per {of}"] = round(seen.count / per, 1), "operations", order
        out[f"{name}: waits per {'batch' if per > 1 else of}"] = len(seen.waits), "waits", {}
        out[f"{name}: memory traffic per {of}"] = round(seen.bytes / per / 1e9, 2), "GB", {}

    seeds("cam", (1.,), False, (384, 384))                              # what is sent to a device once, for all batches
    views = "4 scales with flips, 16 photographs of 375x500"
    for method, options in (("cam", {}), ("ad_cam", dict(k=50, clip_k=True))):
        label = dict(cam="CAM", ad_cam="AD-CAM")[method]
        add(f"seeds, {label}, {views}", seeds(method, SCALES, True, PHOTO, **options), BATCH, "image")
        add(f"seeds, {label}, one scale, 16 photographs of 384x384", seeds(method, (1.,), False, (384, 384), **options), BATCH, "image")
        add(f"seeds, {label}, 4 scales with flips, one photograph of 375x500", seeds(method, SCALES, True, PHOTO, 1, **options), 1, "image")
        add(f"seeds, {label}, {views}, bf16", seeds(method, SCALES, True, PHOTO, precision="bf16", **options), BATCH, "image")
    for more in ("", ", bf16"):
        for what in ("operations", "memory traffic"):
            (cam, _, _), (ad_cam, _, _) = (out[f"seeds, {label}, {views}{more}: {what} per image"] for label in ("CAM", "AD-CAM"))
            out[f"seeds, AD-CAM over CAM, {views}{more}: {what}"] = round(ad_cam / cam, 3), "times", {}
    for name, build in (("Conformer-S, batch 16 at 384", classifier), ("IRNet, batch 16 at 512", boundaries), ("DeepLabV2, batch 10 at 321", segmentation)):
        for more in ("", ", bf16"):
            add(f"training, {name}{more}", seen := step(build, bool(more), truths=(False, True)), 1, "step")     # old code asks: is a label wrong? does one count?
            out[f"training, {name}{more}: kept for the way back"] = round(seen.kept / 1e9, 2), "GB", {}
    network, crf = prediction()
    for part, seen in (("network", network), ("CRF of 21 labels", crf)):
        out[f"prediction, DeepLabV2 with CRF, 375x500, {part}: operations per image"] = seen.count, "operations", {}
        out[f"prediction, DeepLabV2 with CRF, 375x500, {part}: memory traffic per image"] = round(seen.bytes / 1e9, 2), "GB", {}
    return out


def of_checkout(folder):
    "The same counts of the code in another checkout"
    process = subprocess.run([sys.executable, __file__, "--json"], env=dict(os.environ, PYTHONPATH=str(Path(folder).resolve())), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, counted too; not given: what the file says")
    parser.add_argument("--json", action="store_true", help="only print the counts")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench", help="folder of counts.json")
    a = parser.parse_args()
    if a.json:
        print(json.dumps(counted()))
        return
    sys.path.insert(0, str(ROOT))
    from adcam.pipeline import load_result, provenance, save_result
    began, file = time.time(), a.out / "counts.json"
    if a.before:
        before = {name: found[0] for name, found in of_checkout(a.before).items()}
        commit = subprocess.run(["git", "-C", a.before, "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    else:
        old = load_result("counts", a.out) if file.exists() else dict(rows=[], provenance=dict(settings={}))
        before, commit = {r["name"]: r.get("before") for r in old["rows"]}, old["provenance"]["settings"].get("before")
    rows = [dict(name=name, value=value, unit=unit, before=before.get(name), **details) for name, (value, unit, details) in counted().items()]
    settings = dict(networks="Conformer-S, IRNet on ResNet-50, DeepLabV2, on the meta device; float32 where nothing else is said", photograph="375x500", scales=SCALES, before=commit)
    save_result("counts", rows, a.out, provenance(settings=settings, seconds=time.time() - began), how="python tools/bench/counts.py")
    for r in rows:
        print(f"{r['name']:95} {r['value']:10,} {r['unit']:10}" + (f" before {r['before']:,}" if r["before"] is not None else ""))


if __name__ == "__main__":
    main()
