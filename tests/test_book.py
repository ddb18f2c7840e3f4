"""The notebooks as a book: no number that its file does not confirm, no link that leads nowhere, no picture that is not in results/."""
import base64
import io
import json
import re
import sys
from functools import cache
from urllib.parse import unquote

import pytest
from conftest import ROOT
from PIL import Image
from adcam.viz import Result
from test_house import EXPORTED, NOTEBOOKS, name_of, read

sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402
import outcome  # noqa: E402
import quotes  # noqa: E402

TEXTS = [p for p in (*ROOT.glob("tests/**/*.md"), *ROOT.glob("tests/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("configs/*")) if p.name != "test_book.py"]
PAGES = [*NOTEBOOKS, ROOT / "README.md", ROOT / "DEPARTURES.md"]
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+(?:\([^()]*\))?)\)|(?:src|href)=\"([^\"]+)\"")
PHANTOM = re.compile(r"\bspec [A-Z]\.?\d|\bspec/\w|\bbaselines? \d+\.\d|\bspecification, section|\bThe issue asks|(?<![\w.])[AB]\.\d{1,2}(?![\w.])")


def prose(path) -> str:
    "The text of a page, of a notebook that of its markdown cells; code blocks and code in lines are left out."
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return re.sub(r"``.*?``|`[^`\n]*`", "``", text)


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_quoted_numbers_agree_with_their_files(path):
    assert quotes.notebook_faults(path) == []


def test_figure_notebooks_quote_results():
    assert sum(map(quotes.quoted, NOTEBOOKS)) > 150


QUOTE = "What came out: CAM has {0}.\n\n<!-- quotes results/mini/table3.json summary test fixed\n{1} % = miou[stopped cam]\n-->"


def test_right_number_passes():
    assert quotes.cell_faults(QUOTE.format("38.4", "38.4")) == []


def test_wrong_number_is_found():
    (fault,) = quotes.cell_faults(QUOTE.format("38.6", "38.6"))
    assert "says 38.4" in fault


def test_number_that_left_the_text_is_found():
    faults = quotes.cell_faults(QUOTE.format("much", "38.4"))
    assert "no longer says 38.4" in faults[0]


def test_number_without_a_file_is_found():
    assert quotes.cell_faults("The committed run has 61.3.") == ["61.3 is neither quoted from a file nor given"]


def test_number_of_the_paper_is_given():
    assert quotes.cell_faults("What came out: the paper has 63.5.\n\n<!-- given 63.5 -->") == []


def test_words_that_fit_two_rows_are_found():
    (fault,) = quotes.cell_faults(QUOTE.format("38.4", "38.4").replace("stopped cam", "cam"))
    assert "2 rows" in fault and "differ in group" in fault


# ---------------------------------------------------------------- results where they are discussed

@pytest.mark.parametrize("path", outcome.PAPER, ids=name_of)
def test_figure_notebook_shows_what_results_hold(path):
    assert outcome.faults(path) == [], "run python tools/outcome.py"


@pytest.mark.parametrize("path", outcome.PAPER, ids=name_of)
def test_figure_notebook_is_small(path):
    assert path.stat().st_size <= 800_000


@pytest.mark.parametrize("path", [p for p in outcome.PAPER if p.stem != "coco"], ids=name_of)
def test_figure_notebook_shows_its_result(path):
    assert any(outcome.shown(c) for c in read(path).cells)


def test_stale_picture_is_found(tmp_path):
    cell = {"cell_type": "code", "id": "a", "source": 'Result("mini/fig4.png")', "outputs": [{"metadata": {"sha256": "0"}}]}
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert outcome.faults(tmp_path / "x.ipynb") == ["cell a does not show results/mini/fig4.png as it is now"]


def test_output_of_a_smoke_run_is_found(tmp_path):
    cell = {"cell_type": "code", "id": "a", "source": "1 + 1", "outputs": [{"data": {"text/plain": "2"}}]}
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert outcome.faults(tmp_path / "x.ipynb") == ["cell a has an output that is not from results/"]


def test_missing_result_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "make results" in Result("mini/none.png")._repr_mimebundle_()["text/plain"]


# ---------------------------------------------------------------- width of pictures

RASTER = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,([A-Za-z0-9+/=\n]+)")
WIDTH = 480  # pixels


def rasters(nb: dict) -> list[tuple[str, str]]:
    "Every stored picture of pixels as (cell id, base64): outputs, pictures inside their HTML, and the state of widgets."
    found = [("widget", b["data"]) for state in nb.get("metadata", {}).get("widgets", {}).values() for model in state.get("state", {}).values()
             if model["model_name"] == "ImageModel" for b in model.get("buffers", [])]
    for cell in nb["cells"]:
        for kind, value in (item for o in cell.get("outputs", []) for item in o.get("data", {}).items()):
            text = value if isinstance(value, str) else "".join(value) if isinstance(value, list) else json.dumps(value)
            if kind.startswith("image/") and kind != "image/svg+xml": found.append((cell["id"], text))
            else: found += [(cell["id"], data) for data in RASTER.findall(text)]
    return found


def narrow(nb: dict) -> dict[str, int]:
    "Width of the pictures that are narrower than a page wants them, by cell."
    widths = [(cell, Image.open(io.BytesIO(base64.b64decode(data))).width) for cell, data in rasters(nb)]
    return {cell: width for cell, width in widths if width < WIDTH}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_pictures_are_wide_enough_to_read(path):
    assert narrow(json.loads(path.read_text(encoding="utf-8"))) == {}, f"pixels wide, at least {WIDTH}: give the figure a larger size"


def test_pictures_are_in_the_book():
    assert sum(len(rasters(json.loads(p.read_text(encoding="utf-8")))) for p in NOTEBOOKS) > 100


def picture_output(where: str, width: int) -> dict:
    "A notebook with one picture, as output, inside HTML or in a widget."
    Image.new("L", (width, 9)).save(file := io.BytesIO(), "png")
    data = base64.b64encode(file.getvalue()).decode()
    if where == "widget": return {"metadata": {"widgets": {"x": {"state": {"a": {"model_name": "ImageModel", "buffers": [{"data": data}]}}}}}, "cells": []}
    output = {"image/png": data} if where == "output" else {"text/html": ["<img ", f'src="data:image/png;base64,{data}">']}
    return {"cells": [{"id": where, "outputs": [{"data": output}]}]}


@pytest.mark.parametrize("where", ["output", "html", "widget"])
def test_narrow_picture_is_found(where):
    assert narrow(picture_output(where, WIDTH - 1)) == {where: WIDTH - 1}


@pytest.mark.parametrize("where", ["output", "html", "widget"])
def test_wide_picture_passes(where):
    assert narrow(picture_output(where, WIDTH)) == {}


# ---------------------------------------------------------------- links

def plain(heading: str) -> str:
    "A heading as it is shown: no marks of emphasis, code or links."
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[`*]|<[^>]+>", "", heading).strip()


def github(heading: str) -> str:
    "GitHub's id of a heading."
    return re.sub(r"[^\w\- ]", "", plain(heading).lower()).replace(" ", "-")


@cache
def anchors(path) -> set:
    "Ids on a page: JupyterLab's of a notebook's headings, GitHub's of a markdown file's, and those that are written out."
    text = prose(path) if path.suffix == ".ipynb" else re.sub(r"^(```).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    raw = "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown") if path.suffix == ".ipynb" else text
    headings = re.findall(r"^#{1,6} +(.+?)\s*#*$", raw, re.M)
    make = (lambda h: plain(h).replace(" ", "-")) if path.suffix == ".ipynb" else github
    return {make(h) for h in headings} | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", raw))


def broken(path) -> list[str]:
    "Relative links of a page whose file or heading does not exist."
    wrong = []
    for link in (a or b for a, b in LINK.findall(prose(path))):
        if re.match(r"[a-z][a-z+]*:", link): continue
        file, _, anchor = link.partition("#")
        target = (path.parent / unquote(file)).resolve() if file else path
        if not target.exists(): wrong.append(link)
        elif anchor and target.suffix in (".ipynb", ".md") and unquote(anchor) not in anchors(target): wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_and_anchors_exist(path):
    assert broken(path) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n\n[here](#a-title) [gone](#b) [no file](x.ipynb) [web](https://x.org) `[code](y)`")
    assert broken(page) == ["#b", "x.ipynb"]


@pytest.mark.parametrize("path", [*PAGES, *EXPORTED, *TEXTS], ids=name_of)
def test_no_reference_to_a_document_that_readers_do_not_have(path):
    text = path.read_text(encoding="utf-8")
    assert not PHANTOM.search(text), PHANTOM.search(text)[0]


def test_every_misprint_number_is_defined():
    defined = set(re.findall(r"^\| <a id=\"m\d+\"></a>(M\d+) \|", (ROOT / "DEPARTURES.md").read_text(encoding="utf-8"), re.M))
    used = {m for path in [*PAGES, *EXPORTED] for m in re.findall(r"(?<![\w/-])M\d{1,2}(?![\w-])",
                                                                  prose(path) if path in PAGES else path.read_text(encoding="utf-8"))}
    assert used and used <= defined


# ---------------------------------------------------------------- the table of tools/book.py

PICTURE = {"outputs": [{"data": {"image/png": ""}}]}
SMALL = {"cells": [{"cell_type": "markdown", "source": "four words of prose $x+y$ `code`"}, {"cell_type": "code", "source": "#| hide\nimport os"},
                   {"cell_type": "code", "source": "x = 1\ny = 2"}, {"cell_type": "code", "source": "assert x < y"} | PICTURE]}


@pytest.mark.parametrize("key, value",
                         [("cells", 4), ("words", 4), ("max", 2), ("pictures", 1), ("run_lines", 3), ("run_cells", 2), ("first_picture", 3), ("tests", 1 / 3)])
def test_numbers_of_a_notebook(key, value):
    assert book.row("small", SMALL)[key] == value


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_no_cell_is_longer_than_a_reader_can_hold(path):
    assert not {c.id: n for c in read(path).cells if c.cell_type == "code" and (n := len(re.sub(r"^#\|.*\n", "", c.source, flags=re.M).splitlines())) > 40}
