"""CPU seconds of a training step when freed memory is kept for the next one (`adcam.devices.memory_kept`), and when it goes back to the kernel.

    python tools/bench/memory.py [--steps 2] [--turns 3] [--out results/bench]

Each figure is a process of its own on one thread; the two ways take turns, and medians are written: user and system seconds of a step, from runs of one and of more steps, and
the peak of the process. Random networks and drawn scenes of 448 pixels take the place of photographs: the seconds are alike. How dear the kernel's part is depends on the
machine: a virtual one may have to ask its host for each page. It is much where the first maps are large (here), and nothing where the arithmetic is (DeepLabV2).
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from adcam import training
from adcam.cnn import CamNet, train_cam
from adcam.data import Subset
from adcam.pipeline import provenance, save_result
from adcam.scenes import Scenes
from adcam.voc import recipe

ROOT = Path(__file__).resolve().parents[2]


def classifier(ds, steps: int) -> None:
    net = CamNet("tf_efficientnet_lite0", len(ds.classes), output_stride=16)
    train_cam(net, Subset(ds, n=16 * steps), recipe(batch=16, epochs=1, crop=392, resize=(320, 640)), progress=False)


STEPS = {"classifier of EfficientNet-Lite0, 16 views of 392": classifier}


def child(name: str, kept: bool, steps: int, cache: str) -> None:
    "Prints user and system seconds of a step, and the peak"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not kept: training.memory_kept = lambda device: nullcontext()
    ds, took = Scenes("train", 16 * (1 + steps), size=448, cache=cache), []
    for n in (1, 1, 1 + steps):                                              # the first warms up
        began = os.times()
        STEPS[name](ds, n)
        ended = os.times()
        took.append([ended.user - began.user, ended.system - began.system])
    print(json.dumps([(b - a) / steps for a, b in zip(*took[1:])] + [1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--steps", type=int, default=2)
    ask.add_argument("--turns", type=int, default=3)
    ask.add_argument("--out", type=Path, default=ROOT / "results/bench")
    ask.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.child: return child(a.child[0], a.child[1] == "kept", a.steps, a.child[2])
    start, rows = time.time(), []
    with tempfile.TemporaryDirectory() as cache:
        for name in STEPS:
            seen = dict(freed=[], kept=[])
            for _ in range(a.turns):
                for way, found in seen.items():
                    told = subprocess.run([sys.executable, __file__, "--steps", str(a.steps), "--child", name, way, cache], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                    found.append(json.loads(told.stdout.splitlines()[-1]))
            for way, found in seen.items():
                user, system, peak = (statistics.median(f[i] for f in found) for i in range(3))
                rows.append(dict(name=f"{name}, memory {way}", value=user + system, unit="CPU-s", user=user, system=system, peak_gb=peak / 1e9, turns=found))
                print(f"{rows[-1]['name']:70} {user + system:6.2f} CPU-s ({user:.2f} user, {system:.2f} system), peak {peak / 1e9:.2f} GB", flush=True)
    print(save_result("memory", rows, a.out, provenance(settings=dict(steps=a.steps, turns=a.turns, threads=1), seconds=time.time() - start), how="python tools/bench/memory.py"))


if __name__ == "__main__":
    main()
