"""The table of claims: verdicts follow from the numbers of the files by the rules that the notebook states."""
import json
import os
import subprocess
import sys

import pytest
from adcam.pipeline import load_result, save_result
from conftest import ROOT

COMMITTED = ROOT / "results/claims"


def run_notebook(out, **parameters):
    env = dict(os.environ, ADCAM_CACHE=str(out / "cache"), OMP_NUM_THREADS="1")
    given = [w for n, v in dict(parameters, out_dir=out).items() for w in ("-p", n, str(v))]
    run = subprocess.run([sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", str(ROOT / "nbs/paper/claims.ipynb"),
                          str(out / "run.ipynb"), *given],
                         capture_output=True, text=True, env=env, cwd=out)
    assert run.returncode == 0, run.stderr[-3000:]
    return load_result("claims", out)


def line_of(body, words):
    [found] = [r for r in body["table"] if words in r["says"]]
    return found


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    "Three seeds of photographs on which AD-CAM gains 5 points, TS-CAM loses 5, and raw diffusion does this and that; no Scenes"
    top = tmp_path_factory.mktemp("claims")
    row = lambda seed, method, direction, miou, k=0: dict(split="val", n=9, seed=seed, vit="frozen", blocks="all", method=method, k=k,
                                                          steps=2 if direction else 0, direction=direction,
                                                          rule="fixed", t=.5, miou=miou, fp=.3, fn=.2)
    rows = []
    for seed, wobble in enumerate((-.02, 0., .02)):
        rows += [row(seed, "cam", "", .40), row(seed, "ts_cam", "", .35)]
        for d in ("push", "pull"): rows += [row(seed, "att_diffu", d, .40 + wobble), row(seed, "ad_cam", d, .45, 50)]
    (top / "voc").mkdir()
    (top / "out").mkdir()
    save_result("table3", rows, top / "voc")
    return run_notebook(top / "out", scenes=top / "nothing", voc=top / "voc")


@pytest.mark.parametrize("words,expected",
                         [("AD-CAM over CAM of the same network", "confirmed"), ("TS-CAM over CAM, mIoU", "contradicted"),
                          ("raw attention is no better than CAM", "not seen"),
                                            ("AD-CAM has fewer false positives than CAM", "not seen")])
def test_a_difference_gets_the_verdict_of_its_rule(invented, words, expected):
    assert line_of(invented, words)["verdict"] == expected


def test_the_difference_stands_in_the_column_of_its_source(invented):
    line = line_of(invented, "AD-CAM over CAM of the same network")
    assert line["VOC"] == "push +5.0 ± 0.0; pull +5.0 ± 0.0" and line["Scenes"] == ""


def test_what_was_not_measured_says_what_it_would_take(invented):
    assert line_of(invented, "the stop-gradient is needed")["verdict"].startswith("cannot be tested here; needs ")
    assert line_of(invented, "misses fall visibly")["verdict"] == "not measured"


def test_theorems_need_no_measurement_to_be_judged(invented):
    assert line_of(invented, "S is a valid metric")["verdict"] == "contradicted"


def test_committed_claims_follow_from_the_committed_results(tmp_path):
    if not (COMMITTED / "claims.json").exists(): pytest.skip("no results/claims yet: make claims")
    committed, again = load_result("claims", COMMITTED), run_notebook(tmp_path)
    assert json.dumps(again["table"]) == json.dumps(committed["table"]), "results changed after the table was made: make claims"
    assert (tmp_path / "claims.csv").read_text() == (COMMITTED / "claims.csv").read_text()
