"""What `adcam.explain` costs beyond the two networks, and whether it leaks.

1. A 640x480 picture, ResNet-50 and DeiT-S with random weights, one thread: CPU seconds of `explain` (from a PIL picture to CAM, TS-CAM and AD-CAM of
   two classes, reading the attention included) against the plain forward passes of the two networks on the same input. Beside it, without a limit: the
   same and then heat maps and masks of all three methods in picture size, which a result computes when it is asked for them. They are measured in turn in
   one run; the best of --repeats rounds counts, all are recorded.
2. --calls calls with two small networks: resident memory after a tenth of the calls and at the end, and objects that the garbage collector knows.

Repeat with: python tools/bench/explain.py   (about two minutes)
"""
import argparse
import gc
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from adcam.branches import TwoBranch
from adcam.photo import _input, explain, network_size
from adcam.pipeline import provenance, save_result
from adcam.scenes import Scenes


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def everything(picture, model):
    "What a user gets: maps, heat in picture size, masks."
    result = explain(picture, ["tabby", "lynx"], model=model)
    for method in result.heat: result.heat_map(method), result.mask(method)
    return result


@torch.no_grad()
def overhead(repeats: int) -> dict:
    picture = Image.fromarray(Scenes("val", 1)[0].image).resize((640, 480))
    model = TwoBranch("resnet50", "deit_small_patch16_224", None).eval()
    x = _input(np.asarray(picture), network_size(480, 640, 384, 16))[None]                # (1,3,336,448)
    runs = {"networks": lambda: model(x), "maps": lambda: model.maps(x, reduce="mean", layers=6),
            "explain": lambda: explain(picture, ["tabby", "lynx"], model=model), "masks": lambda: everything(picture, model)}
    for call in runs.values(): call()                                                    # the first call of anything is slower
    taken = {name: [] for name in runs}
    for _ in range(repeats):
        for name, call in runs.items(): taken[name].append(seconds(call))
    s = {name: min(v) for name, v in taken.items()}
    ratio, with_masks = ((s[name] - s["networks"]) / s["networks"] for name in ("explain", "masks"))
    return dict(name="explain beyond the two forward passes", ratio=ratio, unit="fraction of the forward passes", limit=0.10, ok=ratio <= 0.10, ratio_with_masks=with_masks,
                seconds_networks=s["networks"], seconds_maps=s["maps"], seconds_explain=s["explain"], seconds_with_masks=s["masks"], all_seconds=taken, repeats=repeats, input="336x448, 588 patches", picture="640x480")


def leak(calls: int) -> dict:
    pictures = [Scenes("val", 4)[i].image for i in range(4)]
    model = TwoBranch("test_resnet", "test_vit", None).eval()
    process, seen = psutil.Process(), {}
    for i in range(calls + 1):
        if i in (calls // 10, calls): seen[i] = (process.memory_info().rss, gc.collect() * 0 + len(gc.get_objects()))
        if i < calls: everything(pictures[i % 4][:, : 192 - 16 * (i % 3)], model)
    (before, some), (after, more) = seen[calls // 10], seen[calls]
    growth = after - before
    return dict(name="explain, memory growth over repeated calls", value=growth / 2**20, unit="MiB", limit=16, ok=growth <= 16 * 2**20 and more - some <= 100,
                calls=calls, bytes_after_a_tenth=before, bytes_at_the_end=after, objects_after_a_tenth=some, objects_at_the_end=more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--out", default="results/bench")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [overhead(args.repeats), leak(args.calls)]
    for row in rows: print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "all_seconds"})
    print(save_result("explain", rows, Path(args.out), provenance(settings=dict(repeats=args.repeats, calls=args.calls, threads=1)), how="python tools/bench/explain.py"))


if __name__ == "__main__":
    main()
