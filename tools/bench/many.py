"""Many images: what a stage costs before, between and after its work.

The bench makes a folder of 20,000 photographs of 48x64 pixels (four different ones under different names, as JPEG) with masks, a table of labels, and a seed,
a label and a mask per image, as if all stages were done. Then every command is called as a user calls it and has nothing left to compute:

* resume: `adcam seeds`, `adcam irnet labels`, `adcam irnet masks`: how long until they find that all is there (limit 20 s for seeds);
* account: `adcam seeds-check`, `adcam data check folder`;
* evaluate: `adcam evaluate`, which reads every seed and every mask;
* memory: the peak of resident memory of each, at 4,000 and at 20,000 images, and the growth per image between the two.

Each command runs in a process of its own, one thread; seconds are wall clock and CPU, imports included (the row "import" is a command that does nothing).
The limit is on wall clock, so the machine should be quiet; its load is recorded.
Repeat with: python tools/bench/many.py   (several minutes, most of them for making the folder)
"""
import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, CLASSES, LIMIT = (48, 64), ("emu", "yak"), 20.


def pictures(n: int) -> list[tuple]:
    "JPEG bytes, PNG bytes of the mask and the seed of n different images"
    from adcam.seeds import Seed
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        photo, mask = io.BytesIO(), io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(photo, "JPEG")
        m = np.zeros(SIZE, np.uint8); m[10 + i:30, 8:40] = i % 2 + 1
        Image.fromarray(m).save(mask, "PNG")
        high = (m > 0).astype(np.float32)[None]
        out.append((photo.getvalue(), mask.getvalue(), Seed(np.array([i % 2]), np.ascontiguousarray(high[:, ::4, ::4]), high)))
    return out


def make(root: Path, n: int) -> None:
    "The folder, and what all stages would have left"
    from adcam.seeds import save_seed
    for sub in ("data/masks", "seeds", "labels", "walked"): (root / sub).mkdir(parents=True)
    few = pictures(4)
    seed = [save_seed(root / f"{k}.npz", s).read_bytes() for k, (_, _, s) in enumerate(few)]
    for i in range(n):
        name, (photo, mask, _) = f"im{i:06d}", few[i % 4]
        (root / f"data/{name}.jpg").write_bytes(photo)
        for sub in ("data/masks", "labels", "walked"): (root / f"{sub}/{name}.png").write_bytes(mask)
        (root / f"seeds/{name}.npz").write_bytes(seed[i % 4])
    with open(root / "data/labels.csv", "w", newline="") as f: csv.writer(f).writerows([("id", "labels"), *((f"im{i:06d}", CLASSES[i % 2]) for i in range(n))])


def call(words: list) -> dict:
    "Exit code, seconds and peak memory of a command in its own process"
    code = "import resource, sys; from adcam.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: r = e.code or 0\nu = resource.getrusage(resource.RUSAGE_SELF); print(); print('USED', u.ru_utime + u.ru_stime, u.ru_maxrss / 1024)\nsys.exit(r)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    used = [line.split() for line in done.stdout.splitlines() if line.startswith("USED")]
    if not used or done.returncode not in (0, 1): raise SystemExit(f"{words}: {done.stdout[-500:]} {done.stderr[-1500:]}")
    return dict(exit=done.returncode, seconds=round(time.perf_counter() - start, 1), cpu=round(float(used[0][1]), 1), mib=round(float(used[0][2])))


def commands(root: Path, weights: Path) -> dict[str, list]:
    data = ("--data", root / "data")
    return dict(seeds=["seeds", *data, "--weights", weights, "--out", root / "seeds", "--method", "cam", "--scales", "1"], labels=["irnet", "labels", root / "seeds", root / "labels", *data, "--processes", 1],
                masks=["irnet", "masks", root / "seeds", root / "walked", *data, "--processes", 1], check=["seeds-check", root / "seeds", *data],
                evaluate=["evaluate", root / "seeds", *data]) | {"data check": ["data", "check", "folder", root / "data"], "import": ["profile", "mini"]}


def measure(n: int, names: list) -> list[dict]:
    import torch
    from adcam.classifier import save_weights
    from adcam.conformer import conformer_mini
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="adcam-many-") as folder:
        root, start = Path(folder), time.perf_counter()
        weights = save_weights(conformer_mini(2), root / "two.safetensors")
        make(root, n)
        print(f"{n:,} images made in {time.perf_counter() - start:.0f} s", flush=True)
        _settle(root, weights)
        rows = []
        for name, words in commands(root, weights).items():
            if names and name not in names: continue
            rows.append(dict(command=name, images=n, **call(words)))
            print(json.dumps(rows[-1]), flush=True)
        return rows


def _settle(root: Path, weights: Path) -> None:
    "settings.json as the stages would have written it: what they say is there now is taken over"
    import hashlib
    from adcam import seeds as S
    from adcam.files import atomic_write
    for sub in ("seeds", "labels", "walked"):
        path = root / sub / "settings.json"
        path.write_text("{}")
        words = {"seeds": commands(root, weights)["seeds"], "labels": commands(root, weights)["labels"], "walked": commands(root, weights)["masks"]}[sub]
        code = ("import json, sys; from pathlib import Path; import adcam.files as f\n"
                "def keep(folder, settings, pattern, force, job, what): (Path(folder)/'settings.json').write_text(json.dumps(settings, indent=1))\n"
                "f._settle = keep\nfrom adcam.cli import main\nmain(sys.argv[1:])")
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr[-1500:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="*", default=[4000, 20_000], help="sizes of the folder; memory is compared between the first and the last")
    parser.add_argument("--only", nargs="*", default=[], help="names of commands")
    parser.add_argument("--out", type=Path, help="folder of many.json; results/bench if not given")
    ask = parser.parse_args()
    from adcam.pipeline import provenance, results_dir, save_result
    start = time.perf_counter()
    rows = [r for n in ask.n for r in measure(n, ask.only)]
    by = {(r["command"], r["images"]): r for r in rows}
    for r in rows:
        small = by[r["command"], ask.n[0]]
        if r["images"] != ask.n[0]: r["kib_per_image"] = round((r["mib"] - small["mib"]) * 1024 / (r["images"] - ask.n[0]), 2)
        if r["command"] == "seeds": r["limit"], r["ok"] = LIMIT, r["seconds"] <= LIMIT
    print(save_result("many", rows, ask.out or results_dir("bench"), provenance(seconds=time.perf_counter() - start, settings=dict(size=SIZE, sizes=ask.n, load=round(os.getloadavg()[1], 1))), how="python tools/bench/many.py"))
    if not all(r.get("ok", True) for r in rows): raise SystemExit(1)
