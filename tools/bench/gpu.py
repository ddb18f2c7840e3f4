"""What one GPU does, and whether it does it right: seeds, training, prediction, against a goal each, and the device's numbers against the CPU's.

    python tools/bench/gpu.py [--total 195] [--rows a,b] [--tiny]

Needs a GPU and no data: photographs of 375 x 500 are made up (smooth color fields, sent as JPEG), Conformer-S and DeepLabV2 have random
weights, which cost what trained ones cost. Every row stands alone: one that fails is recorded with its error, one that takes too long is
stopped, and results/bench/gpu.json is written again after each of them, so that whatever happens, what was measured is there. Rows come in
the order of their weight; with `--total` the last ones are left out when time runs out, and the file says so.

Rates are differences of two runs of one function, a short and a long one: what every run pays once (fingerprint of the weights, start of
loader processes, first use of a kernel) is not in them. `--tiny` runs every row at small size on whatever is there, to test this script; its
numbers mean nothing and are written only where `--out` says.
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import fields
from pathlib import Path
from unittest import mock

STARTED, ROOT = time.time(), Path(__file__).resolve().parents[2]  # the time that imports take counts
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # for processes that are started
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch looks before the first product: rows that ask for one order come later

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402


def without_smp():
    "DeepLabV2 needs nothing of segmentation_models_pytorch; where it is not installed, an empty one lets adcam.deeplab be imported"
    if importlib.util.find_spec("segmentation_models_pytorch"):
        return
    for name, content in {"": dict(base=types.SimpleNamespace(SegmentationModel=nn.Module, SegmentationHead=nn.Identity)), ".decoders": {},
                          ".decoders.upernet": {}, ".decoders.upernet.decoder": dict(UPerNetDecoder=None)}.items():
        module = types.ModuleType("segmentation_models_pytorch" + name)
        module.__dict__.update(content, __path__=[])
        sys.modules[module.__name__] = module


without_smp()

import counts  # noqa: E402  beside this file
from adcam import cam as C  # noqa: E402
from adcam.conformer import conformer_mini, conformer_small  # noqa: E402
from adcam.devices import device_class, numerics, precision  # noqa: E402
from adcam.pipeline import checkpoint_path, provenance, save_result  # noqa: E402
from adcam.scenes import Sample, Scenes  # noqa: E402
from adcam.seeds import METHODS, batch_maps, check_seeds, extract, extract_dataset, load_seed, view_maps  # noqa: E402

VOC_SCALES = (1.0, 0.5, 1.5, 2.0)


# ---------------------------------------------------------------------------------------------------------------- data

def picture(rng, h, w):
    "Color fields with some edges and noise, uint8 (h,w,3)"
    low = rng.integers(0, 256, (max(2, h // 48), max(2, w // 48), 3), dtype=np.uint8)
    a = np.asarray(Image.fromarray(low).resize((w, h), Image.Resampling.BICUBIC)).astype(np.int16)
    y, x = int(rng.integers(0, h // 2)), int(rng.integers(0, w // 2))
    a[y:y + h // 3, x:x + w // 3] = rng.integers(0, 256, 3)
    return np.clip(a + rng.integers(-8, 9, a.shape), 0, 255).astype(np.uint8)


class Photographs:
    "n made-up photographs (a few of them, again and again), decoded from JPEG when they are asked for; masks are blocks"

    def __init__(self, n, h, w, num_classes=20, different=8):
        rng, self.files, self.masks = np.random.default_rng(0), [], []
        for _ in range(min(n, different)):
            file = io.BytesIO()
            Image.fromarray(picture(rng, h, w)).save(file, "JPEG", quality=92)
            self.files.append(file.getvalue())
            mask = np.zeros((h, w), np.uint8)
            for k in rng.choice(num_classes, 1 + int(rng.integers(2)), replace=False):
                y, x = int(rng.integers(0, h // 2)), int(rng.integers(0, w // 2))
                mask[y:y + h // 2, x:x + w // 2] = k + 1
            self.masks.append(mask)
        self.classes, self.ids = tuple(f"class{k}" for k in range(num_classes)), [f"photo{i:05d}" for i in range(n)]

    def __len__(self):
        return len(self.ids)

    def label(self, i):
        return np.isin(np.arange(1, 1 + len(self.classes)), self.masks[i % len(self.files)]).astype(np.float32)

    def weak(self, i):
        return np.array(Image.open(io.BytesIO(self.files[i % len(self.files)])).convert("RGB")), self.label(i)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return Sample(self.ids[i], *self.weak(i), self.masks[i % len(self.files)])

    def fingerprint(self):
        return f"made-up-{len(self)}-{self.masks[0].shape}"

    def of_mask(self, sample):
        return sample.mask


# ------------------------------------------------------------------------------------------------------------- context

class Bench:
    "Device, sizes and networks, which rows share"

    def __init__(self, tiny):
        self.tiny, self.cuda = tiny, torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.workers = min(8, os.cpu_count() or 1) if self.cuda else 0
        self._net = None

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def network(self):
        "Conformer-S on the device (tiny: conformer_mini)"
        if self._net is None:
            torch.manual_seed(0)
            self._net = (conformer_mini(20) if self.tiny else conformer_small(20)).eval().to(self.device)
        return self._net

    def trained(self):
        return conformer_mini(10, checkpoint=checkpoint_path(0)).eval()

    def seconds(self, f):
        self.sync()
        start = time.perf_counter()
        f()
        self.sync()
        return time.perf_counter() - start

    def rate(self, run, short, long):
        "Seconds per unit: run(long) minus run(short), after a run(short) that warms up"
        run(short)
        a, b = self.seconds(lambda: run(short)), self.seconds(lambda: run(long))
        return (b - a) / (long - short) if b > a else b / long  # the second only where a busy machine has stretched the short run

    def peak(self):
        "GPU memory in GB since the last call"
        if not self.cuda:
            return None
        gb = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.reset_peak_memory_stats()
        return gb


ROWS = []


def row(name, limit, goal=None, unit="", higher=True):
    "Register a row: it returns (value, details); `limit` is in seconds"
    def add(f):
        ROWS.append(dict(name=name, limit=limit, goal=goal, unit=unit, higher=higher, run=f))
        return f
    return add


def largest(a, b):
    "Largest difference over the largest value of b"
    a, b = (np.asarray(v.detach().double().cpu() if torch.is_tensor(v) else v, np.float64) for v in (a, b))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def checked(ok, **details):
    "Of a row that passes or fails"
    return bool(ok), details


# ------------------------------------------------------------------------------------------------------------ is it right?

@row("right: device and CPU make the same seeds", 25, "pass")
def seeds_agree(c):
    "conformer_mini on scenes, all methods of Maps, strict float32"
    size, net, text, worst = 64 if c.tiny else 192, c.trained(), {}, 0.
    ds, there = Scenes("test", 2, size), copy.deepcopy(net).to(c.device)
    for method, options in dict(cam={}, ts_cam={}, trans_cam={}, att_diffu={}, ad_cam=dict(k=20)).items():
        pairs = [[extract(n, s.image, s.label, method, scales=(1., 1.5), flip=True, **options) for n in (net, there)] for s in ds]
        error, moved = max(largest(b.high_res, a.high_res) for a, b in pairs), max(float(((a.high_res > .3) != (b.high_res > .3)).mean()) for a, b in pairs)
        text[method], worst = dict(error=error, pixels_moved=moved), max(worst, error, 10 * moved)
    return checked(worst < 2e-3, **text)


@row("right: device and CPU choose the same neighbors", 15, "pass")
def neighbors_agree(c):
    side, generator = 8 if c.tiny else 24, torch.Generator().manual_seed(0)
    n = side * side
    A = C.patch_attention((2 * torch.randn(1, 3, 1 + n, 1 + n, generator=generator)).softmax(-1))
    S, ties = C.co_neighbor(A), torch.randint(0, 4, (2, 90, 90), generator=generator).double()
    random = all(torch.equal(C.top_k(S, k), C.top_k(C.co_neighbor(A.to(c.device)), k).cpu()) for k in (1, 20, 50))
    equal = all(torch.equal(C.top_k(ties, k), C.top_k(ties.to(c.device), k).cpu()) for k in (1, 7, 45, 90))
    return checked(random and equal, random=random, exact_ties=equal)


@row("right: batches, resumed runs and precisions of seeds", 25, "pass")
def seeds_consistent(c):
    "One by one against batches; some files deleted and made again; TF32 off and on again"
    ds, net = Scenes("test", 8 if c.tiny else 24, 64 if c.tiny else 192), c.trained().to(c.device)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    run = lambda out, batch: extract_dataset(net, ds, out, "ad_cam", k=20, flip=True, batch=batch, progress=False)  # noqa: E731
    with tempfile.TemporaryDirectory() as tmp:
        one, many = Path(tmp) / "one", Path(tmp) / "many"
        run(one, 1), run(many, 5)
        files = {i: (many / f"{i}.npz").read_bytes() for i in ds.ids}
        error = max(largest(load_seed(many / f"{i}.npz").cam, load_seed(one / f"{i}.npz").cam) for i in ds.ids)
        for i in ds.ids[1::5]:
            (many / f"{i}.npz").unlink()
        run(many, 5)
        resumed = all((many / f"{i}.npz").read_bytes() == data for i, data in files.items())
    after = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return checked(error < 2e-3 and resumed and before == after, one_against_batches=error, resumed_bit_equal=resumed, switches_put_back=before == after)


def weights_of(net):
    return torch.cat([v.detach().double().flatten().cpu() for v in net.state_dict().values()])


def repeats(c, run):
    "run() -> a trained network. Twice as it is, and twice with --deterministic, which is what the goal is about; what PyTorch names as having no order"
    from adcam.training import repeatable
    details = dict(twice=torch.equal(weights_of(run()), weights_of(run())))
    try:
        with repeatable():
            details["twice_deterministic"] = torch.equal(weights_of(run()), weights_of(run()))
    except ValueError as e:
        details["twice_deterministic"] = str(e)[:160]
    before, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
        details["named"] = sorted({str(w.message).split(" does not have")[0][:90] for w in said if "determin" in str(w.message)})
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    return details["twice_deterministic"] is True, details


def small(c):
    "(images, side) of the trainings that are compared"
    return (8, 64) if c.tiny else (32, 96)


@row("right: training repeats and continues bit for bit", 30, "pass")
def training_repeats(c):
    from adcam.classifier import TrainConfig, train
    (n, side), losses = small(c), []
    ds, config = Scenes("train", n, side), TrainConfig(epochs=2, batch=n // 2, crop=side * 5 // 6 // 8 * 8, resize=None)

    class Stop(Exception):
        pass

    def stop(model, done, history):
        if done == 1:
            raise Stop

    def run(**options):
        net = conformer_mini(10, checkpoint=checkpoint_path(0))
        losses.append([h["loss"] for h in train(net, ds, config, progress=False, **options)])
        return net

    from adcam.training import repeatable
    with tempfile.TemporaryDirectory() as out, repeatable():
        with contextlib.suppress(Stop):
            run(out=out, callback=stop)
        continued = torch.equal(weights_of(run(out=out)), weights_of(run()))
    equal, details = repeats(c, run)
    return checked(equal and continued and losses[0][-1] < 2 * losses[0][0], continued=continued, loss=[losses[0][0], losses[0][-1]], **details)


def repeated(c, run):
    equal, details = repeats(c, run)
    return checked(equal, **details)


@row("right: training of IRNet repeats bit for bit", 30, "pass")
def irnet_repeats(c):
    from adcam.cnn import mini_path, resnet_mini
    from adcam.irnet import IRNet, IRNetConfig, ResNetStages, train_irnet
    n, side = small(c)
    ds = Scenes("train", n, side)

    def run():
        torch.manual_seed(0)
        net = IRNet(ResNetStages(resnet_mini(checkpoint=mini_path("pretrained")).eval().backbone_net))
        train_irnet(net, ds, lambda s: s.mask, IRNetConfig(epochs=1, batch=n // 4, crop=64, radius=4, lr_edge=.01, lr_displacement=.01), progress=False)
        return net

    return repeated(c, run)


@row("right: training of DeepLabV2 repeats bit for bit", 30, "pass")
def deeplab_repeats(c):
    from adcam.deeplab import deeplabv2_mini
    from adcam.segment import SegConfig, train_segmentation
    n, side = small(c)
    ds = Scenes("train", n, side)

    def run():
        torch.manual_seed(0)
        net = deeplabv2_mini()
        train_segmentation(net, ds, lambda s: s.mask, SegConfig(iterations=4, batch=n // 4, accumulate=2, crop=48, lr=1e-3, check=1000), progress=False)
        return net

    return repeated(c, run)


RANK = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from adcam.classifier import TrainConfig, train
from adcam.conformer import conformer_mini
from adcam.pipeline import checkpoint_path
from adcam.scenes import Scenes
from adcam.seeds import extract_dataset
if __name__ == "__main__":
    torch.set_num_threads(1)
    ds, net, out = Scenes("train", {n}, {side}), conformer_mini(10, checkpoint=checkpoint_path(0)), Path({out!r})
    if not {tiny}: net.cuda()
    extract_dataset(net, ds, out / "seeds", "ad_cam", k=20, clip_k=True, batch=4, workers=0, progress=False)
    history = train(net, ds, TrainConfig(epochs=1, batch=8, crop=48, resize=None, drop_path=0., sync_bn=True), progress=False, device={device!r})
    if os.environ.get("RANK", "0") == "0": (out / "history.json").write_text(json.dumps([h["loss"] for h in history]))
"""


@row("right: two processes on one GPU make what one makes", 60, "pass")
def ranks(c):
    "The same seeds, and the same losses, by gloo"
    (n, side), found = small(c), {}
    ds = Scenes("train", n, side)
    with tempfile.TemporaryDirectory() as tmp, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        for count in (1, 2):
            out = Path(tmp) / str(count)
            out.mkdir()
            script = RANK.format(root=str(ROOT), n=n, side=side, out=str(out), tiny=not c.cuda, device="cuda:0" if c.cuda else "cpu")
            if count == 1:
                exec(script, dict(__name__="__main__"))
                found[count] = json.loads((out / "history.json").read_text())
                continue
            env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
            if not c.cuda:
                env["ACCELERATE_USE_CPU"] = "true"
            started = [subprocess.Popen([sys.executable, "-c", script], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE, text=True) for r in range(count)]
            try:
                said = [p.communicate()[1] for p in started]
            finally:
                for p in started:
                    p.kill()
            if any(p.returncode for p in started):
                raise RuntimeError(f"a rank of {count} ended with an error: {max(said, key=len)[-350:]}")
            found[count] = json.loads((out / "history.json").read_text())
        complete = check_seeds(Path(tmp) / "2/seeds", ds)["complete"]
        error = max(largest(load_seed(Path(tmp) / f"2/seeds/{i}.npz").cam, load_seed(Path(tmp) / f"1/seeds/{i}.npz").cam) for i in ds.ids)
    apart = max(abs(a - b) for a, b in zip(found[1], found[2], strict=True))
    return checked(complete and error < 2e-3 and apart < 1e-3, seeds_apart=error, seeds_complete=complete, losses_apart=apart, losses=found[2])


@row("right: CRF labels and random walk", 25, "pass")
def crf_and_walk(c):
    from adcam.crf import IRN, dense_crf, unary_from_labels
    from adcam.irnet import random_walk
    rng, (h, w) = np.random.default_rng(0), (40, 52) if c.tiny else (188, 250)
    image, labels = picture(rng, h, w), (Photographs(1, h, w, 2).masks[0]).astype(np.int64)
    u = torch.from_numpy(unary_from_labels(labels, 3))
    a, b = dense_crf(u, image, **IRN), dense_crf(u.to(c.device), image, **IRN).cpu()
    same = float((a.argmax(0) == b.argmax(0)).float().mean())
    cam, edge = rng.random((2, h // 4, w // 4), np.float32), rng.random((h // 4, w // 4), np.float32)
    error = largest(random_walk(torch.from_numpy(cam).to(c.device), edge, device=c.device).cpu(), random_walk(cam, edge))
    return checked(same > .999 and error < 1e-4, crf_labels_equal=same, walk_error=error)


# ----------------------------------------------------------------------------------------------------------------- seeds

def seeds_per_second(c, method, arithmetic, size, short, long, **options):
    net, folder, serial = c.network(), tempfile.TemporaryDirectory(), iter(range(99))

    def run(n):
        out = Path(folder.name) / str(next(serial))
        done = extract_dataset(net, Photographs(n, *size), out, method, precision=arithmetic, workers=c.workers, progress=False, **options)
        if done["computed"] != n:
            raise RuntimeError(f"only {done['computed']} of {n} seeds: {done['skipped'][:1]}")

    c.peak()
    with folder:
        return 1 / c.rate(run, short, long)


def voc_rate(c, method, arithmetic):
    size, short, long, scales = ((48, 64), 2, 6, (1., .5)) if c.tiny else ((375, 500), 16, 80, VOC_SCALES)
    more = dict(k=20 if c.tiny else 50, clip_k=True) if method == "ad_cam" else {}
    return seeds_per_second(c, method, arithmetic, size, short, long, scales=scales, flip=True, **more)


def of_voc(arithmetic, goal, ratio_goal):
    @row(f"seeds: AD-CAM, 4 scales with flips, 375x500, {arithmetic}", 40, goal, "images/s")
    def rate(c):
        c.voc = getattr(c, "voc", {}) | {arithmetic: voc_rate(c, "ad_cam", arithmetic)}
        return c.voc[arithmetic], dict(peak_gb=c.peak())

    @row(f"seeds: AD-CAM over CAM, the same run, {arithmetic}", 40, ratio_goal, "times", higher=False)
    def ratio(c):
        cam = voc_rate(c, "cam", arithmetic)
        ad_cam = getattr(c, "voc", {}).get(arithmetic) or voc_rate(c, "ad_cam", arithmetic)
        return cam / ad_cam, dict(cam=round(cam, 2), ad_cam=round(ad_cam, 2))


of_voc("fp32", 15, 1.3)
of_voc("bf16", 35, None)
of_voc("tf32", 25, None)


def of_384(method, arithmetic, goal):
    @row(f"seeds: {method}, one scale 384x384, {arithmetic}", 25, goal, "images/s")
    def rate(c):
        size, short, long = ((64, 64), 4, 12) if c.tiny else ((384, 384), 64, 448)
        return seeds_per_second(c, method, arithmetic, size, short, long, **(dict(k=20 if c.tiny else 50) if method == "ad_cam" else {})), dict(peak_gb=c.peak())


of_384("ad_cam", "fp32", 200)
of_384("cam", "fp32", None)


# --------------------------------------------------------------------------------------------------------------- kernels

def profiled(c, run, units=1, longest=6):
    "(kernels that the device's profiler saw, copies and fills included; where their time went), each per unit"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        run()
        c.sync()
    events = [(e.name(), e.duration_ns(), "CUDA" in str(e.device_type())) for e in p.profiler.kineto_results.events()]
    work, total = [e for e in events if e[2]], {}
    for name, ns, _ in work:
        total[name[:60]] = total.get(name[:60], 0) + ns
    most = {n: round(ns / 1e6 / units, 3) for n, ns in sorted(total.items(), key=lambda t: -t[1])[:longest]}
    waits = sum("Synchronize" in n for n, _, gpu in events if not gpu) / units
    return len(work) / units, dict(busy_ms=round(sum(e[1] for e in work) / 1e6 / units, 2), wall_ms=round(1e3 * statistics.median(c.seconds(run) for _ in range(3)) / units, 2), waits=round(waits, 1), longest_ms=most)


def of_kernels(arithmetic):
    @row(f"kernels of a view of 1,369 tokens with AD-CAM, {arithmetic}", 25, 1200, "kernels", higher=False)
    def kernels(c):
        "As the device's profiler counts them, copies and fills included; without a GPU, operations"
        net, x = c.network(), torch.randn(1, 3, *(64, 64) if c.tiny else (592, 592), device=c.device)
        run = lambda: view_maps(net, x, [1, 2], METHODS["ad_cam"], precision=arithmetic, k=20 if c.tiny else 50)  # noqa: E731
        with torch.no_grad():
            run()
            if not c.cuda:
                with counts.Operations() as operations:
                    run()
                return operations.count, dict(counted="operations")
            return profiled(c, run)


of_kernels("fp32")
of_kernels("bf16")


def of_batch(method, arithmetic):
    @row(f"kernels of an image at 4 scales with flips, in a batch of 16: {method}, {arithmetic}", 25, None, "kernels", higher=False)
    def kernels(c):
        "What tools/bench/counts.py counts without a GPU, and where the time goes"
        size, scales, batch = ((64, 80), (1., .5), 2) if c.tiny else ((368, 496), VOC_SCALES, 16)
        net, keys = c.network(), torch.tensor([[1, 2]] * batch, device=c.device)
        views = [torch.randn(batch, 3, *(round(n * s / net.stride) * net.stride for n in size), device=c.device) for s in scales]
        options = dict(k=20 if c.tiny else 50, clip_k=True) if method == "ad_cam" else {}
        run = lambda: [batch_maps(net, x, keys, METHODS[method], True, precision=arithmetic, **options) for x in views]  # noqa: E731
        run()
        if not c.cuda:
            with counts.Operations() as operations:
                run()
            return operations.count / batch, dict(counted="operations")
        return profiled(c, run, batch, 12)


of_batch("cam", "fp32")
of_batch("ad_cam", "fp32")
of_batch("ad_cam", "bf16")


@row("attention of 2,962 tokens over that of 2,968, bf16", 15, None, "times", higher=False)
def alignment(c):
    "Would padding to a multiple of eight help the tensor cores?"
    from adcam.conformer import whole_attention
    n, batch = (64, 2) if c.tiny else (2968, 8)
    q = torch.randn(3, batch, 6, n, 64, device=c.device, dtype=torch.bfloat16)
    times = {}
    for tokens in (n, n - 6):
        run = lambda: whole_attention(*q[:, :, :, :tokens].contiguous(), .125)  # noqa: E731, B023
        run()
        times[tokens] = statistics.median(c.seconds(run) for _ in range(5))
    return times[n - 6] / times[n], {f"{tokens}_ms": round(1e3 * t, 3) for tokens, t in times.items()}


@row("AD-CAM's own math on 32 views of 2,961 tokens, float64", 20, None, "ms", higher=False)
def own_math(c):
    n, B = (64, 2) if c.tiny else (2961, 32)
    attn = torch.rand(B, 1, 1 + n, 1 + n, device=c.device, dtype=torch.float64)
    attn /= attn.sum(-1, keepdim=True)
    with C.checks_later():
        A = C.patch_attention(attn)
        S = C.co_neighbor(A)
        keep = C.top_k(S, 50 if n > 50 else 20)
        M = torch.rand(B, 2, 1, n, device=c.device)
        parts = dict(patch_attention=lambda: C.patch_attention(attn), co_neighbor=lambda: C.co_neighbor(A), top_k=lambda: C.top_k(S, 50 if n > 50 else 20),
                     masked=lambda: C.refine(A, n, S=S), diffuse=lambda: C.diffuse(M, A, 2), all=lambda: C.diffuse(M, C.refine(C.patch_attention(attn), 50 if n > 50 else 20), 2))
        del keep
        ms = {name: round(1e3 * statistics.median(c.seconds(run) for _ in range(3)), 2) for name, run in parts.items()}
    return ms.pop("all"), ms


# -------------------------------------------------------------------------------------------------------------- training

def config_of(cls, arithmetic, **wanted):
    "A configuration in the named precision, whatever its field for that is called"
    names = {f.name for f in fields(cls)}
    if "precision" in names:
        wanted["precision"] = arithmetic
    elif "mixed_precision" in names:
        wanted["mixed_precision"] = arithmetic
    return cls(**wanted)


def of_loop(name, build, tiny, arithmetic):
    @row(f"loop of 03b: {name}, one step without loader, {arithmetic}", 25, None, "ms", higher=False)
    def loop(c):
        "The same batch again and again, so that device and loop are all there is; what the device was asked to do"
        from adcam import training as T
        from adcam.progress import tqdm
        acc = T.make_accelerator(arithmetic, "cuda:0" if c.cuda else "cpu")
        net, optimizer, batch, gradients = build(c.device, **(tiny() if c.tiny else {}))
        net, optimizer = acc.prepare(net, optimizer)

        def run(steps):
            T.take_steps(acc, optimizer, dict(history=[]), [batch] * steps, lambda b: gradients(acc, net, b), bar=tqdm(disable=True), remedy=str)

        with T.arithmetic(acc.unwrap_model(net), arithmetic, "a step", "the batch"):
            ms, asked = 1e3 * c.rate(run, 2, 3 if c.tiny else 10), {}
            if c.cuda:
                kernels, asked = profiled(c, lambda: run(4), 4, 10)
                asked = dict(kernels=round(kernels), **asked)
        return ms, asked


def of_loops():
    from adcam.cnn import mini_path, resnet_mini
    from adcam.deeplab import deeplabv2_mini
    from adcam.irnet import ResNetStages
    stages = lambda: dict(stages=ResNetStages(resnet_mini(checkpoint=mini_path("pretrained")).eval().backbone_net), batch=2, crop=96)  # noqa: E731
    of_loop("Conformer-S, batch 16 at 384", counts.classifier, lambda: dict(net=conformer_mini(20), batch=2, crop=32), "bf16")
    of_loop("DeepLabV2, batch 10 at 321", counts.segmentation, lambda: dict(net=deeplabv2_mini(21), batch=2, crop=48), "bf16")
    of_loop("IRNet, batch 16 at 512", counts.boundaries, stages, "tf32")


of_loops()


def of_classifier(arithmetic, goal):
    @row(f"training step: Conformer-S, batch 16 at 384, {arithmetic}", 30, goal, "ms", higher=False)
    def step(c):
        from adcam.classifier import TrainConfig, train
        batch, crop, short, long = (2, 32, 1, 3) if c.tiny else (16, 384, 4, 16)
        config = config_of(TrainConfig, arithmetic, epochs=1, batch=batch, crop=crop, resize=None if c.tiny else (320, 640), workers=c.workers)
        net = copy.deepcopy(c.network())
        run = lambda steps: train(net, Photographs(steps * batch, *(48, 64) if c.tiny else (375, 500)), config, progress=False)  # noqa: E731
        c.peak()
        ms = 1e3 * c.rate(run, short, long)
        return ms, dict(images_per_s=round(batch / ms * 1e3, 1), peak_gb=c.peak())


def of_deeplab(arithmetic, goal):
    @row(f"training step: DeepLabV2, batch 10 at 321, {arithmetic}", 30, goal, "ms", higher=False)
    def step(c):
        from adcam.deeplab import DeepLabV2, deeplabv2_mini
        from adcam.segment import SegConfig, train_segmentation
        ds = Photographs(24, *(48, 64) if c.tiny else (375, 500), 10 if c.tiny else 20)
        size, short, long = (dict(batch=2, accumulate=1, crop=32), 1, 3) if c.tiny else (dict(batch=10, crop=321), 2, 12)
        net = deeplabv2_mini() if c.tiny else DeepLabV2(21)

        def run(iterations):
            config = config_of(SegConfig, arithmetic, iterations=iterations, check=1000, lr=1e-5, workers=c.workers, **size)
            train_segmentation(net, ds, ds.of_mask, config, progress=False)

        c.peak()
        return 1e3 * c.rate(run, short, long), dict(peak_gb=c.peak())


def of_irnet(arithmetic, goal):
    @row(f"training step: IRNet, batch 16 at 512, {arithmetic}", 30, goal, "ms", higher=False)
    def step(c):
        from adcam.cnn import mini_path, resnet_mini
        from adcam import boundaries
        from adcam.irnet import IRNet, IRNetConfig, ResNet50Stages, ResNetStages, train_irnet
        net = IRNet(ResNetStages(resnet_mini(checkpoint=mini_path("pretrained")).eval().backbone_net)) if c.tiny else IRNet(ResNet50Stages())
        batch, more, short, long = (2, dict(crop=64, radius=4), 1, 3) if c.tiny else (16, {}, 3, 11)
        config = config_of(IRNetConfig, arithmetic, epochs=1, batch=batch, lr_edge=.01, lr_displacement=.01, workers=c.workers, **more)

        def photographs(n):
            return Photographs(n, *(96, 96) if c.tiny else (375, 500))

        def run(steps):
            ds = photographs(steps * batch)
            with mock.patch.object(boundaries, "set_mean_shift"):       # once after a training, not once per step
                train_irnet(net, ds, ds.of_mask, config, progress=False)

        c.peak()
        ms, peak = 1e3 * c.rate(run, short, long), c.peak()
        shift = c.rate(lambda n: boundaries.set_mean_shift(net, photographs(n * batch), config.crop, batch, c.workers), 2, 8) / batch
        return ms, dict(peak_gb=peak, mean_shift_ms_per_image=round(1e3 * shift, 2))


@row("prediction: DeepLabV2 with CRF, 375x500", 25, 120, "ms", higher=False)
def prediction(c):
    from adcam.deeplab import DeepLabV2, deeplabv2_mini
    from adcam.segment import predict
    net = (deeplabv2_mini() if c.tiny else DeepLabV2(21)).eval().to(c.device)
    image = Photographs(1, *(48, 64) if c.tiny else (375, 500))[0].image
    predict(net, image)
    times = [c.seconds(lambda: predict(net, image)) for _ in range(5)]
    bare = statistics.median(c.seconds(lambda: predict(net, image, crf=False)) for _ in range(5))
    return 1e3 * statistics.median(times), dict(without_crf_ms=round(1e3 * bare, 1))


of_classifier("bf16", 60)
of_deeplab("bf16", 120)
of_irnet("tf32", 50)
of_irnet("fp32", None)
of_classifier("fp32", None)
of_deeplab("fp32", None)


# --------------------------------------------------------------------------------------------------------------- running

class Timeout(BaseException):
    "A row took too long; no Exception, so that no `except Exception` on the way keeps it"


def one(c, spec, left):
    "Run a row: its entry in the file"
    out, start = dict(name=spec["name"], value=None, unit=spec["unit"], goal=spec["goal"], ok=None, status="skipped", seconds=0., details={}), time.perf_counter()
    if left < 4:
        return out | dict(details=dict(why="no time left"))

    def ring(*_):
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(left, spec["limit"] * (3 if c.tiny else 1)))
    try:
        value, details = spec["run"](c)
        out |= dict(value=value if isinstance(value, bool) else round(float(value), 3), details=details, status="measured")
        if spec["goal"] == "pass" or spec["goal"] is not None and not c.tiny:
            out["ok"] = value if spec["goal"] == "pass" else value >= spec["goal"] if spec["higher"] else value <= spec["goal"]
    except Timeout:
        out |= dict(status="stopped", details=dict(why=f"more than {min(left, spec['limit']):.0f} s"))
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # noqa: BLE001  a row that fails is a result; the others go on
        where = [f"{Path(f.filename).name}:{n}" for f, n in _frames(e) if "adcam" in f.filename or "bench" in f.filename][-3:]
        out |= dict(status="error", details=dict(why=f"{type(e).__name__}: {str(e).strip()[:400]}", where=where[::-1]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return out | dict(seconds=round(time.perf_counter() - start, 2))


def _frames(error):
    t = error.__traceback__
    while t is not None:
        yield t.tb_frame.f_code.co_filename and types.SimpleNamespace(filename=t.tb_frame.f_code.co_filename), t.tb_lineno
        t = t.tb_next


def line(r):
    goal = "" if r["goal"] in (None, "pass") else f" (goal {r['goal']})"
    value = {True: "yes", False: "NO", None: r["status"]}[r["value"]] if r["value"] is None or isinstance(r["value"], bool) else f"{r['value']:.1f} {r['unit']}"
    mark = {True: "ok    ", False: "MISSED", None: "      "}[r["ok"]]
    return f"{mark} {r['name']:66} {value:>18}{goal}  {r['seconds']:.1f} s  {json.dumps(r['details'], default=str)[:300]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=float, default=195, help="seconds for everything, imports included")
    parser.add_argument("--rows", default="", help="parts of names, separated by commas: only these rows")
    parser.add_argument("--tiny", action="store_true", help="small sizes, also without a GPU: a test of this script")
    parser.add_argument("--out", type=Path, default=None, help="folder of gpu.json; results/bench, and nowhere with --tiny")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not (a.tiny or torch.cuda.is_available()):
        parser.exit(2, "gpu.py: PyTorch sees no GPU here; --tiny tries the script on a CPU\n")
    wanted = [w for w in a.rows.split(",") if w]
    chosen = [r for r in ROWS if not wanted or any(w in r["name"] for w in wanted)]
    if not chosen:
        parser.exit(2, f"gpu.py: no row is named like {a.rows}; there are: {'; '.join(r['name'] for r in ROWS)}\n")
    c, rows, out = Bench(a.tiny), [], a.out or (None if a.tiny else ROOT / "results/bench")
    settings = dict(network="Conformer-S, random weights", gpu=device_class(c.device), workers=c.workers, tiny=a.tiny, total=a.total, rows=a.rows) | {"torch": numerics(c.device)["torch"]}
    if c.cuda:
        settings |= dict(memory_gb=round(torch.cuda.get_device_properties(0).total_memory / 1e9), cores=os.cpu_count(), cudnn=torch.backends.cudnn.version())
    for spec in chosen:
        rows.append(one(c, spec, a.total - (time.time() - STARTED)))
        print(line(rows[-1]), flush=True)
        if c.cuda:
            torch.cuda.empty_cache()
        if out:
            save_result("gpu", rows, out, provenance(settings=settings, seconds=time.time() - STARTED), how="make bench-gpu")
    missed = [r["name"] for r in rows if r["ok"] is False or r["status"] in ("error", "stopped")]
    print(f"{len(rows)} rows in {time.time() - STARTED:.0f} s; missed or failed: {len(missed)}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
