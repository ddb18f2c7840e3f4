"""The course's students' versions and slides, made from the lessons with solutions in nbs/course.

    python tools/course.py build            write nbs/course/student
    python tools/course.py build --check    are they up to date? (exit code 1 if not)
    python tools/course.py run lesson2      run lessons where they stand, with small pictures
    python tools/course.py slides OUT --reveal DIR --mathjax DIR

In a lesson, what stands between `# solution: BLANK` and `# end` becomes BLANK (several lines are separated by ` | `). Cells tagged
`wrong`, cells that are exported into adcam.course, and hidden cells are left out; the checks are imported instead. Text tagged
`wrong` is for the teacher: it becomes a speaker's note of the slides.
"""
import argparse
import ast
import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

from adcam.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "nbs" / "course"
BLANK = "  # your code"
SOLUTION = re.compile(r"^( *)# solution: (.*)\n(?:.*\n)*?\1# end(?:\n|$)", re.M)


def lessons() -> list[Path]:
    "The lessons with their solutions, in order."
    return sorted(COURSE.glob("lesson*.ipynb"))


def read(path: Path) -> dict:
    "A notebook as plain JSON. `ValueError` for what is none."
    if not path.stat().st_size: raise ValueError(f"{path.name} is empty")
    try: nb = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (UnicodeDecodeError, json.JSONDecodeError) as e: raise ValueError(f"{path.name} is no notebook, its text is no JSON: {e}") from None
    if isinstance(nb, dict) and "worksheets" in nb: raise ValueError(f"{path.name} has the format of before 2015: open it in Jupyter and save it")
    if not isinstance(nb, dict) or not isinstance(nb.get("cells"), list): raise ValueError(f"{path.name} is no notebook: it has no cells")
    return nb


def source(cell: dict) -> str:
    "The text of a cell, which JSON may hold as a list of lines."
    text = cell.get("source", "")
    return text if isinstance(text, str) else "".join(text)


def tags(cell: dict) -> set:
    return set(cell.get("metadata", {}).get("tags", []))


def digest(text: str) -> str:
    "Hash of a cell without blanks at line ends, so that an editor that strips them changes nothing."
    return hashlib.sha256("\n".join(line.rstrip() for line in text.strip().splitlines()).encode()).hexdigest()


def blanked(text: str, where: str = "") -> str:
    "A cell with blanks instead of solutions. `ValueError` for a marker without its partner."
    def blank(m): return "".join(f"{m[1]}{line}{BLANK}\n" for line in m[2].split(" | "))
    out = SOLUTION.sub(blank, text + "\n").rstrip("\n")
    if re.search(r"^ *# (solution:|end$)", out, re.M): raise ValueError(f"{where}: `# solution: BLANK` and `# end` must come in pairs, with the same indentation")
    return out


def is_kept(cell: dict) -> bool:
    "Does a cell belong into the student's version?"
    text = source(cell)
    return "wrong" not in tags(cell) and not (cell["cell_type"] == "code" and re.match(r"#\| *(export|default_exp|hide)", text))


def exported(nb: dict) -> list[str]:
    "Public names that a lesson exports into adcam.course."
    trees = [ast.parse(source(c)) for c in nb["cells"] if c["cell_type"] == "code" and source(c).startswith("#| export")]
    return [n.name for t in trees for n in t.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


def student(path: Path) -> dict:
    "The student's version of a lesson: blanks, no wrong answers, no outputs."
    nb = read(path)
    cells = [dict(c, source=source(c)) for c in nb["cells"] if is_kept(c)]
    used = "\n".join(c["source"] for c in cells if c["cell_type"] == "code")
    names = [n for n in exported(nb) if re.search(rf"\b{n}\b", used)]
    for cell in (c for c in cells if c["cell_type"] == "code"):
        cell["source"] = blanked(cell["source"], f"{path.name}, cell {cell['id']}") if "exercise" in tags(cell) else cell["source"]
        cell.update(outputs=[], execution_count=None)
    setup = next(c for c in cells if c["cell_type"] == "code")
    setup["source"] = setup["source"].replace("set_style()", f"from adcam.course.{path.stem} import {', '.join(names)}\nset_style()", 1)
    for cell in cells:
        deeper = re.sub(r"\]\(\.\./", "](../../", cell["source"]) if cell["cell_type"] == "markdown" else cell["source"]  # links: one folder down
        cell["source"] = deeper.splitlines(keepends=True)
    return dict(nb, cells=cells)


def text_of(nb: dict) -> bytes:
    return (json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def build(check: bool = False) -> int:
    "Write the students' versions; with `check`, only compare. Exit code."
    folder, stale = COURSE / "student", []
    wanted = {p.name: text_of(student(p)) for p in lessons()}
    folder.mkdir(exist_ok=True)
    old = {p.name for p in folder.glob("*.ipynb")}
    for name, content in wanted.items():
        if name in old and (folder / name).read_bytes() == content: continue
        stale.append(name)
        if not check: atomic_write(folder / name, lambda to: to.write(content))
    for name in sorted(old - wanted.keys()):
        stale.append(name)
        if not check: (folder / name).unlink()
    if check and stale: print(f"nbs/course/student is out of date: {', '.join(stale)}; run `make course` and commit", file=sys.stderr)
    else: print(f"{len(wanted)} students' versions in nbs/course/student, {len(stale)} of them {'to be ' if check else ''}changed")
    return int(check and bool(stale))


def smaller(outputs: list[dict]) -> None:
    "Store the pictures of a cell with 256 colors, a third of their size."
    from PIL import Image
    for data in (o["data"] for o in outputs if "image/png" in o.get("data", {})):
        png = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB").quantize(256, kmeans=3).save(png, "png", optimize=True)
        data["image/png"] = base64.b64encode(png.getvalue()).decode() + "\n"


def run(names: list[str]) -> int:
    "Run notebooks of the course in place. Exit code."
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor
    from nbdev.clean import nbdev_clean
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # pictures are kept, whatever this shell says
    for path in [COURSE / f"{n.removesuffix('.ipynb')}.ipynb" for n in names] or lessons():
        nb = nbformat.read(path, as_version=4)
        ExecutePreprocessor(timeout=600, kernel_name="python3").preprocess(nb, dict(metadata=dict(path=str(COURSE))))
        for cell in nb.cells: smaller(cell.get("outputs", []))
        atomic_write(path, lambda to: to.write(nbformat.writes(nb).encode() + b"\n"))
        nbdev_clean(str(path))
    return 0


def slide_types(cells: list[dict]) -> list[dict]:
    "Cells with the kind of slide that each begins: a heading opens a slide, and what follows it goes along."
    out = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell = dict(cell, source=re.sub(r"\[([^\]]*)\]\([^)]*\.ipynb[^)]*\)", r"\1", source(cell)))  # no notebook lies beside a deck
            parts = [(source(cell), "notes")] if "wrong" in tags(cell) else [
                (t, "slide" if t.startswith(("#", "**After these")) else "-") for t in re.split(r"^(?=##? )", source(cell), flags=re.M) if t.strip()]
        elif "exercise" in tags(cell): parts = [(blanked(source(cell)), "-")]
        else:  # a check's picture would give the answer away
            parts = [(source(cell), "-" if is_kept(cell) and cell.get("outputs") and "check" not in tags(cell) else "skip")]
        out += [dict(cell, id=f"{cell['id']}-{i}", source=text, metadata=dict(slideshow=dict(slide_type=kind))) for i, (text, kind) in enumerate(parts)]
    return out


MATHJAX = """<script>window.MathJax = {tex: {inlineMath: [["$", "$"]], displayMath: [["$$", "$$"]], processEscapes: true}};</script>
<script src="mathjax/es5/tex-chtml-full.js"></script>
<style>.reveal .slides section section { max-height: 96%; overflow-y: auto; text-align: left } .reveal { font-size: 24px } .reveal .jp-Cell pre { font-size: 17px !important }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none } .reveal .jp-InputPrompt, .reveal .jp-OutputPrompt { display: none }</style>"""
START = """<script src="reveal.js/dist/reveal.js"></script><script src="reveal.js/plugin/notes/notes.js"></script>
<script>Reveal.initialize({hash: true, slideNumber: true, width: 1100, height: 720, center: false, plugins: [RevealNotes]});</script>"""
# what nbconvert's template takes from a CDN, and what stands there instead
PARTS = [(r'<script src="[^"]*require[^"]*"></script>', ""), (r'<script src="[^"]*jquery[^"]*"></script>', ""), (r'<script type="module">[^<]*mermaid.*?</script>', ""),
         (r'<link[^>]*font-awesome[^>]*>', ""), (r'<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->', MATHJAX), (r'<script>\s*require\(.*?</script>', START)]


def offline(html: str) -> str:
    "A deck of nbconvert that loads nothing from the network. `ValueError` if nbconvert has changed its template."
    for pattern, instead in PARTS:
        html, n = re.subn(pattern, lambda m: instead, html, flags=re.S)
        if n > 1 or not n and instead: raise ValueError(f"nbconvert's template for slides has changed: {n} places look like {pattern}; see PARTS in tools/course.py")
    return html


def slides(out: Path, reveal: Path, mathjax: Path) -> int:
    "Slides of every lesson as HTML that loads nothing from the network. Exit code."
    import nbformat
    from nbconvert import SlidesExporter
    for folder, file, package in ((reveal, "dist/reveal.js", "reveal.js@4"), (mathjax, "es5/tex-chtml-full.js", "mathjax@3")):
        if not (folder / file).is_file():
            print(f"{folder} holds no {file}: get it where there is a network by `npm pack {package}`, extract it, and give its folder `package`", file=sys.stderr)
            return 2
    out.mkdir(parents=True, exist_ok=True)
    for name, folder, parts in (("reveal.js", reveal, ("dist", "plugin/notes")), ("mathjax", mathjax, ("es5",))):
        for part in parts: shutil.copytree(folder / part, out / name / part, dirs_exist_ok=True)
    for css in (out / "reveal.js/dist/theme").glob("*.css"):  # themes ask for fonts; the browser's own will do
        css.write_text(re.sub(r"@import url\(['\"]?https?:[^)]*\);?", "", css.read_text(encoding="utf-8")), encoding="utf-8")
    exporter = SlidesExporter(reveal_url_prefix="reveal.js")
    for path in lessons():
        nb = read(path)
        nb = nbformat.from_dict(dict(nb, cells=slide_types(nb["cells"])))
        html, _ = exporter.from_notebook_node(nb, resources=dict(metadata=dict(name=path.stem)))
        atomic_write(out / f"{path.stem}.html", lambda to: to.write(offline(html).encode()))
    print(f"{len(lessons())} decks in {out}: open lesson1.html in a browser, S shows the speaker's view")
    return 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="write the students' versions").add_argument("--check", action="store_true", help="only say whether they are up to date")
    commands.add_parser("run", help="run lessons in place").add_argument("names", nargs="*", help="such as lesson2; default: all lessons")
    deck = commands.add_parser("slides", help="slides of every lesson, for use without a network")
    deck.add_argument("out", type=Path)
    deck.add_argument("--reveal", type=Path, required=True, help="folder of the npm package reveal.js")
    deck.add_argument("--mathjax", type=Path, required=True, help="folder of the npm package mathjax")
    args = parser.parse_args(argv)
    try:
        if args.command == "build": return build(args.check)
        if args.command == "run": return run(args.names)
        return slides(args.out, args.reveal, args.mathjax)
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
