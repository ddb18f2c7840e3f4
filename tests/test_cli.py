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
from conftest import ROOT

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
    code, out, err = run("explain", album, *NETWORKS, "--classes", "cat,lynx", "--out", tmp_path / "o", "--save-masks", tmp_path / "m",
                         "--save-maps", tmp_path / "s", "--threshold", "auto")
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
    assert "cnn weights: weights.safetensors sha256" in out and "started from random" in out and "are random: the maps" not in out
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

def test_two_sets_of_parameters_have_two_folders(run, notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("adcam.cli._paper_notebook", lambda name: notebook)
    monkeypatch.delenv("ADCAM_RESULTS", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")                                 # not in the clone: results belong here
    for k in (8, 9):
        assert run("paper", "tiny", "-p", f"k={k}")[0] == 0
    found = sorted((tmp_path / "elsewhere/results/try").iterdir())
    assert len(found) == 2 and all(p.name.startswith("tiny-") for p in found)
    assert sorted("8 [1]" in (p / "tiny.ipynb").read_text() for p in found) == [False, True]


def test_a_folder_belongs_to_values_not_to_how_they_were_given(notebook, monkeypatch, tmp_path):
    from adcam.cli import _try_folder
    assert _try_folder(notebook, {}) == _try_folder(notebook, dict(k=2)) == _try_folder(notebook, dict(ks=[1], out_dir="x")) != _try_folder(notebook, dict(k=3))


def test_the_folder_of_a_config_is_for_the_config_as_it_stands(run, tmp_path, monkeypatch):
    went = []
    monkeypatch.setattr("adcam.cli._execute", lambda notebook, target, given: went.append((target.parent.as_posix(), given["out_dir"])))
    for words in ([], ["-p", "k=20"], ["-p", "k=20", "--out", tmp_path], ["-p", "out_dir=mine"]):
        assert run("paper", "fig4", "--full", *words)[0] == 0
    (a, b), (c, d), (e, f), (g, h) = went
    assert a == b == "results/mini" and c == d != a and "try/fig4-" in c and e == f == tmp_path.as_posix() and g == h == "mine"


def test_notebooks_are_listed_without_a_name(run):
    code, out, _ = run("paper", "--list")
    names = sorted(p.stem for p in (ROOT / "nbs/paper").glob("*.ipynb"))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == names
    help_text = run("paper", "--help")[1]
    assert all(n in help_text for n in names)
    code, _, err = run("paper")
    assert code == 2 and "fig4" in err and "--list" in err


def test_notebooks_of_a_wheel_are_found(run, tmp_path, monkeypatch):
    import shutil
    import sysconfig
    from adcam import cli
    share, package = tmp_path / "share/adcam", tmp_path / "site/adcam"
    (share / "configs").mkdir(parents=True), (share / "nbs/paper").mkdir(parents=True), package.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    code, _, err = run("paper", "fig4")
    assert code == 2 and "none are installed" in err and "clone" in err
    shutil.copy(ROOT / "nbs/paper/fig4.ipynb", share / "nbs/paper")
    shutil.copy(ROOT / "configs/fig4.yaml", share / "configs")
    notebook = cli._paper_notebook("fig4")
    assert notebook.parent == share / "nbs/paper"
    assert cli._config(notebook, None, True) == cli._config(notebook, cli.Path("configs/fig4.yaml"), False) == share / "configs/fig4.yaml"


def test_papermill_that_is_missing_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    code, _, err = run("paper", "fig4")
    assert code == 2 and err.count("\n") == 1 and "pip install 'adcam[dev]'" in err


def test_a_measured_time_is_known_for_the_same_parameters(tmp_path):
    from adcam.cli import _config, _measured, _paper_notebook, _parameters
    notebook = _paper_notebook("fig4")
    given = _parameters(notebook, _config(notebook, None, True), [])
    seconds, file = _measured(notebook, given, tmp_path)
    assert seconds > 60 and file.name == "fig4.json" and file.parent.name == "mini"
    assert _measured(notebook, given | dict(n_train=7), tmp_path) == (None, None)


def test_the_shell_completes_commands_and_notebooks():
    import os
    def complete(words, n):
        env = os.environ | dict(_ADCAM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(n))
        return subprocess.run([sys.executable, "-c", "from adcam.cli import main; main()"], capture_output=True, text=True, env=env, cwd=ROOT).stdout.split()
    assert complete("adcam expl", 1) == ["explain"] and complete("adcam paper fig", 2) == sorted(p.stem for p in (ROOT / "nbs/paper").glob("fig*.ipynb"))


def test_what_cannot_be_fetched_is_not_offered(run, tmp_path):
    assert "folder" not in run("data", "get", "--help")[1].replace("Folder of the data set", "")
    assert run("data", "get", "folder", tmp_path)[0] == run("data", "convert", "folder", tmp_path)[0] == 2
