"""adcam.seeds in several processes that are launched, killed and started again; faults in the data; a full disk; padding; half precision."""
import errno, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, torch

from adcam.cam import ad_cam, att_diffu, cam_map, trans_cam, ts_cam
from adcam.conformer import Maps, conformer_mini
from adcam.data import to_tensor
from adcam.scenes import Scenes
from adcam.seeds import METHODS, check_seeds, extract, extract_dataset, launched, load_seed, maps_needed, merge_seeds, picture_tokens, save_seed, view_maps

SIZE, N, OPTIONS = 64, 10, dict(k=9, progress=False)


def network():
    torch.manual_seed(0)
    return conformer_mini(10, channels=(16, 32), embed_dim=24).eval()


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).glob("*.npz")}


@pytest.fixture(scope="module")
def ds(): return Scenes("test", N, size=SIZE)


@pytest.fixture(scope="module")
def alone(ds, tmp_path_factory):
    "The seeds of one process that nobody disturbed"
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    assert extract_dataset(network(), ds, out, **OPTIONS)["computed"] == N
    return files(out)


# ---- launched processes

WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_seeds_processes import N, OPTIONS, SIZE, network
from adcam.scenes import Scenes
from adcam.seeds import extract_dataset
out, pause = Path(sys.argv[1]), float(sys.argv[2])

class Slow(Scenes):
    def __getitem__(self, i): time.sleep(pause); return super().__getitem__(i)

(out.parent / f"pid{{os.environ['RANK']}}").write_text(str(os.getpid()))
done = extract_dataset(network(), Slow("test", N, size=SIZE), out, **OPTIONS)
(out.parent / f"done{{os.environ['RANK']}}").write_text(str(done["computed"]))
"""
LAUNCHERS = dict(torchrun=["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
                 accelerate=["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"])


def start(launcher, folder, pause):
    (folder / "worker.py").write_text(WORKER.format(tests=str(Path(__file__).parent)))
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([sys.executable, "-m", *LAUNCHERS[launcher], str(folder / "worker.py"), str(folder / "out"), str(pause)], env=env,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(what, run):
    for _ in range(1800):
        if what(): return
        assert run.poll() is None, "the launcher has ended too early"
        time.sleep(.1)
    raise AssertionError("waited for three minutes")


def test_a_killed_worker_loses_nothing(tmp_path, ds, alone):
    "torchrun, one of two workers killed in the middle; accelerate launch does the rest; the bytes are those of one process"
    run = start("torchrun", tmp_path, pause=1.)
    mine = [tmp_path / "out" / f"{ds.ids[i]}.npz" for i in range(1, N, 2)]  # the images of worker 1
    wait_for(lambda: any(p.exists() for p in mine), run)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    assert run.wait(120) != 0
    before = check_seeds(tmp_path / "out", ds)
    assert 0 < before["there"] < N and not before["complete"] and not before["damaged"] and len(before["missing"]) == N - before["there"]
    kept = files(tmp_path / "out")
    for p in tmp_path.glob("done*"): p.unlink()
    assert start("accelerate", tmp_path, pause=0.).wait(300) == 0
    assert sum(int(p.read_text()) for p in tmp_path.glob("done*")) == N - before["there"], "each image that was missing is made once, no other"
    assert check_seeds(tmp_path / "out", ds)["complete"]
    assert files(tmp_path / "out") == alone and kept.items() <= alone.items()


def test_shard_comes_from_the_launcher(monkeypatch, tmp_path, ds, alone):
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank)); monkeypatch.setenv("WORLD_SIZE", "2")
        assert launched() == (rank, 2)
        assert extract_dataset(network(), ds, tmp_path, **OPTIONS)["computed"] == N // 2
    assert files(tmp_path) == alone
    assert extract_dataset(network(), ds, tmp_path, shard=(0, 1), **OPTIONS) == dict(computed=0, cached=N, skipped=[], unlabeled=[])  # said explicitly
    for rank, count in (("2", "2"), ("-1", "2"), ("a", "2")):
        monkeypatch.setenv("RANK", rank); monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match="torchrun or accelerate launch"): launched()


class Deadly(Scenes):
    "The third image kills the process that reads it"
    def __getitem__(self, i):
        if i == 2: os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_killed_pool_worker_is_named(tmp_path, ds, alone):
    with pytest.raises(RuntimeError, match="a worker process was killed.*run again"):
        extract_dataset(network(), Deadly("test", N, size=SIZE), tmp_path, processes=2, **OPTIONS)
    extract_dataset(network(), ds, tmp_path, **OPTIONS)
    assert files(tmp_path) == alone


def test_merge_and_account(tmp_path, ds, alone):
    for r in (0, 1, 2): extract_dataset(network(), ds, tmp_path / str(r), shard=(r, 3), **OPTIONS)
    assert merge_seeds([tmp_path / "0", tmp_path / "1"], tmp_path / "1") < N
    told = check_seeds(tmp_path / "1", ds)
    assert told["missing"] == [ds.ids[i] for i in range(2, N, 3)] and not told["complete"]
    assert merge_seeds([tmp_path / "1", tmp_path / "2"], tmp_path / "all") == N
    assert files(tmp_path / "all") == alone and check_seeds(tmp_path / "all", ds)["complete"]
    a, b = (tmp_path / "all" / f"{i}.npz" for i in ds.ids[:2])
    a.write_bytes(a.read_bytes()[:-9])
    save_seed(tmp_path / "all" / "stranger.npz", load_seed(b))
    told = check_seeds(tmp_path / "all", ds)
    assert [i for i, _ in told["damaged"]] == [ds.ids[0]] and told["foreign"] == ["stranger"] and told["there"] == N - 1 and not told["complete"]
    with pytest.raises(ValueError, match="different seeds of one image"): merge_seeds([tmp_path / "0"], tmp_path / "all")
    extract_dataset(network(), ds, tmp_path / "other", k=8, progress=False, shard=(0, 9))
    with pytest.raises(ValueError, match=r"other settings.*k: "): merge_seeds([tmp_path / "0", tmp_path / "other"], tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no settings.json"): merge_seeds([tmp_path], tmp_path / "x")


def test_force_by_one_process_spares_what_another_has_just_made(tmp_path, ds):
    "Two ranks with force=True: the second must not delete what the first has made with the same new settings"
    extract_dataset(network(), ds, tmp_path, shard=(0, 1), **OPTIONS)
    new = dict(OPTIONS, k=8, force=True)
    extract_dataset(network(), ds, tmp_path, shard=(0, 2), **new)
    first = {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")}
    assert set(first) == {f"{i}.npz" for i in ds.ids[::2]}
    extract_dataset(network(), ds, tmp_path, shard=(1, 2), **new)
    assert all((tmp_path / name).read_bytes() == data for name, data in first.items())


# ---- faults

class Faulty(Scenes):
    def __getitem__(self, i):
        if i == 1: raise ValueError("JPEGImages/1.jpg is cut short; copy the file again")
        if i == 3: raise FileNotFoundError("no image 3.jpg; complete the folder")
        s = super().__getitem__(i)
        return s._replace(label=s.label * (0 if i == 4 else .5 if i == 5 else 1))


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_images_are_reported_and_others_kept(tmp_path, ds, alone, processes):
    faulty = Faulty("test", N, size=SIZE)
    done = extract_dataset(network(), faulty, tmp_path, processes=processes, **OPTIONS)
    assert (done["computed"], done["cached"], done["unlabeled"]) == (N - 4, 0, [ds.ids[4]])
    told = dict(done["skipped"])
    assert set(told) == {ds.ids[i] for i in (1, 3, 5)}
    assert "cut short" in told[ds.ids[1]]
    assert "complete the folder" in told[ds.ids[3]]
    assert "0 or 1" in told[ds.ids[5]]
    assert files(tmp_path) == {f"{i}.npz": alone[f"{i}.npz"] for n, i in enumerate(ds.ids) if n not in (1, 3, 4, 5)}
    account = check_seeds(tmp_path, faulty)
    assert account["skipped"] == [(i, told[i]) for i in faulty.ids if i in told]
    assert account["unlabeled"] == [ds.ids[4]]
    assert account["missing"] == []
    assert not account["complete"]
    assert json.loads((tmp_path / "skipped-0-of-1.json").read_text())["unlabeled"] == [ds.ids[4]]
    mended = extract_dataset(network(), ds, tmp_path, **OPTIONS)  # the files have been repaired
    assert (mended["computed"], mended["skipped"], files(tmp_path)) == (4, [], alone) and check_seeds(tmp_path, ds)["complete"]
    assert not list(tmp_path.glob("skipped*"))


def test_full_disk(tmp_path, ds, alone, monkeypatch):
    "The third seed finds no room: said so, no half file, no temporary file; later the rest is made"
    write, calls = np.savez, []
    def full(f, **arrays):
        calls.append(1)
        if len(calls) == 3: f.write(b"PK\x03\x04"); raise OSError(errno.ENOSPC, "No space left on device")
        write(f, **arrays)
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=rf"{ds.ids[2]}.npz.*disk is full; make room and run again") as e: extract_dataset(network(), ds, tmp_path, **OPTIONS)
    assert e.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"{i}.npz" for i in ds.ids[:2]] + ["settings.json"])
    extract_dataset(network(), ds, tmp_path, **OPTIONS)
    assert files(tmp_path) == alone


def test_classes_of_data_and_network_must_agree(tmp_path, ds):
    with pytest.raises(ValueError, match="the data set has 10 classes, the network 20"): extract_dataset(conformer_mini(20), ds, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


# ---- one view: reduced maps, padding, precision

@torch.no_grad()
@pytest.mark.parametrize("method,options", [("cam", {}), ("ts_cam", {}), ("ts_cam", dict(layers=2)), ("trans_cam", dict(steps=2)), ("att_diffu", {}),
                                            ("ad_cam", dict(k=9)), ("ad_cam", dict(k=9, layers=[0, 2])), ("ad_cam", dict(k=9, renorm="per_layer")),
                                            ("ad_cam", dict(k=9, renorm="none"))])
def test_reduced_maps_give_the_same(ds, method, options):
    "Exactly, and up to rounding where blocks took the fused kernel"
    net, f = network(), METHODS[method]
    x = to_tensor(ds[0].image)[None]
    want = f(net.maps(x), classes=[0, 3], **options)[0]
    got = view_maps(net, x, [0, 3], f, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.max().item())
    if method != "cam" and "layers" not in options: assert torch.equal(got, want)
    assert maps_needed(f, options).get("reduce") == (None if options.get("renorm") == "per_layer" or method in ("ts_cam", "trans_cam") else "mean")


@torch.no_grad()
@pytest.mark.parametrize("method", [cam_map, ts_cam, trans_cam, att_diffu, ad_cam])
def test_flip_is_a_second_pass_on_large_views(ds, method, monkeypatch):
    net, x = network(), to_tensor(ds[0].image)[None]
    options = dict(k=9) if method is ad_cam else {}
    together = view_maps(net, x, [1], method, flip=True, **options)
    monkeypatch.setattr("adcam.seeds._PAIR", 10)
    torch.testing.assert_close(view_maps(net, x, [1], method, flip=True, **options), together, rtol=1e-3, atol=1e-4 * together.max().item())
    by_hand = sum(view_maps(net, v, [1], method, **options).flip(-1) if i else view_maps(net, v, [1], method, **options) for i, v in enumerate((x, x.flip(-1))))
    torch.testing.assert_close(together, by_hand, rtol=1e-3, atol=1e-4 * together.max().item())


class Padded(torch.nn.Module):
    "Random maps on the token grid of 8 pixels; tokens outside `picture` draw `greed` times the attention. Mirrored input: mirrored maps."
    stride, num_classes = 8, 10
    def __init__(self, picture, greed):
        super().__init__()
        self.picture, self.greed, self.anchor = picture, greed, torch.nn.Parameter(torch.zeros(1))

    def maps(self, x, *, reduce=None, layers=None):
        out = [self.one(v) for v in x]
        return Maps(torch.cat([o.cam for o in out]), torch.cat([o.attn for o in out]), None, None)

    def one(self, v):
        h, w, g = v.shape[1] // 8, v.shape[2] // 8, torch.Generator().manual_seed(3)
        mirrored = bool(v[:, :, 0].abs().sum() < v[:, :, -1].abs().sum())  # padding is zero
        cam, score = torch.rand(1, 10, h, w, generator=g) - .3, torch.rand(h * w, h * w, generator=g)
        out = (torch.arange(h)[:, None] >= self.picture[0]) | (torch.arange(w) >= self.picture[1])  # (h,w)
        score[:, out.flatten()] *= self.greed
        if mirrored:
            order = torch.arange(h * w).view(h, w).flip(-1).flatten()
            cam, score = cam.flip(-1), score[order][:, order]
        score = torch.nn.functional.pad(score, (1, 0, 1, 0), value=.5)
        return Maps(cam, (score / score.sum(-1, keepdim=True))[None, None], None, None)


@pytest.mark.parametrize("method,options", [("ad_cam", dict(k=7)), ("ad_cam", dict(k=7, direction="pull")), ("att_diffu", {})])
@pytest.mark.parametrize("size_mode", ["pad", "pad16"])
def test_padding_has_no_influence_through_A(method, options, size_mode):
    "43 x 58 pixels: 6 x 8 tokens, of which 5 x 7 show mostly picture. The result is that of matrices cut by hand, whatever the padding draws."
    image, label = np.full((43, 58, 3), 255, np.uint8), np.eye(10)[[2, 7]].sum(0)
    picture = picture_tokens((43, 58), 8)
    assert picture == (5, 7)
    nets = [Padded(picture, greed).eval() for greed in (1., 1000.)]
    plain = [extract(net, image, label, method, size_mode=size_mode, **options).high_res for net in nets]
    both = [extract(net, image, label, method, size_mode=size_mode, flip=True, **options).high_res for net in nets]
    np.testing.assert_allclose(plain[0], plain[1], atol=1e-5)
    np.testing.assert_allclose(both[0], both[1], atol=1e-5)
    np.testing.assert_allclose(both[0], plain[0], atol=1e-4)  # the mirrored view is cut on the other side, and agrees
    maps, keep = nets[1].one(torch.ones(3, 48, 64)), [1 + 8 * i + j for i in range(5) for j in range(7)]
    A = maps.attn[0, 0].double()[keep][:, keep]
    cut = Maps(maps.cam[..., :5, :7], torch.nn.functional.pad(A / A.sum(1, keepdim=True), (1, 0, 1, 0), value=0.)[None, None], None, None)
    cut.attn[0, 0, 0, 1:] = 1 / 35
    want = METHODS[method](cut, classes=[2, 7], **options)
    got = view_maps(nets[1], torch.ones(1, 3, 48, 64), [2, 7], METHODS[method], tokens=(5, 7), **options)
    torch.testing.assert_close(got[:, :5, :7], want[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(got[:, 5], got[:, 4]) and torch.equal(got[:, :, 7], got[:, :, 6])  # edge values where padding was
    uncut = [view_maps(net, torch.ones(1, 3, 48, 64), [2, 7], METHODS[method], **options) for net in nets]
    assert (uncut[0] - uncut[1]).abs().max() > .05  # the cut matters


def test_half_precision_of_the_network_only(ds):
    net, s, precision, dtype = network(), ds[0], "bf16", torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", dtype): half, mean = net.maps(to_tensor(s.image)[None]), net.maps(to_tensor(s.image)[None], reduce="mean")
    with torch.no_grad(): full = net.maps(to_tensor(s.image)[None])
    assert half.cam.dtype == dtype and half.attn.dtype == torch.float32 and mean.attn.dtype == torch.float64
    torch.testing.assert_close(half.attn.sum(-1), torch.ones(half.attn.shape[:3]), rtol=0, atol=1e-5)
    assert (half.attn - full.attn).abs().max() < .02 * full.attn.max() and (half.cam.float() - full.cam).abs().max() < .03 * full.cam.abs().max()
    a, b = (extract(net, s.image, s.label, "att_diffu", precision=p, scales=(1., 1.5), flip=True) for p in ("fp32", precision))
    assert b.high_res.dtype == np.float32 and 0 < np.abs(a.high_res - b.high_res).max() < .1


def test_precision_is_a_setting(tmp_path, ds):
    run = lambda **kw: extract_dataset(network(), ds, tmp_path, shard=(0, 9), **OPTIONS, **kw)
    run()
    assert "precision" not in json.loads((tmp_path / "settings.json").read_text())  # as in folders made before there was a choice
    run(precision="tf32")  # on a CPU that is float32
    with pytest.raises(ValueError, match="precision: None there, 'bf16' now"): run(precision="bf16")
    with pytest.raises(ValueError, match="unknown precision 'fp8'; choose one of fp32, tf32, bf16, fp16"): run(precision="fp8")
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"): run(precision="fp16")
    with pytest.raises(ValueError, match="unknown size_mode 'pad32'"): run(size_mode="pad32")


@pytest.mark.parametrize("method, options", [("advcam", dict(iterations=2)), ("rib", dict(batch=2, crop=48, resize=None, steps=2))])
def test_slow_baselines_resume_and_share_the_work(method, options, tmp_path):
    "Files of two processes, one of them after an interruption, are those of one process to the byte"
    from adcam.cnn import mini_path, resnet_mini
    net, ds = resnet_mini(checkpoint=mini_path(0)).eval(), Scenes("val", 4, 48)
    run = lambda folder, **more: extract_dataset(net, ds, folder, method, progress=False, **options, **more)
    assert run(tmp_path / "one")["computed"] == 4
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    (tmp_path / "two").mkdir()
    for name in ("settings.json", f"{ds.ids[0]}.npz"): (tmp_path / "two" / name).write_bytes(files[name])  # what an interrupted run left
    done = run(tmp_path / "two", processes=2)
    assert (done["computed"], done["cached"]) == (3, 1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()} == files
