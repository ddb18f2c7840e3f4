"adcam.photo: reading, names, sizes, the call, batches, masks, leaks, the inspector's maps."
import gc
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from adcam import cam, photo
from adcam.branches import TwoBranch, group_maps
from adcam.data import to_tensor
from adcam.photo import MIN_SIDE, Names, Photo, explain, find_class, find_group, find_groups, imagenet_names, otsu, save_masks, network_size, read_photo

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return TwoBranch("test_resnet", "test_vit", None).eval()


def saved(array, form="png", mode=None, **options):
    file = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(file, form, **options)
    return file.getvalue()


# --- reading


@pytest.mark.parametrize("make", [
    Image.fromarray, lambda a: a, lambda a: a / 255, lambda a: (a / 255).astype(np.float32), lambda a: a.transpose(2, 0, 1), torch.from_numpy,
    lambda a: torch.from_numpy(a).permute(2, 0, 1), lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 255,
    lambda a: (torch.from_numpy(a) / 255).requires_grad_(), lambda a: Photo(a)])
def test_every_form_gives_the_same_pixels(make):
    assert (read_photo(make(PICTURE)).pixels == PICTURE).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "LA", "RGBA", "PA"])
def test_every_mode_of_pillow_becomes_rgb(mode, tmp_path):
    picture = Image.fromarray(PICTURE).convert("RGB" if mode == "PA" else mode)
    picture = picture.convert("P").convert("PA") if mode == "PA" else picture
    got = read_photo(picture)
    assert got.pixels.shape == PICTURE.shape and got.pixels.dtype == np.uint8 and not got.notes


def test_gray_arrays():
    gray = PICTURE[..., 0]
    for form in (gray, gray[..., None], gray[None], torch.from_numpy(gray)):
        assert (read_photo(form).pixels == gray[..., None]).all()


@given(alpha=st.integers(0, 255), value=st.integers(0, 255))
def test_alpha_is_composited_on_white(alpha, value):
    rgba = np.full((16, 16, 4), value, np.uint8)
    rgba[..., 3] = alpha
    got = read_photo(rgba)
    assert abs(int(got.pixels[0, 0, 0]) - (value * alpha + 255 * (255 - alpha)) / 255) <= 1
    assert bool(got.notes) == (alpha < 255)


def test_a_palette_with_a_transparent_color(tmp_path):
    picture = Image.new("P", (20, 20), 0)
    picture.putpalette([10, 20, 30] + [0] * 765)
    picture.save(tmp_path / "t.png", transparency=0)
    got = read_photo(tmp_path / "t.png")
    assert (got.pixels == 255).all() and "white" in got.notes[0]


@pytest.mark.parametrize("tag, turn",
                         [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270),
                          (2, Image.Transpose.FLIP_LEFT_RIGHT)])
def test_phones_are_turned_upright(tag, turn, tmp_path):
    turned = Image.fromarray(PICTURE).transpose(turn)
    exif = turned.getexif()
    exif[0x0112] = tag
    turned.save(tmp_path / "p.png", exif=exif)
    assert (read_photo(tmp_path / "p.png").pixels == PICTURE).all()


@pytest.mark.parametrize("content, word",
                         [(b"", "no picture that Pillow"), (b"GIF89a", "Pillow|damaged"), (b"hello", "no picture that Pillow"),
                          (saved(PICTURE)[:3000], "damaged"),
                                           (saved(PICTURE, "jpeg")[:600], "damaged|Pillow")])
def test_damaged_files(content, word, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=word): read_photo(tmp_path / "x.png")


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 2500), byte=st.integers(0, 255))
def test_a_changed_byte_gives_a_picture_or_a_reason(tmp_path_factory, at, byte):
    content = bytearray(saved(PICTURE, "jpeg"))
    content[at % len(content)] = byte
    path = tmp_path_factory.mktemp("b") / "x.jpg"
    path.write_bytes(content)
    try: assert read_photo(path).pixels.shape[2] == 3
    except ValueError as e: assert str(e)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"): read_photo(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="folder"): read_photo(tmp_path)
    for url in ("https://example.org/a.jpg", "HTTP://example.org/a.jpg", "s3://bucket/a.png", Path("https://example.org/a.jpg"), "file:///a.png"):
        with pytest.raises(ValueError, match="download the picture first"): read_photo(url)


def test_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")          # 20 kB on disk, 432 MB as RGB
    limit, before = Image.MAX_IMAGE_PIXELS, psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match="144 million pixels, the limit is 50 million.*--max-megapixels"): read_photo(tmp_path / "huge.png")
    assert psutil.Process().memory_info().rss - before < 50e6 and Image.MAX_IMAGE_PIXELS == limit
    with pytest.raises(ValueError, match="limit is 0 million"): read_photo(PICTURE, max_pixels=6000)
    assert read_photo(PICTURE, max_pixels=64 * 96).pixels.shape == PICTURE.shape


def test_the_limit_can_be_raised(tmp_path):
    Image.new("L", (3000, 2000)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="--max-megapixels"): read_photo(tmp_path / "m.png", max_pixels=5_000_000)
    assert read_photo(tmp_path / "m.png", max_pixels=6_000_000).pixels.shape == (2000, 3000, 3)


@pytest.mark.parametrize("bad, word", [
    (PICTURE[:1, :1], "1x1 pixels"), (PICTURE[:0], "96x0"), (PICTURE[:, :0], "0x64"), (PICTURE[:MIN_SIDE - 1], "at least"),
    (np.zeros((20, 20, 2), np.uint8), "C = 1, 3 or 4"), (np.zeros((2, 3, 20, 20), np.uint8), "shape"),
    (np.zeros(20, np.uint8), "shape"), (PICTURE.astype(np.int32), "dtype int32"), (PICTURE.astype(float), "before normalization"),
    (PICTURE / 255 - .5, "before normalization"),
    (PICTURE * np.nan, "NaN"), (torch.zeros(3, 20, 20, dtype=torch.long), "dtype int64"), (np.zeros((20, 20, 3), bool), "dtype bool"),
    (np.zeros((20, 20, 3), complex), "dtype complex"),
    (None, "NoneType"), (7, "type int"), (b"abc", "type bytes"), (Image.new("F", (20, 20)), "8 or 16 bits"), (Image.new("RGB", (0, 9)), "0x9")])
def test_what_is_no_picture(bad, word):
    with pytest.raises(ValueError, match=word): read_photo(bad)


# --- names


def test_every_imagenet_class_is_found_by_its_description_synset_and_number():
    names = imagenet_names()
    assert len(names.descriptions) == 1000 and names.descriptions[0].startswith("tench")
    for i, (text, synset) in enumerate(zip(*names)):
        assert find_class(synset, names) == find_class(i, names) == find_class(str(i), names) == i
        if names.descriptions.count(text) == 1 and text not in ("crane", "maillot"): assert find_class(text.upper(), names) == i


@pytest.mark.parametrize("wanted, word",
                         [("tabbi", "nearest: tabby"), ("crane", r"134 \(crane\), 517 \(crane\)"), ("1000", "no class"), ("-1", "no class"),
                          ("", "no class"), ("qqqq", "a number from 0 to 999")])
def test_names_that_are_not_there(wanted, word):
    with pytest.raises(ValueError, match=word): find_class(wanted, imagenet_names())


def test_several_names():
    names = Names(("cat", "dog, hound", "7"))
    found = lambda classes: [g.members for g in find_groups(classes, names)]
    assert found("dog,cat,hound") == [(1,), (0,)] and found(2) == [(2,)] and find_class("7", names) == 2
    for nothing in ([], " , "):
        with pytest.raises(ValueError, match="at least one"): find_groups(nothing, names)


@pytest.mark.parametrize("wanted, members",
                         [("cat", range(281, 286)), ("TV", (664, 782, 851)), ("airplane", (404, 895)), ("potted plant", (738,)), ("shark", (2, 3, 4)),
                          ("shepherd", (235,)), ("sports car", (817,)), ("golden", (207,)), ("zebra", (340,))])
def test_a_word_that_names_no_class_stands_for_several(wanted, members):
    assert find_group(wanted, imagenet_names()).members == tuple(members)


def test_names_of_voc_are_groups_of_imagenet_only():
    with pytest.raises(ValueError, match="no class 'cat'"): find_group("cat", Names(("dog", "horse")))
    assert find_group("cat", Names(("dog", "wild cat"))).members == (1,)                # its own names are searched


def test_groups_of_ones_own():
    assert find_groups("bus=minibus,school bus; pet=cat,goldfish", imagenet_names()) == [("bus", (654, 779)), ("pet", (281, 282, 283, 284, 285, 1))]
    for wrong in ("bus=", "=tabby", "bus=tabby;lynx"):
        with pytest.raises(ValueError, match="NAME=CLASS"): find_groups(wrong, imagenet_names())


def test_what_imagenet_lacks_is_said():
    with pytest.raises(ValueError, match="no class for VOC's 'person'"): find_group("person", imagenet_names())


def test_the_map_of_a_group_comes_from_its_strongest_members(pair):
    whole, parts = explain(PICTURE, "big cat=tabby,lynx", model=pair, size=96,
                           methods="cam"), explain(PICTURE, "tabby,lynx", model=pair, size=96, methods="cam")
    assert whole.classes == whole.short == ("big cat",) and whole.indices == ((281, 287),) and whole.logits == (max(parts.logits),)
    assert "2 classes" in whole.notes[-1] and parts.short == ("tabby", "lynx")
    with torch.no_grad(): maps = pair.maps(photo._input(PICTURE, network_size(64, 96, 96, pair.stride))[None])
    np.testing.assert_allclose(whole.heat["cam"][0], cam.normalize(group_maps(maps.cam, [(281, 287)]).relu(), eps=1e-12)[0, 0].numpy(), atol=1e-5)


def test_names_alike_get_their_number(pair):
    assert explain(PICTURE, [134, 517, 3], model=pair, size=96).short == ("crane (134)", "crane (517)", "tiger shark")


# --- sizes


@given(height=st.integers(16, 9000), width=st.integers(16, 9000), size=st.integers(64, 640), stride=st.sampled_from([8, 14, 16]))
def test_network_size(height, width, size, stride):
    h, w = network_size(height, width, size, stride)
    assert h % stride == w % stride == 0 and min(h, w) >= stride
    assert h * w <= (size + stride) ** 2 * (1.5 + stride / min(h, w))                   # never many more tokens than asked for
    if min(h, w) >= 8 * stride: assert abs(np.log(h / w) - np.log(height / width)) < .15  # the shape is kept


# --- the call


def test_maps_are_those_of_adcam_cam(pair):
    found = explain(PICTURE, ["tabby", 3], model=pair, size=96, methods=tuple(photo.METHODS), k=7, steps=3, direction="push", layers="all")
    size = network_size(64, 96, 96, pair.stride)
    x = to_tensor(np.asarray(Image.fromarray(PICTURE).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3)))[None]
    with torch.no_grad(): maps = pair.maps(x)
    expected = dict(cam=cam.cam_map(maps, [281, 3]), ts_cam=cam.ts_cam(maps, classes=[281, 3]), att_diffu=cam.att_diffu(maps, 3, classes=[281, 3]),
                    ad_cam=cam.ad_cam(maps, 7, 3, classes=[281, 3]))
    for name, m in expected.items(): np.testing.assert_allclose(found.heat[name], cam.normalize(m, eps=1e-12)[0].numpy(), atol=1e-4)
    assert found.settings["k"] == 7 and found.indices == (281, 3) and set(found.heat) == set(photo.METHODS)


def test_batch_equals_single_images(pair):
    pictures = [RNG.integers(0, 256, s, dtype=np.uint8) for s in ((64, 96, 3), (96, 64, 3), (64, 96, 3), (80, 80, 3))]
    alone = [explain(p, model=pair, size=96) for p in pictures]
    for t, a in zip(explain(pictures, model=pair, size=96), alone):
        assert t.classes == a.classes and t.logits == a.logits and all((t.heat[m] == a.heat[m]).all() for m in a.heat) and (t.mask() == a.mask()).all()
    for t, a in zip(explain(pictures, model=pair, size=96, batch_size=3), alone):      # rounding, and a swapped neighbor now and then
        assert t.classes == a.classes and (t.image == a.image).all()
        np.testing.assert_allclose(t.heat["ts_cam"], a.heat["ts_cam"], atol=1e-3)
        assert np.abs(t.heat["ad_cam"] - a.heat["ad_cam"]).mean() < 5e-3
    stack = np.stack([pictures[0], pictures[2]])
    assert [e.heat["cam"].tolist() for e in explain(stack, model=pair, size=96)] == [alone[0].heat["cam"].tolist(), alone[2].heat["cam"].tolist()]
    assert len(explain(torch.from_numpy(stack).permute(0, 3, 1, 2), model=pair, size=96)) == 2


def test_mask_and_heat(pair):
    found = explain(PICTURE, [1, 2, 3], model=pair, size=96, threshold=.3)
    heat = found.heat_map("cam")
    assert heat.shape == (3, 64, 96) and heat.min() >= 0 and heat.max() <= 1
    for t in (0, .3, .99): assert (found.mask("cam", t) == np.where(heat.max(0) > t, heat.argmax(0) + 1, 0)).all()
    assert (found.mask("cam") == found.mask("cam", .3)).all() and found.mask("cam").dtype == np.uint8
    assert found.mask("cam", size=(10, 20)).shape == (10, 20)
    for t in (1, -.1):
        with pytest.raises(ValueError, match="threshold"): found.mask("cam", t)
    with pytest.raises(ValueError, match="there are cam"): found.heat_map("att_diffu")


def test_otsu_parts_two_heaps():
    heat = np.concatenate([RNG.normal(.2, .03, 3000), RNG.normal(.7, .05, 800)]).clip(0, 1)
    assert .25 < otsu(heat) < .6
    spread = lambda t: (heat <= t).mean() * (heat > t).mean() * (heat[heat <= t].mean() - heat[heat > t].mean()) ** 2
    assert spread(otsu(heat)) >= max(spread(t) for t in np.linspace(.21, .69, 49)) - 1e-4
    assert otsu(np.full(9, .5)) == 0


def test_the_threshold_can_come_from_the_picture(pair):
    found = explain(PICTURE, [1, 2], model=pair, size=96, threshold="auto")
    t = otsu(found.heat_map("cam").max(0))
    assert found.cut("cam") == t and (found.mask("cam") == found.mask("cam", t)).all() and found.mask("cam", .9).sum() < found.mask("cam").sum()
    assert any("Otsu" in a.get_ylabel() for a in found.figure().axes)


def test_masks_are_saved_with_their_names(pair, tmp_path):
    first, second = (explain(PICTURE, c, model=pair, size=96) for c in (["tabby", "cab"], ["lynx", "tabby"]))
    paths = [save_masks(f, tmp_path, n) for f, n in ((first, "a"), (second, "b"))]
    assert (tmp_path / "classes.txt").read_text().splitlines() == ["tabby", "cab", "lynx"]
    for found, path, numbers in zip((first, second), paths, ([0, 1, 2], [0, 3, 1])):
        picture = Image.open(path)
        assert picture.mode == "P" and (np.asarray(picture) == np.array(numbers)[found.mask()]).all()
    assert picture.getpalette()[3:6] == photo.viz.palette()[1].tolist()
    (tmp_path / "classes.txt").write_text("".join(f"c{i}\n" for i in range(253)))
    with pytest.raises(ValueError, match="up to 254"): save_masks(first, tmp_path, "c")
    assert not (tmp_path / "c.png").exists()


def test_top_classes_are_those_of_the_cnn(pair):
    found = explain(PICTURE, model=pair, size=96, top=4)
    assert len(found.classes) == 4 and list(found.logits) == sorted(found.logits, reverse=True)


def test_a_network_of_ones_own():
    torch.manual_seed(0)
    own = TwoBranch("test_resnet", "test_vit", 2).train()
    found = explain(PICTURE, "dog", model=own, class_names=["cat", "dog"], size=96)
    assert found.indices == (1,) and own.training and own.vit.training                # left as it was
    assert explain(PICTURE, model=own, size=96, top=5).classes[0].startswith("class ")
    own.class_names = ("cat", "dog")
    assert explain(PICTURE, "cat", model=own, size=96).classes == ("cat",)
    with pytest.raises(ValueError, match="3 class names for a network of 2"): explain(PICTURE, model=own, class_names=list("abc"))


@pytest.mark.parametrize("options, word", [
    (dict(methods="gradcam"), "choose from"), (dict(methods=()), "empty"), (dict(classes="zebrra"), "zebra"), (dict(k=10_000), "k=10000"),
    (dict(k=0), "k=0"), (dict(steps=-1), "steps=-1"),
    (dict(direction="up"), "push"), (dict(layers=99), "layers=99"), (dict(size=4), "at least 16"), (dict(batch_size=0), "at least 1"),
    (dict(top=0), "at least 1"), (dict(threshold=1.5), "threshold=1.5"), (dict(threshold="otsu"), "or auto")])
def test_options_that_do_not_fit(pair, options, word):
    with pytest.raises(ValueError, match=word): explain(PICTURE, model=pair, **dict(size=96) | options)


def test_no_pictures(pair):
    with pytest.raises(ValueError, match="list is empty"): explain([], model=pair)


def test_names_of_networks_and_weight_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="resnet50"): explain(PICTURE, cnn="resnet_50", pretrained=False)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        explain(PICTURE, cnn="test_resnet", vit="test_vit", cnn_weights=tmp_path / "none.safetensors", pretrained=False)
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="cnn_weights"): explain(PICTURE, cnn="test_resnet", vit="test_vit")


def test_weights_from_files_and_their_hash(tmp_path):
    import hashlib
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(1)
    for name in ("test_resnet", "test_vit"): save_file(timm.create_model(name).state_dict(), tmp_path / f"{name}.safetensors")
    files = dict(cnn_weights=tmp_path / "test_resnet.safetensors", vit_weights=str(tmp_path / "test_vit.safetensors"))
    call = lambda: explain(PICTURE, 1, "test_resnet", "test_vit", size=160, device="cpu", **files)
    first, again = call(), call()
    assert first.weights["cnn"]["sha256"] == hashlib.sha256((tmp_path / "test_resnet.safetensors").read_bytes()).hexdigest() and not first.notes
    assert (first.heat["ad_cam"] == again.heat["ad_cam"]).all()
    assert photo._build.cache_info().hits >= 1                                         # the pair was kept
    other = timm.create_model("test_resnet")
    save_file(other.state_dict(), tmp_path / "new.safetensors")
    os.replace(tmp_path / "new.safetensors", tmp_path / "test_resnet.safetensors")
    assert (call().heat["cam"] != first.heat["cam"]).any()                             # a changed file is read again
    with pytest.raises(ValueError, match="does not fit"): explain(PICTURE, 1, "test_resnet", "test_vit", cnn_weights=files["vit_weights"])


def test_a_vit_whose_positions_cannot_be_resized_gets_its_own_size():
    torch.manual_seed(0)
    fixed = TwoBranch("test_resnet", "beit_base_patch16_224", None, depth=1, embed_dim=48, num_heads=3)
    assert explain(PICTURE, 1, model=fixed, size=64).settings["grid"] == (14, 14)


# --- drawing and writing


def test_figure_and_save(pair, tmp_path):
    found = explain(PICTURE, [1, 2], model=pair, size=96)
    fig = found.figure()
    assert [a.get_title() for a in fig.axes[:4]] == ["picture", "CAM", "TS-CAM", "AD-CAM"] and len(fig.axes) == 12
    for name in ("o.png", "o.jpg", "sub/o.pdf", "o.svg"): assert found.save(tmp_path / name).stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jpg", "o.png", "o.svg", "sub"]   # no temporary file is left
    with pytest.raises(ValueError, match=r"\.png"): found.save(tmp_path / "o.docx")
    assert found._repr_png_()[:4] == b"\x89PNG" and "goldfish" in repr(found)
    import matplotlib.pyplot as plt
    assert not plt.get_fignums()


# --- what must not grow


def test_200_calls_leak_nothing(pair):
    process = psutil.Process()
    def calls(n):
        for i in range(n): explain(PICTURE[:, : 96 - 16 * (i % 3)], [1, 2], model=pair, size=64).mask()
        gc.collect()
        return process.memory_info().rss, len(gc.get_objects())
    calls(60)
    before, some = calls(10)
    after, more = calls(200)
    assert more - some <= 50 and after - before < 8 * 2**20, (after - before, more - some)
    assert not any(m._forward_hooks for m in pair.modules())


# --- the inspector


def test_inspect_shows_the_refined_matrix(pair):
    pytest.importorskip("ipyevents")
    box = photo.inspect(PICTURE, [1, 2], model=pair, size=160, ks=(3, 9), steps=(0, 1, 2), layers="all")
    tool = box.tool
    size = network_size(64, 96, 160, pair.stride)
    with torch.no_grad(): maps = pair.maps(photo._input(PICTURE, size)[None])
    A = cam.patch_attention(maps.attn)
    refined = cam.refine(A, 9)[0].numpy()
    tool.k = 9
    for tool.patch in range(0, len(refined), 7): np.testing.assert_allclose(tool.rows()["refined"], refined[tool.patch], atol=1e-5)
    np.testing.assert_allclose(tool.heat[9, 2, "push"], cam.ad_cam(maps, 9, 2, classes=[1, 2])[0].numpy(), rtol=1e-3, atol=1e-4)
    assert tool.classes == ["goldfish", "great white shark"]


# --- the package


def test_import_of_the_package_stays_light(root):
    "`import adcam` must not import torch; photo must not import ipywidgets."
    code = "import sys, adcam; assert 'torch' not in sys.modules; import adcam.photo; assert 'ipywidgets' not in sys.modules and 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(root), timeout=120)


def test_explain_stands_at_top_level():
    import adcam
    assert adcam.explain is explain
    with pytest.raises(AttributeError, match="nothing"): adcam.nothing
