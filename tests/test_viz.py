"adcam.viz: palette, colors, overlays, error maps, figures."
import itertools

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from adcam import cam
from adcam.viz import (ERROR_COLORS, METHODS, METRICS, Inspector, attention_rows, colorize, drawn_palette, error_map, inspector, method_style, overlay,
                       overlay_mask, palette, panel, patch_at, set_style,
                       show_images, show_matrix)

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


@pytest.mark.parametrize("bad, word",
                         [(np.zeros((2, 2, 3), int), "(H,W)"), (np.zeros((2, 2)), "integers"), (np.array([[300]]), "0..255"), (np.array([[-1]]), "0..255")])
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


@given(arrays(np.uint8, (4, 4), elements=st.sampled_from([0, 1, 2])), arrays(np.uint8, (4, 4), elements=st.sampled_from([0, 1, 2, 255])),
       st.sampled_from([None, 1, 2]))
def test_error_map_pixel_by_pixel(pred, gt, cls):
    out = error_map(pred, gt, cls)
    for p, g, color in zip(pred.ravel(), gt.ravel(), out.reshape(-1, 3)):
        said, there = (p > 0, g > 0) if cls is None else (p == cls, g == cls)
        if g == 255: want = "ignored"
        elif said and there: want = "true positive" if p == g else "wrong class"
        else: want = "false positive" if said else "false negative" if there else "background"
        assert tuple(color) == ERROR_COLORS[want]


def gray(color) -> float:
    "How light a color is in print, 0 to 255."
    return float(np.dot(255 * np.array(matplotlib.colors.to_rgb(color)), (0.299, 0.587, 0.114)))


def test_metrics_stay_apart_in_gray():
    light = sorted(gray(m["color"]) for m in METRICS.values())
    assert np.diff(light).min() > 30


def test_metrics_stay_apart_without_red_and_green():
    "Deuteranopia, simulated by the matrix of Machado et al. (2009)."
    lost = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = [lost @ matplotlib.colors.to_rgb(m["color"]) for m in METRICS.values()]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.25


def test_pictures_and_curves_share_the_colors_of_mistakes():
    for name, key in (("true positive", "miou"), ("false positive", "fp"), ("false negative", "fn")):
        assert matplotlib.colors.to_hex(np.array(ERROR_COLORS[name]) / 255).upper() == METRICS[key]["color"]


def test_every_method_has_a_color_of_its_own():
    assert len(set(METHODS.values())) == len(METHODS)


def test_direction_is_a_marker():
    assert method_style("AD-CAM, pull")["marker"] != method_style("AD-CAM, push")["marker"]


def test_pictures_of_masks_have_a_light_background():
    fig = show_images([np.zeros((2, 2), np.uint8)])
    assert fig.axes[0].images[0].get_array().min() > 200


def test_a_row_of_pictures_is_480_pixels_wide():
    set_style()
    for n in (2, 3, 5): assert show_images([GRAY] * n).get_figwidth() * 70 >= 480


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
                                        (lambda: show_images([GRAY], ncols=0), "ncols=0"), (lambda: show_matrix(np.zeros(3)), "n,m"),
                                        (lambda: show_matrix(np.array([["a"]])), "n,m")])
def test_figures_refuse(call, word):
    with pytest.raises(ValueError, match=word): call()


# --- overlays of masks, tables of pictures


@given(arrays(np.uint8, (12, 16), elements=st.sampled_from([0, 1, 7, 255])), st.floats(0, 1))
def test_overlay_mask_paints_objects_only(mask, alpha):
    out = overlay_mask(GRAY, mask, alpha)
    nothing = (mask == 0) | (mask == 255)
    assert (out[nothing] == 128).all() and out.dtype == np.uint8
    assert np.abs(out[~nothing] - ((1 - alpha) * 128 + alpha * drawn_palette()[mask][~nothing])).max(initial=0) <= .51


def test_panel():
    heat = np.zeros((2, 2))
    fig = panel([[GRAY, heat], [None, np.zeros((3, 3), int)]], ["a", "b"], ["x", "y"], {"cat": 1, "dog": 2}, title="t")
    assert [a.get_title() for a in fig.axes[:2]] == ["a", "b"] and [fig.axes[i].get_ylabel() for i in (0, 2)] == ["x", "y"]
    assert [len(a.images) for a in fig.axes] == [1, 1, 0, 1] and [t.get_text() for t in fig.legends[0].get_texts()] == ["cat", "dog"]
    assert not matplotlib.pyplot.get_fignums()


@pytest.mark.parametrize("call, word",
                         [(lambda: panel([]), "at least one"), (lambda: panel([[None]]), "at least one"),
                          (lambda: panel([[GRAY], [GRAY, GRAY]]), "equal length"),
                                        (lambda: panel([[GRAY]], rows=["a", "b"]), "2 names for 1 rows"),
                                        (lambda: overlay_mask(GRAY, np.zeros((3, 3), int)), "resize the mask"),
                                        (lambda: overlay_mask(GRAY, np.zeros((12, 16), int), 2), "alpha=2")])
def test_tables_refuse(call, word):
    with pytest.raises(ValueError, match=word): call()


# --- the inspector


GRID = (3, 4)


def matrices(seed=0, n=12):
    "A and S as adcam.cam makes them, and a complete table of maps."
    torch.manual_seed(seed)
    A = torch.rand(n, n, dtype=torch.float64).pow(4)
    A = A / A.sum(1, keepdim=True)
    heat = {(k, T, d): torch.rand(2, *GRID) for k in (2, 5, 12) for T in (0, 1, 2) for d in ("push", "pull")}
    return A, cam.co_neighbor(A), heat


@given(st.integers(0, 200), st.integers(1, 12), st.integers(0, 11))
@settings(deadline=None, max_examples=30)
def test_rows_are_those_of_adcam_cam(seed, k, i):
    A, S, _ = matrices(seed)
    rows = attention_rows(A.numpy(), S.numpy(), i, k)
    assert (rows["kept"] == cam.top_k(S, k)[i].numpy()).all()
    np.testing.assert_allclose(rows["refined"], cam.refine(A, k)[i].numpy(), atol=1e-12)


def test_equal_similarities_and_an_empty_row():
    A, S = np.eye(4)[[1, 1, 2, 3]], np.ones((4, 4))
    assert attention_rows(A, S, 0, 1)["kept"].tolist() == [True, False, False, False]    # the lower index, as in top_k
    assert attention_rows(A, S, 0, 1)["refined"].tolist() == [1, 0, 0, 0]                # nothing left: it looks at itself, as in refine
    np.testing.assert_array_equal(cam.refine(torch.tensor(A), 1, S=torch.tensor(S))[0], [1, 0, 0, 0])


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, .999), st.floats(0, .999))
def test_every_pixel_has_its_patch(h, w, x, y):
    i = patch_at(x * 100, y * 60, (60, 100), (h, w))
    assert divmod(i, w) == (int(y * 60 * h / 60), int(x * 100 * w / 100))


@pytest.fixture
def tool():
    A, S, heat = matrices()
    return Inspector(GRAY, A, S, heat, GRID, ["cat", "dog"], size=80)


def test_all_pictures_of_the_inspector_have_its_size(tool):
    assert tool.size == (60, 80)
    assert all(p.shape == (60, 80, 3) and p.dtype == np.uint8 for p in [tool.heat_picture(), *tool.row_pictures().values()])


@pytest.mark.parametrize("name,value,changed",
                         [("k", 2, {"heat", "kept", "refined"}), ("T", 0, {"heat"}), ("direction", "push", {"heat"}), ("cls", 1, {"heat"}),
                                                ("patch", 7, {"heat", "A", "S", "kept", "refined"})])   # the frame moves, too
def test_choices_change_what_they_should(tool, name, value, changed):
    assert getattr(tool, name) != value
    before = {"heat": tool.heat_picture()} | tool.row_pictures()
    setattr(tool, name, value)
    after = {"heat": tool.heat_picture()} | tool.row_pictures()
    assert {n for n in before if (before[n] != after[n]).any()} == changed


def test_a_click_selects_the_patch_under_it(tool):
    assert tool.select(79, 59) == 11
    assert "row 2, column 3" in tool.caption() and "cat" in tool.caption()


def test_a_choice_costs_little():
    "No lag: a choice redraws five pictures of a 28x28 grid in less CPU time than a frame of a slow film."
    import time
    n, rng = 784, np.random.default_rng(0)
    A = rng.random((n, n))
    tool = Inspector(np.zeros((480, 640, 3), np.uint8), A / A.sum(1, keepdims=True), A, {(50, 1, "pull"): rng.random((1, 28, 28))}, (28, 28))
    start = time.process_time()
    for tool.patch in range(10): tool.heat_picture(), tool.row_pictures()
    assert (time.process_time() - start) / 10 < .15


@pytest.mark.parametrize("change, word", [
    (lambda a: a.update(A=a["A"][:5]), r"\(12, 12\)"), (lambda a: a.update(S=a["S"].long()), "floats"),
    (lambda a: a["heat"].pop((5, 1, "pull")), r"heat lacks \(5, 1, 'pull'\)"),
    (lambda a: a["heat"].update({(5, 1, "pull"): torch.zeros(2, 4, 4)}), r"\(n, 3, 4\)"), (lambda a: a.update(heat={}), "every"),
    (lambda a: a.update(classes=["one"]), "1 class names for 2"),
    (lambda a: a.update(image=GRAY / 255), "uint8"), (lambda a: a.update(heat={(13, 1, "pull"): torch.zeros(2, 3, 4)}), "k lies in 1..12")])
def test_the_inspector_refuses_what_does_not_fit(change, word):
    A, S, heat = matrices()
    given_ = dict(image=GRAY, A=A, S=S, heat=heat, grid=GRID, classes=["cat", "dog"])
    change(given_)
    with pytest.raises(ValueError, match=word): Inspector(**given_)


def test_controls_and_clicks_without_a_browser():
    pytest.importorskip("ipyevents")
    import ipywidgets
    from ipyevents import Event
    A, S, heat = matrices()
    box = inspector(GRAY, A, S, heat, GRID, ["cat", "dog"], size=80)
    (k, T, direction, cls), line, pictures = box.children[0].children, box.children[1], box.children[2]
    heat_screen = pictures.children[0].children[1]
    assert isinstance(heat_screen, ipywidgets.Image) and list(k.options) == [2, 5, 12] and list(T.options) == [0, 1, 2]
    seen = {heat_screen.value}
    for control, value in ((k, 5), (T, 0), (direction, "push"), (cls, 1)):
        control.value = value
        assert heat_screen.value not in seen
        seen.add(heat_screen.value)
    assert (box.tool.k, box.tool.T, box.tool.direction, box.tool.cls) == (5, 0, "push", 1)
    event = next(w for w in reversed(list(ipywidgets.widget._instances.values())) if isinstance(w, Event) and w.source is heat_screen)
    event._handle_mouse_msg(event, {"type": "click", "dataX": 0, "dataY": 0}, None)         # what the browser sends
    assert box.tool.patch == 0 and "patch 0" in line.value and heat_screen.value not in seen


def test_missing_widgets_are_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "ipyevents", None)
    with pytest.raises(ImportError, match=r"adcam\[widgets\]"): inspector(GRAY, *matrices(), GRID)
