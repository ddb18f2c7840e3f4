"""The figure notebooks show the full-size results they talk about: outputs of their cells `Result("mini/fig4.png")`.

    python tools/outcome.py           put pictures and tables from results/ into nbs/paper, all other outputs out
    python tools/outcome.py --check   1 if a notebook shows something else than results/ holds now

`make results` runs it at the end. A run by papermill starts without these outputs and makes its own.
"""
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAPER = sorted((ROOT / "nbs/paper").glob("*.ipynb"))
SHOWS = re.compile(r'Result\("([^"]+)"\)\s*$')


def shown(cell: dict) -> str | None:
    "The file below results/ that a cell shows, if it shows one."
    match = SHOWS.match("".join(cell["source"])) if cell["cell_type"] == "code" else None
    return match and match[1]


def output(name: str) -> dict:
    "The output of a cell that shows the file."
    from adcam.viz import Result
    data, metadata = Result(name)._repr_mimebundle_()
    lines = {k: v.splitlines(keepends=True) if k.startswith("text/") else v for k, v in data.items()}
    return {"data": lines, "execution_count": None, "metadata": metadata, "output_type": "execute_result"}


def faults(path: Path) -> list[str]:
    "What a notebook shows that is not what results/ holds."
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        name, outputs = shown(cell), cell.get("outputs", [])
        if name is None:
            found += [f"cell {cell['id']} has an output that is not from results/"] if outputs else []
        elif not (ROOT / "results" / name).is_file():
            found.append(f"cell {cell['id']}: results/{name} does not exist")
        elif [o.get("metadata", {}).get("sha256") for o in outputs] != [hashlib.sha256((ROOT / "results" / name).read_bytes()).hexdigest()]:
            found.append(f"cell {cell['id']} does not show results/{name} as it is now")
    return found


def fill(path: Path) -> None:
    "Bring the outputs of a notebook into step with results/."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = [output(name)] if (name := shown(cell)) else []
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    if "--check" not in sys.argv[1:]:
        for path in PAPER:
            if faults(path): fill(path)
    wrong = [f"{p.relative_to(ROOT)}: {f}" for p in PAPER for f in faults(p)]
    print("\n".join(wrong) or f"{len(PAPER)} figure notebooks show what results/ holds")
    if wrong: print("run `python tools/outcome.py` and commit", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
