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


@pytest.mark.parametrize("branch, of", [("all", {"cnn", "vit"}), ("cnn", {"cnn"})])
def test_a_trained_file_is_what_the_weights_came_from(pair, tmp_path, branch, of):
    file = save_network(pair, tmp_path / "trained.safetensors", PAIR, branch)
    again = open_network(file)
    assert again.trained.keys() == of and again.trained["cnn"]["source"] == "trained.safetensors"
    assert again.weights == pair.weights, "what they started from is not forgotten"


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


# ---- one name on the command line

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Two photographs each of two lists, and pre-trained files of a tiny pair"
    import timm
    from adcam.scenes import write_voc
    from safetensors.torch import save_file
    top = tmp_path_factory.mktemp("pair")
    write_voc(top / "photos", splits=("train", "val"), n=2, size=96)
    torch.manual_seed(5)
    for name, model in (("cnn", "test_resnet"), ("vit", "test_vit")): save_file(timm.create_model(model).state_dict(), top / f"{name}.safetensors")
    return top


def adcam(*words):
    "Exit code of a command line"
    from adcam.cli import main
    with pytest.raises(SystemExit) as stop: main([str(w) for w in words])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def named(files):
    "Words that name the pair"
    return ["--network", PAIR, "--cnn-weights", files / "cnn.safetensors", "--vit-weights", files / "vit.safetensors"]


@pytest.fixture(scope="module")
def trained(files, named):
    "A pair trained by the command, and its seeds"
    assert adcam("train", "--data", files / "photos", *named, "--out", files / "train", "--batch", 2, "--crop", 64, "--epochs", 1) == 0
    weights = files / "train/weights.safetensors"
    assert adcam("seeds", "--data", files / "photos", "--weights", weights, "--out", files / "seeds", "-k", 4, "--scales", 1, "--no-flip") == 0
    return weights


def test_a_trained_pair_is_one_file_that_says_what_it_is(trained):
    from adcam.networks import network_settings
    assert network_settings(trained)["network"] == PAIR and network_settings(trained)["branch"] == "all"


def test_the_vit_of_the_command_is_the_pretrained_one(files, trained):
    from adcam.networks import read_weights
    before, after = read_weights(files / "vit.safetensors"), read_weights(trained)
    assert torch.equal(after["vit.blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_seeds_of_a_pair_are_scored_like_any(files, trained, capsys):
    assert adcam("evaluate", files / "seeds", "--data", files / "photos") == 0
    assert "2 images" in capsys.readouterr().out


def test_an_id_without_a_photograph_is_left_out_and_named(files, trained, tmp_path, capsys):
    import shutil
    shutil.copytree(files / "photos", tmp_path / "photos")
    with (tmp_path / "photos/ImageSets/Segmentation/train.txt").open("a") as f: f.write("ghost\n")
    assert adcam("seeds", "--data", tmp_path / "photos", "--weights", trained, "--out", tmp_path / "seeds", "-k", 4, "--scales", 1, "--no-flip") == 1
    assert "ghost: image ghost has no label: it is not in ImageSets/labels.csv" in capsys.readouterr().err
    assert len(list((tmp_path / "seeds").glob("*.npz"))) == 2


@pytest.mark.parametrize("how", ["gray", "turned"])
def test_gray_and_turned_photographs_have_seeds(files, trained, tmp_path, how):
    "Gray becomes three equal channels; a VOC folder is read as it is stored, as its masks are, whatever the EXIF tag says"
    import shutil
    from adcam.seeds import load_seed
    from PIL import Image
    shutil.copytree(files / "photos", tmp_path / "photos")
    path, exif = sorted((tmp_path / "photos/JPEGImages").glob("train_*.jpg"))[0], Image.Exif()
    photo = Image.open(path).crop((0, 0, 96, 64))
    exif[274] = 6
    photo.convert("L").save(path) if how == "gray" else photo.save(path, exif=exif)
    assert adcam("seeds", "--data", tmp_path / "photos", "--weights", trained, "--out", tmp_path / "seeds", "-k", 4, "--scales", 1, "--no-flip") == 0
    assert load_seed(tmp_path / f"seeds/{path.stem}.npz").high_res.shape[1:] == (64, 96)


def test_a_pair_learns_its_heads(files, named):
    assert adcam("train-heads", "--data", files / "photos", *named, "--out", files / "heads") == 0
    assert open_network(files / "heads/weights.safetensors").num_classes == 10


def test_a_file_of_another_network_is_refused_by_the_command(files, trained, capsys):
    assert adcam("seeds", "--data", files / "photos", "--network", "resnet10t+test_vit", "--weights", trained, "--out", files / "other") == 2
    assert "holds test_resnet+test_vit" in capsys.readouterr().err


def test_start_belongs_to_a_conformer(files, named, trained, capsys):
    assert adcam("train", "--data", files / "photos", *named, "--start", trained, "--out", files / "start") == 2
    assert "--cnn-weights and --vit-weights" in capsys.readouterr().err


def test_boundaries_stand_on_the_cnn_of_the_pair(files, named, trained):
    data, pair = ["--data", files / "photos"], named
    assert adcam("irnet", "labels", files / "seeds", files / "labels", *data, "--processes", 1) == 0
    assert adcam("irnet", "train", files / "labels", files / "irnet", *data, *pair, "--epochs", 1, "--batch", 2, "--crop", 64, "--radius", 3) == 0
    assert adcam("irnet", "masks", files / "seeds", files / "masks", *data, *pair, "--weights", files / "irnet/irnet.safetensors", "--processes", 1) == 0
    assert len(list((files / "masks").glob("*.png"))) == 2


def test_weights_of_a_backbone_need_its_name(files, trained, capsys):
    (files / "some").mkdir(exist_ok=True)
    assert adcam("irnet", "train", files / "some", files / "x", "--data", files / "photos", "--cnn-weights", files / "cnn.safetensors") == 2
    assert "--network" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("irnet", "train", "a", "b"), ("irnet", "masks", "a", "b"), ("segment", "train", "--out", "a"),
                                   ("segment", "predict", "--out", "a", "--weights", "b")])
def test_weights_of_a_vit_need_a_pair_on_the_command_line(files, capsys, words):
    assert adcam(*words, "--network", "test_resnet", "--vit-weights", files / "vit.safetensors") == 2
    assert "--vit-weights belongs to a pair" in capsys.readouterr().err
    assert adcam(*words, "--network", PAIR, "--vit-weights", files / "none.safetensors") == 2
    assert "no weights" in capsys.readouterr().err


def test_segmentation_stands_on_the_cnn_of_the_pair(files, named):
    data, pair = ["--data", files / "photos"], named
    assert adcam("segment", "train", *data, *pair, "--out", files / "seg", "--iterations", 1, "--batch", 2, "--set", "crop=65",
                 "--set", "accumulate=1") == 0
    assert adcam("segment", "predict", *data, *pair, "--weights", files / "seg/weights.safetensors", "--out", files / "pred", "--no-crf", "--processes", 1) == 0
    assert len(list((files / "pred").glob("*.png"))) == 2


def test_a_whole_run_of_a_pair(files, named):
    from adcam.pipeline import load_result
    changes = dict(num_classes=10, train_split="train", seed_split="train", test_split="val", k=4, epochs=1, batch=2, crop=64, irn_crop=64,
                   irn_radius=3, irn_epochs=1, irn_batch=2, seg_iterations=1, seg_batch=2, seg_crop=65)
    assert adcam("run", "--profile", "voc_public", "--data", files / "photos", *named, "--out", files / "run",
                 "--segment", *(w for n, v in changes.items() for w in ("--set", f"{n}={v}"))) == 0
    body = load_result("run", files / "run")
    assert [r["stage"] for r in body["rows"] if r["stage"] in ("classifier", "IRNet", "predictions")] == ["classifier", "IRNet", "predictions"]
    assert body["provenance"]["settings"]["network"] == PAIR and {"cnn.safetensors", "vit.safetensors"} <= body["provenance"]["checkpoints"].keys()
