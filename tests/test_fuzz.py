"""Noise for every reader: a right result or an error in words, never another exception, never a silent skip.

Files that are good are damaged (bytes changed, cut, inserted), tables and JSON are made of the pieces that such files have. Bounded in time:
some seconds per reader, always the same examples. ADCAM_FUZZ=20 tries twenty times as many, each time others."""
import io
import json
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from adcam.data import check_png, coco2014, folder, mask_of, open_data, read_coco, read_image, read_list, read_mask
from adcam.files import read_json, read_reports
from adcam.photo import read_photo
from adcam.seeds import Seed, check_seed, load_seed, save_seed

WORDS = (ValueError, FileNotFoundError)
MORE = int(os.environ.get("ADCAM_FUZZ", "1"))
quick = lambda n: settings(max_examples=n * MORE, deadline=None, derandomize=MORE == 1,
                           suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def in_words(read, *args):
    "The result of a reader, or None after an error that says something and names the file."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return read(*args)
        except WORDS as e:
            assert len(str(e)) > 20 and "Traceback" not in str(e)
            return None


@st.composite
def damaged(draw, good):
    "Bytes of a good file, changed at some places."
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 4))):
        at, how = draw(st.integers(0, max(0, len(data) - 1))), draw(st.sampled_from("change cut insert header".split()))
        if how == "change" and data: data[at] ^= draw(st.integers(1, 255))
        elif how == "cut": del data[at:draw(st.integers(at, len(data)))]
        elif how == "insert": data[at:at] = draw(st.binary(max_size=9))
        else: data[:8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(data)


def saved(im, form, **options):
    f = io.BytesIO()
    im.save(f, form, **options)
    return f.getvalue()


NOISE = np.random.default_rng(5).integers(0, 255, (20, 24, 3), np.uint8)
EXIF = Image.Exif(); EXIF[274] = 6
PICTURES = [saved(Image.fromarray(NOISE), "JPEG", exif=EXIF), saved(Image.fromarray(NOISE), "PNG"), saved(Image.fromarray(NOISE), "WEBP"),
            saved(Image.fromarray(NOISE), "BMP"), saved(Image.fromarray(NOISE), "TIFF"),
            saved(Image.fromarray(NOISE).convert("P"), "GIF"), saved(Image.fromarray(np.dstack([NOISE, NOISE[..., 0]])), "PNG"),
            saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 99), "PNG"), saved(Image.fromarray(NOISE).convert("CMYK"), "JPEG")]


@quick(250)
@given(damaged(PICTURES))
def test_pictures(tmp_path, data):
    path = tmp_path / "x.img"
    path.write_bytes(data)
    a, b = in_words(read_image, path, True), in_words(read_photo, path)
    assert a is None or (a.dtype == np.uint8 and a.ndim == 3 and a.shape[2] == 3)
    if a is not None and b is not None: assert np.array_equal(a, b.pixels), "explain and training must see the same"


MASKS = [saved(Image.fromarray((NOISE[..., 0] % 4)), "PNG"), saved(Image.fromarray(NOISE[..., 1] % 3).convert("P"), "PNG")]


@quick(150)
@given(damaged(MASKS))
def test_masks(tmp_path, data):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    mask = in_words(read_mask, path, 3, (20, 24))
    assert mask is None or (mask.shape == (20, 24) and set(np.unique(mask)) <= {0, 1, 2, 3, 255})
    if mask is None: return
    in_words(check_png, path)


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory):
    seed = Seed(np.array([0, 2]), NOISE[:5, :6, :2].transpose(2, 0, 1) / np.float32(255), NOISE[..., :2].transpose(2, 0, 1) / np.float32(255))
    return save_seed(tmp_path_factory.mktemp("seed") / "good.npz", seed).read_bytes(), seed


@quick(150)
@given(st.data())
def test_seeds(tmp_path, seed_file, data):
    path = tmp_path / "x.npz"
    path.write_bytes(data.draw(damaged([seed_file[0]])))
    seed = in_words(load_seed, path)
    if seed is not None: assert np.array_equal(seed.cam, seed_file[1].cam) and np.isfinite(seed.high_res).all(), "checksums leave nothing changed unnoticed"
    in_words(check_seed, path)


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    from safetensors.torch import save
    state, f = {"a.weight": torch.arange(12.).view(3, 4), "b": torch.ones(2)}, io.BytesIO()
    torch.save(dict(model=state, epoch=3), f)
    return [save(state), f.getvalue()]


@quick(150)
@given(st.data())
def test_weights(tmp_path, weight_files, data):
    from adcam.conformer import read_weights
    which = data.draw(st.integers(0, 1))
    path = tmp_path / ("x.pth" if which else "x.safetensors")
    path.write_bytes(data.draw(damaged([weight_files[which]])))
    state = in_words(read_weights, path)
    assert state is None or all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())


CELLS = st.lists(st.sampled_from(["emu", "yak", "snow leopard", ";", ",", "|", " ", "nan", "[", "]", "'", '"', "\t", "0", "1", "background", "é",
                                  "\0", "../", "\ufeff", "id"]), max_size=5).map("".join)


@quick(250)
@given(st.sampled_from(["id,labels", "id;labels", "id,emu,yak", "image\tlabels", "", "x"]),
       st.lists(st.tuples(st.sampled_from(["a", "b", "a.png", "sub/c", "c", "../a", ""]), CELLS), max_size=4), st.booleans())
def test_tables_of_labels(tmp_path_factory, head, rows, listed):
    root = tmp_path_factory.mktemp("t")
    (root / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"): (root / name).write_bytes(PICTURES[1])
    if listed: (root / "classes.txt").write_text("emu\nyak\n")
    sign = next((s for s in ",;\t" if s in head), ",")
    (root / "labels.csv").write_text("\n".join([head] + [f"{name}{sign}{cell}" for name, cell in rows]) + "\n", encoding="utf-8")
    ds = in_words(folder, root)
    if ds is None: return
    assert sorted(ds.ids) == ["a", "b", "sub__c"] and len(set(ds.classes)) == len(ds.classes) > 0, "each image has its line, none is lost"
    assert all(set(ds.label(i)) <= {0., 1.} for i in range(3)) and not any("background" == c or set(c) & set(",;|[]'\"") for c in ds.classes)


@quick(250)
@given(st.lists(st.text(st.sampled_from(list("abé ./\\\t\r\0:~")) ,
                        max_size=9) | st.sampled_from(["/JPEGImages/a.jpg /SegmentationClass/a.png", "my photo.JPG", "..", "../../a.png x"]),
                        max_size=5), st.binary(max_size=3))
def test_lists_of_ids(tmp_path, lines, tail):
    (tmp_path / "l.txt").write_bytes("\n".join(lines).encode() + tail)
    ids = in_words(read_list, tmp_path / "l.txt", {"a", "my photo"})
    if ids is None: return
    assert ids and len(set(ids)) == len(ids) and not any({"/", "\\", "\0"} & set(i) or i in (".", "..") for i in ids)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 10**12) | st.floats(width=32) | st.text(max_size=5),
                    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(["id", "size", "counts", "x"]), x, max_size=3), max_leaves=6)
NUMBER = st.integers(-20, 60) | st.floats(allow_nan=True) | st.sampled_from([1e9, None, "7"])
OUTLINE = st.lists(st.lists(NUMBER, max_size=9), max_size=3) | st.lists(NUMBER, max_size=9) | st.fixed_dictionaries(dict(size=st.just([20, 24])
    | JSON, counts=st.text(max_size=6) | st.lists(st.integers(-3, 480), max_size=5))) | JSON
ANNOTATION = st.fixed_dictionaries({}, optional=dict(id=JSON, image_id=st.sampled_from([1, 2, 3, None, "x", [1]]),
                                                     category_id=st.sampled_from([4, 9, 5, None, "4", {}]), iscrowd=st.sampled_from([0, 1, None]),
                                                     segmentation=OUTLINE, bbox=st.just([1, 2, 5, 5]) | JSON, area=JSON))


@quick(250)
@given(st.lists(ANNOTATION, max_size=4), st.sampled_from([20, None, 0, -1, "20", 10**9]), JSON)
def test_coco_json(tmp_path_factory, annotations, height, whole):
    root = tmp_path_factory.mktemp("c")
    (root / "annotations").mkdir(); (root / "val2014").mkdir()
    (root / "val2014/a.png").write_bytes(PICTURES[1])
    body = dict(images=[dict(id=1, file_name="a.png", height=height, width=24)], categories=[dict(id=4, name="emu"), dict(id=9, name="yak")],
                annotations=annotations)
    path = root / "annotations/instances_val2014.json"
    path.write_text(json.dumps(whole))
    in_words(read_coco, path)
    path.write_text(json.dumps(body))
    ds = in_words(coco2014, root, "val", False)
    if ds is None: return
    label, mask = in_words(ds.label, 0), in_words(mask_of, ds, 0)
    assert label is None or set(label) <= {0., 1.}
    if label is not None and mask is not None and height == 20:
        assert mask.shape == (20, 24) and set(np.unique(mask)) <= {0, 1, 2} and all(label[v - 1] for v in np.unique(mask) if v)


@quick(150)
@given(st.binary(max_size=40) | JSON.map(lambda x: json.dumps(x).encode()) | st.just(b"[" * 50_000))
def test_settings_and_reports(tmp_path, data):
    (tmp_path / "settings.json").write_bytes(data); (tmp_path / "skipped-0-of-1.json").write_bytes(data)
    found = in_words(read_json, tmp_path / "settings.json")
    assert found is None or isinstance(found, dict)
    in_words(read_reports, tmp_path)


@quick(60)
@given(st.text(max_size=12))
def test_names_of_data_sets(name):
    try: open_data(name, n=1)
    except (*WORDS, OSError) as e: assert str(e)
