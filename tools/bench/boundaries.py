"""How the profile `mini` came to its boundary training and its walk: mIoU on val images for trainings, powers and steps. Nothing of it is reported.

    python tools/bench/boundaries.py [--val 60] [--train 200] [--out results/bench]

Writes boundaries.json: for the seeds of three rows of Table 1 (networks of seed 0), the best threshold's mIoU on the val images without a walk, and after walks
between the boundaries of several trainings; also how well each boundary map knows the true boundaries (AUC) and how high it is on and off them.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from adcam.cnn import mini_path, resnet_mini
from adcam.compare import NETWORKS, Entry, Held, label_thresholds, seed_arrays, seeds_from
from adcam.evaluation import Sweep
from adcam.irnet import IRNet, ResNetStages, edge_map, ir_label, mask_edges, random_walk, train_irnet, upsample_walk
from adcam.pipeline import profiles, provenance, save_result
from adcam.run import irnet_config
from adcam.scenes import Scenes

MINI = profiles["mini"]
ROWS = [Entry("CAM (ResNet)", "resnet_mini", "cam"),
        Entry("AD-CAM", "conformer_mini", "ad_cam", dict(k=50, steps=2, direction="push")),
        Entry("AD-CAM, pull", "conformer_mini", "ad_cam", dict(k=50, steps=2, direction="pull"))]
OFFICIAL = dict(lr_edge=2., momentum=None)   # the official optimizer has no momentum to speak of; the rate is ours
TRAININGS = {"10 passes, no momentum": dict(epochs=10, **OFFICIAL), "30 passes, no momentum": dict(epochs=30, **OFFICIAL),
             "12 passes, momentum 0.9": dict(epochs=12, lr_edge=.3, momentum=.9)}
WALKS = [(beta, exp) for beta in (3, 5, 7, 10) for exp in (3, 4, 5, 6, 8)]


def best(data, maps):
    "mIoU at the best threshold on these images"
    sweep = Sweep(len(data.classes), MINI.thresholds)
    for sample, (keys, m) in zip(data, maps):
        sweep.update(m.astype(np.float32), keys, sample.mask)
    return sweep.best()["miou"]


def auc(score, truth):
    "How often a boundary cell is above one that is none"
    on, ranks = truth.sum(), rankdata(score)
    return (ranks[truth == 1].sum() - on * (on + 1) / 2) / (on * (truth == 0).sum())


def trained(data, seeds, thresholds, **how):
    "A boundary network for these seeds"
    labels = {s.id: ir_label(seed.high_res, seed.keys, s.image, *thresholds) for s, seed in zip(data, seeds)}
    torch.manual_seed(0)
    net = IRNet(ResNetStages(resnet_mini(10, checkpoint=mini_path("pretrained")).backbone_net), MINI.irn_displacement)
    train_irnet(net, data, lambda s: labels[s.id], replace(irnet_config(MINI, len(data)), **how), progress=False)
    return net.eval()


def measured(row, seeds, data):
    "Rows of the result for one row of the table"
    val, size = data["val"], data["val"][0].image.shape[:2]
    sweep = Sweep(len(val.classes), MINI.thresholds)
    for sample, s in zip(val, seeds["val"]):
        sweep.update(s.high_res, s.keys, sample.mask)
    thresholds, truth = label_thresholds(sweep.best()["t"]), np.stack([mask_edges(s.mask) for s in val])
    yield dict(row=row, training="no walk", miou=sweep.best()["miou"])
    for name, how in TRAININGS.items():
        began = time.process_time()
        net = trained(data["train"], seeds["train"], thresholds, **how)
        seconds, edges = time.process_time() - began, np.stack([edge_map(net, s.image) for s in val])
        told = dict(auc=auc(edges.ravel(), truth.ravel()), on=float(edges[truth == 1].mean()), off=float(edges[truth == 0].mean()), cpu_seconds=round(seconds, 1))
        for beta, exp in WALKS:
            maps = [(s.keys, upsample_walk(random_walk(s.cam, e, MINI.walk_radius, beta, exp), size)) for s, e in zip(seeds["val"], edges)]
            yield dict(row=row, training=name, beta=beta, walk=2**exp, miou=best(val, maps), **told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--val", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "results/bench")
    a, start, rows = parser.parse_args(), time.perf_counter(), []
    data = {s: Held(Scenes(s, n)) for s, n in (("train", a.train), ("val", a.val))}
    for network in dict.fromkeys(e.network for e in ROWS):
        entries = [e for e in ROWS if e.network == network]
        arrays = seed_arrays(NETWORKS[network].build(0, "", data["train"]), data, entries)
        for i, e in enumerate(entries):
            seeds = {s: seeds_from(arrays, s, i, data["val"][0].image.shape[:2]) for s in data}
            rows += measured(e.name, seeds, data)
            top = max((r for r in rows if r["row"] == e.name), key=lambda r: r["miou"])
            print(f"{e.name:14} best on val: {100 * top['miou']:.1f} with {top['training']}, beta {top.get('beta')}, {top.get('walk')} steps", flush=True)
    settings = dict(train=a.train, val=a.val, chosen=dict(beta=MINI.walk_beta, walk=2**MINI.walk_exp_times, epochs=MINI.irn_epochs, momentum=MINI.irn_momentum))
    origin = provenance(seeds=[0], settings=settings, data={s: d.fingerprint() for s, d in data.items()}, seconds=time.perf_counter() - start)
    print(save_result("boundaries", rows, a.out, origin, how="python tools/bench/boundaries.py"))


if __name__ == "__main__":
    main()
