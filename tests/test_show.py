"Sheets and pages: what is drawn is what the numbers say, nothing is fetched, and a bad file is named."
import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from adcam import show
from adcam.cli import main
from adcam.data import VOCFolder
from adcam.evaluation import Sweep, confusion, scores, seed_mask
from adcam.scenes import Scenes, write_voc
from adcam.seeds import Seed, save_seed
from adcam.viz import error_map, overlay, overlay_mask


def made_seed(ds, i):
    "A seed that is half right: soft blobs around the true objects."
    s, y = ds[i], np.linspace(0, 1, ds[i].mask.shape[0])[:, None]
    keys = np.flatnonzero(s.label)
    maps = np.stack([np.asarray(Image.fromarray(((s.mask == k + 1)*255).astype(np.uint8)).resize((24, 24)).resize(s.mask.shape[::-1]))/255*.8 + .2*y
                     for k in keys])
    maps = (maps/maps.max((1, 2), keepdims=True)).astype(np.float32)
    return Seed(keys, maps[:, ::4, ::4], maps)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("data"), splits="val", n=6)


@pytest.fixture(scope="module")
def ds(voc):
    return VOCFolder(voc, "val")


@pytest.fixture
def seeds(ds, tmp_path):
    for i in range(len(ds)): save_seed(tmp_path/f"seeds/{ds.ids[i]}.npz", made_seed(ds, i))
    return tmp_path/"seeds"


def command(capsys, line):
    with pytest.raises(SystemExit) as stop: main([str(w) for w in line])
    told = capsys.readouterr()
    return stop.value.code or 0, told.out + told.err


def content(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def decoded(uri):
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_tiles_are_the_drawings_of_viz(ds, seeds):
    s = show.read_shown(ds, 0, seeds, ".npz")
    t, pred = show.tiles(s, .4), seed_mask(s.maps, np.array(s.keys) - 1, .4)
    assert tuple(t) == show.VIEWS
    assert np.array_equal(t["heat map"], overlay(s.image, s.maps.max(0)))
    assert np.array_equal(t["mask"], overlay_mask(s.image, pred))
    assert np.array_equal(t["errors"], error_map(pred, s.truth))


def test_one_class_shows_its_own_map_and_mask(ds, seeds):
    i = next(i for i in range(len(ds)) if ds.label(i).sum() > 1)
    s = show.read_shown(ds, i, seeds, ".npz")
    c = s.keys[1]
    t, pred = show.tiles(s, .4, c), s.prediction(.4)
    assert np.array_equal(t["heat map"], overlay(s.image, s.maps[1]))
    assert np.array_equal(t["mask"], overlay_mask(s.image, np.where(pred == c, c, 0)))
    assert np.array_equal(t["errors"], error_map(pred, s.truth, c))


def test_undecided_pixels_are_no_class(ds):
    truth = ds.mask(0).copy()
    truth[:20] = 255
    s = show.Shown("x", ds.image(0), mask=np.full_like(truth, 255), truth=truth)
    assert 255 not in s.labels() and show.image_iou(s, 0) == 0


def test_numbers_are_those_of_the_sweep(ds, seeds):
    g, K = show.gallery(ds, seeds, ".npz"), len(ds.classes)
    sweep = Sweep(K, np.arange(100)/100)
    for i in range(len(ds)): sweep.update(*(lambda s: (s.high_res.astype(np.float16).astype(np.float32).clip(0, 1), s.keys))(made_seed(ds, i)), ds.mask(i))
    assert [r["miou"] for r in g.table] == pytest.approx([r["miou"] for r in sweep.table()])
    assert g.best() == pytest.approx(sweep.best()["t"])


def test_masks_have_one_score(ds, voc):
    g = show.gallery(ds, voc/"SegmentationClass", ".png")
    assert g.thresholds == [] and g.best() is None and g.table[0]["miou"] == 1


def test_page_asks_for_nothing(ds, seeds):
    page = show.page(show.gallery(ds, seeds, ".npz"))
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href|url\()\s*=?\s*["'(]?(https?:|//|/)""", page)
    assert re.findall(r"https?://[^\s'\"]+", page) == ["http://www.w3.org/2000/svg"]  # the name of SVG's elements, no address


def test_names_cannot_break_the_page(ds, seeds):
    g = show.gallery(ds, seeds, ".npz")
    name = "</script><b onclick='x'>Größe 東京"
    page = show.page(g._replace(shown=[g.shown[0]._replace(id=name)], classes=("<i>",) + g.classes[1:]), title="<h1>&")
    assert page.count("</script>") == 2 and "<b onclick" not in page and "<title>&lt;h1&gt;&amp;" in page
    assert content(page)["items"][0]["id"] == name and content(page)["classes"][1] == "<i>"


def test_page_holds_masks_exactly_and_maps_to_a_byte(ds, seeds):
    s = show.read_shown(ds, 0, seeds, ".npz")
    item = content(show.page(show.gallery(ds, seeds, ".npz")))["items"][0]
    assert np.array_equal(decoded(item["truth"]), s.truth)
    m = np.asarray(Image.fromarray(decoded(item["maps"][0])).resize(s.image.shape[1::-1], Image.Resampling.BILINEAR))/255
    for t in (.2, .4, .6):
        a, b = m > t, s.maps[0] > t
        assert (a & b).sum()/(a | b).sum() > .97  # as the slider would cut it, and as `seed_mask` does


def test_sheets_are_cut_into_pages(ds, seeds, tmp_path):
    g = show.gallery(ds, seeds, ".npz", side=96)
    files = show.write_show(tmp_path/"a.png", g, per_page=4, side=96, columns=2)
    assert [f.name for f in files] == ["a.png", "a-2.png"]
    heights = [Image.open(f).height for f in files]
    assert heights[0] > heights[1] and len({Image.open(f).width for f in files}) == 1


def test_sheet_shows_the_tiles(ds, seeds):
    g = show.gallery(ds, seeds, ".npz", side=96)
    sheet, = show.sheet(g, .4, side=96, columns=3)
    pixels, tile = np.asarray(sheet), Image.fromarray(show.tiles(g.shown[0], .4)["mask"])
    tile.thumbnail((96, 72))
    x, y = show._GAP + 2*(96 + show._GAP), 66 + show._HEAD
    assert np.array_equal(pixels[y:y + tile.height, x:x + tile.width], np.asarray(tile))


def test_class_that_nobody_has(ds, seeds):
    g = show.gallery(ds, seeds, ".npz")
    absent = next(c for c in range(1, len(ds.classes) + 1) if not any(c in s.labels() for s in g.shown))
    with pytest.raises(ValueError, match="no photograph has the class"): list(show.sheet(g, cls=absent))


def test_long_names_are_cut(ds, seeds):
    g = show.gallery(ds, seeds, ".npz", side=96)
    g = g._replace(shown=[g.shown[0]._replace(id="x"*500)], classes=("very long name of a class "*9,)*len(ds.classes))
    assert next(show.sheet(g, side=96)).width < 500


@pytest.mark.parametrize("harm, word", [("cut", "not a readable seed file"), ("size", "were they made from other photographs"), ("class", "counted from 0")])
def test_bad_seed_is_named_and_left_out(voc, ds, seeds, tmp_path, capsys, harm, word):
    path = seeds/f"{ds.ids[2]}.npz"
    if harm == "cut": path.write_bytes(path.read_bytes()[:5000])
    elif harm == "size": save_seed(path, Seed(np.array([0]), np.ones((1, 9, 9), np.float32), np.ones((1, 33, 33), np.float32)))
    else: save_seed(path, made_seed(ds, 2)._replace(keys=made_seed(ds, 2).keys + 40))
    code, text = command(capsys, ["show", seeds, "--data", voc, "--split", "val", "--out", tmp_path/"page.html"])
    assert code == 1 and ds.ids[2] in text and word in text and "5 photographs" in text
    told = content((tmp_path/"page.html").read_text())
    assert len(told["items"]) == 5 and [s[0] for s in told["skipped"]] == [ds.ids[2]]


def test_torn_and_missing_masks_are_left_out(voc, ds, tmp_path, capsys):
    (tmp_path/"masks").mkdir()
    for i in range(5): (tmp_path/f"masks/{ds.ids[i]}.png").write_bytes(ds.mask_path(i).read_bytes()[:300 if i == 1 else None])
    code, text = command(capsys, ["show", tmp_path/"masks", "--data", voc, "--split", "val", "--out", tmp_path/"sheet.png"])
    assert code == 1 and ds.ids[1] in text and ds.ids[5] in text and "2 of 6 images were skipped" in text


def test_data_set_shows_its_own_masks(voc, tmp_path, capsys):
    code, text = command(capsys, ["show", voc, "--split", "val", "--out", tmp_path/"page.html"])
    told = content((tmp_path/"page.html").read_text())
    assert code == 0 and "6 photographs" in text and told["views"] == ["photograph", "mask"] and not told["slider"]


def test_names_with_spaces_and_other_alphabets(tmp_path, capsys):
    root = write_voc(tmp_path/"data", splits="val", n=1)
    (old,) = Scenes("val", 1).ids
    new = "mein Foto é 猫"
    for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
        found = next((root/folder).glob(f"{old}.*"))
        found.rename(found.with_name(new + found.suffix))
    (root/"ImageSets/Segmentation/val.txt").write_text(new + "\n", encoding="utf-8")
    (root/"ImageSets/labels.csv").unlink()
    code, text = command(capsys, ["show", root/"SegmentationClass", "--data", root, "--split", "val", "--out", tmp_path/"ein Blatt.png"])
    assert code == 0 and (tmp_path/"ein Blatt.png").exists(), text


@pytest.mark.parametrize("line, word", [
    (["{seeds}", "--out", "{out}.jpg"], "end it in .png"),
    (["{seeds}", "--out", "{out}.html", "--class", "dgo"], "did you mean 'dog'"),
    (["{seeds}/..", "--out", "{out}.html"], "name one of the folders in it"),
    (["{seeds}/nowhere", "--out", "{out}.html"], "no folder")])
def test_wrong_words_are_one_line(voc, seeds, tmp_path, capsys, line, word):
    line = [w.format(seeds=seeds, out=tmp_path/"out") for w in line]
    code, text = command(capsys, ["show", *line, "--data", voc, "--split", "val"])
    assert code == 2 and word in text and len(text.strip().splitlines()) == 1


def test_nothing_to_show_is_an_error_and_leaves_nothing(voc, ds, seeds, tmp_path, capsys):
    for f in seeds.glob("*.npz"): f.write_bytes(b"PK")
    code, text = command(capsys, ["show", seeds, "--data", voc, "--split", "val", "--out", tmp_path/"page.html"])
    assert code == 2 and "none of the 6 images can be shown" in text and not (tmp_path/"page.html").exists()


def test_iou_of_a_photograph_is_that_of_evaluation(ds, seeds):
    s = show.read_shown(ds, 1, seeds, ".npz")
    c = s.keys[0]
    assert show.image_iou(s, .4, c) == pytest.approx(scores(confusion(s.prediction(.4), s.truth, len(ds.classes)))["iou"][c])


def test_show_seeds_is_a_figure_with_a_row_per_photograph(ds, seeds):
    fig = show.show_seeds(seeds, ds, [0, 2], .4)
    assert len(fig.axes) == 8 and [a.get_title() for a in fig.axes[:4]] == list(show.VIEWS)
    assert ds.ids[2] in fig.axes[4].get_ylabel() and "IoU" in fig.axes[4].get_ylabel()


@pytest.fixture
def own(voc, ds, tmp_path):
    "Photographs without a table, and results with the table that `adcam masks` leaves beside them."
    for i in range(3):
        for path in (tmp_path/f"photos/{ds.ids[i]}.jpg", tmp_path/f"own/masks/{ds.ids[i]}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ds.image_path(i) if path.suffix == ".jpg" else ds.mask_path(i)).read_bytes())
    (tmp_path/"own/labels.csv").write_text("id,labels\n"
                                           + "".join(f"{ds.ids[i]},{';'.join(ds.classes[k] for k in np.flatnonzero(ds.label(i)))}\n" for i in range(3)))
    (tmp_path/"own/classes.txt").write_text("\n".join(ds.classes) + "\n")
    return tmp_path


@pytest.mark.parametrize("line", [["show", "{0}/own/masks", "--out", "{0}/page.html"], ["export", "{0}/own/masks", "--to", "labelme", "--out", "{0}/fix"]])
def test_results_of_adcam_masks_know_their_labels(own, capsys, line):
    code, text = command(capsys, [w.format(own) for w in line] + ["--data", own/"photos"])
    assert code == 0 and "3 photographs" in text, text


def test_masks_of_other_classes_are_refused(own, ds, capsys):
    (own/"own/classes.txt").write_text("\n".join(reversed(ds.classes)) + "\n")
    (own/"photos/labels.csv").write_text((own/"own/labels.csv").read_text())
    code, text = command(capsys, ["show", own/"own/masks", "--data", own/"photos", "--out", own/"page.html"])
    assert code == 2 and "was made for the classes" in text and len(text.strip().splitlines()) == 1
