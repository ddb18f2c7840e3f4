"""What makes a GPU fast can be checked without one: how many operations a view starts, that none of them waits, and that every fast way gives the numbers of the slow one."""
import importlib

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

from adcam import conformer
from adcam.boundaries import IRViews
from adcam.cam import ad_cam, att_diffu, cam_map, checks_later, trans_cam, ts_cam
from adcam.conformer import conformer_mini, conformer_small
from adcam.data import TrainViews, normalized, to_tensor
from adcam.deeplab import pixel_loss
from adcam.devices import precision
from adcam.pipeline import load_result
from adcam.reproduce import measured_speeds
from adcam.scenes import Scenes
from adcam.seeds import batch_maps, check_seeds, extract, extract_dataset, load_seed, merge, view, view_maps, view_pixels, view_size


counts = load_script(ROOT / "tools/bench/counts.py")
Operations = counts.Operations


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return conformer_mini(10).eval()


@pytest.fixture(scope="module")
def scenes():
    return Scenes("test", 4, 96)


@torch.no_grad()
def operations(net, side, arithmetic="fp32", method=ad_cam, **options):
    with Operations() as seen:
        view_maps(net, torch.randn(1, 3, side, side), [1, 2], method, precision=arithmetic, **options)
    return seen.count


# ---------------------------------------------------------------- how many operations

def test_a_view_of_1369_tokens_starts_at_most_1200_operations():
    net = conformer_small(20).eval()
    net.set_whole_attention(True)
    assert operations(net, 592) <= 1200


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_the_number_of_operations_does_not_depend_on_the_size_of_the_view(arithmetic):
    net = conformer_small(20).eval()
    net.set_whole_attention(True)
    small, large = (operations(net, side, arithmetic, k=10) for side in (64, 128))
    assert small == large <= 1200


def test_adcam_starts_at_most_half_as_many_operations_again_as_cam():
    net = conformer_small(20).eval()
    net.set_whole_attention(True)
    assert operations(net, 64, k=10) <= 1.5 * operations(net, 64, method=cam_map)


def test_attention_in_pieces_starts_many_more(net, monkeypatch):
    monkeypatch.setattr(conformer, "_WHOLE", 1)
    monkeypatch.setattr(conformer, "_PIECE", 3 * 145 * 10)
    pieces = operations(net, 96)
    net.set_whole_attention(True)
    try:
        assert operations(net, 96) < pieces / 2
    finally:
        net.set_whole_attention(None)


@torch.no_grad()
@pytest.mark.parametrize("method, options",
                         [(cam_map, {}), (ts_cam, {}), (trans_cam, {}), (att_diffu, {}), (ad_cam, dict(k=20)),
                          (ad_cam, dict(k=20, mask="weight", self_="excluded")), (ad_cam, dict(k=9, renorm="per_layer", layers=2))])
def test_nothing_in_a_batch_waits_for_the_device(net, method, options):
    x, keys = torch.randn(2, 3, 80, 96), torch.tensor([[1, 2], [3, 3]])
    for tokens in (None, (9, 11)):
        with Operations() as seen:
            batch_maps(net, x, keys, method, True, tokens, **options)
        assert seen.waits == []


@pytest.fixture(scope="module")
def on_paper():
    "Everything that tools/bench/counts.py counts, for the code as it is"
    return counts.counted()


def test_no_count_of_a_gpus_work_is_above_the_committed_one(on_paper):
    committed = {r["name"]: r["value"] for r in load_result("counts", ROOT / "results/bench")["rows"]}
    assert {name for name, _ in on_paper.items()} == set(committed)
    assert {name: value for name, (value, _, _) in on_paper.items() if value > committed[name]} == {}


def test_the_gpu_bench_measures_all_that_the_estimate_of_hours_reads(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    gpu = importlib.import_module("gpu")
    rows = [dict(name=r["name"], value=1., status="measured") for r in gpu.ROWS]
    assert len({r["name"] for r in rows}) == len(rows)
    for arithmetic in ("fp32", "bf16"):
        assert set(measured_speeds(dict(rows=rows), arithmetic).values()) >= {.001, 1.}


def test_nothing_waits_for_the_device_in_a_batch_of_seeds_or_a_step_of_a_training(on_paper):
    assert {name: value for name, (value, unit, _) in on_paper.items() if unit == "waits" and value} == {}


def test_the_counter_sees_what_waits():
    x = torch.zeros(3, device="meta")
    for wait in (lambda: bool((x > 0).any()), lambda: x[x > 0], lambda: x.sum().item(), lambda: x.cpu(), lambda: float(x.max()), lambda: torch.zeros(3).to("meta")):
        with counts.on_paper(), Operations("meta") as seen:
            wait()
        assert len(seen.waits) == 1
    with counts.on_paper(), Operations("meta") as seen:
        x.to("cpu", non_blocking=True), torch.zeros(3).to("meta", non_blocking=True), torch.zeros(3).sum().item()
    assert seen.waits == []


@pytest.mark.parametrize("half", [False, True])
def test_half_precision_on_paper_casts_what_autocast_casts(half):
    "On a CPU, where there is an autocast to compare with: twice through convolutions, a norm and a linear layer, and back"
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 4))
    x, found = torch.randn(2, 3, 8, 8), []
    paper = counts.Autocast()
    for context in (torch.autocast("cpu", torch.bfloat16, enabled=half), paper.asked(enabled=half)):
        net.zero_grad()
        with Operations() as seen, paper:
            with context:
                y = net(x) + net(x)
            y.float().square().sum().backward()
        found.append((y.dtype, seen.count))
    assert found[0] == found[1] and (y.dtype == torch.bfloat16) == half


def test_a_prediction_goes_through_the_crf_where_the_network_is(monkeypatch):
    from adcam import segment
    from adcam.deeplab import deeplabv2_mini
    seen = []
    monkeypatch.setattr(segment, "dense_crf", lambda unary, image, **options: seen.append(unary.device.type) or unary)
    net = deeplabv2_mini(11, weights=None).eval().to("meta")
    with counts.on_paper(), Operations("meta", truths=(True,)):
        segment.predict(net, np.zeros((40, 48, 3), np.uint8))
    assert seen == ["meta"]


# ---------------------------------------------------------------- the same numbers

@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_batch_that_is_too_large_for_whole_attention_is_split_and_nothing_else_changes(monkeypatch, images):
    q, k, v, bias = (torch.randn(5, 3, 10, n) for n in (8, 8, 8, 10))
    for b in (None, bias):
        whole = conformer.whole_attention(q, k, v, .3, b)
        with monkeypatch.context() as m:
            m.setattr(conformer, "_GPU", images * 3 * 10 * 10)
            parts = conformer.whole_attention(q, k, v, .3, b)
        for x, y in zip(parts, whole):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_attention_of_an_image_that_fits_no_memory_is_done_in_pieces(net, monkeypatch):
    x = torch.randn(2, 3, 80, 96)
    with torch.no_grad():
        whole = net.maps(x).attn
        monkeypatch.setattr(conformer, "_GPU", 3 * 121 * 40)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
        torch.testing.assert_close(net.maps(x).attn, whole, rtol=1e-4, atol=1e-6)


def test_maps_of_a_batch_merged_at_once_are_those_merged_one_by_one():
    views, size = [torch.rand(3, 2, h, w) for h, w in ((6, 8), (3, 4), (12, 16))], (93, 125)
    for together, alone in zip(merge([v.flatten(0, 1) for v in views], size), zip(*(merge([v[b] for v in views], size) for b in range(3)))):
        assert torch.equal(together.unflatten(0, (3, 2)), torch.stack(alone))


@pytest.mark.parametrize("balanced", [False, True])
def test_a_pixel_loss_that_does_not_wait_has_the_gradients_of_one_that_selects_bit_for_bit(balanced):
    y = torch.randint(0, 4, (2, 9, 9))
    y[0, :3] = 255

    def selected(losses, chosen):
        return losses[chosen].sum() / chosen.sum().clamp(min=1)

    def slow(z):
        losses = torch.nn.functional.cross_entropy(z, y, ignore_index=255, reduction="none")
        return selected(losses, y == 0) + selected(losses, (y != 0) & (y != 255)) if balanced else selected(losses, y != 255)

    grads = []
    for loss in (slow, lambda z: pixel_loss(z, y, balanced)):
        z = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss(z).backward()
        grads.append(z.grad)
    assert torch.equal(*grads)


def test_displacements_seen_through_boxes_are_those_found_by_index():
    from adcam.boundaries import _displacement_sums
    from adcam.walk import pair_tables
    dp, table = torch.randn(2, 2, 12, 20).requires_grad_(), pair_tables(4, (12, 20))
    fg, bg = torch.rand(2, *table.to.shape) < .4, torch.rand(2, *table.to.shape) < .4
    flat = dp.flatten(2)
    gap = flat[..., table.src].unsqueeze(2) - flat[..., table.to]
    want = table.dst.T.to(gap)[None, :, :, None]
    slow = ((gap - want).abs() * fg[:, None]).sum(), (gap.abs() * bg[:, None]).sum()
    fast = _displacement_sums(dp, bg, fg, 4)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow))
    torch.testing.assert_close(*(torch.autograd.grad(a + b / 7, dp)[0] for a, b in (fast, slow)))

@torch.no_grad()
@pytest.mark.parametrize("arithmetic, rtol", [("fp32", 1e-4), ("bf16", 5e-2)])
def test_whole_attention_equals_attention_in_pieces(net, scenes, monkeypatch, arithmetic, rtol):
    x, found = torch.stack([to_tensor(s.image) for s in scenes]), {}
    monkeypatch.setattr(conformer, "_WHOLE", 1)
    for whole in (False, True):
        net.set_whole_attention(whole)
        with precision(arithmetic):
            found[whole] = net.maps(x)
    net.set_whole_attention(None)
    for name in ("cam", "attn"):
        a, b = (getattr(found[w], name).float() for w in (False, True))
        assert (a - b).abs().max() <= rtol * a.abs().max()
    assert found[True].attn.dtype == torch.float32
    torch.testing.assert_close(found[True].attn.sum(-1), torch.ones(found[True].attn.shape[:3]), rtol=0, atol=1e-5 if arithmetic == "fp32" else 5e-3)


def test_gradients_flow_through_whole_attention(net, scenes):
    x, grads = to_tensor(scenes[0].image)[None], {}
    for whole in (False, True):
        net.set_whole_attention(whole)
        net.zero_grad()
        net.maps(x).attn.square().sum().backward()
        grads[whole] = net.trans_1.attn.qkv.weight.grad.clone()
    net.set_whole_attention(None)
    net.zero_grad()
    assert grads[True].abs().max() > 0
    torch.testing.assert_close(grads[True], grads[False], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size_mode", ["round", "pad", "square", "exact"])
@pytest.mark.parametrize("scale", [.5, 1., 1.3])
def test_a_view_sent_as_bytes_is_the_view_bit_for_bit(scenes, size_mode, scale):
    image = scenes[0].image[:90, :71]
    h, w = view_size(image.shape[:2], scale, 8, size_mode)[0]
    pixels = view_pixels(image, scale, 8, size_mode)[None]
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalized(pixels, torch.tensor([[0, h, 0, w]])), view(image, scale, 8, size_mode))


def test_a_training_view_sent_as_bytes_is_the_view_bit_for_bit(scenes):
    as_floats, as_bytes = (TrainViews(scenes, 64, (48, 128), seed=3, pixels=p) for p in (False, True))
    for epoch in (0, 1):
        for views in (as_floats, as_bytes):
            views.set_epoch(epoch)
        for i in range(len(scenes)):
            (pixels, box), label = as_bytes[i]
            assert torch.equal(normalized(pixels[None], box[None])[0], as_floats[i][0]) and torch.equal(label, as_floats[i][1])


def test_a_view_of_irnet_sent_as_bytes_is_the_view_bit_for_bit(scenes):
    as_floats, as_bytes = (IRViews(scenes, lambda s: s.mask, 64, (.5, 1.5), seed=3, pixels=p) for p in (False, True))
    for epoch in range(3):                                       # smaller and larger than the crop, mirrored and not
        for views in (as_floats, as_bytes):
            views.set_epoch(epoch)
        for i in range(len(scenes)):
            (x, label), ((pixels, box), same) = as_floats[i], as_bytes[i]
            assert torch.equal(normalized(pixels[None], box[None])[0], x) and torch.equal(label, same)


class Mixed:
    "Scenes cut to three sizes; one cannot be read, one has no label"
    classes = Scenes("test", 1, 96).classes

    def __init__(self):
        self.base = Scenes("test", 9, 96)
        self.ids = self.base.ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        if i == 4:
            raise ValueError("image.jpg is cut short; download it again")
        s = self.base[i]
        h, w = ((96, 96), (88, 96), (90, 93))[i % 3]
        return s._replace(image=s.image[:h, :w].copy(), mask=s.mask[:h, :w].copy(), label=s.label * (i != 6))

    def fingerprint(self):
        return "mixed"


OPTIONS = dict(scales=(1., .5), flip=True, progress=False)


def difference(a, b, ids):
    pairs = [(load_seed(a / f"{i}.npz"), load_seed(b / f"{i}.npz")) for i in ids]
    assert all(np.array_equal(x.keys, y.keys) and x.high_res.shape == y.high_res.shape for x, y in pairs)
    return max(float(np.abs(x.cam - y.cam).max()) for x, y in pairs)


@pytest.mark.parametrize("method, options", [("cam", {}), ("ts_cam", {}), ("ad_cam", dict(k=20, clip_k=True))])
@pytest.mark.parametrize("size_mode", ["round", "pad"])
def test_seeds_in_batches_are_those_one_by_one(net, tmp_path, method, options, size_mode):
    ds, said = Mixed(), {}
    for batch in (1, 4):
        said[batch] = extract_dataset(net, ds, tmp_path / str(batch), method, batch=batch, size_mode=size_mode, **OPTIONS, **options)
    assert said[1] == said[4] == dict(computed=7, cached=0, skipped=[(ds.ids[4], "image.jpg is cut short; download it again")], unlabeled=[ds.ids[6]])
    assert difference(tmp_path / "1", tmp_path / "4", [i for j, i in enumerate(ds.ids) if j not in (4, 6)]) < 2e-3


def test_a_run_in_batches_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(net, tmp_path):
    ds = Mixed()
    run = lambda name, **more: extract_dataset(net, ds, tmp_path / name, "ad_cam", k=20, clip_k=True, batch=3, **OPTIONS, **more)  # noqa: E731
    run("whole"), run("stopped")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for i in (0, 5, 8):
        (tmp_path / "stopped" / f"{ds.ids[i]}.npz").unlink()
    assert run("stopped", workers=1)["computed"] == 3
    assert {p.name: p.read_bytes() for p in (tmp_path / "stopped").iterdir()} == whole


def test_shards_in_batches_are_complete(net, tmp_path):
    ds = Scenes("test", 5, 96)
    for rank in (0, 1):
        extract_dataset(net, ds, tmp_path, "cam", batch=2, shard=(rank, 2), **OPTIONS)
    assert check_seeds(tmp_path, ds)["complete"]


def test_an_error_in_a_batch_names_an_image(net, tmp_path):
    with pytest.raises(ValueError, match="image test_.*k=500: a patch can keep 1 to"):
        extract_dataset(net, Scenes("test", 2, 96), tmp_path, "ad_cam", k=500, batch=2, progress=False)


def test_broken_attention_in_a_batch_is_named_and_its_neighbors_are_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    ds, net = Scenes("test", 3, 96), conformer_mini(10).eval()
    bad, maps = ds[1].image, net.maps

    def broken(x, **how):
        out = maps(x, **how)
        for b, picture in enumerate(x):
            if torch.allclose(picture, to_tensor(bad)):
                out.attn[b, :, 3, 4] = float("nan")
        return out

    monkeypatch.setattr(net, "maps", broken)
    done = extract_dataset(net, ds, tmp_path, "ad_cam", k=20, batch=3, progress=False)
    assert done["computed"] == 2 and [i for i, _ in done["skipped"]] == [ds.ids[1]] and "attn has values from nan" in done["skipped"][0][1]
    assert {p.stem for p in tmp_path.glob("*.npz")} == {ds.ids[0], ds.ids[2]}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_class_map_that_is_not_a_number_is_never_written(tmp_path, batch):
    torch.manual_seed(0)
    net = conformer_mini(10).eval()
    with torch.no_grad():
        net.conv_cls_head.weight[:] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinit"):
        extract_dataset(net, Scenes("test", 2, 96), tmp_path, "cam", batch=batch, progress=False)
    assert not list(tmp_path.glob("*.npz"))


@torch.no_grad()
def test_checks_that_wait_find_what_checks_at_once_find(net, scenes):
    maps = net.maps(torch.stack([to_tensor(s.image) for s in scenes]))
    for spoil in (float("nan"), float("inf"), -1., 5.):
        attn = maps.attn.clone()
        attn[2, 0, 3, 4] = spoil
        bad = maps._replace(attn=attn)
        with pytest.raises(ValueError):
            ad_cam(bad, k=20)
        with checks_later() as later:
            ad_cam(bad, k=20)
        assert later.all_right(4, "cpu").tolist() == [True, True, False, True]


# ---------------------------------------------------------------- bad input

def test_settings_of_batches_that_cannot_work_are_refused(net, tmp_path, scenes):
    run = lambda **more: extract_dataset(net, scenes, tmp_path, "cam", progress=False, **more)  # noqa: E731
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        run(batch=0)
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        run(batch=2, workers=-1)
    with pytest.raises(ValueError, match="scales is empty"):
        run(batch=2, scales=())
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        run(precision="fp16")
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        extract(net, scenes[0].image, scenes[0].label, "cam", precision="fp16")


def test_out_of_memory_says_what_was_too_large_and_what_to_lower(tmp_path, scenes, monkeypatch):
    torch.manual_seed(0)
    net = conformer_mini(10).eval()

    def full(x, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(net, "maps", full)
    with pytest.raises(ValueError, match=r"out of memory with 2 image\(s\) of 96x96 pixels at scales 1.0; lower batch .*, scales or processes"):
        extract_dataset(net, Scenes("test", 2, 96), tmp_path, "cam", batch=2, progress=False)


# ---------------------------------------------------------------- training

class Event:
    "Stands for a CUDA event: numbers that come later"
    def synchronize(self): pass


def small_training():
    from adcam.classifier import TrainConfig, train
    torch.manual_seed(0)
    net = conformer_mini(10)
    history = train(net, Scenes("train", 6, 64), TrainConfig(epochs=2, batch=2, crop=48, resize=(48, 80)), progress=False, device="cpu")
    return history, torch.cat([v.flatten().double() for v in net.state_dict().values()])


def test_numbers_that_come_late_and_views_that_come_as_bytes_change_nothing_of_a_training(monkeypatch):
    from adcam import classifier
    history, weights = small_training()
    monkeypatch.setattr(classifier, "TrainViews", lambda *a, **k: TrainViews(*a, **{**k, "pixels": True}))
    late = classifier.Late.__init__
    monkeypatch.setattr(classifier.Late, "__init__", lambda self, values: (late(self, values), setattr(self, "event", Event()))[0])
    again, same = small_training()
    assert again == history and torch.equal(weights, same)


def test_views_of_irnet_that_come_as_bytes_change_nothing_of_its_training(monkeypatch):
    from adcam import boundaries
    from adcam.cnn import resnet_mini

    def run():
        torch.manual_seed(0)
        net = boundaries.IRNet(boundaries.ResNetStages(resnet_mini(10).backbone_net), edge_width=8, widths=(8, 8, 8, 8, 8))
        history = boundaries.train_irnet(net, Scenes("train", 6, 64), lambda s: s.mask, boundaries.IRNetConfig(epochs=1, batch=2, crop=48, radius=3), progress=False, device="cpu")
        return history, torch.cat([v.flatten().double() for v in net.state_dict().values()])

    history, weights = run()
    monkeypatch.setattr(boundaries, "IRViews", lambda *a, **k: IRViews(*a, **{**k, "pixels": True}))
    again, same = run()
    assert again == history and torch.equal(weights, same)


def test_a_loss_that_is_no_number_is_found_also_when_it_comes_late(monkeypatch):
    from adcam import classifier
    late = classifier.Late.__init__
    monkeypatch.setattr(classifier.Late, "__init__", lambda self, values: (late(self, values * float("nan")), setattr(self, "event", Event()))[0])
    with pytest.raises(FloatingPointError, match="the loss became .*nan.*lower the learning rates"):
        small_training()


def test_one_operation_for_all_weights_trains_the_same_network_and_a_stopped_run_goes_on_with_it(monkeypatch, tmp_path):
    "On a GPU the optimizer is fused; on a CPU, where it is not, it is so here"
    from adcam import training
    from adcam.classifier import TrainConfig, train

    def run(out=None, callback=None):
        torch.manual_seed(0)
        net = conformer_mini(10)
        train(net, Scenes("train", 4, 64), TrainConfig(epochs=2, batch=2, crop=48, resize=None), out=out, callback=callback, progress=False, device="cpu")
        return torch.cat([v.flatten().double() for v in net.state_dict().values()])

    def stop(net, done, history):
        if done == 1:
            raise KeyboardInterrupt

    plain = run()
    monkeypatch.setattr(training, "_one_kernel", lambda optimizer: [g.update(fused=True) for g in optimizer.param_groups])
    fused = run()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    assert torch.equal(run(tmp_path), fused)
