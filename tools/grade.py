"""Grade a folder of submissions of the course: python tools/grade.py FOLDER --out grades.csv

Every notebook below FOLDER is a submission. Each runs in a process of its own, in an empty folder, without a terminal, and each
of its cells has a time limit. A cell that hangs or kills its process is left out and the rest is graded. Check cells are not
trusted: the original checks are called with what the student has defined, and a check cell that was changed or removed is named.

Exit code: 0 if every submission was graded, 1 if one could not be read (it has a line in the table), 2 for a wrong call.
Students' code runs with your rights. Grade in a container or an account that holds nothing you would miss.
"""
import argparse
import ast
import csv
import importlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adcam.files import atomic_write
from course import COURSE, digest, lessons, read, source, student, tags

COLUMNS = ("submission", "lesson", "exercise", "result", "message", "remark")


# ---------------------------------------------------------------- what was handed out

def check_call(text: str) -> tuple[str, str]:
    "Name of the check that a cell calls, and the answer it is given: `if check_cam(cam): ...` -> check_cam, cam."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("check_"):
            return node.func.id, ast.unparse(node.args[0])
    raise ValueError("a cell tagged `check` calls no check")


def handed_out(path: Path) -> dict:
    "A lesson as students got it: its exercises in order, by the names of their checks, the ids of its cells, and its imports."
    module, cells, exercises, last = importlib.import_module(f"adcam.course.{path.stem}"), student(path)["cells"], {}, None
    for cell in cells:
        if "exercise" in tags(cell): last = cell
        if "check" not in tags(cell): continue
        check, answer = check_call(source(cell))
        exercises[check] = dict(number=getattr(module, check).number, check=check, answer=answer, cell=cell["id"], digest=digest(source(cell)), asks=last["id"])
    setup = next(source(c) for c in cells if c["cell_type"] == "code")
    return dict(lesson=path.stem, exercises=exercises, ids={c["id"] for c in cells}, setup=setup)


def find_lesson(cells: list[dict], known: list[dict]) -> dict:
    "Which lesson is this? The one whose cells or checks it shares most. `ValueError` if it shares none."
    ids, text = {c.get("id") for c in cells}, "\n".join(map(source, cells))
    shared = [len(ids & k["ids"]) + 10 * sum(check in text for check in k["exercises"]) for k in known]
    if not max(shared): raise ValueError("this is no lesson of the course: none of its cells or checks is known")
    return known[shared.index(max(shared))]


# ---------------------------------------------------------------- what was handed in

def plan(cells: list[dict], lesson: dict) -> tuple[list[dict], dict[str, str]]:
    "Steps to run in order, code or check, and a remark for each check whose cell is not as it was."
    steps, remarks, open_ = [], {}, dict(lesson["exercises"])
    by_id = {e["cell"]: e for e in open_.values()}
    for cell in (c for c in cells if c.get("cell_type") == "code"):
        text = source(cell)
        exercise = by_id.get(cell.get("id")) or next((e for e in open_.values() if e["check"] + "(" in text and "def " + e["check"] not in text), None)
        if exercise is None or exercise["check"] not in open_:
            steps.append(dict(kind="code", source=text, id=cell.get("id", "")))
            continue
        del open_[exercise["check"]]
        if digest(text) != exercise["digest"]: remarks[exercise["check"]] = "check cell was changed; the original was used"
        steps.append(dict(kind="check", **exercise))
    for exercise in open_.values():
        remarks[exercise["check"]] = "check cell was removed; the original was used"
        steps.append(dict(kind="check", **exercise))
    last = max((i for i, s in enumerate(steps) if s["kind"] == "check"), default=-1)
    return steps[:last + 1], remarks


def run_steps(steps: list[dict], lesson: dict, limit: float, total: float, memory: float) -> list[dict]:
    "What became of each step. A step at which the process hangs or dies is skipped in the next process."
    skipped, until, over = {}, time.monotonic() + total, dict(result="time", message="the time for this submission was over")
    while True:
        todo = [dict(s, kind="skip") if i in skipped else s for i, s in enumerate(steps)]
        found, stopped = one_process(todo, lesson, limit, until, memory)
        if stopped: skipped[stopped[0]] = stopped[1]
        if not stopped or time.monotonic() > until: return [skipped.get(i) or found.get(i) or over for i in range(len(steps))]


def one_process(steps: list[dict], lesson: dict, limit: float, until: float, memory: float):
    "Run steps in a fresh process: {step: finding}, and (step, finding) where it hung or died."
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as empty:
        Path(empty, "plan.json").write_text(json.dumps(dict(steps=steps, lesson=lesson["lesson"], setup=lesson["setup"], memory=memory)))
        env = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "IPYTHONDIR": empty, "ADCAM_RESULTS": os.environ.get("ADCAM_RESULTS", str(COURSE.parent.parent / "results")),
               "PYTHONPATH": os.pathsep.join([str(COURSE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
        child = subprocess.Popen([sys.executable, __file__, "--run", str(writer)], cwd=empty, env=env, pass_fds=[writer], start_new_session=True,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(writer)
        try: return listen(reader, child, len(steps), limit, until)
        finally:
            os.close(reader)
            try: os.killpg(child.pid, signal.SIGKILL)  # its own children, too
            except ProcessLookupError: pass
            child.wait()


START = 300  # seconds that Python and PyTorch may take to start on a busy machine

def listen(reader: int, child, n: int, limit: float, until: float):
    "Read a line of JSON at the start and for each finished step, and watch the clock."
    lines, rest, deadline = [], b"", time.monotonic() + START
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while len(lines) <= n:
            wait = (min(deadline, until) if lines else deadline) - time.monotonic()
            data = os.read(reader, 65536) if wait > 0 and selector.select(wait) else None
            if data is None or not data: break
            *new, rest = (rest + data).split(b"\n")
            lines += map(json.loads, new)
            deadline = time.monotonic() + limit
    found = dict(enumerate(lines[1:]))
    if len(found) == n: return found, None
    if not lines: raise OSError("the process of a submission does not start: does `python -c 'import adcam.course.lesson1, IPython'` work?")
    if data is None: return found, (len(found), dict(result="time", message=f"no end after {limit:.0f} seconds: an endless loop?" if time.monotonic() >= deadline else "the time for this submission was over"))
    return found, (len(found), dict(result="died", message=f"the process ended here with code {child.wait()}: out of memory, or an exit in the code?"))


# ---------------------------------------------------------------- inside of the process

def child(fd: int) -> None:
    "Run the steps of plan.json and write a line of JSON for each to `fd`."
    work = json.loads(Path("plan.json").read_text())
    try:
        import resource
        most = int(work["memory"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (ImportError, ValueError, OSError): pass  # no such limit on this system
    from IPython.core.interactiveshell import InteractiveShell
    shell, module = InteractiveShell.instance(), importlib.import_module(f"adcam.course.{work['lesson']}")
    originals = {n: getattr(module, n) for n in module.__all__}
    shell.run_cell(work["setup"])  # imports take time that is not the student's
    os.write(fd, b"{}\n")          # ready
    for step in work["steps"]: os.write(fd, json.dumps(do(step, shell, originals)).encode() + b"\n")


def do(step: dict, shell, originals: dict) -> dict:
    "One step: run a cell, or call an original check with the student's answer."
    if step["kind"] == "skip": return dict(result="skipped", message="")
    if step["kind"] == "code":
        got = shell.run_cell(step["source"])
        error = got.error_before_exec or got.error_in_exec
        return dict(result="error" if error else "ran", message=in_words(error) if error else "")
    check = originals[step["check"]]
    try: answer = eval(step["answer"], shell.user_ns)
    except BaseException: return dict(result="missing", message=f"`{step['answer']}` is not defined")
    try: got = check.judge(answer)
    except BaseException as e: return dict(result="stopped", message=in_words(e))
    return dict(result=got.state, message=" ".join(got.message.split()))


def in_words(error: BaseException) -> str:
    line = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
    return f"{type(error).__name__}: {' '.join(str(error.msg if line else error).split())[:200]}{line}"


# ---------------------------------------------------------------- the table

def grade(path: Path, name: str, known: list[dict], limit: float, total: float, memory: float) -> list[dict]:
    "One submission: a row for each exercise, or one that says why it could not be read."
    row = dict.fromkeys(COLUMNS, "") | dict(submission=name)
    try:
        cells = read(path)["cells"]
        if not all(isinstance(c, dict) and isinstance(c.get("source", ""), (str, list)) for c in cells): raise ValueError(f"{path.name} is no notebook: its cells are damaged")
        lesson = find_lesson(cells, known)
    except (ValueError, OSError) as e: return [row | dict(result="unreadable", message=str(e))]
    steps, remarks = plan(cells, lesson)
    found = run_steps(steps, lesson, limit, total, memory)
    cell = {s["id"]: f for s, f in zip(steps, found) if s["kind"] == "code"}
    rows = []
    for step, got in ((s, f) for s, f in zip(steps, found) if s["kind"] == "check"):
        asked = cell.get(step["asks"], {})
        if got["result"] == "missing":  # say why, if its cell failed
            if asked.get("result") in ("error", "time", "died"): got = dict(got, result=asked["result"], message=asked["message"])
            elif not asked: got = dict(got, message=f"{got['message']}: the cell of the exercise was removed")
        rows.append(row | dict(lesson=lesson["lesson"], exercise=step["number"], result=got["result"], message=got["message"], remark=remarks.get(step["check"], "")))
    return sorted(rows, key=lambda r: r["exercise"])


def submissions(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def table(rows: list[dict]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(argv=None) -> int:
    if argv is None and sys.argv[1:2] == ["--run"]:
        child(int(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="every .ipynb below it is a submission")
    parser.add_argument("--out", type=Path, help="CSV with a row for each submission and exercise; without it the table is printed")
    parser.add_argument("--cell-seconds", type=float, default=60, help="limit for a cell (default 60)")
    parser.add_argument("--seconds", type=float, default=600, help="limit for a submission (default 600)")
    parser.add_argument("--memory", type=float, default=8, help="limit of a process in GiB, where the system knows one (default 8)")
    parser.add_argument("--jobs", type=int, default=2, help="submissions at a time (default 2)")
    args = parser.parse_args(argv)
    for name in ("cell_seconds", "seconds", "memory", "jobs"):
        if not getattr(args, name) > 0: parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not args.folder.is_dir(): parser.error(f"{args.folder} is no folder: name the one that holds the submissions")
    files = submissions(args.folder)
    if not files: parser.error(f"{args.folder} holds no .ipynb file")
    known = [handed_out(p) for p in lessons()]
    def one(p):
        rows = grade(p, p.relative_to(args.folder).as_posix(), known, args.cell_seconds, args.seconds, args.memory)
        count = Counter(r["result"] for r in rows)
        print(f"{rows[0]['submission']}: " + (rows[0]["message"] if count["unreadable"] else f"{rows[0]['lesson']}, {count['right']} of {len(rows)} right"), file=sys.stderr)
        return rows
    try:
        with ThreadPoolExecutor(args.jobs) as pool: rows = [r for rows in pool.map(one, files) for r in rows]
    except OSError as e: parser.error(str(e))
    if args.out: atomic_write(args.out, lambda to: to.write(table(rows).encode()))
    else: print(table(rows), end="")
    return int(any(r["result"] == "unreadable" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
