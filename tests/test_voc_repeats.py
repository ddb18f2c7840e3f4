"""Two trainings of the boundary networks beside each other: leads of each, and what must be alike."""
import json

import pytest
from adcam.pipeline import load_result, provenance, save_result
from conftest import ROOT, load_script

ROWS = {"CAM": .5, "AD-CAM, pull": .54}


@pytest.fixture
def repeats(): return load_script(ROOT / "tools/voc_repeats.py")


def counts(folder, seed, gain=0., n=3, **more):
    "masks.json of a step `masks`; AD-CAM has `gain` more than in the first"
    told = lambda row, miou, **what: dict(row=row, split="val", rule="fixed", n=n, miou=miou, **what)
    rows = [told(r, m + gain * (r != "CAM"), column="pseudo") for r, m in ROWS.items()] + [told("CAM", .4, column="seed")]
    folder.mkdir()
    (folder / "masks.json").write_text(json.dumps(dict(rows=rows, steps=[dict(step="masks", settings=dict(seed=seed, batch=8) | more)])))
    return folder


def test_each_training_has_its_own_lead(repeats, tmp_path):
    save_result("table1", [], tmp_path / "out", provenance(data=dict(val="abc")), ledger=[dict(branch="CNN")])
    assert repeats.main([str(counts(tmp_path / "a", 0)), str(counts(tmp_path / "b", 1, -.05)), "--out", str(tmp_path / "out")]) == 0
    found = load_result("repeats", tmp_path / "out")
    assert [(r["row"], round(r["lead_first"], 6), round(r["lead_second"], 6)) for r in found["rows"]] == [("CAM", 0, 0), ("AD-CAM, pull", .04, -.01)]
    assert found["provenance"]["settings"]["boundaries"] == dict(seed=[0, 1], batch=8) and found["provenance"]["data"] == dict(val="abc") and found["ledger"]


@pytest.mark.parametrize("other, said", [(dict(seed=1, batch=4), "not in batch"), (dict(seed=0), "not in nothing"), (dict(seed=1, n=2), "let the second go on")])
def test_what_differs_beside_the_seed_is_refused(repeats, tmp_path, capsys, other, said):
    with pytest.raises(SystemExit) as stopped: repeats.main([str(counts(tmp_path / "a", 0)), str(counts(tmp_path / "b", **other)), "--out", str(tmp_path)])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_no_masks_is_said(repeats, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped: repeats.main([str(tmp_path), str(tmp_path)])
    assert stopped.value.code == 2 and "masks.json" in capsys.readouterr().err


def test_it_trains_again_on_the_same_maps_and_labels(repeats, tmp_path, monkeypatch):
    "With the settings of the first and the next seed, in a folder of its own"
    first, work, called = counts(tmp_path / "a", 3, epochs=6, crop=384, lr_edge=.05, weight_decay=1e-4, power=.9, momentum=.9, radius=10), tmp_path / "work", []
    for name in ("masks/maps/val-0.npz", "masks/labels/CAM/x.png", "masks/irnet/CAM.safetensors", "cnn_seed0.safetensors"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(b"1")
    monkeypatch.setattr(repeats.subprocess, "run", lambda command, check: called.append(command))
    other = repeats.again(first, work, ["--data", "photos"])
    assert (other.parent / "masks/maps/val-0.npz").is_file() and (other.parent / "cnn_seed0.safetensors").is_file() and not (other.parent / "masks/irnet").exists()
    told = " ".join(called[0])
    assert "--data photos" in told and f"--work {other.parent} --out {other}" in told and "--irn-epochs 6" in told and "crop=384,lr_edge=0.05" in told and "seed=4 masks" in told
    repeats.again(first, work, [])                                          # once more: links are there
