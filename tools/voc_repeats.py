"""How much do pseudo masks on PASCAL VOC change with the seed of the boundary networks alone? The same maps and labels, two trainings: results/voc/repeats.json.

    python tools/voc_repeats.py COUNTS --work WORK -- --data FOLDER --cnn-weights lite0.safetensors --vit-weights dinov2.safetensors --limit 500 --rows 8 --every 2
    python tools/voc_repeats.py COUNTS OTHER

COUNTS and WORK are --out and --work of tools/voc_measure.py after its step `masks`; behind `--` stands what that step was given, but for --irn. The first form trains and
walks again, in WORK/repeat, and compares; the second compares what is there.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from adcam.pipeline import load_result, provenance, save_result, to_markdown

FIRST, TOOLS = "CAM", Path(__file__).resolve().parent


def boundaries(folder: Path) -> tuple[dict, dict]:
    "(row, split, rule) -> its pseudo masks, and the settings of the boundary networks"
    found = json.loads((folder / "masks.json").read_text())
    rows = {(r["row"], r["split"], r["rule"]): r for r in found["rows"] if r["column"] == "pseudo"}
    return rows, [s["settings"] for s in found["steps"] if s["step"] == "masks"][-1]


def repeats(one: Path, two: Path) -> tuple[list[dict], dict]:
    "A row per row of Table 1, list and rule: mIoU of both, leads over CAM; and the settings that both have. Differences beside the seed are a `ValueError`"
    (a, first), (b, second) = boundaries(one), boundaries(two)
    odd = [k for k in first if k != "seed" and first[k] != second.get(k)]
    if odd or first["seed"] == second["seed"]: raise ValueError(f"{two} must differ from {one} in the seed alone, not in {', '.join(odd) or 'nothing'}: give --irn what {one} had, and seed=1")
    rows = []
    for key in a.keys() & b.keys():
        name, split, rule = key
        if a[key]["n"] != b[key]["n"]: raise ValueError(f"{name}: {a[key]['n']} photographs of {split} in {one}, {b[key]['n']} in {two}; let the second go on")
        both = [r[key]["miou"] for r in (a, b)]
        leads = [m - r[FIRST, split, rule]["miou"] for m, r in zip(both, (a, b))]
        rows.append(dict(row=name, split=split, rule=rule, n=a[key]["n"], first=both[0], second=both[1], lead_first=leads[0], lead_second=leads[1]))
    order = list(dict.fromkeys(r for r, *_ in a))
    return sorted(rows, key=lambda r: (r["split"], r["rule"], order.index(r["row"]))), first | dict(seed=[first["seed"], second["seed"]])


def again(counts: Path, work: Path, words: list[str]) -> Path:
    "The step `masks` with another seed of its boundary networks, on the same maps and labels: its --out"
    other, (_, settings) = work / "repeat", boundaries(counts)
    for name in ("masks/maps", "masks/labels", *(f.name for f in work.glob("*.safetensors"))):
        (link := other / name).parent.mkdir(parents=True, exist_ok=True)
        if not link.exists(): link.symlink_to((work / name).resolve())
    (other / "counts").mkdir(exist_ok=True)
    for file in counts.glob("*.npz"): shutil.copy2(file, other / "counts")
    same = ",".join(f"{n}={settings[n]!r}" for n in ("batch", "crop", "lr_edge", "weight_decay", "power", "momentum", "radius"))
    command = [TOOLS / "voc_measure.py", *words, "--work", other, "--out", other / "counts", "--irn-epochs", settings["epochs"], "--irn", f"{same},seed={settings['seed'] + 1}", "masks"]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    return other / "counts"


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("counts", type=Path)
    p.add_argument("other", type=Path, nargs="?")
    p.add_argument("--work", type=Path, help="train and walk again, with the maps and labels that are here")
    p.add_argument("--out", default="results/voc", help="folder of repeats.json; table1.json there gives data, checkpoints and ledger")
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    a = p.parse_args(argv[:at])
    if (a.work is None) == (a.other is None): p.error("give --work to train again, or a second folder to compare with")
    try:
        if a.work: a.other = again(a.counts, a.work, argv[at + 1:])
    except FileNotFoundError as e: p.error(f"{e}; run tools/voc_measure.py masks first")
    except subprocess.CalledProcessError as e: return e.returncode
    try: rows, settings = repeats(a.counts, a.other)
    except (ValueError, FileNotFoundError) as e: p.error(str(e))
    known = load_result("table1", a.out)
    origin = provenance(seeds=[0], settings=dict(chosen="each list at the threshold that the other one prefers", device="CPU, one thread", boundaries=settings)) | {n: known["provenance"][n] for n in ("data", "checkpoints")}
    path = save_result("repeats", rows, a.out, origin, ledger=known["ledger"])
    print(to_markdown([{n: f"{100 * v:.1f}" if isinstance(v, float) else v for n, v in r.items()} for r in rows if r["rule"] == "fixed"]))
    print(path)
    return 0


if __name__ == "__main__": sys.exit(main())
