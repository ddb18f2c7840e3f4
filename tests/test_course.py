"""The course: solutions pass, blanks are called empty, wrong answers are refused in words, submissions are graded."""
import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import course  # noqa: E402
import grade  # noqa: E402

LESSONS = course.lessons()
STUDENTS = [course.COURSE / "student" / p.name for p in LESSONS]

# Runs notebooks one after the other, each in a fresh namespace; prints {file: [[cell, error, [[exercise, state, message]]]]}.
RUN = """
import contextlib, io, json, os, sys
from IPython.core.interactiveshell import InteractiveShell
from adcam.course import checks
told = {}
for path in sys.argv[1:]:
    shell, told[path] = InteractiveShell(), []
    shell.run_cell("import matplotlib; matplotlib.use('agg')\\nfrom IPython.display import display")
    for cell in json.load(open(path))["cells"]:
        if cell["cell_type"] != "code": continue
        checks.outcomes.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            got = shell.run_cell("".join(cell["source"]))
        error = got.error_before_exec or got.error_in_exec
        told[path].append([cell["id"], repr(error) if error else "", [list(o) for o in checks.outcomes]])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def runs():
    "Every lesson and every student's version from the first cell to the last, in two processes side by side."
    started = [subprocess.Popen([sys.executable, "-c", RUN, *map(str, paths)], cwd=ROOT, env={**os.environ, "IN_TEST": "1"}, stdout=subprocess.PIPE,
                                text=True) for paths in ([course.COURSE / "checks.ipynb", *LESSONS], STUDENTS)]
    outputs = [p.communicate()[0] for p in started]
    assert not any(p.returncode for p in started)
    return {path: cells for out in outputs for path, cells in json.loads(out).items()}


def code(path, tag=None):
    return [course.source(c) for c in course.read(path)["cells"] if c["cell_type"] == "code" and (tag is None or tag in course.tags(c))]


def checks_of(path):
    import importlib
    module = importlib.import_module(f"adcam.course.{path.stem}")
    return {n: getattr(module, n) for n in module.__all__ if n.startswith("check_")}


# ---------------------------------------------------------------- lessons

def test_the_notebook_of_the_checks_runs(runs):
    assert [c for c in runs[str(course.COURSE / "checks.ipynb")] if c[1]] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_solutions_pass_and_wrong_answers_are_refused(path, runs):
    cells = runs[str(path)]
    assert [c for c in cells if c[1]] == [], "a wrong answer that is not refused raises here, too"
    outcomes = [o for _, _, found in cells for o in found]
    assert [o[0] for o in outcomes] == [c.number for c in checks_of(path).values()]
    assert {o[1] for o in outcomes} == {"right"}


@pytest.mark.parametrize("path", STUDENTS, ids=lambda p: p.stem)
def test_students_version_is_empty_and_raises_nothing(path, runs):
    cells = runs[str(path)]
    assert [c for c in cells if c[1]] == []
    outcomes = [o for _, _, found in cells for o in found]
    assert [o[0] for o in outcomes] == [c.number for c in checks_of(path).values()]
    assert [o for o in outcomes if o[1] != "empty" or not o[2].startswith("still empty: replace every `...` in ")] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_every_exercise_keeps_two_wrong_answers(path):
    calls = [n for text in code(path, "wrong") for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "caught"]
    kept = Counter(n.args[0].id for n in calls)
    assert set(kept) == set(checks_of(path)) and min(kept.values()) >= 2


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_has_its_parts(path):
    cells = course.read(path)["cells"]
    text = "\n".join(course.source(c) for c in cells if c["cell_type"] == "markdown")
    for part in ("**After these 45 minutes you can**", "**You need**", "## Open question", "## Quiz", "## A project for two weeks"):
        assert text.count(part) == 1
    assert sum(int(m) for m in re.findall(r"^\| (\d+) \|", text, re.M)) == 45
    assert 3 <= len(checks_of(path)) <= 6
    assert text.count("<details><summary>Answer</summary>") == len(re.findall(r"^\*\*\d\.\*\*", text, re.M)) >= 4


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_picture_stands_before_the_first_exercise(path):
    cells = course.read(path)["cells"]
    first = next(i for i, c in enumerate(cells) if "exercise" in course.tags(c))
    assert any("image/png" in o.get("data", {}) for c in cells[:first] for o in c.get("outputs", []))


@pytest.mark.parametrize("path", STUDENTS, ids=lambda p: p.stem)
def test_the_library_answers_no_exercise_before_it_is_asked(path):
    used = set()
    for cell in (c for c in course.read(path)["cells"] if c["cell_type"] == "code"):
        text = course.source(cell)
        for check in (checks_of(path)[n] for n in re.findall(r"\bcheck_\w+(?=\()", text) if "check" in course.tags(cell)):
            early = used & set(check.instead)
            assert not early, f"{check.number} asks for what {early} does"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom): used |= {a.name for a in node.names}
            if isinstance(node, ast.Attribute): used.add(node.attr)


# ---------------------------------------------------------------- students' versions

def test_students_versions_are_up_to_date():
    assert course.build(check=True) == 0, "run `make course` and commit"


@pytest.mark.parametrize("path", STUDENTS, ids=lambda p: p.stem)
def test_students_version_gives_nothing_away(path):
    text = "\n".join(code(path))
    assert "# solution" not in text and "caught(" not in text and "#|" not in text
    assert "# your code" in text and not any(c.get("outputs") for c in course.read(path)["cells"])


def test_solution_becomes_a_blank():
    text = "def f(x):\n    # solution: a = ... | b = ...\n    a = x\n\n    b = a\n    # end\n    return a, b"
    assert course.blanked(text) == "def f(x):\n    a = ...  # your code\n    b = ...  # your code\n    return a, b"


@pytest.mark.parametrize("text", ["# solution: x = ...\nx = 1", "x = 1\n# end", "    # solution: x = ...\n    x = 1\n# end"])
def test_a_marker_without_its_partner_is_named(text):
    with pytest.raises(ValueError, match="lesson9.ipynb, cell abc: .* must come in pairs"): course.blanked(text, "lesson9.ipynb, cell abc")


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "a.ipynb").write_text("\ufeff" + STUDENTS[0].read_text(encoding="utf-8"), encoding="utf-8")
    assert course.read(tmp_path / "a.ipynb") == course.read(STUDENTS[0])


def test_a_removed_lesson_leaves_no_version_behind(tmp_path, monkeypatch):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "lesson7.ipynb").write_text("{}")
    monkeypatch.setattr(course, "COURSE", tmp_path)
    assert course.build(check=True) == 1 and course.build() == 0
    assert not list((tmp_path / "student").iterdir())


# ---------------------------------------------------------------- grading

def answered(path, **changes):
    "A student's version with answers: source by the name of a function or a check."
    nb = json.loads(json.dumps(course.read(path)))
    for cell in nb["cells"]:
        text = course.source(cell)
        for name, new in changes.items():
            if f"def {name}(" in text or ("check" in course.tags(cell) and name.startswith("check_") and f"{name}(" in text): cell["source"] = new
    return nb


def solved(number):
    "The student's version with the cells of the solution."
    nb, right = course.read(STUDENTS[number - 1]), {c["id"]: c for c in course.read(LESSONS[number - 1])["cells"]}
    for cell in nb["cells"]:
        if "exercise" in course.tags(cell): cell["source"] = right[cell["id"]]["source"]
    return nb


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    "{(submission, exercise): row} and the exit code, for a folder of good and bad submissions."
    folder = tmp_path_factory.mktemp("submissions")
    files = {"anna/good.ipynb": solved(2), "bad.ipynb": answered(
        STUDENTS[1], one_matrix="def one_matrix(attn):\n    while True:\n        try: pass\n        except: pass",
        similarity="def similarity(A): return A[0] / 0",
        refined="def refined(A, S, k)\n    return A", push="def push(m, A, T): return A", pull="import os\nos._exit(3)"),
        "cheat.ipynb": answered(STUDENTS[1], one_matrix="def one_matrix(attn): return attn[0]\ncheck_one_matrix = print",
                                check_similarity="print('right')", similarity="raise KeyError('x')")}
    del files["cheat.ipynb"]["cells"][next(i for i, c in enumerate(files["cheat.ipynb"]["cells"]) if "check_push(" in course.source(c)
                                           and "check" in course.tags(c))]
    for name, nb in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(nb))
    (folder / "torn.ipynb").write_text('{"cells": [')
    (folder / "empty.ipynb").write_text("")
    (folder / "old.ipynb").write_text('{"nbformat": 3, "worksheets": []}')
    (folder / "other.ipynb").write_text((ROOT / "nbs/scaling.ipynb").read_text())
    rc = grade.main([str(folder), "--out", str(folder / "grades.csv"), "--cell-seconds", "10"])
    rows = list(csv.DictReader(io.StringIO((folder / "grades.csv").read_text())))
    assert len(rows) == len({(r["submission"], r["exercise"]) for r in rows})
    return {(r["submission"], r["exercise"]): r for r in rows}, rc


def test_a_right_submission_is_right(graded):
    rows = [r for (name, _), r in graded[0].items() if name == "anna/good.ipynb"]
    assert [(r["exercise"], r["result"], r["remark"]) for r in rows] == [(f"2.{i}", "right", "") for i in range(1, 6)]


@pytest.mark.parametrize("exercise, result, message", [
    ("2.1", "time", "an endless loop?"), ("2.2", "wrong", "the shape is (6,), but (6, 6) is expected"), ("2.3", "error", "SyntaxError: expected ':' (line 1)"),
    ("2.4", "wrong", "the shape is (5, 5), but (5,) is expected"), ("2.5", "died", "the process ended here with code 3")])
def test_each_fault_has_its_line_and_the_rest_is_graded(graded, exercise, result, message):
    row = graded[0]["bad.ipynb", exercise]
    assert row["result"] == result and message in row["message"]


@pytest.mark.parametrize("exercise, result, remark", [
    ("2.1", "wrong", ""), ("2.2", "error", "check cell was changed; the original was used"), ("2.3", "empty", ""),
    ("2.4", "empty", "check cell was removed; the original was used")])
def test_checks_of_a_submission_are_not_trusted(graded, exercise, result, remark):
    row = graded[0]["cheat.ipynb", exercise]
    assert (row["result"], row["remark"]) == (result, remark)


@pytest.mark.parametrize("name, message", [
    ("torn.ipynb", "torn.ipynb is no notebook, its text is no JSON"), ("other.ipynb", "no lesson of the course"), ("empty.ipynb", "empty.ipynb is empty"), ("old.ipynb", "before 2015")])
def test_what_cannot_be_read_is_named_and_reported(graded, name, message):
    rows, rc = graded
    assert rc == 1 and rows[name, ""]["result"] == "unreadable" and message in rows[name, ""]["message"]


@pytest.mark.parametrize("arguments, says",
                         [(["nowhere"], "nowhere is no folder"), (["."], "holds no .ipynb file"), ([".", "--cell-seconds", "0"], "must be above 0")])
def test_a_wrong_call_ends_with_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"): grade.main(arguments)
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- slides

@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    "Slides, with empty files in place of the two packages."
    folder = tmp_path_factory.mktemp("slides")
    for name in ("reveal/dist/reveal.js", "reveal/dist/theme/simple.css", "reveal/plugin/notes/notes.js", "mathjax/es5/tex-chtml-full.js"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("@import url(https://fonts.example.org/css?family=Lato:400,700);\nbody { color: #222 }\n" if name.endswith("css") else "")
    assert course.slides(folder / "out", folder / "reveal", folder / "mathjax") == 0
    assert (folder / "out/reveal.js/dist/theme/simple.css").read_text() == "\nbody { color: #222 }\n"  # no font from elsewhere
    return {p.stem: p.read_text() for p in (folder / "out").glob("*.html")}


def test_every_lesson_has_slides(decks):
    assert sorted(decks) == [p.stem for p in LESSONS]


def test_slides_load_nothing_from_the_network(decks):
    for html in decks.values():
        loaded = re.findall(r"""(?:<script[^>]*\bsrc|<link[^>]*\bhref|@import|\bimport\b[^;\n]*from|\bimport\()\W*["'](?:https?:)?//[^"']+""", html)
        assert not loaded


def test_slides_hide_solutions(decks):
    for html in decks.values(): assert "# solution" not in html and "caught" not in html


def test_slides_say_which_package_is_missing(tmp_path, capsys):
    assert course.slides(tmp_path / "out", tmp_path, tmp_path) == 2
    assert "npm pack reveal.js@4" in capsys.readouterr().err
