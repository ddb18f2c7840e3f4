"adcam.viz: palette, colors, overlays, error maps, figures."
import matplotlib
matplotlib.use("Agg")
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from adcam.viz import ERROR_COLORS, colorize, error_map, overlay, palette, set_style, show_images, show_matrix

GRAY = np.full((12, 16, 3), 128, np.uint8)


def slow_color(c):
    "The VOC devkit's loop, bit by bit."
    rgb = [0, 0, 0]
    for j in range(8):
        for k in range(3): rgb[k] |= ((c >> (3 * j + k)) & 1) << (7 - j)
    return rgb


def test_palette_equals_the_loop_and_is_a_copy():
    assert palette().tolist() == [slow_color(c) for c in range(256)]
    palette()[0] = 9
    assert palette()[0].tolist() == [0, 0, 0] and palette().dtype == np.uint8


@given(arrays(np.uint8, (3, 5)))
def test_colorize_is_a_lookup(mask):
    assert (colorize(mask) == palette()[mask]).all()
    assert (colorize(mask.astype(np.int64)) == colorize(mask)).all()


@pytest.mark.parametrize("bad, word", [(np.zeros((2, 2, 3), int), "(H,W)"), (np.zeros((2, 2)), "integers"), (np.array([[300]]), "0..255"), (np.array([[-1]]), "0..255")])
def test_colorize_refuses(bad, word):
    with pytest.raises(ValueError, match=word.replace("(", r"\(").replace(")", r"\)")): colorize(bad)


@settings(deadline=None, max_examples=25)
@given(arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)), st.floats(0, 1))
def test_overlay_blends_between_image_and_map(heat, alpha):
    out = overlay(GRAY, heat, alpha)
    assert out.shape == GRAY.shape and out.dtype == np.uint8
    full = overlay(GRAY, heat, 1.0).astype(float)
    assert np.abs(out - ((1 - alpha) * GRAY + alpha * full)).max() <= 1.01


def test_overlay_ends():
    heat = np.linspace(0, 1, 12 * 16).reshape(12, 16)
    assert (overlay(GRAY, heat, 0.0) == GRAY).all()
    expected = 255 * matplotlib.colormaps["viridis"](heat)[..., :3]
    assert np.abs(overlay(GRAY, heat, 1.0, "viridis") - expected).max() <= 0.51


@pytest.mark.parametrize("image, heat, alpha, word", [
    (GRAY, np.full((2, 2), 1.5), 0.5, "normalize"), (GRAY, np.full((2, 2), -0.2), 0.5, "normalize"), (GRAY, np.full((2, 2), np.nan), 0.5, "NaN"),
    (GRAY, np.zeros((1, 2, 2)), 0.5, "one map"), (GRAY, np.zeros((2, 2)), 1.5, "alpha"), (GRAY / 255, np.zeros((2, 2)), 0.5, "uint8"),
    (GRAY.transpose(2, 0, 1), np.zeros((2, 2)), 0.5, "channels come last")])
def test_overlay_refuses(image, heat, alpha, word):
    with pytest.raises(ValueError, match=word): overlay(image, heat, alpha)


@given(arrays(np.uint8, (4, 4), elements=st.sampled_from([0, 1, 2])), arrays(np.uint8, (4, 4), elements=st.sampled_from([0, 1, 2, 255])), st.sampled_from([None, 1, 2]))
def test_error_map_pixel_by_pixel(pred, gt, cls):
    out = error_map(pred, gt, cls)
    for p, g, color in zip(pred.ravel(), gt.ravel(), out.reshape(-1, 3)):
        said, there = (p > 0, g > 0) if cls is None else (p == cls, g == cls)
        if g == 255: want = "ignored"
        elif said and there: want = "true positive" if p == g else "wrong class"
        else: want = "false positive" if said else "false negative" if there else "background"
        assert tuple(color) == ERROR_COLORS[want]


def test_error_map_refuses_other_sizes():
    with pytest.raises(ValueError, match="same"): error_map(np.zeros((2, 2), int), np.zeros((3, 2), int))


def test_figures():
    set_style()
    fig = show_images([GRAY, np.zeros((4, 4), np.uint8), np.zeros((2, 2))], ["a", "b", "c"], ncols=2, title="all")
    assert len(fig.axes) == 4 and [a.get_title() for a in fig.axes[:3]] == ["a", "b", "c"]
    assert show_matrix(np.eye(3), "eye").axes[0].get_title() == "eye"
    both = matplotlib.figure.Figure().subplots(1, 2)
    assert show_matrix(np.eye(30), ax=both[1]) is both[1].figure and not both[1].texts
    assert not matplotlib.pyplot.get_fignums()  # nothing is left open


@pytest.mark.parametrize("call, word", [(lambda: show_images([]), "at least one"), (lambda: show_images([GRAY], ["a", "b"]), "one title"),
                                        (lambda: show_images([GRAY], ncols=0), "ncols=0"), (lambda: show_matrix(np.zeros(3)), "n,m"), (lambda: show_matrix(np.array([["a"]])), "n,m")])
def test_figures_refuse(call, word):
    with pytest.raises(ValueError, match=word): call()
