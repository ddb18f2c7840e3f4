"adcam.compare: rows of Table 1, from shared forward passes to counts"
import numpy as np
import pytest
import torch

from adcam.compare import (CRF_ON, NETWORKS, VARIANTS, Entry, Held, label_thresholds, pseudo_counts, pseudo_rows, seed_arrays, seeds_from,
                           segmentation_counts, segmentation_rows)
from adcam.cnn import mini_path, resnet_mini
from adcam.evaluation import scores
from adcam.irnet import IRNet
from adcam.pipeline import profiles
from adcam.run import override
from adcam.scenes import Scenes
from adcam.seeds import extract
from adcam.training import model_fingerprint

SPLITS = ("train", "val", "test")
TINY = override(profiles["mini"], ["irn_crop=64", "irn_epochs=1", "irn_batch=2", "walk_exp_times=2"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def splits(): return {s: Held(Scenes(s, 2, 96)) for s in SPLITS}


@pytest.fixture(scope="module")
def entries():
    return [Entry("CAM", "conformer_mini", "cam"), Entry("TS-CAM", "conformer_mini", "ts_cam"),
            Entry("pull", "conformer_mini", "ad_cam", dict(k=20, steps=2, direction="pull"))]


@pytest.fixture(scope="module")
def arrays(splits, entries): return seed_arrays(NETWORKS["conformer_mini"].build(0, "", splits["train"]), splits, entries)


def test_seeds_of_a_shared_pass_are_those_of_extract(splits, entries, arrays):
    net = NETWORKS["conformer_mini"].build(0, "", splits["train"])
    for s in SPLITS:
        for j, e in enumerate(entries):
            for i, seed in enumerate(seeds_from(arrays, s, j, (96, 96))):
                want = extract(net, splits[s][i].image, splits[s][i].label, e.method, **e.options)
                assert seed.keys.tolist() == want.keys.tolist()
                np.testing.assert_allclose(seed.high_res, want.high_res, atol=2e-4)
                np.testing.assert_allclose(seed.cam, want.cam, atol=2e-4)


@pytest.mark.parametrize("entry, says", [(Entry("a", "vgg", "cam"), "no network 'vgg'; choose one of"), (Entry("a", "resnet_mini", "camm"), "unknown method"),
                                         (Entry("a", "resnet_mini", "advcam", dict(speed=2)), "no option 'speed'")])
def test_an_entry_that_cannot_work_is_refused(entry, says):
    with pytest.raises(ValueError, match=says): entry.check()


def test_a_cnn_has_no_attention(splits):
    with pytest.raises(ValueError, match="needs attention"):
        seed_arrays(NETWORKS["resnet_mini"].build(0, "", splits["train"]), splits, [Entry("a", "resnet_mini", "ad_cam", dict(k=5, steps=1, direction="pull"))])


@pytest.mark.parametrize("name, method, options",
                         [("recam_mini", "recam", {}), ("patch_mini", "ts_cam", dict(head="patch")), ("seam_mini", "seam", {}), ("oaa_mini", "cam", {})])
def test_networks_that_learn_a_head_first(splits, name, method, options, monkeypatch):
    import adcam.compare as compare
    from dataclasses import replace
    monkeypatch.setattr(compare, "RECAM_MINI", replace(compare.RECAM_MINI, epochs=1, crop=64))
    for short in ("SEAM_MINI", "INTEGRAL_MINI"): monkeypatch.setattr(compare, short, replace(getattr(compare, short), epochs=1, crop=64))
    monkeypatch.setattr(compare, "MINI_TRAIN", replace(compare.MINI_TRAIN, epochs=2, crop=64))
    monkeypatch.setattr(compare, "PATCH_HEAD", replace(compare.PATCH_HEAD, steps=3))
    arrays = seed_arrays(NETWORKS[name].build(0, "", splits["train"]), {"val": splits["val"]}, [Entry("a", name, method, options)])
    assert arrays["maps_val_0"].shape[1:] == (12, 12) and np.isfinite(arrays["maps_val_0"]).all()


@pytest.mark.parametrize("t", [0., .01, .15, .3, .59, .95, 1.])
def test_label_thresholds_are_usable(t):
    fg, bg = label_thresholds(t)
    assert 0 < bg <= fg < 1


@pytest.fixture(scope="module")
def counts(splits, arrays): return pseudo_counts(TINY, splits, {s: seeds_from(arrays, s, 2, (96, 96)) for s in SPLITS})


def test_counts_cover_every_pixel(splits, counts):
    for s in SPLITS:
        for v in VARIANTS: assert counts[f"hist_{s}_{v}"].sum() == sum((x.mask != 255).sum() for x in splits[s])
    assert set(VARIANTS) - set(CRF_ON) == {"perfect"} and counts["crf_test_walk"].sum() == 2 * 96 * 96
    assert counts["masks"].shape == (2, 96, 96)
    for m, x in zip(counts["masks"], splits["train"].samples):
        assert set(np.unique(m)) <= {0, *(np.flatnonzero(x.label) + 1)}, "a pseudo mask names only classes of the label"
    assert counts["labels"].sum() == 2 * 96 * 96 and counts["cpu"] > 0


def test_masks_are_those_at_the_threshold_of_val(splits, counts):
    from adcam.evaluation import confusion
    row = next(r for r in pseudo_rows(counts, TINY.thresholds) if (r["split"], r["variant"], r["crf"], r["rule"]) == ("train", "walk", False, "fixed"))
    total = sum(confusion(m, x.mask, 10) for m, x in zip(counts["masks"], splits["train"].samples))
    assert scores(total)["miou"] == pytest.approx(row["miou"])


def test_oracle_is_not_below_the_chosen_threshold(counts):
    rows = {(r["split"], r["variant"], r["rule"]): r["miou"] for r in pseudo_rows(counts, TINY.thresholds) if not r["crf"]}
    assert all(rows[s, v, "oracle"] >= rows[s, v, "fixed"] for s in ("train", "test") for v in VARIANTS)


def test_segmentation_learns_from_the_masks_it_is_given(splits, counts):
    small = dict(iterations=3, batch=2, crop=64, accumulate=1)
    empty = np.zeros_like(counts["masks"])
    truth, again = (segmentation_counts("deeplabv2_mini", None, splits, crf=False, **small) for _ in range(2))
    assert np.array_equal(truth["loss"], again["loss"]) and np.array_equal(truth["test_plain"], again["test_plain"]), "the same seed, the same network"
    with pytest.raises(ValueError, match="object|background|train"): segmentation_counts("deeplabv2_mini", empty + 255, splits, crf=False, **small)
    assert [(r["split"], r["crf"]) for r in segmentation_rows(truth)] == [("val", False), ("test", False)]
    with pytest.raises(ValueError, match="choose one of deeplabv2_mini, upernet_mini"): segmentation_counts("fcn", None, splits)


def test_psa_changes_the_walk_and_nothing_else(splits, arrays, counts):
    other = pseudo_counts(TINY, splits, {s: seeds_from(arrays, s, 2, (96, 96)) for s in SPLITS}, refine="psa")
    for v in ("seed", "perfect"): np.testing.assert_array_equal(other[f"hist_test_{v}"], counts[f"hist_test_{v}"])
    assert (other["hist_test_walk"] != counts["hist_test_walk"]).any() and other["hist_test_walk"].sum() == counts["hist_test_walk"].sum()
    assert other["labels"].sum() == counts["labels"].sum() and other["masks"].shape == counts["masks"].shape


def test_the_shipped_backbone_of_the_walk_stays_as_it_is(splits, arrays, monkeypatch):
    built, init = [], IRNet.__init__
    monkeypatch.setattr(IRNet, "__init__", lambda self, *args, **options: (init(self, *args, **options), built.append(self))[0])
    pseudo_counts(TINY, splits, {s: seeds_from(arrays, s, 2, (96, 96)) for s in SPLITS})
    shipped = model_fingerprint(resnet_mini(10, checkpoint=mini_path("pretrained")).backbone_net)
    assert built and {model_fingerprint(net.stages.net) for net in built} == {shipped}


def test_entries_with_psa():
    assert Entry("x", "resnet_mini", "cam", refine="psa").check().refine == "psa" and Entry("x", "resnet_mini", "cam").refine == "irn"
    with pytest.raises(ValueError, match="choose irn or psa"): Entry("x", "resnet_mini", "cam", refine="crf").check()
