"""The site: `python docs/build.py OUT` writes HTML that needs no server and asks nobody for anything.

Pages are the notebooks as they are committed (nothing is executed), DEPARTURES.md, README.md, the course's page for teachers and one page per module from its
exported source. The tree of the sources is that of the repository, so that every relative link means the same in both."""
import argparse
import ast
import configparser
import hashlib
import html.parser
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

ROOT = Path(__file__).resolve().parent.parent
_parser = configparser.ConfigParser(interpolation=None)
_parser.read(ROOT / "settings.ini")
settings = _parser["DEFAULT"]
MATHJAX = ("sphinx-mathjax-offline", "tex-svg-full.js", "a4354ff94fd868aea0cc6eaaa79a57fda0588646fc46ee3700a349ee0a11cbe6")  # MathJax 3.2.2 as on npm
SRC = ROOT / ".cache/docs/src"
LONG = 16  # exported cells with more lines than this are folded

# ---------------------------------------------------------------- notebooks

def jupyter_anchor(title: str) -> str:
    "The id that JupyterLab and nbconvert give to a heading"
    return title.replace(" ", "-")


def notebook_page(path: Path, executed: list[Path] = ()) -> nbformat.NotebookNode:
    "A notebook as its reader wants it: no hidden cells, no directives, long exported code folded, outputs of a run that was made here"
    nb, module, cells = nbformat.read(path, 4), "", []
    sheet = path.parent / "student" / path.name
    blanks = {c.id: c for c in nbformat.read(sheet, 4).cells if "exercise" in c.metadata.get("tags", [])} if sheet.is_file() else {}
    done = {(c.id, c.source): c.outputs for p in executed for c in nbformat.read(p, 4).cells if c.cell_type == "code"}
    for cell in nb.cells:
        flags = dict(re.findall(r"^#\|\s*(\w+):?[ \t]*(.*?)\s*$", cell.source, re.M)) if cell.cell_type == "code" else {}
        if "default_exp" in flags: module = flags["default_exp"]
        if {"hide", "default_exp", "exporti"} & set(flags) or "wrong" in cell.metadata.get("tags", []): continue
        if cell.cell_type == "code":
            cell.outputs = [o for o in done.get((cell.id, cell.source), cell.outputs) if o.output_type != "error"]
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            cell.metadata.setdefault("tags", [])
            if flags.get("echo") == "false": cell.metadata.tags.append("remove-input")
            elif "export" in flags and (cell.source.count("\n") >= LONG or module.startswith("course.")):  # a check gives the answer away
                fold(cell, f"adcam.{module}: {names(cell.source)}")
            elif "# solution" in cell.source:
                if cell.id in blanks: cells.append(nbformat.NotebookNode(blanks[cell.id], id=f"{cell.id}-blank"))  # first what is asked
                fold(cell, "a solution, after you have tried")
            for o in cell.outputs: strip_paths(o)
        if cell.source: cells.append(cell)
    nb.metadata.pop("widgets", None)
    for cell in cells:
        if cell.cell_type == "markdown": cell.source = relinked(cell.source)
        for o in cell.get("outputs", []): o.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # needs scripts from elsewhere, and a kernel
    cells[0].source = re.sub(r"^- \w+: .*\n?", "", cells[0].source, flags=re.M) + f"\n\n{ways_in(path, module)}"
    nb.cells = cells
    return nb


def relinked(text: str) -> str:
    "Students' versions have no page; anchors that a Markdown file writes out as HTML are linked as HTML"
    text = re.sub(r"(\]\([^)\s]*)student/(lesson\d)", r"\1\2", text)
    return re.sub(r"\[([^\]]*)\]\(([\w./-]+)\.md#([\w-]+)\)", r'<a class="reference internal" href="\2.html#\3">\1</a>', text)


def names(source: str) -> str:
    "What a cell defines"
    return ", ".join(re.findall(r"^(?:def|class) (\w+)", source, re.M) or re.findall(r"^(\w+)\b.*=", source, re.M)[:3] or ["imports"])


def fold(cell, title: str) -> None:
    "Fold a cell, and say on the fold what is in it"
    cell.metadata.tags.append("hide-input")
    cell.metadata["mystnb"] = {f"code_prompt_{w}": f"{title} ({cell.source.count(chr(10)) + 1} lines)" for w in ("show", "hide")}


def strip_paths(output) -> None:
    "What was printed on this machine names no folder of it"
    if "text" in output: output.text = output.text.replace(f"{ROOT}/", "")


def ways_in(path: Path, module: str) -> str:
    "A line below the title: the API page and the notebook itself"
    name = path.relative_to(ROOT).as_posix()
    up = "../" * name.count("/")
    api = f"[API of `adcam.{module}`]({up}api/adcam.{module}.md) · " if module else ""
    student = path.parent / "student" / path.name
    sheet = f" · {{download}}`Download the student's version <{up}files/nbs/course/student/{path.name}>`" if student.is_file() else ""
    return f"{api}{{download}}`Download the notebook <{up}files/{name}>`{sheet}"


def committed(folder: Path) -> list[Path]:
    "Files of a folder that git knows; all of them where there is no git"
    listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True)
    return sorted(folder / x for x in listed.stdout.splitlines()) if listed.returncode == 0 and listed.stdout else sorted(p for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- the API, from the exported source

class Comments(dict):
    "Line number -> comment of that line; `end(line)`: where the statement that begins at a line ends"
    def __init__(self, source: str):
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        super().__init__({t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT})
        self.ends = [t.start[0] for t in tokens if t.type == tokenize.NEWLINE]

    def end(self, line: int) -> int: return next(n for n in self.ends if n >= line)


def docments(f: ast.FunctionDef, notes: Comments) -> tuple[dict[str, str], str]:
    "What the comments behind the parameters say, and that behind the end of the signature"
    end = notes.end(f.lineno)
    args = [a for a in (*f.args.posonlyargs, *f.args.args, f.args.vararg, *f.args.kwonlyargs, f.args.kwarg) if a]
    return {a.arg: notes[a.end_lineno] for a in args if a.end_lineno in notes and a.end_lineno < end}, notes.get(end, "")


class Plain(ast.NodeTransformer):
    "Defaults that Sphinx cannot print become an ellipsis"
    def visit_arg(self, node): return node
    def generic_visit(self, node):
        if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.DictComp, ast.SetComp, ast.Lambda, ast.JoinedStr, ast.IfExp, ast.Starred)): return ast.Constant(...)
        return super().generic_visit(node)


def signature(f: ast.FunctionDef, method: bool) -> str:
    "Parameters and defaults as they are written"
    args = Plain().visit(ast.parse(ast.unparse(f.args).join(("def f(", "): pass")))).body[0].args
    if method: (args.posonlyargs or args.args or [None]).pop(0)
    return f"({ast.unparse(args)})" + (f" -> {ast.unparse(f.returns)}" if f.returns else "")


def prose(node) -> str:
    "A docstring, safe for Markdown: stars, underscores, brackets and angles are what they look like, `code` stays"
    parts = re.split(r"(`[^`]*`|\$[^$]*\$)", ast.get_docstring(node) or "")
    return "".join(p if i % 2 else escaped(p) for i, p in enumerate(parts))


def escaped(text: str) -> str: return re.sub(r"([*_<>\[\]{}$\\|])", r"\\\1", text)


def added_to(node) -> str:
    "The class to which `@patch` adds a function, or nothing"
    marks = {ast.unparse(d).partition("(")[0] for d in getattr(node, "decorator_list", ())}
    return ast.unparse(node.args.args[0].annotation) if "patch" in marks and isinstance(node, ast.FunctionDef) else ""


def described(node, name: str, notes: Comments, depth: int = 0, added: list = ()) -> str:
    "One function or class as a Sphinx directive; `added`: functions that later cells add to classes"
    fence, method = ":" * (6 - depth), depth > 0
    if isinstance(node, ast.ClassDef):
        inner = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        head = signature(inner, True) if inner else signature(ast.parse(f"def f({', '.join(map(ast.unparse, fields))}): pass").body[0], False) if fields else ""
        known, _ = docments(inner, notes) if inner else ({n.target.id: notes[n.end_lineno] for n in fields if n.end_lineno in notes}, "")
        members = [n for n in [*node.body, *(f for f in added if added_to(f) == name)] if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        kind, out = "class", ""
    else:
        kind, head, (known, out), members = ("method" if method else "function"), signature(node, method), docments(node, notes), []
        decorators = {ast.unparse(d) for d in node.decorator_list}
        if method and decorators & {"property", "cached_property", "functools.cached_property", "patch(as_prop=True)"}: kind, head = "property", ""
    lines = [f"{fence}{{py:{kind}}} {name}{head}", "", prose(node), ""]
    lines += [f":param {p}: {escaped(text)}" for p, text in known.items()] + ([f":returns: {escaped(out)}"] if out else []) + [""]
    lines += [described(m, m.name, notes, depth + 1) for m in members]
    return "\n".join([*lines, fence, ""])


def api_page(path: Path) -> str:
    "Every public name of a module"
    source = path.read_text()
    tree, notes = ast.parse(source), Comments(source)
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    names = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    defined = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not added_to(n)}
    values = {e.id: n for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
              for e in ast.walk(t) if isinstance(e, ast.Name)}
    elsewhere = {a.asname or a.name: n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level for a in n.names}
    home = re.search(r"File to edit: [./]*(nbs/\S+\.ipynb)", source)[1]
    lines = [f"# adcam.{module.removeprefix('adcam.')}", f"> {prose(tree)}", f"Explained in [{Path(home).stem}](../{home}).", f"```{{py:module}} {module}\n```"]
    for name in names:
        if name in defined: lines.append(described(defined[name], name, notes, added=[n for n in tree.body if added_to(n)]))
        elif name in values:
            text = ast.unparse(values[name].value)
            text = json.dumps(text if len(text) <= 90 else f"{text[:87]} …", ensure_ascii=False)
            lines.append(f"::::::{{py:data}} {name}\n:value: {text}\n\n{escaped(notes.get(values[name].end_lineno, ''))}\n::::::\n")
        else:
            n = elsewhere[name]
            source = ".".join([*module.split(".")[:-n.level], n.module])
            lines.append(f"`{name}`: from [{source}]({source}.md)")
    return "\n\n".join(lines) + "\n"


# ---------------------------------------------------------------- the whole

PARTS = ["Start", "The method", "Baselines", "From seeds to masks", "Paper", "Course", "Reference"]

def part(name: str) -> str:
    "Where a notebook belongs, by its folder and number"
    if name.startswith("paper/"): return "Paper"
    if name.startswith("course/"): return "Course"
    if not name[0].isdigit(): return "Reference" if name in ("glossary", "scaling") else "Start"
    number = int(name[:2])
    return "Reference" if number == 0 or number >= 13 else "The method" if number < 9 else "Baselines" if number == 9 else "From seeds to masks"


def title_of(path: Path) -> str: return nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")


def short(path: Path) -> str:
    "A title for the navigation: what stands before the colon, two words for a lesson at least"
    return re.split(r": ", title_of(path))[0] if path.parent.name == "paper" else title_of(path)


def landing(entries: dict[str, list[str]]) -> str:
    "The README with the table of contents; its pictures and links are relative to the root, as here"
    text = re.sub(r"^<!--.*?-->\s*", "", (ROOT / "README.md").read_text(), flags=re.S)
    text = re.sub(r"\]\(nbs/paper\)", "](nbs/paper/claims.ipynb)", re.sub(r"\]\(nbs/course/?\)", "](nbs/course/)", text))
    text = re.sub(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\]\(", r"[\1](", text)  # a badge is a picture from elsewhere: its words are enough
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {p}\n\n" + "\n".join(entries[p]) + "\n```" for p in PARTS if entries.get(p)]
    return relinked(text) + "\n" + "\n\n".join(trees) + "\n"


def prepare(src: Path) -> None:
    "Write every page and picture below src"
    shutil.rmtree(src, ignore_errors=True)
    (src / "_static").mkdir(parents=True)
    entries = {p: [] for p in PARTS}
    notebooks = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name != "index.ipynb" and not p.name.startswith("_"))
    for path in notebooks:
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        write(src / "files/nbs" / f"{name}.ipynb", path.read_text())
        if path.parent.name == "student": continue  # to download from the lesson's page
        nb = notebook_page(path, sorted((ROOT / "results").glob(f"*/{path.name}")))
        write(src / "nbs" / f"{name}.ipynb", nbformat.writes(nb))
        entries[part(name)].append(f"{short(path)} <nbs/{name}>")
    for path in sorted((ROOT / "adcam").rglob("*.py")):
        if path.name.startswith("_"): continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        write(src / f"api/{module}.md", api_page(path))
    write(src / "api/index.md", "# API\n\n> Every public name, from the comments that stand beside its parameters.\n\n```{toctree}\n:maxdepth: 2\n:glob:\n\nadcam.*\n```\n")
    for name in ("DEPARTURES.md", "LICENSE", "CITATION.cff", "constraints.txt"): write(src / name, relinked((ROOT / name).read_text()))
    teacher = (ROOT / "nbs/course/README.md").read_text().replace("[student](student)", "`student`")  # a folder is no page
    write(src / "nbs/course/README.md", relinked(teacher))
    entries["Course"].insert(0, "For teachers <nbs/course/README>")
    for path in committed(ROOT / "results"):
        if path.suffix in (".png", ".md", ".json", ".csv"):
            head = f"---\norphan: true\nnosearch: true\n---\n# {path.stem} ({path.parent.name})\n\n" if path.suffix == ".md" else ""
            write(src / path.relative_to(ROOT), head.encode() + path.read_bytes())
    entries["Start"].insert(0, "What this is <self>")
    entries["Reference"] += ["api/index", "DEPARTURES"]
    write(src / "index.md", landing(entries))
    for name in ("site.css", "site.js"): shutil.copy(Path(__file__).parent / name, src / "_static")
    package, name, digest = MATHJAX
    [mathjax] = [f.locate() for f in importlib.metadata.files(package) if f.name == name]
    if hashlib.sha256(Path(mathjax).read_bytes()).hexdigest() != digest: raise SystemExit(f"{name} of {package} is not MathJax 3.2.2 as published")
    shutil.copy(mathjax, src / "_static")
    write(src / "_static" / f"{name}.LICENSE.txt", f"{name} is MathJax 3.2.2, copyright The MathJax Consortium, under the Apache License 2.0:\n\n{(ROOT / 'LICENSE').read_text()}")


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


class Links(html.parser.HTMLParser):
    "ids, links and loaded files of a page"
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[n] for n in ("id", "name") if a.get(n)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if a.get("src") or tag == "link" and a.get("href"): self.loads.append(a.get("src") or a["href"])


def faults(out: Path) -> list[str]:
    "Links and anchors that lead nowhere, files that would be loaded from elsewhere, absolute paths"
    pages = {p: Links(p.read_text()) for p in sorted(out.rglob("*.html"))}
    found = []
    for page, seen in pages.items():
        where = page.relative_to(out).as_posix()
        found += [f"{where} loads {x}" for x in seen.loads if urlsplit(x).netloc]
        for link in {*seen.links, *seen.loads}:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            if url.path.startswith("/"): found.append(f"{where}: {link} is absolute")
            elif not target.exists(): found.append(f"{where}: {link} does not exist")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: found.append(f"{where}: {link} has no such anchor")
    return found


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out", nargs="?", default="_docs", type=Path, help="folder of the site, _docs by default")
    args = ask.parse_args()
    out = args.out.resolve()
    prepare(SRC)
    html = SRC.parent / "html/site"    # myst-nb leaves a folder beside the one that it builds
    for old in (out, html): shutil.rmtree(old, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html", "-c", str(Path(__file__).parent), "-d", str(SRC.parent / "doctrees"), str(SRC), str(html)])
    shutil.copytree(html, out)
    (out / ".nojekyll").touch()
    found = faults(out)
    for line in found: print(line, file=sys.stderr)
    print(f"{len(list(out.rglob('*.html')))} pages in {os.path.relpath(out)}")
    return built.returncode or bool(found)


if __name__ == "__main__": sys.exit(main())
