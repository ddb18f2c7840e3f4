"Views with maps: what moves together, and a loop that can be stopped."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adcam.classifier import PolySGD
from adcam.scenes import Scenes
from adcam.views import Views, ViewsConfig, aligned_view, fit_views

torch.set_num_threads(1)
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_a_map_stays_on_its_pixels(seed, h, w, crop):
    "A map that repeats the picture still does so in the view, and is zero outside"
    image = np.random.default_rng(seed).integers(1, 256, (h, w, 3), dtype=np.uint8)
    x, m = aligned_view(image, image.transpose(2, 0, 1), crop, np.random.default_rng(seed))
    inside = (m > 0).all(0)
    assert x.shape == m.shape == (3, crop, crop) and int(inside.sum()) == min(h, crop)*min(w, crop)
    assert torch.allclose(((x*STD + MEAN)*255)[:, inside], m[:, inside], atol=1e-2) and not x[:, ~inside].any() and not m[:, ~inside].any()


def test_jitter_touches_the_picture_only_and_leaves_torchs_randomness_alone():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    state = torch.random.get_rng_state()
    (a, m), (b, n) = (aligned_view(image, image[None, ..., 0], 16, np.random.default_rng(1), j) for j in ((.3, .3, .3, .1), (.3, .3, .3, .1)))
    assert a.equal(b) and m.equal(n) and torch.random.get_rng_state().equal(state)
    c, _ = aligned_view(image, image[None, ..., 0], None, np.random.default_rng(1), (.3, .3, .3, .1))
    d, whole = aligned_view(image, image[None, ..., 0], None, np.random.default_rng(1))
    assert not c.equal(d) and whole.shape == (1, 20, 30)


class Toy(nn.Module):
    def __init__(self, lr=1.):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x, target): return dict(loss=nn.functional.binary_cross_entropy_with_logits(self.net(x)[:, 0], target))
    def optimizer(self, config, total): return PolySGD([dict(params=list(self.parameters()), lr=config.lr)], total, config.weight_decay)


def objects(s): return (s.mask > 0)[None]


@pytest.fixture(scope="module")
def ds(): return Scenes("train", 4, 48)


CONFIG = ViewsConfig(epochs=3, batch=2, crop=32, lr=.03)


def views(ds, maps=objects): return Views(ds, maps, lambda m: m[0], 32, (.3, .3, .3, .1))


@pytest.mark.parametrize("reads", [3, 5, 9])
def test_stopped_and_resumed_is_one_run(ds, tmp_path, reads):
    class Cut(Exception): pass
    left = [reads]
    def cut(s):
        left[0] -= 1
        if left[0] < 0: raise Cut
        return objects(s)
    whole, again = Toy(), Toy()
    history = fit_views(whole, views(ds), CONFIG, progress=False)
    with pytest.raises(Cut): fit_views(Toy(), views(ds, cut), CONFIG, tmp_path, progress=False)
    assert fit_views(again, views(ds), CONFIG, tmp_path, progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))
    assert fit_views(Toy(), views(ds), CONFIG, tmp_path, progress=False) == history, "a finished run is read, not repeated"


def test_other_settings_data_or_weights_are_refused(ds, tmp_path):
    fit_views(Toy(), views(ds), CONFIG, tmp_path, source="a", progress=False)
    go = lambda task, config=CONFIG, data=ds, source="a": fit_views(task, views(data), config, tmp_path, source=source, progress=False)
    with pytest.raises(ValueError, match="lr: 0.03 there, 0.1 now"): go(Toy(), replace(CONFIG, lr=.1))
    with pytest.raises(ValueError, match="maps: 'a' there, 'b' now"): go(Toy(), source="b")
    with pytest.raises(ValueError, match="other settings .data: "): go(Toy(), data=Scenes("val", 4, 48))
    other = Toy()
    with torch.no_grad(): other.net.weight.add_(1)
    with pytest.raises(ValueError, match="other settings .start: "): go(other)
    (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read .*last.pt"): go(Toy())


def test_what_is_refused(ds):
    with pytest.raises(ValueError, match="epochs is 0"): fit_views(Toy(), views(ds), replace(CONFIG, epochs=0))
    with pytest.raises(ValueError, match="do not fill one batch of 8"): fit_views(Toy(), views(ds), replace(CONFIG, batch=8))
    with pytest.raises(ValueError, match="crop is 0"): Views(ds, objects, lambda m: m, 0)
    with pytest.raises(ValueError, match="must have one size"): views(ds, lambda s: objects(s)[:, 1:])[0]
    with pytest.raises(FloatingPointError, match="lower lr"): fit_views(Toy(), views(ds, lambda s: objects(s)*np.nan), CONFIG, progress=False)


def test_half_precision_learns_and_is_another_run(ds, tmp_path):
    "The network in bfloat16; its weights stay float32"
    half, toy = replace(CONFIG, mixed_precision="bf16"), Toy()
    history, plain = fit_views(toy, views(ds), half, tmp_path, progress=False), fit_views(Toy(), views(ds), CONFIG, progress=False)
    assert toy.net.weight.dtype == torch.float32 and history != plain
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in plain], rel=.02)
    with pytest.raises(ValueError, match="precision: 'bf16' there, 'fp32' now"): fit_views(Toy(), views(ds), CONFIG, tmp_path, progress=False)
    with pytest.raises(ValueError, match="mixed_precision is 'fp8'"): fit_views(Toy(), views(ds), replace(CONFIG, mixed_precision="fp8"))
