"""Everything in results/voc, step by step: from photographs, or what can be made of counts that were made elsewhere.

    python tools/voc_public.py --data FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors
    python tools/voc_public.py --counts FOLDER

A step that is finished is not repeated while its command and what it reads stay the same, and one that was killed goes on where it was.
`--limit 4` tries the way with four photographs of each list and the shortest trainings; its numbers mean nothing.
Lists that are not there yet: `grep ^2007_ ImageSets/Segmentation/train.txt > ImageSets/Segmentation/train_2007.txt`, or `--lists val,train`.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from adcam.cost import duration
from adcam.files import atomic_write
from adcam.pipeline import file_sha256
from adcam.voc import SAW

TOOLS = Path(__file__).resolve().parent
PAIR = "tf_efficientnet_lite0+vit_small_patch14_dinov2"


class Step(NamedTuple):
    "A command, and what must be there for it"
    command: list            # words after the python
    makes: list              # files or folders
    reads: list = []         # files whose change makes it run again
    photographs: bool = True # does it need them?
    after: tuple = ()        # steps that it reads from


def options(argv=None):
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder in PASCAL VOC layout, with masks")
    p.add_argument("--counts", type=Path, help="folder of counts; those in --work if not given")
    p.add_argument("--network", default=PAIR, help="CNN+VIT, timm names")
    p.add_argument("--cnn-weights", default="", help="pre-trained file of the CNN")
    p.add_argument("--vit-weights", default="", help="pre-trained file of the ViT")
    p.add_argument("--lists", default="val,train_2007", help="list that is learned from and reported, list that thresholds are chosen on")
    p.add_argument("--only", default="", help="some steps and what they read, with commas between")
    p.add_argument("--limit", type=int, default=0, help="only so many photographs of each list and the shortest trainings: a test of the way")
    p.add_argument("--cnn-saw", default="", help="what the CNN's weights were trained on, for the supervision ledger; needed for another network than the default")
    p.add_argument("--vit-saw", default="", help="the same for the ViT")
    p.add_argument("--processes", type=int, default=0, help="processes that count; see tools/voc_measure.py")
    p.add_argument("--work", type=Path, default=Path(".cache/voc"), help="folder for networks and all that makes the run resumable")
    p.add_argument("--out", default="", help="folder of the results; results/voc, or with --limit results/try/voc")
    p.add_argument("--list", action="store_true", help="only say what would be done")
    a = p.parse_args(argv)
    if a.limit and a.work == p.get_default("work"): a.work = Path(f".cache/voc-limit{a.limit}")
    if a.network != PAIR: a.cnn_saw, a.vit_saw = a.cnn_saw or "not said", a.vit_saw or "not said"
    a.out = Path(a.out or ("results/try/voc" if a.limit else "results/voc"))
    a.counts = a.counts or a.work / "counts"
    if not a.data and not list(a.counts.glob("*.npz")): p.error("nothing to read: give --counts FOLDER, or --data FOLDER --cnn-weights FILE --vit-weights FILE (tools/weights/convert.py makes the files)")
    for what in filter(None, (a.data, a.cnn_weights, a.vit_weights)):
        if not Path(what).exists(): p.error(f"{what} is not there")
    for name in a.lists.split(",") if a.data else ():
        if not (Path(a.data) / f"ImageSets/Segmentation/{name}.txt").is_file():
            p.error(f"{a.data} has no list ImageSets/Segmentation/{name}.txt; name two that are there (--lists val,train)" + (", or make it: grep ^2007_ train.txt > train_2007.txt" if name == "train_2007" else ""))
    if a.limit and a.limit < 2: p.error("--limit: at least two photographs of each list")
    unknown = set(filter(None, a.only.split(","))) - set(steps(a))
    if unknown: p.error(f"--only {min(unknown)}: no such step; there are {', '.join(steps(a))}")
    if a.data and not same_run(a): p.error(f"{a.work} holds a run of other weights, lists or --limit: name another folder, --work (make: WITH=\"--work FOLDER\")")
    return a


def same_run(a) -> bool:
    "Does the work folder belong to these networks and lists? Its files do not say so themselves. An empty one is taken."
    file = a.work / "run.json"
    told = dict(network=a.network, lists=a.lists, limit=a.limit, weights=[file_sha256(f) if f else "" for f in (a.cnn_weights, a.vit_weights)])
    if not file.exists(): atomic_write(file, lambda f: f.write(json.dumps(told, indent=1).encode()))
    return json.loads(file.read_text()) == told


def steps(a) -> dict[str, Step]:
    "All steps in their order, with the settings of results/voc or, with --limit, the shortest ones"
    n, few, trained = a.limit, bool(a.limit), a.work / "cnn_seed0.safetensors"
    pair = ["--network", a.network, "--cnn-weights", a.cnn_weights]
    lists, vit, weights = ["--data", a.data, "--lists", a.lists], ["--vit-weights", a.vit_weights], [f for f in (a.cnn_weights, a.vit_weights) if f]
    saw = [w for name, text in (("--cnn-saw", a.cnn_saw), ("--vit-saw", a.vit_saw)) if text for w in (name, text)]

    def measure(*more, limit=n): return [TOOLS / "voc_measure.py", *lists, *pair, *vit, "--work", a.work, "--out", a.counts, "--processes", a.processes, *saw, "--limit", limit, *more]
    def paper(name, *parameters): return ["-m", "adcam.cli", "paper", name, *(w for p in parameters for w in ("-p", p)), "--out", a.out]
    def drawn(name):
        photos = [f"data={Path(a.data).resolve()}", f"lists={a.lists}", f"limit={n}", f"network={a.network}", f"weights={trained.resolve()}", *named] if a.data and name in ("fig5", "fig6") else []
        return Step(paper(name, f"counts={a.counts.resolve()}", *photos), [a.out / f"{name}.json"], sorted([*a.counts.glob("*.npz"), *(a.counts.glob("[bm]as*.json") if name == "table1" else ())]), False,
                    ("count", "masks", "segment", "baselines") if name == "table1" else ("count",))

    named = [f"{k}={Path(f).resolve()}" for k, f in (("cnn_weights", a.cnn_weights), ("vit_weights", a.vit_weights)) if f]
    masks, boundaries = dict(limit=n or 500), ["--rows", 8, "--every", 1 if few else 2, "--irn", "crop=384,batch=8,lr_edge=0.05", "--irn-epochs", 1 if few else 6]
    learned = ["--seg", "crop=257,batch=16", "--seg-iterations", 2 if few else 500, "--seg-rows", 1 if few else 4]
    effort = f"learn={n},advcam=1,rib_steps=1,rib_others=1,rib_crop=64,channels=2,recam_steps=2,seam_epochs=1,oaa_epochs=2,integral_epochs=1,affinity={n},affinity_epochs=1,batch=2" if few else "advcam=13,channels=32,affinity=250"
    reported = a.lists.split(",")[0]
    return dict(
        count=Step(measure("all", *(["--epochs", 1] if few else [])), [a.counts / f"frozen-{reported}.npz", trained], weights),
        table3=drawn("table3"), fig4=drawn("fig4"), fig5=drawn("fig5"), fig6=drawn("fig6"),
        fig2_3=Step(paper("fig2_3", f"data={Path(a.data or '.').resolve()}", f"photo_list={reported}", f"vit={a.network.split('+')[-1]}", f"n_images={n or 200}", *([f"image={min(2, n - 1)}"] if few else []),
                          *(f for f in named if f.startswith("vit")), *(["vit_saw=" + json.dumps(a.vit_saw)] if a.vit_saw else [])), [a.out / "fig2_3.json"], weights[-1:]),
        scales=Step([TOOLS / "voc_scales.py", *lists, *pair, *vit, "--trained", trained, "--work", a.work / "scales", "--photographs", f"{n},{n}" if few else "37,24", *saw, "--out", a.out], [a.out / "scales.json"], [trained], after=("count",)),
        masks=Step(measure("masks", *boundaries, **masks), [a.counts / "masks.json"], [trained], after=("count",)),
        walks=Step([TOOLS / "voc_walks.py", *lists, *pair, *vit, *saw, "--work", a.work, "--limit", masks["limit"], "--photographs", f"{n},{n}" if few else "250,156", "--out", a.out], [a.out / "walks.json"], sorted((a.work / "masks/irnet").glob("*.safetensors")), after=("masks",)),
        baselines=Step(measure("baselines", "--seeds", 0, "--few", f"{n},{n}" if few else "40,40", "--more", f"{n},{n}" if few else "120,80", "--effort", effort), [a.counts / "baselines.json"], [trained], after=("count", "masks")),
        table2=Step(paper("table2", f"data={Path(a.data or '.').resolve()}", f"network={a.network}", f"weights={trained.resolve()}", *named, f"lists={reported}", f"related={not few}", f"timed_steps={1 if few else 2}", f"timed_images={1 if few else 4}", f"limit={n}",
                          "saw=" + json.dumps(f"{a.cnn_saw or SAW['cnn']}; {a.vit_saw or SAW['vit']}")),
                    [a.out / "table2.json"], [trained], after=("count",)),
        segment=Step(measure("segment", "--rows", 8, *learned, **masks), [a.counts / "masks.json"], sorted((a.work / "masks/irnet").glob("*.safetensors")), after=("masks",)),
        table1=drawn("table1"),
        repeats=Step([TOOLS / "voc_repeats.py", a.counts, "--work", a.work, "--out", a.out, "--", *measure(*boundaries, **masks)[1:]], [a.out / "repeats.json"], sorted((a.work / "masks/irnet").glob("*.safetensors")), after=("masks", "table1")))


def wanted(a) -> list[str]:
    "Names of the steps that are asked for, in order, with those that they read from"
    plan = steps(a)
    names = set(filter(None, a.only.split(","))) or set(plan)
    while more := {b for n in names for b in plan[n].after} - names: names |= more
    return [n for n in plan if n in names and (a.data or not plan[n].photographs)]


def state(step: Step) -> dict:
    "The command, and size and time of what it reads"
    return dict(command=[str(w) for w in step.command], reads={str(f): [Path(f).stat().st_size, Path(f).stat().st_mtime_ns] for f in step.reads})


def finished(a, name: str) -> bool:
    "Was the step done as it would be done now?"
    mark, step = a.work / f"done/{name}.json", steps(a)[name]
    return mark.is_file() and all(Path(f).exists() for f in step.makes) and json.loads(mark.read_text()) == state(step)


def main(argv=None) -> int:
    a = options(argv)
    names, everything = wanted(a), steps(a)
    if not a.data: print(f"from counts alone; photographs are needed for {', '.join(n for n, s in everything.items() if s.photographs)} (--data FOLDER)")
    for i, name in enumerate(names, 1):
        step, where = steps(a)[name], f"{i} of {len(names)}: {name}"       # anew: what it reads may have been made by now
        if finished(a, name): print(f"{where} is there"); continue
        print(f"{where}\n  {shlex.join(['python', *map(str, step.command)])}", flush=True)
        if a.list: continue
        began = time.perf_counter()
        code = subprocess.run([sys.executable, *map(str, step.command)]).returncode
        if code:
            print(f"adcam: {name} ended with exit code {code}; the same command goes on from here", file=sys.stderr)
            return code if code > 0 else 1
        step = steps(a)[name]
        atomic_write(a.work / f"done/{name}.json", lambda f: f.write(json.dumps(state(step)).encode()))  # noqa: B023, called at once
        print(f"{where}: {duration(time.perf_counter() - began)}", flush=True)
    if not a.list: print(f"results are in {a.out}" + ("; with so few photographs the numbers mean nothing" if a.limit else "; make claims reads them"))
    return 0


if __name__ == "__main__": sys.exit(main())
