"Pipeline: results with provenance, stages that know when to run again, parameters that cannot be misspelt, measuring"
import dataclasses, json, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from adcam import pipeline
from adcam.classifier import save_weights
from adcam.conformer import conformer_mini
from adcam.evaluation import confusion, scores, seed_mask
from adcam.pipeline import (PUBLISHED, Point, attention_quality, bench, check_parameters, checkpoint_path, choose_point, code_hash, count,
                            differences, fit_scale, footer, git_commit, load_result, measure, patch_labels, point_maps, profiles,
                            project_root, provenance, published, results_dir, save_result, stage, summarize, to_csv, to_markdown)
from adcam.scenes import Scenes
from adcam.seeds import extract


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("ADCAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    paths = {}
    for seed in range(2):
        torch.manual_seed(seed)
        paths[seed] = save_weights(conformer_mini(10), tmp_path_factory.mktemp("weights") / f"{seed}.safetensors")
    return paths


DS = Scenes("test", 2, size=96)  # 144 tokens
POINTS = [Point("cam"), Point("ts_cam"), Point("trans_cam", 0, 1, "pull"), Point("att_diffu", 0, 2, "push"),
          Point("ad_cam", 9, 0, "push"), Point("ad_cam", 9, 2, "push"), Point("ad_cam", 30, 1, "pull")]


# ---- profiles and published numbers

def test_paper_settings():
    voc, coco = profiles["voc"], profiles["coco"]
    assert (voc.epochs, voc.crop, voc.lr_vit, voc.lr_cnn, voc.k, voc.steps, voc.direction) == (5, 384, 2e-4, 5e-4, 50, 2, "push")
    assert (voc.num_classes, coco.num_classes, voc.network, len(voc.thresholds)) == (20, 80, "conformer_small", 60)
    assert set(differences(coco, voc)) == {"name", "dataset", "num_classes", "train_split", "seed_split", "test_split", "choose_split",
                                            "seg_iterations", "seg_lr", "seg_batch"}
    with pytest.raises(dataclasses.FrozenInstanceError): voc.k = 3
    assert (voc.label_fg, voc.label_bg, voc.walk_beta, 2**voc.walk_exp_times, voc.walk_background, voc.irn_radius) == (.30, .05, 10, 256, .25, 10)


def test_published_rows_fit_together():
    "mIoU + FP + FN = 100 + (IoU_bg - mean IoU_fg)/21: a typing error in one of them would show"
    for r in PUBLISHED["table3"]["rows"]:
        excess = r["miou"] + r["fp"] + r["fn"] - 100
        background = r["miou"] - excess + 21 * excess
        assert (75 < background < 84) or (r["key"] == "cam" and abs(background - 94.7) < .01)
    assert published("table1", "AD-CAM")["seed"] - published("table1", "CAM (Conformer)")["seed"] == pytest.approx(8.8)
    assert [r["mark"] for r in PUBLISHED["table1"]["rows"]].count("**") == 1
    assert published("table2", "AD-CAM")["ut"] == 2.2


# ---- results

def test_result_round_trip(tmp_path):
    origin = provenance(seeds=[0, 1], settings=dict(k=50), data=dict(test="f"), seconds=1.26, stages=["x: cached"])
    path = save_result("demo", [dict(a=np.float64(.5), b=np.int64(3), c=float("nan"), d=np.array([1, 2]), e=Path("x"))], tmp_path / "new", origin, note="n")
    body = load_result("demo", tmp_path / "new")
    assert body["rows"] == [dict(a=.5, b=3, c=None, d=[1, 2], e="x")] and body["note"] == "n"
    assert {"created", "commit", "versions", "seeds", "settings", "data", "checkpoints", "seconds", "stages"} == set(body["provenance"])
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"]
    assert "seeds [0, 1]" in footer(body["provenance"])


def test_result_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result .*fig9.json"): load_result("fig9", tmp_path)
    path = save_result("fig9", [dict(a=1)], tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="truncated or damaged.*delete it"): load_result("fig9", tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result"): load_result("fig9", tmp_path)
    with pytest.raises(PermissionError, match="cannot write .*choose another out_dir"): save_result("fig9", [], path)  # a file where the folder should be


def test_folder_without_write_permission(tmp_path, monkeypatch):
    def refuse(*a, **k): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("os.replace", refuse)  # works for root too, whom modes do not stop
    with pytest.raises(PermissionError, match="cannot write .*Permission denied.*ADCAM_RESULTS"): save_result("a", [], tmp_path)


def test_places(tmp_path, monkeypatch):
    assert (project_root() / "settings.ini").is_file()
    monkeypatch.setenv("ADCAM_RESULTS", str(tmp_path))
    assert results_dir("voc") == tmp_path / "voc"
    with pytest.raises(FileNotFoundError, match="mini_coupled_seed7.*none"): checkpoint_path(7, False, tmp_path)
    (tmp_path / "mini_sg_seed7.safetensors").touch()
    assert checkpoint_path(7, True, tmp_path).name == "mini_sg_seed7.safetensors"


def test_git_commit(tmp_path):
    git = lambda *a: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True, capture_output=True, text=True).stdout
    assert git_commit(tmp_path) == "unknown"
    git("init"); (tmp_path / "f").write_text("1"); git("add", "f")
    assert git_commit(tmp_path) == "unknown"  # no commit yet
    git("commit", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    assert git_commit(tmp_path) == head
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == head + "-dirty"


def test_tables():
    assert to_markdown([dict(a="x", b=1.5), dict(a="y", b=2)]) == "| a | b |\n| --- | ---: |\n| x | 1.5 |\n| y | 2 |\n"
    assert to_csv([dict(a=np.float32(.5)), dict(b=float("nan"))]) == "a,b\n0.5,\n,\n"


# ---- stages

def test_stage_runs_again_only_when_something_changed(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_module.py").write_text("def f(x): return x + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    runs = []
    go = lambda **kw: stage("toy", dict(dict(k=1), **kw), lambda: runs.append(1) or dict(v=np.arange(3)), ("toy_module",)).status
    assert [go(), go(), go(k=2), go(k=2), go()] == ["computed", "cached", "computed", "cached", "cached"]
    (tmp_path / "toy_module.py").write_text("# a remark\ndef f(x):\n    return x+1\n")
    assert go() == "cached"
    (tmp_path / "toy_module.py").write_text("def f(x): return x + 2\n")
    assert go() == "computed" and len(runs) == 3
    assert "toy: cached" in capsys.readouterr().out
    assert stage("toy", dict(k=1), lambda: dict(v=0), ("toy_module",), force=True).status == "computed"


def test_damaged_stage_is_computed_again(cache, capsys):
    go = lambda: stage("toy", {}, lambda: dict(v=np.arange(100)))
    go()
    [file] = cache.iterdir()
    for bad in (b"", file.read_bytes()[:40], b"garbage" * 50):
        file.write_bytes(bad)
        assert go().status == "computed" and f"{file} cannot be read" in capsys.readouterr().out
        assert go().value["v"].tolist() == list(range(100))


# ---- parameters

CELL = dict(__annotations__=dict(k=int, rate=float, seeds=list[int], name=str, flag=bool), k=1, rate=1, seeds=[0], name="a", flag=True)


@pytest.mark.parametrize("change, message", [
    (dict(sedes=[1]), "unknown parameter 'sedes', did you mean 'seeds'"), (dict(zzz=1), "unknown parameter 'zzz' This notebook has k, rate"),
    (dict(k=1.5), "expected int"), (dict(k=True), "expected int"), (dict(rate="fast"), "expected float"),
    (dict(seeds="[0, 1]"), r'papermill -y "seeds: \[1, 2\]"'),
    (dict(seeds=["a"]), r"expected list\[int\]"), (dict(flag=1), "expected bool"), (dict(k=0), "at least 1"), (dict(k=10), "at most 9"),
    (dict(seeds=[0, -1]), "seeds is -1"), (dict(name="c"), "choose one of 'a', 'b'")])
def test_check_parameters_refuses(change, message):
    with pytest.raises(ValueError, match=message): check_parameters(CELL | change, k=(1, 9), seeds=(0, None), name={"a", "b"})


def test_check_parameters_accepts():
    names = CELL | dict(_private=3, In=[], Out={}, np=np, measure=measure, Path=Path)
    assert check_parameters(names) == dict(k=1, rate=1, seeds=[0], name="a", flag=True)
    with pytest.raises(ValueError, match="no parameter is declared"): check_parameters(dict(k=1))
    cells = dict(In=["", "%matplotlib inline", "k: int = 3  # x"], k=3)  # an interpreter that keeps no annotations
    assert check_parameters(cells) == dict(k=3)


# ---- measuring

@torch.no_grad()
def test_point_maps_are_those_of_the_methods(weights):
    from adcam.data import to_tensor
    from adcam.seeds import METHODS
    net = conformer_mini(10, checkpoint=weights[0]).eval()
    maps = net.maps(to_tensor(DS[0].image)[None])
    for p, m in zip(POINTS, point_maps(maps, POINTS, [1, 4])):
        torch.testing.assert_close(m, METHODS[p.method](maps, classes=[1, 4], **p.options)[0], rtol=1e-5, atol=1e-7)


def _slowly(weights, point, rule):
    "The measurement in plain steps: seeds, 60 masks each, confusion matrices"
    net, best = conformer_mini(10, checkpoint=weights).eval(), None
    seeds = [(extract(net, s.image, s.label, point.method, **point.options), s.mask) for s in (DS[i] for i in range(len(DS)))]
    for t in np.arange(60) / 100 if rule is None else [rule]:
        row = scores(sum(confusion(seed_mask(s.high_res, s.keys, t), m, 10) for s, m in seeds))
        if best is None or row["miou"] > best["miou"]: best = row | dict(t=t)
    return best


def test_measure_equals_the_slow_way(weights):
    rows, log = measure(weights, POINTS, dict(test=DS), choose=.15, progress=False)
    assert len(rows) == len(weights) * len(POINTS) * 2 and log[0].startswith("measure test: computed")
    for r in rows:
        if r["seed"] == 0 and r["method"] in ("ts_cam", "ad_cam"):
            slow = _slowly(weights[r["seed"]], Point(*(r[f] for f in Point._fields)), None if r["rule"] == "oracle" else .15)
            assert [r[v] for v in ("miou", "fp", "fn", "t")] == pytest.approx([slow[v] for v in ("miou", "fp", "fn", "t")], abs=1e-6)


def test_two_processes_count_the_same(weights):
    ds = Scenes("test", 7, size=96)
    one = count(list(weights.values()), ds, POINTS, progress=False).value["hist"]
    two = count(list(weights.values()), ds, POINTS, processes=2, force=True, progress=False)
    assert two.status == "computed"
    np.testing.assert_array_equal(one, two.value["hist"])
    assert one.shape[:2] == (2, len(POINTS)) and (one.sum((2, 3, 4)) == 7 * 96 * 96).all()


def test_count_cache_depends_on_what_matters(weights):
    run = lambda w=0, ds=DS, points=POINTS[:1], **kw: count([weights[w]], ds, points, progress=False, **kw).status
    assert [run(), run()] == ["computed", "cached"]
    assert [run(w=1), run(ds=Scenes("test", 1, size=96)), run(points=POINTS[1:2]), run(thresholds=(.1, .2)), run(long_side=64)] == ["computed"] * 5
    assert run() == "cached"


def test_fixed_threshold_comes_from_the_other_data(weights):
    other = Scenes("val", 2, size=96)
    rows, _ = measure({0: weights[0]}, POINTS[:2], dict(test=DS), choose=other, progress=False)
    chosen, _ = measure({0: weights[0]}, POINTS[:2], dict(val=other), choose=.2, progress=False)
    for p in ("cam", "ts_cam"):
        t = next(r["t"] for r in chosen if (r["method"], r["rule"]) == (p, "oracle"))
        assert next(r["t"] for r in rows if (r["method"], r["rule"]) == (p, "fixed")) == t


def test_fixed_threshold_from_rows_is_the_same(weights):
    other = Scenes("val", 2, size=96)
    there, _ = measure(weights, POINTS[:2], dict(val=other), progress=False)
    a, _ = measure(weights, POINTS[:2], dict(test=DS), choose=other, progress=False)
    b, _ = measure(weights, POINTS[:2], dict(test=DS), choose=there, progress=False)
    assert a == b
    with pytest.raises(ValueError, match="have 0 of seed 0"): measure(weights, POINTS[:3], dict(test=DS), choose=there, progress=False)


def test_photographs_of_other_sizes(weights):
    "Sides that are no multiples of the stride, and a limit of the long side"
    class Odd:
        ids, classes = ["a"], DS.classes
        def __len__(self): return 1
        def __getitem__(self, i): return DS[i]._replace(image=DS[i].image[:70, :91], mask=DS[i].mask[:70, :91])
        def fingerprint(self): return "odd"
    hist = count([weights[0]], Odd(), POINTS, long_side=80, progress=False).value["hist"]
    assert (hist.sum((2, 3, 4)) == 70 * 91).all()
    assert fit_scale((70, 91), 80) == 80 / 91 and fit_scale((70, 91), 0) == 1 and fit_scale((70, 91), 200) == 1


def test_wrong_checkpoint_is_told_before_the_workers_start(tmp_path):
    path = save_weights(conformer_mini(3), tmp_path / "three.safetensors")
    with pytest.raises(ValueError, match="3 classes"): count([path], DS, POINTS, processes=2, progress=False)


def test_measure_bad_input(weights):
    class NoMask:
        ids, classes = DS.ids, DS.classes
        def __len__(self): return 1
        def __getitem__(self, i): return DS[i]._replace(mask=None)
        def fingerprint(self): return "nomask"
    with pytest.raises(ValueError, match="has no mask"): measure(weights, POINTS, dict(test=NoMask()), progress=False)
    with pytest.raises(ValueError, match="unknown method"): measure(weights, [Point("gradcam")], dict(test=DS), progress=False)
    with pytest.raises(ValueError, match="k=500"): measure(weights, [Point("ad_cam", 500, 1, "push")], dict(test=DS), progress=False)


def test_summarize_and_choose():
    rows = [dict(method="ad_cam", k=k, steps=1, direction="pull", seed=s, rule="oracle", t=.1, miou=m + .1 * s, fp=.2, fn=.3) for k,
            m in ((5, .3), (9, .5)) for s in range(2)]
    table = summarize(rows)
    assert [(r["k"], r["seeds"]) for r in table] == [(5, 2), (9, 2)]
    assert table[0]["miou"] == pytest.approx(.35)
    assert table[0]["miou_std"] == pytest.approx(.0707, abs=1e-4)
    assert summarize(rows[:1])[0]["miou_std"] == 0
    assert choose_point(rows) == Point("ad_cam", 9, 1, "pull")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 5))
def test_patch_labels_of_a_blocky_mask(h, w, s):
    grid = np.random.default_rng(0).integers(0, 5, (h, w))
    np.testing.assert_array_equal(patch_labels(np.kron(grid, np.ones((s, s), int)), (h, w)), grid)


def test_attention_quality(weights):
    net = conformer_mini(10, checkpoint=weights[0]).eval()
    rows = attention_quality(net, DS)
    assert [r["block"] for r in rows] == [str(i + 1) for i in range(net.depth)] + ["A", "S"]
    assert all(0 <= r["auc"] <= 1 and r["received"] > 0 for r in rows)


def test_bench_small():
    rows = bench(repeats=1, ks=(5, 9), steps=(1, 2), size=128)
    assert len(rows) == 4 and all({"name", "ratio", "limit", "ok"} <= r.keys() for r in rows)
    assert rows[-1]["ok"], "the fast way must equal the loops"
    json.dumps(rows)
