"""PSA's walk: our sparse one beside the dense matrix that the official code squares eight times.

    python tools/bench/psa.py [--size 375x500] [--squarings 8] [--rounds 5] [--out results/bench]

Features of 448 channels at stride 8 and a seed with two classes, made by the golden files' rules, on the grid of a photograph (47x63 cells for 375x500). Both ways start from the
features and end with the walked maps, the building of the matrix included: radius 5, beta 8, 2^8 steps. The dense way is written here from the formula as the official code goes:
all 21 maps walk (19 of them zero), pairs from cells that have all their neighbors, mirrored, N x N in float32, columns divided by their sums, squared eight times with denormals
flushed. Official code does this on a GPU; the ratio is for the same CPU, one thread, CPU seconds (`time.process_time`), in one run. `--squarings` below 8 is for a quick look: its
seconds are then scaled to 8 and the row says so.
"""
import argparse
import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adcam.baselines.psa import background, psa_walk
from adcam.irnet import path_index
from adcam.pipeline import provenance, save_result

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("ADCAM_GOLDEN") or ROOT / "tests/golden")
CLASSES, KEYS, LIMIT = 20, (4, 11), 100


def inputs(size: tuple[int, int]) -> tuple[np.ndarray, torch.Tensor]:
    "A seed (2,H,W) and features (448,h,w), blocky so that affinities are neither all 0 nor all 1."
    spec = importlib.util.spec_from_file_location("rules", GOLDEN / "irn/rules.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    h, w = (-(-n // 8) for n in size)
    part = rules.label_map(885, h, w, 3, cell=6, ignore_frac=0.)
    f = np.abs(rules.nrm(882, (448, h, w))) * .3 + 2 * (np.arange(448)[:, None, None] % 3 == part)
    return rules.cam_map(30, 2, *size), torch.from_numpy(f.astype(np.float32))


def dense_walk(cam: np.ndarray, f: torch.Tensor, squarings: int) -> tuple[np.ndarray, float]:
    "All 21 maps through the squared dense matrix; also the CPU seconds of the squarings alone."
    torch.set_flush_denormal(True)
    (h, w), (H, W) = f.shape[1:], cam.shape[1:]
    maps = torch.zeros(CLASSES + 1, h * 8, w * 8)
    maps[[0, *(k + 1 for k in KEYS)], :H, :W] = torch.from_numpy(background(cam, 16))
    x, index, flat = F.avg_pool2d(maps, 8).flatten(1), path_index(5, (h, w)), f.flatten(1)
    src, A = torch.from_numpy(index.src), torch.eye(h * w)
    for to in torch.from_numpy(index.to):
        A[src, to] = A[to, src] = torch.exp(-(flat[:, src] - flat[:, to]).abs().mean(0)) ** 8
    A /= A.sum(0, keepdim=True)
    start = time.process_time()
    for _ in range(squarings): A = A @ A
    seconds = time.process_time() - start
    return (x @ A).reshape(-1, h, w)[[0, *(k + 1 for k in KEYS)]].numpy(), seconds


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--size", default="375x500")
    ask.add_argument("--squarings", type=int, default=8)
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--out", type=Path, default=ROOT / "results/bench")
    a = ask.parse_args()
    torch.set_num_threads(1)
    start, size = time.time(), tuple(map(int, a.size.split("x")))
    cam, f = inputs(size)
    psa_walk(cam[:, :96, :96], f[:, :12, :12])                               # what is loaded on first use is not the walk's
    seconds = []
    for _ in range(a.rounds):
        began = time.process_time()
        ours = psa_walk(cam, f, pairs="official")
        seconds.append(time.process_time() - began)
    began = time.process_time()
    dense, squaring = dense_walk(cam, f, a.squarings)
    slow = time.process_time() - began + squaring * (8 / a.squarings - 1)
    cpu, note = float(np.median(seconds)), {} if a.squarings == 8 else dict(note=f"dense time scaled from {a.squarings} squarings")
    rows = [dict(name=f"dense walk / ours, {a.size}", value=slow / cpu, unit="times", limit=LIMIT, ok=slow / cpu >= LIMIT, dense_seconds=slow, our_seconds=cpu, rounds=seconds, cells=f[0].numel(), **note)]
    if a.squarings == 8:
        off = float(np.abs(ours - dense).max() / dense.max())
        rows.append(dict(name="largest difference of the walked maps", value=off, unit="of the maximum", limit=1e-4, ok=off <= 1e-4))
    for r in rows: print(f"{r['name']}: {r['value']:.4g} {r['unit']}, limit {r['limit']}, ok {r['ok']}")
    origin = provenance(settings=dict(size=a.size, squarings=a.squarings, rounds=a.rounds, threads=1), seconds=time.time() - start)
    print(save_result("psa", rows, a.out, origin, how="python tools/bench/psa.py"))


if __name__ == "__main__":
    main()
