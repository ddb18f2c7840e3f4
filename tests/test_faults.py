"""Faults of whole kinds: what people hand over, and what a stage does with it. The table of kinds is in tests/README.md.

Every input is made here: a folder of a few noisy pictures, each with one rectangle as mask."""
import argparse
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adcam.data import (COCO2014, check_agreement, check_id, chosen, class_names, coco2014, disagreements, folder, image_of, label_of, mask_of,
                        open_data, read_coco, read_image,
                        read_list, read_mask, skipped_report, usable)
from adcam.photo import explain, read_photo
from adcam.seeds import Seed, check_seed, check_seeds, extract_dataset, load_seed, save_seed

rng = np.random.default_rng(17)


def picture(path, h=40, w=56, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(path, **options)
    return path


def mask(path, label, h=40, w=56):
    from adcam.irnet import save_mask
    m = np.zeros((h, w), np.uint8)
    m[8:30, 10:40] = label
    return save_mask(path, m)


def tree(root, labels, masks=True):
    "A folder of one's own: {id: class names}; the mask of an image has its first class."
    names = sorted({c for cs in labels.values() for c in cs})
    root.mkdir(exist_ok=True)
    for name, cs in labels.items():
        picture(root / f"{name}.png")
        if masks: mask(root / f"masks/{name}.png", names.index(cs[0]) + 1 if cs else 0)
    (root / "labels.csv").write_text("id,labels\n" + "".join(f"{n},{';'.join(cs)}\n" for n, cs in labels.items()))
    return root


@pytest.fixture
def zoo(tmp_path):
    return tree(tmp_path / "zoo", dict(p=["emu"], q=["yak"], r=[], s=["yak", "emu"]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from adcam.classifier import save_weights
    from adcam.conformer import conformer_mini
    torch.manual_seed(3)
    return save_weights(conformer_mini(2), tmp_path_factory.mktemp("w") / "two.safetensors")


@pytest.fixture
def run(capsys):
    "Words of a command line -> exit code and everything that was said."
    from adcam.cli import main
    def call(*words):
        with pytest.raises(SystemExit) as stop: main([str(w) for w in words])
        out = capsys.readouterr()
        return stop.value.code or 0, out.out + out.err
    return call


def seeds_of(ds, out, **changes):
    "Seeds made of masks."
    for i, name in enumerate(ds.ids):
        if not label_of(ds, i).any(): continue
        keys = np.flatnonzero(label_of(ds, i))
        high = np.stack([(mask_of(ds, i) == k + 1) for k in keys]).astype(np.float32)
        save_seed(out / f"{name}.npz", Seed(keys, np.ascontiguousarray(high[:, ::4, ::4]), high))
    return out


# ---- kind 1: which images count

def test_one_place_says_which_images_count(zoo):
    (zoo / "masks/s.png").unlink()
    (zoo / "q.png").write_bytes((zoo / "q.png").read_bytes()[:200])
    ds = folder(zoo, masks="masks", check=False)
    picked = chosen(ds, classes=True, masks=True, decode=True)
    assert (picked.ds.ids, picked.unlabeled, [s.id for s in picked.skipped], picked.total) == (["p"], ["r"], ["s", "q"], 4)
    assert "no mask" in picked.skipped[0].reason and "q.png" in picked.skipped[1].reason
    assert chosen(ds, classes=True).ds.ids == ["p", "q", "s"] and chosen(ds).ds is ds
    assert picked.report().splitlines()[0].startswith("1 of 4 images without a class") and "2 of 4 images were skipped:" in picked.report()


def test_reasons_of_an_earlier_stage_are_told_again_and_a_gap_is_an_error(zoo, tmp_path):
    from adcam.files import write_report
    ds, out = folder(zoo, masks="masks"), tmp_path / "seeds"
    seeds_of(ds, out)
    (out / "q.npz").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 4 seeds, first q.npz; run it again"):
        chosen(ds, classes=True, files=out, suffix=".npz", complete="run it again")
    write_report(out, (0, 1), [("q", "q.png is one pixel high")], ["r"])
    picked = chosen(ds, classes=True, files=out, suffix=".npz", complete="run it again")
    assert (picked.ds.ids, picked.skipped, picked.unlabeled) == (["p", "s"], [("q", "q.png is one pixel high")], ["r"])


def test_the_whole_chain_leaves_out_the_same_images_and_says_so(zoo, weights, tmp_path, run):
    "An image without class from the beginning; an image too long for the walk from there on"
    picture(zoo / "s.png", 8, 4004); mask(zoo / "masks/s.png", 1, 8, 4004)
    data = ("--data", zoo)
    seeds_of(folder(zoo, masks="masks"), tmp_path / "s")
    code, said = run("evaluate", tmp_path / "s", *data)
    assert code == 0 and "3 images of" in said and "1 of 4 images without a class were left out, first r" in said
    code, said = run("irnet", "labels", tmp_path / "s", tmp_path / "l", *data, "--processes", 1)
    assert code == 1 and "2 labels computed" in said and "s: the image is 8x4004 pixels" in said
    code, said = run("irnet", "masks", tmp_path / "s", tmp_path / "m", *data, "--processes", 1)
    assert code == 1 and {p.stem for p in (tmp_path / "m").glob("*.png")} == {"p", "q"}
    code, said = run("segment", "train", "--masks", tmp_path / "m", *data, "--out", tmp_path / "g", "--profile", "mini", "--iterations", 1,
                     "--batch", 2, "--set", "crop=32")
    assert code == 1 and "s: the image is 8x4004 pixels" in said and "1 of 4 images without a class" in said
    code, said = run("segment", "predict", "--weights", tmp_path / "g/weights.safetensors", *data, "--split", "train", "--profile", "mini",
                     "--out", tmp_path / "o", "--processes", 1, "--no-crf")
    assert code == 1 and "3 predictions computed" in said and "3 images of" in said


def test_crf_goes_on_without_the_bad_pair(tmp_path, run):
    for name in "uvw": picture(tmp_path / f"i/{name}.png", 24, 24); mask(tmp_path / f"m/{name}.png", 3, 24, 24)
    (tmp_path / "m/v.png").unlink()
    picture(tmp_path / "i/w.png", 24, 20)
    code, said = run("crf", tmp_path / "i", tmp_path / "m", tmp_path / "o")
    assert code == 1 and [p.name for p in (tmp_path / "o").iterdir()] == ["u.png"] and "v.png" in said and "is 24x24, its image 24x20" in said


def test_a_long_list_of_faults_is_cut():
    from adcam.data import Skipped
    assert skipped_report([Skipped(f"{i}", "torn") for i in range(300)], 400).splitlines()[-1] == "  ... and 250 more"


# ---- kind 2: labels, masks, class lists

@pytest.mark.parametrize("names, want", [
    (["BACKGROUND", "emu", "yak"], ("emu", "yak")), (["_ignore_", "__background__", "emu"], ("emu",)), (["void", "emu"], ("void", "emu"))])
def test_a_leading_background_is_no_class(names, want):
    assert class_names(names, "list") == want


@pytest.mark.parametrize("names, said",
                         [(["emu", "yak", "emu"], "names .'emu'. more than once"), (["emu", "background"], "number 0 in masks"),
                          ([], "names no class"), (["bg"], "names no class"),
                                         ([f"c{i}" for i in range(300)], "up to 254")])
def test_class_lists_that_cannot_be_numbered(names, said):
    with pytest.raises(ValueError, match=said): class_names(names, "list")


@pytest.mark.parametrize("cell, want", [
    ("emu/yak", None), ("emu=1", None), ("(emu, yak)", ("emu", "yak")), ("{'emu'}", ("emu", "yak")), ("None", ("yak",)), ("N/A", ("yak",)),
    ("emu , yak", ("emu", "yak"))])
def test_cells_of_other_programs(tmp_path, cell, want):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text(f'id,labels\na,"{cell}"\nb,yak\n')
    if want is None:
        with pytest.raises(ValueError, match="line 2.*would make a class named"): folder(tmp_path)
    else: assert folder(tmp_path).classes == want


def test_a_cell_that_can_be_read_in_two_ways_is_refused(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text("id,labels\na,snow leopard\nb,emu;yak\n")
    with pytest.raises(ValueError, match="is 'snow leopard' one class or 2"): folder(tmp_path)


def test_masks_of_another_numbering_stop_the_run_before_it_begins(zoo, tmp_path, run):
    for name in "pqs": mask(zoo / f"masks/{name}.png", 255)
    with pytest.raises(ValueError, match=r"3 of 3 images.*the label names emu, the mask holds the ids \[255\]"): check_agreement(folder(zoo, masks="masks"))
    code, said = run("data", "check", "folder", zoo)
    assert code == 1 and "NOT" in said and "emu, yak" in said
    seeds_of(folder(tree(tmp_path / "good", dict(p=["emu"], q=["yak"], r=[], s=["yak", "emu"])), masks="masks"), tmp_path / "s")
    assert run("evaluate", tmp_path / "s", "--data", zoo)[0] == 2
    assert run("segment", "train", "--data", zoo, "--out", tmp_path / "g", "--profile", "mini")[0] == 2


def test_one_odd_mask_among_many_is_no_proof(tmp_path):
    ds = folder(tree(tmp_path / "t", {f"i{n}": ["emu"] if n % 2 else ["yak"] for n in range(6)}), masks="masks")
    mask(ds.root / "masks/i0.png", 1)
    assert [i for i, _ in disagreements(ds)[0]] == ["i0"] and check_agreement(ds) is None


@pytest.mark.parametrize("colors, renumbered", [([(0, 0, 0), (128, 0, 0)], False), ([(128, 0, 0), (0, 0, 0)], True), ([(9, 9, 9), (0, 0, 0)], False)])
def test_colors_that_an_editor_numbered_anew(tmp_path, colors, renumbered):
    "The last: a palette that is not VOC's may have black anywhere"
    im = Image.fromarray(np.eye(4, dtype=np.uint8)); im.putpalette([v for c in colors for v in c]); im.save(tmp_path / "m.png")
    if renumbered:
        with pytest.raises(ValueError, match="another order.*black is number 1"): read_mask(tmp_path / "m.png", 3)
    else: assert read_mask(tmp_path / "m.png", 3).sum() == 4


# ---- kind 3: nothing that is not finite

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_seed_that_is_no_number_is_neither_written_nor_read(tmp_path, value):
    good = Seed(np.array([1]), np.ones((1, 2, 2), np.float32), np.ones((1, 8, 8), np.float32))
    bad = good._replace(high_res=good.high_res * np.float32(value))
    with pytest.raises(ValueError, match="high_res hold NaN or infinity"): save_seed(tmp_path / "a.npz", bad)
    assert not list(tmp_path.iterdir())
    np.savez(tmp_path / "a.npz", **bad._asdict())
    for read in (load_seed, check_seed):
        with pytest.raises(ValueError, match="a.npz: high_res hold NaN"): read(tmp_path / "a.npz")


def test_seeds_check_and_evaluate_name_the_file_with_nan(zoo, tmp_path, run):
    ds = folder(zoo, masks="masks")
    out = seeds_of(ds, tmp_path / "s")
    s = load_seed(out / "q.npz")
    np.savez(out / "q.npz", keys=s.keys, cam=s.cam * np.nan, high_res=s.high_res)
    assert [i for i, _ in check_seeds(out, ds)["damaged"]] == ["q"]
    for words in (("seeds-check", out), ("evaluate", out)):
        code, said = run(*words, "--data", zoo)
        assert code == 1 and "q.npz: cam hold NaN or infinity" in said


def test_weights_with_one_infinity_are_told_before_the_first_image(zoo, tmp_path, weights):
    from adcam.conformer import conformer_mini
    net = conformer_mini(2, checkpoint=weights)
    net.trans_norm.weight.data[4] = float("inf")
    with pytest.raises(ValueError, match="weights hold NaN or infinity, in trans_norm.weight"):
        extract_dataset(net, folder(zoo, masks="masks"), tmp_path / "s", "cam", progress=False)


def test_an_empty_map_is_not_shown_without_a_word():
    from adcam.branches import TwoBranch
    net = TwoBranch("test_resnet", "test_vit", 3).eval()
    net.conv_cls_head.weight.data[1] = -100
    notes = explain(np.full((48, 48, 3), 200, np.uint8), [1], model=net, size=64, methods="cam").notes
    assert any("the map of CAM is empty for class 1" in n for n in notes)


# ---- item 5 of the devices' list: masks only where they are needed

def test_a_torn_mask_costs_no_seed_no_label_and_no_prediction(zoo, weights, tmp_path, run):
    (zoo / "masks/p.png").write_bytes(b"torn")
    words = ("--data", zoo, "--weights", weights, "--method", "cam", "--scales", 0.5, "--no-flip")
    code, said = run("seeds", "--out", tmp_path / "s", *words)
    assert code == 0 and "3 seeds computed" in said
    code, said = run("irnet", "labels", tmp_path / "s", tmp_path / "l", "--data", zoo, "--processes", 1)
    assert code == 0 and "3 labels computed" in said
    code, said = run("evaluate", tmp_path / "s", "--data", zoo)
    assert code == 1 and "2 images of" in said and "cannot read mask" in said


def test_views_of_segmentation_and_boundaries_open_no_mask_of_the_data(zoo, tmp_path):
    from adcam.deeplab import deeplabv2_mini
    from adcam.irnet import IRViews
    from adcam.segment import SegConfig, SegViews
    for name in "pqrs": mask(tmp_path / f"m/{name}.png", 1)
    for f in (zoo / "masks").iterdir(): f.write_bytes(b"torn")
    ds = folder(zoo, masks="masks")
    assert SegViews(ds, tmp_path / "m", deeplabv2_mini(3), SegConfig(crop=32))[0, 1][1].shape == (32, 32)
    assert IRViews(ds, tmp_path / "m", crop=32)[0][1].shape == (8, 8)


def coco_tree(root, annotations, **info):
    (root / "annotations").mkdir(parents=True)
    picture(root / "val2014/x.jpg"), picture(root / "val2014/y.jpg")
    box = dict(id=90, image_id=2, category_id=4, iscrowd=0, segmentation=[[4, 4, 20, 4, 20, 30]], bbox=[4, 4, 16, 26])
    body = dict(images=[dict(id=1, file_name="x.jpg", height=40, width=56) | info, dict(id=2, file_name="y.jpg", height=40, width=56)],
                categories=[dict(id=4, name="emu"), dict(id=9, name="yak")], annotations=[*annotations, box])
    (root / "annotations/instances_val2014.json").write_text(json.dumps(body))
    return root


def test_no_mask_of_coco_is_painted_for_labels_seeds_and_training(tmp_path, monkeypatch):
    ds = coco2014(coco_tree(tmp_path / "c", [dict(id=1, image_id=1, category_id=9, segmentation=[[0, 0, 9, 0, 9, 9]], bbox=[0, 0, 9, 9])]), "val", strict=False)
    def never(*a, **k): raise AssertionError("a mask was painted")
    monkeypatch.setattr("adcam.data.coco_mask", never)
    assert image_of(ds, 0).shape == (40, 56, 3) and label_of(ds, 0).tolist() == [0, 1] and len(chosen(ds, classes=True, masks=True).ds) == 2
    assert usable(ds, masks=False)[1] == [] and len(ds.fingerprint()) == 64


# ---- kind 4: one reader

def deep(values): return Image.fromarray(np.asarray(values, np.uint16).reshape(32, 32))


@pytest.mark.parametrize("make", [
    lambda: Image.fromarray(np.dstack([np.full((32, 32, 3), 7, np.uint8), np.tri(32, dtype=np.uint8) * 255])),
    lambda: Image.fromarray(np.dstack([np.full((32, 32), 90, np.uint8), np.eye(32, dtype=np.uint8) * 80]), "LA"),
    lambda: deep(np.linspace(0, 65535, 1024)), lambda: deep(np.linspace(0, 1023, 1024)), lambda: Image.new("CMYK", (32, 32), (20, 90, 0, 30)),
    lambda: Image.new("P", (32, 32), 3), lambda: Image.new("1", (32, 32), 1)],
    ids=["RGBA", "LA", "16 bits", "10 bits", "CMYK", "palette", "bits"])
def test_explain_training_and_seeds_see_the_same_picture(tmp_path, make):
    im = make()
    path = tmp_path / ("x.tiff" if im.mode == "CMYK" else "x.png")
    im.save(path)
    assert np.array_equal(read_photo(path).pixels, read_image(path)) and read_image(path).shape == (32, 32, 3)


def test_twelve_bits_are_not_black_and_sixteen_are_not_white(tmp_path):
    deep(np.linspace(0, 4000, 1024)).save(tmp_path / "a.png"), deep(np.linspace(0, 60000, 1024)).save(tmp_path / "b.png")
    assert 240 < read_image(tmp_path / "a.png").max() < 255 and 225 < read_image(tmp_path / "b.png").max() < 240
    assert any("12 bits" in n for n in read_photo(tmp_path / "a.png").notes)


@pytest.mark.parametrize("exif",
                         [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0garbage",
                          b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"], ids=["cut", "noise", "orientation 99"])
def test_broken_exif_costs_no_picture(tmp_path, exif):
    picture(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg", exif=True).shape == read_photo(tmp_path / "x.jpg").pixels.shape == (40, 56, 3)


# ---- kind 5: files as people have them

@pytest.mark.parametrize("line, want", [
    ("/JPEGImages/2007_01.JPEG /SegmentationClass/2007_01.png", "2007_01"), ("JPEGImages\\a b.Jpg", "a b"), ("x.y.png 1 0 1", "x.y"),
    ("plain 1", "plain"), ("./im.webp\tmask.png", "im")])
def test_lines_of_lists(tmp_path, line, want):
    (tmp_path / "l.txt").write_text(line + "\r\n")
    assert read_list(tmp_path / "l.txt") == [want]


def test_any_suffix_and_linked_folders(tmp_path):
    picture(tmp_path / "far/a.JPG", format="JPEG"); picture(tmp_path / "far/b.webp"); picture(tmp_path / "far/deeper/c.Bmp", format="BMP")
    root = tmp_path / "mine"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "JPEGImages").symlink_to(tmp_path / "far", target_is_directory=True)
    (root / "ImageSets/Segmentation/t.txt").write_text("a\nb\n")
    assert [image_of(open_data(root, "t"), i).shape for i in (0, 1)] == [(40, 56, 3)] * 2
    own = tmp_path / "own"
    own.mkdir()
    (own / "photos").symlink_to(tmp_path / "far", target_is_directory=True), (tmp_path / "far/back").symlink_to(own, target_is_directory=True)
    (own / "labels.csv").write_text("id,labels\nphotos/a,emu\nb,yak\nc,emu\n")
    assert folder(own).ids == ["photos__a", "photos__b", "photos__deeper__c"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_latin_1_name_is_found_by_its_letters(tmp_path):
    picture(tmp_path / "x.png")
    try: os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError: pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "labels.csv").write_text("id,labels\ncafé,emu\n", encoding="utf-8")
    ds = folder(tmp_path)
    assert ds.ids == ["café"] and image_of(ds, 0).shape == (40, 56, 3) and len(ds.fingerprint()) == 64


# ---- kind 6: foreign JSON

@pytest.mark.parametrize("annotation, said", [
    (dict(category_id=77), "category 77"), (dict(category_id=None), "category None"), (dict(segmentation=[[1, 2, 3]]), "no list of pairs"),
    (dict(segmentation=[[1, 2, 3, float("nan"), 5, 6]]), "no list of pairs"),
    (dict(segmentation=[[0, 0, 1e12, 0, 5, 5]]), "below 100000"), (dict(segmentation=dict(counts=[1, 2], size=[40, 56])), "cover 3 pixels"),
    (dict(segmentation=dict(counts="zzzz~", size=[40, 56])), "run lengths"),
    (dict(segmentation="box"), "outline is str"), (dict(bbox=None), "neither outline nor box")])
def test_a_fault_of_one_annotation_costs_one_image(tmp_path, annotation, said):
    ds = coco2014(coco_tree(tmp_path / "c", [dict(dict(id=1, image_id=1, category_id=9, bbox=[1, 1, 5, 5]), **annotation)]), "val", strict=False)
    good, skipped = usable(ds, masks=False)
    assert good.ids == ["y"] and [s.id for s in skipped] == ["x"] and said in skipped[0].reason and "x.jpg" in skipped[0].reason


def test_boxes_are_labels_but_no_masks_and_flat_outlines_are_both(tmp_path):
    ds = coco2014(coco_tree(tmp_path / "a", [dict(id=1, image_id=1, category_id=9, bbox=[1, 1, 5, 5])]), "val", strict=False)
    assert label_of(ds, 0).tolist() == [0, 1]
    with pytest.raises(ValueError, match="only a box"): mask_of(ds, 0)
    ds = coco2014(coco_tree(tmp_path / "b", [dict(id=1, image_id=1, category_id=9, segmentation=[4, 4, 20, 4, 20, 20, 4, 20])], height=None), "val",
                  strict=False)
    assert mask_of(ds, 0)[10, 10] == 2 and isinstance(ds, COCO2014)


def test_compressed_run_lengths_are_read_as_pycocotools_does(tmp_path):
    from pycocotools import mask as m
    want = np.zeros((40, 56), np.uint8); want[3:30, 5:50] = 1; want[10, 10] = 0
    rle = m.encode(np.asfortranarray(want))
    ds = coco2014(coco_tree(tmp_path / "c", [dict(id=1, image_id=1, category_id=9, segmentation=dict(size=[40, 56], counts=rle["counts"].decode()))]),
                  "val", strict=False)
    assert np.array_equal(mask_of(ds, 0), 2 * want)


@pytest.mark.parametrize("text, said",
                         [("null", "no object"), ('{"images": {}, "annotations": [], "categories": []}', "images is no list"), ("[" * 100_000, "cannot read"),
                                        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "image 1 has no file_name"),
                                        ('{"images": [], "annotations": [], "categories": []}', "defines no category"),
                                        ('{"images": [], "annotations": [3], "categories": []}', "annotations is no list of objects")])
def test_what_is_no_coco_file(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said): read_coco(tmp_path / "a.json")


# ---- kind 7: networks probed as they are used

@pytest.mark.parametrize("cnn, size", [("dla34", (48, 80)), ("convnext_atto", (16, 96))])
def test_a_cnn_gets_a_size_that_it_takes(cnn, size):
    from adcam.branches import TwoBranch
    from adcam.cnn import CamNet
    x = torch.randn(1, 3, *size)
    net = TwoBranch(cnn, "test_vit", 3).eval()
    with torch.no_grad(): assert net.maps(x).cam.shape[2:] == net.grid(size)
    if cnn == "dla34":
        with torch.no_grad(): assert CamNet(cnn, 3).eval().maps(x).cam.shape[2:] == (2, 3)


# ---- kind 8: one loader

@pytest.mark.parametrize("wrap", [
    lambda s: dict(net=s), lambda s: dict(state_dict=dict(model=s)), lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, lambda s: dict(s, epoch=3),
    lambda s: dict(epoch=1, ema={"n_averaged": torch.tensor(4)} | {f"module.{k}": v for k, v in s.items()},
                   args=argparse.Namespace(lr=.1, name="x"))], ids=["net", "nested", "compiled and parallel", "epoch beside", "ema and args"])
def test_training_checkpoints_of_other_programs(tmp_path, wrap):
    from adcam.cnn import load_cam, resnet_mini
    net, other = resnet_mini(3), resnet_mini(3)
    torch.save(wrap(net.state_dict()), tmp_path / "x.pth")
    load_cam(other, tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))


def test_the_difference_of_a_pair_is_named(tmp_path):
    from adcam.branches import TwoBranch
    torch.save(TwoBranch("test_resnet", "test_vit", 4).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"of other shape .*conv_cls_head.weight \(4, \d+\) instead of \(5, "):
        TwoBranch("test_resnet", "test_vit", 5, checkpoint=tmp_path / "x.pth")


# ---- kind 9: the command line

@pytest.mark.parametrize("words, said", [
    (["paper", "fig5", "-p", "a: b: c=1"], "no parameter"), (["paper", "fig5", "-p", "k={1"], "no YAML"), (["profile", "x"], "no profile"),
    (["crf", ".", ".", "o", "--preset", "x"], "unknown preset"),
    (["seeds", "--out", "o", "--option", "k"], "no pair"), (["segment", "train", "--out", "o", "--set", "patience=ten"], "whole number, or none"),
    (["segment", "train", "--out", "o", "--set", "freeze_bn=2"], "true or false")])
def test_bad_words_are_one_line_and_exit_code_2(run, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = run(*words)
    assert code == 2 and said in text and "Traceback" not in text


def test_words_of_options_mean_what_they_say():
    from adcam.cli import _value
    assert ([_value(w) for w in ("true", "False", "none", "3", "1e-3", "(1, 2)", "adam", "__import__('os')")]
            == [True, False, None, 3, 1e-3, (1, 2), "adam", "__import__('os')"])


def test_missing_packages_are_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "papermill", None)
    code, said = run("paper", "fig5", "--out", tmp_path)
    assert code == 2 and "papermill" in said and "pip install" in said


def test_a_missing_network_is_told_at_once(monkeypatch):
    import requests
    from huggingface_hub import constants
    from adcam.branches import TwoBranch
    asked = []
    def gone(url, timeout): asked.append(timeout); raise requests.ConnectionError("no route")
    monkeypatch.setattr(requests, "head", gone); monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="cannot be reached.*--cnn-weights FILE"): TwoBranch("resnet10t", "test_vit", pretrained=True)
    assert asked == [5]


def test_remedies_are_options(tmp_path, run, weights):
    root = coco_tree(tmp_path / "c", [])
    code, said = run("seeds", "--data", root, "--split", "val", "--out", tmp_path / "s", "--weights", weights)
    assert code == 2 and "coco:DIR takes the folder as it is" in said and len(open_data(f"coco:{root}", "val")) == 2
    picture(tmp_path / "p.png", 24, 24)
    code, said = run("explain", tmp_path / "p.png", "--max-megapixels", 0.0001, "--random-weights", "--out", tmp_path / "o.png")
    assert code == 2 and "--max-megapixels" in said
    (tmp_path / "d").mkdir(); picture(tmp_path / "d/a.png"); (tmp_path / "d/labels.csv").write_text("id,emu,yak\na,1,0\n")
    code, said = run("seeds", "--data", tmp_path / "d", "--out", tmp_path / "t", "--weights", weights, "--scales", 1, "-k", 50)
    assert code == 2 and "--option clip_k=true" in said


# ---- kind 10: the kernel

def test_the_kernel_is_this_interpreter(tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager
    from adcam.cli import _own_kernel
    fake = tmp_path / "kernels/python3"
    fake.mkdir(parents=True)
    (fake / "kernel.json").write_text(json.dumps(dict(argv=["/bin/false"], display_name="x", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert KernelSpecManager().get_kernel_spec("python3").argv == ["/bin/false"]
    with _own_kernel(): assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable
    assert os.environ["JUPYTER_PATH"] == str(tmp_path)


# ---- kind 11: natural arguments

@pytest.mark.parametrize("classes", [np.uint8(2), torch.tensor(2), np.array([2]), (np.int32(2),), torch.tensor([[2]])])
def test_numbers_of_numpy_and_torch_are_numbers(classes):
    from adcam.branches import TwoBranch
    assert explain(np.zeros((48, 48, 3), np.uint8), classes, model=TwoBranch("test_resnet", "test_vit", 4).eval(), size=64).indices == (2,)


def test_wrapped_and_wrong_networks():
    from adcam.branches import TwoBranch
    from adcam.cnn import CamNet
    image, net = np.zeros((48, 48, 3), np.uint8), TwoBranch("test_resnet", "test_vit", 4).eval()
    assert explain(image, 1, model=torch.nn.DataParallel(torch.nn.DataParallel(net)), size=64).indices == (1,)
    with pytest.raises(ValueError, match="ad_cam needs attention|ts_cam needs attention"): explain(image, 1, model=CamNet("test_resnet", 4).eval(), size=64)
    with pytest.raises(ValueError, match="Linear has no maps"): explain(image, 1, model=torch.nn.Linear(2, 2), size=64)
    from adcam.seeds import extract
    with pytest.raises(ValueError, match=r"half precision \(float16\); call model.float\(\)"): extract(net.half(), image, np.eye(4)[1], "cam")


# ---- kind 13: hostile input

class Bomb:
    "What a pickle would run"
    def __reduce__(self): return os.mkdir, ("pickle-was-executed",)


def test_nothing_in_weights_and_seeds_is_executed(tmp_path, monkeypatch):
    from adcam.conformer import read_weights
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model={"a": torch.zeros(1)}, extra=Bomb()), tmp_path / "x.pth")
    np.savez(tmp_path / "x.npz", keys=np.array([Bomb()], object), cam=np.zeros((1, 1, 1)), high_res=np.zeros((1, 1, 1)))
    for read, path in ((read_weights, "x.pth"), (load_seed, "x.npz")):
        with pytest.raises(ValueError, match=path): read(tmp_path / path)
    assert not (tmp_path / "pickle-was-executed").exists()


def test_a_header_that_claims_terabytes_gets_no_memory(tmp_path):
    import io
    import zipfile
    from adcam.conformer import read_weights
    def npy(shape):
        f = io.BytesIO()
        np.lib.format.write_array_header_1_0(f, dict(descr="<f4", fortran_order=False, shape=shape))
        return f.getvalue() + b"\0" * 64
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z:
        for name, shape in (("keys", (1,)), ("cam", (1, 2**20, 2**20)), ("high_res", (1, 2, 2))): z.writestr(f"{name}.npy", npy(shape))
    with pytest.raises(ValueError, match="not a readable seed file.*claims"): load_seed(tmp_path / "a.npz")
    head = json.dumps(dict(w=dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42]))).encode()
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ValueError, match="not a readable weights file"): read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "a\\b", "a\0b", ""])
def test_an_id_cannot_lead_out_of_the_output_folder(tmp_path, name):
    with pytest.raises(ValueError, match="an id is a file name without folder"): check_id(name, "list")
    if name.strip() and "\0" not in name and "\\" not in name:
        (tmp_path / "l.txt").write_text(name + "\n")
        with pytest.raises(ValueError, match="without folder"): read_list(tmp_path / "l.txt")


def test_coco_names_cannot_lead_out_of_the_folder(tmp_path):
    ds = coco2014(coco_tree(tmp_path / "c", [], file_name="../../secret.jpg"), "val", strict=False, check=False)
    assert ds.image_path(0) == tmp_path / "c/val2014/secret.jpg"
    with pytest.raises(ValueError, match="leads out of the folder"): ds.label(0)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [yaml-was-executed]", "&a [*a]", "k: !!python/name:os.system"])
def test_yaml_is_data(tmp_path, monkeypatch, text):
    from adcam.cli import _yaml
    monkeypatch.chdir(tmp_path)
    try: _yaml(text, "p.yaml")
    except ValueError as e: assert "is no YAML" in str(e)
    assert not list(tmp_path.iterdir())


def test_a_poisoned_cache_is_computed_again(tmp_path, monkeypatch):
    from adcam import pipeline
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "cache_dir", lambda *a: tmp_path / "cache")
    compute = lambda: dict(a=np.arange(3))
    first = pipeline.stage("t", dict(x=1), compute)
    for f in (p for p in (tmp_path / "cache").rglob("*") if p.is_file()):
        np.savez(tmp_path / "evil.npz", a=np.array([Bomb()], object))
        f.write_bytes((tmp_path / "evil.npz").read_bytes())
    again = pipeline.stage("t", dict(x=1), compute)
    assert np.array_equal(again.value["a"], first.value["a"]) and not (tmp_path / "pickle-was-executed").exists()


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    import struct
    import zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "b.png").write_bytes(png)
    for read in (read_image, lambda p: read_mask(p, 3), read_photo):
        with pytest.raises(ValueError, match="too large|million pixels"): read(tmp_path / "b.png")
