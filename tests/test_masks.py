"adcam.masks, adcam.cost and adcam.learned: a folder of photographs to masks, what it costs, and whether the classifier knows anything"
import csv
import json
import shlex
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import adcam.learned
import adcam.run
from adcam.baselines.psa import AffinityConfig
from adcam.branches import VOC_IMAGENET
from adcam.cli import main
from adcam.cost import Cost, Estimate, Work, approve, duration, law, predicted
from adcam.data import folder
from adcam.classifier import Features, HeadsConfig
from adcam.learned import choose_penalty, held_out, judge, warning
from adcam.masks import MUCH, BothHeads, Grouped, Photographs, class_groups, enlarge_mask, known_group, labels_by_folder, make_masks, masks_profile, open_photographs, unread
from adcam.networks import build_network, save_network
from adcam.run import LOOKS, override, segmentation_stage
from adcam.pipeline import profiles
from adcam.scenes import Scenes

TINY = dict(network="mini", size=64, progress=False)


def cli(capsys, *words):
    with pytest.raises(SystemExit) as ended: main([str(w) for w in words])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Six scenes of different size as photographs with a table, one of them cut short"
    root, scenes = tmp_path_factory.mktemp("my photographs é"), Scenes("val", n=6)
    rows = [("id", "labels")]
    for i, size in enumerate([(96, 128), (128, 96), (300, 200), (96, 96), (96, 96), (64, 80)]):
        Image.fromarray(scenes[i].image).resize(size[::-1]).save(root / f"p{i}.jpg")
        rows.append((f"p{i}.jpg", ";".join(np.array(scenes.classes)[scenes[i].label > 0])))
    (root / "p4.jpg").write_bytes((root / "p4.jpg").read_bytes()[:500])
    with open(root / "labels.csv", "w", newline="") as f: csv.writer(f).writerows(rows)
    return root


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "masks of mine"
    return out, make_masks(photos, out, **TINY)


# ---- what is in the photographs

def test_groups_of_imagenet_classes():
    assert class_groups("bus=minibus,school bus;cat") == dict(bus=(654, 779), cat=VOC_IMAGENET["cat"])
    assert class_groups("bus=n03769881,779") == dict(bus=(654, 779))
    assert class_groups("bus,cat;dog") == {c: VOC_IMAGENET[c] for c in ("bus", "cat", "dog")}


@pytest.mark.parametrize("text, says",
                         [("", "--classes is empty"), ("bus=minibuss", "nearest: minibus"), ("=minibus", "is no group"),
                          ("person", "ImageNet has no class for VOC"),
                                        ("cat;cat=lynx", "twice"), ("bus=", "is no group"), ("qwertz", "no class 'qwertz'")])
def test_groups_that_cannot_be_read(text, says):
    with pytest.raises(ValueError, match=says): class_groups(text)


def test_sub_folders_are_classes(tmp_path):
    for name in ("bus/a.jpg", "bus/deep/b.jpg", "school bus/a.jpg", "c.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "in" / name)
    classes = labels_by_folder(tmp_path / "in", tmp_path / "labels.csv")
    ds = folder(tmp_path / "in", tmp_path / "labels.csv", classes=classes)
    assert {i: [c for c, y in zip(ds.classes, ds.label(n)) if y] for n,
            i in enumerate(ds.ids)} == {"bus__a": ["bus"], "bus__deep__b": ["bus"], "school bus__a": ["school bus"], "c": []}


def test_a_table_elsewhere_goes_all_the_way_to_corrected_masks(photos, tmp_path, capsys):
    root = shutil.copytree(photos, tmp_path / "Bilder ä", ignore=shutil.ignore_patterns("*.csv", "p4.jpg"))
    table, out = tmp_path / "semi.csv", tmp_path / "my run"
    table.write_text((photos / "labels.csv").read_text().replace(";", "|").replace(",", ";").replace("p4.jpg", "nobody.jpg"))
    code, told, err = cli(capsys, "masks", root, "--labels", table, "--network", "mini", "--size", 64, "--out", out)
    assert code == 1 and "nobody.jpg" in err and "wrote 5 masks" in told
    lines = [shlex.split(line.split(":", 1)[1]) for line in told.splitlines() if line.startswith(("look at", "to correct"))]
    assert [line[1] for line in lines] == ["show", "export"]
    for line in lines: assert cli(capsys, *line[1:])[0] == 0
    assert cli(capsys, "import", out / "labelme", "--from", "labelme", "--out", tmp_path / "corrected")[0] == 0
    assert len(list((tmp_path / "corrected/SegmentationClass").glob("*.png"))) == 5


def test_a_photograph_without_a_line_is_named_and_left_out(photos, tmp_path, capsys):
    rows = [line for line in (photos / "labels.csv").read_text().splitlines() if "p4" not in line and "p0" not in line]
    (tmp_path / "some.csv").write_text("\n".join(rows))
    code, told, err = cli(capsys, "masks", photos, "--labels", tmp_path / "some.csv", "--network", "mini", "--size", 64, "--out", tmp_path / "out")
    assert code == 1 and "image p0 has no line in" in err and "wrote 4 masks" in told


def test_formats_that_are_not_read_are_named(photos, tmp_path, capsys):
    root = shutil.copytree(photos, tmp_path / "in")
    (root / "IMG_1.HEIC").write_bytes(b"x")
    assert unread(photos) == ""
    _, told, _ = cli(capsys, "masks", root, "--network", "mini", "--size", 64, "--out", tmp_path / "out", "--estimate")
    assert "1 file is not read, first IMG_1.HEIC" in told


def test_words_that_are_always_together_are_asked_about(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc": Image.new("RGB", (32, 32)).save(tmp_path / f"in/{name}.jpg")
    table = tmp_path / "table.csv"
    table.write_text("id,labels\na,School Bus\nb,School Bus\nc,dog\n")
    with pytest.raises(ValueError, match="'School Bus' one class or 2.*always together"): folder(tmp_path / "in", table)
    (tmp_path / "classes.txt").write_text("dog\nSchool Bus\n")
    assert folder(tmp_path / "in", table).label(0).tolist() == [0, 1], "classes.txt beside the table"
    (tmp_path / "classes.txt").unlink()
    table.write_text("id,labels\na,cat dog\nb,cat dog\nc,dog\n")
    assert folder(tmp_path / "in", table).classes == ("cat", "dog")


def test_photographs_without_any_label_are_refused_with_the_three_ways(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "in/a.jpg")
    code, _, err = cli(capsys, "masks", tmp_path / "in", "--network", "mini")
    assert code == 2 and all(way in err for way in ("labels.csv", "sub-folder per class", "--classes"))


# ---- ImageNet's head, or one that was trained

NAMES = dict(bus=(654, 779), dog=(151, 152), person=())


def both_heads(choice="auto"):
    return BothHeads(build_network("test_resnet+test_vit", None, seed=0), NAMES, choice).eval()


def features_of(net, n=12, knows=0.):
    "Features, labels, and held-out logits that know the labels as well as is said"
    y, g = torch.eye(3).repeat(n // 3, 1), torch.Generator().manual_seed(0)
    return Features(torch.randn(n, net.pair.cnn.num_features, generator=g), torch.zeros(n, 1), y), (torch.randn(n, 3, generator=g) + knows * y).numpy()


@pytest.mark.parametrize("choice, knows, learns",
                         [("auto", 99., [1, 1, 1]), ("imagenet", 99., [0, 0, 1]), ("trained", -99., [1, 1, 1]), ("auto", -99., [0, 0, 1])])
def test_the_head_that_knows_more_makes_the_maps_and_a_class_that_imagenet_has_not_is_learned(choice, knows, learns):
    net = both_heads(choice)
    z, words = net.settle(*features_of(net, knows=knows))
    assert net.learns.tolist() == [bool(v) for v in learns] and ("trained heads for" in words) and ("ImageNet's head for bus, dog" in words) == (learns[0] == 0)
    assert z.shape == (12, 3)


def test_a_word_that_is_spelt_alike_goes_to_the_trained_head():
    net = both_heads()
    f, held_out = features_of(net)
    with torch.no_grad(): theirs = net._logits(net.pair.conv_cls_head(f.conv)).numpy()
    # knows buses, and is wrong about dogs
    net._logits = lambda z: torch.from_numpy(np.stack([99 * f.labels[:, 0].numpy(), -99 * f.labels[:, 1].numpy(), theirs[:, 2]], 1))
    held_out[:, 0], held_out[:, 1] = -f.labels[:, 0].numpy(), f.labels[:, 1].numpy() * .1 - f.labels[:, 0].numpy() * .05
    held_out[1, 1] = -1.                                                                             # not perfect, but much better than ImageNet's
    net.settle(f, held_out)
    assert net.learns.tolist() == [False, True, True] and MUCH == .1


def test_maps_come_from_the_head_that_was_chosen():
    net, x = both_heads(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, theirs = net.maps(x), Grouped(net.pair, NAMES).maps(x)
        conv = net.features(x)[0]
        own = torch.einsum("kc,bchw->bkhw", net.conv_cls_head.weight, conv)
        assert torch.equal(maps.cam[:, :2], theirs.cam[:, :2]) and maps.cam[:, 2].mean() == pytest.approx(own[:, 2].mean().item(), abs=.05)
        net.learns.fill_(True)
        assert not torch.equal(net.maps(x).cam[:, :2], theirs.cam[:, :2])


def test_the_trained_head_is_kept_as_the_head_of_the_pair(tmp_path):
    net = both_heads()
    path = save_network(net.trained(), tmp_path / "w.safetensors", "test_resnet+test_vit", "cnn")
    again = build_network("test_resnet+test_vit", 3, weights=path)
    assert torch.equal(again.conv_cls_head.weight, net.conv_cls_head.weight) and net.pair.num_classes == 1000 and len(net.pair.conv_cls_head.weight) == 1000


def test_no_label_is_lost_with_heads_auto(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    for i, color in enumerate(("red", "blue", "green", "gray")): Image.new("RGB", (64, 48), color).save(root / f"{i}.png")
    (root / "labels.csv").write_text("id,labels\n0.png,Hund;person\n1.png,bus\n2.png,Hund\n3.png,person\n")
    common = dict(network="test_resnet+test_vit", random_weights=True, size=64, change=["k=2"], crf=False, progress=False)
    done = make_masks(root, tmp_path / "a", heads="auto", classes="Hund=151", **common)
    note = next(r["note"] for r in done.run.rows if r["stage"] == "classifier")
    assert done.classes == ("Hund", "bus", "person") and not done.opened.ds.left_out and "trained heads for" in note and "person" in note and "penalty" in note
    assert (tmp_path / "a/classifier/weights.safetensors").is_file()
    again = make_masks(root, tmp_path / "a", heads="auto", classes="Hund=151", **common)
    assert [r["note"] for r in again.run.rows if r["stage"] == "seeds"] == ["0 computed, 4 were there"]
    done = make_masks(root, tmp_path / "b", classes="Hund=151", **common)
    assert done.opened.ds.left_out == ["bus", "person"] and not (tmp_path / "b/classifier").exists()


@pytest.mark.parametrize("options, says",
                         [(dict(heads="best"), "choose one of auto, trained, imagenet"),
                          (dict(heads="trained", classes="bus"), "no use for --classes"), (dict(heads="imagenet", network="mini"), "name a pair CNN")])
def test_heads_that_cannot_be(options, says, photos, tmp_path):
    with pytest.raises(ValueError, match=says): make_masks(photos, tmp_path / "out", **dict(network="test_resnet+test_vit", random_weights=True) | options)


@pytest.mark.parametrize("name, known", [("person", False), ("Hund", False), ("dog", True), ("school bus", True), ("airplane", True)])
def test_names_that_imagenet_has(name, known): assert bool(known_group(name)) == known


def test_the_penalty_is_the_largest_of_those_that_put_held_out_images_in_the_best_order(monkeypatch):
    y, seen = torch.eye(2).repeat(6, 1), []
    f = Features(torch.zeros(12, 4), torch.zeros(12, 1), y)
    logits = {1e-2: -y.numpy(), 1e-3: y.numpy(), 1e-4: y.numpy()}
    monkeypatch.setattr(adcam.learned, "held_out_logits", lambda model, f, c, seed: seen.append(c) or logits[c.weight_decay])
    config, z = choose_penalty(None, f, HeadsConfig(batch=3), tuple(logits), seed=5)
    assert (config, len(seen)) == (HeadsConfig(batch=3, weight_decay=1e-3), 3) and (z == y.numpy()).all()
    logits[HeadsConfig().weight_decay] = y.numpy()
    assert choose_penalty(None, f, HeadsConfig(solver="adamw"), seed=5)[0] == HeadsConfig(solver="adamw"), "AdamW's decay is no penalty"


# ---- photographs in a size that is bearable

def test_long_side_is_limited_and_masks_follow():
    scenes = Scenes("val", n=3)
    small = Photographs(scenes, 100, scenes.classes[2:4])
    assert small[1].image.shape == (100, 100, 3) and small[1].mask.shape == (100, 100) and small.size_of(1) == (100, 100)
    assert (small.label(1)[2:4] == scenes[1].label[2:4]).all() and small.label(1).sum() == scenes[1].label[2:4].sum() and set(np.unique(small.mask(1))) <= {0, 3, 4, 255}, "numbers stay those of the data set"
    assert Photographs(scenes, 500)[0].image.shape == scenes[0].image.shape, "nothing is enlarged"


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_enlarged_mask_has_its_labels_and_no_others(h, w, factor, seed):
    mask = np.random.default_rng(seed).choice([0, 3, 7, 255], (h, w)).astype(np.uint8)
    large = enlarge_mask(mask, (h * factor, w * factor))
    assert large.shape == (h * factor, w * factor) and large.dtype == np.uint8 and set(np.unique(large)) <= set(np.unique(mask))
    if factor % 2: assert (large[factor // 2::factor, factor // 2::factor] == mask).all(), "in the middle of each old pixel its label stays"


# ---- the whole way

def test_a_mask_for_each_photograph_in_its_own_size(photos, made):
    out, done = made
    for i in (0, 1, 2, 3, 5):
        mask, photo = (Image.open(p) for p in (out / f"masks/p{i}.png", photos / f"p{i}.jpg"))
        assert mask.size == photo.size and mask.mode == "P" and np.array(mask).max() <= len(done.classes)
    assert done.count == 5 and (out / "classes.txt").read_text().split() == list(done.classes)


def test_a_broken_photograph_is_named_and_left_out(made):
    assert [s.id for s in made[1].run.skipped] == ["p4"] and "p4.jpg" in made[1].run.skipped[0].reason


def test_the_classifier_is_judged_on_photographs_it_has_not_seen(made):
    note = next(r["note"] for r in made[1].run.rows if r["stage"] == "classifier")
    assert "mAP 0." in note and "5 images held out" in note and "chance 0." in note


def test_again_computes_nothing_and_keeps_what_was_corrected(photos, made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "copy")
    corrected = out / "masks/p0.png"
    Image.fromarray(np.ones((96, 128), np.uint8)).save(corrected)
    before = corrected.read_bytes()
    again = make_masks(photos, out, **TINY)
    notes = {r["stage"]: r["note"] for r in again.run.rows if "seconds" in r}
    assert all(notes[s] == "0 computed, 5 were there" for s in ("seeds", "pseudo masks", "CRF")) and corrected.read_bytes() == before
    with pytest.raises(ValueError, match="--force"): make_masks(photos, out, threshold=.7, **TINY)
    assert corrected.read_bytes() == before
    make_masks(photos, out, threshold=.7, force=True, **TINY)
    assert corrected.read_bytes() != before


def test_result_says_what_was_done(made):
    body = json.loads((made[0] / "run.json").read_text())
    told = body["provenance"]["settings"]
    assert (told["refine"], told["crf"], told["heads"], told["limit"]) == ("none", True, True, None) and told["data"].startswith("my photographs")


def test_out_inside_of_the_photographs_is_refused(photos):
    with pytest.raises(ValueError, match="lies in the folder of the photographs"): make_masks(photos, photos / "masks", **TINY)


def test_imagenets_own_head_finds_labels_and_is_not_trained(photos, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i in (0, 3): shutil.copy(photos / f"p{i}.jpg", root)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/labels.csv").write_text("id,labels\np0.jpg,cat\np3.jpg,bus;cat\n")     # as ImageNet's head would have left it, corrected
    done = make_masks(root, tmp_path / "out", classes="bus;cat", network="test_resnet+test_vit", random_weights=True, size=64, change=["k=2"], progress=False)
    assert done.classes == ("bus", "cat") and done.count == 2 and not (tmp_path / "out/classifier").exists()
    assert (tmp_path / "out/labels.csv").read_text().splitlines()[1:] == ["p0.jpg,cat", "p3.jpg,bus;cat"], "what a person has corrected stays"


def test_numbers_in_masks_are_those_of_the_labels_whatever_the_order_of_the_groups(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    Image.new("RGB", (64, 64), "red").save(root / "a.png")
    (root / "labels.csv").write_text("id,labels\na.png,dog;bus;person\n")
    done = make_masks(root, tmp_path / "out", classes="dog;bus", network="test_resnet+test_vit", random_weights=True, size=64, threshold=0.,
                      change=["k=2"], crf=False, progress=False)
    assert done.classes == ("bus", "dog", "person") and done.opened.ds.left_out == ["person"]
    assert set(np.unique(Image.open(done.folder / "a.png"))) <= {0, 1, 2} and (tmp_path / "out/classes.txt").read_text().split() == ["bus", "dog", "person"]


def test_nothing_seen_is_said(photos, tmp_path):
    with pytest.raises(ValueError, match="none of the 5 photographs seems to show cat"):
        make_masks(shutil.copytree(photos, tmp_path / "in", ignore=shutil.ignore_patterns("*.csv")), tmp_path / "out", classes="cat",
                   network="test_resnet+test_vit", random_weights=True, size=64, progress=False)


@pytest.mark.parametrize("refine, stages", [("irn", ["IR labels", "IRNet"]), ("psa", ["PSA scores", "AffinityNet"])])
def test_a_pair_walks_to_its_masks(tmp_path, capsys, monkeypatch, refine, stages):
    monkeypatch.setattr(adcam.run, "AffinityConfig", partial(AffinityConfig, crop=96, epochs=1))
    root = tmp_path / "in"
    root.mkdir()
    for i in range(2): Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)).save(root / f"{i}.png")
    (root / "labels.csv").write_text("id,labels\n0,dog\n1,bus\n")
    go = lambda: make_masks(root, tmp_path / "out", classes="dog;bus", network="test_resnet+test_vit", random_weights=True, size=64, refine=refine,
                            change=["k=2", "irn_crop=64", "irn_radius=5", "irn_epochs=1", "irn_batch=2"], progress=False)
    done, again = go(), go()
    assert f"{stages[1]} " in capsys.readouterr().out.split("estimate:")[1].split("\n")[0]
    assert done.count == 2 and [r["stage"] for r in done.run.rows if "seconds" in r][3:] == [*stages, "pseudo masks", "CRF"]
    assert [r["note"] for r in again.run.rows if r["stage"] in ("pseudo masks", "CRF")] == ["0 computed, 2 were there"] * 2
    assert [np.asarray(Image.open(done.folder / f"{i}.png")).shape for i in range(2)] == [(48, 64)] * 2


def test_blocks_of_the_vit_are_the_last_half():
    p = masks_profile("test_resnet+test_vit", 3)
    import timm
    assert p.layers == len(timm.create_model("test_vit").blocks) // 2 and p.direction == "pull" and p.segmentation == p.network


# ---- what it costs

def test_estimate_only_leaves_nothing_behind(photos, tmp_path, capsys):
    code, out, _ = cli(capsys, "masks", photos, "--out", tmp_path / "o", "--network", "mini", "--size", 64, "--estimate")
    assert "estimate: about" in out and not (tmp_path / "o/seeds").exists() and not (tmp_path / "o/masks").exists()
    assert code == 0


@pytest.mark.parametrize("command", ["masks", "run", "seeds"])
def test_too_little_memory_ends_with_two_unless_anyway(command, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adcam.run, "memory_left", lambda device="cpu": -10**12)
    words = dict(masks=["masks", photos, "--network", "mini", "--size", 64],
                 run=["run", "--limit", 1, "--set", "irn_crop=96", "--set", "irn_epochs=1"], seeds=["seeds", "--n", 1])[command]
    code, _, err = cli(capsys, *words, "--out", tmp_path / "o")
    assert code == 2 and "more than there is: lower --" in err and not (tmp_path / "o/seeds").exists() and not list(tmp_path.rglob("*.npz"))
    code, out, _ = cli(capsys, *words, "--out", tmp_path / "o", "--anyway")
    assert code in (0, 1) and list(tmp_path.rglob("*.npz"))


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-6))
@settings(max_examples=30, deadline=None)
def test_two_images_give_the_law(a, b):
    N = np.array([[300, 100], [1200, 400]])
    cost = lambda n: a * n.sum(1) + b * (n**2).sum(1)
    assert predicted(np.array([[3000, 50]]), law(N, cost(N))) == pytest.approx(cost(np.array([[3000, 50]])), rel=1e-3)


def test_durations_for_people():
    assert [duration(s) for s in (40, 720, 3 * 3600, 5 * 86400)] == ["40 s", "12 min", "3.0 h", "5.0 days"]


def test_hours_are_answered_by_what_to_lower():
    found = Estimate(Work(np.array([[100]]), [(96, 96)], []), [Cost("seeds", 7200., 0)], 0, 10, (1.,), False, "--size")
    assert "to make it shorter, lower --size" in approve(found) and "lower" not in approve(found._replace(costs=[Cost("seeds", 60., 0)]))


def test_a_limit_cuts_iterations_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(adcam.run, "train_segmentation", lambda net, ds, masks, config, **o: seen.append(config.iterations) or [dict(loss=1.)])
    p, ds = override(profiles["mini"], ["seg_batch=4"]), Scenes("val", n=8)
    for looks in (None, LOOKS): segmentation_stage(p, ds, tmp_path, progress=False, looks=looks)
    assert seen == [400, LOOKS * 8 // 4]


# ---- did it learn?

@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_knowledge_is_told_from_chance(seed):
    rng = np.random.default_rng(seed)
    y = np.eye(4)[rng.permutation(np.arange(40) % 4)]
    knows, shuffled = judge(y + rng.normal(0, .3, y.shape), y), judge(y[rng.permutation(40)], y, seed=1)
    assert not knows.at_chance and knows.map > .8 and shuffled.map < .5 and not warning(knows)


def test_where_nothing_can_be_told_it_is_said():
    found = judge(np.zeros((6, 2)), np.ones((6, 2)))
    assert found.at_chance and "cannot be measured" in str(found) and "Nobody can tell" in warning(found)
    perfect = judge(np.eye(3), np.eye(3))
    assert perfect.map == 1 and perfect.too_few and "too few images to tell" in str(perfect) and "Nobody can tell" in warning(perfect)


@given(st.integers(1, 60))
def test_a_fifth_is_held_out(n):
    learn, kept = held_out(range(n))
    assert sorted(learn + kept) == list(range(n)) and len(kept) == (n // 5 if n >= 10 else 0)


def test_trainings_say_what_was_learned(tmp_path, capsys):
    code, out, err = cli(capsys, "train", "--n", 10, "--epochs", 1, "--batch", 5, "--crop", 64, "--hold-out", "--out", tmp_path / "a")
    assert code == 0 and "2 images held out" in out
    code, out, _ = cli(capsys, "train-heads", "--n", 6, "--out", tmp_path / "b")
    assert code == 0 and "6 images held out" in out and "mAP" in out


def test_scores_without_masks_are_answered_in_words(photos, tmp_path, capsys):
    code, _, err = cli(capsys, "evaluate", tmp_path, "--data", photos)
    assert code == 2 and "has no masks" in err and "mAP" in err and "adcam show" in err


@pytest.mark.parametrize("threshold", [None, .3, .7])
def test_labels_of_a_walk_stand_on_both_sides_of_the_threshold(threshold):
    p = masks_profile("test_resnet+test_vit", 3, "irn", threshold)
    assert p.label_bg < p.walk_background < p.label_fg
    assert threshold in (None, p.walk_background)
