"adcam.scenes: what is drawn, what it is called, and what stays the same."
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from adcam import drawing as D, scenes as S
from adcam.scenes import CLASSES, SPLITS, TEXTURES, Scenes, describe_scene, render_scene, write_voc
from adcam.viz import palette

# (seed, single, objects from back to front, mean color at 64 px, foreground pixels): the pixels the shipped checkpoints were trained on
FROZEN = [(0, False, ["aeroplane", "aeroplane"], [166.4, 180.7, 181.9], 812), (7, False, ["aeroplane", "bird"], [167.3, 176.5, 175.3], 1454),
          (116, False, ["cow", "cat", "horse"], [124.0, 100.6, 93.3], 1640), (10_000_003, False, ["bird", "horse"], [162.6, 169.7, 175.2], 813),
          (100_000_001, True, ["horse"], [134.4, 122.1, 109.6], 1871), (100_000_017, True, ["boat"], [125.2, 142.1, 156.2], 1106)]


@pytest.mark.parametrize("seed, single, names, color, pixels", FROZEN)
def test_pixels_are_frozen(seed, single, names, color, pixels):
    "If this fails on purpose: raise RENDER_VERSION and train the checkpoints again."
    d = describe_scene(seed, 64, single)
    assert [o.name for o in d.instances] == names
    assert np.abs(d.sample.image.mean((0, 1)) - color).max() < 0.6
    assert abs(int((d.sample.mask > 0).sum()) - pixels) <= 8


scenes = st.builds(describe_scene, st.integers(0, 2**40), st.sampled_from([32, 48, 80]), st.booleans())
any_scene = lambda test: settings(deadline=None, max_examples=15)(given(scenes)(test))


@any_scene
def test_image_and_mask_have_one_size(d):
    assert d.sample.image.shape == (*d.sample.mask.shape, 3)
    assert d.sample.image.dtype == d.sample.mask.dtype == np.uint8


@any_scene
def test_label_names_the_classes_of_the_mask(d):
    assert set(np.flatnonzero(d.sample.label) + 1) == set(np.unique(d.sample.mask)) - {0}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**40), st.booleans())
def test_one_to_three_classes_one_if_single(seed, single):
    assert 1 <= describe_scene(seed, 32, single).sample.label.sum() <= (1 if single else 3)


@any_scene
def test_owners_and_parts_cover_the_mask(d):
    there = d.sample.mask > 0
    assert ((d.owner > 0) == there).all()
    assert ((d.parts > 0) == there).all()


@any_scene
def test_each_instance_owns_pixels_of_its_class(d):
    for i, o in enumerate(d.instances, 1): assert (d.sample.mask[d.owner == i] == CLASSES.index(o.name) + 1).all()


@any_scene
def test_area_of_an_instance_is_its_share_of_pixels(d):
    for i, o in enumerate(d.instances, 1): assert o.area == pytest.approx((d.owner == i).mean())


@any_scene
def test_instances_are_described_by_shares(d):
    for o in d.instances: assert 0 < o.visible <= 1 and all(0 <= p <= 1 for p in o.parts)


@any_scene
def test_instances_have_the_context_of_their_scene(d):
    for o in d.instances: assert o.context == d.context and o.texture in TEXTURES


def test_same_seed_same_pixels_other_seed_other_pixels():
    a, b, c = render_scene(5, 64), render_scene(5, 64), render_scene(6, 64)
    assert (a.image == b.image).all() and (a.mask == b.mask).all() and (a.image != c.image).any()


def test_composition_is_the_same_at_other_sizes():
    for seed in (3, 116):
        small, large = render_scene(seed, 64), render_scene(seed, 640)
        assert (small.label == large.label).all() and (large.mask[5::10, 5::10] == small.mask).mean() > 0.96


@pytest.fixture(scope="module")
def many():
    "250 scenes."
    return [describe_scene(i, 64) for i in range(250)]


@pytest.fixture(scope="module")
def objects(many):
    return [o for d in many for o in d.instances]


def test_six_in_ten_scenes_have_one_class(many):
    assert 0.50 < np.mean([d.sample.label.sum() == 1 for d in many]) < 0.68


def test_a_quarter_of_the_pixels_is_object(many):
    assert 0.20 < np.mean([(d.sample.mask > 0).mean() for d in many]) < 0.30


def test_every_class_is_frequent(many):
    assert np.sum([d.sample.label for d in many], 0).min() > 15


def test_objects_differ_in_size(objects):
    areas = [o.area for o in objects]
    assert 0.04 < min(areas) < 0.08
    assert 0.45 < max(areas) < 0.68


@pytest.mark.parametrize("harmed", [lambda o: o.visible < 0.98, lambda o: o.truncated], ids=["hidden", "cut by the border"])
def test_a_third_of_the_objects_is_not_whole(objects, harmed):
    assert 0.2 < np.mean([harmed(o) for o in objects]) < 0.5


def test_every_part_can_be_seen(objects):
    assert np.mean([min(o.parts) > 0.3 for o in objects]) > 0.98


def test_all_coats_and_textures_occur(objects):
    assert {o.texture for o in objects} == set(TEXTURES)
    assert len({o.coat for o in objects}) == 13


def numbers(name):
    pen = D._Pen(64, 30, 34, 20)
    body, front, rear, _ = D.RECIPES[name]
    D._BODIES[body][0](pen, np.full(4, 0.5), front, rear)
    return np.asarray(pen.image)


@pytest.mark.parametrize("family", [CLASSES[:4], CLASSES[4:7], CLASSES[8:]])
def test_a_family_differs_in_its_parts_alone(family):
    drawn = np.stack([numbers(c) for c in family])
    body = (drawn < D._FRONT).all(0)
    assert (drawn[:, body] == drawn[:1, body]).all()
    assert len({d.tobytes() for d in drawn}) == len(family)


def test_no_part_decides_alone_in_the_animal_family_and_distractors_have_none():
    for k in (1, 2):
        parts = [D.RECIPES[c][k] for c in CLASSES[:4]]
        assert sorted(parts.count(p) for p in set(parts)) == [2, 2]
    for draw in D._DISTRACTORS.values():
        pen = D._Pen(64, 32, 32, 15)
        draw(pen, np.full(4, 0.3))
        assert 0 < np.asarray(pen.image).max() < D._FRONT


def test_splits_do_not_overlap():
    first = sorted(base for base, _ in SPLITS.values())
    assert all(b - a >= S._RANGE for a, b in zip(first, first[1:]))
    everything = [i for s in SPLITS for i in Scenes(s, n=20).ids]
    assert len(set(everything)) == len(everything)
    assert {s: len(Scenes(s)) for s in SPLITS} == dict(train=2000, val=500, test=500, pretrain=20_000)


def test_protocol():
    ds = Scenes("val", n=5, size=48)
    assert len(ds) == 5 and ds.classes == CLASSES and ds.ids[4] == ds[4].id == ds[-1].id == "val_000004" and len(list(ds)) == 5
    assert (ds[2].image == Scenes("val", n=400, size=48)[2].image).all()
    assert (Scenes("pretrain", n=2, size=48)[0].label.sum(), len(ds.fingerprint())) == (1, 64)
    prints = {Scenes(*a).fingerprint() for a in (("val", 5, 48), ("val", 6, 48), ("test", 5, 48), ("val", 5, 64))}
    assert len(prints) == 4 and ds.fingerprint() in prints


def same(a, b): return a.id == b.id and all((x == y).all() for x, y in zip(a[1:], b[1:]))


@pytest.mark.parametrize("workers", [0, 1])
def test_cache_holds_the_same_samples(tmp_path, workers):
    plain, kept = Scenes("test", n=60, size=32), Scenes("test", n=60, size=32, cache=tmp_path, workers=workers)
    assert all(same(a, b) for a, b in zip(plain, kept))
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file is left
    kept[0].image[:] = 0
    assert same(plain[0], kept[0])  # a sample is the caller's own
    copy = pickle.loads(pickle.dumps(kept))
    assert same(plain[7], copy[7]) and len(pickle.dumps(kept)) < 5000


def test_broken_cache_is_named_and_drawn_again(tmp_path):
    Scenes("val", n=3, size=32, cache=tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.warns(UserWarning, match=file.name): ds = Scenes("val", n=3, size=32, cache=tmp_path)
    assert same(ds[2], Scenes("val", n=3, size=32)[2])


def test_failed_rendering_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_): raise RuntimeError("out of paint")
    S._probe()
    monkeypatch.setattr(S, "render_scene", broken)
    with pytest.raises(RuntimeError, match="out of paint"): Scenes("val", n=3, size=32, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def written(tmp_path):
    return write_voc(tmp_path / "voc", splits=("train", "val"), n=3, size=32)


def test_write_voc_lists_classes_and_ids(written):
    assert (written / "classes.txt").read_text().split() == list(CLASSES)
    assert (written / "ImageSets/Segmentation/train.txt").read_text().split() == Scenes("train", n=3, size=32).ids


@pytest.mark.parametrize("i", range(3))
def test_write_voc_masks_are_palette_pictures_of_the_same_labels(written, i):
    s = Scenes("train", n=3, size=32)[i]
    png = Image.open(written / f"SegmentationClass/{s.id}.png")
    colors = np.uint8(png.getpalette()).reshape(-1, 3)
    assert png.mode == "P"
    assert (np.asarray(png) == s.mask).all()
    assert np.array_equal(colors, palette()[:len(colors)])


@pytest.mark.parametrize("i", range(3))
def test_write_voc_photographs_lose_little(written, i):
    s = Scenes("train", n=3, size=32)[i]
    assert np.abs(np.asarray(Image.open(written / f"JPEGImages/{s.id}.jpg")).astype(int) - s.image).mean() < 10


def test_write_voc_table_has_the_labels_of_both_splits(written):
    ds = Scenes("train", n=3, size=32)
    head, *rows = [r.split(",") for r in (written / "ImageSets/labels.csv").read_text().splitlines()]
    assert head == ["id", *CLASSES]
    assert [r[0] for r in rows] == [*ds.ids, *(f"val_{i:06d}" for i in range(3))]
    assert [[float(v) for v in r[1:]] for r in rows[:3]] == [s.label.tolist() for s in ds]


def test_write_voc_makes_again_only_what_a_kill_has_left_out(written):
    lost, kept = written / "JPEGImages/val_000001.jpg", written / "JPEGImages/train_000000.jpg"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    write_voc(written, splits=("train", "val"), n=3, size=32)
    assert lost.exists() and kept.stat().st_mtime_ns == before
    assert not list(written.rglob(".*"))


def test_write_voc_refuses_a_folder_of_other_scenes(written):
    with pytest.raises(ValueError, match="choose an empty folder"): write_voc(written, size=48)


def test_voc_reader_gives_the_scenes_back(tmp_path):
    data = pytest.importorskip("adcam.data")
    write_voc(tmp_path, splits="val", n=3, size=32)
    folder, ds = data.VOCFolder(tmp_path, "val"), Scenes("val", n=3, size=32)
    assert tuple(folder.classes) == CLASSES and list(folder.ids) == ds.ids
    for a, b in zip(folder, ds): assert (a.mask == b.mask).all() and (a.label == b.label).all() and np.abs(a.image.astype(int) - b.image).mean() < 10


@pytest.mark.parametrize("call, word", [
    (lambda: render_scene(-1), "non-negative"), (lambda: render_scene(0, 100), "multiple of 16"), (lambda: render_scene(0, 16), "at least 32"),
    (lambda: Scenes("validation"), "choose one of"), (lambda: Scenes("val", n=0), "n=0"), (lambda: Scenes("val", n=10**8), "n=1"),
    (lambda: Scenes(size=100), "multiple of 16")])
def test_refuses(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_refuses_items_that_are_not_there():
    with pytest.raises(IndexError, match="item 5 of 5"): Scenes("val", n=5)[5]
    with pytest.raises(TypeError): render_scene(1.5)
