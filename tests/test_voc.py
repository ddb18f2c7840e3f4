"""PASCAL VOC with public networks: the way from photographs to tables, tried with drawn scenes and tiny random networks."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from adcam.data import VOCFolder
from adcam.evaluation import Sweep
from adcam.pipeline import load_result, upsample
from adcam.scenes import write_voc
from adcam.learned import mean_average_precision
from adcam.voc import Plan, as_plan, check_photographs, count_maps, counts_rows, load_counts, other_list, photograph_rows, plan_dict, score_counts, why_rows
from adcam.voc_masks import preferred_k, table_rows
from conftest import ROOT


@pytest.fixture(scope="module")
def measured(voc_measure, tmp_path_factory):
    "All steps at their smallest"
    top = tmp_path_factory.mktemp("voc")
    voc_measure.main(["all", "masks", "segment", "--tiny", "--device", "cpu", "--processes", "1", "--chunk", "3", "--every", "1", "--rows", "2",
               "--work", str(top / "work"), "--out", str(top / "out")])
    return top


def log_of(top):
    return json.loads((top / "out/log.json").read_text())["steps"]


def test_every_step_says_its_seconds(measured):
    steps = log_of(measured)
    assert [s["step"] for s in steps] == ["train", "count frozen", "count 2e-5", "count 2e-4", "masks", "segment"]
    assert all(s["seconds"] > 0 for s in steps)


def test_a_second_run_computes_nothing_again(voc_measure, measured):
    before = {p: p.stat().st_mtime_ns for p in (measured / "work").rglob("*.npz")} | {p: p.stat().st_mtime_ns
        for p in (measured / "work").glob("*.safetensors")}
    voc_measure.main(["train", "count", "--tiny", "--device", "cpu", "--processes", "1", "--chunk", "3", "--work", str(measured / "work"),
               "--out", str(measured / "again")])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    a, b = (np.load(measured / folder / "frozen-val.npz") for folder in ("out", "again"))
    assert all((a[n] == b[n]).all() for n in ("tp", "pred", "gt"))


def test_the_preferred_k_is_that_of_the_best_seeds(measured):
    found = load_counts(measured / "out")
    choose = next(c for c in found if (c.state, c.split) == ("frozen", "train"))
    rows = [r for r in counts_rows([choose]) if (r["method"], r["blocks"], r["steps"], r["rule"]) == ("ad_cam", "half", choose.plan.T, "oracle")]
    for direction, k in preferred_k(choose).items():
        of = {n: np.mean([r["miou"] for r in rows if (r["direction"], r["k"]) == (direction, n)]) for n in choose.plan.ks}
        assert of[k] == pytest.approx(max(of.values()))
    assert [r.name for r in table_rows(5, 2, dict(pull=20, push=5))[6:]] == ["AD-CAM, pull, 20 neighbors"]


def test_a_list_gets_the_thresholds_of_the_other(measured):
    found = load_counts(measured / "out")
    val, train = (next(c for c in found if (c.state, c.split) == ("frozen", s)) for s in ("val", "train"))
    assert other_list(found, val) is train
    of = lambda split, rule: {tuple(r[k] for k in ("seed", "blocks", "method", "k", "steps", "direction")): r["t"] for r in counts_rows([val, train])
                              if (r["split"], r["rule"]) == (split, rule)}
    assert of("val", "fixed") == of("train", "oracle") and of("train", "fixed") == of("val", "oracle")


def test_cam_is_the_same_for_all_states_of_the_vit(measured):
    rows = [r for r in counts_rows(load_counts(measured / "out")) if (r["method"], r["split"], r["rule"], r["seed"],
                                                                      r["blocks"]) == ("cam", "val", "oracle", 0, "all")]
    assert {r["vit"] for r in rows} == {"frozen", "2e-5", "2e-4"} and len({r["miou"] for r in rows}) == 1


def test_photographs_add_up_to_their_list(measured):
    val = load_counts(measured / "out")[0]
    rows = [r for r in photograph_rows(val) if r["method"] == "cam" and r["blocks"] == "all"]
    assert sum(r["gt_pixels"] for r in rows) == val.arrays["gt"][1:].sum()


def test_attention_is_described_for_every_block_and_both_means(measured):
    rows = [r for r in why_rows(load_counts(measured / "out")) if (r["vit"], r["split"]) == ("frozen", "val")]
    assert [r["block"] for r in rows[-2:]] == ["all", "half"] and all(0 <= r["auc"] <= 1 for r in rows)


def test_masks_and_predictions_are_scored(measured):
    rows = json.loads((measured / "out/masks.json").read_text())["rows"]
    assert ({(r["row"], r["column"]) for r in rows}
            == {(n, c) for n in ("CAM", "AD-CAM, pull") for c in ("seed", "pseudo", "segmentation")} | {("ground truth", "segmentation")})


def test_counting_on_the_device_is_counting_by_sweep():
    g = torch.Generator().manual_seed(0)
    maps, keys, edges = torch.rand(3, 2, 5, 6, generator=g), torch.tensor([1, 4]), torch.tensor([0., .2, .5, .9])
    gt = torch.randint(0, 7, (20, 24), generator=g)
    gt[0, :5] = 255
    tp, pred = count_maps(maps, keys, gt, edges, most=1000)
    for m, t, p in zip(maps, tp, pred):
        C = Sweep(6, edges.tolist()).update(upsample(m[None], (20, 24))[0].numpy(), keys.numpy(), gt.numpy().astype(np.uint8)).confusions()
        assert (t.T.numpy() == C[:, [0, 2, 5], [0, 2, 5]]).all() and (p.T.numpy() == C.sum(1)[:, [0, 2, 5]]).all()


def test_perfect_counts_score_one():
    gt = np.array([50, 30, 0])
    full = np.repeat(gt[:, None], 2, 1)
    s = score_counts(full, full, gt)
    assert s["miou"].tolist() == [1, 1] and s["fp"].tolist() == [0, 0] and s["pixel_accuracy"].tolist() == [1, 1]


def test_average_precision_of_a_perfect_order_is_one():
    assert mean_average_precision(np.array([[2., 0.], [1., 3.], [0., 5.]]), np.array([[1, 0], [1, 1], [0, 1]])) == 1


def test_a_plan_survives_json():
    assert as_plan(json.loads(json.dumps(plan_dict(Plan())))) == Plan()


@pytest.fixture
def photographs(tmp_path):
    write_voc(tmp_path / "voc", splits=("val",), n=2, size=96)
    return tmp_path / "voc"


def test_a_folder_without_masks_is_refused_before_anything_is_computed(photographs):
    for mask in (photographs / "SegmentationClass").glob("*.png"): mask.unlink()
    with pytest.raises(ValueError, match="2 of 2 photographs have no mask.*seeds can be made"):
        check_photographs(VOCFolder(photographs, "val"), Plan(ks=(5,), k=5), 16)


def test_more_neighbors_than_tokens_are_refused_with_the_photograph(photographs):
    with pytest.raises(ValueError, match="val_000000 has 6x6 = 36 tokens, and k goes up to 250"):
        check_photographs(VOCFolder(photographs, "val"), Plan(), 16)


def test_an_empty_folder_of_counts_says_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="voc_measure"):
        load_counts(tmp_path)


def paper(name, out, cache=None, **parameters):
    "Run a figure notebook and return what it wrote"
    env = dict(os.environ, ADCAM_CACHE=str(cache or out / "cache"), OMP_NUM_THREADS="1")
    given = [w for n, v in parameters.items() for w in ("-p", n, str(v))]
    notebook = [str(ROOT / f"nbs/paper/{name}.ipynb"), str(out / "run.ipynb")]
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", *notebook, *given, "-p", "out_dir", str(out / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=out)
    assert run.returncode == 0, run.stderr[-3000:]
    return load_result(name, out / "out")


@pytest.mark.parametrize("name", ["table3", "fig4", "fig5", "fig6"])
def test_figures_are_drawn_from_counts_alone(name, measured, tmp_path):
    body = paper(name, tmp_path, counts=measured / "out")
    assert body["rows"] and body["ledger"] and not list((tmp_path / "out").glob("photo_*"))


def test_a_folder_and_networks_give_what_their_counts_give(measured, tmp_path):
    work, cache = measured / "work", tmp_path / "cache"
    weights = ",".join(str(work / f"cnn_seed{s}.safetensors") for s in range(3))
    given = dict(data=work / "voc", network="test_resnet+test_vit", weights=weights, vit_weights=work / "vit.safetensors", lists="val,train", k=5, most_k=20)
    for name in ("table3", "fig5"): (tmp_path / name).mkdir()
    body = paper("table3", tmp_path / "table3", cache, **given)
    same = lambda r: r["vit"] == "frozen" and (r["method"] == "cam" or (r["method"], r["k"], r["steps"]) == ("ad_cam", 5, 2))
    key = lambda r: tuple(r[n] for n in ("split", "seed", "blocks", "method", "direction", "rule"))
    point = lambda rows: {key(r): round(r["miou"], 6) for r in rows if same(r)}
    assert point(body["rows"]) == point(counts_rows(load_counts(measured / "out")))
    settings = {n: v for n, v in body["provenance"]["settings"].items() if n != "out_dir"}
    assert settings["data"] == "voc" and str(tmp_path) not in json.dumps(settings)
    chunks = {p: p.stat().st_mtime_ns for p in cache.rglob("0*.npz")}
    paper("fig5", tmp_path / "fig5", cache, **given)                          # the next figure counts nothing, and draws the photographs
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("0*.npz")} == chunks
    assert list((tmp_path / "fig5/out").glob("photo_fig5_*.png"))


def test_walked_seeds_stand_beside_their_masks(measured, tmp_path):
    folder = tmp_path / "counts"
    shutil.copytree(measured / "out", folder)
    masks = json.loads((folder / "masks.json").read_text())
    for r in masks["rows"]: r["n"] = 3 if r["column"] in ("seed", "pseudo") else r["n"]  # as if only three photographs had been walked
    (folder / "masks.json").write_text(json.dumps(masks))
    paper("table1", tmp_path, counts=folder)
    title, _, head, _, *lines = (tmp_path / "out/table1.md").read_text().splitlines()
    assert "Seed 4, Seed, same photographs 3, P.L. 3" in title
    columns = [[c.strip() for c in line.split("|")] for line in (head, *lines)]
    place = columns[0].index("P.L.")
    assert columns[0][place - 1] == "Seed, same photographs"
    of = {(r["row"], r["column"]): r["miou"] for r in masks["rows"] if (r["split"], r["rule"]) == ("val", "fixed")}
    for row in ("CAM", "AD-CAM, pull"):
        assert [next(c for c in columns if c[1] == row)[place + i] for i in (-1, 0)] == [f"{100 * of[row, c]:.1f}" for c in ("seed", "pseudo")]
