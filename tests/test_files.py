"adcam.files and the processes of the stages: whole files, locks, litter of killed runs, children that follow their parent"
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest

from adcam import files
from adcam.files import (Account, FolderInUse, WorkerDied, at_work, atomic_write, claimed, dead_workers_in_words, one_at_a_time, read_json,
                         read_reports, sweep, why_left_out, write_report)


def ended_process():
    "The number of a process that is no more."
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def started(code, *words):
    "Python in a process of its own, ready when it has printed a line."
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    child.stdout.readline()
    return child


# ---- one file

def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    assert atomic_write(tmp_path / ("é" * 125 + ".png"), lambda f: f.write(b"x")).read_bytes() == b"x"


def test_two_threads_may_write_one_file(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    texts = [bytes([65 + i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda t: atomic_write(tmp_path / "a", lambda f: f.write(t)), texts))
    assert (tmp_path / "a").read_bytes() in texts and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_old_names_still_lead_here():
    from adcam.scenes import atomic_write as old
    assert old is atomic_write


# ---- litter

def test_a_kill_in_the_middle_of_a_write_leaves_litter_that_the_next_run_sweeps(tmp_path):
    code = "import sys, time; from pathlib import Path; from adcam.files import atomic_write\n" \
           "atomic_write(Path(sys.argv[1])/'a.npz', lambda f: (f.write(b'half'), print('writing', flush=True), time.sleep(60)))"
    child = started(code, tmp_path)
    child.kill(); child.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp") and not (tmp_path / "a.npz").exists()
    with at_work(tmp_path): assert not left.exists()


@pytest.mark.parametrize("name, age, goes", [
    (".a.npz.{host}.{dead}-3.tmp", 0, True), (".a.npz.{host}.{mine}-3.tmp", 99_999, False), (".a.npz.elsewhere.1-3.tmp", 60, False),
    (".a.npz.elsewhere.1-3.tmp", 99_999, True),
    (".a.npz.{dead}.tmp", 99_999, True), ("a.tmp", 99_999, False), (".hidden", 99_999, False), (".a.{host}.{dead}-1.tmp.png", 99_999, False)])
def test_only_litter_of_dead_processes_is_swept(tmp_path, name, age, goes):
    path = tmp_path / name.format(host=files.HOST, dead=ended_process(), mine=os.getpid())
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    assert bool(sweep(tmp_path)) == goes == (not path.exists())


# ---- one run at a time

HOLD = "import sys, time; from adcam.files import at_work\nwith at_work(sys.argv[1]): print('in', flush=True); time.sleep(60)"


def test_a_second_run_hears_of_the_first_and_a_killed_one_is_no_obstacle(tmp_path):
    child = started(HOLD, tmp_path)
    with pytest.raises(FolderInUse, match=f"process {child.pid} on {files.HOST}.*Wait for it, or choose another folder"): at_work(tmp_path).__enter__()
    child.kill(); child.wait()
    with at_work(tmp_path): pass
    assert not list(tmp_path.iterdir())


def test_waiting_for_the_other_run(tmp_path):
    child = started(HOLD.replace("60", ".6"), tmp_path)
    with at_work(tmp_path, wait=20): assert child.wait() == 0


@pytest.mark.parametrize("note, free", [
    (dict(host="{host}", pid=1, started=0.), True), ({}, True), ("torn", True), (dict(host="elsewhere", pid=1), False), (dict(host="{host}", pid="x"), True)])
def test_stale_notes_are_recognized(tmp_path, note, free):
    "A number that another process has now; nothing; a torn file; a live run on another machine; nonsense"
    path = tmp_path / ".run.lock"
    path.write_text((note if isinstance(note, str) else json.dumps(note)).replace("{host}", files.HOST))
    if not isinstance(note, dict) or "host" not in note or note["pid"] == "x": os.utime(path, (time.time() - 10,) * 2)
    if free:
        with at_work(tmp_path): pass
    else:
        with pytest.raises(FolderInUse, match="elsewhere"): at_work(tmp_path).__enter__()
        os.utime(path, (time.time() - 1000,) * 2)      # silent for long
        with at_work(tmp_path): pass


def test_other_processes_of_one_training_share_its_folder(tmp_path, monkeypatch):
    @one_at_a_time()
    def train(out): return True
    with at_work(tmp_path):
        with pytest.raises(FolderInUse): train(tmp_path)
        monkeypatch.setenv("RANK", "1")
        assert train(tmp_path)


def test_the_same_command_twice(tmp_path, capsys):
    "While one run is at work the same command says so in one line, exit code 2"
    from adcam.cli import main
    with at_work(tmp_path / "s"):
        with pytest.raises(SystemExit) as stop: main(["seeds", "--out", str(tmp_path / "s"), "--n", "2", "--method", "cam"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and f"in use: process {os.getpid()}" in said and len(said.splitlines()) == 1


# ---- settings

def test_force_is_refused_while_another_run_works_by_the_old_settings(tmp_path):
    with claimed(tmp_path, dict(k=1), "*.npz", shard=(1, 2)):
        (tmp_path / "b.npz").touch()
        with pytest.raises(FolderInUse): claimed(tmp_path, dict(k=2), "*.npz", shard=(0, 2), force=True).__enter__()
        assert (tmp_path / "b.npz").exists()
    with claimed(tmp_path, dict(k=2), "*.npz", shard=(0, 2), force=True): assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "[" * 9999])
def test_damaged_settings_are_other_settings(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    (tmp_path / "a.npz").touch()
    with pytest.raises(ValueError, match="unreadable there|other settings"): claimed(tmp_path, dict(k=1), "*.npz").__enter__()
    with claimed(tmp_path, dict(k=1), "*.npz", force=True): pass
    assert json.loads((tmp_path / "settings.json").read_text()) == dict(k=1)


def test_settings_of_a_run_that_made_no_file_bind_nobody(tmp_path):
    "A wrong option, all images refused: the next try with a right one needs no --force, and no old report stays"
    with pytest.raises(ValueError), claimed(tmp_path, dict(k=0), "*.npz"): write_report(tmp_path, (0, 1), [("a", "k is 0")]); raise ValueError
    with claimed(tmp_path, dict(k=1), "*.npz", shard=(0, 2)): (tmp_path / "a.npz").touch()
    assert read_json(tmp_path / "settings.json") == dict(k=1) and read_reports(tmp_path) == ({}, set())
    with pytest.raises(ValueError, match="made with other settings"): claimed(tmp_path, dict(k=2), "*.npz").__enter__()


def test_files_put_aside_bind_a_run_without_force(tmp_path):
    "Killed after --force, before its first file: another run must not throw the old ones away"
    with claimed(tmp_path, dict(k=1), "*.npz"): (tmp_path / "a.npz").write_text("old")
    with pytest.raises(ValueError), claimed(tmp_path, dict(k=2), "*.npz", shard=(0, 2), force=True): raise ValueError
    with pytest.raises(ValueError, match="made with other settings"): claimed(tmp_path, dict(k=3), "*.npz").__enter__()


def test_reports_of_several_processes_are_one_account(tmp_path):
    write_report(tmp_path, (0, 2), [("a", "torn")]); write_report(tmp_path, (1, 2), [], ["b"])
    assert read_reports(tmp_path) == ({"a": "torn"}, {"b"})
    (tmp_path / "skipped-1-of-2.json").write_text('{"skipped": 7}')
    with pytest.raises(ValueError, match="no report of skipped images"): read_reports(tmp_path)


def test_if_no_image_at_all_can_be_done_the_run_stops_early():
    account = Account()
    with pytest.raises(ValueError, match="image im00: no room .*all 20 images"):
        for i in range(1000): account.add(f"im{i:02d}", "no room for k")
    with pytest.raises(OSError, match="full"): why_left_out(OSError(28, "disk full"))


# ---- children

RUN = """
import sys
from pathlib import Path
from joblib import Parallel, delayed
import busy
from adcam.files import dead_workers_in_words, follow_parent
if __name__ == "__main__":
    with dead_workers_in_words(), Parallel(2, return_as="generator_unordered", initializer=follow_parent) as pool:
        for _ in pool(delayed(busy.work)(Path(sys.argv[1])) for i in range(4)): pass
"""
BUSY = """
import os, time
def work(out):
    (out / f"at-work-{os.getpid()}").touch()
    time.sleep(120)
"""


def workers_of(out, n=2):
    "The processes that have begun to work."
    for _ in range(600):
        found = list(out.glob("at-work-*"))
        if len(found) == n: return [psutil.Process(int(f.name.split("-")[-1])) for f in found]
        time.sleep(.1)
    raise AssertionError("the workers did not start")


@pytest.fixture
def parent(tmp_path):
    "A run with two workers, each busy for minutes, started as those of labels, masks and conversions are."
    (tmp_path / "busy.py").write_text(BUSY); (tmp_path / "run.py").write_text(RUN)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
    yield run
    if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)


def test_no_worker_outlives_a_killed_parent(parent, tmp_path):
    workers = workers_of(tmp_path)
    parent.kill(); parent.wait()
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_a_killed_worker_is_one_sentence(parent, tmp_path):
    workers_of(tmp_path)[0].kill()
    _, said = parent.communicate(timeout=60)
    assert said.strip().splitlines()[-1].startswith("adcam.files.WorkerDied: a worker process was killed (often: out of memory; try fewer processes")


@pytest.mark.parametrize("module, call", [
    ("folders", lambda m: m.all_images([0, 1], lambda i: (i,), print, 2, print)), ("sources", lambda m: m._convert(print, [("a",), ("b",)], 2, "", False))])
def test_workers_of_every_stage_follow_their_parent(monkeypatch, module, call):
    import importlib
    found, module = {}, importlib.import_module(f"adcam.{module}")
    class Stop(Exception): pass
    def pool(*args, **options): found.update(options); raise Stop
    monkeypatch.setattr(*((module, "Parallel") if hasattr(module, "Parallel") else (module.joblib, "Parallel")), pool)
    with pytest.raises(Stop): call(module)
    assert found["initializer"] is files.follow_parent


def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    words = [sys.executable, "-m", "adcam.cli", "seeds", "--out", str(tmp_path / "s"), "--processes", "2", "--method", "cam"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell that runs the tests in the background ignores it
    try:
        for _ in range(1200):
            if any((tmp_path / "s").glob("*.npz")): break
            time.sleep(.1)
        workers = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does it: to all processes of the group
        _, said = run.communicate(timeout=60)
    finally:
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130 and said.strip().endswith("adcam: stopped. Finished files are kept; the same command continues") and "Traceback" not in said
    assert not psutil.wait_procs(workers, timeout=10)[1] and not sweep(tmp_path / "s")


def test_the_command_line_says_it_in_one_line(monkeypatch, capsys):
    import adcam.sources
    from adcam.cli import main
    def dies(*a, **k):
        with dead_workers_in_words(): raise BrokenProcessPool("A process in the process pool was terminated abruptly")
    monkeypatch.setattr(adcam.sources, "check_tree", dies)
    with pytest.raises(SystemExit) as stop: main(["data", "check", "folder", "."])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert issubclass(WorkerDied, RuntimeError)


def test_force_that_fails_before_its_first_file_gives_the_old_ones_back(tmp_path):
    with claimed(tmp_path, dict(k=1), "*.npz"): (tmp_path / "a.npz").write_text("old")
    with pytest.raises(ValueError), claimed(tmp_path, dict(k=0), "*.npz", force=True): raise ValueError("k=0")
    assert (tmp_path / "a.npz").read_text() == "old" and read_json(tmp_path / "settings.json") == dict(k=1)
    assert not list(tmp_path.glob(".replaced"))


def test_force_that_fails_after_its_first_file_keeps_the_new_settings(tmp_path):
    with claimed(tmp_path, dict(k=1), "*.npz"): (tmp_path / "a.npz").write_text("old")
    with pytest.raises(ValueError), claimed(tmp_path, dict(k=2), "*.npz", force=True):
        (tmp_path / "b.npz").write_text("new")
        raise ValueError("the disk is full")
    assert [p.name for p in tmp_path.glob("*.npz")] == ["b.npz"] and read_json(tmp_path / "settings.json") == dict(k=2)


def test_a_second_force_after_a_kill_still_gives_the_first_files_back(tmp_path):
    with claimed(tmp_path, dict(k=1), "*.npz"): (tmp_path / "a.npz").write_text("old")
    killed = claimed(tmp_path, dict(k=2), "*.npz", shard=(0, 2), force=True)  # of several processes, which give nothing back
    with pytest.raises(ValueError), killed: raise ValueError
    with pytest.raises(ValueError), claimed(tmp_path, dict(k=0), "*.npz", force=True): raise ValueError("k=0")
    assert (tmp_path / "a.npz").read_text() == "old" and read_json(tmp_path / "settings.json") == dict(k=1)
