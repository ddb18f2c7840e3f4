"""Numbers that prose quotes from results/ are compared with the files.

    python tools/quotes.py              every notebook: 1 and one line per number that is wrong or unproven
    python tools/quotes.py NOTEBOOK     only these

A text cell that quotes a result ends in a comment, which no page shows:

    <!-- quotes results/mini/table3.json summary test fixed
    38.4 % = miou[stopped cam]
    4.5 % = miou[stopped ad_cam push k=50] - miou[stopped cam]
    -->

The first line names the file, the list in it, and words that hold for all lines below. On the left stands the number as the
text prints it (a word up to twelve is a number too; `%`: a fraction in the file, percent in the text), on the right an expression. `field[words]` is that field of the
one row in which every word is the value of some field (`name=value` where a word alone would be ambiguous, `_` for a blank in it);
`field{words}` are those of all such rows, for min, max, mean, len. `list:field[words]` takes another list of the file,
`$a.b.0` a single value, and
`find($a.b, 'pattern')` the number that a pattern's group finds in a text. Rounded to the digits on the left, both sides must agree.
`given 8.8 63.5` names numbers that are not measured here: the paper's, or settings.
"""
import ast
import json
import re
import sys
from functools import cache
from pathlib import Path
from statistics import fmean, median

import nbformat

ROOT = Path(__file__).resolve().parent.parent
QUOTES = re.compile(r"<!-- quotes (\S+) ?(.*)\n((?:.*\n)*?)-->")
GIVEN = re.compile(r"<!-- given ([^>]*)-->")
ACCESS = re.compile(r"(?:(\w+):)?([A-Za-z]\w*)([\[{])([^\]}]*)[\]}]|\$([\w.:-]+)")
DECIMAL = re.compile(r"(?<![\w.,])\d+\.\d+(?!\w|\.\d)")
FUNCTIONS = {"abs": abs, "find": lambda text, pattern: float(re.search(pattern, text)[1]), "min": min, "max": max, "mean": fmean, "median": median, "len": len, "sum": sum}
WORDS = {w: n for n, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())} | {"twenty": 20, "thirty": 30}
REPORTS = re.compile(r"What came out|committed run")  # a cell with these words is about results


@cache
def load(path: str):
    data = json.loads((ROOT / path).read_text(encoding="utf-8"))
    if not isinstance(data.get("rows"), dict): return data
    from adcam.pipeline import load_result  # rows that are kept as columns
    return load_result((ROOT / path).stem, (ROOT / path).parent)


def matches(row: dict, word: str) -> bool:
    "Does the row have the value (`name=value`, or any field's value)?"
    name, has, value = word.partition("=")
    value = (value if has else name).replace("_", " ")
    fields = [row.get(name)] if has else row.values()
    return any(str(v).replace("_", " ") == value for v in fields)


def at(data, path: str):
    "The value under a path such as `grids.all push.0`."
    for step in path.split("."):
        data = data[int(step)] if isinstance(data, list) else data[step if step in data else step.replace("_", " ")]
    return data


def value(expression: str, data: dict, section: str, words: list[str]):
    "The number that the expression finds in the file."
    found = {}

    def replace(m):
        name = f"x{len(found)}"
        if m[5]:
            found[name] = at(data, m[5].replace(":", "."))
            return name
        wanted = (words if m[1] in (None, section) else []) + m[4].split()
        rows = [r for r in at(data, m[1] or section) if all(matches(r, w) for w in wanted)]
        if m[3] == "[" and len(rows) != 1:
            differ = sorted({k for r in rows for k, v in r.items() if v != rows[0].get(k) and k in r and not isinstance(v, float)})
            raise LookupError(f"{m[0]}: {len(rows)} rows have {' '.join(wanted)}" + (f"; they differ in {', '.join(differ)}" if rows else ""))
        found[name] = rows[0][m[2]] if m[3] == "[" else [r[m[2]] for r in rows]
        return name

    return eval(compile(ast.parse(ACCESS.sub(replace, expression), mode="eval"), expression, "eval"), {"__builtins__": {}} | FUNCTIONS, found)


def visible(text: str) -> str:
    "What a reader sees, without code and formulas."
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def cell_faults(text: str) -> list[str]:
    "One line per number of a text cell that its file does not confirm."
    shown, proven, faults = visible(text), set(), []
    for path, header, lines in QUOTES.findall(text):
        section, *words = header.split() or ["rows"]
        for line in filter(None, map(str.strip, lines.splitlines())):
            said, _, expression = (x.strip() for x in line.partition(" = "))
            number, percent = said.removesuffix("%").strip(), said.endswith("%")
            proven.add(number)
            if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", shown):
                faults.append(f"{line}: the text no longer says {number}")
                continue
            try:
                measured = value(expression, load(path), section, words) * (100 if percent else 1)
            except (LookupError, OSError, SyntaxError, TypeError, NameError) as e:
                faults.append(f"{line}: {path}: {e}")
                continue
            plain = str(WORDS.get(number, number)).replace(",", "")
            digits = len(plain.partition(".")[2])
            if abs(measured - float(plain)) > 0.5 * 10 ** -digits + 1e-9:
                faults.append(f"{line}: {path} says {measured:.{digits + 2}f}")
    if proven or REPORTS.search(shown):
        given = {x for m in GIVEN.findall(text) for x in m.split()}
        faults += [f"{n} is neither quoted from a file nor given" for n in dict.fromkeys(DECIMAL.findall(shown)) if n not in proven | given]
    return faults


def quoted(path: Path) -> int:
    "How many numbers of a notebook are compared with files."
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    return sum(" = " in line for c in cells for _, _, lines in QUOTES.findall(c) for line in lines.splitlines())


def notebook_faults(path: Path) -> list[str]:
    "Faults of all text cells, with the id of the cell before each."
    cells = nbformat.read(path, as_version=4).cells
    return [f"{c.id}: {fault}" for c in cells if c.cell_type == "markdown" for fault in cell_faults(c.source)]


def main() -> int:
    paths = [Path(p).resolve() for p in sys.argv[1:]] or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    faults = [f"{p.relative_to(ROOT)} {fault}" for p in paths for fault in notebook_faults(p)]
    print("\n".join(faults) or f"{sum(map(quoted, paths))} numbers agree with their files")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
