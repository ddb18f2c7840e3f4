"""What AD-CAM costs beside CAM, on real photographs: time per image, peak memory, two processes, many images, a large image.

    python tools/bench/extract.py [--data TREE] [--limit 12] [--scale 0.6] [--rounds 8]

Conformer-S with random weights (values do not matter for cost), float32, one thread per process. TREE is a folder in VOC layout, by default
coco_mini (ADCAM_COCO_MINI): 211 photographs, mostly 640 x 480; scale 0.6 makes their long side 384. A photograph without a VOC class is
given the first one, so that all of them are extracted. `--limit` takes the first images only; without it all are used.

Everything whose memory is measured runs in a fresh process (VmHWM of /proc, peak resident memory of the whole process, libraries included).
CAM runs without computing attention (fused kernel in all blocks but one), so the ratio holds everything that AD-CAM adds: the attention
matrices, their mean, A, S, TOP and the diffusion. The time ratio at 384 is the median over rounds of the ratio of CPU seconds, CAM and
AD-CAM in turns in one process. Two processes are two launched ranks (RANK, WORLD_SIZE) that share no disk lock and no network; their time is
that of the slower one, from the first image to the last. It needs two free cores.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adcam.conformer import conformer_mini, conformer_small
from adcam.data import VOC_CLASSES, VOCFolder
from adcam.pipeline import provenance, save_result
from adcam.scenes import Scenes
from adcam.seeds import METHODS, check_seeds, extract_dataset, view_maps

ROOT = Path(__file__).resolve().parents[2]


def peak_kib():
    "Peak resident memory of this program; ru_maxrss would hold that of the program that started it"
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


class Labeled:
    "The first `limit` photographs of a tree, each with at least one class."

    def __init__(self, root, limit):
        self.ds = VOCFolder(root, "trainval", classes=VOC_CLASSES)
        self.classes, self.ids = self.ds.classes, self.ds.ids[:limit or None]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        s = self.ds[i]
        return s if s.label.any() else s._replace(label=np.eye(len(self.classes), dtype=np.float32)[0])

    def fingerprint(self):
        return self.ds.fingerprint()


def network():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return conformer_small(20).eval()


# ---- what a fresh process measures; each returns a dictionary, to which the peak memory is added

def photos(data, limit, scale, method, out):
    "Extract a data set; time from the first image to the last."
    ds, model = Labeled(data, int(limit)), network()
    cpu, wall = time.process_time(), time.perf_counter()
    done = extract_dataset(model, ds, out, method, scales=(float(scale),), progress=False)
    return dict(images=done["computed"], skipped=len(done["skipped"]), cpu_s=time.process_time() - cpu, wall_s=time.perf_counter() - wall)


def view(method, h, w):
    "One view of h x w pixels."
    model, x = network(), torch.randn(1, 3, int(h), int(w))
    cpu = time.process_time()
    with torch.no_grad():
        view_maps(model, x, [1, 2], METHODS[method])
    return dict(cpu_s=time.process_time() - cpu, tokens=int(h) * int(w) // 256)


def many(n, out):
    "A small network on n scenes: does memory grow with the number of images?"
    torch.set_num_threads(1)
    return dict(images=extract_dataset(conformer_mini(10), Scenes("test", int(n), size=96), out, k=20, progress=False)["computed"])


def in_turns(side, rounds):
    "CPU seconds of CAM and of AD-CAM on a square view, in turns."
    model, x = network(), torch.randn(1, 3, int(side), int(side))
    seconds = {"cam": [], "ad_cam": []}
    with torch.no_grad():
        for r in range(int(rounds) + 1):
            for name, times in seconds.items():
                start = time.process_time()
                view_maps(model, x, [1, 2], METHODS[name])
                if r:  # the first round warms up
                    times.append(time.process_time() - start)
    return seconds


KINDS = dict(photos=photos, view=view, many=many, in_turns=in_turns)


def start(kind, *args, **env):
    command = [sys.executable, __file__, "--child", kind, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **env))


def finish(process):
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a measuring process ended with code {process.returncode}")
    return json.loads(out.splitlines()[-1])


def fresh(kind, *args):
    return finish(start(kind, *args))


# ---- the rows

def row(name, value, unit, limit=None, ok=None, **raw):
    return dict(name=name, value=round(value, 4), unit=unit, limit=limit, ok=ok, **raw)


def at_384(rounds):
    seconds = fresh("in_turns", 384, rounds)
    ratio = statistics.median(a / c for c, a in zip(seconds["cam"], seconds["ad_cam"]))
    peak = {m: fresh("view", m, 384, 384)["peak_mb"] for m in ("cam", "ad_cam")}
    memory = peak["ad_cam"] / peak["cam"]
    return [row("AD-CAM over CAM, CPU time at 384", ratio, "times", 1.10, ratio <= 1.10, seconds=seconds),
            row("AD-CAM over CAM, peak memory at 384", memory, "times", 1.15, memory <= 1.15, peak_mb=peak)]


def large():
    runs = {m: fresh("view", m, 752, 1008) for m in ("cam", "ad_cam")}
    peak = runs["ad_cam"]["peak_mb"]
    return [row("peak memory of a 2.0-scale VOC view, AD-CAM", peak, "MB", 1500, peak < 1500, pixels="752x1008", runs=runs)]


def flat(folder):
    runs = [fresh("many", n, folder / f"many{n}") for n in (50, 200)]
    ratio = runs[1]["peak_mb"] / runs[0]["peak_mb"]
    return [row("peak memory, 200 images over 50", ratio, "times", 1.05, ratio <= 1.05, runs=runs)]


def photographs(data, limit, scale, folder):
    "Every photograph with CAM and with AD-CAM; AD-CAM once more with two ranks."
    runs = {m: fresh("photos", data, limit, scale, m, folder / m) for m in ("cam", "ad_cam")}
    ranks = [start("photos", data, limit, scale, "ad_cam", folder / "two", RANK=str(r), WORLD_SIZE="2") for r in (0, 1)]
    two, ds = [finish(p) for p in ranks], Labeled(data, limit)
    same = all((folder / "two" / f"{i}.npz").read_bytes() == (folder / "ad_cam" / f"{i}.npz").read_bytes() for i in ds.ids)
    whole = check_seeds(folder / "two", ds)["complete"] and same
    faster = runs["ad_cam"]["wall_s"] / max(t["wall_s"] for t in two)
    rows = [row(f"photographs, {m}: CPU time per image", r["cpu_s"] / r["images"], "s", images=r["images"], scale=scale, run=r) for m, r in runs.items()]
    rows += [row(f"photographs, {m}: peak memory", r["peak_mb"], "MB", images=r["images"], scale=scale) for m, r in runs.items()]
    ratio, memory = (runs["ad_cam"][k] / runs["cam"][k] for k in ("cpu_s", "peak_mb"))
    rows += [row("photographs, AD-CAM over CAM: CPU time", ratio, "times"), row("photographs, AD-CAM over CAM: peak memory", memory, "times")]
    return rows + [row("two processes over one, AD-CAM", faster, "times faster", 1.6, faster >= 1.6 and whole, one=runs["ad_cam"], two=two, same_bytes=same, cores=os.cpu_count(), load=os.getloadavg())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in VOC layout; coco_mini if not given")
    parser.add_argument("--limit", type=int, default=0, help="take the first images only; 0: all")
    parser.add_argument("--scale", type=float, default=.6, help="resize factor of the photographs")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of the time ratio at 384")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench", help="folder of extract.json")
    a = parser.parse_args()
    began, data = time.time(), a.data or Path(os.environ.get("ADCAM_COCO_MINI", "coco_mini"))
    rows, prints = at_384(a.rounds) + large(), {}
    with tempfile.TemporaryDirectory() as folder:
        rows += flat(Path(folder))
        if data.is_dir():
            rows += photographs(data, a.limit, a.scale, Path(folder))
            prints["photographs"] = Labeled(data, a.limit).fingerprint()
        elif a.data:
            raise SystemExit(f"no folder {data}")
    settings = dict(network="conformer_small, random weights", threads=1, scale=a.scale, limit=a.limit, rounds=a.rounds)
    path = save_result("extract", rows, a.out, provenance(settings=settings, data=prints, seconds=time.time() - began), how="python tools/bench/extract.py")
    for r in rows:
        print(f"{r['name']:50} {r['value']:9.3f} {r['unit']}" + (f"  limit {r['limit']}, {'ok' if r['ok'] else 'MISSED'}" if r["limit"] else ""))
    print(path.name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        result = KINDS[sys.argv[2]](*sys.argv[3:])
        print(json.dumps(dict(result, peak_mb=peak_kib() * 1024 / 1e6)))
    else:
        main()
