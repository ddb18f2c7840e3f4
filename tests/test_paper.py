"The paper's notebooks: every one runs at smoke size, refuses a misspelt parameter, and its committed results agree with themselves"
import csv, json, os, re, subprocess, sys
from pathlib import Path
import nbformat
import papermill
import pytest
import torch
from adcam.classifier import save_weights
from adcam.conformer import conformer_mini
from adcam.pipeline import Point, checkpoint_path, load_result, summarize, to_csv
from adcam.scenes import write_voc

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs" / "paper").glob("*.ipynb"))
NAMES = [p.stem for p in NOTEBOOKS]
RESULTS = ROOT / "results" / "mini"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "The shipped checkpoints; untrained ones before any are shipped"
    try: return str(checkpoint_path(0).parent)
    except FileNotFoundError:
        folder = tmp_path_factory.mktemp("weights")
        torch.manual_seed(0)
        for kind in ("sg", "coupled"): save_weights(conformer_mini(), folder / f"mini_{kind}_seed0.safetensors", torch.float16)
        return str(folder)


def _papermill(notebook, out, *args, cache):
    env = dict(os.environ, ADCAM_CACHE=str(cache), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", "--execution-timeout", "900", str(notebook), str(out), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=out.parent)


def test_there_are_notebooks(): assert {"coco", "fig1", "fig2_3", "fig4", "fig5", "fig6", "table1", "table2", "table3", "theorem41", "photos"} <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_form(path):
    cells = nbformat.read(path, 4).cells
    assert re.fullmatch(r"# [^\n]+\n\n?> [^\n]+", cells[0].source), "the first cell is a title and one promise"
    tagged = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged `parameters`"
    assert "check_parameters(globals()" in cells[tagged[0] + 1].source, "the check comes right behind it"
    declared = re.findall(r"^(\w+):", cells[tagged[0]].source, re.M)
    seen = papermill.inspect_notebook(str(path))
    assert list(seen) == declared and all(p["help"] for p in seen.values()), "papermill must understand every line (no = in a comment) and find its help text"
    assert "footer(origin)" in cells[-1].source, "the last cell prints the provenance"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs_at_smoke_size(path, tmp_path, weights):
    out = tmp_path / "out"
    shipped = ["-p", "checkpoints", weights] if "checkpoints" in papermill.inspect_notebook(str(path)) else []  # photos takes weights of timm
    run = _papermill(path, tmp_path / "run.ipynb", "-p", "out_dir", str(out), *shipped, cache=tmp_path / "cache")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Passed unknown parameter" not in run.stderr
    result = load_result(path.stem, out)
    assert result["rows"] and result["provenance"]["settings"]["out_dir"] == str(out)
    assert result["provenance"]["checkpoints"] or not shipped
    assert list(out.glob("*.png"))


def test_misspelt_parameter_fails(tmp_path, weights):
    run = _papermill(ROOT / "nbs" / "paper" / "theorem41.ipynb", tmp_path / "run.ipynb", "-p", "trails", "5", cache=tmp_path)
    assert run.returncode != 0
    assert "unknown parameter 'trails', did you mean 'trials'?" in run.stderr


def test_impossible_parameter_fails(tmp_path):
    run = _papermill(ROOT / "nbs" / "paper" / "fig5.ipynb", tmp_path / "run.ipynb", "-p", "direction", "pusch", cache=tmp_path)
    assert run.returncode != 0 and "choose one of 'pull', 'push'" in run.stderr


def test_fig4_on_a_folder_of_photographs(tmp_path, weights):
    "The path of `-p data FOLDER`: fine-tune on one list, report the other"
    write_voc(tmp_path / "voc", splits=("train", "val"), n=2, size=96)
    args = dict(data=tmp_path / "voc", out_dir=tmp_path / "out", checkpoints=weights, epochs=1, batch=2, crop=64)
    run = _papermill(ROOT / "nbs" / "paper" / "fig4.ipynb", tmp_path / "run.ipynb", *(w for k, v in args.items() for w in ("-p", k, str(v))),
                     "-y", "{ks: [20], steps: [1, 2], resize: [64, 96]}", cache=tmp_path / "cache")
    assert run.returncode == 0, run.stderr[-3000:]
    rows = load_result("fig4", tmp_path / "out")["rows"]
    assert {r["split"] for r in rows} == {"val"} and {r["t"] for r in rows if r["rule"] == "fixed"} == {.15}


# ---- committed results

def _committed(name):
    if not (RESULTS / f"{name}.json").exists(): pytest.skip(f"no results/mini/{name}.json yet")
    return load_result(name, RESULTS)


@pytest.mark.parametrize("name", ["fig4", "table3", "table1"])
def test_committed_summary_follows_from_its_rows(name):
    body = _committed(name)
    values = tuple(k.removesuffix("_std") for k in body["summary"][0] if k.endswith("_std"))
    assert set(values) >= {"t", "miou", "fp", "fn"} and body["summary"] == json.loads(json.dumps(summarize(body["rows"], values=values)))
    assert (RESULTS / f"{name}.csv").read_text() == to_csv(body["summary"])


def test_committed_table3_says_what_the_json_says():
    body, text = _committed("table3"), (RESULTS / "table3.md").read_text()
    tables = re.findall(r"\*\*Scenes, (\w+) split, (\d+) images, (\d) seeds?, (best|threshold)[^\n]*\*\*\n\n((?:\|[^\n]*\n)+)", text)
    assert [t[0] for t in tables] == ["train", "train", "test", "test"]
    settings, chosen = body["provenance"]["settings"], Point(**body["chosen"])
    k, T = settings["k"], settings["T"]
    points = dict(zip(("CAM", "TS-CAM", "Att-Diffu only", "AD-CAM", "TransCAM"),
                      (Point("cam"), Point("ts_cam"), Point("att_diffu", 0, T, "push"), Point("ad_cam", k, T, "push"), Point("trans_cam", 0, 1, "pull"))))
    for split, n, seeds, how, lines in tables:
        rule = "oracle" if how == "best" else "fixed"
        for line in lines.splitlines()[2:]:
            name, miou, fp, fn, t = (c.strip() for c in line.split("|")[1:6])
            group, base = ("coupled" if "no stop-gradient" in name else "stopped"), name.replace(", no stop-gradient", "")
            point = chosen if "chosen" in base else points[base.split(",")[0]]._replace(**(dict(direction="pull") if base.endswith(", pull") else {}))
            [row] = [r for r in body["summary"] if (r["group"], r["split"], r["rule"]) == (group, split, rule)
                     and all(r[f] == v for f, v in point._asdict().items())]
            assert (row["n"], row["seeds"]) == (int(n), int(seeds))
            assert [miou, fp, fn] == [f"{100 * row[v]:.1f} ± {100 * row[v + '_std']:.1f}" for v in ("miou", "fp", "fn")]


def test_committed_results_know_their_weights():
    for name in ("fig4", "table3", "fig5", "fig6", "table1"):
        origin = _committed(name)["provenance"]
        from adcam.pipeline import file_sha256
        for file, digest in origin["checkpoints"].items():
            assert file_sha256(checkpoint_path(0).parent / file) == digest, f"{name} was measured with other weights than the shipped {file}"


def test_committed_bench_is_within_its_limits():
    for r in _committed("bench")["rows"]: assert r["ok"] and r["ratio"] <= r["limit"], r


BENCHES = sorted(p for p in (ROOT / "results/bench").glob("*.json") if p.stem != "gpu")


@pytest.mark.parametrize("path", BENCHES, ids=lambda p: p.stem)
def test_committed_speeds_are_within_their_limits(path):
    body = load_result(path.stem, path.parent)
    assert f"tools/bench/{path.stem}.py" in body["how"].split() and (ROOT / "tools/bench" / f"{path.stem}.py").is_file()
    assert body["rows"] and not [r for r in body["rows"] if r.get("limit") is not None and r["ok"] is not True]


def _reached(row):
    "Whether a row of the GPU bench meets its goal; None if it has none"
    if row["goal"] is None: return None
    if row["goal"] == "pass": return row["value"]
    return row["value"] >= row["goal"] if row["unit"] == "images/s" else row["value"] <= row["goal"]


def test_the_committed_gpu_run_says_of_every_goal_whether_it_was_reached():
    "Goals on a GPU are goals and no limits: a missed one is a result, which notebook scaling discusses"
    body = load_result("gpu", ROOT / "results/bench")
    assert body["how"] == "make bench-gpu" and "gpu" in body["provenance"]["settings"]
    for r in body["rows"]: assert r["status"] == "measured" and r["ok"] == _reached(r), r
