"""AdvCAM: one pass backwards in place of two, and where the difference comes from.

The yardstick is `climb_two_pass`: as the method is described, a hook catches the gradient of the features while the class score is propagated backwards, then
the objective is propagated backwards to the picture; the weights ask for gradients, as they do in a loaded network. Beside it, the same with frozen weights, and
with frozen weights and a first pass that ends at the features (`torch.autograd.grad`), which is the best a two-pass way can do. All climb on the same picture with its
mirror image, one thread, CPU seconds (`time.process_time`), in turn in one run; the best of --repeats rounds counts, all are recorded.

Networks: ResNet-50 with the strides of IRN, random weights, 128x160; resnet_mini, 192x192. One class and two.

Equal to 1e-5 means: given the same picture, map (of its maximum), score, L_AD and picture gradient (of its maximum) differ by at most 1e-5, at each of --check
steps; every step of the fast way starts from the picture of the slow one, because a ReLU that is zero but for rounding can send two climbs apart.

Repeat with: python tools/bench/advcam.py   (about three minutes)
"""
import argparse
import time
from pathlib import Path

import torch

from adcam.baselines.advcam import _ascend, climb, climb_two_pass
from adcam.cnn import cam_resnet50, class_weights, resnet_mini
from adcam.pipeline import provenance, save_result

LIMIT, EQUAL = 1.5, 1e-5


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def last(steps):
    for s in steps: pass
    return s


def networks(names):
    "Random weights; the classifier is positive, so that every class has a map"
    torch.manual_seed(0)
    for name, build, size in (("ResNet-50 128x160", lambda: cam_resnet50(20, detach_after="bn1"), (128, 160)), ("resnet_mini 192x192", lambda: resnet_mini(10), (192, 192))):
        if names and not any(n in name for n in names): continue
        net = build().eval()
        with torch.no_grad(): net.classifier.weight.add_(.02)
        yield name, net, torch.randn(1, 3, *size)


def difference(net, x, c: int, steps: int) -> float:
    "Largest difference of one step, over the steps of the slow way"
    worst, w, k, first = 0., class_weights(net).detach(), torch.tensor([c]), None
    relative = lambda a, b: float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
    for a in climb_two_pass(net, x, c, iterations=steps):
        b = _ascend(net, w, a.images, k, first, 7., .5, last=a.grad is None)
        first = a.region if first is None else first
        worst = max(worst, relative(b.region, a.region), relative(b.scores, a.scores), float((b.ad - a.ad).abs().max()), 0. if a.grad is None else relative(b.grad, a.grad))
    net.zero_grad()
    return worst


def frozen_two_pass(net, x, c, n, **options):
    was = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(False)
    last(climb_two_pass(net, x, c, iterations=n, **options))
    for p, r in zip(net.parameters(), was): p.requires_grad_(r)


def channels_last(net, x, classes, n):
    net.to(memory_format=torch.channels_last)
    taken = seconds(lambda: last(climb(net, x.contiguous(memory_format=torch.channels_last), classes, iterations=n)))
    net.to(memory_format=torch.contiguous_format)
    return taken


def measure(name, net, x, n: int, repeats: int, check: int) -> list[dict]:
    a, b = 3, 7
    two = lambda c, **o: last(climb_two_pass(net, x, c, iterations=n, **o))
    runs = {"two_pass": lambda: seconds(lambda: two(a)), "two_pass_two_classes": lambda: seconds(lambda: [two(c) for c in (a, b)]),
            "two_pass_frozen": lambda: seconds(lambda: frozen_two_pass(net, x, a, n)), "two_pass_frozen_to_features": lambda: seconds(lambda: frozen_two_pass(net, x, a, n, whole=False)),
            "fast": lambda: seconds(lambda: last(climb(net, x, [a], iterations=n))), "fast_two_classes_one_batch": lambda: seconds(lambda: last(climb(net, x, [a, b], iterations=n))),
            "fast_channels_last": lambda: channels_last(net, x, [a], n)}
    taken = {k: [] for k in runs}
    last(climb(net, x, [a], iterations=2))                                               # the first call of anything is slower
    for _ in range(repeats):
        for k, call in runs.items(): taken[k].append(call())
    net.zero_grad()
    s, worst = {k: min(v) for k, v in taken.items()}, max(difference(net, x, c, check) for c in (a, b))
    row = lambda what, ratio, limit=None, **more: dict(name=f"{name}, {what}", ratio=ratio, unit="times", limit=limit, ok=None if limit is None else ratio >= limit, **more)
    raw = dict(seconds=s, all_seconds=taken, iterations=n, repeats=repeats)
    return [row("two passes / one, one class", s["two_pass"] / s["fast"], LIMIT, **raw),
            row("two passes / one, two classes in one batch", s["two_pass_two_classes"] / s["fast_two_classes_one_batch"], LIMIT),
            row("share of frozen weights: two passes / two passes with frozen weights", s["two_pass"] / s["two_pass_frozen"]),
            row("share of the closed form: two passes with frozen weights / one", s["two_pass_frozen"] / s["fast"]),
            row("two passes with frozen weights, the first only to the features / one", s["two_pass_frozen_to_features"] / s["fast"]),
            row("two classes one after the other / in one batch", 2 * s["fast"] / s["fast_two_classes_one_batch"]),
            row("fast / fast with channels_last", s["fast"] / s["fast_channels_last"]),
            dict(name=f"{name}, largest difference of a step", value=worst, unit="relative", limit=EQUAL, ok=worst <= EQUAL, steps=check)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6, help="maps per climb")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--check", type=int, default=6, help="steps that are compared")
    parser.add_argument("--only", nargs="*", default=(), help="part of a network's name")
    parser.add_argument("--out", default="results/bench")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    rows = [row for name, net, x in networks(args.only) for row in measure(name, net, x, args.iterations, args.repeats, args.check)]
    for row in rows: print(f"{row['name']}: {row.get('ratio', row.get('value')):.3g} {row['unit']}, limit {row['limit']}, ok {row['ok']}")
    origin = provenance(settings=dict(iterations=args.iterations, repeats=args.repeats, check=args.check, threads=1), seconds=time.time() - start)
    print(save_result("advcam", rows, Path(args.out), origin, how="python tools/bench/advcam.py"))


if __name__ == "__main__":
    main()
