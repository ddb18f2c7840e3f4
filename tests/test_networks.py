"""One name for every network: what a name says, one file, one branch at a time."""
import pytest
import torch
from adcam.networks import build_network, network_name, open_network, save_network, train_branch, train_network
from adcam.classifier import TrainConfig
from adcam.scenes import Scenes

PAIR = "test_resnet+test_vit"
QUICK = TrainConfig(epochs=1, batch=2, crop=64, resize=None)


@pytest.fixture
def pair():
    return build_network(PAIR, 10, seed=0)


@pytest.mark.parametrize("name,kind", [("mini", "conformer"), ("conformer_small", "conformer"), ("resnet50", "cnn"), ("resnet_mini", "cnn"), (PAIR, "pair")])
def test_a_name_says_what_kind_of_network_it_is(name, kind):
    assert network_name(name).kind == kind


@pytest.mark.parametrize("name", ["+test_vit", "test_resnet+", "a+b+c"])
def test_half_a_pair_is_refused(name):
    with pytest.raises(ValueError, match=r"CNN\+VIT"):
        network_name(name)


def test_weights_of_a_vit_need_a_pair(tmp_path):
    with pytest.raises(ValueError, match="belongs to a pair"):
        build_network("mini", 10, vit_weights=tmp_path / "vit.safetensors")


def test_a_file_opens_without_being_told_what_it_is(pair, tmp_path):
    again = open_network(save_network(pair, tmp_path / "pair.safetensors", PAIR))
    assert all(torch.equal(a, b) for a, b in zip(pair.state_dict().values(), again.state_dict().values()))


def test_a_trained_cnn_is_refused_beside_another_vit(pair, tmp_path):
    import timm
    from safetensors.torch import save_file
    file = save_network(pair, tmp_path / "cnn.safetensors", PAIR, "cnn")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="belongs to the vit weights"):
        open_network(file, vit_weights=tmp_path / "vit.safetensors")


def test_a_file_of_another_pair_is_refused(pair, tmp_path):
    file = save_network(pair, tmp_path / "pair.safetensors", PAIR)
    with pytest.raises(ValueError, match="holds test_resnet"):
        build_network("resnet10t+test_vit", 10, weights=file)


def test_a_file_of_another_number_of_classes_is_refused(pair, tmp_path):
    file = save_network(pair, tmp_path / "pair.safetensors", PAIR)
    with pytest.raises(ValueError, match="with 4 classes"):
        build_network(PAIR, 4, weights=file)


@pytest.mark.parametrize("branch,learned", [("cnn", {"cnn", "conv_cls_head"}), ("vit", {"vit", "trans_cls_head"})])
def test_only_the_named_branch_learns(pair, branch, learned):
    before = {n: v.clone() for n, v in pair.state_dict().items()}
    train_branch(pair, Scenes("train", 2), QUICK, branch, progress=False, device="cpu")
    assert {n.split(".")[0] for n, v in pair.state_dict().items() if not torch.equal(v, before[n])} == learned


def test_a_pair_trains_its_cnn_alone_unless_told_otherwise(pair):
    before = pair.vit.state_dict()["blocks.0.attn.qkv.weight"].clone()
    train_network(pair, Scenes("train", 2), QUICK, progress=False, device="cpu")
    assert torch.equal(pair.vit.state_dict()["blocks.0.attn.qkv.weight"], before)
    assert all(p.requires_grad for p in pair.vit.parameters()), "training leaves the flags as they were"
