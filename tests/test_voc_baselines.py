"""Rows that need more than one look, on drawn scenes with tiny random networks: which photographs, what a stopped run leaves, and what a lead is."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adcam.evaluation import Sweep, side_by_side
from adcam.pipeline import upsample
from adcam.voc_baselines import ROWS, Counted, lead_interval, spread_order

ROUND = ["--tiny", "--device", "cpu", "--processes", "1", "--seeds", "0", "--epochs", "1", "--chunk", "1", "--few", "2,2", "--more", "2,2"]
EFFORT = ["--effort", "learn=2,advcam=2,rib_steps=2,rib_others=1,rib_crop=32,channels=2,recam_steps=3,seam_epochs=1,seam_crop=64,oaa_epochs=2,integral_epochs=1,crop=64,affinity=2,affinity_epochs=1,affinity_crop=96,batch=2"]


@pytest.fixture(scope="module")
def measured(voc_measure, tmp_path_factory):
    "A network, and all rows on two photographs of each list"
    top = tmp_path_factory.mktemp("rows")
    voc_measure.main(["train", "baselines", *ROUND, *EFFORT, "--vit-rates", "", "--work", str(top / "work"), "--out", str(top / "out")])
    return top


def body(top): return json.loads((top / "out/baselines.json").read_text())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000))
def test_the_order_has_every_photograph_once(n):
    assert sorted(spread_order(n)) == list(range(n))


def test_every_beginning_of_the_order_is_spread():
    order = spread_order(1449)
    for n in (16, 40, 100):
        gaps = np.diff(np.sort([*order[:n], 1449]))
        assert gaps.max() <= 2 * 1449 / n + 2


def test_all_rows_are_there_with_their_settings(measured):
    rows = body(measured)["rows"]
    assert {r["row"] for r in rows} == set(ROWS)
    assert {r["column"] for r in rows if r["row"] == "CAM + PSA"} == {"pseudo"}
    assert all(r["setting"] and r["seconds"] >= 0 and r["lead_low"] <= r["lead_high"] for r in rows)
    assert body(measured)["trained"]["recam"]["steps"] == 3


def test_cam_has_no_lead_over_itself(measured):
    assert {r["lead"] for r in body(measured)["rows"] if r["row"] == "CAM"} == {0.}


def test_cam_is_scored_as_the_masks_score_it(measured, voc_measure):
    "`Sweep` on the kept maps gives the numbers of the table, up to half precision"
    from adcam.data import VOCFolder
    lists = {n: VOCFolder(measured / "work/voc", n) for n in ("val", "train")}
    sweeps = {}
    for name, ds in lists.items():
        sweeps[name] = Sweep(len(ds.classes), tuple(i / 100 for i in range(100)))
        maps = {k: v for p in (measured / "work/baselines/rows/CAM").glob(f"{name}-*.npz") for k, v in np.load(p).items()}
        for i, photo in enumerate(ds.ids):
            if f"{photo}/map" not in maps: continue
            full = upsample(torch.from_numpy(maps[f"{photo}/map"].astype(np.float32))[None], ds[i].image.shape[:2])[0].numpy()
            sweeps[name].update(full, np.flatnonzero(ds[i].label), ds[i].mask)
    expected = {r["rule"]: r["miou"] for r in side_by_side(sweeps["val"], sweeps["train"])}
    found = {r["rule"]: r["miou"] for r in body(measured)["rows"] if r["row"] == "CAM" and r["split"] == "val"}
    assert found == pytest.approx(expected, abs=2e-3)


def test_a_stopped_run_goes_on(measured, voc_measure):
    "One file is gone: only this one is made again, and equals the lost one"
    files = sorted((measured / "work/baselines/rows").rglob("*.npz"))
    lost = next(p for p in files if p.parent.name == "PCM")
    before, kept = {k: v for k, v in np.load(lost).items() if "seconds" not in k}, {p: p.stat().st_mtime_ns for p in files if p != lost}
    lost.unlink()
    voc_measure.main(["baselines", *ROUND, *EFFORT, "--work", str(measured / "work"), "--out", str(measured / "out")])
    assert all((np.load(lost)[k] == v).all() for k, v in before.items()) and {p: p.stat().st_mtime_ns for p in kept} == kept


def test_no_time_leaves_everything_and_says_so(voc_measure, measured, tmp_path):
    voc_measure.main(["train", "baselines", *ROUND, *EFFORT, "--vit-rates", "", "--seconds", "-1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    told = body(tmp_path)
    assert told["rows"] == [] and told["steps"][0]["left"] == 4 * len(ROWS) - 2   # OAA and OAA+ have one photograph of the second list


def test_an_unknown_row_is_refused(voc_measure, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop: voc_measure.main(["baselines", *ROUND, "--only", "PCM;CAMM", "--work", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "CAMM: no such row" in capsys.readouterr().err


def test_the_lead_of_equals_is_nothing_and_that_of_a_better_row_is_not():
    rng = np.random.default_rng(0)
    gt = rng.integers(50, 100, (30, 3))
    right = lambda share: (gt * share).astype(int)[..., None]
    row = lambda share: Counted([str(i) for i in range(30)], right(share), gt[..., None], gt, np.zeros(30))
    assert lead_interval(row(.5), row(.5), 0, 0) == (0., 0.)
    low, high = lead_interval(row(.6), row(.5), 0, 0)
    assert 0 < low < high < .2
