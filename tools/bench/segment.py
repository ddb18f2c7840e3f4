"""What a prediction and a training step of the segmentation networks cost on a CPU, and where the time goes.

    python tools/bench/segment.py [--rounds 3] [--out results/bench]

A picture of 375x500 (Scenes, two of them side by side) goes through DeepLabV2-ResNet101 with random weights at its three scales (MSC), and through
the CRF. Random weights answer one class everywhere, which would spare the CRF its work; so the CRF gets the logits of a plausible answer: five
smooth fields, of 21 classes, at the network's stride. Both the usual way (classes that are nowhere are left out) and all 21 classes are timed.

Times are CPU seconds (`time.process_time`) on one thread, the median of `rounds`. Memory is the peak of the whole process, libraries included
(VmHWM of /proc/self/status), of a child process that builds the network and predicts once; elsewhere than on Linux `ru_maxrss`.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
H, W = 375, 500


def picture() -> np.ndarray:
    from adcam.scenes import Scenes
    ds = Scenes("val", 2, 384)
    return np.ascontiguousarray(np.concatenate([ds[0].image, ds[1].image], 1)[:H, :W])


def peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(x for x in status.read_text().splitlines() if x.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plausible(classes: int = 21, used: int = 5) -> torch.Tensor:
    "(C,47,63) logits in which `used` classes have their places"
    torch.manual_seed(0)
    z = torch.full((classes, 47, 63), -12.)
    z[:used] = 4 * torch.nn.functional.interpolate(torch.randn(1, used, 6, 8), (47, 63), mode="bicubic")[0]
    return z


def network():
    from adcam.deeplab import DeepLabV2
    torch.manual_seed(0)
    return DeepLabV2(21).eval()


def child() -> None:
    "One prediction with MSC and CRF in this process; prints its peak memory."
    torch.set_num_threads(1)
    from adcam.segment import enlarge, predict_logits, refine
    image, net = picture(), network()
    before = peak()
    predict_logits(net, image)
    middle = peak()
    refine(enlarge(plausible(), (H, W)), image, floor=0)
    print(json.dumps(dict(built_bytes=before, network_bytes=middle, peak_bytes=peak())))


def median_seconds(work, rounds: int) -> list[float]:
    out = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        out.append(time.process_time() - start)
    return out


def split(rounds: int) -> dict[str, list[float]]:
    "CPU seconds of the four parts of a prediction, and of the CRF with all classes."
    from adcam.irnet import save_mask
    from adcam.segment import enlarge, predict_logits, refine
    image, net, z = picture(), network(), plausible()
    big = enlarge(z, (H, W))
    labels = big.argmax(0).numpy().astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        return dict(network=median_seconds(lambda: predict_logits(net, image), max(1, rounds - 1)),
                    resize=median_seconds(lambda: enlarge(z, (H, W)), rounds),
                    crf=median_seconds(lambda: refine(big, image).argmax(0), rounds),
                    files=median_seconds(lambda: save_mask(Path(folder) / "a.png", labels), rounds),
                    crf_all_classes=median_seconds(lambda: refine(big, image, floor=0), rounds))


def training(kind: str, steps: int) -> dict:
    "CPU milliseconds per iteration of a mini network with its recipe for Scenes."
    from adcam import deeplab
    from adcam.scenes import Scenes
    from adcam.segment import RECIPES, train_segmentation
    from dataclasses import replace
    with tempfile.TemporaryDirectory() as folder:
        ds = Scenes("train", 32, cache=folder)
        c = replace(RECIPES[f"{kind}_mini"], iterations=steps, check=10**6)
        torch.manual_seed(0)
        net = getattr(deeplab, "deeplabv2_mini" if kind == "deeplabv2" else "upernet_mini")(11)
        train_segmentation(net, ds, lambda s: s.mask, replace(c, iterations=2, warmup=0), progress=False)
        start = time.process_time()
        train_segmentation(net, ds, lambda s: s.mask, c, progress=False)
        seconds = time.process_time() - start
    whole = RECIPES[f"{kind}_mini"]
    return dict(milliseconds=1000 * seconds / steps, batch=c.batch, crop=c.crop, iterations=whole.iterations, minutes=seconds / steps * whole.iterations / 60)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--steps", type=int, default=12)
    ask.add_argument("--out", type=Path, default=ROOT / "results/bench")
    ask.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.child:
        return child()
    from adcam.pipeline import provenance, save_result
    torch.set_num_threads(1)
    began = time.time()
    seconds = split(a.rounds)
    part = {k: float(np.median(v)) for k, v in seconds.items()}
    total = sum(part[k] for k in ("network", "resize", "crf", "files"))
    done = subprocess.run([sys.executable, __file__, "--child"], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    memory = json.loads(done.stdout.splitlines()[-1])
    most = lambda name, value, limit, unit, **raw: dict(name=name, value=value, unit=unit, limit=limit, ok=value <= limit, **raw)  # noqa: E731
    tell = lambda name, value, unit, **raw: dict(name=name, value=value, unit=unit, **raw)  # noqa: E731
    rows = [tell(f"prediction {H}x{W}, {k}: CPU time", part[k], "CPU-s", share=part[k] / total, rounds=seconds[k]) for k in ("network", "resize", "crf", "files")]
    rows += [
        most(f"prediction {H}x{W}: CRF against the network", part["crf"] / part["network"], 1, "ratio", note="below 1: the CRF is not the largest part", **{f"{k}_seconds": v for k, v in part.items()}),
        most(f"prediction {H}x{W}: CRF of all 21 classes against the network", part["crf_all_classes"] / part["network"], 1, "ratio"),
        most(f"prediction {H}x{W}, MSC and CRF of 21 classes: peak memory", memory["peak_bytes"] / 1e9, 2.5, "GB", **memory),
    ]
    for kind in ("deeplabv2", "upernet"):
        raw = training(kind, a.steps)
        rows.append(most(f"{kind}_mini, training on Scenes", raw["minutes"], 2.2, "CPU-min", **raw))
    for r in rows:
        print(f"{r['name']:66} {r['value']:9.4g} {r['unit']:8}" + (f" limit {r['limit']:<5g} {'ok' if r['ok'] else 'MISSED'}" if "limit" in r else ""))
    print(save_result("segment", rows, a.out, provenance(seconds=time.time() - began, settings=dict(rounds=a.rounds, steps=a.steps)), how="python tools/bench/segment.py"))


if __name__ == "__main__":
    main()
