"Masks go out in four formats and come back as they were; what people do to the files in between is read, or named."
import contextlib
import io
import json
import shutil
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import matplotlib.path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import ndimage

from adcam import export
from adcam.cli import main
from adcam.data import COCO2014, VOCFolder, open_data, save_mask
from adcam.export import FORMATS, export_masks, fill, import_masks, painted, polygons, without_specks
from adcam.scenes import write_voc
from adcam.segment import check_masks, load_mask


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    "Four scenes; one mask has undecided pixels, one is all background."
    root = write_voc(tmp_path_factory.mktemp("data"), splits="train", n=4)
    ds = VOCFolder(root, "train")
    for i, change in ((1, lambda m: m.__setitem__(slice(0, 15), 255)), (2, lambda m: m.fill(0))):
        m = ds.mask(i).copy()
        change(m)
        save_mask(ds.mask_path(i), m)
    return root


@pytest.fixture(scope="module")
def ds(voc):
    return VOCFolder(voc, "train")


@pytest.fixture(scope="module")
def exports(ds, voc, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    for to in FORMATS: export_masks(ds, voc/"SegmentationClass", root/to, to, tolerance=0, min_area=0)
    return root


@pytest.fixture
def copy(exports, tmp_path):
    "An export that a test may change."
    def make(to): return Path(shutil.copytree(exports/to, tmp_path/to))
    return make


def masks(root, split="train"):
    ds = VOCFolder(root, split)
    return {n: ds.mask(i) for i, n in enumerate(ds.ids)}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def command(capsys, *line):
    with pytest.raises(SystemExit) as stop: main([str(w) for w in line])
    told = capsys.readouterr()
    return stop.value.code or 0, told.out + told.err


# ---------------------------------------------------------------- outlines

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 14))
def test_any_mask_is_its_polygons(seed, H, W):
    mask = np.random.default_rng(seed).choice(np.array([0, 0, 0, 1, 2, 255], np.uint8), (H, W))
    assert np.array_equal(painted(polygons(mask, 0), mask.shape), mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_fill_agrees_with_matplotlib(seed):
    r = np.random.default_rng(seed)
    angle = np.sort(r.uniform(0, 2*np.pi, 9))
    p = 16 + r.uniform(4, 20, (9, 1))*np.c_[np.cos(angle), np.sin(angle)]       # a star around the center: no crossings
    centers = np.stack(np.meshgrid(np.arange(32) + .5, np.arange(32) + .5), -1).reshape(-1, 2)
    assert np.array_equal(fill(p, (32, 32)), matplotlib.path.Path(p).contains_points(centers).reshape(32, 32))


def test_fill_leaves_holes_where_an_outline_crosses_itself():
    bow = np.array([[0, 0], [8, 8], [8, 0], [0, 8]])
    assert not fill(bow, (8, 8))[0, 4] and fill(bow, (8, 8))[4, 1] and fill(bow, (8, 8))[4, 6]


def test_tolerance_saves_corners_and_keeps_the_shape(ds):
    m = ds.mask(0)
    exact, fewer = polygons(m, 0), polygons(m, 1)
    again = painted(fewer, m.shape)
    assert sum(len(p) for _, p in fewer) < .5*sum(len(p) for _, p in exact)
    assert ((again == m) & (m > 0)).sum()/((again > 0) | (m > 0)).sum() > .95


def test_no_corner_is_farther_from_the_outline_than_the_tolerance():
    t = np.linspace(0, 2*np.pi, 400, endpoint=False)
    circle = 50 + 40*np.c_[np.cos(t), np.sin(t)]
    q = export.simplified(circle, 1.5)
    a, b = q, np.roll(q, -1, 0)
    along = np.clip(((circle[:, None] - a)*(b - a)).sum(-1)/((b - a)**2).sum(-1), 0, 1)
    assert len(q) < 30 and np.hypot(*(circle[:, None] - a - along[..., None]*(b - a)).transpose(2, 0, 1)).min(1).max() <= 1.5


def test_single_pixels_survive_any_tolerance():
    m = np.zeros((9, 9), np.uint8)
    m[4, 4] = 3
    assert np.array_equal(painted(polygons(m, 5), m.shape), m)


def test_specks_go_to_what_surrounds_them():
    m = np.zeros((30, 30), np.uint8)
    m[2:20, 2:20], m[25, 25], m[10, 10], m[2, 2] = 1, 2, 0, 255
    clean, n = without_specks(m, 5)
    assert n == 3 and clean[10, 10] == 1 and clean[25, 25] == 0 and [k for k, _ in polygons(clean, 0)] == [1]
    assert without_specks(m, 0)[0] is m and np.array_equal(without_specks(m, 10_000)[0], m), "nothing goes where nothing would stay"


@pytest.mark.parametrize("to, stays", [("labelme", False), ("cvat", False), ("coco", True), ("voc", True)])
def test_outlines_have_no_specks_unless_asked_for(ds, voc, tmp_path, capsys, to, stays):
    folder = tmp_path/"masks"
    for i, n in enumerate(ds.ids):
        m = ds.mask(i).copy()
        m[1::9, 1::9] = np.where(m[1::9, 1::9], 0, 1)
        save_mask(folder/f"{n}.png", m)
    code, told = command(capsys, "export", folder, "--data", voc, "--to", to, "--out", tmp_path/"out")
    assert code == 0 and ("--min-area 0 keeps them" in told) is not stays
    import_masks(tmp_path/"out", tmp_path/"back", to)
    back = [VOCFolder(tmp_path/"back", "train").mask(i) for i in range(len(ds))]
    specks = [ndimage.label(m == v)[1] for m in back for v in np.unique(m)]
    assert (sum(specks) > 300) is stays
    assert command(capsys, "export", folder, "--data", voc, "--to", to, "--out", tmp_path/"all", "--min-area", 0)[0] == 0


# ---------------------------------------------------------------- there and back

@pytest.mark.parametrize("to", FORMATS)
def test_masks_come_back_as_they_were(exports, voc, tmp_path, to):
    done = import_masks(exports/to, tmp_path/"back", to)
    assert same(masks(tmp_path/"back"), masks(voc)) and not done.skipped
    assert done.classes == VOCFolder(voc, "train").classes and len(done.empty) == 1


@pytest.mark.parametrize("to", FORMATS)
def test_photographs_are_copied_byte_by_byte(exports, ds, tmp_path, to):
    import_masks(exports/to, tmp_path/"back", to)
    again = VOCFolder(tmp_path/"back", "train")
    assert all(again.image_path(i).read_bytes() == ds.image_path(ds.ids.index(n)).read_bytes() for i, n in enumerate(again.ids))


def test_training_reads_what_came_back(exports, tmp_path):
    import_masks(exports/"cvat", tmp_path/"back", "cvat")
    ds = open_data(f"voc:{tmp_path/'back'}", "train")
    found = check_masks(ds, tmp_path/"back/SegmentationClass", len(ds.classes) + 1)
    assert len(found.usable) == 4 and len(found.background) == 1
    assert load_mask(tmp_path/"back/SegmentationClass", ds[0], len(ds.classes) + 1).dtype == np.uint8


def test_coco_is_read_by_pycocotools(exports, ds):
    from pycocotools.coco import COCO
    with contextlib.redirect_stdout(io.StringIO()): coco = COCO(str(exports/"coco/annotations/instances_train.json"))
    assert [coco.cats[c]["name"] for c in sorted(coco.cats)] == list(ds.classes)
    for i, info in coco.imgs.items():
        truth = ds.mask(ds.ids.index(Path(info["file_name"]).stem))
        drawn = np.zeros(truth.shape, int)
        for a in coco.imgToAnns[i]:
            m = coco.annToMask(a)
            x, y, w, h = map(int, a["bbox"])
            assert a["area"] == m.sum() and m[y:y + h, x:x + w].sum() == m.sum() and m[y].any() and m[:, x].any()
            drawn += a["category_id"]*m
        assert np.array_equal(drawn, np.where(truth == 255, 0, truth))


def test_coco_export_is_a_data_set(exports, ds):
    again = COCO2014(exports/"coco", "train")
    assert again.classes == ds.classes
    assert all(np.array_equal(again.mask(i) > 0, (m := ds.mask(ds.ids.index(n))) % 255 > 0) for i, n in enumerate(again.ids))


def test_labelme_files_have_what_labelme_asks_for(exports):
    for path in (exports/"labelme").glob("*.json"):
        d = json.loads(path.read_bytes())
        assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} <= d.keys()
        assert Image.open(path.parent/d["imagePath"]).size == (d["imageWidth"], d["imageHeight"])
        for s in d["shapes"]:
            assert isinstance(s["label"], str) and s["shape_type"] == "polygon" and len(s["points"]) > 2
            assert all(0 <= x <= d["imageWidth"] and 0 <= y <= d["imageHeight"] for x, y in s["points"])


def test_cvat_masks_fill_their_boxes(exports):
    found = list(ET.parse(exports/"cvat/annotations.xml").iter("mask"))
    assert found
    for e in found:
        assert sum(map(int, e.get("rle").split(","))) == int(e.get("width"))*int(e.get("height"))


def test_voc_export_explains_its_colors(exports, ds):
    rows = dict(line.split(":")[:2] for line in (exports/"voc/labelmap.txt").read_text().splitlines() if not line.startswith("#"))
    assert rows["background"] == "0,0,0" and rows["__ignore__"] == "224,224,192" and list(rows)[1:-1] == list(ds.classes)
    with Image.open(next((exports/"voc/SegmentationClass").glob("*.png"))) as im: assert im.mode == "P"


# ---------------------------------------------------------------- what people do

def change_labelme(folder, f, n=0):
    path = sorted(folder.glob("*.json"))[n]
    d = json.loads(path.read_bytes())
    f(d)
    path.write_text(json.dumps(d))
    return path.stem


def test_later_shapes_lie_above(copy, tmp_path, ds):
    box = dict(label=ds.classes[6], points=[[10, 20], [30, 50]], shape_type="rectangle")
    hole = dict(label="_background_", points=[[20, 30], [24, 30]], shape_type="circle")
    name = change_labelme(copy("labelme"), lambda d: d["shapes"].extend([box, hole]))
    import_masks(tmp_path/"labelme", tmp_path/"back", "labelme")
    m = masks(tmp_path/"back")[name]
    assert m[20, 10] == m[49, 29] == 7 and m[30, 20] == 0


@pytest.mark.parametrize("change, word", [
    (lambda d: d["shapes"][0].update(label="catt"), "did you mean 'cat'"),
    (lambda d: d["shapes"].append(dict(label="cat", points=[[1, 1], [2, 2]], shape_type="line")), "line of 2 points, which covers no pixels"),
    (lambda d: d["shapes"].append(dict(label="cat", points=[["a", 1]], shape_type="polygon")), "(cat)"),
    (lambda d: d["shapes"].append(dict(label="cat", points=[[1, 1], [1e300, 5], [5, 5]], shape_type="polygon")), "far outside"),
    (lambda d: d.update(imageWidth=77), "the annotation says"), (lambda d: d["shapes"].append(5), "no list of shapes"),
    (lambda d: d.update(imagePath="elsewhere.jpg") or d.update(shapes={}), "no list of shapes")])
def test_bad_labelme_file_is_named_and_left_out(copy, tmp_path, capsys, change, word):
    name = change_labelme(copy("labelme"), change)
    code, text = command(capsys, "import", tmp_path/"labelme", "--from", "labelme", "--out", tmp_path/"back")
    assert code == 1 and name in text and word in text and "3 photographs" in text
    assert name not in masks(tmp_path/"back") and not (tmp_path/f"back/SegmentationClass/{name}.png").exists()


def test_torn_json_is_left_out(copy, tmp_path):
    path = sorted(copy("labelme").glob("*.json"))[1]
    path.write_bytes(path.read_bytes()[:100])
    done = import_masks(tmp_path/"labelme", tmp_path/"back", "labelme")
    assert [s[0] for s in done.skipped] == [path.stem] and "cannot read" in done.skipped[0][1]


def test_photograph_inside_a_labelme_file_is_taken(copy, tmp_path):
    import base64
    folder = copy("labelme")
    photo = sorted(folder.glob("*.jpg"))[0]
    content = photo.read_bytes()
    name = change_labelme(folder, lambda d: d.update(imageData=base64.b64encode(content).decode()))
    photo.unlink()
    import_masks(folder, tmp_path/"back", "labelme")
    again = VOCFolder(tmp_path/"back", "train")
    assert np.array_equal(again.image(again.ids.index(name)), np.array(Image.open(io.BytesIO(content))))


def test_missing_photograph_is_named(copy, tmp_path):
    folder = copy("cvat")
    gone = sorted((folder/"images").iterdir())[2]
    gone.unlink()
    done = import_masks(folder, tmp_path/"back", "cvat")
    assert [s[0] for s in done.skipped] == [gone.stem] and "--images" in done.skipped[0][1]


def change_cvat(folder, f):
    path = folder/"annotations.xml"
    tree = ET.parse(path)
    f(tree.getroot())
    tree.write(path)
    return path


def test_cvat_polygons_boxes_and_their_order(copy, tmp_path, ds):
    def draw(root):
        image = root.find("image")
        for e in list(image): image.remove(e)
        ET.SubElement(image, "polygon", label=ds.classes[3], points="0,0;40,0;40,40;0,40", z_order="1")
        ET.SubElement(image, "box", label=ds.classes[5], xtl="0", ytl="0", xbr="20", ybr="60", z_order="0")
        ET.SubElement(image, "tag", label=ds.classes[5])
    folder = copy("cvat")
    change_cvat(folder, draw)
    import_masks(folder, tmp_path/"back", "cvat")
    m = next(iter(masks(tmp_path/"back").values()))
    assert m[10, 10] == 4 and m[50, 10] == 6 and (m > 0).sum() == 40*40 + 20*20


@pytest.mark.parametrize("change, word", [
    (dict(rle="5, 5"), "run lengths of 10 pixels"), (dict(height="1000000000", width="1000000000"), "outside of the picture"),
    (dict(z_order="up"), "up"), (dict(left="9999"), "outside of the picture"), (dict(label="shoe"), "no class"), (dict(rle="x"), "shape 1")])
def test_bad_cvat_mask_leaves_its_image_out(copy, tmp_path, change, word):
    folder, seen = copy("cvat"), []
    def harm(root):
        image = next(i for i in root.iter("image") if i.find("mask") is not None)
        image.find("mask").attrib.update(change)
        seen.append(Path(image.get("name")).stem)
    change_cvat(folder, harm)
    done = import_masks(folder, tmp_path/"back", "cvat")
    assert [s[0] for s in done.skipped] == seen and word in done.skipped[0][1] and len(done.ids) == 3


def test_cvat_zip_is_read(exports, voc, tmp_path):
    with zipfile.ZipFile(tmp_path/"job.zip", "w") as z: z.write(exports/"cvat/annotations.xml", "annotations.xml")
    import_masks(tmp_path/"job.zip", tmp_path/"back", "cvat", images=exports/"cvat/images")
    assert same(masks(tmp_path/"back"), masks(voc))


def test_cvats_segmentation_masks_in_rgb(exports, voc, tmp_path, copy):
    folder = copy("voc")
    for p in (folder/"SegmentationClass").glob("*.png"): Image.open(p).convert("RGB").save(p)
    (folder/"classes.txt").unlink()
    import_masks(folder, tmp_path/"back", "voc")
    assert same(masks(tmp_path/"back"), masks(voc))


def test_color_without_a_name(copy, tmp_path):
    folder = copy("voc")
    path = sorted((folder/"SegmentationClass").glob("*.png"))[0]
    rgb = np.array(Image.open(path).convert("RGB"))
    rgb[0, 0] = 1, 2, 3
    Image.fromarray(rgb).save(path)
    done = import_masks(folder, tmp_path/"back", "voc")
    assert done.skipped[0][0] == path.stem and "(1, 2, 3)" in done.skipped[0][1]


def test_classes_in_another_order(exports, voc, tmp_path, ds):
    order = tuple(reversed(ds.classes))
    import_masks(exports/"coco", tmp_path/"back", "coco", classes=order)
    back, K = masks(tmp_path/"back"), len(order)
    table = np.arange(256)
    table[1:K + 1] = K - np.arange(K)
    assert VOCFolder(tmp_path/"back", "train").classes == order
    assert all(np.array_equal(back[n], table[m]) for n, m in masks(voc).items())


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("harm, word", [
    (lambda p: p.write_bytes(p.read_bytes()[:120]), "cannot read mask"), (lambda p: save_mask(p, np.zeros((9, 9), np.uint8)), "they must agree"),
    (lambda p: save_mask(p, np.full((192, 192), 77, np.uint8)), "class ids [77]"), (lambda p: p.unlink(), "has no file")])
def test_bad_mask_is_named_and_left_out(ds, voc, tmp_path, capsys, harm, word):
    folder = Path(shutil.copytree(voc/"SegmentationClass", tmp_path/"masks"))
    harm(folder/f"{ds.ids[1]}.png")
    code, text = command(capsys, "export", folder, "--to", "labelme", "--data", voc, "--out", tmp_path/"out")
    assert code == 1 and ds.ids[1] in text and word in text and "wrote 3 photographs" in text
    assert not list((tmp_path/"out").glob(f"{ds.ids[1]}*"))


@pytest.mark.parametrize("to", FORMATS)
def test_names_with_spaces_and_other_alphabets(tmp_path, to):
    new, root = "mein Foto é 猫 & <x>", write_voc(tmp_path/"data", splits="train", n=1)
    for p in [*root.glob("JPEGImages/*"), *root.glob("SegmentationClass/*")]: p.rename(p.with_name(new + p.suffix))
    (root/"ImageSets/Segmentation/train.txt").write_text(new + "\n", encoding="utf-8")
    (root/"ImageSets/labels.csv").unlink()
    export_masks(VOCFolder(root, "train"), root/"SegmentationClass", tmp_path/"out", to, tolerance=0)
    import_masks(tmp_path/"out", tmp_path/"back", to)
    assert same(masks(tmp_path/"back"), masks(root)) and list(masks(root)) == [new]


def test_a_turned_photograph_is_written_upright(tmp_path):
    "Labelme and CVAT turn a photograph by its EXIF tag: the mask must lie on what they show."
    from adcam.data import folder as own
    pixels, exif = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), Image.Exif()
    exif[274] = 6
    (tmp_path/"photos").mkdir()
    Image.fromarray(pixels).save(tmp_path/"photos/a.jpg", exif=exif, quality=95)
    (tmp_path/"photos/labels.csv").write_text("id,labels\na,cat\n")
    ds, mask = own(tmp_path/"photos"), np.zeros((30, 20), np.uint8)
    mask[:5, :3] = 1
    save_mask(tmp_path/"masks/a.png", mask)
    export_masks(ds, tmp_path/"masks", tmp_path/"out", "labelme", tolerance=0)
    shown = Image.open(tmp_path/"out/a.png")
    assert shown.getexif().get(274, 1) == 1 and np.array_equal(np.array(shown), ds.image(0))
    import_masks(tmp_path/"out", tmp_path/"back", "labelme")
    assert np.array_equal(masks(tmp_path/"back")["a"], mask)


def test_nothing_is_written_into_a_folder_that_holds_something(ds, voc, tmp_path, capsys):
    (tmp_path/"out").mkdir()
    (tmp_path/"out/notes.txt").write_text("mine")
    for line in (["export", voc/"SegmentationClass", "--to", "coco", "--data", voc], ["import", voc, "--from", "voc"]):
        code, text = command(capsys, *line, "--out", tmp_path/"out")
        assert code == 2 and "is not empty" in text and len(text.strip().splitlines()) == 1
    assert [p.name for p in (tmp_path/"out").iterdir() if not p.name.startswith(".")] == ["notes.txt"]


@pytest.mark.parametrize("form, content, word", [
    ("coco", "[1]", "cannot read annotations"), ("coco", "{", "cannot read annotations"), ("cvat", "<annotations>", "cannot read"),
    ("cvat", "<annotations><version>1.1</version></annotations>", "not of the format CVAT"), ("voc", "", "no folder"), ("labelme", "{}", "labels.txt")])
def test_files_of_another_kind_are_one_line(tmp_path, capsys, form, content, word):
    path = tmp_path/{"cvat": "a.xml"}.get(form, "a.json")
    path.write_text(content)
    code, text = command(capsys, "import", path, "--from", form, "--out", tmp_path/"back")
    assert code == 2 and word in text and len(text.strip().splitlines()) == 1


def test_torn_zip(tmp_path, capsys):
    (tmp_path/"job.zip").write_bytes(b"PK\3\4torn")
    code, text = command(capsys, "import", tmp_path/"job.zip", "--from", "cvat", "--out", tmp_path/"back")
    assert code == 2 and "Download it again" in text


def test_names_cannot_lead_out_of_the_folder(copy, tmp_path):
    folder = copy("cvat")
    change_cvat(folder, lambda root: root.find("image").set("name", "../../evil\\..\\x.jpg"))
    done = import_masks(folder, tmp_path/"back", "cvat")
    assert {p.parent for p in (tmp_path/"back").rglob("*.png")} == {tmp_path/"back/SegmentationClass"}
    assert len(done.ids) + len(done.skipped) == 4


def test_two_images_of_one_name(copy, tmp_path):
    folder = copy("cvat")
    def double(root):
        a, b = root.findall("image")[:2]
        b.set("name", f"other/{a.get('name')}")
    change_cvat(folder, double)
    done = import_masks(folder, tmp_path/"back", "cvat")
    assert len(done.ids) == 3 and "two images of this name" in done.skipped[0][1]


def test_seeds_cannot_be_exported(voc, tmp_path, capsys):
    (tmp_path/"seeds").mkdir()
    code, text = command(capsys, "export", tmp_path/"seeds", "--to", "coco", "--data", voc, "--out", tmp_path/"out")
    assert code == 2 and "has no file" in text
