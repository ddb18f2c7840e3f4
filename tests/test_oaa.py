"OAA: the 8-bit values of two official codes, passes that can be interrupted, the integral model, and what is refused."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adcam.baselines.oaa import (Accumulator, Attention, IntegralConfig, IntegralTask, RULES, accumulate, attention, believed, enlarged, hybrid_loss,
                                 load_attention, oaa_seed, oaa_seeds, save_attention,
                                 train_integral, train_oaa)
from adcam.classifier import TrainConfig
from adcam.cnn import resnet_mini
from adcam.scenes import Scenes
from adcam.seeds import load_seed

torch.set_num_threads(1)
LABELS = {0: (3, 11), 1: (5,)}


@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture(scope="module")
def g17(golden): return dict(np.load(golden / "related/g17_oaa.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def log(golden): return json.loads((golden / "related/related_log.json").read_text())["oaa"]


@pytest.fixture(scope="module")
def score(rules, g17):
    def made(i, e):
        x = rules.nrm(840 + 10*i + e, (1, 20, 14, 18))[0].copy()
        for c in LABELS[i]: x[c] += g17[f"offsets_i{i}_c{c}"][e]
        return x
    return made


def hot(i): return np.isin(np.arange(20), LABELS[i]).astype(int)


# ---- the official 8-bit values (g17) ----

def test_golden_oaa_stored_maps(score, g17):
    "Six epochs, two images: gate, first epoch left out, last epoch fills what is empty; every value equal"
    kept = {}
    np.testing.assert_allclose(score(0, 0).mean((1, 2))[None], g17["probs_logit_e0"], atol=1e-5)
    for e in range(6):
        for i in (0, 1):
            x = score(i, e)
            sure = believed(x.mean((1, 2)), hot(i))
            for c in LABELS[i]:
                if e and (c in sure or (e == 5 and (i, c) not in kept)): kept[i, c] = accumulate(kept.get((i, c)), x[c])
                np.testing.assert_array_equal(kept.get((i, c), np.zeros((0, 0), np.uint8)), g17[f"stored_e{e}_i{i}_c{c}"])


class Sample:
    def __init__(self, i): self.id, self.label, self.image = f"image{i}", hot(i), np.zeros((8, 8, 3), np.uint8)


def test_golden_oaa_callback(score, g17, tmp_path):
    "The same through the files of an Accumulator, and again with every pass done twice"
    class Two:
        ids = ["image0", "image1"]
        def __len__(self): return 2
        def fingerprint(self): return "two"
    for times in (1, 2):
        watch = Accumulator(Two(), tmp_path / str(times), epochs=6)
        for e in range(1, 6):
            for _ in range(times):
                for i in (0, 1): watch.update(Sample(i), score(i, e), score(i, e).mean((1, 2)), e)
            for i in (0, 1):
                for c in LABELS[i]:
                    a = load_attention(tmp_path / str(times), f"image{i}", c)
                    np.testing.assert_array_equal(np.zeros((0, 0)) if a is None else a.map, g17[f"stored_e{e}_i{i}_c{c}"])


@pytest.mark.parametrize("rule", RULES[1:])
def test_golden_oaa_caffe_rules(score, g17, rule):
    want, kept = g17[f"caffe_{rule.split('_')[1].upper()}"], {}
    for e in range(5):
        x = score(0, e)
        sure = believed(x.mean((1, 2)), hot(0))
        for j, c in enumerate(LABELS[0]):
            old, n = kept.get(c, (None, 0))
            if c in sure: kept[c] = accumulate(old, x[c][:, ::-1] if e % 2 else x[c], rule, n), n + 1
            np.testing.assert_array_equal(kept[c][0] if c in kept else np.zeros((14, 18)), want[e, j])


def test_golden_oaa_enlarged(g17):
    "Another bicubic kernel than OpenCV's: at most one level"
    off = np.abs(enlarged(g17["stored_e5_i0_c3"], (41, 53)).astype(int) - g17["zoom_41x53"])
    assert off.max() <= 1 and (off > 0).mean() < .03


def test_golden_oaa_hybrid_loss(rules, g17, log):
    z, t = torch.from_numpy(rules.nrm(860, (2, 20, 14, 18), 2.)).requires_grad_(), torch.zeros(2, 20, 14, 18)
    for b, ks in LABELS.items():
        m = np.floor(rules.cam_map(861 + b, len(ks), 14, 18)*255)/255
        t[b, list(ks)] = torch.from_numpy(np.where(m < .2, 0, m).astype(np.float32))
    assert [int((t > .001).sum()), int((t <= .001).sum())] == [log["npos"], log["nneg"]]
    loss = hybrid_loss(z, t)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(log["exloss"], rel=1e-5) and float(z.grad.norm()) == pytest.approx(log["exloss_grad_norm"], rel=1e-5)
    np.testing.assert_allclose(z.grad[..., ::3, ::3], g17["exloss_grad_ds"], atol=1e-7)


# ---- properties ----

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_the_maximum_only_grows_and_forgets_the_order(seed, n):
    maps = np.random.default_rng(seed).normal(0, 1, (n, 5, 6))
    kept, before = None, np.zeros((5, 6), np.uint8)
    for m in maps:
        kept = accumulate(kept, m)
        assert kept.dtype == np.uint8 and (kept >= before).all()
        before = kept
    back = None
    for m in maps[::-1]: back = accumulate(back, m)
    np.testing.assert_array_equal(kept, back)
    assert (accumulate(kept, maps[0]) == kept).all(), "once more changes nothing"


def test_a_map_without_evidence_is_zero():
    assert not attention(-np.ones((3, 4))).any() and not accumulate(None, -np.ones((3, 4))).any() and not enlarged(np.zeros((3, 4), np.uint8), (9, 9)).any()


def test_an_empty_set_counts_as_zero():
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    for t in (torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)):
        loss = hybrid_loss(z, t)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_files_come_back(tmp_path):
    a = Attention(np.arange(12, dtype=np.uint8).reshape(3, 4), 3, 7)
    save_attention(tmp_path, "2007_000032", 4, a)
    b = load_attention(tmp_path, "2007_000032", 4)
    assert (b.map == a.map).all() and (b.count, b.epoch) == (3, 7) and load_attention(tmp_path, "2007_000032", 5) is None
    path = tmp_path / "2007_000032_4.png"
    for bad in (path.read_bytes()[:40], b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="2007_000032_4.png is not a readable accumulated map"): load_attention(tmp_path, "2007_000032", 4)


# ---- while a network learns ----

CONFIG = TrainConfig(epochs=3, batch=4, crop=32, resize=None)


def fresh():
    torch.manual_seed(0)
    return resnet_mini(10)


@pytest.fixture(scope="module")
def ds(): return Scenes("train", 8, 48)


@pytest.fixture(scope="module")
def whole(ds, tmp_path_factory):
    "One training that was never interrupted"
    folder = tmp_path_factory.mktemp("oaa")
    net = fresh()
    history = train_oaa(net, ds, CONFIG, folder / "maps", folder / "run", progress=False)
    return folder, net, history


def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_one_file_per_image_and_class_and_no_more(whole, ds):
    folder, net, _ = whole
    pairs = {f"{s.id}_{k}.png" for s in ds for k in np.flatnonzero(s.label)}
    assert set(files(folder / "maps")) == pairs | {"passes.json"}
    for s in ds:
        for k in np.flatnonzero(s.label):
            a = load_attention(folder / "maps", s.id, k)
            assert a.map.shape == (6, 6) and 1 <= a.count <= 2 and 1 <= a.epoch <= 2                # the first of three epochs is not watched


class Cut(Exception): pass


@pytest.mark.parametrize("after", [3, 11])
def test_a_run_killed_within_a_pass_ends_with_the_same_files(whole, ds, tmp_path, monkeypatch, after):
    "Killed while image number `after` is watched; the pass is repeated with the weights saved before it, nothing is counted twice"
    update, left = Accumulator.update, [after]
    def killed(self, *a):
        left[0] -= 1
        if left[0] < 0: raise Cut
        return update(self, *a)
    monkeypatch.setattr(Accumulator, "update", killed)
    with pytest.raises(Cut): train_oaa(fresh(), ds, CONFIG, tmp_path / "maps", tmp_path / "run", progress=False)
    monkeypatch.setattr(Accumulator, "update", update)
    net = fresh()
    history = train_oaa(net, ds, CONFIG, tmp_path / "maps", tmp_path / "run", progress=False)
    assert files(tmp_path / "maps") == files(whole[0] / "maps") and [h["loss"] for h in history] == [h["loss"] for h in whole[2]]


def test_the_training_does_not_notice(whole, ds):
    from adcam.cnn import train_cam
    assert [h["loss"] for h in train_cam(fresh(), ds, CONFIG, progress=False)] == [h["loss"] for h in whole[2]]


def test_a_damaged_map_is_named_and_started_again(ds, tmp_path, capsys):
    watch, s = Accumulator(ds, tmp_path, epochs=3), ds[0]
    k, maps, sure = int(np.flatnonzero(s.label)[0]), np.random.default_rng(0).normal(0, 1, (10, 6, 6)), np.where(s.label, 9., 0.)
    watch.update(s, maps, sure, 1)
    (tmp_path / f"{s.id}_{k}.png").write_bytes(b"torn")
    watch.update(s, maps, sure, 2)
    assert "redone:" in capsys.readouterr().out and load_attention(tmp_path, s.id, k).count == 1


def test_a_broken_image_is_left_out_and_an_unlabeled_one_ignored(ds, tmp_path):
    class Faulty:
        ids, classes = ds.ids, ds.classes
        def __len__(self): return len(ds)
        def __getitem__(self, i):
            if i == 1: raise ValueError("image.jpg is cut short")
            return ds[i]._replace(label=ds[i].label*(i != 2))
        def fingerprint(self): return "faulty"
    watch = Accumulator(Faulty(), tmp_path, epochs=2)
    with pytest.warns(UserWarning, match=f"{ds.ids[1]} is left out: image.jpg is cut short"): watch(fresh().eval(), 2, [])
    assert watch.skipped == {ds.ids[1]: "image.jpg is cut short"} and not [p for p in tmp_path.iterdir() if p.name.startswith((ds.ids[1], ds.ids[2]))]


# ---- seeds and integral model ----

def test_seeds_of_the_watched_images(whole, ds, tmp_path):
    folder = whole[0]
    assert oaa_seeds(ds, folder / "maps", tmp_path / "seeds") == dict(computed=8, skipped=[])
    seed, s = load_seed(tmp_path / f"seeds/{ds.ids[3]}.npz"), ds[3]
    assert seed.keys.tolist() == np.flatnonzero(s.label).tolist() and seed.high_res.shape == (len(seed.keys), 48, 48) and seed.cam.shape[1:] == (12, 12)
    assert seed.high_res.min() >= 0 and seed.high_res.max() <= 1
    (tmp_path / f"seeds/{ds.ids[5]}.npz").unlink()                         # as if it had been stopped before that one
    before = (tmp_path / f"seeds/{ds.ids[3]}.npz").stat().st_mtime_ns
    assert oaa_seeds(ds, folder / "maps", tmp_path / "seeds") == dict(computed=1, skipped=[])
    assert (tmp_path / f"seeds/{ds.ids[3]}.npz").stat().st_mtime_ns == before
    one = oaa_seed(folder / "maps", s)
    np.testing.assert_allclose(one.high_res[0], enlarged(load_attention(folder / "maps", s.id, one.keys[0]).map, (48, 48))/255, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="its last epoch fills"): oaa_seed(tmp_path, s)
    (tmp_path / "seeds/settings.json").write_text("{}")
    with pytest.raises(ValueError, match="made with other settings"): oaa_seeds(ds, folder / "maps", tmp_path / "seeds")


def test_two_processes_share_the_seeds_and_a_damaged_one_is_made_again(whole, ds, tmp_path, monkeypatch, capsys):
    maps, out = whole[0] / "maps", tmp_path / "seeds"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert oaa_seeds(ds, maps, out)["computed"] == 4
    monkeypatch.undo()
    oaa_seeds(ds, maps, tmp_path / "one")
    assert files(out) == files(tmp_path / "one")
    (out / f"{ds.ids[2]}.npz").write_bytes(b"torn")
    assert oaa_seeds(ds, maps, out) == dict(computed=1, skipped=[]) and "redone:" in capsys.readouterr().out
    assert files(out) == files(tmp_path / "one")


def test_maps_of_no_complete_pass_are_refused_in_words(ds, tmp_path):
    for call in (lambda: oaa_seeds(ds, tmp_path, tmp_path / "s"), lambda: train_integral(fresh(), ds, tmp_path, IntegralConfig(epochs=1, batch=4, crop=48))):
        with pytest.raises(FileNotFoundError, match="no pass over the images is complete there"): call()


def test_integral_model_learns_the_maps_and_resumes(whole, ds, tmp_path):
    folder, config = whole[0], IntegralConfig(epochs=3, batch=4, lr=.01, crop=48)
    net = fresh()
    stats = net.backbone_net.bn1.running_mean.clone()
    history = train_integral(net, ds, folder / "maps", config, progress=False)
    assert np.mean([h["loss"] for h in history[-2:]]) < history[0]["loss"] and not net.training and net.backbone_net.bn1.running_mean.equal(stats)
    train_integral(fresh(), ds, folder / "maps", replace(config, epochs=3), tmp_path, progress=False)
    again = fresh()
    assert train_integral(again, ds, folder / "maps", config, tmp_path, progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    rates = [g["lr"] for g in IntegralTask(fresh()).optimizer(config, 10).param_groups]
    assert rates == pytest.approx([.01, .1])


# ---- what is refused ----

def test_what_is_refused(whole, ds, tmp_path):
    folder = whole[0]
    with pytest.raises(ValueError, match="choose one of max"): Accumulator(ds, tmp_path, 3, rule="mean")
    with pytest.raises(ValueError, match="start_epoch is 3; with 3 epochs"): Accumulator(ds, tmp_path, 3, start_epoch=3)
    with pytest.raises(ValueError, match="rule: 'max' there, 'caffe_max' now"): Accumulator(ds, folder / "maps", 3, rule="caffe_max")
    with pytest.raises(ValueError, match="no training to continue"): train_oaa(fresh(), ds, CONFIG, folder / "maps", tmp_path / "run")
    with pytest.raises(ValueError, match="has seen 0 of the 3 epochs"): train_oaa(fresh(), ds, CONFIG, tmp_path / "maps", folder / "run")
    with pytest.raises(ValueError, match="multiple of the stride, 8"): train_integral(fresh(), ds, folder / "maps", IntegralConfig(crop=50))
    with pytest.raises(ValueError, match=r"the stored map is \(6, 6\), the new one \(5, 5\)"): accumulate(np.zeros((6, 6), np.uint8), np.zeros((5, 5)))
    bad = fresh().eval()
    with torch.no_grad(): bad.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"{ds.ids[0]}: the class maps hold NaN"): Accumulator(ds, tmp_path / "nan", 2)(bad, 2, [])


# ---- from a terminal ----

def test_the_command_collects_and_learns(tmp_path, capsys):
    "`train-oaa` leaves seeds of the collected maps and weights of OAA+; a second call has nothing left to train"
    from adcam.cli import main
    from adcam.cnn import load_cam
    words = ["train-oaa", "--data", "mini", "--n", "2", "--backbone", "resnet_mini", "--epochs", "2", "--integral-epochs", "1", "--batch", "2", "--crop", "64", "--out", str(tmp_path)]
    def run(*more):
        with pytest.raises(SystemExit) as stop: main([*words, *more])
        return stop.value.code or 0, "".join(capsys.readouterr())
    code, text = run()
    assert code == 0 and "2 new seeds of collected maps" in text
    assert len(list((tmp_path / "seeds").glob("*.npz"))) == 2
    once = load_cam(resnet_mini(10), tmp_path / "weights.safetensors").state_dict()
    assert run()[0] == 0
    again = load_cam(resnet_mini(10), tmp_path / "weights.safetensors").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in once.items())


def test_the_command_refuses_an_unknown_rule(tmp_path, capsys):
    from adcam.cli import main
    with pytest.raises(SystemExit) as stop: main(["train-oaa", "--data", "mini", "--n", "2", "--backbone", "resnet_mini", "--rule", "best", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "rule is 'best'" in capsys.readouterr().err


def test_the_command_refuses_views_of_half_cells_before_any_training(tmp_path, capsys):
    from adcam.cli import main
    with pytest.raises(SystemExit) as stop: main(["train-oaa", "--data", "mini", "--n", "4", "--backbone", "resnet_mini", "--crop", "50", "--batch", "2", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "crop is 50; it must be a multiple of the stride, 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
