"""How many training views per second and core the reader makes: decode a JPEG of 500 x 375, augment, crop 384.

    python tools/bench/data.py [--n 200] [--rounds 3]

Writes scenes with sensor noise as JPEGs of quality 90 into a temporary folder (no photographs), once as VOC tree with masks, and reads them
through `VOCFolder` and `TrainViews` as training does, in this process, on one thread. Where coco_mini is present (ADCAM_COCO_MINI), its
photographs are measured too. CPU seconds (`time.process_time`) of `n` views, after a warm-up; the median of `rounds` rounds counts, all are
recorded. The files are in the page cache: the disk is not part of the number.
"""
import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adcam.data import VOC_CLASSES, TrainViews, VOCFolder, random_view, read_image
from adcam.pipeline import provenance, save_result
from adcam.scenes import Scenes

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60  # views per second and core


def write_tree(folder: Path, n: int = 24) -> dict:
    "A VOC tree of n JPEGs, half of them upright; returns the mean file size."
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / sub).mkdir(parents=True)
    scenes, sizes = Scenes("train", n=n), []
    (folder / "classes.txt").write_text("\n".join(scenes.classes) + "\n")
    for i, s in enumerate(scenes):
        shape = (500, 375) if i % 2 else (375, 500)
        part = lambda a, how: np.asarray(Image.fromarray(a).resize((500, 500), how))[:shape[0], :shape[1]]  # noqa: E731
        noisy = part(s.image, Image.Resampling.BICUBIC) + np.random.default_rng(i).normal(0, 8, (*shape, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        sizes.append(len(file.getvalue()))
        (folder / f"JPEGImages/{s.id}.jpg").write_bytes(file.getvalue())
        Image.fromarray(part(s.mask, Image.Resampling.NEAREST)).save(folder / f"SegmentationClass/{s.id}.png")
    (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(scenes.ids) + "\n")
    return dict(files=n, mean_bytes=round(float(np.mean(sizes))), pixels="500x375", quality=90)


def cpu_seconds(f, n: int, rounds: int) -> list[float]:
    "CPU seconds of f(0), ..., f(n-1), several times; a short warm-up first."
    for i in range(min(n, 20)):
        f(i)
    out = []
    for _ in range(rounds):
        start = time.process_time()
        for i in range(n):
            f(i)
        out.append(time.process_time() - start)
    return out


def row(name: str, seconds: list[float], n: int, limit=None, **more) -> dict:
    rate = n / statistics.median(seconds)
    return dict(name=name, value=round(rate, 1), unit="images/s per core", limit=limit, ok=None if limit is None else rate >= limit,
                views=n, cpu_seconds=[round(s, 4) for s in seconds], **more)


def measure(ds, n: int, rounds: int, what: str, limit=None, **more) -> list[dict]:
    "The whole reader, and its two halves alone."
    views, rngs = TrainViews(ds, crop=384, resize=(320, 640)), [np.random.default_rng(i) for i in range(n)]
    paths, images = [ds.image_path(i) for i in range(len(ds))], [ds[i].image for i in range(min(len(ds), 24))]
    return [row(f"decode + augment, {what}", cpu_seconds(lambda i: views[i % len(ds)], n, rounds), n, limit, **more),
            row(f"decode alone, {what}", cpu_seconds(lambda i: read_image(paths[i % len(paths)]), n, rounds), n),
            row(f"augment alone, {what}", cpu_seconds(lambda i: random_view(images[i % len(images)], 384, (320, 640), rngs[i]), n, rounds), n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="views per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench", help="folder of data.json")
    a = parser.parse_args()
    if a.n < 1 or a.rounds < 1:
        parser.error("--n and --rounds must be at least 1")
    torch.set_num_threads(1)
    start, prints = time.time(), {}
    with tempfile.TemporaryDirectory() as tmp:
        about = write_tree(Path(tmp) / "voc")
        ds = VOCFolder(Path(tmp) / "voc", "train")
        rows, prints["scenes as JPEG"] = measure(ds, a.n, a.rounds, "JPEG 500x375", LIMIT, **about), ds.fingerprint()
    mini = Path(os.environ.get("ADCAM_COCO_MINI", "coco_mini"))
    if mini.is_dir():
        ds = VOCFolder(mini, "trainval", classes=VOC_CLASSES)
        size = round(float(np.mean([ds.image_path(i).stat().st_size for i in range(len(ds))])))
        rows += measure(ds, a.n, a.rounds, "coco_mini photographs", files=len(ds), mean_bytes=size)
        prints["coco_mini"] = ds.fingerprint()
    origin = provenance(settings=dict(crop=384, resize=(320, 640), threads=1, n=a.n, rounds=a.rounds), data=prints, seconds=time.time() - start)
    path = save_result("data", rows, a.out, origin, how="python tools/bench/data.py")
    for r in rows:
        print(f"{r['name']:40} {r['value']:7.1f} {r['unit']}" + (f"  limit {r['limit']}, {'ok' if r['ok'] else 'MISSED'}" if r["limit"] else ""))
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


if __name__ == "__main__":
    main()
