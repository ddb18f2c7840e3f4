"adcam.run: the chain of stages on small trees, with broken files among the images"
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import adcam.run
from adcam.data import open_data
from adcam.pipeline import profiles
from adcam.run import method_options, override, run, run_data, score_masks, score_seeds, segmentation_net
from adcam.scenes import write_voc

TINY = ["num_classes=10", "network=conformer_tiny", "scales=0.5", "flip=False", "crop=64", "epochs=1", "k=4", "irn_crop=64", "irn_epochs=1",
        "irn_radius=4", "walk_exp_times=2"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Five scenes in VOC layout: one file is cut, one image has no class"
    root = tmp_path_factory.mktemp("a tree with spaces and é") / "VOC2012"
    write_voc(root, splits=("train",), n=5, size=96)
    ids = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    cut = root / f"JPEGImages/{ids[1]}.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    table = root / "ImageSets/labels.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line.split(",")[0] + ",0" * 10 if line.startswith(ids[2]) else line for line in lines) + "\n")
    return root, ids


# ---- settings

@given(st.integers(1, 500), st.lists(st.sampled_from([.5, 1., 1.5, 2.]), min_size=1, max_size=4), st.sampled_from(["push", "pull"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_override_reads_what_it_is_told(k, scales, direction, flip):
    p = override(profiles["voc"], [f"k={k}", f"scales={','.join(map(str, scales))}", f"direction={direction}", f"flip={flip}"])
    assert (p.k, p.scales, p.direction, p.flip) == (k, tuple(scales), direction, flip)
    assert p.epochs == 5 and profiles["voc"].k == 50


@pytest.mark.parametrize("change, says",
                         [("kk=3", "did you mean k"), ("k", "no setting; write NAME=VALUE"), ("k=1.5", "k=50"), ("scales=a,b", "scales="),
                          ("flip=1", "flip=True"),
                                          ("name=x", "no setting 'name'"), ("lr_vit=high", "give a value of that kind")])
def test_override_refuses(change, says):
    with pytest.raises(ValueError, match=says): override(profiles["voc"], [change])


# ---- data

def test_data_leaves_out_what_cannot_be_used(tree):
    root, ids = tree
    d = run_data(override(profiles["voc"], TINY), f"voc:{root}", limit=5)
    assert d.train.ids == d.measured == [ids[0], ids[3], ids[4]]
    assert [s.id for s in d.skipped] == [ids[1]] and str(root) in d.skipped[0].reason
    assert d.unlabeled == [ids[2]]


def test_data_of_other_classes(tree):
    with pytest.raises(ValueError, match="num_classes=10"): run_data(profiles["voc"], f"voc:{tree[0]}", limit=2)


# ---- the chain

@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    import contextlib, io
    out, said = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stderr(said): result = run(override(profiles["voc"], TINY), f"voc:{tree[0]}", out, limit=5, progress=False)
    return out, result, said.getvalue()


def test_every_stage_left_its_files(tree, finished):
    out, result, said = finished
    good = {tree[1][i] for i in (0, 3, 4)}
    assert ({p.stem for p in (out / "seeds").glob("*.npz")}
            == {p.stem for p in (out / "ir_labels").glob("*.png")} == {p.stem for p in (out / "pseudo_masks").glob("*.png")} == good)
    assert (out / "classifier/weights.safetensors").is_file() and (out / "irnet/irnet.safetensors").is_file()
    assert said.count("random") == 2, "a run without weights has to be loud about both networks"


def test_result_names_settings_and_what_was_left_out(tree, finished):
    out, result, _ = finished
    body = json.loads((out / "run.json").read_text())
    assert ([r["stage"] for r in body["rows"]]
            == ["data", "classifier", "seeds", "seed scores", "seed scores", "IR labels", "IRNet", "pseudo masks", "mask scores"])
    assert [s["id"] for s in body["skipped"]] == [tree[1][1]] and body["unlabeled"] == [tree[1][2]]
    assert body["provenance"]["settings"]["network"] == "conformer_tiny" and body["provenance"]["settings"]["limit"] == 5
    assert str(tree[0]) not in json.dumps(body["provenance"]), "a machine path would be committed with the result"


def test_scores_are_those_of_the_files(tree, finished):
    out, result, _ = finished
    p, ds = override(profiles["voc"], TINY), run_data(override(profiles["voc"], TINY), f"voc:{tree[0]}", limit=5).train
    rows = {(r["stage"], r["note"]): r for r in result.rows if "miou" in r}
    for row in score_seeds(ds, out / "seeds", p.thresholds):
        assert rows["seed scores", f"threshold {row['t']:.2f}, {row['rule']}, no CRF"]["miou"] == row["miou"]
    assert score_masks(ds, out / "pseudo_masks")["miou"] == rows["mask scores", "background 0.25, no CRF"]["miou"]


def test_a_repeated_run_computes_what_is_missing_only(tree, finished, tmp_path):
    out, result, _ = finished
    copy = shutil.copytree(out, tmp_path / "copy")
    gone = tree[1][3]
    (copy / f"pseudo_masks/{gone}.png").unlink()
    (copy / f"seeds/{gone}.npz").write_bytes(b"torn")
    again = run(override(profiles["voc"], TINY), f"voc:{tree[0]}", copy, limit=5, progress=False)
    notes = {r["stage"]: r["note"] for r in again.rows if "seconds" in r}
    assert all(notes[s].startswith("was there") for s in ("classifier", "IRNet"))
    assert notes["seeds"] == "1 computed, 2 were there"
    assert notes["IR labels"] == "0 computed, 3 were there"
    assert notes["pseudo masks"] == "1 computed, 2 were there"
    assert [r["miou"] for r in again.rows if "miou" in r] == [r["miou"] for r in result.rows if "miou" in r]


def test_masks_are_optional(tree, tmp_path):
    root = shutil.copytree(tree[0], tmp_path / "VOC2012")
    shutil.rmtree(root / "SegmentationClass")
    result = run(override(profiles["mini"], ["walk_exp_times=1", "irn_crop=32", "irn_radius=4", "irn_epochs=1"]), f"voc:{root}", tmp_path / "out",
                 limit=5, progress=False)
    assert not any("miou" in r for r in result.rows) and result.rows[-1]["stage"] == "pseudo masks"


def test_not_under_a_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0"); monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one by one"): run(profiles["mini"], "mini", tmp_path, limit=2)


# ---- other methods, and on to segmentation

SMALL_NET = ["segmentation=deeplabv2_mini", "seg_iterations=2", "seg_batch=2", "seg_crop=64"]


def test_segmentation_is_the_next_stage(tree, finished, tmp_path, monkeypatch):
    root, out, asked, train = tree[0], tmp_path / "run", [], adcam.run.train_segmentation
    monkeypatch.setattr(adcam.run, "train_segmentation", lambda net, ds, masks, config, **o: asked.append(config) or train(net, ds, masks, config, **o))
    shutil.copytree(finished[0], out)
    p = override(profiles["voc"], [*TINY, *SMALL_NET, "test_split=train"])
    result = run(p, f"voc:{root}", out, limit=5, segment=True, workers=1, progress=False)
    assert asked[0].workers == 1
    notes = [r["stage"] for r in result.rows]
    assert notes[-3:] == ["segmentation", "predictions", "prediction scores"]
    predictions = result.rows[-2]
    assert (out / "segmentation/weights.safetensors").is_file() and "1 left out" in predictions["note"]   # the file that is cut
    assert len(list((out / "predictions").glob("*.png"))) == predictions["images"] - 1


@pytest.mark.parametrize("change, init, says",
                         [("segmentation=fcn", None, "choose one of deeplabv2_resnet101"), ("segmentation=upernet", "file.pth", "give timm instead")])
def test_segmentation_networks_are_named(change, init, says):
    with pytest.raises(ValueError, match=says): segmentation_net(override(profiles["voc"], [change]), init)


def test_options_of_a_method_come_from_the_profile():
    p = override(profiles["voc"], ["k=20", "direction=pull"])
    assert method_options(p, "ad_cam")["k"] == 20 and method_options(p, "ad_cam", k=7)["k"] == 7
    assert method_options(p, "cam") == method_options(p, "trans_cam") == {}
    with pytest.raises(ValueError, match="no option 'kk'"): method_options(p, "ad_cam", kk=3)


# ---- the other way from seeds to masks

def test_psa_in_the_place_of_irn(tmp_path):
    go = lambda **o: run(profiles["mini"], "mini", tmp_path, limit=2, progress=False, **dict(refine="psa") | o)
    first = go()
    assert [r["stage"] for r in first.rows if "seconds" in r] == ["data", "classifier", "seeds", "PSA scores", "AffinityNet", "pseudo masks"]
    assert len(list((tmp_path / "pseudo_masks").glob("*.png"))) == 2 and (tmp_path / "psa/affinity.safetensors").is_file()
    again = go()
    assert [r["note"] for r in again.rows if r["stage"] in ("PSA scores", "pseudo masks")] == ["0 computed, 2 were there"]*2
    assert [r["miou"] for r in again.rows if "miou" in r] == [r["miou"] for r in first.rows if "miou" in r]
    with pytest.raises(ValueError, match="refine is 'crf'; choose one of irn, psa"): go(refine="crf")
    with pytest.raises(ValueError, match="choose another folder"): go(refine="irn")
