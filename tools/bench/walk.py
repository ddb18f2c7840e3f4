"""The random walk: our sparse Chebyshev walk beside the dense matrix that official IRN squares eight times.

    python tools/bench/walk.py [--squarings 8] [--rounds 7] [--out results/bench]

Input is that of the golden g03b: two maps and an edge map of 94x125 (a photograph of 375x500), radius 5, beta 10, 2^8 steps. The dense way is
written here from the formula: affinities into an N x N float32 matrix, columns normalized, squared eight times with denormals flushed (without
flushing it takes several times longer on a CPU), then one product with the maps. Official IRN does this on a GPU, where a squaring is fast and the
memory is the obstacle; the ratios below are for the same CPU and one thread.

Each way runs in a process of its own. CPU seconds are `time.process_time`, the building of the matrix included: one round of the dense way
(minutes), the median of `rounds` for ours. Memory is what the walk adds to the process: its peak while walking (VmHWM of /proc, reset before)
less its size before; the peak of the whole process, libraries included, stands beside it. `--squarings` below 8 is for a quick look: its
seconds are then scaled to 8 and the row says so.
"""
import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from adcam.walk import _half_disk, _path, random_walk
from adcam.pipeline import provenance, save_result

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("ADCAM_GOLDEN") or ROOT / "tests/golden")
SIZES = {"94x125": (94, 125), "120x160": (120, 160)}


def inputs(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    "Maps (2,h,w) and edge (h,w) of golden g03b, by its rule."
    spec = importlib.util.spec_from_file_location("rules", GOLDEN / "irn/rules.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    return rules.cam_map(600, 2, *size), rules.edge_map(601, *size)


def dense_walk(cam: np.ndarray, edge: np.ndarray, squarings: int, radius: int = 5, beta: float = 10) -> tuple[np.ndarray, float]:
    "The walk by repeated squaring of the dense transition matrix; also the CPU seconds of the squarings alone."
    torch.set_flush_denormal(True)
    h, w = edge.shape
    cells = torch.arange(h * w).reshape(h, w)
    A = torch.eye(h * w)
    for dy, dx in _half_disk(radius):
        left, right = max(0, -dx), w - max(0, dx)
        walls = torch.stack([torch.from_numpy(edge)[y:h - dy + y, left + x:right + x] for y, x in _path(dy, dx)])
        a = (1 - walls.amax(0)).flatten() ** beta
        i, j = cells[:h - dy, left:right].flatten(), cells[dy:, left + dx:right + dx].flatten()
        A[i, j] = A[j, i] = a
    A /= A.sum(0, keepdim=True)
    start = time.process_time()
    for _ in range(squarings):
        A = A @ A
    seconds = time.process_time() - start
    return ((torch.from_numpy(cam * (1 - edge)).flatten(1)) @ A).reshape(cam.shape).numpy(), seconds


def memory(field: str) -> int:
    "A line of /proc/self/status in bytes; elsewhere the peak of the process."
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(x for x in status.read_text().splitlines() if x.startswith(field)).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak cannot be reset here: memory is counted from the peak before", file=sys.stderr)


def child(way: str, size: str, squarings: int, rounds: int, result: Path) -> None:
    "One way in this process: prints its numbers as JSON, writes its maps."
    torch.set_num_threads(1)
    cam, edge = inputs(SIZES[size])
    random_walk(cam[:, :20, :20], edge[:20, :20], exp_times=2)  # what is loaded on first use is not the walk's
    forget_peak()
    before, seconds, part = memory("VmRSS"), [], 0.
    for _ in range(rounds):
        start = time.process_time()
        if way == "dense":
            out, part = dense_walk(cam, edge, squarings)
        else:
            out = random_walk(cam, edge, method=way)
        seconds.append(time.process_time() - start)
    np.save(result, out)
    print(json.dumps(dict(way=way, size=size, cpu_seconds=seconds, squaring_seconds=part, before_bytes=before, peak_bytes=memory("VmHWM"))))


def run(way: str, size: str, squarings: int, rounds: int, folder: Path) -> tuple[dict, np.ndarray]:
    file = folder / f"{way}_{size}.npy"
    words = [sys.executable, __file__, "--child", way, "--size", size, "--squarings", str(squarings), "--rounds", str(rounds), "--result", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    raw = json.loads(done.stdout.splitlines()[-1])
    return raw | dict(added_bytes=raw["peak_bytes"] - raw["before_bytes"]), np.load(file, allow_pickle=False)


def main() -> None:
    import tempfile
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--squarings", type=int, default=8)
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--out", type=Path, default=ROOT / "results/bench")
    for name in ("--child", "--size", "--result"):
        ask.add_argument(name, help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.child:
        return child(a.child, a.size, a.squarings, a.rounds, Path(a.result))
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ours, walked = run("chebyshev", "94x125", 0, a.rounds, folder)
        exact, reference = run("products", "94x125", 0, a.rounds, folder)
        large, _ = run("chebyshev", "120x160", 0, a.rounds, folder)
        dense, naive = run("dense", "94x125", a.squarings, 1, folder)
    cpu = float(np.median(ours["cpu_seconds"]))
    slow = dense["cpu_seconds"][0] + dense["squaring_seconds"] * (8 / a.squarings - 1)
    with np.load(GOLDEN / "irn/g03b_propagate_94x125.npz", allow_pickle=False) as g:
        golden = g["rw"]
    off = lambda x, y: float(np.abs(x - y).max() / y.max())  # noqa: E731
    note = {} if a.squarings == 8 else dict(note=f"dense time scaled from {a.squarings} squarings")
    least = lambda name, value, limit, unit, **raw: dict(name=name, value=value, unit=unit, limit=limit, ok=value >= limit, **raw)  # noqa: E731
    most = lambda name, value, limit, unit, **raw: dict(name=name, value=value, unit=unit, limit=limit, ok=value <= limit, **raw)  # noqa: E731
    rows = [
        least("cpu_ratio_94x125", slow / cpu, 200, "dense CPU time / ours", dense_seconds=slow, our_seconds=cpu, dense=dense, ours=ours, **note),
        least("memory_ratio_94x125", dense["added_bytes"] / ours["added_bytes"], 20, "dense memory / ours", dense_bytes=dense["added_bytes"], our_bytes=ours["added_bytes"]),
        most("cpu_94x125", cpu, .25, "CPU-s", rounds=ours["cpu_seconds"]),
        most("error_94x125_to_golden", off(walked, golden), 1e-4, "of the maximum"),
        most("error_94x125_to_products", off(walked, reference), 1e-5, "of the maximum", products_cpu_seconds=exact["cpu_seconds"]),
        most("cpu_120x160", float(np.median(large["cpu_seconds"])), .6, "CPU-s", rounds=large["cpu_seconds"]),
        most("memory_120x160", large["added_bytes"] / 1e6, 300, "MB added by the walk", raw=large),
    ]
    if a.squarings == 8:
        rows.append(most("error_94x125_to_dense", off(walked, naive), 1e-4, "of the maximum"))
    for r in rows:
        print(f"{r['name']:26} {r['value']:10.4g} {r['unit']:24} limit {r['limit']:<7g} {'ok' if r['ok'] else 'MISSED'}")
    print(save_result("walk", rows, a.out, provenance(seconds=time.time() - start, settings=dict(squarings=a.squarings, rounds=a.rounds)), how="python tools/bench/walk.py" + ("" if a.squarings == 8 else f" --squarings {a.squarings}")))


if __name__ == "__main__":
    main()
