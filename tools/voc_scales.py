"""One view beside several scales with mirrored views, on the same photographs of PASCAL VOC: results/voc/scales.json.

    python tools/voc_scales.py --data FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --trained cnn_seed0.safetensors --work FOLDER

`--trained` is the CNN branch that tools/voc_measure.py trained. Maps of every photograph and scale are a file of the work folder:
a run that was killed goes on, and one that ends early (`--seconds`) reports the photographs that have all their views, which are
spread over their list. Each list gets the thresholds that the other one prefers. Time is CPU time of one process.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from adcam import voc
from adcam.data import VOCFolder
from adcam.evaluation import Sweep, side_by_side
from adcam.files import atomic_write
from adcam.pipeline import Point, provenance, save_result, to_markdown
from adcam.progress import tqdm
from adcam.seeds import merge, positive_classes, view
from adcam.voc_baselines import spread_order

PAIR = "tf_efficientnet_lite0+vit_small_patch14_dinov2"
PLAN = voc.Plan()


def options(argv=None):
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder in PASCAL VOC layout, with masks")
    p.add_argument("--network", default=PAIR, help="CNN+VIT, timm names")
    p.add_argument("--cnn-weights", default="", help="pre-trained file of the CNN")
    p.add_argument("--vit-weights", default="", help="pre-trained file of the ViT")
    p.add_argument("--trained", required=True, help="the CNN branch of one training seed")
    p.add_argument("--lists", default="val,train_2007", help="list that is reported, list that thresholds are chosen on")
    p.add_argument("--photographs", default="60,40", help="how many of each list, evenly spread over it")
    p.add_argument("--scales", default="1,0.5,1.5", help="resize factors; the first one is also reported alone")
    p.add_argument("--work", required=True, type=Path, help="folder of the maps")
    p.add_argument("--out", default=None, help="folder of scales.json; results/voc if not given")
    p.add_argument("--seconds", type=float, default=float("inf"), help="start no photograph after so many CPU seconds")
    p.add_argument("--cnn-saw", default=voc.SAW["cnn"], help="what the CNN's weights were trained on, for the ledger")
    p.add_argument("--vit-saw", default=voc.SAW["vit"], help="the same for the ViT")
    a = p.parse_args(argv)
    a.lists, a.photographs, a.scales = a.lists.split(","), [int(n) for n in a.photographs.split(",")], [float(s) for s in a.scales.split(",")]
    if len(a.lists) != 2 or len(a.photographs) != 2: p.error("--lists and --photographs take two values each, such as val,train_2007 and 60,40")
    return a


def rows_of(tokens: int, alone: int) -> dict[str, Point]:
    "Name and point; `share`: k grows with the view, as 50 does with the view at scale 1"
    k, T, share = PLAN.k, PLAN.T, max(1, round(PLAN.k * tokens / alone))
    diffused = {f"AD-CAM, {d}{name}": Point("ad_cam", n, T, d) for d in ("push", "pull") for name, n in (("", k), (", k as a share", share))}
    return {"CAM": Point("cam"), "Att-Diffu only, pull": Point("att_diffu", 0, T, "pull")} | diffused


@torch.no_grad()
def view_maps(pair, sample, scale: float, alone: int) -> dict[str, np.ndarray]:
    "Maps (2,n,h,w) of one scale, plain and mirrored, of every row; attention of the last half of the blocks"
    x, keys, found = view(sample.image, scale, pair.stride), positive_classes(sample.label, pair.num_classes, sample.id), {}
    for mirrored in (False, True):
        cams, attn, _ = voc.shared_maps([pair], x.flip(-1) if mirrored else x)
        mean, summed = voc.block_means(attn)[voc.BLOCKS.index("half")]
        points = rows_of(attn.shape[-1] - 1, alone)
        maps = voc.stacked_points(cams, mean, keys, list(points.values()), summed)[:, 0]  # (P,n,h,w)
        for name, m in zip(points, maps): found.setdefault(name, []).append((m.flip(-1) if mirrored else m).numpy())
    return {name: np.stack(m) for name, m in found.items()}


def compute(a, pair, ds, began: float) -> None:
    "Maps of the photographs of a list that are missing, until the time is up"
    for i in tqdm(spread_order(len(ds)), desc="views", unit="image", disable=not sys.stderr.isatty()):
        sample = None
        for scale in a.scales:
            path = a.work / f"{ds.ids[i]}-{scale:g}.npz"
            if path.exists(): continue
            if time.process_time() - began > a.seconds: return
            sample = sample or ds[i]
            started, alone = time.process_time(), np.prod(view(sample.image, 1., pair.stride).shape[-2:]) // pair.stride**2
            maps = view_maps(pair, sample, scale, int(alone))
            atomic_write(path, lambda f: np.savez(f, cpu=time.process_time() - started, **maps))  # noqa: B023, called at once
        if sample: print(f"{ds.ids[i]} {time.process_time() - began:.0f} CPU-s", file=sys.stderr, flush=True)


def count(a, ds) -> tuple[dict, list, dict]:
    "{(views, row): Sweep} of the photographs that have all their views, their ids, CPU seconds of every view by scale"
    sweeps, ids, spent = {}, [], {s: [] for s in a.scales}
    for i in range(len(ds)):
        paths = {s: a.work / f"{ds.ids[i]}-{s:g}.npz" for s in a.scales}
        if not all(p.exists() for p in paths.values()): continue
        sample = ds[i]
        ids.append(sample.id)
        found = {s: dict(np.load(p)) for s, p in paths.items()}
        for s, z in found.items(): spent[s].append(float(z.pop("cpu")) / 2)       # of one of the two views
        first = a.scales[0]
        for name in found[first]:
            views = {"one view": [found[first][name][0]], "one scale, mirrored": list(found[first][name]), f"{len(a.scales)} scales, mirrored": [m for z in found.values() for m in z[name]]}
            for what, maps in views.items():
                _, full = merge([torch.from_numpy(m) for m in maps], sample.image.shape[:2])
                sweeps.setdefault((what, name), Sweep(len(ds.classes), PLAN.thresholds)).update(full.numpy(), np.flatnonzero(sample.label), sample.mask)
    return sweeps, ids, {f"{s:g}": t for s, t in spent.items()}


def main(argv=None) -> int:
    a = options(argv)
    torch.set_num_threads(1)
    a.work.mkdir(parents=True, exist_ok=True)
    lists = {n: VOCFolder(a.data, n) for n in a.lists}
    lists = {n: voc.spread_part(ds, m) for (n, ds), m in zip(lists.items(), a.photographs)}
    source = voc.Source(a.network, len(lists[a.lists[0]].classes), a.cnn_weights, a.vit_weights, (a.trained,))
    began, pair = time.process_time(), source.pairs()[0]
    for ds in reversed(lists.values()): compute(a, pair, ds, began)  # first the list that chooses
    counted = {n: count(a, ds) for n, ds in lists.items()}
    (report, choose), rows = a.lists, []
    for n, other in ((report, choose), (choose, report)):
        for (what, name), sweep in counted[n][0].items():
            rows += [dict(split=n, n=len(counted[n][1]), views=what, row=name, **{v: r[v] for v in ("rule", "t", "miou", "fp", "fn")}) for r in side_by_side(sweep, counted[other][0][what, name])]
    settings = dict(network=a.network, scales=a.scales, k=PLAN.k, T=PLAN.T, blocks="half", chosen="each list at the threshold that the other one prefers", device="CPU, one thread")
    origin = provenance(seeds=[0], settings=settings, data={n: ds.fingerprint() for n, ds in lists.items()}, checkpoints=[f for f in (a.cnn_weights, a.vit_weights, a.trained) if f],
                        seconds=time.process_time() - began)
    spent = {s: [t for c in counted.values() for t in c[2][s]] for s in counted[report][2]}
    of_a_view = {s: round(float(np.mean(t)), 2) for s, t in spent.items()}
    told = voc.ledger_rows(source.prints(), dict(cnn=a.cnn_saw, vit=a.vit_saw), {n: len(c[1]) for n, c in counted.items()})
    path = save_result("scales", rows, a.out or "results/voc", origin, ledger=told, photographs={n: c[1] for n, c in counted.items()}, cpu_seconds_of_a_view=of_a_view,
                       cpu_seconds=round(2 * sum(map(sum, spent.values()))))
    print(to_markdown([r | {v: f"{100 * r[v]:.1f}" for v in ("miou", "fp", "fn")} for r in rows if (r["split"], r["rule"]) == (report, "fixed")]))
    print(json.dumps(of_a_view), path)
    return 0


if __name__ == "__main__": sys.exit(main())
