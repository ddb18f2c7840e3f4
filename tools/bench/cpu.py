"""Is the code of today slower on a CPU than that of an earlier commit? Both take turns, so that a busy machine is busy for both.

    python tools/bench/cpu.py [--before COMMIT] [--after COMMIT] [--seconds 5] [--rows WORD,WORD]

Each commit runs in a process of its own, on one thread, that stays for the whole measurement; after is the checkout that this file lies in, if
no commit is given. They do the same work once each, again and again: before, after, after, before, and so on. What is counted are CPU seconds
(`time.process_time`), which a process that waits does not use; but a neighbor on the same core still takes cache and clock away. So two numbers
are given: the ratio of the fastest turns, and the median of the ratios of turns that were next to each other. The goal holds for both.

Seeds of Scenes are made as a worker process makes them, file included. Networks of photographs have random weights, which cost what trained ones
cost; a photograph is four scenes side by side. A training runs by its public function with the settings for Scenes; a turn is
everything between two steps of its optimizer: the views, the losses, the gradients, the update, the bookkeeping. No function here is named
differently at the two commits, so that each does what its users get.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "f400e1e"   # before the work for GPUs began
GOAL, WARM_UP = 1.03, 2


# ---------------------------------------------------------------------------------------------------- the work, in a process per commit

class Ended(Exception):
    "Enough turns"


class Turns:
    "Called between two turns: tells how long the last one took, and waits to be sent on"

    def __init__(self, pipe):
        self.pipe, self.start = pipe, None

    def __call__(self, *_):
        self.say(0 if self.start is None else time.process_time() - self.start)
        if sys.stdin.readline().strip() != "go":
            raise Ended
        self.start = time.process_time()

    def say(self, what):
        print(what, file=self.pipe, flush=True)


class Held:
    "Scenes that have been painted"

    def __init__(self, n):
        from adcam.scenes import Scenes
        ds = Scenes("train", n)
        self.samples, self.classes, self.ids, self.fingerprint = [ds[i] for i in range(n)], ds.classes, ds.ids, ds.fingerprint

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def conformer():
    from adcam.conformer import conformer_mini
    from adcam.pipeline import checkpoint_path
    return conformer_mini(10, checkpoint=checkpoint_path(0))


def seeds(turn, method, **options):
    from adcam import seeds as S
    with tempfile.TemporaryDirectory() as folder:
        S._start(conformer().eval(), ds := Held(8), Path(folder), dict(method=method, scales=(1.,), flip=False, size_mode="round", **options), 1)
        for i in count():
            turn()
            S._extract_one(i % len(ds))


@contextmanager
def after_each_step(turn):
    "A training under way stops at the end of every step"
    from torch.optim.optimizer import register_optimizer_step_post_hook
    hook = register_optimizer_step_post_hook(turn)
    try:
        yield
    finally:
        hook.remove()


def classifier(turn):
    from adcam.classifier import TrainConfig, train
    with after_each_step(turn):
        train(conformer(), Held(64), TrainConfig(epochs=10**4, batch=16, crop=112, resize=(112, 208)), progress=False)


def boundaries(turn):
    from adcam.cnn import mini_path, resnet_mini
    from adcam.irnet import IRNet, IRNetConfig, ResNetStages, train_irnet
    net = IRNet(ResNetStages(resnet_mini(10, checkpoint=mini_path("pretrained")).backbone_net), False)
    config = IRNetConfig(epochs=10**4, batch=16, crop=160, scale=(.75, 1.25), lr_edge=.3, momentum=.9, radius=5)
    with after_each_step(turn):
        train_irnet(net, Held(64), lambda s: s.mask, config, progress=False)


def segmentation(turn):
    from adcam.deeplab import deeplabv2_mini
    from adcam.segment import RECIPES, train_segmentation
    with after_each_step(turn):
        train_segmentation(deeplabv2_mini(11), Held(64), lambda s: s.mask, replace(RECIPES["deeplabv2_mini"], iterations=10**4, check=10**4), progress=False)


def walk(turn):
    import numpy as np
    from adcam.irnet import random_walk
    rng = np.random.default_rng(0)
    maps, edge = rng.random((2, 94, 125), np.float32), rng.random((94, 125), np.float32)
    while True:
        turn()
        random_walk(maps, edge, radius=5, beta=10, exp_times=8)


def crf(turn):
    import numpy as np
    from adcam.crf import dense_crf, unary_from_labels
    a, b = Held(2)
    image, mask = (np.ascontiguousarray(np.concatenate([getattr(s, part)] * 2, 1)[:188, :250]) for s, part in ((a, "image"), (b, "mask")))
    unary = unary_from_labels((mask > 0) + (mask > 5).astype(np.int64), 3, .7)
    while True:
        turn()
        dense_crf(unary, image)


def photograph(height, width):
    "Four scenes of the right size: (H,W,3) uint8"
    import numpy as np
    from PIL import Image
    a, b, c, d = (s.image for s in Held(4).samples)
    return np.asarray(Image.fromarray(np.block([[[a], [b]], [[c], [d]]])).resize((width, height), Image.Resampling.BICUBIC))


def large_seeds(turn):
    import numpy as np
    from adcam.conformer import conformer_small
    from adcam.seeds import extract
    net, image, label = conformer_small(20).eval(), photograph(375, 500), np.eye(20)[3] + np.eye(20)[7]
    while True:
        turn()
        extract(net, image, label, "ad_cam", k=50, steps=2)


def advcam(turn):
    from adcam.cnn import mini_path, resnet_mini
    from adcam.seeds import extract
    net, ds = resnet_mini(10, checkpoint=mini_path(0)).eval(), Held(8)
    for i in count():
        turn()
        extract(net, ds[i % 8].image, ds[i % 8].label, "advcam", flip=True, iterations=9)


def explained(turn):
    from adcam.branches import TwoBranch
    from adcam.photo import explain
    net, image = TwoBranch("resnet50", "deit_small_patch16_224", None).eval(), photograph(375, 500)
    while True:
        turn()
        found = explain(image, ["tabby", "lynx"], model=net)
        for method in found.heat:
            found.heat_map(method), found.mask(method)


def prediction(turn):
    from adcam.deeplab import DeepLabV2
    from adcam.segment import predict
    net, image = DeepLabV2(21).eval(), photograph(188, 250)
    while True:
        turn()
        predict(net, image)


WORK = {"seeds, AD-CAM, conformer_mini, one image of Scenes": lambda turn: seeds(turn, "ad_cam", k=50, steps=2),
        "seeds, CAM, conformer_mini, one image of Scenes": lambda turn: seeds(turn, "cam"),
        "training step, conformer_mini, batch 16 at 112": classifier,
        "training step, IRNet on resnet_mini, batch 16 at 160": boundaries,
        "training step, deeplabv2_mini, batch 8 at 128": segmentation,
        "random walk, 2 maps of 94x125, 2^8 steps": walk,
        "CRF, 3 labels on 188x250, 10 iterations": crf,
        "seeds, AD-CAM, Conformer-S, one photograph of 375x500, one scale": large_seeds,
        "AdvCAM, resnet_mini, 9 maps of one image of Scenes with its mirror image": advcam,
        "explain, ResNet-50 and DeiT-S, one photograph of 375x500, two classes, maps and masks": explained,
        "prediction, DeepLabV2 with CRF, one photograph of 188x250": prediction}


def child():
    "Do the rows that are asked for, a turn at a time"
    import torch
    import adcam
    torch.set_num_threads(1)
    turn = Turns(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)                           # what the code prints is no answer
    turn.say(Path(adcam.__file__).resolve().parents[1])
    for name in iter(lambda: sys.stdin.readline().strip(), ""):
        torch.manual_seed(0)
        turn.start = None
        try:
            WORK[name](turn)
        except Ended:
            pass


# ------------------------------------------------------------------------------------------------------------------------- the turns

class Side:
    "The process of one commit"

    def __init__(self, folder):
        env = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONHASHSEED="0")
        self.process = subprocess.Popen([sys.executable, __file__, "--child"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        runs = Path(self.answer())
        if runs != Path(folder).resolve():
            raise RuntimeError(f"measures {runs} instead of {folder}")

    def answer(self):
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("a measuring process ended; its error stands above")
        return line

    def tell(self, word):
        print(word, file=self.process.stdin, flush=True)

    def begin(self, name):
        self.tell(name)
        self.answer()

    def turn(self):
        self.tell("go")
        return float(self.answer())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def in_turns(name, sides, seconds, least=15):
    "CPU seconds of every turn: (before, after)"
    for s in sides:
        s.begin(name)
    pairs = []
    while len(pairs) < WARM_UP + least or sum(map(sum, pairs)) < 2 * seconds:
        order = (0, 1) if len(pairs) % 2 else (1, 0)
        took = {i: sides[i].turn() for i in order}
        pairs.append((took[0], took[1]))
    for s in sides:
        s.tell("stop")
    return pairs[WARM_UP:]


def compared(name, pairs):
    before, after = zip(*pairs)
    ms = lambda f: [round(1000 * f(side), 2) for side in (before, after)]  # noqa: E731
    ratio, paired = min(after) / min(before), statistics.median(a / b for b, a in pairs)
    return dict(name=name, unit="CPU-ms", before=ms(min)[0], after=ms(min)[1], medians=ms(statistics.median), turns=len(pairs),
                ratio=round(ratio, 4), paired_ratio=round(paired, 4), limit=GOAL, ok=max(ratio, paired) <= GOAL)


def commit_of(name):
    "Its full name; None if it is not here"
    found = subprocess.run(["git", "-C", ROOT, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], stdout=subprocess.PIPE, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def checkout(commit, folder):
    "The package as it was"
    with subprocess.Popen(["git", "-C", ROOT, "archive", commit, "adcam"], stdout=subprocess.PIPE) as git, tarfile.open(fileobj=git.stdout, mode="r|") as tar:
        tar.extractall(folder, filter="data")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help=f"the earlier commit; {BEFORE} if not given")
    parser.add_argument("--after", help="the later commit; the checkout that this file lies in if not given")
    parser.add_argument("--seconds", type=float, default=5, help="CPU seconds per row and commit")
    parser.add_argument("--rows", default="", help="only rows whose names hold one of these words; nothing is written")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench", help="folder of cpu.json")
    a = parser.parse_args()
    began, before, after = time.time(), commit_of(a.before or BEFORE), a.after and commit_of(a.after)
    lost = [name for name, found in ((a.before or BEFORE, before), (a.after, after)) if name and not found]
    if lost:
        print(f"no commit {lost[0]} here, so there is nothing to compare with; fetch the whole history: git fetch --unshallow", file=sys.stderr)
        sys.exit(2 if a.before or a.after else 0)
    names = [n for n in WORK if any(w.strip() in n for w in a.rows.split(","))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folders = checkout(before, Path(folder) / "before"), checkout(after, Path(folder) / "after") if after else ROOT
        sides = [Side(f) for f in folders]
        for name in names:
            rows.append(r := compared(name, in_turns(name, sides, a.seconds)))
            print(f"{name:86} {r['before']:8.2f} -> {r['after']:8.2f} ms  fastest x {r['ratio']:.3f}, in pairs x {r['paired_ratio']:.3f} ({r['turns']} turns)  {'ok' if r['ok'] else 'SLOWER'}", flush=True)
        for s in sides:
            s.close()
    if a.rows or a.after:
        return
    sys.path.insert(0, str(ROOT))
    from adcam.pipeline import provenance, save_result
    settings = dict(before=before, threads=1, seconds=a.seconds, warm_up=WARM_UP, load=os.getloadavg())
    print(save_result("cpu", rows, a.out, provenance(settings=settings, seconds=time.time() - began), how="python tools/bench/cpu.py"))


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()
