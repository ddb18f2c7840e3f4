"""The command `adcam`: help, the way from pixels to a score, and errors in words with exit code 2."""
import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbformat import v4
from PIL import Image

from adcam.cli import _parameters, main

COMMANDS = "version scenes profile seeds evaluate train checkpoints paper bench".split()


@pytest.fixture
def run(capsys):
    "Words of a command line -> exit code, what it printed, what it complained about."
    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(w) for w in words])
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err
    return call


def voc_folder(root, n=2, size=64):
    "A folder in VOC layout with one bright square of class 1 per image, labels from the masks."
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        image, mask = rng.integers(0, 60, (size, size, 3), dtype=np.uint8), np.zeros((size, size), np.uint8)
        image[8:40, 16:48], mask[8:40, 16:48] = 220, 1
        Image.fromarray(image).save(root / f"JPEGImages/im{i}.jpg")
        Image.fromarray(mask).save(root / f"SegmentationClass/im{i}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"im{i}\n" for i in range(n)))
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("voc") / "data")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from adcam.classifier import save_weights
    from adcam.conformer import conformer_mini
    torch.manual_seed(0)
    return save_weights(conformer_mini(20), tmp_path_factory.mktemp("w") / "mini.safetensors")


@pytest.fixture
def seeds(photos, weights, tmp_path):
    "Words of a small `adcam seeds`."
    return ["seeds", "--data", photos, "--weights", weights, "--out", tmp_path / "seeds", "-k", 4, "--scales", 1, "--no-flip"]


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and f"Usage: adcam {name}" in out
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert options


def test_help_does_not_import_torch():
    code = "import sys; from adcam.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "adcam.cli", "profile", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("adcam: no profile 'nothing'") and "Traceback" not in done.stderr


def test_profile_json(run):
    code, out, _ = run("profile", "voc", "--json")
    assert code == 0 and json.loads(out)["epochs"] == 5


def test_scenes_can_be_read_back(run, tmp_path):
    from adcam.data import VOCFolder
    from adcam.scenes import Scenes
    assert run("scenes", tmp_path / "s", "--splits", "val", "--n", 2, "--size", 64)[0] == 0
    there, here = VOCFolder(tmp_path / "s", "val"), Scenes("val", 2, 64)
    assert there.classes == here.classes and there.ids == here.ids
    for a, b in zip(there, here):
        assert (a.label == b.label).all() and (a.mask == b.mask).all()


def test_from_pixels_to_a_score(run, seeds, photos, tmp_path):
    code, out, _ = run(*seeds)
    assert code == 0 and "2 seeds computed, 0 were there" in out
    assert "0 seeds computed, 2 were there" in run(*seeds)[1]
    code, out, _ = run("evaluate", tmp_path / "seeds", "--data", photos, "--fixed", 0.155, "--out", tmp_path / "r")
    assert code == 0 and "oracle" in out
    rows = json.loads((tmp_path / "r/seeds.json").read_text())["rows"]
    assert [r["rule"] for r in rows] == ["oracle", "fixed"] and rows[1]["t"] == 0.155
    assert rows[0]["miou"] >= rows[1]["miou"]


def test_several_scales_keep_all_tokens_of_small_views(run, seeds):
    words = [*seeds[:-5], "-k", 20, "--scales", "1,0.5", "--flip"]
    assert run(*words)[0] == 0


@pytest.mark.parametrize("wrong, said", [
    (["--method", "adcam"], "unknown method 'adcam'; choose one of"),
    (["--method", "ts_cam"], "has no option 'k'"),
    (["-k", 0], "k=0"),
    (["-k", 100_000], "100000"),
    (["--steps", -1], "-1"),
    (["--direction", "sideways"], "sideways"),
    (["--scales", "1;2"], "separated by commas"),
    (["--data", "no_such_folder"], "no data no_such_folder"),
    (["--split", "trian"], "trian"),
    (["--weights", "none.safetensors"], "none.safetensors"),
    (["--network", "small"], "is a Conformer of size 'mini'"),
    (["--network", "huge"], "huge"),
    (["--processes", 0], "processes"),
])
def test_bad_input_is_said_in_words(run, seeds, wrong, said):
    code, _, err = run(*seeds, *wrong)
    assert code == 2 and said in err and "Traceback" not in err


def test_seeds_of_other_settings_are_not_mixed(run, seeds):
    assert run(*seeds)[0] == 0
    code, _, err = run(*seeds, "-k", 5)
    assert code == 2 and "other settings" in err
    assert run(*seeds, "-k", 5, "--force")[0] == 0


def test_missing_and_damaged_seeds_are_named(run, seeds, photos, tmp_path):
    run(*seeds)
    evaluate = ["evaluate", tmp_path / "seeds", "--data", photos]
    path = tmp_path / "seeds/im1.npz"
    path.write_bytes(path.read_bytes()[:200])
    code, _, err = run(*evaluate)
    assert code == 1 and "im1.npz" in err and "1 of 2 images were skipped" in err
    path.unlink()
    code, _, err = run(*evaluate)
    assert code == 2 and "lacks 1 of 2 seeds" in err


def test_results_folder_that_cannot_be_written(run, seeds, photos, tmp_path):
    run(*seeds)
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("evaluate", tmp_path / "seeds", "--data", photos, "--out", tmp_path / "file/sub")
    assert code == 2 and "file" in err and "Traceback" not in err


def test_train_writes_weights_and_continues(run, photos, weights, tmp_path):
    words = ["train", "--data", photos, "--start", weights, "--out", tmp_path / "run", "--batch", 2, "--crop", 64]
    assert run(*words, "--epochs", 1)[0] == 0
    assert (tmp_path / "run/weights.safetensors").is_file()
    code, _, err = run(*words, "--epochs", 1, "--seed", 1)
    assert code == 2 and "seed" in err


def test_quick_checkpoints_need_folders_of_their_own(run):
    code, _, err = run("checkpoints", "--quick")
    assert code == 2 and "--out" in err


# ---------------------------------------------------------------- photographs of one's own

NETWORKS = ["--cnn", "test_resnet", "--vit", "test_vit", "--random-weights", "--size", 96]


@pytest.fixture
def album(tmp_path):
    "Two photographs, one broken file and a text."
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "c.jpg").write_bytes(b"torn")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_explain_takes_a_folder_and_names_what_is_broken(run, album, tmp_path, monkeypatch):
    from adcam import photo
    built = photo._build.cache_info().misses
    code, out, err = run("explain", album, *NETWORKS, "--classes", "cat,lynx", "--out", tmp_path / "o", "--save-masks", tmp_path / "m", "--save-maps", tmp_path / "s", "--threshold", "auto")
    assert code == 1 and "1 of 3 images were skipped" in err and "c.jpg is no picture" in err
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["a.png", "b.png"] and "wrote 2 pictures" in out and "Otsu" in out
    assert photo._build.cache_info().misses - built <= 1, "the networks are built once"
    assert (tmp_path / "m/classes.txt").read_text() == "cat\nlynx\n" and Image.open(tmp_path / "m/b.png").mode == "P"
    from adcam.seeds import load_seed
    seed = load_seed(tmp_path / "s/a.npz")
    assert seed.keys.tolist() == [0, 1] and seed.high_res.shape == (2, 64, 80) and seed.cam.shape == (2, 16, 20)


def test_explain_one_photograph(run, album, tmp_path):
    code, out, _ = run("explain", album / "a.png", *NETWORKS, "--top", 3, "--out", tmp_path / "o.png")
    assert code == 0 and out.count("\nclass ") == 3 and (tmp_path / "o.png").is_file()
    assert run("explain", album / "c.jpg", *NETWORKS)[0] == 2
    code, _, err = run("explain", album / "a.png", album / "b.jpg", *NETWORKS, "--out", tmp_path / "o.png")
    assert code == 2 and "name a folder" in err
    (tmp_path / "none").mkdir()
    code, _, err = run("explain", tmp_path / "none", *NETWORKS)
    assert code == 2 and "no picture in" in err


def test_explain_knows_the_classes_of_a_trained_pair(run, photos, album, tmp_path):
    pair = ["--network", "test_resnet+test_vit"]
    assert run("train-heads", "--data", photos, *pair, "--out", tmp_path / "heads")[0] == 0
    words = ["explain", album / "a.png", "--weights", tmp_path / "heads/weights.safetensors", "--size", 96, "--out", tmp_path / "o.png"]
    code, out, _ = run(*words, "--classes", "bird,dog")
    assert code == 0 and "class 2 bird" in out and "class 11 dog" in out
    code, _, err = run(*words, "--classes", "tabby")
    assert code == 2 and "among the 20 of this network" in err


def test_explain_of_weights_that_do_not_say_what_they_are(run, album, weights, tmp_path):
    words = ["explain", album / "a.png", "--weights", weights, "--size", 96, "--out", tmp_path / "o.png"]
    code, _, err = run(*words)
    assert code == 2 and "--network and --class-names" in err
    names = ",".join(f"thing {i}" for i in range(20))
    code, out, _ = run(*words, "--network", "mini", "--class-names", names, "--classes", "thing 3")
    assert code == 0 and "class 3 thing 3" in out


# ---------------------------------------------------------------- papermill

@pytest.fixture
def notebook(tmp_path):
    "A figure notebook in miniature."
    sources = ["k: int = 2  # neighbors kept\nks: list[int] = [1]  # curve",
               "from adcam.pipeline import check_parameters\ncheck_parameters(globals())", "print(k, ks)"]
    nb = v4.new_notebook(cells=[v4.new_code_cell(s) for s in sources])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nb.cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path / "tiny.ipynb"
    nbformat.write(nb, path)
    return path


def test_parameters_from_file_and_words(notebook, tmp_path):
    (tmp_path / "p.yaml").write_text("k: 3\nks: [1, 2]\n")
    assert _parameters(notebook, tmp_path / "p.yaml", ["k=7"]) == dict(k=7, ks=[1, 2])


@pytest.mark.parametrize("pair, said", [("kk=1", "did you mean 'k'"), ("zebra=1", "It has k, ks"), ("k", "name=value")])
def test_misspelt_parameter_is_refused(notebook, pair, said):
    with pytest.raises(ValueError, match=said):
        _parameters(notebook, None, [pair])


def test_notebook_without_parameters_cell_is_refused(notebook):
    nb = nbformat.read(notebook, 4)
    nb.cells[0].metadata.pop("tags")
    nbformat.write(nb, notebook)
    with pytest.raises(ValueError, match="no cell tagged"):
        _parameters(notebook, None, ["k=1"])


def test_plain_papermill_refuses_a_misspelt_parameter_too(notebook, tmp_path):
    import papermill
    papermill.execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), dict(k=5), kernel_name="python3", progress_bar=False)
    assert "5 [1]" in nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'k'"):
        papermill.execute_notebook(str(notebook), str(tmp_path / "out.ipynb"), dict(kk=5), kernel_name="python3", progress_bar=False)


def test_paper_command(run, notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("adcam.cli._paper_notebook", lambda name: notebook)
    code, out, _ = run("paper", "tiny", "-p", "k=9", "-p", "ks=[4]", "--out", tmp_path / "out")
    assert code == 0 and "executed notebook" in out
    assert "9 [4]" in (tmp_path / "out/tiny.ipynb").read_text()
    assert "k: int = 2  neighbors kept" in run("paper", "tiny", "--list")[1]
    code, _, err = run("paper", "tiny", "-p", "k=nine", "--out", tmp_path / "out")
    assert code == 1 and "stopped with ValueError" in err


def test_unknown_figure(run):
    code, _, err = run("paper", "fig44")
    assert code == 2 and "no notebook 'fig44'" in err
