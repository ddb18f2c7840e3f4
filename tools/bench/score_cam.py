"""Score-CAM: what it costs beside the forward passes that it cannot do without, and what its group size does to memory.

    python tools/bench/score_cam.py [--channels 48] [--groups 8 16 32] [--rounds 2] [--device cpu] [--out results/bench]

ResNet-50 with the strides of IRN and random weights, one picture of 384x384, one view. The yardstick is the same number of forward passes to the logits, in batches of the
group size, on pictures that exist already: no stencils, no masking, no weighted sum. Both in turn in one run, the better of --rounds counts, all are recorded. On a CPU
seconds are CPU seconds of one thread (`time.process_time`), on a GPU they are wall seconds between two synchronizations. --channels takes so many of the 2048 channels
(0: all); both ways take as many passes, so the ratio does not depend on it, and the passes of all channels are that many times as long.

Memory is the peak above what was held before: of the allocator on a GPU, of the resident set on a CPU (VmHWM of /proc, reset before), for each of --groups with the same
number of channels. Bounded by the group size means: it does not grow with the channels, only with the group.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

from adcam.baselines.score_cam import branch_logits, score_cam_views
from adcam.cnn import cam_resnet50, class_features
from adcam.pipeline import provenance, save_result
from adcam.seeds import view

LIMIT, SIDE = 1.2, 384


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: str, call) -> float:
    start = clock(device)
    call()
    return clock(device) - start


def resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def peak(device: str, call) -> int:
    "Bytes at the peak of a call, above what was there before"
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@torch.no_grad()
def passes(net, x, count: int, group: int) -> None:
    "The same forward passes and nothing else"
    pictures = x.repeat(group, 1, 1, 1)
    for _ in range(count // group): branch_logits(net, pictures)
    if count % group: branch_logits(net, pictures[:count % group])


@torch.no_grad()
def live(net, x, channels: int) -> int:
    "Channels that are not constant, of those that are taken"
    A = class_features(net, x)[0].flatten(1)
    return int((A.var(1).topk(min(channels or len(A), len(A))).values > 0).sum())


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--channels", type=int, default=48, help="of 2048; 0 takes all")
    ask.add_argument("--groups", type=int, nargs="+", default=[8, 16, 32])
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ask.add_argument("--out", type=Path, default=Path("results/bench"))
    a = ask.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start, group = time.time(), a.groups[-1]
    net = cam_resnet50(20).eval().to(a.device)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    x = view(image, 1., net.stride).to(a.device)
    run = lambda g=group, c=a.channels: score_cam_views(net, image, [3, 7], channels=c or None, group=g)  # noqa: E731
    count = live(net, x, a.channels) + 2                                     # each live channel, the black picture, the picture itself
    run(c=group)                                                             # the first call of anything is slower
    taken = dict(score_cam=[], passes=[])
    for _ in range(a.rounds):
        taken["passes"].append(seconds(a.device, lambda: passes(net, x, count, group)))
        taken["score_cam"].append(seconds(a.device, run))
    best, memory = {k: min(v) for k, v in taken.items()}, {g: peak(a.device, lambda g=g: run(g)) for g in a.groups}
    half = peak(a.device, lambda: run(a.groups[0], max(a.groups[0], (a.channels or 2048) // 2)))
    ratio = best["score_cam"] / best["passes"]
    name = torch.cuda.get_device_name() if a.device != "cpu" else "CPU, one thread"
    rows = [dict(name="Score-CAM / its forward passes, ResNet-50, 384x384", value=ratio, unit="times", limit=LIMIT, ok=ratio <= LIMIT,
                 seconds=best, all_seconds=taken, passes=count, group=group, device=name),
            dict(name=f"peak memory at group {a.groups[0]}: all channels / half of them", value=memory[a.groups[0]] / half, unit="times", limit=LIMIT, ok=memory[a.groups[0]] / half <= LIMIT,
                 bytes_by_group=memory, half=half),
            dict(name="one view of all 2048 channels", value=best["score_cam"] * 2050 / count, unit="seconds", limit=None, ok=None, scaled=count < 2050)]
    for r in rows: print(f"{r['name']}: {r['value']:.4g} {r['unit']}, limit {r['limit']}, ok {r['ok']}")
    print({g: f"{m / 1e6:.0f} MB" for g, m in memory.items()})
    origin = provenance(settings=dict(channels=a.channels, groups=a.groups, rounds=a.rounds, device=name, threads=1), seconds=time.time() - start)
    print(save_result("score_cam", rows, a.out, origin, how=f"python tools/bench/score_cam.py --channels {a.channels} --groups {' '.join(map(str, a.groups))} --device {a.device}"))


if __name__ == "__main__":
    main()
