"""Segmentation networks: the reference's numbers, converters against torchvision, losses against loops, every wrong file in words."""
import copy, json
from contextlib import nullcontext

import numpy as np, pytest, timm, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

from adcam.data import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from adcam.deeplab import (_named, _stage, CAFFE_MEAN, GEOMETRY, UPERNET, ASPP, DeepLabV2, MultiScale, caffe_tensor, check_labels, deeplabv2_mini, from_torchvision,
                           init_deeplab, load_deeplab, pixel_loss, poly_rate, scale_losses, segmentation_loss, shrink_labels, upernet, upernet_mini)

PICTURE = np.random.default_rng(0).integers(0, 256, (70, 97, 3), dtype=np.uint8)


def on_meta(f, *args, **options):
    "Names and shapes of a network, without its memory"
    with torch.device("meta"): return f(*args, **options)


@pytest.fixture(scope="module")
def rules(golden_rules): return golden_rules("irn/rules")


@pytest.fixture(scope="module")
def log(golden): return json.loads((golden/"irn/deeplab_log.json").read_text())


# ---- the reference

@pytest.fixture(scope="module")
def reference(rules):
    net = on_meta(DeepLabV2, 21)
    net.load_state_dict({k: torch.from_numpy(np.asarray(rules.fill(k, v.shape))) for k, v in net.state_dict().items()}, assign=True)
    return net


def test_names_and_shapes_are_those_of_the_manifest(golden, log):
    manifest = json.loads((golden/"irn/manifest_deeplabv2_r101_msc.json").read_text())
    net = on_meta(DeepLabV2, 21)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == dict(manifest["keys"])
    assert sum(p.numel() for p in net.parameters()) == log["params_total"] == 44_048_532


@torch.no_grad()
@pytest.mark.parametrize("seed, size", [(500, (65, 65)), (501, (97, 113))])
def test_logits(reference, golden, rules, seed, size):
    want, name = np.load(golden/"irn/g13_deeplabv2.npz", allow_pickle=False), "x".join(map(str, dict.fromkeys(size)))
    x, net = torch.from_numpy(rules.nrm(seed, (1, 3, *size))), reference.eval()
    maps = net.pyramid(x)
    assert np.abs(maps[0].numpy() - want[f"base_{name}"]).max() < 2e-4
    assert np.abs(net(x).numpy() - want[f"msc_{name}"]).max() < 2e-4


@torch.no_grad()
def test_stages(reference, rules, log):
    x = torch.from_numpy(rules.nrm(501, (1, 3, 97, 113)))
    for name, part in reference.eval().base.named_children():
        x = part(x)
        shape, mean, std = log["stages_97x113"][name]
        assert list(x.shape) == shape
        assert (x.mean().item(), x.std(correction=0).item()) == pytest.approx((mean, std), rel=2e-3)


@torch.no_grad()
def test_training_losses(reference, rules, log):
    x, y = torch.from_numpy(rules.nrm(500, (1, 3, 65, 65))), torch.from_numpy(rules.label_map(502, 65, 65, 21))[None]
    maps = reference.train()(x)  # BatchNorm stays frozen
    assert [list(z.shape) for z in maps] == log["train_out_shapes"]
    assert scale_losses(maps, y).tolist() == pytest.approx(log["train_losses_1x_0.5_0.75_max"], rel=1e-4)
    assert segmentation_loss(maps, y).item() == pytest.approx(log["train_total_sum"], rel=1e-4)
    assert reference.base.layer1.conv1.bn.num_batches_tracked == 0


def test_learning_rates(log):
    for done, lr in log["poly_lr_after_iter"].items(): assert poly_rate(int(done), 20_000, 2.5e-4) == pytest.approx(lr, abs=1e-15)


@given(st.integers(0, 3000), st.integers(1, 2000), st.integers(1, 20), st.integers(0, 100))
def test_rates_fall_in_steps_and_never_leave_their_range(done, total, every, warmup):
    rate = poly_rate(done, total, 1., .9, every, warmup)
    assert 0 <= rate <= 1 and (warmup or rate >= poly_rate(done + 1, total, 1., .9, every))
    assert rate == poly_rate(done//every*every, total, 1., .9, every, warmup)
    if done >= total and not total % every: assert rate == 0


@pytest.mark.parametrize("bad", [dict(total=0), dict(every=0), dict(done=-1)])
def test_rate_of_nothing(bad):
    with pytest.raises(ValueError, match="at least 1"): poly_rate(**dict(done=1, total=10, base=1.) | bad)


# ---- optimizer groups and BatchNorm

def test_groups_of_deeplab():
    net = on_meta(DeepLabV2, 21)
    groups = {g["name"]: g for g in net.groups(2.5e-4, 5e-4)}
    assert ({n: (g["lr"], g["weight_decay"]) for n, g in groups.items()}
            == {"backbone": (2.5e-4, 5e-4), "head": (pytest.approx(2.5e-3), 5e-4), "head bias": (pytest.approx(5e-3), 0.)})
    names = {id(p): n for n, p in net.named_parameters()}
    listed = [names[id(p)] for g in groups.values() for p in g["params"]]
    assert len(listed) == len(set(listed)) and set(names.values()) - set(listed) == {n for n in names.values() if ".bn." in n}
    assert not any(p.requires_grad for n, p in net.named_parameters() if ".bn." in n)
    assert all(n.startswith("base.aspp") for p in groups["head"]["params"] + groups["head bias"]["params"] for n in [names[id(p)]])


def test_frozen_batchnorm_survives_a_step_and_a_free_one_does_not():
    x, y = torch.randn(2, 3, 48, 48), torch.randint(0, 5, (2, 48, 48))
    for frozen in (True, False):
        torch.manual_seed(0)
        net = deeplabv2_mini(5, weights=None, freeze_bn=frozen).train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        optimizer = torch.optim.SGD(net.groups(1e-3), momentum=.9)
        segmentation_loss(net(x), y).backward(); optimizer.step()
        same = {k: torch.equal(v, net.state_dict()[k]) for k, v in before.items()}
        assert all(v for k, v in same.items() if "bn" in k) == frozen
        assert {v for k, v in same.items() if "running" in k} == {frozen}
        assert not torch.equal(before["base.aspp.c0.weight"], net.base.aspp.c0.weight)


def slow_and_merged(net, run):
    "What `run` gives with BatchNorm as layers of their own, and as parts of their convolutions"
    with pytest.MonkeyPatch.context() as m:
        m.setattr("adcam.deeplab.merged_norm", lambda net: nullcontext())
        slow = run(net)
    return slow, run(net)


@pytest.fixture(scope="module")
def caffe():
    "Five blocks as in DeepLabV2, with statistics of their own"
    torch.manual_seed(0)
    net = MultiScale(_named(layer2=_stage(3, 32, 3, 2, 1), layer3=_stage(32, 32, 2, 1, 2), aspp=ASPP(32, 5, (1, 2))), 5)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2), m.weight.data.uniform_(.5, 1.5), m.bias.data.normal_()
    return net


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, .15)])
def test_a_norm_that_stands_still_may_be_part_of_its_convolution(caffe, kind, tolerance):
    x, y = torch.randn(2, 3, 48, 48), torch.randint(0, 5, (2, 48, 48))

    def gradients(net):
        with torch.autocast("cpu", kind, enabled=kind != torch.float32): logits = net.train()(x)
        loss = segmentation_loss(logits, y)
        return [loss, *torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])]

    before = {k: v.clone() for k, v in caffe.state_dict().items()}
    for a, b in zip(*slow_and_merged(caffe, gradients)):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert all(torch.equal(v, caffe.state_dict()[k]) for k, v in before.items())


def test_a_norm_that_learns_stays_a_layer_and_an_error_leaves_nothing_merged(caffe):
    free = copy.deepcopy(caffe)
    free.freeze_bn = False
    torch.manual_seed(0)
    x = torch.randn(2, 3, 48, 48)
    a, b = slow_and_merged(free.train(), lambda net: [z.detach() for z in net(x)])
    assert all(map(torch.equal, a, b))
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad(): caffe.eval()(torch.randn(2, 4, 48, 48))
    assert not [m for m in caffe.modules() if getattr(m, "merged", None)]


def test_groups_of_a_transformer():
    net = on_meta(upernet, 21)
    weights, norms = net.groups(UPERNET["lr"], UPERNET["weight_decay"])
    assert (weights["weight_decay"], norms["weight_decay"]) == (.01, 0)
    names = {id(p): n for n, p in net.named_parameters()}
    free = {names[id(p)] for p in norms["params"]}
    assert len(weights["params"]) + len(norms["params"]) == len(names)
    assert any("relative_position_bias_table" in n for n in free) and not any("qkv" in n or "segmentation_head" in n for n in free)


# ---- any size, both modes

@torch.no_grad()
@pytest.mark.parametrize("make", [deeplabv2_mini, upernet_mini])
@settings(max_examples=8, deadline=None)
@given(h=st.integers(16, 75), w=st.integers(16, 75))
def test_any_size(make, h, w):
    net, x = make(4, weights=None), torch.randn(2, 3, h, w)
    full = (h, w) if make is upernet_mini else (-(-h//8), -(-w//8))
    assert net.eval()(x).shape == (2, 4, *full)
    assert [len(z) for z in net.train()(x)] == [2]*(1 if make is upernet_mini else 4)


@torch.no_grad()
def test_upernet_at_its_own_size_is_that_of_the_library():
    import segmentation_models_pytorch as smp
    net = upernet(3, "convnext_atto", channels=8).eval()
    plain = smp.UPerNet("tu-convnext_atto", encoder_weights=None, decoder_channels=8, classes=3).eval()
    plain.load_state_dict(net.net.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(net(x), plain(x))
    assert torch.equal(net(x[..., :50, :70]), plain(F.pad(x[..., :50, :70], (0, 26, 0, 14)))[..., :50, :70])


@torch.no_grad()
def test_swin_takes_sizes_that_are_no_multiple_of_its_window():
    options = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2), channels=8)
    torch.manual_seed(0)
    net, fixed = (upernet(3, **options, **o).eval() for o in ({}, dict(strict_img_size=True)))
    fixed.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 224, 224)
    assert torch.allclose(net(x), fixed(x), atol=1e-4)  # windows are made on the fly, with the same result
    assert net(x[..., :75, :130]).shape == (1, 3, 75, 130)


@torch.no_grad()
def test_pictures_of_other_normalization():
    assert upernet(3, "resnet10t", channels=8).preprocess is to_tensor
    half = upernet(3, "mobilenetv3_small_050.lamb_in1k", channels=8)
    want = timm.get_pretrained_cfg("mobilenetv3_small_050.lamb_in1k")
    x = half.preprocess(PICTURE)
    mean, std = (torch.tensor(v)[:, None, None] for v in (want.mean, want.std))
    assert torch.allclose(x, (torch.from_numpy(PICTURE).permute(2, 0, 1)/255 - mean)/std, atol=1e-5)


def test_small_networks_are_small():
    for make in (deeplabv2_mini, upernet_mini): assert sum(p.numel() for p in make(11, weights=None).parameters()) < 1.5e6


def test_every_parameter_of_a_small_network_learns():
    x, y = torch.randn(2, 3, 64, 64), torch.randint(0, 11, (2, 64, 64))
    for make in (deeplabv2_mini, upernet_mini):
        net = make(11, weights=None).train()
        segmentation_loss(net(x), y).backward()
        listed = [p for g in net.groups() for p in g["params"]]
        assert all(p.grad is not None for p in listed)
        assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}


def test_caffe_input():
    x = caffe_tensor(PICTURE)
    assert torch.allclose(x + torch.tensor(CAFFE_MEAN)[:, None, None], torch.from_numpy(PICTURE[..., ::-1].copy()).permute(2, 0, 1).float(), atol=1e-4)
    for bad in (PICTURE/255, PICTURE[..., 0], torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="uint8"): caffe_tensor(bad)


# ---- losses

def slow_loss(z, y, balanced):
    cells = [(b, i, j) for b, i, j in np.ndindex(*y.shape) if y[b, i, j] != 255]
    nll = {c: -z[c[0], :, c[1], c[2]].log_softmax(0)[y[c]] for c in cells}
    parts = [[v for c, v in nll.items() if (y[c] > 0) == front] for front in (False, True)] if balanced else [list(nll.values())]
    return sum(torch.stack(p).mean() for p in parts if p)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0., .4, .95]))
def test_loss_is_that_of_loops(seed, balanced, ignored):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(2, 3, 4, 5, generator=g), torch.randint(0, 3, (2, 4, 5), generator=g)
    y[torch.rand(2, 4, 5, generator=g) < ignored] = 255
    y[0, 0, 0] = 1
    assert pixel_loss(z, y, balanced).item() == pytest.approx(slow_loss(z, y, balanced).item(), rel=1e-5)
    assert segmentation_loss([z, z], y, balanced).item() == pytest.approx(2*pixel_loss(z, y, balanced).item(), rel=1e-5)


def test_labels_are_resized_as_pillow_does():
    from PIL import Image
    y = np.random.default_rng(0).integers(0, 256, (65, 97), dtype=np.uint8)
    for h, w in ((9, 13), (5, 7), (65, 97), (130, 40)):
        want = np.asarray(Image.fromarray(y).resize((w, h), Image.Resampling.NEAREST))
        assert np.array_equal(shrink_labels(torch.from_numpy(y)[None], (h, w))[0], want)


def test_wrong_labels_are_named():
    z, y = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    for bad, words in ((y + 3, "label 3 in a mask for 3 classes"), (y - 1, "label -1"), (y + 255, "every pixel of this batch is 255"),
                       (y.float(), "integers"), (y[0], "integers")):
        with pytest.raises(ValueError, match=words): segmentation_loss(z, bad)
    check_labels(y.to(torch.uint8), 3)


def test_bfloat16_logits_are_widened():
    z, y = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    assert pixel_loss(z.bfloat16(), y).dtype == torch.float32


# ---- weights

@pytest.fixture(scope="module")
def torchvision_resnet():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.resnet101(weights=None).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 1.5); nn.init.uniform_(m.weight, .2, .6)
    return net


@pytest.fixture(scope="module")
def imagenet(torchvision_resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet")/"resnet101.pth"
    torch.save(torchvision_resnet.state_dict(), path)
    yield path
    path.unlink()


def torchvision_geometry(net):
    "Strides, dilations and pooling as in torchvision"
    net.base.layer1.pool.ceil_mode = False
    for name in ("layer3", "layer4", "layer5"):
        stage = getattr(net.base, name)
        stage.block1.reduce.conv.stride, stage.block1.conv3x3.conv.stride, stage.block1.shortcut.conv.stride = (1, 1), (2, 2), (2, 2)
        for block in stage: block.conv3x3.conv.dilation = block.conv3x3.conv.padding = (1, 1)
    return net


@torch.no_grad()
def test_converted_imagenet_network_is_the_same_function_but_for_its_geometry(torchvision_resnet, imagenet):
    "With torchvision's geometry, and its input padded with the color that Caffe pads with, all 2048 features agree"
    net, tv = DeepLabV2(21), torchvision_resnet
    assert init_deeplab(net, imagenet) == [GEOMETRY, "the file has no ASPP; ASPP starts from random weights"]
    torchvision_geometry(net.eval())
    color = (torch.tensor(CAFFE_MEAN[::-1])/255 - torch.tensor(IMAGENET_MEAN))/torch.tensor(IMAGENET_STD)
    x = color[:, None, None].repeat(1, 76, 103)
    x[:, 3:-3, 3:-3] = to_tensor(PICTURE)
    want = F.relu(tv.bn1(F.conv2d(x[None], tv.conv1.weight, stride=2)))
    for part in (tv.maxpool, tv.layer1, tv.layer2, tv.layer3, tv.layer4): want = part(want)
    got = net.preprocess(PICTURE)[None]
    for name in ("layer1", "layer2", "layer3", "layer4", "layer5"): got = getattr(net.base, name)(got)
    assert want.std() > .01 and (got - want).abs().max() < 1e-5*want.abs().max()


def test_timm_has_the_names_of_torchvision(torchvision_resnet):
    names = on_meta(timm.create_model, "resnet101").state_dict()
    assert {k: v.shape for k, v in names.items()} == {k: v.shape for k, v in torchvision_resnet.state_dict().items()}


def test_other_backbones_are_refused(tmp_path):
    net = on_meta(DeepLabV2, 21)
    for name, words in (("resnet50", "missing"), ("resnet101d", "no ResNet of torchvision"), ("resnext101_32x4d", "of another shape")):
        if name == "resnet50": state = {k: torch.zeros(v.shape) for k, v in on_meta(timm.create_model, name).state_dict().items()}
        else: state = {k: torch.zeros(()).expand(v.shape) for k, v in on_meta(timm.create_model, name).state_dict().items()}
        torch.save(state, path := tmp_path/f"{name}.pth")
        with pytest.raises(ValueError, match=words): init_deeplab(net, path)
        path.unlink()


@pytest.fixture
def coco():
    "A COCO checkpoint without memory: one number, expanded to every shape"
    def make(num_classes=81, prefix="", head=True):
        shapes = {k.removeprefix("base."): v.shape for k, v in on_meta(DeepLabV2, num_classes).state_dict().items()}
        return {prefix + k: torch.tensor(.5 if "num_b" not in k else 3).to(torch.float32 if "num_b" not in k else torch.int64).expand(s)
                for k, s in shapes.items() if head or "aspp" not in k}
    return make


@pytest.mark.parametrize("prefix", ["", "base.", "scale.", "Scale.", "module.base."])
def test_coco_checkpoint_under_any_prefix(coco, tmp_path, prefix):
    torch.save(coco(prefix=prefix), path := tmp_path/"coco.pth")
    with torch.device("cpu"): net = DeepLabV2(21)
    notes = init_deeplab(net, path)
    assert len(notes) == 1 and "other classes" in notes[0] and "ASPP starts from random weights" in notes[0]
    assert (net.base.layer5.block3.increase.conv.weight == .5).all() and not (net.base.aspp.c0.weight == .5).any()
    with pytest.raises(ValueError, match="made for 81 classes .* this network has 21; build it with num_classes=81"): load_deeplab(net, path)


def test_coco_checkpoint_with_a_classifier_of_its_own(coco, tmp_path):
    "deeplabv1 ends in one 1x1 convolution"
    state = coco(head=False) | {"fc.weight": torch.zeros(91, 2048, 1, 1), "fc.bias": torch.zeros(91)}
    torch.save(dict(state_dict=state), path := tmp_path/"v1.pth")
    net = DeepLabV2(21)
    assert "fc.bias" in init_deeplab(net, path)[0]
    state.pop("layer4.block7.reduce.conv.weight")
    torch.save(state, path)
    with pytest.raises(ValueError, match="layer4.block7.reduce.conv.weight"): init_deeplab(net, path)


def test_same_classes_are_taken_whole(coco, tmp_path):
    torch.save(coco(21), path := tmp_path/"voc.pth")
    net = DeepLabV2(21)
    assert init_deeplab(net, path) == [] and (net.base.aspp.c3.weight == .5).all()
    assert load_deeplab(net, path) is net and not net.training


@pytest.mark.parametrize("make", [deeplabv2_mini, upernet_mini])
def test_own_files_of_the_small_networks(make, tmp_path):
    torch.manual_seed(0)
    a, b = make(5, weights=None), make(5, weights=None)
    save_file(a.state_dict(), path := tmp_path/"net.safetensors")
    load_deeplab(b, path)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    with pytest.raises(ValueError, match="made for 5 classes .* this network has 11; build it with num_classes=5"): load_deeplab(make(11, weights=None), path)
    other = upernet_mini if make is deeplabv2_mini else deeplabv2_mini
    with pytest.raises(ValueError, match="Build the network that the file was made with"): load_deeplab(other(5, weights=None), path)
    with pytest.raises(ValueError, match="init_deeplab fills a DeepLabV2"): init_deeplab(a, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="net.safetensors"): load_deeplab(b, path)


def test_a_classifier_is_no_segmentation_network(imagenet):
    with pytest.raises(ValueError, match="ImageNet classifier.*init_deeplab"): load_deeplab(on_meta(DeepLabV2, 21), imagenet)


def test_half_precision_files_and_missing_counters(tmp_path):
    base = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    base.add_module("aspp", ASPP(4, 3, (1,)))
    net = MultiScale(base, 3, scales=())
    torch.save({k: v.half() for k, v in net.state_dict().items() if "num_batches" not in k}, path := tmp_path/"half.pth")
    assert load_deeplab(net, path).base.aspp.c0.weight.dtype == torch.float32


def test_upernet_of_no_network():
    for name, words in (("nonsense", "Unknown model"), ("vit_tiny_patch16_224", "1/4, 1/8, 1/16 and 1/32")):
        with pytest.raises(ValueError, match=words): upernet(3, name)
    with pytest.raises(ValueError, match="at least 2 images"): upernet_mini(3, weights=None).train()(torch.zeros(1, 3, 32, 32))
