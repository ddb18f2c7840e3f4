"""The reproduction kit: hours are told first, every row gets its numbers, a second call computes nothing again."""
from dataclasses import replace

import pytest
from adcam.pipeline import load_result, profiles
from adcam.reproduce import FULL, SEEDS, beside, estimate_hours, main, measured_speeds, reproduce
from adcam.scenes import write_voc
from conftest import ROOT

SMALL = replace(profiles["voc"], network="conformer_mini", num_classes=10, train_split="train", seed_split="train", test_split="val",
                segmentation="deeplabv2_mini", crop=64, epochs=1, batch=2,
                scales=(1.,), flip=False, k=4, irn_crop=64, irn_radius=3, irn_epochs=1, irn_batch=2, seg_crop=64, seg_iterations=1, seg_batch=2)
SPEEDS = dict(classifier=1., seeds=1., irnet=1., segmentation=1., prediction=1., label=1., walk=1.)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Everything once, on two drawn photographs with the small networks"
    top = tmp_path_factory.mktemp("kit")
    write_voc(top / "photos", splits=("train", "val"), n=2, size=96)
    return top, reproduce(SMALL, str(top / "photos"), top / "out", limit=2, device="cpu", progress=False)


def test_every_row_of_both_tables_gets_numbers(done):
    rows = done[1]
    assert [r["row"] for r in rows if r["table"] == "1"] == list(FULL)
    assert all(r[c] is not None for r in rows if r["table"] == "1" for c in ("seed", "pseudo", "val"))
    assert {r["row"] for r in rows if r["table"] == "3"} == {"CAM", "AD-CAM", *SEEDS} and all(0 <= r["miou"] <= 100 for r in rows if r["table"] == "3")


def test_the_paper_stands_beside(done):
    text = beside(done[1])
    assert "paper miou" in text and "63.5" in text and "71.7" in text


def test_a_second_call_gives_the_same_without_computing_seeds(done, capsys):
    top, rows = done
    made = {p: p.stat().st_mtime_ns for p in (top / "out").rglob("*.npz")}
    assert reproduce(SMALL, str(top / "photos"), top / "out", limit=2, device="cpu", progress=False) == rows
    assert {p: p.stat().st_mtime_ns for p in made} == made


def test_the_run_knows_where_it_comes_from(done):
    assert load_result("voc_paper", done[0] / "out")["provenance"]["settings"]["limit"] == 2


def test_hours_grow_with_the_images_and_shrink_with_the_processes():
    hours = lambda images, processes: estimate_hours(profiles["voc"], SPEEDS, images, 1464, 1449, processes)[-1]["hours"]
    assert hours(20_000, 1) > hours(10_000, 1) > hours(10_000, 8)


def test_the_estimate_needs_no_photographs(capsys):
    if not (ROOT / "results/bench/gpu.json").exists(): pytest.skip("no results/bench/gpu.json")
    assert main(["--estimate"]) == 0
    assert "| all |" in capsys.readouterr().out


def test_a_bench_without_a_row_is_named():
    with pytest.raises(ValueError, match="make bench-gpu"): measured_speeds(dict(rows=[]))


def test_a_folder_is_asked_for(capsys):
    if not (ROOT / "results/bench/gpu.json").exists(): pytest.skip("no results/bench/gpu.json")
    assert main([]) == 2 and "--data" in capsys.readouterr().err


def test_a_limited_run_is_short_unless_told_otherwise(capsys):
    if not (ROOT / "results/bench/gpu.json").exists(): pytest.skip("no results/bench/gpu.json")
    def hours(*words):
        assert main([*words, "--estimate"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| segmentation |"))
    assert hours("--limit", "2").endswith(" s |")
    assert hours("--limit", "2", "--set", "seg_iterations=20000", "--set", "seg_batch=10") == hours()
