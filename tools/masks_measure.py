"""What `adcam masks` is worth: masks of a list with true masks against those of `adcam explain`, and what some photographs cost.

    python tools/masks_measure.py FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --work WORK --out results/photos

FOLDER is in VOC layout. Ground truth of a class without an ImageNet class (person) is not counted, for everybody alike. WORK keeps the runs:
stopped, the same command continues. Times are those of `--photos` photographs in fresh folders, one process, as many threads as torch is given.
"""
import argparse
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from adcam.branches import VOC_IMAGENET, TwoBranch
from adcam.cost import picture_size
from adcam.data import Subset, VOCFolder
from adcam.evaluation import confusion, scores
from adcam.masks import PAIR, Photographs, make_masks, masks_profile
from adcam.irnet import smooth_mask
from adcam.photo import explain
from adcam.pipeline import provenance, save_result

KEPT = ("miou", "fp", "fn", "f1", "pixel_accuracy")


def best_members(pair: TwoBranch, image: np.ndarray, groups: list) -> list:
    "Of each group the ImageNet class with the highest logit: what somebody would type who knows what the photograph shows"
    found = explain(image, classes=[i for g in groups for i in g], model=pair, methods="cam")
    logit = dict(zip(found.indices, found.logits))
    return [max(g, key=logit.get) for g in groups]


def explained(pair: TwoBranch, ds: Photographs, threshold: float = .4) -> dict:
    "Confusion of explain's masks at its default threshold, {with CRF?: (K+1,K+1)}, and the number of photographs"
    counts, n = {crf: np.zeros((len(ds.classes) + 1,) * 2, np.int64) for crf in (False, True)}, 0
    for i in tqdm(range(len(ds)), desc="explain"):
        keys = np.flatnonzero(ds.label(i))
        if not len(keys): continue
        s, groups = ds[i], [VOC_IMAGENET[ds.classes[k]] for k in keys]
        mask = explain(s.image, classes=best_members(pair, s.image, groups), model=pair, methods="ad_cam", threshold=threshold).mask("ad_cam")  # 0, 1..n
        mask = np.concatenate([[0], keys + 1])[mask].astype(np.uint8)
        for crf in counts: counts[crf] += confusion(smooth_mask(mask, s.image) if crf else mask, s.mask, len(ds.classes))
        n += 1
    return dict(counts=counts, n=n)


def compared(a, classes: str) -> list:
    "Rows of explain, of masks without training, and of masks with trained heads"
    ds = Photographs(VOCFolder(a.folder, a.list), None, tuple(classes.split(";")))
    pair = TwoBranch(*PAIR.split("+"), None, cnn_weights=a.cnn_weights, vit_weights=a.vit_weights).eval().requires_grad_(False)
    told = explained(pair, ds)
    rows = [dict(what="explain, threshold 0.4", crf=crf, n=told["n"], **{v: scores(C)[v] for v in KEPT}) for crf, C in told["counts"].items()]
    for name, words in (("own", classes), ("heads", "")):
        done = make_masks(a.folder, a.work / name, classes=words, split=a.list, cnn_weights=a.cnn_weights, vit_weights=a.vit_weights, budget="off")
        for crf, part in ((False, "pseudo_masks"), (True, "crf_masks")): rows.append(score(a.work / name / part, done, ds, name, crf))
        if name == "heads": rows[-1]["classifier"] = next(r["note"] for r in done.run.rows if r["stage"] == "classifier")
    return rows


def score(folder: Path, done, ds: Photographs, name: str, crf: bool) -> dict:
    "Masks of a run at the size of the true masks, over the classes of `ds`"
    from adcam.data import read_mask
    number = np.zeros(256, np.uint8)                             # label of the run -> label of ds; classes that are not compared are background
    for k, c in enumerate(done.classes): number[k + 1] = ds.classes.index(c) + 1 if c in ds.classes else 0
    C, n = np.zeros((len(ds.classes) + 1,) * 2, np.int64), 0
    for i, key in enumerate(ds.ids):
        if not ds.label(i).any() or not (folder / f"{key}.png").is_file(): continue
        C += confusion(number[read_mask(folder / f"{key}.png", 254)], ds.mask(i), len(ds.classes))
        n += 1
    what = dict(own="masks --classes, nothing trained", heads="masks, trained heads")[name]
    return dict(what=what, crf=crf, n=n, threshold=masks_profile().walk_background, **{v: scores(C)[v] for v in KEPT})


def timed(a, classes: str) -> list:
    "CPU and wall seconds and the peak memory of some photographs of about 640x480, from an empty folder"
    whole, rows = VOCFolder(a.folder, a.time_list), []
    picked = [i for i in range(len(whole)) if max(picture_size(whole, i)) == 640 and Photographs(whole, classes=tuple(classes.split(";"))).label(i).any()][:a.photos]
    for name, words in (("own", classes), ("heads", "")):
        out = a.work / f"time-{name}"
        shutil.rmtree(out, ignore_errors=True)
        cpu, wall = time.process_time(), time.perf_counter()
        done = make_masks_of(Subset(whole, picked), out, words, a)
        used = dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)
        stages = {r["stage"]: r["seconds"] for r in done.rows if "seconds" in r}
        rows.append(dict(what=f"time, {name}", n=len(picked), tokens=int(np.mean([np.prod([round(s / 14) for s in picture_size(whole, i)]) for i in picked])), threads=torch.get_num_threads(),
                         **{f"{k}_seconds": round(v, 1) for k, v in used.items()}, cpu_minutes_of_200=round(used["cpu"] / len(picked) * 200 / 60, 1),
                         peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2), stages_wall=stages, cores=psutil.cpu_count()))
    return rows


def make_masks_of(part: Subset, out: Path, words: str, a):
    "The run of `make_masks` for a part of a list"
    from adcam.masks import _network, class_groups
    from adcam.run import run
    groups = class_groups(words) if words else None
    ds = Photographs(part, 640, tuple(groups) if groups else None)
    p = masks_profile(PAIR, len(ds.classes))
    return run(p, ds, out, trained=_network(PAIR, groups, len(ds.classes), a.cnn_weights, a.vit_weights, False), heads=groups is None, refine="none", crf=True, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("--cnn-weights", "--vit-weights", "--work"): parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/photos"))
    parser.add_argument("--list", default="val_voc20", help="list that is reported")
    parser.add_argument("--time-list", default="train_voc20", help="list that photographs are timed on")
    parser.add_argument("--photos", type=int, default=24, help="how many; 0 leaves the times out")
    a = parser.parse_args()
    start, classes = time.perf_counter(), ";".join(c for c, g in VOC_IMAGENET.items() if g)
    rows = (timed(a, classes) if a.photos else []) + compared(a, classes)
    p = masks_profile()
    settings = dict(network=PAIR, list=a.list, time_list=a.time_list, size=640, **{n: getattr(p, n) for n in ("k", "k_mode", "steps", "direction", "layers", "scales")}, threshold=p.walk_background,
                    chosen_on="train_voc20, without CRF", not_counted="person")
    origin = provenance(settings=settings, data={a.list: VOCFolder(a.folder, a.list).fingerprint()}, checkpoints=[a.cnn_weights, a.vit_weights], seconds=time.perf_counter() - start)
    print(save_result("masks", rows, a.out, origin, command="tools/masks_measure.py"))


if __name__ == "__main__":
    main()
