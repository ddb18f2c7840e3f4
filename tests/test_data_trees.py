"""adcam.data: PASCAL VOC 2012, COCO 2014, folders of one's own, broken files, and parts of data sets."""
import json, os, pickle, struct, subprocess, sys, zlib
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch.utils.data import DataLoader

from adcam import data
from adcam.data import (COCO_CLASSES, COCO_COUNTS, KINDS, VOC_CLASSES, VOC_COUNTS, COCO2014, Folder, Skipped, Subset, TrainViews, VOCFolder, coco2014, coco_label,
                        coco_mask, folder, imagenet_normalize, label_of, labelled, open_data, random_crop, random_flip, random_resize_long, random_view,
                        read_coco, read_image, read_list, read_mask, skipped_report, to_chw, to_tensor, usable, voc2012, voc_root, weak_of)
from adcam.scenes import Sample, Scenes, write_voc

MINI = Path(os.environ.get("ADCAM_COCO_MINI") or Path(__file__).parents[2]/"shared/data/coco_mini")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0.11 under NumPy 2
needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason="coco_mini is not here")
BASE = ("dog", "cat", "car")  # classes of Scenes that VOC has, too


def photo(h=40, w=60, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
def save(path, a, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, **kw)


# ---- PASCAL VOC 2012

@pytest.fixture(scope="module")
def voc_tree(tmp_path_factory):
    "What adcam.scenes.write_voc makes, turned into VOC 2012: XML instead of the table, VOC's ids, its lists, SBD masks for train_aug"
    top = tmp_path_factory.mktemp("voc")
    root = write_voc(top/"VOCdevkit/VOC2012", ("train", "val"), n=4, size=64)
    scenes = {split: Scenes(split, 4, 64) for split in ("train", "val")}
    to_voc = np.array([0]+[VOC_CLASSES.index(c)+1 if c in VOC_CLASSES else 0 for c in scenes["train"].classes], np.uint8)
    (root/"ImageSets/labels.csv").unlink(), (root/"classes.txt").unlink()
    (root/"Annotations").mkdir(), (root/"SegmentationClassAug").mkdir()
    for ds in scenes.values():
        for s in ds:
            names = [ds.classes[k] for k in np.flatnonzero(s.label) if ds.classes[k] in VOC_CLASSES]
            objects = "".join(f"<object><name>{c}</name><difficult>{n % 2}</difficult><part><name>head</name></part></object>" for n, c in enumerate(names))
            (root/f"Annotations/{s.id}.xml").write_text(f"<annotation><filename>{s.id}.jpg</filename>{objects}</annotation>")
            Image.fromarray(to_voc[s.mask]).save(root/f"SegmentationClass/{s.id}.png")
    sbd = "2008_000002"
    save(root/f"JPEGImages/{sbd}.jpg", photo(64, 64))
    save(root/f"SegmentationClassAug/{sbd}.png", np.full((64, 64), 15, np.uint8))
    save(root/"SegmentationClassAug/train_000000.png", np.full((64, 64), 3, np.uint8))  # VOC's own mask goes before
    (root/f"Annotations/{sbd}.xml").write_text("<annotation><object><name>person</name></object></annotation>")
    lists, ids = root/"ImageSets/Segmentation", {s: ds.ids for s, ds in scenes.items()}
    for name, members in (("trainval", ids["train"]+ids["val"]), ("train_aug", ids["train"]+[sbd]), ("test", [sbd])):
        (lists/f"{name}.txt").write_text("\n".join(members)+"\n")
    return top


@pytest.fixture
def voc(voc_tree, tmp_path):
    import shutil
    return Path(shutil.copytree(voc_tree, tmp_path/"VOC é 2012"))/"VOCdevkit/VOC2012"


@pytest.fixture
def small_voc(monkeypatch): monkeypatch.setattr(data, "VOC_COUNTS", dict(train=4, val=4, trainval=8, test=1, train_aug=5))


def test_official_counts(): assert VOC_COUNTS=={"train": 1464, "val": 1449, "trainval": 1464+1449, "test": 1456, "train_aug": 10582}


@pytest.mark.parametrize("level", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_at_three_levels(voc_tree, level): assert voc_root(voc_tree/level)==voc_tree/"VOCdevkit/VOC2012"


def test_voc_labels_are_those_of_the_xml(voc_tree, small_voc):
    ds, scenes = voc2012(voc_tree, "train"), Scenes("train", 4, 64)
    assert ds.ids==scenes.ids and ds.classes==VOC_CLASSES and len(ds)==4
    for a, b in zip(ds, scenes):
        want = {scenes.classes[k] for k in np.flatnonzero(b.label)} & set(VOC_CLASSES)
        assert {VOC_CLASSES[k] for k in np.flatnonzero(a.label)}==want and a.label.shape==(20,)
        assert ((a.mask>0)<=(b.mask>0)).all() and {VOC_CLASSES[k-1] for k in np.unique(a.mask) if k}==want


def test_voc_train_aug(voc_tree, small_voc):
    ds = voc2012(voc_tree, "train_aug")
    assert len(ds)==5 and ds[4].mask.min()==ds[4].mask.max()==15 and ds[4].label.tolist()==[c=="person" for c in VOC_CLASSES]
    assert np.array_equal(ds[0].mask, voc2012(voc_tree, "train")[0].mask)


def test_voc_test_has_no_labels_and_no_masks(voc_tree, small_voc):
    ds = voc2012(voc_tree, "test")
    s = ds[0]
    assert s.mask is None and s.label.shape==(20,) and not s.label.any() and s.image.shape==(64, 64, 3)
    assert len(ds.fingerprint())==64
    for f in (lambda: ds.label(0), lambda: ds.weak(0), lambda: TrainViews(ds)[0], lambda: labelled(ds)):
        with pytest.raises(ValueError, match="images of test have no labels"): f()
    assert usable(ds)==usable(ds, masks=False)==(ds, []) and not Subset(ds).has_labels


@pytest.mark.parametrize("split", VOC_COUNTS)
def test_voc_wrong_counts(voc_tree, split):
    with pytest.raises(FileNotFoundError, match=rf"instead of {VOC_COUNTS[split]:,}.*adcam data get voc2012 DIR.*adcam data check voc2012 DIR.*strict=False"):
        voc2012(voc_tree, split)
    assert len(voc2012(voc_tree, split, strict=False))<9


def test_voc_names_everything_that_is_missing(voc, small_voc):
    (voc/"Annotations/train_000001.xml").unlink(), (voc/"SegmentationClass/train_000002.png").unlink(), (voc/"SegmentationClass/train_000003.png").unlink()
    said = "missing in Annotations: 1 of 4, first train_000001.xml; missing in SegmentationClass: 2 of 4, first train_000002.png"
    with pytest.raises(FileNotFoundError, match=said):
        voc2012(voc, "train")
    ds = voc2012(voc, "train", strict=False)
    assert ds[2].mask is None
    with pytest.raises(FileNotFoundError, match="no annotation .*train_000001.xml"): ds[1]


@pytest.mark.parametrize("harm,words", [
    (lambda v: (v/"ImageSets/Segmentation/train_aug.txt").unlink(), "no list .*train_aug.txt.*adcam data get voc2012 DIR"),
    (lambda v: (v/"JPEGImages/2008_000002.jpg").unlink(), "1 of 5 listed images have no image.*adcam data get voc2012 DIR")])
def test_voc_incomplete(voc, small_voc, harm, words):
    harm(voc)
    with pytest.raises(FileNotFoundError, match=words): voc2012(voc, "train_aug")


def test_voc_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="no VOC 2012 in .*adcam data get voc2012 DIR"): voc2012(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'aug'; it has train, val"): voc2012(tmp_path, "aug")


def test_voc_ignores_a_table(voc, small_voc):
    "A labels.csv of somebody else does not go before the XML"
    (voc/"ImageSets/labels.csv").write_text("id,cat\n")
    assert voc2012(voc, "train").label(0).sum()>0


# ---- COCO 2014

def box(l, t, r, b): return [[l, t, r, t, r, b, l, b]]


def coco_tree(root, split="val2014"):
    "Image 7: dog, then a person over it; 3: a crowd and a dog; 5: nothing; 9: a toothbrush and a person whose outline is too thin"
    crowd = dict(size=[32, 48], counts=[0, 32*20, 32*28])
    rows = [(7, 18, box(4, 4, 30, 24), 0), (7, 1, box(20, 10, 44, 28), 0), (3, 90, crowd, 1), (3, 18, box(30, 5, 40, 25), 0), (9, 90, box(8, 8, 20, 20), 0),
            (9, 1, [[1, 1, 5, 5]], 0)]
    anns = [dict(id=n+1, image_id=i, category_id=c, segmentation=s, iscrowd=w, area=1, bbox=[0, 0, 1, 1]) for n, (i, c, s, w) in enumerate(rows)]
    body = dict(images=[dict(id=i, width=48, height=32, file_name=f"COCO_{split}_{i:012d}.jpg") for i in (7, 3, 5, 9)], annotations=anns,
                categories=[dict(id=90, name="toothbrush"), dict(id=1, name="person"), dict(id=18, name="dog")])
    (root/"annotations").mkdir(parents=True)
    (root/f"annotations/instances_{split}.json").write_text(json.dumps(body))
    for f in body["images"]: save(root/split/f["file_name"], photo(32, 48, f["id"]))
    return root


@pytest.fixture
def coco(tmp_path): return coco_tree(tmp_path/"coco 2014")


def test_coco_classes_and_counts():
    assert len(COCO_CLASSES)==len(set(COCO_CLASSES))==80 and COCO_CLASSES[0]=="person" and COCO_CLASSES[79]=="toothbrush"
    assert COCO_COUNTS=={"train2014": 82783, "val2014": 40504}


def test_coco_labels_and_masks(coco):
    ds = coco2014(coco, "val", strict=False)
    assert ds.ids==[f"COCO_val2014_{i:012d}" for i in (3, 5, 7, 9)] and ds.classes==("person", "dog", "toothbrush")
    assert [s.label.tolist() for s in ds]==[[0, 1, 0], [0, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert [set(np.unique(s.mask)) for s in ds]==[{0, 2}, {0}, {0, 1, 2}, {0, 3}]
    over = ds[2].mask
    assert (over[11:27, 21:43]==1).all() and (over[5:9, 5:29]==2).all() and over[0, 0]==0, "the later annotation wins"
    assert (ds[0].mask[:, :20]==0).all(), "a crowd is not painted"


def test_coco_mask_is_the_slow_painting(coco):
    anns = read_coco(coco/"annotations/instances_val2014.json")
    for i in (7, 3, 5):
        want = np.zeros((32, 48), np.uint8)
        for a in [a for a in anns.dataset["annotations"] if a["image_id"]==i and not a["iscrowd"]]:
            painted = anns.annToMask(a)
            for y in range(32):
                for x in range(48):
                    if painted[y, x]: want[y, x] = {1: 1, 18: 2, 90: 3}[a["category_id"]]
        assert np.array_equal(coco_mask(anns, i), want)
        assert set(np.unique(want))-{0}<={k+1 for k in np.flatnonzero(coco_label(anns, i))}


def test_coco_converted_masks_are_preferred(coco):
    before = coco2014(coco, "val", strict=False)
    print_before = before.fingerprint()
    for s in before: save(coco/f"SegmentationClass/{s.id}.png", s.mask)
    after = coco2014(coco, "val2014", strict=False)
    assert after.fingerprint()==print_before, "a converted mask is no new data"
    (coco/"annotations/instances_val2014.json").rename(coco/"annotations/away.json")
    after._coco = None  # as in a worker process: the masks come from the PNGs, so the annotations are not needed
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(after, before))


def test_coco_without_its_annotations_after_pickling(coco):
    ds = coco2014(coco, "val", strict=False)
    blob = pickle.dumps(ds)
    assert b"segmentation" not in blob and len(blob)<5000
    back = pickle.loads(blob)
    assert all(np.array_equal(a.mask, b.mask) and np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label) for a, b in zip(back, ds))


def test_coco_fingerprint_sees_annotations_and_images(coco):
    path = coco/"annotations/instances_val2014.json"
    before = coco2014(coco, "val", strict=False).fingerprint()
    assert before==coco2014(coco, "val", strict=False).fingerprint()
    path.write_text(path.read_text().replace("[[4, 4", "[[5, 4"))
    after = coco2014(coco, "val", strict=False).fingerprint()
    save(coco/"val2014/COCO_val2014_000000000005.jpg", photo(32, 48, 99))
    assert len({before, after, coco2014(coco, "val", strict=False).fingerprint()})==3


@pytest.mark.parametrize("layout", ["images/val2014", "JPEGImages"])
def test_coco_layouts(coco, layout):
    (coco/"images").mkdir()
    (coco/"val2014").rename(coco/layout)
    assert coco2014(coco, "val", strict=False)[0].image.shape==(32, 48, 3)


@pytest.mark.parametrize("harm,error,words", [
    (lambda c: (c/"annotations/instances_val2014.json").unlink(), FileNotFoundError, "instances_val2014.json; `adcam data get coco2014 DIR`"),
    (lambda c: (c/"annotations/instances_val2014.json").write_text('{"images": ['), ValueError, "cannot read annotations .*instances_val2014.json.*download"),
    (lambda c: (c/"annotations/instances_val2014.json").write_text("[1]"), ValueError, "cannot read annotations"),
    (lambda c: (c/"annotations/instances_val2014.json").write_text('{"images": []}'), ValueError, "no annotations, categories; expected an instances"),
    (lambda c: (c/"annotations/instances_val2014.json").write_text((c/"annotations/instances_val2014.json").read_text().replace("000003.jpg",
        "000005.jpg")), ValueError, "names an image twice"),
    (lambda c: (c/"val2014/COCO_val2014_000000000009.jpg").unlink(), FileNotFoundError, "1 of 4 listed images have no image")])
def test_coco_broken(coco, harm, error, words):
    harm(coco)
    with pytest.raises(error, match=words): coco2014(coco, "val", strict=False)


def test_coco_strict(coco):
    with pytest.raises(FileNotFoundError, match="4 images and 3 classes instead of 40,504 and 80.*adcam data check coco2014 DIR"): coco2014(coco, "val")
    with pytest.raises(ValueError, match="no split 'test2014'"): coco2014(coco, "test")
    with pytest.raises(FileNotFoundError, match="no folder"): coco2014(coco/"x", "val")


def test_coco_mask_of_other_size(coco):
    save(coco/"val2014/COCO_val2014_000000000007.jpg", photo(48, 32))
    with pytest.raises(ValueError, match="COCO_val2014_000000000007 .* is 32x48, its image 48x32.*turned by 90 degrees"): coco2014(coco, "val", strict=False)[2]


@needs_mini
def test_coco_on_photographs(tmp_path):
    "Masks of coco_mini, written as RLE annotations of a COCO tree, come back as they were"
    meta = json.loads((MINI/"meta.json").read_text())
    picked = sorted(meta["images"], key=lambda m: len(m["coco80"]))[:5]+meta["images"][:3]  # three hold no class at all
    cats, images, anns = {c["id80"]: c for c in meta["categories"]}, [], []
    (tmp_path/"annotations").mkdir(), (tmp_path/"train2014").mkdir()
    for n, m in enumerate({m["id"]: m for m in picked}.values()):
        mask = np.array(Image.open(MINI/f"SegmentationClassCOCO80/{m['id']}.png"))
        images.append(dict(id=n, width=mask.shape[1], height=mask.shape[0], file_name=f"{m['id']}.jpg"))
        (tmp_path/"train2014"/f"{m['id']}.jpg").symlink_to((MINI/f"JPEGImages/{m['id']}.jpg").resolve())
        for k in np.unique(mask):
            code = rle.encode(np.asfortranarray(mask==k, np.uint8))
            seg = dict(size=code["size"], counts=code["counts"].decode())
            if k:
                anns.append(dict(id=len(anns)+1, image_id=n, category_id=cats.get(k, cats[1])["coco_id"], segmentation=seg, iscrowd=int(k==255),
                                 area=1, bbox=[0]*4))
    body = dict(images=images, annotations=anns, categories=[dict(id=c["coco_id"], name=c["name"]) for c in meta["categories"]])
    (tmp_path/"annotations/instances_train2014.json").write_text(json.dumps(body))
    ds = coco2014(tmp_path, "train", strict=False)
    assert ds.classes==COCO_CLASSES and 0<len(labelled(ds))<len(ds)
    for s in ds:
        want = np.array(Image.open(MINI/f"SegmentationClassCOCO80/{s.id}.png"))
        assert np.array_equal(s.mask, np.where(want==255, 0, want)) and set(np.flatnonzero(s.label)+1)==set(np.unique(want))-{0, 255}


# ---- a folder of one's own

@pytest.fixture
def own(tmp_path):
    root = tmp_path/"meine größten bilder"
    for n, name in enumerate(("a.jpg", "sub dir/b 1.PNG", "sub dir/ç.webp", "d.bmp", "e.jpeg")): save(root/name, photo(seed=n))
    (root/".hidden").mkdir()
    save(root/".hidden/x.jpg", photo()), save(root/"._a.jpg", photo())
    (root/"notes.txt").write_text("not an image")
    (root/"labels.csv").write_text(NAMES, encoding="utf-8")
    return root


NAMES = "id,labels\na.jpg,cat\nsub dir/b 1,cat;traffic light\nç,dog\nd.bmp,\ne,dog cat\n"
ONE_HOT = "id,traffic light,cat,dog\na,0,1,0\nb 1.PNG,1,1,0\nsub dir\\ç.webp,0,0,1\nd,0,0,0\ne,0.0,True,1\n"
IDS = ["a", "sub dir__b 1", "sub dir__ç", "d", "e"]


@pytest.mark.parametrize("table", [NAMES, ONE_HOT, ONE_HOT.replace(",", ";"), ONE_HOT.replace(",", "\t"), "\ufeff"+NAMES, NAMES.replace("\n", "\r\n"),
                                   NAMES.replace("ç", "c\u0327"), NAMES+"\n,\n", NAMES.replace("id,labels", "filename,Class")])
def test_every_form_of_the_table(own, table):
    (own/"labels.csv").write_bytes(table.encode())
    ds = folder(own, classes=("cat", "dog", "traffic light"))
    assert isinstance(ds, Folder) and ds.ids==IDS and [ds.label(i).tolist() for i in range(5)]==[[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]
    assert np.array_equal(ds[1].image, photo(seed=1)) and ds[1].mask is None and ds[0].label.dtype==np.float32


def test_classes_of_a_folder(own):
    assert folder(own).classes==("cat", "dog", "traffic light")
    (own/"classes.txt").write_text("dog\ntraffic light\ncat\nbird\n")
    assert folder(own).classes==("dog", "traffic light", "cat", "bird")
    (own/"labels.csv").write_text("id,labels\na,traffic light\nb 1,cat\nç,dog\nd,\ne,\n", encoding="utf-8")
    assert folder(own).label(0).tolist()==[0, 1, 0, 0], "a cell that is a class is not split at its space"


@pytest.mark.parametrize("table,options,words", [
    ("", {}, "labels.csv is empty; write a header"), ("\n \n", {}, "is empty"), ("id,labels\n", {}, "has a header but no line below"),
    (NAMES+"a,cat\n", {}, r"line 7: the id 'a' comes a second time \(first in line 2\)"),
    (NAMES+"sub dir/x,cat\n", {}, r"line 7: no image for the id 'sub dir/x'"),
    (NAMES.replace("e,dog cat", "ee.jpeg,dog cat"), {}, "no image for the id 'ee.jpeg'; did you mean 'e.jpeg'"),
    (NAMES.replace("e,dog cat\n", ""), {}, r"no line in .*labels.csv for 1 of 5 images, first \['e'\]"),
    (NAMES.replace("dog cat", "dgo cat"), dict(classes=("cat", "dog", "traffic light")), r"line 6, names unknown classes \['dgo'\]; did you mean 'dog'"),
    (ONE_HOT, dict(classes=("cat", "dog", "traffic lights")), r"header .* unknown classes \['traffic light'\]; did you mean 'traffic lights'"),
    (ONE_HOT, dict(classes=("cat", "dog", "traffic light", "bird")), r"no column for \['bird'\]"),
    (ONE_HOT.replace("a,0,1,0", "a,0,2,0"), {}, "line 2: expected an id and 3 values 0 or 1"), (ONE_HOT.replace("a,0,1,0", "a,0,1"), {}, "line 2: expected"),
    (ONE_HOT.replace("light,cat,dog", "light,cat,cat"), {}, "must be different class names"),
    (NAMES.replace("e,dog cat", "e,dog,cat"), {}, "line 6: expected an id and one cell"),
    ("a.jpg,cat\ne,dog\n", {}, "first line names an image, 'a.jpg'"), ("id,labels\na,\nb 1,\nç,\nd,\ne,\n", {}, "names no class in any line")])
def test_bad_tables(own, table, options, words):
    (own/"labels.csv").write_text(table, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=words): folder(own, **options)


def test_other_things_wrong_with_a_folder(own, tmp_path):
    (own/"labels.csv").write_bytes(NAMES.encode("latin-1"))
    with pytest.raises(ValueError, match="labels.csv is not UTF-8 text.*save it as UTF-8"): folder(own)
    (own/"labels.csv").write_text(NAMES, encoding="utf-8")
    save(own/"e.png", photo())
    with pytest.raises(ValueError, match="both get the id 'e'; rename"): folder(own)
    (own/"e.png").unlink(), save(own/"other/a.png", photo())
    with pytest.raises(ValueError, match=r"no line .* first \['other__a'\]"): folder(own)
    (own/"labels.csv").write_text(NAMES.replace("a.jpg", "a")+"other/a,cat\n", encoding="utf-8")
    assert folder(own).ids==[*IDS, "other__a"], "the path below the folder goes before a name that two images share"
    with pytest.raises(FileNotFoundError, match="no table of labels .*none.csv; write one"): folder(own, "none.csv")
    with pytest.raises(FileNotFoundError, match="no folder"): folder(tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in .*empty; expected files ending in .jpg"): folder(tmp_path/"empty")


def test_an_ambiguous_name(own):
    save(own/"other/b 1.jpg", photo())
    (own/"labels.csv").write_text(NAMES.replace("sub dir/b 1", "b 1")+"other/b 1,cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: 'b 1' may be any of .*other__b 1.*write the folder too"): folder(own)


def test_masks_of_a_folder(own):
    mask = np.zeros((40, 60), np.uint8)
    mask[3:9] = 2
    save(own/"masks/sub dir/b 1.png", mask)
    ds = folder(own, masks="masks")
    assert np.array_equal(ds[1].mask, mask) and ds[0].mask is None and len(ds)==5, "masks are no images"
    assert np.array_equal(folder(own, masks=own/"masks")[1].mask, mask)
    with pytest.raises(ValueError, match="1 of 6 images.*masks: name their folder"): folder(own)
    (own/"one.csv").write_text("id,labels\nb 1,a\nç,a\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no image in .* has a mask in .*elsewhere; the mask of b 1 would be .*b 1.png"):
        folder(own/"sub dir", own/"one.csv", masks=own.parent/"elsewhere")


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_turns_image_and_mask_together(tmp_path, tag):
    exif, a = Image.Exif(), photo(20, 30)
    exif[274] = tag
    save(tmp_path/"a.png", a, exif=exif)
    save(tmp_path/"m/a.png", a[..., 0] % 2)
    (tmp_path/"labels.csv").write_text("id,labels\na,x y\n")
    with Image.open(tmp_path/"a.png") as im: want = np.array(ImageOps.exif_transpose(im))
    turned, stored = folder(tmp_path, masks="m", exif=True)[0], folder(tmp_path, masks="m")[0]
    assert np.array_equal(turned.image, want) and np.array_equal(turned.mask, want[..., 0] % 2)
    assert np.array_equal(stored.image, a) and np.array_equal(stored.mask, a[..., 0] % 2), "with masks, pixels as stored unless asked for"
    (tmp_path/"m/a.png").unlink()
    assert np.array_equal(folder(tmp_path)[0].image, want), "without masks, upright"
    assert np.array_equal(folder(tmp_path).weak(0)[0], want) and np.array_equal(read_image(tmp_path/"a.png", exif=True), want)


@needs_mini
def test_folder_of_photographs(tmp_path):
    meta = json.loads((MINI/"meta.json").read_text())
    names = {c["id80"]: c["name"] for c in meta["categories"]}
    lines = [f"{m['id']}.jpg,"+";".join(names[k] for k in m["coco80"])+";" for m in meta["images"]]
    (tmp_path/"labels.csv").write_text("id,labels\n"+"\n".join(lines)+"\n")
    ds = folder(MINI/"JPEGImages", tmp_path/"labels.csv", masks=MINI/"SegmentationClassCOCO80", classes=COCO_CLASSES)
    assert (len(ds), len(labelled(ds)))==(211, 208)
    for i in range(0, 211, 30): assert set(np.flatnonzero(ds[i].label)+1)==set(np.unique(ds[i].mask))-{0, 255}


# ---- images of every kind, and broken ones

def test_sixteen_bits_are_scaled(tmp_path):
    v = np.linspace(0, 65535, 40*60).astype(np.uint16).reshape(40, 60)
    for name in ("x.png", "x.tiff", "x.pgm"):
        Image.fromarray(v).save(tmp_path/name)
        got = read_image(tmp_path/name)
        assert np.array_equal(got[..., 0], np.round(v/257)) and got.shape==(40, 60, 3) and np.ptp(got)==255, name


def test_sixteen_bit_colors_are_scaled(tmp_path):
    "Pillow cannot write such a PNG, so it is put together by hand"
    v = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(">u2")
    def chunk(kind, body): return struct.pack(">I", len(body))+kind+body+struct.pack(">I", zlib.crc32(kind+body))
    lines = b"".join(b"\0"+row.tobytes() for row in v)
    (tmp_path/"x.png").write_bytes(b"\x89PNG\r\n\x1a\n"+chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0))+chunk(b"IDAT",
        zlib.compress(lines))+chunk(b"IEND", b""))
    assert np.abs(read_image(tmp_path/"x.png")-v/257).max()<=1


@pytest.mark.parametrize("a", [np.random.default_rng(0).random((9, 9)).astype(np.float32), np.full((9, 9), 70000, np.int32), np.full((9, 9), -1, np.int32)])
def test_numbers_that_are_no_gray_values(tmp_path, a):
    Image.fromarray(a).save(tmp_path/"x.tiff")
    with pytest.raises(ValueError, match="x.tiff holds values from .*expected 8 or 16 bits.*Save it as"): read_image(tmp_path/"x.tiff")


def test_palette_with_transparency_and_alpha(tmp_path):
    Image.fromarray(photo()).convert("RGBA").save(tmp_path/"x.png")
    Image.fromarray(photo()).convert("P").save(tmp_path/"p.png", transparency=3)
    Image.fromarray(photo()).convert("LA").save(tmp_path/"la.png")
    assert {read_image(p).shape for p in tmp_path.iterdir()}=={(40, 60, 3)} and np.array_equal(read_image(tmp_path/"x.png"), photo())


@pytest.mark.parametrize("limit", [500, 2000])  # 2,400 pixels: Pillow by itself refuses more than twice the limit, and only warns below
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    save(tmp_path/"bömb.png", photo())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restored afterwards
    monkeypatch.setenv("ADCAM_MAX_PIXELS", str(limit))
    for f in (read_image, lambda p: read_mask(p, 3)):
        with pytest.raises(ValueError, match="bömb.png is too large: Image size .2400 pixels. exceeds limit.*ADCAM_MAX_PIXELS"): f(tmp_path/"bömb.png")
    monkeypatch.setenv("ADCAM_MAX_PIXELS", "2400")
    assert read_image(tmp_path/"bömb.png").shape==(40, 60, 3)
    monkeypatch.setenv("ADCAM_MAX_PIXELS", "2e9")
    with pytest.raises(ValueError, match="ADCAM_MAX_PIXELS is '2e9'; expected a number"): read_image(tmp_path/"bömb.png")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]), st.integers(0, 2000), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4))
def test_damage_is_an_error_with_the_name_or_an_image(tmp_path, form, cut, changes):
    save(tmp_path/"whole", photo(12, 16), format=form)
    body = bytearray((tmp_path/"whole").read_bytes())
    for at, value in changes: body[at % len(body)] = value
    (tmp_path/"dämaged.jpg").write_bytes(bytes(body[:cut] if cut<len(body) else body))
    try: assert read_image(tmp_path/"dämaged.jpg").dtype==np.uint8
    except ValueError as e: assert "dämaged.jpg" in str(e)


def test_list_with_spaces_and_umlauts(tmp_path):
    for name in ("my cat 1", "größe"):
        save(tmp_path/f"JPEGImages/{name}.jpg", photo()), save(tmp_path/f"SegmentationClass/{name}.png", np.full((40, 60), 3, np.uint8))
    (tmp_path/"ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path/"ImageSets/Segmentation/train.txt").write_bytes("\ufeffmy cat 1\r\ngröße \r\n".encode())
    assert VOCFolder(tmp_path, "train").ids==["my cat 1", "größe"] and VOCFolder(tmp_path, "train")[0].label[2]==1
    assert read_list(tmp_path/"ImageSets/Segmentation/train.txt")==["my", "größe"], "columns, as long as nobody says which ids there are"


def test_non_utf8_machine(tmp_path):
    "Text files are UTF-8 under any locale"
    save(tmp_path/"a.jpg", photo())
    (tmp_path/"labels.csv").write_text("id,labels\na,größe\n", encoding="utf-8")
    code = "import sys; from adcam.data import folder; ds = folder(sys.argv[1]); print(ascii((ds.ids, ds.classes, ds[0].image.shape)))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.stdout.strip()==ascii((["a"], ("größe",), (40, 60, 3))), done.stderr[-500:]


# ---- parts, broken items, one name for all

class Plain:
    "The protocol and nothing more"
    classes, ids = BASE, ["p", "q", "r"]
    def __len__(self): return 3
    def __getitem__(self, i): return Sample(self.ids[i], photo(seed=i), np.array([i>0, 0, 0], np.float32), None)
    def fingerprint(self): return "plain"


def test_subset(own):
    ds = folder(own)
    part = Subset(ds, [4, 1])
    assert (len(part), part.ids, part.classes)==(2, ["e", "sub dir__b 1"], ds.classes) and np.array_equal(part[1].image, ds[1].image)
    assert part.label(0).tolist()==[1, 1, 0] and np.array_equal(part.weak(0)[0], ds[4].image)
    assert Subset(part, [1]).ids==["sub dir__b 1"] and Subset(part, [1]).ds is ds and Subset(ds, n=2).ids==ds.ids[:2]
    prints = {Subset(ds, idx).fingerprint() for idx in ([0], [1], [0, 1], [1, 0])}
    assert len(prints)==4 and Subset(ds).fingerprint()==ds.fingerprint() and Subset(ds, n=99).ids==ds.ids
    assert [s.id for s in part]==part.ids and pickle.loads(pickle.dumps(part))[0].id=="e"


def test_subset_of_a_plain_data_set():
    part = Subset(Plain(), [2])
    assert part.label(0).tolist()==[1, 0, 0] and np.array_equal(part.weak(0)[0], photo(seed=2)) and part.fingerprint()!=Subset(Plain(), [1]).fingerprint()
    assert labelled(Plain()).ids==["q", "r"] and TrainViews(part, 16, None)[0][0].shape==(3, 16, 16)


@pytest.mark.parametrize("kw", [dict(indices=[3]), dict(indices=[-1]), dict(indices=[]), dict(n=0), dict(n=-1)])
def test_bad_subset(kw):
    with pytest.raises(ValueError, match=r"0\.\.2|at least one item"): Subset(Plain(), **kw)


def test_list_and_part_of_a_list_are_the_same_data(voc, small_voc):
    lists = voc/"ImageSets/Segmentation"
    (lists/"first.txt").write_text("\n".join(read_list(lists/"train.txt")[:2])+"\n")
    assert Subset(VOCFolder(voc, "train"), n=2).fingerprint()==VOCFolder(voc, "first").fingerprint()


def test_fingerprint_of_a_large_set(own, monkeypatch):
    "Beyond the limit: sizes of all files, bytes of some"
    whole = folder(own).fingerprint()
    monkeypatch.setattr(data, "_FULL", 2)
    before = folder(own).fingerprint()
    flipped = bytearray((own/"d.bmp").read_bytes())
    flipped[-1] ^= 1
    (own/"d.bmp").write_bytes(flipped)  # item 3, read in full: with at most 2 of 5 items, those are 0 and 3
    second = folder(own).fingerprint()
    with open(own/"e.jpeg", "ab") as f: f.write(b"\0")
    assert len({whole, before, second, folder(own).fingerprint()})==4


def test_no_label_at_all():
    class Empty(Plain):
        def __getitem__(self, i): return super().__getitem__(0)
    with pytest.raises(ValueError, match="none of the 3 images has a class"): labelled(Empty())


def damage(root):
    "One file of every kind of trouble; a, and the image that is only missing a mask, stay good"
    (root/"sub dir/b 1.PNG").write_bytes((root/"sub dir/b 1.PNG").read_bytes()[:500])
    (root/"d.bmp").unlink()
    save(root/"masks/e.png", np.zeros((3, 3), np.uint8)), save(root/"masks/a.png", np.zeros((40, 60), np.uint8))
    save(root/"unlisted.jpg", photo())


def test_other_images_are_not_lost(own):
    damage(own)
    with pytest.raises(FileNotFoundError, match="d.bmp"): folder(own, masks="masks")
    ds = folder(own, masks="masks", check=False)
    good, skipped = usable(ds)
    assert good.ids==["a", "sub dir__ç"] and all(isinstance(s, Skipped) for s in skipped)
    assert [(s.id, w) for s, w in zip(skipped, ("cannot read image", "no image", "is 3x3, its image 40x60", "has no line")) if w in s.reason]==[
        ("sub dir__b 1", "cannot read image"), ("d.bmp", "no image"), ("e", "is 3x3, its image 40x60"), ("unlisted", "has no line")]
    assert [s.id for s in usable(ds, masks=False)[1]]==["sub dir__b 1", "d.bmp", "unlisted"], "training needs no mask"
    report = skipped_report(skipped, len(ds)).splitlines()
    assert report[0]=="4 of 6 images were skipped:" and len(report)==5 and "b 1.PNG" in report[1]
    assert [s.id for s in good]==good.ids and len(good.fingerprint())==64


def test_nothing_broken_changes_nothing(own):
    ds = folder(own)
    assert usable(ds)==(ds, []) and skipped_report([], 5)==""


def test_nothing_left(own):
    for p in own.rglob("*.*"):
        if p.is_file() and p.suffix!=".csv": p.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 5 images can be used. The first, a: cannot read image"): usable(folder(own))


def test_missing_image_of_a_list(voc):
    (voc/"JPEGImages/train_000001.jpg").unlink()
    good, skipped = usable(VOCFolder(voc, "train", check=False))
    assert len(good)==3 and [s.id for s in skipped]==["train_000001"]
    assert len(usable(voc2012(voc, "train", strict=False, check=False))[0])==3


def test_training_opens_no_mask(own):
    save(own/"masks/a.png", np.zeros((40, 60), np.uint8)), (own/"masks/e.png").write_bytes(b"broken")
    ds = folder(own, masks="masks")
    assert np.array_equal(ds.weak(4)[0], ds.weak(4)[0]) and TrainViews(ds, 16, None)[4][0].shape==(3, 16, 16)
    with pytest.raises(ValueError, match="cannot read mask"): ds[4]
    assert np.array_equal(weak_of(ds, 4)[1], label_of(ds, 4))


def test_open_data_knows_scenes_by_name():
    ds = open_data("mini", "val", 3)
    assert isinstance(ds, Scenes) and len(ds) == 3


def test_open_data_knows_a_folder_of_photographs(own):
    assert isinstance(open_data(str(own)), Folder)
    assert open_data(f"folder:{own}", n=2).ids == IDS[:2]
    assert open_data(str(own), n=99).ids == IDS


def test_open_data_takes_masks_beside_the_photographs(own):
    save(own/"masks/a.png", np.ones((40, 60), np.uint8))
    assert open_data(str(own))[0].mask.all()


def test_open_data_knows_coco(coco):
    assert isinstance(open_data(str(coco), "val", strict=False), COCO2014)
    assert isinstance(open_data(f"coco2014:{coco}", "val2014", 1, strict=False), Subset)


def test_open_data_knows_voc_from_any_of_its_folders(voc):
    assert type(open_data(str(voc), "train")) is VOCFolder and len(open_data(f"voc:{voc}", "val")) == 4
    assert open_data(str(voc.parent), "train", strict=False).has_labels
    assert not open_data(f"voc2012:{voc.parent.parent}", "test", strict=False).has_labels


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_may_be_called_like_a_kind(own, tmp_path, monkeypatch, kind):
    own.rename(tmp_path/kind)
    monkeypatch.chdir(tmp_path)
    assert open_data(kind).ids == open_data(f"folder:{kind}").ids == IDS


def test_a_kind_without_a_folder_is_not_this_folder(own, monkeypatch):
    monkeypatch.chdir(own)
    with pytest.raises(ValueError, match="folder: names no folder; write folder:DIR"): open_data("folder:")


def test_open_data_says_what_it_cannot_open(own, voc):
    with pytest.raises(FileNotFoundError, match="instead of 1,464"): open_data(f"voc2012:{voc}")
    with pytest.raises(ValueError, match="no split 'val'; make a folder per split"): open_data(str(own), "val")
    with pytest.raises(FileNotFoundError, match="no data nowhere; give `mini`, a folder, or KIND:FOLDER"): open_data("nowhere")
    with pytest.raises(ValueError, match="is no data set: it has neither"): open_data(str(own/"sub dir"))


# ---- IRN's five steps

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 48), st.integers(1, 50), st.integers(0, 40), st.integers(0, 9999))
def test_five_steps_in_irn_order_are_the_view(h, w, crop, low, more, seed):
    a, b = np.random.default_rng(seed), np.random.default_rng(seed)
    x = random_resize_long(photo(h, w), low, low+more, a)
    assert low<=max(x.shape[:2])<=low+more and x.dtype==np.uint8
    x = random_crop(random_flip(imagenet_normalize(x), a), crop, a)
    assert torch.equal(to_chw(x), random_view(photo(h, w), crop, (low, low+more), b)) and a.random()==b.random(), "same draws, same numbers"


def test_sizes_are_rounded_as_in_irn():
    "np.round(side*scale) with scale = long/max(side), not side*long/max(side): they differ at ties"
    for H, W in ((375, 500), (500, 375), (333, 500), (480, 640), (427, 640)):
        for long in range(320, 641, 1):
            s = long/max(H, W)
            assert data._scaled(H, W, long)==(int(np.round(H*s)), int(np.round(W*s)))
    assert data._scaled(375, 500, 334)==(251, 334) and data._scaled(1, 500, 320)==(1, 320)


def test_normalize_is_to_tensor():
    assert torch.equal(to_chw(imagenet_normalize(photo())), to_tensor(photo())) and imagenet_normalize(photo()).dtype==np.float32


def test_half_the_flips():
    flips = [np.array_equal(random_flip(photo(4, 5), np.random.default_rng(s)), photo(4, 5)[:, ::-1]) for s in range(200)]
    assert 0.4<np.mean(flips)<0.6


# ---- other processes

def test_two_spawned_workers(coco):
    "Masks and annotations stay behind; the batches are those of one process"
    views = TrainViews(Subset(coco2014(coco, "val", strict=False), [0, 2, 3]), crop=32, resize=(30, 60))
    loader = DataLoader(views, batch_size=1, num_workers=2, multiprocessing_context="spawn")
    views.set_epoch(3)
    got = list(loader)
    assert all(torch.equal(x[0], views[i][0]) and torch.equal(y[0], views[i][1]) for i, (x, y) in enumerate(got)) and len(got)==3


def test_usable_in_other_processes(own):
    damage(own)
    ds = folder(own, masks="masks", check=False)
    assert usable(ds, workers=2)[1]==usable(ds)[1] and len(usable(ds)[1])==4
