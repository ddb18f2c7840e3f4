"""The house is in order: notebooks, exported modules, packaging files and README say the same thing."""
import ast
import configparser
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib

import nbformat
import papermill
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(ROOT / "tools"))
import contents  # noqa: E402

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAPER = [p for p in NOTEBOOKS if p.parent.name == "paper"]
MODULES = [p for p in NOTEBOOKS if p.parent == ROOT / "nbs" and p.name[0].isdigit()]  # the others are pages: index, scaling
COURSE = [p for p in NOTEBOOKS if p.parent.name == "course"]  # checks, lesson1, ...
EXPORTED = [p for p in sorted((ROOT / "adcam").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
# a path that exists on one machine only: a home, a temporary folder, a working folder
MACHINE_PATH = re.compile(r"""(?<![\w./~-])(?:/(?:home|Users|root|tmp|work|var|mnt|opt|private)/[\w.-]+|[A-Z]:\\\\?[\w.-]+)""")
TEXTS = {".json", ".csv", ".md", ".yaml", ".yml", ".toml", ".ini", ".cff", ".txt", ".py", ".log"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


# ---------------------------------------------------------------- notebooks

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_clean(path):
    nb = read(path)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) >= (4, 5), "cell ids need nbformat 4.5"
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    assert nb.metadata.kernelspec.name == "python3"
    for cell in nb.cells:
        assert cell.get("execution_count") is None, f"run nbdev_clean: cell {cell.id} keeps its execution count"
        assert set(cell.metadata) <= {"tags", "jupyter"}, f"run nbdev_clean: cell {cell.id} keeps {set(cell.metadata)}"
        assert cell.metadata.get("jupyter", {"source_hidden": True}) == {"source_hidden": True}, f"cell {cell.id} keeps {cell.metadata.jupyter}"
        assert "injected-parameters" not in cell.metadata.get("tags", []), "papermill wrote into nbs/"
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {cell.id} was committed with its error"


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_figure_notebook_has_one_parameters_cell(path):
    cells = read(path).cells
    tagged = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells carry the tag `parameters`; papermill needs exactly one"
    lines = [x for x in cells[tagged[0]].source.splitlines() if x.strip() and not x.lstrip().startswith("#")]
    for line in lines:
        assert re.match(r"\w+\s*:\s*[\w\[\], .|]+=.*#\s*\S", line), f"`{line}` needs a type and a comment: papermill shows them as help"
    later = "\n".join(c.source for c in cells[tagged[0] + 1:] if c.cell_type == "code")
    assert "check_parameters(" in later, "a misspelt parameter would pass unnoticed"


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_full_size_parameters_exist(path):
    config = ROOT / f"configs/{path.stem}.yaml"
    given = yaml.safe_load(config.read_text())
    cell = next(c for c in read(path).cells if "parameters" in c.metadata.get("tags", []))
    names = {t.id for node in ast.parse(cell.source).body if isinstance(node, (ast.Assign, ast.AnnAssign))
             for t in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    assert set(papermill.inspect_notebook(str(path))) == names, "papermill cannot read a line (often a `=` in its comment), so --help-notebook lacks it"
    assert set(given) <= names, f"{config.name} sets {set(given) - names}, which {path.name} does not know"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_notebook_opens_with_title_and_promise(path):
    cells = read(path).cells
    title = cells[0].source.strip().splitlines()
    assert cells[0].cell_type == "markdown"
    assert title[0].startswith("# ") and any(x.startswith("> ") for x in title[1:]), "first cell: `# title` and `> promise`"
    assert all(not x.strip() or x.startswith(("# ", "> ", "- ")) for x in title), "nbdev drops anything else from the title cell"
    assert cells[1].source.startswith("#| default_exp "), "second cell: `#| default_exp name`"
    pictures = sum(len(json.dumps(c.get("outputs", []))) for c in read(path).cells)
    assert pictures <= 200_000, f"{pictures} bytes of outputs: lower the dpi of its pictures"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_run_all_leaves_the_package_as_it_is(path):
    code = "\n".join(c.source for c in read(path).cells if c.cell_type == "code")
    assert "nbdev_export" not in code, "a reader's Run All would rewrite adcam/*.py; `make export` does it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_names_no_machine_path(path):
    for cell in read(path).cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")]
            texts += [output.get("text", "")]
        for text in texts:
            assert not MACHINE_PATH.search(text), f"cell {cell.id}: {MACHINE_PATH.search(text)[0]}"


def test_committed_texts_name_no_machine_path():
    roots = [ROOT / "results", ROOT / "configs", ROOT / "adcam", ROOT / "tools"]
    files = [p for r in roots if r.exists() for p in r.rglob("*")
             if p.suffix in TEXTS and not {"cache", "seeds", "__pycache__"} & set(p.parts)]
    files += [p for p in ROOT.iterdir() if p.suffix in TEXTS]
    found = {name_of(p): m[0] for p in files if (m := MACHINE_PATH.search(p.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_contents_name_every_section(path):
    listed = re.findall(r"\]\(#([^)]+)\)", read(path).cells[2].source)
    assert listed == [h.replace("`", "").replace(" ", "-")
                      for h in contents.headings([c | {"source": c.source} for c in read(path).cells])], "run tools/contents.py"


def test_plumbing_is_folded_and_a_lesson_is_not():
    assert contents.is_plumbing("#| hide\nx = 1")
    assert contents.is_plumbing("#| export\nimport os")
    assert contents.is_plumbing("#| export\ndef _check_config(c): pass")
    assert not contents.is_plumbing("#| export\ndef affinity(edge): pass") and not contents.is_plumbing("show_images([])")


# ---------------------------------------------------------------- exported modules

@pytest.mark.parametrize("path", EXPORTED, ids=name_of)
def test_module_names_an_existing_notebook(path):
    head = path.read_text().splitlines()[:5]
    sources = [m[1] for line in head if (m := re.search(r"File to edit: (\S+\.ipynb)", line))]
    assert sources, f"{path.name} has no nbdev header: was it written by hand?"
    assert (path.parent / sources[0]).resolve().exists(), f"its notebook {sources[0]} is gone; delete the module"


@pytest.mark.parametrize("path", EXPORTED, ids=name_of)
def test_module_imports_nothing_of_the_workshop(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    assert not found & {"nbdev", "execnb", "pytest", "hypothesis"}
    tools = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("fastcore")]
    assert all(ast.unparse(n) == "from fastcore.basics import patch" for n in tools), "of fastcore a module needs `patch`, and no more"


@pytest.mark.parametrize("path", EXPORTED, ids=name_of)
def test_every_export_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    bare = [n.name for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare


def test_cam_imports_nothing_of_the_project():
    path = ROOT / "adcam/cam.py"
    tree = ast.parse(path.read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith("adcam"))]


def test_modules_import_only_modules_above():
    order = {p.stem.split("_", 1)[-1]: i for i, p in enumerate([*MODULES, *COURSE])}
    order["drawing"] = order["scenes"] - .5  # 01b: read after the data set, which is drawn by it
    wrong = []
    for path in EXPORTED:
        me = order.get(path.stem, len(order))  # what has no number, such as the checks of the course, comes last
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                other = node.module.split(".")[-1]  # baselines.recam is 09a_recam
                if order.get(other, -1) >= me: wrong.append(f"{path.stem} imports {node.module}")
    assert not wrong


@pytest.mark.parametrize("path", EXPORTED, ids=name_of)
def test_module_imports_no_private_name_of_another(path):
    found = [f"{node.module}.{a.name}" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
             and (node.level or "adcam" in node.module)
             for a in node.names if a.name.startswith("_")]
    assert not found


@pytest.mark.parametrize("path", [p for p in MODULES if "from fastcore.basics import patch" in p.read_text(encoding="utf-8")], ids=name_of)
def test_patch_stays_fastcore_s_decorator(path):
    code = "\n".join(re.sub(r"^[%!].*$", "", c.source, flags=re.M) for c in read(path).cells if c.cell_type == "code")
    nodes = [n for top in ast.parse(code).body if not isinstance(top, (ast.ClassDef, ast.FunctionDef)) for n in ast.walk(top)]
    bound = [n.lineno for n in nodes if isinstance(n, ast.Name) and n.id == "patch" and isinstance(n.ctx, ast.Store)]
    bound += [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.module != "fastcore.basics" and "patch" in [a.asname or a.name for a in n.names]]
    assert not bound


# ---------------------------------------------------------------- README, settings, packaging

def test_readme_is_made_from_the_index():
    subprocess.run([sys.executable, str(ROOT / "tools/readme.py"), "--check"], check=True)


def test_readme_table_is_that_of_the_results():
    space = {}
    for cell in read(ROOT / "nbs/index.ipynb").cells:
        if cell.cell_type == "code" and cell.source.startswith("#| hide") and "assert" not in cell.source:
            exec(cell.source, space)
    assert space["comparison"](space["measured"]("table3")).data in (ROOT / "README.md").read_text(), "run nbs/index.ipynb again, then make readme"


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [x for x in links if not re.match(r"[a-z]+:", x) and not (ROOT / x).exists()]
    assert links and not missing


def test_readme_of_the_package_index_needs_no_files_beside_it():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from dist import absolute, address
    finally:
        sys.path.pop(0)
    text = absolute((ROOT / "README.md").read_text(), "https://example.org/adcam", "main")
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    assert links and all(re.match(r"https?:|#", x) for x in links) and address()[0].startswith("https://")
    assert "![" in text and re.search(r"!\[[^\]]*\]\(https://example.org/adcam/raw/main/results/", text)
    assert absolute("[a](b.md) ![c](d.png) [![e](f.png)](g.md) [h](#i) [j](https://k.l)", "u",
                    "m") == "[a](u/blob/m/b.md) ![c](u/raw/m/d.png) [![e](u/raw/m/f.png)](u/blob/m/g.md) [h](#i) [j](https://k.l)"


def test_the_address_is_set_at_one_place(settings):
    "git_url of settings.ini; while it is the placeholder no badge leads nowhere"
    sys.path.insert(0, str(ROOT / "tools"))
    try: import readme
    finally: sys.path.pop(0)
    real = readme.badges("https://github.com/some.one/ad-cam", "main")
    assert real.count("some.one/ad-cam/") == 2 and "lab/tree/nbs/index.ipynb" in real and "/blob/main/nbs/colab.ipynb" in real
    assert '\\"https://github.com/x/y\\"' in readme.colab("https://github.com/x/y")
    assert readme.badges(*readme.address()) == "" or readme.badges(*readme.address()) in (ROOT / "README.md").read_text()
    elsewhere = [p.name for p in [*(ROOT / "nbs").rglob("*.ipynb"), *(p for p in ROOT.glob("*.*") if p.is_file())] if settings["git_url"] in p.read_text(encoding="utf-8", errors="ignore")]
    assert sorted(set(elsewhere) - {"README.md"}) == ["colab.ipynb", "settings.ini"]


def test_a_wheel_carries_notebooks_and_configs():
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert files == {"share/adcam/nbs/paper": ["nbs/paper/*.ipynb"], "share/adcam/configs": ["configs/*.yaml"]}


def test_settings_agree_with_pyproject(settings, project):
    assert settings["lib_name"] == project["name"]
    assert project["requires-python"] == f">={settings['min_python']}"
    assert settings["description"] == project["description"]
    assert not settings["requirements"].split() and not settings["dev_requirements"].split(), "pyproject.toml is the one source"
    assert "tags" in settings["allowed_cell_metadata_keys"].split(), "nbdev_clean would delete papermill's tag"
    import adcam
    assert adcam.__version__ == settings["version"] == importlib.metadata.version("adcam")


def test_every_dependency_is_installed_in_a_fitting_version(project):
    listed = project["dependencies"] + project["optional-dependencies"]["dev"]
    for requirement in map(Requirement, listed):
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), str(requirement)


def test_constraints_pin_the_dependencies(project):
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    pins = {}
    for requirement in map(Requirement, lines):
        (spec,) = requirement.specifier
        assert spec.operator == "==", f"{requirement} is no pin"
        pins[requirement.name.lower().replace("_", "-")] = Version(spec.version)
    assert not [n for n in pins if n.startswith("nvidia") or n == "adcam"]
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        pin = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pin), f"constraints.txt has {pin}, pyproject.toml wants {requirement}"


def test_environment_yml(settings):
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(env) == {"name", "channels", "dependencies"} and env["name"] == "adcam"
    plain = [d for d in env["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    assert pip == ["-e .[dev]"], "what pip installs is said in pyproject.toml only"
    (python,) = [d.removeprefix("python") for d in plain if d.startswith("python")]
    assert f">={settings['min_python']}" in python.split(",")
    for name, version in (d.split("=", 1) for d in plain if "=" in d and not d.startswith("python")):
        assert version == importlib.metadata.version(name)


def test_citation_and_license_agree(settings, project):
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["version"] == settings["version"] and cff["license"] == project["license"] == "Apache-2.0"
    assert "2211.10931" in cff["preferred-citation"]["journal"]
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in (ROOT / "LICENSE").read_text()


def test_departures_name_real_switches_and_their_defaults():
    import inspect
    from adcam import cam, cnn, conformer, crf, irnet, seeds
    from adcam.baselines import advcam, getam, rib
    functions = [cnn.cam_resnet50, advcam.advcam_views, getam.getam_views, rib.rib_views, crf.dense_crf, irnet.random_walk, cam.ad_cam, cam.normalize,
                 conformer.conformer_small, conformer.Conformer.__init__, seeds.extract]
    defaults = {}
    for f in functions:
        for name, p in inspect.signature(f).parameters.items():
            defaults.setdefault(name, set()).add(p.default)
    rows = [line.split("|") for line in (ROOT / "DEPARTURES.md").read_text().splitlines() if line.startswith("| ")]
    named = [m for r in rows if len(r) == 7 for m in re.findall(r'(\w+)="(\w+)"', r[3])]
    assert len(named) > 8
    wrong = [f"{n}={v!r}" for n, v in named if v not in defaults.get(n, ())]
    assert not wrong


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.M)[1].split()
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+)", listed, re.M)) == set(phony)


def test_make_help_says_how_long_a_figure_takes():
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    silent = [line for line in listed.splitlines() if re.match(r"  make (fig|table|theorem|results|checkpoints|test|bench |photos|coco)",
                                                               line) and not re.search(r"\(.*(min|minute|h|hours|days|seconds)\b", line)]
    assert not silent


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_make_runs_every_figure_at_full_size(path):
    target = {"fig4": "figure4"}.get(path.stem, path.stem)
    folder = {"photos": "photos", "coco": "coco", "claims": "claims"}.get(path.stem, "mini")
    plan = subprocess.run(["make", "-n", target, "VENV=", "DATA=x"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"adcam\.cli paper {path.stem} -f configs/{path.stem}\.yaml .*--out results/{folder} *$", plan, re.M)


def test_checkpoints_are_small_and_installed():
    files = list((ROOT / "adcam/checkpoints").glob("*.safetensors"))
    assert sum(p.stat().st_size for p in files) <= 16_000_000
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["adcam"]
    assert "checkpoints/*.safetensors" in data
