"""What `adcam masks` is worth and what it costs, on photographs with true masks.

    python tools/masks_measure.py few FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --work WORK --out results/photos

FOLDER is in VOC layout with VOC's classes (`coco_mini`). Each measurement writes one file, and all of its rows:

    masks       masks.json: every photograph of --list with a class that ImageNet has: masks without training, against those of `adcam explain` at its
                default threshold for the same words; and 24 photographs of four classes with a csv, as somebody's own folder, by --heads auto and trained
    few         few.json: 24 other photographs of seven classes, two to six of each: trained heads, ImageNet's head with and without the csv, auto
    thresholds  thresholds.json: `adcam explain` with Otsu's threshold, the default, and the best fixed one of the list (an oracle)
    refine      refine.json: masks of --list by threshold, by IRNet's walk and by AffinityNet's

Pixels of other classes are not counted, for everybody alike; a photograph without a mask counts as background. WORK keeps the runs; stopped, the same
command continues. CPU seconds and peak memory are kept (`cost.json`) where a run is made from an empty folder in one go.
"""
import argparse
import csv
import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adcam.branches import VOC_IMAGENET, TwoBranch
from adcam.data import Subset, VOCFolder, label_of, read_mask
from adcam.evaluation import confusion, scores
from adcam.files import atomic_write, read_json
from adcam.irnet import smooth_mask
from adcam.masks import PAIR, Photographs, make_masks, masks_profile
from adcam.photo import Group, explain, otsu
from adcam.pipeline import provenance, save_result

KEPT, FOUR = ("miou", "fp", "fn", "f1", "pixel_accuracy"), ("aeroplane", "bus", "cat", "dog")
FEW = dict(train="71 26172 361246 411958", dog="309 790 173350 442450 454818 491525", bus="471 540 125870 252639", bird="520 196393 425988 575173", cat="599 196393 358083", horse="78499 565248",
           aeroplane="542 40870")  # what somebody wrote into a csv


def explained(a, ds: Photographs, methods: tuple) -> dict:
    "{(method, threshold, crf): counts} of explain's masks, for Otsu's threshold and a grid; and photographs"
    pair = TwoBranch(*PAIR.split("+"), None, cnn_weights=a.cnn_weights, vit_weights=a.vit_weights).eval().requires_grad_(False)
    counts = {}
    for i in tqdm(range(len(ds)), desc="explain"):
        keys = np.flatnonzero(ds.label(i))
        if not len(keys):
            continue
        s, groups = ds[i], [Group(ds.classes[k], VOC_IMAGENET[ds.classes[k]]) for k in keys]
        found, number = explain(s.image, groups, model=pair, methods=methods), np.array([0, *(keys + 1)], np.uint8)
        for m in methods:
            heat = found.heat_map(m)                                         # (n,H,W)
            top, which = heat.max(0), heat.argmax(0) + 1
            for t in ("auto", *GRID):
                mask = number[np.where(top > (otsu(top) if t == "auto" else t), which, 0)]
                for crf in (False, True) if (m, t) == ("ad_cam", .4) else (False,):
                    C = confusion(smooth_mask(mask, s.image) if crf else mask, s.mask, len(ds.classes))
                    counts[m, t, crf] = counts.get((m, t, crf), 0) + C
    return counts


GRID = [round(t, 2) for t in np.arange(.05, 1, .05)]


def thresholds(a) -> list:
    "Rows of explain, kept in WORK: with --measure masks they are needed again"
    if not (kept := a.work / "explain.json").exists():
        ds = listed(a)
        n, counts = sum(ds.label(i).any() for i in range(len(ds))), explained(a, ds, ("cam", "ad_cam"))
        rows = [dict(method=m, threshold=t, crf=crf, n=int(n), **{v: scores(C)[v] for v in KEPT}) for (m, t, crf), C in counts.items()]
        atomic_write(kept, lambda f: f.write(json.dumps(rows).encode()))
    return json.loads(kept.read_text())


def listed(a) -> Photographs:
    "Photographs of the list, and the classes that ImageNet has"
    return Photographs(VOCFolder(a.folder, a.list), None, tuple(c for c, g in VOC_IMAGENET.items() if g))


def scored(done, ds: Photographs, what: str, parts: tuple = (False, True)) -> list:
    "Rows of a run, with and without CRF, over the classes of `ds`"
    rows, number = [], np.array([0, *(ds.classes.index(c) + 1 for c in done.classes)], np.uint8)   # label of the run -> label of ds
    for crf in parts:
        C, n, there = np.zeros((len(ds.classes) + 1,) * 2, np.int64), 0, 0
        for i, name in enumerate(ds.ids):
            if not label_of(ds, i).any():
                continue
            path, truth = done.folder.parent / ("crf_masks" if crf else "pseudo_masks") / f"{name}.png", ds.mask(i)
            C, n, there = C + confusion(number[read_mask(path, len(done.classes))] if path.is_file() else np.zeros_like(truth), truth, len(ds.classes)), n + 1, there + path.is_file()
        rows.append(dict(what=what, crf=crf, n=n, with_mask=there, **{v: scores(C)[v] for v in KEPT}))
    return rows


def masks(a, root: Path, name: str, **options):
    "A run, and what it cost if it was made in one go"
    out, cpu, wall = a.work / name, time.process_time(), time.perf_counter()
    fresh = not (out / "seeds").exists()
    done = make_masks(root, out, cnn_weights=a.cnn_weights, vit_weights=a.vit_weights, budget="off", **options)
    cost = dict(photographs=done.count, cpu_seconds=round(time.process_time() - cpu, 1), wall_seconds=round(time.perf_counter() - wall, 1),
                peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2), threads=torch.get_num_threads())
    if fresh:
        atomic_write(out / "cost.json", lambda f: f.write(json.dumps(cost).encode()))
    return done, read_json(out / "cost.json")


def rows_of(a, root: Path, truth: Photographs, name: str, what: str, photographs: str, **options) -> list:
    "Rows of one run, with its cost and what it said of its classifier"
    done, cost = masks(a, root, name, **options)
    notes = [r["note"] for r in done.run.rows if r["stage"] == "classifier" and r["note"] != "as given"]
    return [r | dict(photographs=photographs) | (dict(cost=cost) | ({"classifier": notes[0]} if notes else {}) if r["crf"] else {}) for r in scored(done, truth, what)]


def own_folder(a, name: str, table: dict) -> tuple[Path, Photographs]:
    "Photographs in a folder of their own, with a csv {id: classes} and without; and their true masks"
    whole, root = VOCFolder(a.folder, "trainval"), a.work / name
    root.mkdir(parents=True, exist_ok=True)
    where = {i: k for k, i in enumerate(whole.ids)}
    for i in table:
        shutil.copy(whole.image_path(where[i]), root)
    with open(a.work / f"{name}.csv", "w", newline="") as f:
        csv.writer(f).writerows([("id", "labels"), *((f"{i}.jpg", ";".join(names)) for i, names in table.items())])
    return root, Photographs(Subset(whole, [where[i] for i in table]), None, tuple(sorted({c for names in table.values() for c in names}, key=whole.classes.index)))


def four_classes(a, n: int = 24, most: int = 8) -> dict:
    "Photographs of four classes, {id: classes}: the first of both lists, at most `most` of a class"
    whole, rows, count = VOCFolder(a.folder, "trainval"), {}, dict.fromkeys(FOUR, 0)
    for i in sorted(range(len(whole)), key=lambda i: whole.ids[i]):
        names = [c for c, y in zip(whole.classes, whole.label(i)) if y and c in FOUR]
        if len(rows) < n and names and all(count[c] < most for c in names):
            rows[whole.ids[i]] = names
            count.update({c: count[c] + 1 for c in names})
    return rows


def measure_masks(a) -> tuple:
    "The list and the folder of four classes"
    rows = [dict(what=f"explain, threshold {r['threshold']}", photographs=a.list) | {k: v for k, v in r.items() if k not in ("method", "threshold")}
            for r in thresholds(a) if (r["method"], r["threshold"]) == ("ad_cam", .4)]
    ds = listed(a)
    rows += rows_of(a, a.folder, ds, "own", "masks --classes", a.list, classes=";".join(c for c, g in VOC_IMAGENET.items() if g), split=a.list)
    root, truth = own_folder(a, "four", four_classes(a))
    for name, heads in (("auto24", "auto"), ("heads24", "trained")):
        rows += rows_of(a, root, truth, name, f"masks --heads {heads}", "folder", labels=a.work / "four.csv", heads=heads)
    return rows, {a.list: ds.fingerprint(), "folder": truth.fingerprint()}, dict(list=a.list, folder=list(FOUR))


def measure_few(a) -> tuple:
    "24 photographs of seven classes"
    table = {}
    for c, ids in FEW.items():
        for i in ids.split():
            table.setdefault(f"{int(i):012}", []).append(c)
    table, words = dict(sorted(table.items())), ";".join(FEW)
    root, truth = own_folder(a, "seven", table)
    rows = rows_of(a, root, truth, "few-auto", "auto", "folder", labels=a.work / "seven.csv")
    rows += rows_of(a, root, truth, "few-trained", "trained heads", "folder", labels=a.work / "seven.csv", heads="trained")
    rows += rows_of(a, root, truth, "few-imagenet", "ImageNet's head, no csv", "folder", classes=words)
    return rows, dict(folder=truth.fingerprint()), dict(photographs=list(table), classes={c: len(ids.split()) for c, ids in FEW.items()})


def measure_thresholds(a) -> tuple:
    "Otsu's, the default and the best fixed threshold of explain"
    rows = [r for r in thresholds(a) if not r["crf"]]
    kept = [r | dict(rule={"auto": "Otsu", .4: "default"}[r["threshold"]]) for r in rows if r["threshold"] in ("auto", .4)]
    for m in ("cam", "ad_cam"):
        fixed = [r for r in rows if r["method"] == m and r["threshold"] != "auto"]
        kept.append(max(fixed, key=lambda r: r["miou"]) | dict(rule="best fixed"))
    return kept, {a.list: listed(a).fingerprint()}, dict(list=a.list, grid=GRID)


def measure_refine(a) -> tuple:
    "By threshold, IRNet's walk and AffinityNet's, all from the same seeds"
    ds, rows, words = listed(a), [], ";".join(c for c, g in VOC_IMAGENET.items() if g)
    for how in ("none", "irn", "psa"):
        name = "own" if how == "none" else f"own-{how}"
        if how != "none" and not (a.work / name).exists():
            for part in ("seeds", "labels.csv"):
                if (source := a.work / "own" / part).is_dir():
                    shutil.copytree(source, a.work / name / part)
        rows += rows_of(a, a.folder, ds, name, how, a.list, classes=words, split=a.list, refine=how)
    return rows, {a.list: ds.fingerprint()}, dict(list=a.list)


MEASURES = dict(masks=measure_masks, few=measure_few, thresholds=measure_thresholds, refine=measure_refine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("folder", type=Path)
    for name in ("--cnn-weights", "--vit-weights", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/photos"))
    parser.add_argument("--list", default="val_voc20", help="list that is reported; thresholds were chosen on train_voc20")
    a = parser.parse_args()
    start, p = time.perf_counter(), masks_profile()
    rows, data, more = MEASURES[a.measure](a)
    for r in rows:
        print(f"{r.get('photographs', a.list):10} {r.get('what') or r['method'] + ', ' + r['rule']:24} {'CRF' if r['crf'] else '   '} n {r['n']:3}  mIoU {100 * r['miou']:.1f}  FP {100 * r['fp']:.1f}  FN {100 * r['fn']:.1f}")
    settings = dict(network=PAIR, size=640, threshold=p.walk_background, **{n: getattr(p, n) for n in ("k", "k_mode", "steps", "direction", "layers", "scales")}, **more,
                    chosen_on="train_voc20, oracle threshold without CRF", not_counted="pixels of other classes; person")
    origin = provenance(settings=settings, data=data, checkpoints=[a.cnn_weights, a.vit_weights], seconds=time.perf_counter() - start)
    print(save_result(a.measure, rows, a.out, origin, command=f"python tools/masks_measure.py {a.measure} coco_mini"))


if __name__ == "__main__":
    main()
