"""The frozen ViT's attention, computed for every photograph or read from a file; and what counting Table 3 and Figure 4 takes on a CPU.

    python tools/bench/attention.py [--data VOC --cnn-weights FILE --vit-weights FILE --weights FILE] [--photographs 6] [--out results/bench]

A file of attention holds what `adcam.voc` reads of a photograph, the means over all blocks and over the last half, in half precision times N. The maps that follow from it are
compared with those of the computed one. Counting is one pass of `adcam.voc.count_list` with everything that the two notebooks read, one training seed, evenly spread photographs,
one thread; CPU seconds (`time.process_time`), scaled to 1,760 photographs and to two processes. Without `--data` drawn scenes of 1,024 tokens and random networks take the place
of photographs: the seconds are alike, the differences of the maps say nothing then.
"""
import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adcam.data import VOCFolder
from adcam.networks import build_network, save_network
from adcam.pipeline import Point, provenance, save_result
from adcam.scenes import write_voc
from adcam.seeds import positive_classes, view
from adcam.voc import Plan, Source, Workers, block_means, count_list, shared_maps, spread_part, stacked_points

ROOT = Path(__file__).resolve().parents[2]
NETWORK, PHOTOGRAPHS, MINUTES, DISK = "tf_efficientnet_lite0+vit_small_patch14_dinov2", 1760, 60, 10
POINTS = [Point("ts_cam"), Point("trans_cam", 0, 1, "pull"), *(Point(m, k, 2, d) for m, k in (("att_diffu", 0), ("ad_cam", 50)) for d in ("push", "pull"))]


def timed(work) -> tuple:
    "What it returns, and its CPU seconds."
    began = time.process_time()
    out = work()
    return out, time.process_time() - began


def write(path: Path, means: list) -> None:
    N = len(means[0][0][0, 0]) - 1
    np.savez(path, *((m[0, 0] * N).half().numpy() for m, _ in means))


def read(path: Path, means: list) -> list:
    "The same as `block_means` gave"
    with np.load(path, allow_pickle=False) as z: arrays = [torch.from_numpy(z[n]).float()[None, None] for n in z.files]
    return [(a / (a.shape[-1] - 1), summed) for a, (_, summed) in zip(arrays, means)]


def one(pair, sample, folder: Path) -> dict:
    "Seconds, bytes and differences of one photograph."
    x, keys, path = view(sample.image, 1., pair.stride), positive_classes(sample.label, pair.num_classes), folder / f"{sample.id}.npz"
    with torch.no_grad():
        _, cnn = timed(lambda: pair.class_maps(x))
        (cams, attn, _), both = timed(lambda: shared_maps([pair], x))
        means, mean_s = timed(lambda: block_means(attn))
        _, write_s = timed(lambda: write(path, means))
        stored, read_s = timed(lambda: read(path, means))
        exact, near = (torch.cat([stacked_points(cams, m, keys, POINTS, s) for m, s in found], 1) for found in (means, stored))
    size, top = path.stat().st_size, exact.abs().amax((1, 2, 3, 4))
    path.unlink()
    return dict(tokens=math.prod(cams.shape[-2:]), compute=both - cnn + mean_s, write=write_s, read=read_s, bytes=size, off=((exact - near).abs().amax((1, 2, 3, 4)) / top).tolist())


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", type=Path)
    ask.add_argument("--list", default="val")
    ask.add_argument("--cnn-weights", default="")
    ask.add_argument("--vit-weights", default="")
    ask.add_argument("--weights", default="", help="the trained CNN branch; untrained if not given")
    ask.add_argument("--photographs", type=int, default=6)
    ask.add_argument("--out", type=Path, default=ROOT / "results/bench")
    a = ask.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        data = a.data or write_voc(Path(tmp) / "voc", splits=("val",), n=a.photographs, size=448) or Path(tmp) / "voc"
        ds = spread_part(VOCFolder(data, a.list if a.data else "val"), a.photographs)
        file = a.weights or save_network(build_network(NETWORK, len(ds.classes), cnn_weights=a.cnn_weights, vit_weights=a.vit_weights, seed=0), Path(tmp) / "cnn.safetensors", NETWORK, "cnn")
        source = Source(NETWORK, len(ds.classes), a.cnn_weights, a.vit_weights, (str(file),))
        pair = source.pairs()[0]
        one(pair, ds[0], Path(tmp))                                          # what is loaded on first use is not counted
        found = [one(pair, ds[i], Path(tmp)) for i in range(len(ds))]
        with Workers(source, Plan(), 1, "cpu") as workers: counting = float(count_list(workers, ds, Path(tmp) / "chunks", progress=False)["seconds_cpu"]) / len(ds)
    mean = lambda name: float(np.mean([f[name] for f in found]))
    disk, minutes, worst = mean("bytes") * PHOTOGRAPHS / 1e9, counting * PHOTOGRAPHS / 2 / 60, np.max([f["off"] for f in found], 0)
    rows = [dict(name="attention of one photograph, computed", value=mean("compute"), unit="CPU-s", limit=None, ok=None, tokens=mean("tokens")),
            dict(name="attention of one photograph, read", value=mean("read"), unit="CPU-s", limit=None, ok=None, write=mean("write")),
            dict(name="file of one photograph, two means", value=mean("bytes") / 1e6, unit="MB", limit=None, ok=None),
            dict(name="files of all photographs", value=disk, unit="GB", limit=DISK, ok=disk <= DISK, photographs=PHOTOGRAPHS),
            *(dict(name=f"largest difference of the maps, {p.method} {p.direction}".strip(), value=float(w), unit="of the maximum", limit=None, ok=None, k=p.k) for p, w in zip(POINTS, worst)),
            dict(name="counting one photograph, one training seed", value=counting, unit="CPU-s", limit=None, ok=None, points=len(Plan().points)),
            dict(name="counting all photographs in two processes", value=minutes, unit="minutes", limit=MINUTES, ok=minutes <= MINUTES, photographs=PHOTOGRAPHS)]
    for r in rows: print(f"{r['name']}: {r['value']:.4g} {r['unit']}" + ("" if r["limit"] is None else f", limit {r['limit']}, ok {r['ok']}"))
    origin = provenance(settings=dict(network=NETWORK, photographs=len(ds), of="VOC" if a.data else "drawn scenes", list=a.list, threads=1), data={a.list: ds.fingerprint()}, checkpoints=[f for f in (a.cnn_weights, a.vit_weights, a.weights) if f], seconds=time.time() - start)
    print(save_result("attention", rows, a.out, origin, how="python tools/bench/attention.py" + (" --data VOC --cnn-weights FILE --vit-weights FILE --weights FILE" if a.data else "")))


if __name__ == "__main__":
    main()
