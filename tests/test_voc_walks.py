"""Maps and boundaries exchanged: what walks, with which floor, and what is asked for first."""
import numpy as np
import pytest
from adcam.data import VOCFolder
from adcam.scenes import write_voc
from conftest import ROOT, load_script


@pytest.fixture
def walks(): return load_script(ROOT / "tools/voc_walks.py")


def test_without_boundary_networks_it_says_what_to_run(walks, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped: walks.main(["--data", str(tmp_path), "--work", str(tmp_path)])
    assert stopped.value.code == 2 and "run tools/voc_measure.py --rows 8 masks first" in capsys.readouterr().err


def test_equal_boundaries_make_equal_walks_and_the_floor_is_taken_off_once(walks, tmp_path, monkeypatch):
    write_voc(tmp_path / "voc", splits=("val",), n=2, size=48)
    ds, rng = VOCFolder(tmp_path / "voc", "val"), np.random.default_rng(0)
    classes = {n: len(np.flatnonzero(ds.label(i))) for i, n in enumerate(ds.ids)}
    maps = {f"{n}/{walks.folder(row)}": np.maximum(.4, rng.random((k, 6, 6))) for n, k in classes.items() for row in (walks.RAW, walks.CAM, walks.PULL)}
    monkeypatch.setattr(walks, "edge_map", lambda net, image: np.where(np.arange(12) == 6, net, .05) * np.ones((12, 1)))  # a wall in the middle
    found, floors = walks.count(ds, maps, {walks.RAW: .9, walks.CAM: .9, walks.PULL: .5}, walks.exchanged(walks.PULL))
    assert floors == pytest.approx([.4] * len(floors), abs=1e-6) and len(floors) == 2 * sum(classes.values())   # two walks without a floor
    same = lambda a, b: np.array_equal(found[a].hist, found[b].hist)
    assert not same((walks.RAW, walks.RAW, False), (walks.RAW, walks.RAW, True))
    even = walks.count(ds, maps, {n: .9 for n in (walks.RAW, walks.CAM, walks.PULL)}, walks.exchanged(walks.PULL))[0]
    assert np.array_equal(even[walks.CAM, walks.CAM, False].hist, even[walks.CAM, walks.PULL, False].hist)
