"""One command for all of results/voc: what it does, in which order, and what it leaves out. The steps themselves are tested elsewhere."""
import json
import subprocess
from pathlib import Path

import pytest
from adcam.pipeline import load_result
from adcam.scenes import write_voc
from conftest import ROOT, load_script

HERE = ROOT / "results/voc"


@pytest.fixture
def public(): return load_script(ROOT / "tools/voc_public.py")


@pytest.fixture
def photographs(tmp_path):
    write_voc(tmp_path / "voc", splits=("train", "val"), n=2, size=48)
    for name in ("cnn", "vit"): (tmp_path / f"{name}.safetensors").write_bytes(b"weights")
    return tmp_path


def words(top, *more):
    return ["--data", str(top / "voc"), "--cnn-weights", str(top / "cnn.safetensors"), "--vit-weights", str(top / "vit.safetensors"), "--lists", "val,train",
            "--work", str(top / "work"), "--out", str(top / "out"), *more]


def counts(folder):
    "Something that is named like counts"
    folder.mkdir()
    (folder / "frozen-val.npz").write_bytes(b"counts")
    return str(folder)


@pytest.fixture
def ran(public, photographs, monkeypatch):
    "Commands that were called; each makes the files of its step, `fail` names one that does not"
    called, fail = [], set()

    def run(command):
        a = public.options(words(photographs))
        name, step = next((n, s) for n, s in public.steps(a).items() if [str(w) for w in s.command] == command[1:])
        called.append(name)
        if name in fail: return subprocess.CompletedProcess(command, -9)
        for f in step.makes:
            f.parent.mkdir(parents=True, exist_ok=True)
            if not f.exists(): f.write_bytes(b"made")
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(public.subprocess, "run", run)
    return called, fail


def test_every_file_of_the_committed_results_has_a_step(public, photographs):
    a = public.options(words(photographs))
    there = {p.stem for p in HERE.glob("*.json")} - {"kit"}       # of `make voc`
    beside = dict(why="table3", baselines="table1")               # written by the same notebook
    assert {beside.get(n, n) for n in there} <= set(public.steps(a))


@pytest.mark.parametrize("path", sorted(p for p in HERE.glob("*.json") if p.stem != "kit"), ids=lambda p: p.stem)
def test_every_result_says_who_saw_what(path):
    told = json.loads(path.read_text())["ledger"]
    assert told and all(r["saw"] for r in told) and any("vit_small" in r["network"] for r in told)


def test_a_step_comes_after_those_it_reads_from(public, photographs):
    plan = public.steps(public.options(words(photographs)))
    assert all(list(plan).index(b) < list(plan).index(n) for n, s in plan.items() for b in s.after)


def test_committed_sizes_are_those_of_the_command(public, photographs):
    plan = {n: " ".join(map(str, s.command)) for n, s in public.steps(public.options(words(photographs))).items()}
    taken = {s["step"]: s["settings"] for s in load_result("table1", HERE)["steps"]}
    irn, seg, effort = taken["masks"], taken["segment"], load_result("baselines", HERE)["effort"]
    assert f"crop={irn['crop']},batch={irn['batch']},lr_edge={irn['lr_edge']} --irn-epochs {irn['epochs']}" in plan["masks"]
    assert f"crop={seg['crop']},batch={seg['batch']} --seg-iterations {seg['iterations']}" in plan["segment"]
    assert all(f"{n}={effort[n]}" in plan["baselines"] for n in ("advcam", "channels", "affinity"))
    assert f"--photographs {','.join(str(len(v)) for v in load_result('scales', HERE)['photographs'].values())}" in plan["scales"]


def test_counts_alone_give_tables_and_figures(public, tmp_path, capsys):
    assert public.main(["--counts", counts(tmp_path / "counts"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--list"]) == 0
    said = capsys.readouterr().out
    assert [n for n in ("table3", "fig4", "fig5", "fig6", "table1", "table2", "scales", "walks", "fig2_3") if f": {n}\n" in said] == ["table3", "fig4", "fig5", "fig6", "table1"]
    assert "photographs are needed for count, fig2_3, scales" in said


def test_what_is_there_is_not_made_again(public, photographs, ran, capsys):
    called, _ = ran
    assert public.main(words(photographs)) == 0
    assert called == list(public.steps(public.options(words(photographs))))
    assert public.main(words(photographs)) == 0
    assert len(called) == len(set(called)) and "of 14: table2 is there" in capsys.readouterr().out


def test_a_killed_step_is_called_again_and_no_other(public, photographs, ran, capsys):
    called, fail = ran
    fail.add("masks")
    assert public.main(words(photographs)) == 1 and "masks ended with exit code -9" in capsys.readouterr().err
    before, _ = list(called), fail.clear()
    assert public.main(words(photographs)) == 0
    assert called[len(before)] == "masks" and not set(before[:-1]) & set(called[len(before):])


def test_a_work_folder_of_other_weights_is_refused(public, photographs, capsys):
    public.options(words(photographs))
    (photographs / "cnn.safetensors").write_bytes(b"other weights")
    with pytest.raises(SystemExit) as stop: public.options(words(photographs))
    assert stop.value.code == 2 and "holds a run of other weights" in capsys.readouterr().err


def test_counts_that_changed_are_drawn_anew(public, photographs, ran):
    called, _ = ran
    public.main(words(photographs, "--only", "fig4"))
    (photographs / "work/counts/frozen-val.npz").write_bytes(b"counted with more photographs")
    public.main(words(photographs, "--only", "fig4"))
    assert called == ["count", "fig4", "fig4"]


@pytest.mark.parametrize("change, said", [(["--lists", "val,train_2007"], "grep ^2007_ train.txt"), (["--only", "tabel3"], "no such step; there are count"), (["--vit-weights", "nowhere"], "nowhere is not there"),
                                          (["--limit", "1"], "at least two photographs")])
def test_bad_input_is_one_line_and_two(public, photographs, capsys, change, said):
    with pytest.raises(SystemExit) as stop: public.main([*words(photographs), *change])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_trial_leaves_the_committed_results_alone(public, photographs, monkeypatch):
    monkeypatch.chdir(photographs)
    a = public.options([*words(photographs)[:-4], "--limit", "4"])
    assert a.out == Path("results/try/voc") and a.work != Path(".cache/voc")
