"""What `adcam masks` is worth and what it costs, on photographs with true masks.

    python tools/masks_measure.py FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --work WORK --out results/photos

FOLDER is in VOC layout with VOC's classes. Two measurements:

    list    every photograph of --list with a class that ImageNet has: masks without training, against those of `adcam explain`
            at its default threshold for the same words
    folder  24 photographs of four classes with a csv, as somebody's own folder: trained heads, and the same without training

Pixels of other classes are not counted, for everybody alike. WORK keeps the runs; stopped, the same command continues. CPU seconds and peak memory
are kept (`cost.json`) where a run is made from an empty folder in one go.
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
from adcam.photo import Group, explain
from adcam.pipeline import provenance, save_result

KEPT, FOUR = ("miou", "fp", "fn", "f1", "pixel_accuracy"), ("aeroplane", "bus", "cat", "dog")


def explained(pair: TwoBranch, ds: Photographs, threshold: float = .4) -> list:
    "Rows of explain's masks at its default threshold, with and without CRF"
    counts, n = {crf: np.zeros((len(ds.classes) + 1,) * 2, np.int64) for crf in (False, True)}, 0
    for i in tqdm(range(len(ds)), desc="explain"):
        keys = np.flatnonzero(ds.label(i))
        if not len(keys):
            continue
        s, groups = ds[i], [Group(ds.classes[k], VOC_IMAGENET[ds.classes[k]]) for k in keys]
        mask = explain(s.image, groups, model=pair, methods="ad_cam", threshold=threshold).mask("ad_cam")
        mask = np.concatenate([[0], keys + 1])[mask].astype(np.uint8)
        for crf, total in counts.items():
            total += confusion(smooth_mask(mask, s.image) if crf else mask, s.mask, len(ds.classes))
        n += 1
    return [dict(what=f"explain, threshold {threshold}", crf=crf, n=n, **{v: scores(C)[v] for v in KEPT}) for crf, C in counts.items()]


def scored(done, ds: Photographs, what: str) -> list:
    "Rows of a run, with and without CRF, over the classes of `ds`"
    rows, number = [], np.array([0, *(ds.classes.index(c) + 1 for c in done.classes)], np.uint8)   # label of the run -> label of ds
    for crf, part in ((False, "pseudo_masks"), (True, "crf_masks")):
        C, n = np.zeros((len(ds.classes) + 1,) * 2, np.int64), 0
        for i, name in enumerate(ds.ids):
            if label_of(ds, i).any() and (path := done.folder.parent / part / f"{name}.png").is_file():
                C, n = C + confusion(number[read_mask(path, len(done.classes))], ds.mask(i), len(ds.classes)), n + 1
        rows.append(dict(what=what, crf=crf, n=n, **{v: scores(C)[v] for v in KEPT}))
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


def folder_of(a, n: int = 24, most: int = 8) -> tuple[Path, Photographs]:
    "Photographs of four classes with a csv: the first of both lists, at most `most` of a class; and their true masks"
    whole, root, rows, count = VOCFolder(a.folder, "trainval"), a.work / "photos", [], dict.fromkeys(FOUR, 0)
    root.mkdir(parents=True, exist_ok=True)
    for i in sorted(range(len(whole)), key=lambda i: whole.ids[i]):
        names = [c for c, y in zip(whole.classes, whole.label(i)) if y and c in FOUR]
        if len(rows) < n and names and all(count[c] < most for c in names):
            rows.append((f"{whole.ids[i]}.jpg", ";".join(names), i))
            count.update({c: count[c] + 1 for c in names})
            shutil.copy(whole.image_path(i), root)
    with open(root / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows([("id", "labels"), *(r[:2] for r in rows)])
    return root, Photographs(Subset(whole, [r[2] for r in rows]), None, FOUR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("--cnn-weights", "--vit-weights", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/photos"))
    parser.add_argument("--list", default="val_voc20", help="list that is reported; thresholds were chosen on train_voc20")
    parser.add_argument("--runs", default="heads24,own24", help="runs on the folder of 24 photographs")
    a = parser.parse_args()
    start, classes = time.perf_counter(), [c for c, g in VOC_IMAGENET.items() if g]
    listed = Photographs(VOCFolder(a.folder, a.list), None, tuple(classes))
    done, cost = masks(a, a.folder, "own", classes=";".join(classes), split=a.list)
    rows = [r | dict(photographs=a.list) | (dict(cost=cost) if r["crf"] else {}) for r in scored(done, listed, "masks --classes")]
    pair = TwoBranch(*PAIR.split("+"), None, cnn_weights=a.cnn_weights, vit_weights=a.vit_weights).eval().requires_grad_(False)
    if not (kept := a.work / "explain.json").exists():
        told = json.dumps(explained(pair, listed)).encode()
        atomic_write(kept, lambda f: f.write(told))
    rows = [r | dict(photographs=a.list) for r in json.loads(kept.read_text())] + rows
    root, truth = folder_of(a)
    for name, words in ((n, w) for n, w in (("heads24", ""), ("own24", ";".join(FOUR))) if n in a.runs.split(",")):
        done, cost = masks(a, root, name, classes=words)
        more = dict(classifier=next(r["note"] for r in done.run.rows if r["stage"] == "classifier")) if not words else {}
        rows += [r | dict(photographs="folder") | (dict(cost=cost) | more if r["crf"] else {}) for r in scored(done, truth, "masks --classes" if words else "masks")]
    for r in rows:
        print(f"{r['photographs']:10} {r['what']:24} {'CRF' if r['crf'] else '   '} n {r['n']:3}  mIoU {100 * r['miou']:.1f}  FP {100 * r['fp']:.1f}  FN {100 * r['fn']:.1f}")
    p = masks_profile()
    settings = dict(network=PAIR, list=a.list, folder=list(FOUR), size=640, threshold=p.walk_background, **{n: getattr(p, n) for n in ("k", "k_mode", "steps", "direction", "layers", "scales")},
                    chosen_on="train_voc20, oracle threshold without CRF", not_counted="pixels of other classes; person")
    origin = provenance(settings=settings, data={a.list: listed.ds.fingerprint(), "folder": truth.fingerprint()}, checkpoints=[a.cnn_weights, a.vit_weights], seconds=time.perf_counter() - start)
    print(save_result("masks", rows, a.out, origin, command="python tools/masks_measure.py coco_mini"))


if __name__ == "__main__":
    main()
