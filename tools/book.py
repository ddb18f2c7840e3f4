"""The notebooks as a book, in numbers: results/book.json.

    python tools/book.py                     measure the notebooks as they are and keep the "before" of the file
    python tools/book.py --before COMMIT     measure COMMIT as "before" too

Per notebook: cells; median and maximum of the lines of a code cell; text cells per code cell; share of code cells with a test;
pictures; the longest run of code cells without text (cells and lines); words; and what a reader passes before the first
picture, in cells and in minutes (200 words or 60 lines of code a minute). Hidden cells count as code that nobody reads: they
are in the cells, not in the lines.
"""
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results/book.json"
TEST = re.compile(r"\b(?:test_\w+\(|assert\b)")
HIDDEN = re.compile(r"^#\|\s*(?:hide|default_exp|exporti)\b", re.M)
WORDS, LINES = 200, 60  # that a reader takes in a minute


def source(cell: dict) -> str:
    return "".join(cell["source"])


def words(text: str) -> int:
    "Words of prose; formulas, code and comments do not count."
    text = re.sub(r"<!--.*?-->|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", " ", text, flags=re.S)
    return len(re.findall(r"[A-Za-z][A-Za-z'-]*", text))


def lines(cell: dict) -> int:
    "Lines of code that a reader sees."
    return 0 if HIDDEN.search(source(cell)) else sum(bool(x.strip()) and not x.startswith("#|") for x in source(cell).splitlines())


def pictures(cell: dict) -> int:
    return sum(any(k.startswith("image/") for k in o.get("data", {})) for o in cell.get("outputs", []))


def longest_run(cells: list[dict]) -> tuple[int, int]:
    "Most code in a row without a word between: cells, lines."
    best = run = (0, 0)
    for c in cells:
        run = (run[0] + 1, run[1] + lines(c)) if c["cell_type"] == "code" and lines(c) else (0, 0) if c["cell_type"] == "markdown" else run
        best = max(best, run, key=lambda r: r[1])
    return best


def row(name: str, nb: dict) -> dict:
    "The numbers of one notebook."
    cells = nb["cells"]
    code, text = ([c for c in cells if c["cell_type"] == kind] for kind in ("code", "markdown"))
    seen = [n for c in code if (n := lines(c))]
    first = next((i for i, c in enumerate(cells) if pictures(c)), None)
    minutes = None if first is None else sum(words(source(c)) / WORDS if c["cell_type"] == "markdown" else lines(c) / LINES for c in cells[:first + 1])
    run = longest_run(cells)
    return {"notebook": name, "cells": len(cells), "median": median(seen or [0]), "max": max(seen or [0]), "prose": len(text) / max(len(code), 1),
            "tests": sum(bool(TEST.search(source(c))) for c in code) / max(len(code), 1), "pictures": sum(map(pictures, cells)), "run_cells": run[0],
            "run_lines": run[1], "words": sum(map(words, map(source, text))), "first_picture": first, "minutes": minutes and round(minutes, 1)}


def notebooks(commit: str = "") -> dict:
    "{name: notebook} of the work tree or of a commit."
    if not commit:
        return {p.relative_to(ROOT / "nbs").as_posix(): json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not {".ipynb_checkpoints", "student"} & set(p.parts)}  # students' versions are lessons with blanks
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [n for n in git("ls-tree", "-r", "--name-only", commit, "nbs").splitlines() if n.endswith(".ipynb")]
    return {n.removeprefix("nbs/"): json.loads(git("show", f"{commit}:{n}")) for n in names}


def measure(commit: str = "") -> list[dict]:
    return [row(n, nb) for n, nb in notebooks(commit).items()]


def span(values, show) -> str:
    "Smallest, middle and largest value."
    values = sorted(v for v in values if v is not None)
    return " / ".join(show(v) for v in (values[0], median(values), values[-1])) if values else ""


def summary(rows: list[dict]) -> dict:
    "All notebooks in one line: least / middle / most."
    whole, percent, tenth = (lambda v: f"{v:.0f}"), (lambda v: f"{100 * v:.0f} %"), (lambda v: f"{v:.2f}")
    of = lambda key: [r[key] for r in rows]
    longest = max(rows, key=lambda r: r["run_lines"])
    return {"notebooks": len(rows), "cells": span(of("cells"), whole), "code lines, median": span(of("median"), whole), "code lines, max": max(of("max")), "text per code cell": span(of("prose"), tenth),
            "cells with a test": span(of("tests"), percent), "pictures": sum(of("pictures")), "without a picture": sum(not p for p in of("pictures")), "longest run without text": f"{longest['run_cells']} cells, {longest['run_lines']} lines ({longest['notebook']})",
            "words": sum(of("words")), "minutes to a picture": span(of("minutes"), lambda v: f"{v:.1f}")}


def table(dicts: list[dict]) -> str:
    head = list(dicts[0])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *([d[h] for h in head] for d in dicts)])


def main() -> int:
    result = json.loads(OUT.read_text()) if OUT.exists() else {"name": "book", "how": "python tools/book.py --before f400e1e"}
    if sys.argv[1:2] == ["--before"] and len(sys.argv) == 3:
        result["before"] = {"commit": sys.argv[2], "rows": measure(sys.argv[2])}
    elif sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    result["after"] = {"rows": measure()}
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    states = [s for s in ("before", "after") if s in result]
    lines_ = {s: summary(result[s]["rows"]) for s in states}
    print(table([{"": key} | {s: lines_[s][key] for s in states} for key in lines_["after"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
