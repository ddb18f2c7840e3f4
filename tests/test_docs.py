"""The site: it builds without a warning, nothing in it leads nowhere or elsewhere, and a browser finds its way. And the ways in without an installation agree with the package.

Tests of the site are skipped without the extra `docs` (`make docs` installs it), those in a browser without Chromium or playwright.
ADCAM_DOCS names a site that was built already; ADCAM_SCREENSHOTS a folder that keeps what the browser showed."""
import configparser
import functools
import http.server
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script
from packaging.requirements import Requirement
from test_browser import CHROMIUM, FLAGS

SITE = [name for name in ("sphinx", "myst_nb", "furo") if importlib.util.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(SITE), reason=f"needs the extra docs: {', '.join(SITE)}")
needs_browser = pytest.mark.skipif(not CHROMIUM or importlib.util.find_spec("playwright") is None, reason="needs Chromium and playwright")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def lines(name: str) -> list[str]:
    return [x for x in (ROOT / name).read_text().splitlines() if x and not x.startswith("#")]


# ---------------------------------------------------------------- the site

@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The built site; a warning of Sphinx or a dead link would have ended the build with 1"
    if os.environ.get("ADCAM_DOCS"): return Path(os.environ["ADCAM_DOCS"]).resolve()
    out = tmp_path_factory.mktemp("docs") / "site"
    run = subprocess.run([sys.executable, str(ROOT / "docs/build.py"), str(out)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def build():
    return load_script(ROOT / "docs/build.py")


@needs_sphinx
def test_every_notebook_and_module_has_a_page(site):
    pages = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html")}
    notebooks = {p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                 if not {".ipynb_checkpoints", "student"} & set(p.parts)}
    modules = {"api/" + ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "adcam").rglob("*.py") if not p.name.startswith("_")}
    assert notebooks - {"nbs/index"} <= pages and modules <= pages and {"index", "DEPARTURES", "search", "genindex"} <= pages


@needs_sphinx
def test_every_public_name_is_described(site):
    for path in (ROOT / "adcam").rglob("*.py"):
        if path.name.startswith("_"): continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = re.search(r"__all__ = (\[.*?\])", path.read_text(), re.S)
        page = (site / f"api/{module}.html").read_text()
        assert not [n for n in json.loads(names[1].replace("'", '"')) if f'id="{module}.{n}"' not in page
                    and f'<span class="pre">{n}</span></code>: from' not in page]


@needs_sphinx
def test_parameters_are_described_by_their_comments(site):
    page = re.sub(r"<[^>]+>", "", (site / "api/adcam.cam.html").read_text())
    assert re.search(r"attn\s+–\s+\(B,L,1\+N,1\+N\) head-averaged attention of every block", page)


@needs_sphinx
def test_site_can_lie_anywhere(site):
    assert (site / ".nojekyll").exists()
    assert not [p for p in site.rglob("*.html") if str(ROOT) in p.read_text()]


@needs_sphinx
def test_nothing_is_left_beside_the_site(site): assert not (site.parent / "jupyter_execute").exists()


@needs_sphinx
def test_page_shows_no_directive_and_no_hidden_cell(site):
    text = re.sub(r"<[^>]+>", "", (site / "nbs/05_cam.html").read_text())
    assert "#|" not in text and "default_exp" not in text


@needs_sphinx
@pytest.mark.parametrize("lesson", [1, 6])
def test_an_exercise_is_shown_with_its_blank_before_its_solution(site, lesson):
    asked = (ROOT / f"nbs/course/student/lesson{lesson}.ipynb").read_text().count("# your code")
    page = (site / f"nbs/course/lesson{lesson}.html").read_text()
    assert page.count("# your code") == asked and page.index("# your code") < page.index("a solution, after you have tried")


def test_dead_links_and_foreign_files_are_found(build, tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html">1</a> <a href="#y">2</a> <a href="#x">3</a> <a href="/c">4</a> <script src="https://example.org/s.js"></script>')
    assert sorted(f.split()[1] for f in build.faults(tmp_path)) == ["#y", "/c", "b.html", "loads"]


def test_long_exported_cells_are_folded_and_hidden_ones_left_out(build, tmp_path):
    import nbformat
    code = nbformat.v4.new_code_cell
    cells = [nbformat.v4.new_markdown_cell("# T\n\n> p"), code("#| default_exp x"), code("#| hide\nsecret"),
             code("#| export\ndef f():\n" + "    1\n" * 30), code("#| export\ndef g(): 1")]
    (build.ROOT / ".cache").mkdir(exist_ok=True)
    path = build.ROOT / ".cache/folding_test.ipynb"
    try:
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        page = build.notebook_page(path)
    finally: path.unlink(missing_ok=True)
    assert [c.metadata.get("tags") for c in page.cells[1:]] == [["hide-input"], []] and page.cells[2].source == "def g(): 1"


# ---------------------------------------------------------------- five pages in a browser

@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")  # one that outlives the module would keep other modules from starting theirs
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address, request):
    "A page that asks nobody else and reports no error"
    options = getattr(request, "param", {})
    context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | options))
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(f"asked for {r.url}"))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    yield page
    if folder := os.environ.get("ADCAM_SCREENSHOTS"): page.screenshot(path=Path(folder) / f"{request.node.name.split('[')[0]}.png")
    context.close()
    assert not wrong


@needs_sphinx
@needs_browser
def test_what_the_search_quotes_is_no_tex(page, address):
    page.goto(address + "search.html?q=co-neighbor")
    page.wait_for_function("[...document.querySelectorAll('#search-results p.context')].some(p => p.innerText.includes('S_ij'))")
    assert not [t for t in page.locator("#search-results p.context").all_inner_texts() if "\\(" in t or "\\boldsymbol" in t]


@needs_sphinx
@needs_browser
def test_what_is_pull(page, address):
    "From the landing page: ask, and the first answer defines it"
    page.goto(address + "index.html")
    page.locator("input.sidebar-search").fill("what is pull?")
    page.locator("input.sidebar-search").press("Enter")
    first = page.locator("#search-results ul.search li a").first
    first.wait_for()
    page.wait_for_function("document.querySelector('#search-results p.search-summary')?.innerText.includes('found')")
    assert "glossary" in first.get_attribute("href")
    first.click()
    page.wait_for_load_state()
    assert "Pull" in page.locator("#push-and-pull").inner_text()
    page.wait_for_function("(top => top >= 0 && top < innerHeight / 3)(document.querySelector('#push-and-pull').getBoundingClientRect().top)")  # on the screen, not below it


@needs_sphinx
@needs_browser
def test_navigation_shows_where_one_is(page, address):
    page.goto(address + "nbs/course/lesson5.html")
    page.wait_for_function("(r => r.top > 0 && r.bottom < innerHeight)(document.querySelector('.sidebar-tree .current-page').getBoundingClientRect())")


@needs_sphinx
@needs_browser
def test_equations_are_drawn(page, address):
    page.goto(address + "nbs/05_cam.html")
    page.locator("mjx-container svg").first.wait_for(state="attached")
    page.wait_for_function("document.querySelectorAll('.math').length === document.querySelectorAll('.math mjx-container').length")
    assert page.locator("mjx-container [data-mml-node=merror]").count() == 0


@needs_sphinx
@needs_browser
def test_figure_is_shown(page, address):
    page.goto(address + "nbs/paper/fig4.html")
    pictures = page.locator(".cell_output img")
    assert pictures.count() > 0
    pictures.first.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('article img')].some(i => i.complete && i.naturalWidth > 300)")


@needs_sphinx
@needs_browser
@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_dark_mode(page, address):
    page.goto(address + "api/adcam.cam.html")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", color)[:3])) < 150


@needs_sphinx
@needs_browser
@pytest.mark.parametrize("page", [{"viewport": {"width": 390, "height": 844}}], indirect=True)
def test_phone(page, address):
    "Nothing sticks out; wide tables scroll by themselves"
    page.goto(address + "index.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".table-wrapper").count() > 0


# ---------------------------------------------------------------- ways in without an installation

def test_binder_installs_the_checkout_in_the_tested_versions():
    assert lines("binder/requirements.txt") == ["--extra-index-url https://download.pytorch.org/whl/cpu", "-c ../constraints.txt", "-e .[notebooks]"]
    assert (lines("binder/runtime.txt")
            == ["python-" + ".".join(lines("environment.yml") and re.search(r"python>=(\d+\.\d+)", (ROOT / "environment.yml").read_text())[1].split("."))])
    assert (ROOT / "binder/postBuild").stat().st_mode & stat.S_IXUSR


def test_notebooks_need_no_tool_of_development():
    names = {Requirement(r).name for r in EXTRAS["notebooks"]}
    assert names and names <= {Requirement(r).name for r in EXTRAS["dev"]} and not names & {"nbdev", "pytest", "jupyterlab", "playwright"}


def test_every_import_of_a_notebook_is_installed_in_binder():
    "What cells import: the standard library, adcam, a dependency, or the extra `notebooks`"
    import ast
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {Requirement(r).name.replace("-", "_") for r in [*project["dependencies"], *EXTRAS["notebooks"]]}
    known |= {"pydensecrf"}  # an extra of its own, guarded where it is used; nbclient comes with papermill, huggingface_hub with timm
    known |= {"adcam", "yaml", "nbclient", "huggingface_hub", "PIL", "IPython", "matplotlib_inline", "mpl_toolkits"} | set(sys.stdlib_module_names)
    missing = {}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or re.search(r"^[%!]", source, re.M) or "importorskip" in source: continue
            for node in ast.walk(ast.parse(source)):
                roots = [a.name.split(".")[0]
                         for a in node.names] if isinstance(node, ast.Import) else [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and not node.level else []
                for root in set(roots) - known: missing.setdefault(root, set()).add(path.name)
    assert not missing


def test_colab_takes_the_repository_of_the_settings():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    first = next("".join(c["source"]) for c in json.loads((ROOT / "nbs/colab.ipynb").read_text())["cells"] if c["cell_type"] == "code")
    assert f'"{parser["DEFAULT"]["git_url"]}"' in first and "[notebooks]" in first


def test_workflow_installs_the_extra_and_builds():
    flow = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())
    steps = [s.get("run", "") for s in flow["jobs"]["build"]["steps"]]
    assert any('["docs"]' in s and "-c constraints.txt" in s for s in steps) and any("docs/build.py _docs" in s for s in steps)
    assert flow["jobs"]["publish"]["permissions"] == {"pages": "write", "id-token": "write"}


def test_constraints_pin_the_tools_of_the_site():
    pins = dict(x.lower().split("==") for x in lines("constraints.txt"))
    for requirement in map(Requirement, EXTRAS["docs"]): assert requirement.specifier.contains(pins[requirement.name.lower()])
