"""Train and count on PASCAL VOC with public networks, on a GPU or a CPU, without a notebook and without a network connection.

    python tools/voc_measure.py --data FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --work FOLDER --out FOLDER train count tuned

It writes counts (`<state>-<list>.npz`) and `log.json` into --out; `nbs/paper` makes tables and figures of them on any machine:

    make voc-public COUNTS=FOLDER

Steps, in the order in which they are named; each goes on where it was stopped, and says its seconds:

    train    the CNN branch for every seed, and the ViT for every rate of --vit-rates: all at once, one process each
    count    frozen ViT: both lists, all seeds
    tuned    the two tuned ViTs: both lists, the first seed
    masks    IR labels, boundary networks and walks of the rows of Table 1 (after count)
    segment  segmentation networks on the masks, and on the ground truth (after masks; needs segmentation_models_pytorch)
    baselines  ReCAM, AdvCAM, RIB, GETAM, Score-CAM, PCM, SEAM, OAA and CAM with PSA's walk, on as many photographs as the time allows (after train)
    all      train, count, tuned

`--tiny` makes its own drawn scenes and tiny random networks, to try the way in a minute.
"""
import argparse, ast, json, os, sys, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch.multiprocessing as mp
from adcam import voc, voc_baselines, voc_masks
from adcam.data import VOCFolder
from adcam.files import atomic_write
from adcam.scenes import write_voc

PAIR = "tf_efficientnet_lite0+vit_small_patch14_dinov2"


def fields(text):
    "`a=1,b=.5` as a dict"
    try: return {name.strip(): ast.literal_eval(value) for name, value in (part.split("=") for part in text.split(",") if part)}
    except (ValueError, SyntaxError): raise argparse.ArgumentTypeError(f"{text}: write name=value, several with commas between, text in quotes") from None


def options(argv=None):
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("steps", nargs="+", choices=("train", "count", "tuned", "masks", "segment", "baselines", "all"), help="what to do")
    p.add_argument("--data", help="folder in PASCAL VOC layout, with masks")
    p.add_argument("--network", default=PAIR, help="CNN+VIT, timm names")
    p.add_argument("--cnn-weights", default="", help="pre-trained file of the CNN")
    p.add_argument("--vit-weights", default="", help="pre-trained file of the ViT")
    p.add_argument("--lists", default="val,train_2007", help="list that is learned from and reported, list that thresholds are chosen on")
    p.add_argument("--seeds", default="0,1,2", help="training seeds of the CNN")
    p.add_argument("--vit-rates", default="2e-5,2e-4", help="learning rates of the tuned ViTs; empty for none")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--work", required=True, type=Path, help="folder for networks and chunks; makes every step resumable")
    p.add_argument("--out", required=True, type=Path, help="folder for counts and log.json")
    p.add_argument("--device", default="", help="cuda or cpu; the GPU if there is one")
    p.add_argument("--processes", type=int, default=0, help="processes that count; 6 on a GPU, all cores of a CPU, if not given")
    p.add_argument("--limit", type=int, default=0, help="only so many photographs of each list, evenly spread over it")
    p.add_argument("--chunk", type=int, default=40, help="photographs per file of the work folder")
    p.add_argument("--seconds", type=float, default=float("inf"), help="start no chunk after so many seconds of a step; what is there is written")
    p.add_argument("--rows", type=int, default=4, help="how many rows of Table 1: CAM, AD-CAM pull, Att-Diffu pull, AD-CAM push, TransCAM, TS-CAM, AD-CAM pull and push at the k that the other list prefers")
    p.add_argument("--every", type=int, default=4, help="an IR label for every so many photographs")
    p.add_argument("--irn-epochs", type=int, default=6, help="passes of the boundary network over its labels")
    p.add_argument("--seg-rows", type=int, default=4, help="how many of them train a segmentation network; the ground truth is added")
    p.add_argument("--seg-iterations", type=int, default=1200, help="steps of each segmentation network")
    p.add_argument("--few", default="100,60", help="photographs of the two lists for the slow rows of `baselines`")
    p.add_argument("--more", default="300,200", help="the same for its quick rows")
    p.add_argument("--effort", default={}, type=fields, metavar="advcam=9,channels=32", help="what the rows of `baselines` spend (adcam.voc_baselines.Effort)")
    p.add_argument("--only", default="", help="rows of `baselines`, separated by ;")
    p.add_argument("--irnet", type=Path, help="boundary network for the walks of `baselines`; that of CAM in --work if not given")
    p.add_argument("--irn", default={}, type=fields, metavar="crop=384,batch=8", help="other fields of the boundary networks' training (IRNetConfig)")
    p.add_argument("--seg", default={}, type=fields, metavar="crop=257,batch=8", help="other fields of the segmentation networks' training (SegConfig)")
    p.add_argument("--note", default="", help="a remark for the log, such as how the photographs were re-encoded")
    p.add_argument("--cnn-saw", default=voc.SAW["cnn"], help="what the CNN's weights were trained on, for the supervision ledger")
    p.add_argument("--vit-saw", default=voc.SAW["vit"], help="the same for the ViT")
    p.add_argument("--tiny", action="store_true", help="drawn scenes, tiny random networks")
    a = p.parse_args(argv)
    a.steps = {s for step in a.steps for s in (("train", "count", "tuned") if step == "all" else (step,))}
    a.seeds, a.lists = [int(s) for s in a.seeds.split(",")], a.lists.split(",")
    a.rates = [r.strip() for r in a.vit_rates.split(",") if r.strip()]
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    a.processes = a.processes or (6 if a.device != "cpu" else os.cpu_count() or 1)
    if not a.tiny and not (a.data and Path(a.data).is_dir()): p.error(f"--data {a.data}: no such folder; give one in PASCAL VOC layout, or --tiny")
    odd = [r for r in a.only.split(";") if r.strip() and r.strip() not in voc_baselines.ROWS]
    if odd: p.error(f"--only {odd[0]}: no such row; choose of {'; '.join(voc_baselines.ROWS)}")
    if len(a.lists) != 2: p.error("--lists takes two names, such as val,train_2007")
    return a


def tiny(a):
    "Scenes in VOC layout and a random ViT, made once; the plan that fits them"
    import timm
    from safetensors.torch import save_file
    a.network, a.lists, a.data, a.vit_weights = "test_resnet+test_vit", ["val", "train"], str(a.work / "voc"), str(a.work / "vit.safetensors")
    if not Path(a.vit_weights).exists():
        write_voc(a.data, splits=("train", "val"), n=4, size=96)
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit").state_dict(), a.vit_weights)
    a.cnn_saw = a.vit_saw = "nothing (random weights)"
    return voc.Plan(ks=(2, 5, 20), steps=(1, 2), k=5, T=2, why_every=1), dict(crop=64, resize=None, batch=2, epochs=1)


class Log:
    "What was done and how long it took, kept in log.json"
    def __init__(self, path):
        self.path, self.body = path, json.loads(path.read_text()) if path.exists() else dict(steps=[])

    def add(self, step, began, **more):
        row = dict(step=step, seconds=round(time.perf_counter() - began, 1), **more)
        print(json.dumps(row), flush=True)
        self.body["steps"].append(row)
        atomic_write(self.path, lambda f: f.write(json.dumps(self.body, indent=1).encode()))


def machine(a):
    "Where the numbers come from"
    name = torch.cuda.get_device_name() if a.device.startswith("cuda") else "CPU"
    return dict(device=name, cores=os.cpu_count(), torch=torch.__version__, python=sys.version.split()[0], processes=a.processes, precision="float32 networks without TF32, float64 attention", note=a.note)


def train(a, source, ds, recipe, log):
    "Every network that is missing, all at once: on a GPU each alone would wait for its kernels to start"
    began, jobs = time.perf_counter(), []
    workers = 0 if a.tiny or a.device == "cpu" else max(2, (os.cpu_count() or 4) // (len(a.seeds) + len(a.rates)))
    config = lambda **more: voc.recipe(a.device, **dict(epochs=a.epochs, workers=workers, batch=min(16, len(ds))) | recipe | more)
    jobs += [(source, ds, cnn_file(a, s), config(seed=s), "cnn", a.device) for s in a.seeds]
    jobs += [(source, ds, vit_file(a, r), config(seed=0, lr_vit=float(r)), "vit", a.device) for r in a.rates]
    jobs = [j for j in jobs if not j[2].exists()]
    together = len(jobs) if a.device != "cpu" else 1
    if jobs and together > 1:
        with ProcessPoolExecutor(together, mp.get_context("spawn")) as pool: done = list(pool.map(voc.train_one, *zip(*jobs)))
    else: done = [voc.train_one(*j) for j in jobs]
    log.add("train", began, networks=done, machine=machine(a))


def cnn_file(a, seed): return a.work / f"cnn_seed{seed}.safetensors"
def vit_file(a, rate): return a.work / f"vit_lr{rate}.safetensors"


def count(a, source, plan, lists, state, processes, log):
    "Both lists of one state of the ViT: thresholds from the second, then the first with every photograph's counts at them"
    began, seeds = time.perf_counter(), a.seeds if state == "frozen" else a.seeds[:1]
    about = dict(saw=dict(cnn=a.cnn_saw, vit=a.vit_saw), machine=machine(a))
    with voc.Workers(source, plan, processes, a.device) as workers:
        found = voc.count_both(workers, lists, a.work, a.out, seeds, state, about, chunk=a.chunk, until=time.monotonic() + a.seconds, progress=sys.stderr.isatty())
    rows = {r["rule"]: r for r in voc.counts_rows(found) if (r["method"], r["blocks"], r["split"]) == ("cam", "all", a.lists[0])}
    first, second = (c.arrays for c in found[::-1])
    log.add(f"count {state}", began, photographs={c.split: f"{len(c.arrays['each_ids'])} of {int(c.arrays['images'])}" for c in found}, machine=machine(a),
            cam={k: round(100 * r["miou"], 2) for k, r in rows.items()}, spent={n: round(float(second[n] + first[n]), 1) for n in first if n.startswith("seconds_")})


def together(a, function, calls):
    "Results of calls that do not depend on each other: on a GPU a process each, on a CPU one after the other"
    if a.device == "cpu" or len(calls) < 2: return [function(*c) for c in calls]
    with ProcessPoolExecutor(len(calls), mp.get_context("spawn")) as pool: return list(pool.map(function, *zip(*calls)))


def masks(a, source, plan, lists, recipe, log):
    "Pseudo masks of Table 1, as far as the time allows"
    began, until, rows, work = time.perf_counter(), time.monotonic() + a.seconds, table_rows(a, plan), a.work / "masks"
    choose = chosen_counts(a)
    best = voc.best_thresholds(choose.arrays)
    of = lambda r: choose.plan.thresholds[best[voc.BLOCKS.index(r.blocks), choose.plan.points.index(r.point), 0]]
    thresholds = {r.folder: voc_masks.label_thresholds(of(r)) for r in rows}
    left, took = {}, {}
    with voc_masks.Pool(source, rows, work, max(1, a.processes if a.device == "cpu" else (os.cpu_count() or 8)), a.device) as pool:
        left["seeds"] = voc_masks.make_seeds(pool, {n: lists[n] for n in a.lists}, thresholds, a.every, until=until)
        took["seeds and labels"] = time.perf_counter() - began
        config = voc_masks.IRNetConfig(**dict(epochs=a.irn_epochs, batch=16, momentum=.9, workers=0 if a.device == "cpu" else 3) | recipe | a.irn)
        nets = together(a, voc_masks.train_boundaries, [(source, lists[a.lists[0]], work / "labels" / r.folder, work / "irnet" / f"{r.folder}.safetensors", config, a.device) for r in rows])
        took["boundary networks"] = time.perf_counter() - began - sum(took.values())
        left["walks"] = voc_masks.make_walks(pool, {n: lists[n] for n in a.lists}, until=until)
        took["walks"] = time.perf_counter() - began - sum(took.values())
    log.add("masks", began, left=left, took={n: round(t, 1) for n, t in took.items()}, networks=nets, settings=asdict(config), label_thresholds=thresholds, every=a.every, machine=machine(a))
    write_masks(a, rows, log)


def segment(a, source, plan, lists, recipe, log):
    "A segmentation network per row, and one on the ground truth"
    from adcam.segment import RECIPES                # needs segmentation_models_pytorch
    began, rows, work = time.perf_counter(), table_rows(a, plan), a.work / "masks"
    best = {n: s.best()["t"] for n, s in voc_masks.walk_counts(work, a.lists[1]).items()}
    gpu = a.device != "cpu"
    changes = dict(iterations=a.seg_iterations, check=10**6, mixed_precision="bf16" if gpu else "fp32", workers=3 if gpu else 0) | recipe | a.seg
    calls = [(source, {n: lists[n] for n in a.lists}, work, r.folder, best[r.folder], changes, a.device) for r in rows[:a.seg_rows] if r.folder in best]
    done = together(a, voc_masks.segment, [(*calls[0][:3], "truth", None, *calls[0][5:]), *calls])
    log.add("segment", began, networks=[{k: v for k, v in d.items() if k != "confusion"} for d in done], settings=asdict(replace(RECIPES["deeplabv2_pair"], **changes)), machine=machine(a))
    write_masks(a, rows, log)


def baselines(a, source, lists, log):
    "Rows that need more than one look at a photograph, in rounds over all rows"
    began, spent, until = time.perf_counter(), time.process_time(), time.monotonic() + a.seconds
    desk = voc_baselines.Desk(source, lists, a.work / "baselines", voc_baselines.Effort(**a.effort), a.device)
    rows = [r.strip() for r in a.only.split(";") if r.strip()] or list(voc_baselines.ROWS)
    few, more = ([int(n) for n in v.split(",")] for v in (a.few, a.more))
    jobs = voc_baselines.rounds(desk, list(dict.fromkeys(["CAM", *rows])), few, more, a.chunk)
    left = voc_baselines.measure(desk, jobs, until, a.irnet or a.work / "masks/irnet/CAM.safetensors", report=lambda s: print(s, flush=True))
    trained = {p.stem: json.loads(p.read_text()) for p in sorted((desk.work / "networks").glob("*.json"))}
    log.add("baselines", began, left=left, cpu_seconds=round(time.process_time() - spent, 1), machine=machine(a))
    body = dict(rows=voc_baselines.baseline_rows(desk), trained=trained, effort=asdict(desk.effort), lists=a.lists, source=source.prints(), machine=machine(a), steps=[s for s in log.body["steps"] if s["step"] == "baselines"])
    atomic_write(a.out / "baselines.json", lambda f: f.write(json.dumps(body, indent=1).encode()))
    for r in body["rows"]:
        if r["rule"] == "fixed": print(f"{r['row']:18} {r['column']:7} {r['split']:11} {r['n']:5} mIoU {100 * r['miou']:.1f}, CAM {100 * r['cam']:.1f}", flush=True)


def chosen_counts(a):
    "Counts of the list that chooses"
    found = next((c for c in voc.load_counts(a.out) if (c.state, c.split) == ("frozen", a.lists[1])), None)
    if found is None: raise FileNotFoundError(f"no counts of {a.lists[1]} in {a.out}: run the step `count` first, thresholds of the labels come from there")
    return found


def table_rows(a, plan): return voc_masks.table_rows(plan.k, plan.T, voc_masks.preferred_k(chosen_counts(a)))[:a.rows]


def write_masks(a, rows, log):
    "What is finished of Table 1's later columns"
    body = dict(rows=voc_masks.mask_rows(a.work / "masks", a.lists, rows), lists=a.lists, steps=[s for s in log.body["steps"] if s["step"] in ("masks", "segment")])
    atomic_write(a.out / "masks.json", lambda f: f.write(json.dumps(body, indent=1).encode()))
    for r in body["rows"]:
        if r["rule"] != "oracle": print(f"{r['row']:22} {r['column']:13} {r['split']:11} {r['n']:5} mIoU {100 * r['miou']:.1f}", flush=True)


def main(argv=None):
    a = options(argv)
    for folder in (a.work, a.out): folder.mkdir(parents=True, exist_ok=True)
    plan, recipe = tiny(a) if a.tiny else (voc.Plan(), {})
    lists = {n: VOCFolder(a.data, n) for n in a.lists}
    lists = {n: voc.spread_part(ds, a.limit) for n, ds in lists.items()}
    source = voc.Source(a.network, len(lists[a.lists[0]].classes), a.cnn_weights, a.vit_weights)
    frozen = source._replace(files=tuple(str(cnn_file(a, s)) for s in a.seeds))
    for ds in lists.values(): voc.check_photographs(ds, plan, source.stride)
    few = plan if a.tiny else replace(plan, ks=(10, 50, 100, 200), steps=(1, 2, 4))  # enough to say what tuning does
    log = Log(a.out / "log.json")
    if "train" in a.steps: train(a, source, lists[a.lists[0]], recipe, log)
    states = {"frozen": frozen} if "count" in a.steps else {}
    if "tuned" in a.steps: states |= {r: frozen._replace(files=frozen.files[:1], vit_file=str(vit_file(a, r))) for r in a.rates}
    if a.device == "cpu":
        for s, src in states.items(): count(a, src, plan if s == "frozen" else few, lists, s, a.processes, log)
    elif states:
        with ThreadPoolExecutor(len(states)) as pool:  # a GPU has room for all of them at once
            for job in [pool.submit(count, a, src, plan if s == "frozen" else few, lists, s, a.processes if s == "frozen" else max(1, a.processes // 2), log) for s, src in states.items()]: job.result()
    small = (dict(crop=64, batch=2, epochs=1, radius=3), dict(crop=64, batch=2, iterations=2)) if a.tiny else ({}, {})
    if "masks" in a.steps: masks(a, frozen, plan, lists, small[0], log)
    if "baselines" in a.steps: baselines(a, frozen._replace(files=frozen.files[:1]), lists, log)
    if "segment" in a.steps: segment(a, frozen, plan, lists, small[1], log)


if __name__ == "__main__": main()
