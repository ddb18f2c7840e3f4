"""CPU seconds of the dense CRF: adcam.crf (lattice, PyTorch) against pydensecrf2 (C++), same pictures, same run, one thread.

Repeat:  python tools/bench/crf.py            (needs pydensecrf2: pip install adcam[crf])
Writes results/bench/crf.json. 375x500 pixels, 10 iterations, IRN's kernels, 3 and 21 labels; the lattice is built anew in every call, as in pydensecrf2.
Pictures: Scenes drawn at 512 pixels and cropped; with --photos (default ADCAM_COCO_MINI) also photographs of that folder, cropped.
Seconds are the shortest of --repeats runs per picture, ours and theirs in turn, summed over the pictures. Memory is the growth of the peak of a fresh process.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adcam.crf import IRN, dense_crf
from adcam.pipeline import project_root, provenance, save_result
from adcam.scenes import render_scene

H, W = 375, 500
LIMIT = 1.5


def pictures(photos: Path | None, count: int) -> dict[str, list[np.ndarray]]:
    "Pictures of 375x500 by kind"
    sets = {"Scenes": [np.ascontiguousarray(render_scene(20_000_000 + i, 512).image[:H, :W]) for i in range(count)]}
    if photos and (photos / "JPEGImages").is_dir():
        found = (np.array(Image.open(p).convert("RGB")) for p in sorted((photos / "JPEGImages").glob("*.jpg")))
        large = (a[:H, :W].copy() for a in found if a.shape[0] >= H and a.shape[1] >= W)
        sets["photographs"] = [a for a, _ in zip(large, range(count))]
    return sets


def unary(labels: int) -> np.ndarray:
    "Energies without structure, so that nothing is easy: (C,H,W) float32"
    return (2 * np.random.default_rng(0).random((labels, H, W))).astype(np.float32)


def cpu_seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(images: list[np.ndarray], labels: int, repeats: int) -> dict:
    "Seconds of both, of building our lattices, and how many labels agree"
    u, ours, theirs, build, agree = unary(labels), 0., 0., 0., []
    for image in images:
        runs = [(cpu_seconds(lambda: dense_crf(u, image, **IRN)), cpu_seconds(lambda: dense_crf(u, image, **IRN, backend="pydensecrf")),
                 cpu_seconds(lambda: dense_crf(u, image, **IRN | {"iterations": 0}))) for _ in range(repeats)]
        best = np.min(runs, 0)
        ours, theirs, build = ours + best[0], theirs + best[1], build + best[2]
        agree.append((dense_crf(u, image, **IRN).argmax(0) == dense_crf(u, image, **IRN, backend="pydensecrf").argmax(0)).mean())
    n = len(images)
    return dict(seconds=ours / n, seconds_pydensecrf2=theirs / n, seconds_build=build / n, agree=float(np.mean(agree)))


def peak(backend: str, labels: int, picture: str) -> int:
    "Growth of the peak memory of this process by one CRF, bytes"
    def used(): return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])   # of this program; ru_maxrss would hold the parent's
    image, u = np.load(picture, allow_pickle=False), unary(labels)
    dense_crf(u[:, :8, :8], image[:8, :8], backend=backend)   # what is loaded at the first call
    before = used()
    dense_crf(u, image, **IRN, backend=backend)
    return used() - before


def fresh(backend: str, labels: int, picture: Path) -> int:
    "`peak` in a fresh process, where no larger peak lies before"
    command = [sys.executable, __file__, "--peak", backend, "--labels", str(labels), "--picture", str(picture)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def two(images: list[np.ndarray], repeats: int) -> dict:
    "Two unaries of one picture, as an IR label needs: one call of ours, two of theirs"
    u, ours, theirs = np.stack([unary(3), unary(3)[::-1]]), 0., 0.
    for image in images:
        runs = [(cpu_seconds(lambda: dense_crf(u, image, **IRN)), cpu_seconds(lambda: dense_crf(u, image, **IRN, backend="pydensecrf"))) for _ in range(repeats)]
        ours, theirs = np.add((ours, theirs), np.min(runs, 0) / len(images))
    return dict(seconds=ours, seconds_pydensecrf2=theirs)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", type=Path, default=os.environ.get("ADCAM_COCO_MINI", "coco_mini"), help="folder with JPEGImages/*.jpg")
    p.add_argument("--count", type=int, default=3, help="pictures of each kind")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out-dir", type=Path, default=project_root() / "results/bench")
    p.add_argument("--peak", help=argparse.SUPPRESS)
    p.add_argument("--picture", help=argparse.SUPPRESS)
    p.add_argument("--labels", type=int, default=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.peak: return print(peak(a.peak, a.labels, a.picture))
    start, rows, sets = time.time(), [], pictures(a.photos, a.count)
    for kind, images in sets.items():
        for labels in (3, 21):
            m = measure(images, labels, a.repeats)
            ratio = m["seconds"] / m["seconds_pydensecrf2"]
            rows.append(dict(name=f"CRF {H}x{W}, {labels} labels, {len(images)} {kind}: CPU time against pydensecrf2", ratio=ratio, unit="ratio", limit=LIMIT, ok=ratio <= LIMIT,
                             build_share=m["seconds_build"] / m["seconds"], **m))
        m = two(images, a.repeats)
        ratio = m["seconds"] / m["seconds_pydensecrf2"]
        rows.append(dict(name=f"CRF {H}x{W}, 2 unaries of 3 labels for one picture, {len(images)} {kind}: CPU time against pydensecrf2", ratio=ratio, unit="ratio", limit=LIMIT, ok=ratio <= LIMIT, **m))
    for kind, images in sets.items():
        for labels in (3, 21):
            with tempfile.TemporaryDirectory() as folder:
                np.save(Path(folder, "picture.npy"), images[0])
                ours, theirs = (fresh(b, labels, Path(folder, "picture.npy")) for b in ("lattice", "pydensecrf"))
            rows.append(dict(name=f"CRF {H}x{W}, {labels} labels, one of {kind}: peak memory", value=ours / 2**20, unit="MiB", bytes=ours, bytes_pydensecrf2=theirs))
    save_result("crf", rows, a.out_dir, provenance(settings=dict(IRN, threads=1, repeats=a.repeats), seconds=time.time() - start), how="python tools/bench/crf.py")
    for r in rows: print(r["name"], "|", f"{r.get('ratio', r.get('value')):.3g} {r['unit']}, limit {r.get('limit')}", {k: round(v, 3) for k, v in r.items() if k.startswith(("seconds", "build", "agree"))})


if __name__ == "__main__":
    main()
