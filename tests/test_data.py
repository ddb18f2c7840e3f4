"""adcam.data: the VOC reader, its errors, and the random views."""
import os, pickle
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from adcam.data import (IMAGENET_MEAN, IMAGENET_STD, VOC_CLASSES, TrainViews, VOCFolder, random_view, read_image, read_list, read_mask,
                        to_image, to_tensor)
from adcam.scenes import Sample, Scenes, write_voc

COCO = Path(os.environ.get("ADCAM_COCO_MINI", Path(__file__).parents[2]/"shared/data/coco_mini"))
CLASSES = ("cat", "dog", "cow")


def photo(h=40, w=60, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


class Photos:
    "A data set in memory"
    classes, ids = CLASSES, ["a", "b", "c", "d"]
    def __len__(self): return 4
    def __getitem__(self, i): return Sample(self.ids[i], photo(seed=i), np.array([1, 0, i % 2], np.float32), None)


@pytest.fixture
def folder(tmp_path):
    "Two images with masks: a (classes 1 and 3), b (class 2)"
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"): (tmp_path/sub).mkdir(parents=True)
    (tmp_path/"classes.txt").write_text("\n".join(CLASSES)+"\n")
    (tmp_path/"ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    for name, ids in (("a", (1, 3, 255)), ("b", (2,))):
        Image.fromarray(photo()).save(tmp_path/f"JPEGImages/{name}.jpg")
        mask = np.zeros((40, 60), np.uint8)
        for j, c in enumerate(ids): mask[5*j:5*j+4] = c
        Image.fromarray(mask).save(tmp_path/f"SegmentationClass/{name}.png")
    return tmp_path


# ---- tensors

def test_to_tensor_is_imagenet_normalization_and_back():
    x, image = to_tensor(photo()), photo()
    assert x.shape==(3, 40, 60) and x.dtype==torch.float32
    want = (image/255 - np.array(IMAGENET_MEAN))/np.array(IMAGENET_STD)
    assert np.allclose(x.permute(1, 2, 0).numpy(), want, atol=1e-6)
    assert np.array_equal(to_image(x), image)


@pytest.mark.parametrize("bad", [photo()/255, photo()[..., 0], photo().transpose(2, 0, 1), [[1]], photo()[..., :2]])
def test_to_tensor_refuses(bad):
    with pytest.raises(ValueError, match=r"uint8 array \(H,W,3\)"): to_tensor(bad)


# ---- files

@pytest.mark.parametrize("mode,ext", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")])
def test_every_color_mode_becomes_rgb(tmp_path, mode, ext):
    Image.fromarray(photo()).convert(mode).save(tmp_path/f"x.{ext}")
    image = read_image(tmp_path/f"x.{ext}")
    assert image.shape==(40, 60, 3) and image.dtype==np.uint8
    if mode=="L": assert np.array_equal(image[..., 0], image[..., 2])


def test_exif_only_when_asked(tmp_path):
    tag = Image.Exif()
    tag[274] = 6
    Image.fromarray(photo()).save(tmp_path/"x.jpg", exif=tag)
    assert read_image(tmp_path/"x.jpg").shape==(40, 60, 3) and read_image(tmp_path/"x.jpg", exif=True).shape==(60, 40, 3)


def test_broken_images_are_named(tmp_path):
    Image.fromarray(photo()).save(tmp_path/"x.jpg")
    (tmp_path/"torn.jpg").write_bytes((tmp_path/"x.jpg").read_bytes()[:900])
    (tmp_path/"text.jpg").write_text("not an image")
    for name in ("torn.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=f"{name}.*Copy or download"): read_image(tmp_path/name)
        with pytest.raises(ValueError, match=f"{name}.*Copy or download"): read_mask(tmp_path/name, 3)
    with pytest.raises(FileNotFoundError, match="none.jpg"): read_image(tmp_path/"none.jpg")


def test_read_list(tmp_path):
    (tmp_path/"l.txt").write_text("/JPEGImages/2007_1.jpg /SegmentationClass/2007_1.png\n\n x.y \nz 1\n")
    assert read_list(tmp_path/"l.txt")==["2007_1", "x.y", "z"]


# ---- folder

def test_labels_from_masks(folder):
    ds = VOCFolder(folder, "train")
    assert ds.classes==CLASSES and ds.ids==["a", "b"] and len(ds)==2
    assert [s.label.tolist() for s in ds]==[[1, 0, 1], [0, 1, 0]]
    assert ds[0].mask.shape==ds[0].image.shape[:2]==(40, 60) and ds[0].label.dtype==np.float32


def test_labels_from_xml_before_masks(folder):
    cows = "<object><name>cow</name></object><object><name>cow</name><difficult>1</difficult></object>"
    (folder/"Annotations/a.xml").write_text(f"<annotation>{cows}</annotation>")
    assert VOCFolder(folder, "train").label(0).tolist()==[0, 0, 1]


def test_labels_from_table_before_all(folder):
    (folder/"ImageSets/labels.csv").write_text("id,cat,dog,cow\na,0,1,0\nb,1,1,1\nzzz,0,0,0\n")
    assert [s.label.tolist() for s in VOCFolder(folder, "train")]==[[0, 1, 0], [1, 1, 1]]


def test_no_masks_are_fine_with_a_table(folder):
    (folder/"ImageSets/labels.csv").write_text("id,cat,dog,cow\na,0,1,0\nb,1,1,1\n")
    (folder/"SegmentationClass/a.png").unlink()
    assert VOCFolder(folder, "train")[0].mask is None


def test_labels_cannot_be_changed_from_outside(folder):
    ds = VOCFolder(folder, "train")
    ds.label(0)[:] = 7
    assert ds.label(0).max()==1


@pytest.mark.parametrize("harm,words", [
    (lambda f: (f/"JPEGImages/b.jpg").unlink(), "1 of 2 listed images have no image"),
    (lambda f: (f/"ImageSets/Segmentation/train.txt").unlink(), "has no lists"),
    (lambda f: (f/"ImageSets/Segmentation/train.txt").write_text(""), "is empty"),
    (lambda f: (f/"ImageSets/Segmentation/train.txt").write_text("a\na\n"), "more than once"),
    (lambda f: (f/"ImageSets/labels.csv").write_text("id,cat,dog,cow\na,0,1,0\n"), "1 of 2 listed images have no line"),
    (lambda f: (f/"ImageSets/labels.csv").write_text("id,dog,cat,cow\n"), "expected the classes"),
    (lambda f: (f/"ImageSets/labels.csv").write_text("id,cat,dog,cow\na,0,1\n"), "line 2: expected an id and 3 values"),
    (lambda f: (f/"ImageSets/labels.csv").write_text("id,cat,dog,cow\na,0,1,2\n"), "line 2")])
def test_incomplete_folders(folder, harm, words):
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words): VOCFolder(folder, "train")


@pytest.mark.parametrize("harm,words", [
    (lambda f: (f/"SegmentationClass/a.png").unlink(), "has no label"),
    (lambda f: Image.fromarray(np.full((40, 60), 4, np.uint8)).save(f/"SegmentationClass/a.png"), r"class ids \[4\], but there are 3"),
    (lambda f: Image.fromarray(np.zeros((60, 40), np.uint8)).save(f/"SegmentationClass/a.png"), "is 60x40, its image 40x60"),
    (lambda f: Image.fromarray(photo()).save(f/"SegmentationClass/a.png"), "color mode RGB"),
    (lambda f: (f/"Annotations/a.xml").write_text("<a><object>"), "cannot read annotation"),
    (lambda f: (f/"Annotations/a.xml").write_text("<a><object><name>bear</name></object></a>"), r"unknown classes \['bear'\]"),
    (lambda f: (f/"JPEGImages/a.jpg").write_bytes(b"\xff\xd8\xff"), "cannot read image")])
def test_broken_items(folder, harm, words):
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words): VOCFolder(folder, "train")[0]


def test_unknown_folder_and_list(folder):
    with pytest.raises(FileNotFoundError, match="no folder"): VOCFolder(folder/"x", "train")
    with pytest.raises(FileNotFoundError, match="the folder has train"): VOCFolder(folder, "val")


def test_fingerprint_sees_every_byte(folder):
    before = VOCFolder(folder, "train").fingerprint()
    assert before==VOCFolder(folder, "train").fingerprint() and len(before)==64
    assert before!=VOCFolder(folder, "train", classes=("Cat", "dog", "cow")).fingerprint()
    mask = read_mask(folder/"SegmentationClass/b.png", 3)
    mask[-1, -1] = 2
    Image.fromarray(mask).save(folder/"SegmentationClass/b.png")
    assert before!=VOCFolder(folder, "train").fingerprint()


def test_reads_what_scenes_writes(tmp_path):
    write_voc(tmp_path, ("train", "val"), n=2, size=64)
    for split in ("train", "val"):
        ours, theirs = VOCFolder(tmp_path, split), Scenes(split, 2, 64)
        assert (ours.ids, ours.classes)==(theirs.ids, theirs.classes)
        for a, b in zip(ours, theirs):
            assert np.array_equal(a.label, b.label) and np.array_equal(a.mask, b.mask) and a.image.shape==b.image.shape


@pytest.mark.skipif(not COCO.exists(), reason="coco_mini is not here")
def test_coco_mini():
    train, val = VOCFolder(COCO, "train_voc20"), VOCFolder(COCO, "val_voc20")
    assert (len(train), len(val), train.classes)==(96, 71, VOC_CLASSES)
    counts = np.stack([train.label(i) for i in range(96)]).sum(0).astype(int).tolist()
    assert counts==[6, 5, 4, 3, 11, 4, 12, 3, 17, 0, 18, 6, 2, 4, 58, 14, 0, 3, 4, 3]
    s = val[0]
    assert s.mask.shape==s.image.shape[:2] and s.label.sum()>0


# ---- views

def slow_view(image, crop, resize, rng):
    "IRN's order of operations, on the whole image"
    H, W = image.shape[:2]
    long = int(rng.integers(resize[0], resize[1]+1)) if resize else max(H, W)
    h, w = (max(1, round(n*long/max(H, W))) for n in (H, W))
    x = to_tensor(np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)))
    if rng.random()<0.5: x = x.flip(2)
    place = []
    for n in (w, h):
        space = n-crop
        place.append((int(rng.integers(space+1)), 0, crop) if space>0 else (0, int(rng.integers(-space+1)), n))
    (a, ca, cw), (b, cb, ch) = place
    view = torch.zeros(3, crop, crop)
    view[:, cb:cb+ch, ca:ca+cw] = x[:, b:b+ch, a:a+cw]
    return view


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 48), st.integers(1, 50), st.integers(0, 40), st.booleans(), st.integers(0, 9999))
def test_view_equals_the_obvious_one(h, w, crop, low, more, native, seed):
    resize = None if native else (low, low+more)
    fast, slow = (f(photo(h, w), crop, resize, np.random.default_rng(seed)) for f in (random_view, slow_view))
    assert torch.equal(fast, slow)


def test_small_images_lie_on_zeros():
    view = random_view(np.full((10, 20, 3), 255, np.uint8), 32, None, np.random.default_rng(0))
    filled = (view!=0).all(0)
    assert filled.sum()==200 and (view[:, ~filled]==0).all()


def test_sizes_cover_the_range_and_half_are_mirrored():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    views = [random_view(image, 40, (20, 24), np.random.default_rng(s)) for s in range(300)]
    assert {int((v[0]!=0).any(0).sum()) for v in views}=={20, 21, 22, 23, 24}
    mirrored = np.mean([v[0].sum(0).argmax()>v[0].sum(0).argmin() for v in views])
    assert 0.3<mirrored<0.7


def test_views_depend_on_seed_epoch_index_only():
    views = TrainViews(Photos(), crop=32, resize=(30, 60), seed=3)
    x, y = views[1]
    assert x.shape==(3, 32, 32) and y.tolist()==[1, 0, 1]
    [views[i] for i in (3, 0)]
    assert torch.equal(views[1][0], x) and torch.equal(TrainViews(Photos(), 32, (30, 60), 3)[1][0], x)
    assert not torch.equal(TrainViews(Photos(), 32, (30, 60), 4)[1][0], x)
    views.set_epoch(1)
    assert not torch.equal(views[1][0], x)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing_and_hear_of_new_epochs(context):
    views = TrainViews(Photos(), crop=32, resize=(30, 60))
    loader = DataLoader(views, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context=context)
    for epoch in range(2):
        views.set_epoch(epoch)
        x, y = next(iter(loader))
        assert torch.equal(x, torch.stack([views[i][0] for i in range(4)])) and y.shape==(4, 3)


def test_views_can_be_pickled():
    views = TrainViews(Photos(), crop=32)
    views.set_epoch(5)
    assert torch.equal(pickle.loads(pickle.dumps(views))[2][0], views[2][0])


@pytest.mark.parametrize("kw,words", [(dict(crop=0), "crop is 0"), (dict(resize=(5, 4)), "1 <= low <= high"), (dict(resize=(0, 4)), "1 <= low")])
def test_bad_view_settings(kw, words):
    with pytest.raises(ValueError, match=words): TrainViews(Photos(), **kw)
