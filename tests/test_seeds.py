"Seeds: IRN's merging rule against golden numbers, files that survive damage, processes that agree to the byte"
import json, subprocess, sys, time
from pathlib import Path
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import (METHODS, SIZE_MODES, Seed, class_maps, extract, extract_dataset, load_seed, merge, model_fingerprint,
                         positive_classes, resolve, save_seed, view, view_size)


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return conformer_mini(10).eval()


@pytest.fixture(scope="module")
def ds(): return Scenes("test", 3, size=96)


def _files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_merge_matches_irn(golden, golden_rules):
    rules, g = golden_rules("irn/rules"), np.load(golden / "irn" / "g06_cam.npz", allow_pickle=False)
    grids = [(6, 7), (3, 4), (8, 11), (11, 14)]  # scales 1.0, 0.5, 1.5, 2.0
    views = [torch.from_numpy(np.maximum(rules.nrm(60 + i, (20, *s)), 0).astype(np.float32))[g["merge_keys"]] for i, s in enumerate(grids)]
    cam, high = merge(views, (81, 110), up=16)
    np.testing.assert_allclose(cam.numpy(), g["merge_strided"], atol=1e-5)
    np.testing.assert_allclose(high[:, ::4, ::4].numpy(), g["merge_highres_ds4"], atol=1e-5)
    np.testing.assert_allclose(high.sum((1, 2)).numpy(), g["merge_highres_sum"], rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(h=st.integers(1, 900), w=st.integers(1, 900), s=st.sampled_from([.25, .5, 1., 1.5, 2.]), stride=st.sampled_from([8, 16]),
       mode=st.sampled_from(SIZE_MODES))
def test_view_size(h, w, s, stride, mode):
    plain, padded = view_size((h, w), s, stride, mode)
    if mode == "exact":
        assert plain == padded == tuple(max(1, round(m * s)) for m in (h, w))
        return
    assert all(n % stride == 0 and n >= stride for n in padded)
    assert all(0 <= p - n < stride for n, p in zip(plain, padded)), "no token may see padding alone"
    if mode == "round": assert all(abs(n - m * s) <= stride / 2 or n == stride for n, m in zip(plain, (h, w)))
    if mode == "square": assert plain[0] == plain[1]


OF_MAPS = [m for m in METHODS if callable(METHODS[m])]


@pytest.mark.parametrize("method", OF_MAPS)
@pytest.mark.parametrize("size_mode", [m for m in SIZE_MODES if m != "exact"])  # the Conformer's grid does not take any size
def test_extract_shapes(net, ds, method, size_mode):
    image = ds[0].image[:70, :91]  # neither side is a multiple of the stride
    seed = extract(net, image, ds[0].label, method, scales=(1., 1.5), flip=True, size_mode=size_mode)
    n = int(ds[0].label.sum())
    assert seed.cam.shape == (n, 18, 23) and seed.high_res.shape == (n, 70, 91)
    assert seed.keys.tolist() == np.flatnonzero(ds[0].label).tolist()
    assert seed.high_res.min() >= 0 and seed.high_res.max() <= 1
    peaks = seed.high_res.max((1, 2))
    assert ((peaks == 0) | (peaks > .99)).all()  # a class that an untrained network never sees stays empty


@pytest.mark.parametrize("size_mode", SIZE_MODES)
def test_single_view_is_the_method(net, ds, size_mode):
    from adcam.data import to_tensor
    s = ds[1]
    keys = np.flatnonzero(s.label).tolist()
    with torch.no_grad(): m = METHODS["ad_cam"](net.maps(to_tensor(s.image)[None]), k=20, steps=1, direction="pull", classes=keys)[0]
    seed = extract(net, s.image, s.label, "ad_cam", k=20, steps=1, direction="pull", size_mode=size_mode)
    np.testing.assert_array_equal(seed.high_res, merge([m], (96, 96))[1].numpy())


def test_flip_of_the_image_flips_the_seed(net, ds):
    a = extract(net, ds[0].image, ds[0].label, "ts_cam", flip=True)
    b = extract(net, ds[0].image[:, ::-1].copy(), ds[0].label, "ts_cam", flip=True)
    np.testing.assert_allclose(a.high_res, b.high_res[..., ::-1], atol=1e-3)


@pytest.mark.parametrize("method, options, words", [("pcm", dict(top=5.5), "top is 5.5; give a whole number or None"), ("pcm", dict(center="maybe"), "give True or False"),
    ("pcm", dict(power=True), "power is True; give a number"), ("score_cam", dict(eps="nan"), "eps is 'nan'; give a number"),
    ("score_cam", dict(channel_softmax=0), "channel_softmax is 0; give True or False"), ("getam", dict(dilations=3), "dilations is 3; give a tuple"),
    ("rib", dict(crop="big"), "crop is 'big'; give a whole number"), ("advcam", dict(step_size=None), "step_size is None; give a number")])
def test_an_option_of_another_type_is_refused_before_the_first_image(method, options, words):
    with pytest.raises(ValueError, match=words): resolve(method, options)


def test_numbers_of_numpy_and_lists_are_understood():
    resolve("pcm", dict(top=np.int64(5), power=np.float32(2), center=np.bool_(True)))
    resolve("rib", dict(resize=[320, 640], lr=1, learn=None))


def test_bad_input(net, ds):
    s = ds[0]
    with pytest.raises(ValueError, match="unknown method 'gradcam'; choose one of cam"): extract(net, s.image, s.label, "gradcam")
    with pytest.raises(ValueError, match="has no option 'sigma'"): extract(net, s.image, s.label, "cam", sigma=1)
    with pytest.raises(ValueError, match="empty"): extract(net, s.image, np.zeros(10))
    with pytest.raises(ValueError, match="0 or 1"): extract(net, s.image, np.full(10, .5))
    with pytest.raises(ValueError, match="10 classes"): extract(net, s.image, np.ones(20))
    with pytest.raises(ValueError, match="at least one factor"): extract(net, s.image, s.label, scales=())
    with pytest.raises(ValueError, match="positive"): extract(net, s.image, s.label, scales=(-1.,))
    with pytest.raises(ValueError, match="size_mode"): extract(net, s.image, s.label, size_mode="crop")
    with pytest.raises(ValueError, match="k=50"): extract(net, s.image, s.label, scales=(.5,))  # 36 tokens
    extract(net, s.image, s.label, scales=(.5,), clip_k=True)
    with pytest.raises(ValueError, match="no option 'classes'"): resolve("cam", dict(classes=[1]))
    with pytest.raises(ValueError, match="2007_1: the label vector is empty"): positive_classes([0, 0], 2, "2007_1")


def test_damaged_files(tmp_path, net, ds):
    seed = extract(net, ds[0].image, ds[0].label, "cam")
    path = save_seed(tmp_path / "deep" / "a.npz", seed)
    assert np.abs(load_seed(path).high_res - seed.high_res).max() <= 5e-4
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"], "no temporary file is left"
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    for bad in (b"", whole[:30], whole[:-1], bytes(middle), b"no zip at all"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="a.npz is not a readable seed file.*delete it"): load_seed(path)
    np.savez(path, keys=np.arange(2), cam=np.zeros((1, 2, 2)), high_res=np.zeros((1, 8, 8)))
    with pytest.raises(ValueError, match="2 keys, but cam"): load_seed(path)
    np.savez(path, keys=np.array([{}], object), cam=0, high_res=0)
    with pytest.raises(ValueError, match="not a readable"): load_seed(path)  # pickled objects are refused
    with pytest.raises(FileNotFoundError): load_seed(tmp_path / "none.npz")


@pytest.fixture
def run(tmp_path, net, ds):
    "Seeds of the three images into a folder of their own; returns the account."
    return lambda folder, **options: extract_dataset(net, ds, tmp_path / folder, "ad_cam", progress=False, **(dict(k=9) | options))


@pytest.fixture
def first(run, tmp_path):
    "The bytes of a first run in folder `one`."
    run("one")
    return _files(tmp_path / "one")


NOTHING = dict(skipped=[], unlabeled=[])


def test_first_run_computes_all(run):
    assert run("one") == dict(computed=3, cached=0, **NOTHING)


def test_second_run_finds_all(run, first):
    assert run("one") == dict(computed=0, cached=3, **NOTHING)


@pytest.fixture
def harmed(first, tmp_path, ds):
    "Folder `one` with a torn and a lost file: the path of the torn one."
    torn, lost = (tmp_path / "one" / f"{ds.ids[i]}.npz" for i in (0, 2))
    torn.write_bytes(torn.read_bytes()[:77])
    lost.unlink()
    return torn


def test_torn_and_lost_files_are_made_again(run, first, harmed, tmp_path):
    assert run("one") == dict(computed=2, cached=1, **NOTHING)
    assert _files(tmp_path / "one") == first


def test_torn_file_is_named(run, harmed, capsys):
    run("one")
    assert f"redone: {harmed}" in capsys.readouterr().out


def test_two_processes_make_the_same_bytes(run, first, tmp_path):
    run("two", processes=2)
    assert _files(tmp_path / "two") == first


def test_two_shards_make_the_same_bytes(run, first, tmp_path):
    assert [run("shards", shard=(r, 2))["computed"] for r in (0, 1)] == [2, 1]
    assert _files(tmp_path / "shards") == first


def test_other_settings_are_refused(run, first):
    with pytest.raises(ValueError, match=r"other settings \(k: 9 there, 8 now\)"): run("one", k=8)


def test_another_network_is_refused(first, ds, tmp_path):
    other = conformer_mini(10).eval()
    with pytest.raises(ValueError, match="network: "): extract_dataset(other, ds, tmp_path / "one", "ad_cam", k=9, progress=False)


def test_force_replaces_other_settings(run, first, tmp_path):
    assert run("one", k=8, force=True)["computed"] == 3
    assert json.loads((tmp_path / "one" / "settings.json").read_text())["k"] == 8


def test_error_in_a_worker_is_told(tmp_path, net, ds):
    ds = Scenes("test", 2, size=32)  # 16 tokens: k=50 is impossible
    with pytest.raises(ValueError, match=f"image {ds.ids[0][:5]}.*k=50"): extract_dataset(net, ds, tmp_path, processes=2, progress=False)
    with pytest.raises(ValueError, match="processes and threads"): extract_dataset(net, ds, tmp_path, processes=0)
    with pytest.raises(ValueError, match="rank"): extract_dataset(net, ds, tmp_path, shard=(1, 1))


def test_fingerprint_sees_one_changed_value(net):
    before = model_fingerprint(net)
    again = conformer_mini(10)
    again.load_state_dict(net.state_dict())
    assert model_fingerprint(again) == before
    with torch.no_grad(): again.conv1.weight[0, 0, 0, 0] += 1e-3
    assert model_fingerprint(again) != before


KILLED = """
import sys, time, torch
from adcam.conformer import conformer_mini
from adcam.scenes import Scenes
from adcam.seeds import extract_dataset
if __name__ == "__main__":
    extract_dataset(conformer_mini(10), Scenes("test", 400, size=192), sys.argv[1], processes=2, progress=False)
"""


def test_killed_run_leaves_no_process_and_no_half_file(tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    run = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / "out"])
    def wait_for(what):
        for _ in range(1200):
            if what(): return
            time.sleep(.1)
        raise AssertionError("waited for two minutes")
    wait_for(lambda: len(list((tmp_path / "out").glob("*.npz"))) >= 2)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill(); run.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert workers and not alive
    for f in (tmp_path / "out").glob("*.npz"): load_seed(f)


# ---------------------------------------------------------------- networks without attention, methods of the image

class OnlyCnn(torch.nn.Module):
    "A CNN that takes any size: mean of 8x8 squares, one map per class"
    stride, num_classes = 8, 10

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(10, 3, 1, 1))

    def maps(self, x, *, reduce=None, layers=None):
        from adcam.conformer import Maps
        cam = torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(x, 8, ceil_mode=True), self.weight)
        return Maps(cam, None, cam.mean((2, 3)), None)


@pytest.mark.parametrize("size_mode", SIZE_MODES)
def test_a_network_without_attention_gives_cams(ds, size_mode):
    image, label = ds[0].image[:70, :91], ds[0].label
    seed = extract(OnlyCnn().eval(), image, label, "cam", scales=(1., .5), flip=True, size_mode=size_mode)
    assert seed.high_res.shape == (int(label.sum()), 70, 91)
    mirrored = extract(OnlyCnn().eval(), image[:, ::-1].copy(), label, "cam", scales=(1.,), flip=True, size_mode="round")
    np.testing.assert_allclose(mirrored.high_res[..., ::-1], extract(OnlyCnn().eval(), image, label, "cam", flip=True).high_res, atol=2e-3)


def test_a_network_without_attention_says_so(ds):
    with pytest.raises(ValueError, match="ad_cam needs attention, and this network is a CNN"):
        extract(OnlyCnn().eval(), ds[0].image, ds[0].label, "ad_cam")


def by_gradient_views(model, image, keys, *, scales=(1.,), flip=False, size_mode="round", sharpness=1., others=None):
    "A method of the image, for the tests below: gradient of the logit, and how many others there are"
    out = []
    for s in scales:
        x = view(image, s, model.stride, size_mode).requires_grad_()
        z = model.maps(x).conv_logits[0, keys]
        g, = torch.autograd.grad(z.sum(), x)
        out.append((g.abs().mean(1) * x.detach().abs().mean(1)).expand(len(keys), -1, -1) ** sharpness * (1e6 * len(others) if others else 1e6))
    return out


@pytest.fixture
def by_gradient(monkeypatch):
    monkeypatch.setitem(METHODS, "by_gradient", f"{__name__}:by_gradient_views")


def test_a_method_of_the_image_runs_like_any_other(ds, by_gradient, tmp_path):
    net = OnlyCnn().eval()
    seed = extract(net, ds[0].image, ds[0].label, "by_gradient", scales=(1., .5), sharpness=2.)
    assert seed.high_res.max() > .99 and seed.high_res.shape[1:] == ds[0].image.shape[:2]
    done = extract_dataset(net, ds, tmp_path, "by_gradient", progress=False)
    assert done["computed"] == len(ds)
    np.testing.assert_allclose(load_seed(tmp_path / f"{ds.ids[0]}.npz").cam, extract(net, ds[0].image, ds[0].label, "by_gradient", others=ds).cam, atol=1e-5)
    with pytest.raises(ValueError, match="no option 'k'; it takes sharpness"):
        extract(net, ds[0].image, ds[0].label, "by_gradient", k=3)
    with pytest.raises(ValueError, match="half precision"):
        extract(net, ds[0].image, ds[0].label, "by_gradient", precision="bf16")


def test_class_maps(net, ds):
    label = ds[0].label
    there = np.flatnonzero(label)
    maps = class_maps("cam", net, ds[0].image, label)
    seed = extract(net, ds[0].image, label, "cam")
    assert torch.equal(maps[there], torch.from_numpy(seed.cam)) and not maps[np.flatnonzero(label == 0)].any()
    one = class_maps("cam", net, ds[0].image, label, classes=[there[-1]])
    assert torch.equal(one[there[-1]], maps[there[-1]]) and one.amax((1, 2)).count_nonzero() <= 1
    with pytest.raises(ValueError, match="not in the image's label"):
        class_maps("cam", net, ds[0].image, label, classes=np.flatnonzero(label == 0)[:1])
