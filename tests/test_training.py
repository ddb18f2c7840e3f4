"""What a training may not do: change what it was told to leave alone, go on with something else, remember an earlier training."""
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adcam.classifier import TrainConfig, train
from adcam.cli import main
from adcam.cnn import mini_path, resnet_mini
from adcam.compare import Entry, seed_arrays
from adcam.conformer import conformer_mini
from adcam.deeplab import deeplabv2_mini, load_deeplab
from adcam.files import WorkerDied
from adcam.irnet import ConformerStages, IRNet, IRNetConfig, ResNet50Stages, ResNetStages, TimmStages, edge_map, save_mask, train_irnet
from adcam.pipeline import Point, attention_quality, checkpoint_path, count, profiles
from adcam.run import override, run
from adcam.scenes import Scenes
from adcam.segment import SegConfig, predict_logits, train_segmentation
from adcam.training import arithmetic, make_accelerator, model_fingerprint, origin, repeatable, untouched

SCENES = Scenes("train", 4, 64)
CLASSIFIER = TrainConfig(epochs=1, batch=2, crop=64, resize=None)
IRN = IRNetConfig(epochs=1, batch=2, crop=48, radius=3)
SEG = SegConfig(iterations=2, batch=2, accumulate=1, crop=48, optimizer="adamw", lr=1e-3, check=2)


def mask_of(sample): return sample.mask


def conformer(seed=0):
    torch.manual_seed(seed)
    return conformer_mini(10)


def boundary_net(seed=0):
    torch.manual_seed(1)
    net = resnet_mini(10).backbone_net
    torch.manual_seed(seed)
    return IRNet(ResNetStages(net), False, edge_width=8)


def segmenter(seed=0):
    torch.manual_seed(seed)
    return deeplabv2_mini(11)


# each: a fresh network by seed, its training on SCENES with a precision in a folder, and what it answers afterwards
TRAININGS = dict(
    classifier=(conformer, lambda net, precision="fp32", **kw: train(net, SCENES, replace(CLASSIFIER, mixed_precision=precision), progress=False, **kw),
                lambda net: net(torch.ones(1, 3, 64, 64))[0]),
    irnet=(boundary_net, lambda net, precision="fp32", **kw: train_irnet(net, SCENES, mask_of, replace(IRN, mixed_precision=precision), progress=False, **kw),
           lambda net: torch.from_numpy(edge_map(net, SCENES[0].image))),
    segment=(segmenter, lambda net, precision="fp32", **kw: train_segmentation(net, SCENES, mask_of, replace(SEG, mixed_precision=precision),
        progress=False, **kw),
             lambda net: predict_logits(net, SCENES[0].image)))
every_training = pytest.mark.parametrize("fresh, learn, answer", TRAININGS.values(), ids=TRAININGS)


# ---------------------------------------------------------------- frozen networks stay as they are

BACKBONES = dict(resnet=(lambda: resnet_mini(10).backbone_net, ResNetStages), conformer=(lambda: conformer_mini(10), ConformerStages))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build, stages", BACKBONES.values(), ids=BACKBONES)
def test_cutting_a_network_open_changes_neither_weights_nor_statistics_nor_modes(build, stages, training):
    net = build().train(training)
    before = model_fingerprint(net)
    stages(net)
    assert model_fingerprint(net) == before
    assert {m.training for m in net.modules()} == {training}


@pytest.mark.parametrize("build",
                         [lambda: ResNetStages(resnet_mini(10).backbone_net), lambda: ConformerStages(conformer_mini(10)),
                          lambda: TimmStages("resnet10t"), ResNet50Stages],
                         ids=["resnet", "conformer", "timm", "resnet50"])
def test_the_backbone_of_a_trained_boundary_network_is_the_one_it_was_given(build):
    stages = build()
    before = model_fingerprint(stages)
    net = IRNet(stages, True, edge_width=8, widths=(8, 8, 8, 8, 8))
    train_irnet(net, SCENES, mask_of, replace(IRN, crop=64, batch=4), progress=False)
    edge_map(net, SCENES[0].image)
    assert model_fingerprint(net.stages) == before


def test_the_shipped_backbone_goes_through_a_whole_run_unchanged(tmp_path):
    settings = override(profiles["mini"], ["irn_crop=64", "irn_epochs=1", "irn_batch=2", "walk_exp_times=1"])
    run(settings, "mini", tmp_path, limit=2, progress=False)
    shipped = resnet_mini(10, checkpoint=mini_path("pretrained")).backbone_net.state_dict()
    written = load_file(tmp_path / "irnet/irnet.safetensors")
    kept = {k.removeprefix("backbone.net."): v for k, v in written.items() if k.startswith("backbone.net.")}
    assert all(torch.equal(v, kept[k].to(v.dtype)) for k, v in shipped.items())


def test_the_command_irnet_train_leaves_the_backbone_alone(tmp_path):
    for i in range(2): save_mask(tmp_path / f"labels/{Scenes('train', 2)[i].id}.png", Scenes("train", 2)[i].mask)
    with pytest.raises(SystemExit) as end:
        main(["irnet", "train", str(tmp_path / "labels"), str(tmp_path / "out"), "--n", "2", "--epochs", "1", "--batch", "2", "--crop", "64", "--radius", "3"])
    assert end.value.code in (0, None)
    shipped = resnet_mini(10, checkpoint=mini_path("pretrained")).backbone_net.state_dict()
    written = load_file(tmp_path / "out/irnet.safetensors")
    assert all(torch.equal(v, written[f"backbone.net.{k}"].to(v.dtype)) for k, v in shipped.items())


def test_untouched_restores_modes_after_an_error():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train()
    net[1].eval()
    with pytest.raises(KeyError), untouched(net): raise KeyError("inside")
    assert [m.training for m in net.modules()] == [True, True, False]


# ---------------------------------------------------------------- a run continues only what it is

@every_training
def test_other_start_weights_are_refused(fresh, learn, answer, tmp_path):
    learn(fresh(), out=tmp_path)
    with pytest.raises(ValueError, match="other settings .*start"): learn(fresh(seed=5), out=tmp_path)


@every_training
def test_another_precision_is_refused(fresh, learn, answer, tmp_path):
    learn(fresh(), out=tmp_path)
    with pytest.raises(ValueError, match="precision: 'fp32' there, 'bf16' now"): learn(fresh(), "bf16", out=tmp_path)


@every_training
def test_changed_code_is_refused(fresh, learn, answer, tmp_path, monkeypatch):
    learn(fresh(), out=tmp_path)
    monkeypatch.setattr("adcam.training.code_hash", lambda *modules: "0" * 64)
    with pytest.raises(ValueError, match="code: '.*' there, '0{16}' now"): learn(fresh(), out=tmp_path)


@every_training
def test_a_finished_run_is_read_and_not_repeated(fresh, learn, answer, tmp_path):
    first, again = fresh(), fresh()
    history = learn(first, out=tmp_path)
    assert learn(again, out=tmp_path) == history
    assert model_fingerprint(again) == model_fingerprint(first)


def test_another_classifier_is_refused_by_a_whole_run(tmp_path):
    settings = override(profiles["mini"], ["epochs=1", "crop=64", "resize=(64,80)", "irn_crop=64", "irn_epochs=1", "walk_exp_times=1"])
    run(settings, "mini", tmp_path, limit=2, weights=checkpoint_path(0), progress=False)
    with pytest.raises(ValueError, match="other settings .*start"): run(settings, "mini", tmp_path, limit=2, weights=checkpoint_path(1), progress=False)


# ---------------------------------------------------------------- no memories of an earlier training

@every_training
def test_trainings_of_any_precision_follow_each_other(fresh, learn, answer):
    alone = fresh()
    learn(alone)
    learn(fresh(), "bf16")
    after = fresh()
    learn(after, "fp32")
    assert model_fingerprint(after) == model_fingerprint(alone)


@every_training
def test_the_environment_does_not_choose_the_precision(fresh, learn, answer, monkeypatch):
    plain, told = fresh(), fresh()
    learn(plain)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    learn(told)
    assert model_fingerprint(told) == model_fingerprint(plain)


@every_training
def test_after_half_precision_a_network_answers_as_a_fresh_one_with_its_weights(fresh, learn, answer):
    net, copy = fresh(), fresh(seed=3)
    learn(net, "bf16")
    copy.load_state_dict(net.state_dict())
    with torch.no_grad(): torch.testing.assert_close(answer(net.eval()), answer(copy.eval()), rtol=0, atol=1e-5)   # bfloat16 would be off by 1e-3


def test_predictions_equal_those_of_the_saved_file(tmp_path):
    net = segmenter()
    train_segmentation(net, SCENES, mask_of, replace(SEG, mixed_precision="bf16"), out=tmp_path, progress=False)
    saved = load_deeplab(segmenter(seed=7), tmp_path / "weights.safetensors").eval().to(memory_format=torch.channels_last)
    assert torch.equal(predict_logits(net, SCENES[0].image), predict_logits(saved, SCENES[0].image))


def test_an_error_inside_a_training_frees_the_network():
    net = nn.Linear(3, 3)
    with pytest.raises(KeyError), arithmetic(net, "bf16", "a step", "batch"):
        make_accelerator("bf16", "cpu").prepare(net)
        raise KeyError("inside")
    assert net(torch.ones(1, 3)).dtype == torch.float32 and "forward" not in net.__dict__


def test_tf32_is_on_while_it_is_asked_for_and_off_for_fp32():
    seen = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    before, net = seen(), nn.Linear(3, 3)
    with arithmetic(net, "fp32", "a step", "batch"): assert seen() == (False, False)
    with arithmetic(net, "tf32", "a step", "batch"): assert seen() == (True, True)
    assert seen() == before


# ---------------------------------------------------------------- the same bits every time

def in_one_order(): return torch.are_deterministic_algorithms_enabled()


@every_training
def test_operations_add_in_one_order_while_a_training_that_asks_for_it_learns_and_not_after(fresh, learn, answer):
    "On a CPU the same network comes out: there sums have their order anyway"
    plain, asked, seen = fresh(), fresh(), set()
    learn(plain)
    def look(net, views):
        if net.training: seen.add(in_one_order())
    hook = asked.register_forward_pre_hook(look)
    with repeatable():
        learn(asked)
        assert not in_one_order()
    hook.remove()
    assert seen == {True} and model_fingerprint(asked) == model_fingerprint(plain)


def test_an_error_inside_puts_back_what_was_asked_of_pytorch():
    fill, before = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    for error in (KeyError, RuntimeError):
        with pytest.raises(error), repeatable(), arithmetic(nn.Linear(3, 3), "fp32", "a step", "batch"):
            assert in_one_order() and not fill.fill_uninitialized_memory
            raise error("inside")
        assert not in_one_order() and fill.fill_uninitialized_memory == before
    with arithmetic(nn.Linear(3, 3), "fp32", "a step", "batch"): assert not in_one_order()


def test_an_operation_that_has_no_order_is_one_line():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="^put_ has no form in PyTorch .* that adds in the same order every time: train without --deterministic .*--device cpu$"), repeatable():
        with arithmetic(nn.Linear(3, 3), "fp32", "a step", "batch"): x.put_(torch.tensor([0]), torch.ones(1))


@every_training
def test_a_run_that_was_not_asked_for_one_order_is_not_continued_with_it(fresh, learn, answer, tmp_path):
    learn(fresh(), out=tmp_path)
    with pytest.raises(ValueError, match="deterministic"), repeatable(): learn(fresh(), out=tmp_path)


COMMANDS = {"adcam.networks.train_network": ["train", "--out", "out", "--n", "2"],
            "adcam.irnet.train_irnet": ["irnet", "train", "labels", "out", "--n", "2"],
            "adcam.segment.train_segmentation": ["segment", "train", "--out", "out", "--n", "2"],
            "adcam.run.run": ["run", "--out", "out", "--limit", "2"]}


@pytest.mark.parametrize("function, words", COMMANDS.items(), ids=[" ".join(w[:2]) for w in COMMANDS.values()])
@pytest.mark.parametrize("wish", [[], ["--deterministic"]], ids=["plain", "deterministic"])
def test_commands_that_train_hand_the_wish_on(function, words, wish, tmp_path, monkeypatch, capsys):
    for name in Scenes("train", 2).ids: save_mask(tmp_path / "labels" / f"{name}.png", np.zeros((192, 192), np.uint8))
    seen = []
    def learn(*args, **options):
        seen.append("deterministic" in origin(nn.Linear(1, 1), torch.device("cpu"), "fp32"))
        raise ValueError("enough")
    monkeypatch.setattr(function, learn)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"): main(words + wish)
    assert "enough" in capsys.readouterr().err and seen == [bool(wish)]


# ---------------------------------------------------------------- a network stays where it has learned

class Elsewhere(nn.Module):
    "A network on a device that is not the CPU: its weights are on `meta`, and it refuses pictures that are elsewhere"
    num_classes, stride = 10, 8

    def __init__(self, num_classes=10, checkpoint=None):
        super().__init__()
        self.inner = conformer_mini(10).eval()
        self.__dict__["kept"] = self.inner
        self.inner = nn.Linear(1, 1, device="meta")

    def maps(self, x, **kw):
        assert x.device.type == "meta", f"the picture is on {x.device}, the weights are on meta"
        with torch.no_grad(): return self.kept.maps(torch.zeros(x.shape), **kw)


def test_attention_quality_goes_where_the_network_is():
    assert len(attention_quality(Elsewhere(), SCENES)) > 2


def test_seeds_of_a_comparison_go_where_the_network_is():
    entries = [Entry("CAM", "conformer_mini", "cam"), Entry("AD-CAM", "conformer_mini", "ad_cam", dict(k=5))]
    assert len(seed_arrays(Elsewhere(), dict(train=SCENES), entries)["maps_train_1"])


def test_counting_goes_where_the_network_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ADCAM_CACHE", str(tmp_path))
    (tmp_path / "weights").write_bytes(b"none")
    counted = count([tmp_path / "weights"], SCENES, [Point("ad_cam", 5, 1, "push")], build=Elsewhere, progress=False)
    assert np.asarray(counted.value["hist"]).sum()


# ---------------------------------------------------------------- bad devices, full memory, dead workers

@pytest.mark.parametrize("words, message", [(["--device", "cuda"], "PyTorch sees no GPU here"), (["--device", "gpu"], "unknown device 'gpu'"),
                                            (["--precision", "fp16"], "fp16 needs a GPU"), (["--precision", "half"], "fp32, tf32, bf16, fp16")])
@pytest.mark.parametrize("command", [["seeds"], ["train", "--epochs", "1"], ["run", "--limit", "2"]], ids=lambda c: c[0])
def test_a_device_or_precision_that_is_not_there_is_one_line_and_exit_code_2(command, words, message, tmp_path, capsys):
    if torch.cuda.is_available(): pytest.skip("for machines without a GPU")
    with pytest.raises(SystemExit) as end: main([command[0], "--out", str(tmp_path / "out"), *command[1:], *words])
    told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(told) == 1 and message in told[0]


EVERYWHERE = [["train-heads", "--out", "o"], ["train-cam", "--out", "o"], ["train-recam", "--out", "o"], ["train-seam", "--out", "o"], ["train-oaa", "--out", "o"],
              ["segment", "train", "--out", "o"], ["irnet", "masks", "s", "o"], ["crf", "i", "m", "o"], ["explain", "i", "--out", "o"]]


@pytest.mark.parametrize("command", EVERYWHERE, ids=lambda c: "-".join(c[:2]))
def test_walks_crfs_pictures_and_trainings_look_for_the_device_too(command, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available(): pytest.skip("for machines without a GPU")
    monkeypatch.chdir(tmp_path)
    data = [] if command[0] in ("irnet", "crf", "explain") else ["--n", "2"]
    with pytest.raises(SystemExit, match="2"): main([*command, *data, "--device", "cuda"])
    assert capsys.readouterr().err.splitlines()[-1] == "adcam: device cuda: PyTorch sees no GPU here; use auto or cpu"


def full(*args, **kw): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@every_training
def test_full_memory_says_what_to_lower(fresh, learn, answer, monkeypatch):
    net = fresh()
    monkeypatch.setattr(type(net), "forward", full)
    with pytest.raises(ValueError, match=r"out of memory with a step of \d views of \d+x\d+; lower batch or crop"): learn(net)


class Deadly:
    "A data set whose second image kills the process that reads it"
    def __init__(self): self.ids, self.classes = SCENES.ids, SCENES.classes
    def __len__(self): return len(SCENES)
    def fingerprint(self): return "deadly"
    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None: os.kill(os.getpid(), signal.SIGKILL)
        return SCENES[i]


def test_a_killed_loader_process_is_one_line():
    with pytest.raises(WorkerDied, match="a worker process was killed"):
        train(conformer(), Deadly(), replace(CLASSIFIER, workers=1), progress=False)
