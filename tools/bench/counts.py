"""What a GPU would have to do, counted without one: operations to start, times the processor waits for an answer, bytes to move.

    python tools/bench/counts.py [--before CHECKOUT]

The networks are as published and the sizes those of `make bench-gpu`, but all tensors are on PyTorch's *meta* device: they have a shape and
no numbers, so that a batch of sixteen photographs at four scales costs seconds. Such tensors are passed off as those of a GPU, and the code
takes the ways that it takes there. An operation is one call of a kernel that PyTorch knows (no views, no empty memory); fused attention is
one, and so is one update of a list of all weights; what adds in any order on a GPU, by PyTorch's documentation, is named. A wait is a number, a truth value or the length of a selection that Python asks for. Bytes
are those of all arguments and results of all operations: what goes through the memory if nothing stays in a cache.

These are counts, not times. Times of a GPU are in results/bench/gpu.json. `--before CHECKOUT` counts another checkout beside this one.
"""
import argparse
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

import torch
import torch.nn.functional as F
import torch.optim.optimizer as _optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        fetched = name == "_to_copy" and out.device.type == "cpu" != args[0].device.type and not (kwargs or {}).get("non_blocking")
        if fetched or name in ("_local_scalar_dense", "nonzero", "equal") or self.selects(name, args):
            self.waits.append(name)
        if name != "_local_scalar_dense" and not name.startswith(_NO_WORK) and not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.count += 1
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
                return first.new_empty(args[1][0].numel())
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


@contextmanager
def on_paper():
    "Tensors of the meta device are those of a GPU; fused attention is one operation there"
    with ExitStack() as stack:
        for where, name, new in ((torch.Tensor, "is_cuda", property(lambda t: t.device.type == "meta")), (F, "scaled_dot_product_attention", attention),
                                 (_optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"]), (torch, "autocast", lambda *a, **k: nullcontext()), (torch.cuda, "Event", mock.MagicMock()), (torch.cuda, "current_stream", mock.MagicMock())):
            stack.enter_context(mock.patch.object(where, name, new))
        yield


# ------------------------------------------------------------------------------------------------------------------ seeds

@torch.no_grad()
def seeds(method, scales, flip, size, batch=BATCH, **options):
    "One batch of photographs of one size, from bytes to the maps on their way back: the counter"
    from adcam import seeds as S
    from adcam.conformer import conformer_small
    with torch.device("meta"):
        net = conformer_small(20).eval()
    one = S.Prepared(0, None, size, [3, 7], torch.zeros(sum(3 * h * w for (h, w), _ in S._plans(size, scales, net.stride, "round")), dtype=torch.uint8))
    group = [one._replace(i=i) for i in range(batch)]
    S._work.update(model=net, ds=SimpleNamespace(ids=list(map(str, range(batch)))), options=dict(method=method, scales=scales, flip=flip, size_mode="round", **options))
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


def step(build, **options):
    "The second step of the loop of 03b, when the optimizer has its state: the counter"
    from adcam import training as T
    net, optimizer, batch, gradients = build()
    acc = SimpleNamespace(device=torch.device("meta"), num_processes=1, process_index=0, backward=lambda loss: loss.backward(), no_sync=lambda net: nullcontext(), reduce=lambda v, *how: v)
    with on_paper(), mock.patch.object(T, "Late", Late):
        for _ in range(2):
            for g in optimizer.param_groups:
                g["foreach"] = not g["fused"]                           # what PyTorch does by itself on a GPU
            with Operations("meta", **options) as seen:
                T.take_steps(acc, optimizer, dict(history=[]), [batch], lambda b: gradients(acc, net, b), bar=mock.MagicMock(), remedy=str)
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
    optimizer = R.PolySGD([dict(params=p, lr=1e-3) for p in net.heads().values()], 100, c.weight_decay, c.power, c.momentum)
    return net, optimizer, (torch.zeros(batch, 3, crop, crop), torch.zeros(batch, crop // 4, crop // 4, dtype=torch.int64)), lambda acc, net, b: R._gradients(acc, net, b, c, 20)


def segmentation(device="meta", net=None, batch=10, crop=321):
    "DeepLabV2: a batch in two parts, three scales and their maximum"
    from adcam import segment as G
    from adcam.deeplab import DeepLabV2
    with torch.device(device):
        net = (net or DeepLabV2(21)).to(device, memory_format=torch.channels_last)
    c = G.SegConfig(batch=batch, crop=crop)
    G._begin(net, c)
    return net, G._optimizer(net, c), (torch.zeros(batch, 3, crop, crop), torch.zeros(batch, crop, crop, dtype=torch.int64)), lambda acc, net, b: G._gradients(acc, net, *b, c)


# ------------------------------------------------------------------------------------------------------------------- rows

def counted():
    "{name: (value, unit, details)} of everything"
    out = {}

    def add(name, seen, per, of):
        order = dict(any_order=sorted(seen.any_order)) if of == "step" else {}
        out[f"{name}: operations per {of}"] = round(seen.count / per, 1), "operations", order
        out[f"{name}: waits per {'batch' if per > 1 else of}"] = len(seen.waits), "waits", {}
        out[f"{name}: memory traffic per {of}"] = round(seen.bytes / per / 1e9, 2), "GB", {}

    for method, options in (("cam", {}), ("ad_cam", dict(k=50, clip_k=True))):
        label = dict(cam="CAM", ad_cam="AD-CAM")[method]
        add(f"seeds, {label}, 4 scales with flips, 16 photographs of 375x500", seeds(method, SCALES, True, PHOTO, **options), BATCH, "image")
        add(f"seeds, {label}, one scale, 16 photographs of 384x384", seeds(method, (1.,), False, (384, 384), **options), BATCH, "image")
        add(f"seeds, {label}, 4 scales with flips, one photograph of 375x500", seeds(method, SCALES, True, PHOTO, 1, **options), 1, "image")
    for name, build in (("Conformer-S, batch 16 at 384", classifier), ("IRNet, batch 16 at 512", boundaries), ("DeepLabV2, batch 10 at 321", segmentation)):
        add(f"training, {name}", step(build, truths=(False, True)), 1, "step")     # old code asks: is a label wrong? does one count?
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
    settings = dict(networks="Conformer-S, IRNet on ResNet-50, DeepLabV2, on the meta device, float32", photograph="375x500", scales=SCALES, before=commit)
    save_result("counts", rows, a.out, provenance(settings=settings, seconds=time.time() - began), how="python tools/bench/counts.py")
    for r in rows:
        print(f"{r['name']:95} {r['value']:10,} {r['unit']:10}" + (f" before {r['before']:,}" if r["before"] is not None else ""))


if __name__ == "__main__":
    main()
