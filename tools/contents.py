"""The top of every module notebook: what it builds on and its contents, from its imports and headings; plumbing folded in JupyterLab.

    python tools/contents.py [NOTEBOOK ...]

Writes the cell behind `#| default_exp` and the mark `source_hidden`. `make check` runs it, so a heading that changes changes the contents.
"""
import ast
import hashlib
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
PLUMBING = re.compile(r"_(check|read|write|open|load|save|settings|run_settings)(_\w+)?$")  # private functions that a reader may skip
MACHINERY = set("""_choice _checks _later _job _pair Pool _in_time chunks _boundaries _plain _sweeps _chunk _chunks _fixed _KEEP write_recipe_log
    _tensor _as_given _pictures _kernels BACKENDS MAX_EXACT _pydensecrf _Difference _compare _is_head _size_name _FOREIGN _foreign _cause _in_words
    _MMPRETRAIN _official_names _FULL _size _need_room _mark _why _sizes _Clock _files _step_cost _mask_costs""".split())  # behind an idea, not the idea


def source(cell: dict) -> str:
    return "".join(cell["source"])


def module_of(path: Path) -> str:
    "The module that a notebook exports"
    return next(m[1] for c in json.loads(path.read_text())["cells"] if (m := MODULE.search(source(c))))


def headings(cells: list) -> list[str]:
    "Headings of the second level, in order"
    text = "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"^## +(.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def builds_on(cells: list, homes: dict[str, str]) -> list[str]:
    "Names of the notebooks whose modules the exported cells import, in the order of the book"
    code = "\n".join(source(c) for c in cells if c["cell_type"] == "code" and re.match(r"#\|\s*export", source(c)))
    return sorted({homes[m] for m in re.findall(r"^\s*from adcam\.([\w.]+) import", code, re.M) if m in homes})


def contents(path: Path, cells: list, homes: dict[str, str]) -> str:
    "Markdown of the cell"
    plain = lambda h: re.sub(r"[`*]", "", h)  # noqa: E731
    found = headings(cells)
    parts = [" · ".join(f"[{plain(h)}](#{plain(h).replace(' ', '-')})" for h in found)] if found else []
    below = [n for n in builds_on(cells, homes) if n != path.stem]
    modules = {home: module for module, home in homes.items()}
    if below: parts.append("Builds on " + ", ".join(f"[{n.split('_')[0]} {modules[n].split('.')[-1]}]({n}.ipynb)" for n in below) + ".")
    return "\n\n".join(parts)


def is_plumbing(code: str) -> bool:
    "Imports, tests' helpers that no page shows, private functions that only check, read or write, and named machinery"
    if re.match(r"#\|\s*(hide|default_exp)", code): return True
    if not re.match(r"#\|\s*export", code): return False
    def skippable(node):
        if isinstance(node, (ast.Import, ast.ImportFrom)): return True
        if isinstance(node, (ast.Assign, ast.AnnAssign)): return getattr(node.targets[0] if isinstance(node, ast.Assign) else node.target, "id", "") in MACHINERY | {"_all_"}
        return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (node.name in MACHINERY or bool(PLUMBING.match(node.name)))
    return all(map(skippable, ast.parse(code).body))


def update(path: Path, homes: dict[str, str]) -> bool:
    "Bring one notebook into step; has it changed?"
    before = path.read_text(encoding="utf-8")
    nb = json.loads(before)
    own = hashlib.sha256(f"contents of {module_of(path)}".encode()).hexdigest()[:8]
    cells = [c for c in nb["cells"] if c["id"] != own]
    at = next(i for i, c in enumerate(cells) if MODULE.search(source(c))) + 1
    text = contents(path, cells, homes)
    nb["cells"] = cells[:at] + [dict(cell_type="markdown", id=own, metadata={}, source=text.splitlines(keepends=True))] + cells[at:]
    for c in nb["cells"]:
        c["metadata"].pop("jupyter", None)
        if c["cell_type"] == "code" and is_plumbing(source(c)): c["metadata"]["jupyter"] = dict(source_hidden=True)
    after = json.dumps(nb, indent=1, ensure_ascii=False) + "\n"
    if after != before: path.write_text(after, encoding="utf-8")
    return after != before


def main() -> None:
    notebooks = sorted(NBS.glob("[0-9]*.ipynb"))
    homes = {module_of(p): p.stem for p in notebooks}
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else notebooks:
        if update(path.resolve(), homes): print(f"contents of {path.name}")


if __name__ == "__main__":
    main()
