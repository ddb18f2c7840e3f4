"""What decides a walk on PASCAL VOC, the map or its boundaries? Seeds walked with another row's boundaries, and without their floor: results/voc/walks.json.

    python tools/voc_walks.py --data FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --work FOLDER

`--work` is the work folder of tools/voc_measure.py after its step `masks` with seven rows: maps and boundary networks are read from there.
A map's *floor* is its smallest value; without it a map is (m - min)/(max - min). Each list gets the threshold that the other one prefers.
"""
import argparse
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from adcam import voc
from adcam.data import VOCFolder
from adcam.evaluation import Sweep, side_by_side
from adcam.irnet import edge_map, load_irnet, random_walk, upsample_walk
from adcam.pipeline import Point, provenance, save_result, to_markdown
from adcam.progress import tqdm
from adcam.seeds import merge
from adcam.voc_masks import THRESHOLDS, Row, boundary_network

PAIR = "tf_efficientnet_lite0+vit_small_patch14_dinov2"
RAW, CAM, PULL = "Att-Diffu only, pull", "CAM", "AD-CAM, pull"


def options(argv=None):
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder in PASCAL VOC layout, with masks")
    p.add_argument("--network", default=PAIR, help="CNN+VIT, timm names")
    p.add_argument("--cnn-weights", default="", help="pre-trained file of the CNN")
    p.add_argument("--vit-weights", default="", help="pre-trained file of the ViT that made the maps, for the ledger")
    p.add_argument("--work", required=True, type=Path, help="work folder of tools/voc_measure.py")
    p.add_argument("--lists", default="val,train_2007", help="list that is reported, list that thresholds are chosen on")
    p.add_argument("--limit", type=int, default=500, help="photographs of each list that voc_measure.py was given; 0: all")
    p.add_argument("--photographs", default="250,156", help="how many of them, evenly spread")
    p.add_argument("--out", default="results/voc", help="folder of walks.json")
    p.add_argument("--cnn-saw", default=voc.SAW["cnn"], help="what the CNN's weights were trained on, for the ledger")
    p.add_argument("--vit-saw", default=voc.SAW["vit"], help="the same for the ViT")
    a = p.parse_args(argv)
    a.lists, a.photographs = a.lists.split(","), [int(n) for n in a.photographs.split(",")]
    if len(a.lists) != 2 or len(a.photographs) != 2: p.error("--lists and --photographs take two values each, such as val,train_2007 and 250,156")
    missing = [n for n in (RAW, CAM, widest(a)) if not irnet_file(a, n).is_file()]
    if missing: p.error(f"{a.work} has no boundary network of {missing[0]}: run tools/voc_measure.py --rows 8 masks first")
    return a


def folder(name: str) -> str: return Row(name, Point("cam"), "all").folder
def irnet_file(a, name: str) -> Path: return a.work / "masks" / "irnet" / f"{folder(name)}.safetensors"


def widest(a) -> str:
    "AD-CAM's row with pull at the k that the other list prefers; where that is the paper's own, there is one row with pull only"
    found = (re.fullmatch(r"AD_CAM__pull__(\d+)_neighbors", p.stem) for p in sorted((a.work / "masks" / "irnet").glob("*.safetensors")))
    return next((f"{PULL}, {m[1]} neighbors" for m in found if m), PULL)


def exchanged(wide: str) -> list[tuple]:
    "(seeds, boundaries, without floor?) of every walk"
    return [(CAM, CAM, False), (CAM, wide, False), (wide, wide, False), (wide, CAM, False), (RAW, RAW, False), (RAW, wide, False), (RAW, RAW, True), (RAW, wide, True)]


def kept_maps(a, list_name: str) -> dict[str, np.ndarray]:
    "{id/folder: (n,h,w)} of the rows that walk here"
    wanted, found = {folder(n) for n in (RAW, CAM, widest(a))}, {}
    for path in sorted((a.work / "masks" / "maps").glob(f"{list_name}-*.npz")):
        with np.load(path) as z: found |= {n: z[n] for n in z.files if n.partition("/")[2] in wanted}
    return found


@torch.no_grad()
def count(ds, maps: dict, nets: dict, walks: list) -> tuple[dict, list]:
    "{walk: Sweep} of a list, and the floor of every raw map"
    sweeps, floors = {w: Sweep(len(ds.classes), THRESHOLDS) for w in walks}, []
    for i in tqdm(range(len(ds)), desc="walks", unit="image", disable=not sys.stderr.isatty()):
        sample = ds[i]
        size, keys, edges = sample.image.shape[:2], np.flatnonzero(sample.label), {n: edge_map(net, sample.image) for n, net in nets.items()}
        for seed, boundaries, flat in walks:
            m = torch.from_numpy(maps[f"{sample.id}/{folder(seed)}"].astype(np.float32))                          # (n,h,w), maximum 1
            low = m.amin((-2, -1), keepdim=True)                                                                # (n,1,1)
            if flat: floors += low.ravel().tolist()
            quarter = merge([(m - low) / (1 - low).clamp_min(1e-6) if flat else m], size)[0].numpy()            # (n,H/4,W/4)
            sweeps[seed, boundaries, flat].update(upsample_walk(random_walk(quarter, edges[boundaries]), size), keys, sample.mask)
    return sweeps, floors


def main(argv=None) -> int:
    a = options(argv)
    torch.set_num_threads(1)
    began, lists = time.process_time(), {}
    for n, m in zip(a.lists, a.photographs): lists[n] = voc.spread_part(voc.spread_part(VOCFolder(a.data, n), a.limit), m)
    source = voc.Source(a.network, len(lists[a.lists[0]].classes), a.cnn_weights, a.vit_weights)
    walks = exchanged(widest(a))
    nets = {n: load_irnet(boundary_network(source), irnet_file(a, n)).eval() for n in (RAW, CAM, widest(a))}
    counted = {n: count(ds, kept_maps(a, n), nets, walks) for n, ds in lists.items()}
    rows = []
    for n, other in (a.lists, a.lists[::-1]):
        for w in walks:
            seed, boundaries, flat = w
            told = dict(split=n, n=len(lists[n]), seeds=seed, boundaries=boundaries, floor="removed" if flat else "kept")
            rows += [told | {v: r[v] for v in ("rule", "t", "miou", "fp", "fn")} for r in side_by_side(counted[n][0][w], counted[other][0][w])]
    origin = provenance(seeds=[0], settings=dict(network=a.network, limit=a.limit, chosen="each list at the threshold that the other one prefers", device="CPU, one thread"),
                        data={n: ds.fingerprint() for n, ds in lists.items()}, checkpoints=[str(irnet_file(a, n)) for n in nets], seconds=time.process_time() - began)
    path = save_result("walks", rows, a.out, origin, ledger=voc.ledger_rows(source.prints(), dict(cnn=a.cnn_saw, vit=a.vit_saw), {n: len(ds) for n, ds in lists.items()}), mean_floor={n: float(np.mean(c[1])) for n, c in counted.items()})
    print(to_markdown([r | {v: f"{100 * r[v]:.1f}" for v in ("miou", "fp", "fn")} for r in rows if (r["split"], r["rule"]) == (a.lists[0], "fixed")]))
    print(path)
    return 0


if __name__ == "__main__": sys.exit(main())
