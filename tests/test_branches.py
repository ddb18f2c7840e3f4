"TwoBranch: any timm CNN beside any timm ViT; attention against hooks, heads against timm, refusals in words"
import gc
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from adcam.branches import TwoBranch, VOC_IMAGENET, _attend, _one_prefix, _own_head, _own_vit_head, pooled_tokens, _to_grid, group_maps, read_attention
from adcam.cam import ad_cam, att_diffu, cam_map, patch_attention, trans_cam, ts_cam

# name, options, prefix tokens, has a class token
VITS = [("deit_tiny_patch16_224", {}, 1, True), ("deit_tiny_distilled_patch16_224", {}, 2, True), ("vit_small_patch14_dinov2", {}, 1, True),
        ("vit_small_patch14_reg4_dinov2", {}, 5, True), ("eva02_tiny_patch14_224", {}, 1, True), ("vit_small_patch16_dinov3", {}, 5, True),
        ("vit_little_patch16_reg4_gap_256", {}, 4, False), ("vit_relpos_small_patch16_224", dict(img_size=(48, 64)), 0, False),
        ("beit_base_patch16_224", dict(img_size=(48, 64)), 1, True)]
CNNS = ["resnet10t", "test_efficientnet", "test_convnext", "convnext_atto", "resnetv2_50x1_bit"]
IDS = [v[0] for v in VITS]


def vit_of(name, options, depth=2):
    torch.manual_seed(0)
    if not options: options = dict(dynamic_img_size=True)
    return timm.create_model(name, depth=depth, **options).eval()


def image(vit): return torch.randn(2, 3, 3 * vit.patch_embed.feat_ratio(), 4 * vit.patch_embed.feat_ratio())


def hooked(vit, x):
    "Oracle: fused attention off, hooks on the dropout behind the softmax, everything put back"
    seen, hooks, fused = [], [], [b.attn.fused_attn for b in vit.blocks]
    for b in vit.blocks:
        b.attn.fused_attn = False
        hooks.append(b.attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o.mean(1))))
    tokens = vit.forward_features(x)
    for b, h, f in zip(vit.blocks, hooks, fused): h.remove(); b.attn.fused_attn = f
    return tokens, torch.stack(seen, 1)


@pytest.mark.parametrize("name, options, prefix, has_class", VITS, ids=IDS)
@torch.no_grad()
def test_attention_is_what_hooks_see(name, options, prefix, has_class):
    vit = vit_of(name, options)
    for p in vit.parameters():  # weights that make the attention uneven, and every bias of positions count
        if p.ndim > 1: p.mul_(4).add_(.02 * torch.randn_like(p))
    x = image(vit)
    tokens, whole = hooked(vit, x)
    for matmul in (False, True):  # the fused kernel, and the written-out way of TIMM_FUSED_ATTN=0
        for b in vit.blocks: b.attn.fused_attn = not matmul
        got, attn = read_attention(vit, x)
        plain = vit.forward_features(x)
        assert torch.allclose(got, plain, atol=1e-5 * plain.abs().max()) and torch.allclose(got, tokens, atol=1e-4 * plain.abs().max())
        assert torch.allclose(whole.sum(-1), torch.ones_like(whole[..., 0]), atol=1e-5)
        assert vit.num_prefix_tokens == prefix and attn.shape == (2, 2, 13, 13)
        assert torch.allclose(attn[:, :, 1:, 1:], whole[:, :, prefix:, prefix:], atol=1e-6)
        if has_class:
            keep = [0, *range(prefix, prefix + 12)]
            assert torch.allclose(attn, whole[:, :, keep][..., keep], atol=1e-6)
        else:
            assert torch.allclose(attn[:, :, 0, 1:], whole[:, :, prefix:, prefix:].mean(2), atol=1e-6) and not attn[..., 0].any()
        assert (attn.sum(-1) <= 1 + 1e-5).all() and (prefix > 1 or torch.allclose(attn.sum(-1), torch.ones(2, 2, 13), atol=1e-5))


@torch.no_grad()
def test_reduce_and_layers():
    vit = vit_of("vit_tiny_patch16_224", {}, depth=4)
    x = image(vit)
    every = read_attention(vit, x)[1]
    for layers, index in ((None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 3], [0, 3]), ([1], [1])):
        assert torch.allclose(read_attention(vit, x, layers)[1], every[:, index], atol=1e-6)
        mean = read_attention(vit, x, layers, "mean")[1]
        assert mean.shape == (2, 1, 13, 13) and torch.allclose(mean[:, 0], every[:, index].mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="layers=9"): read_attention(vit, x, 9)
    with pytest.raises(ValueError, match="pass None"): read_attention(vit, x, reduce="sum")


def test_reading_leaves_nothing_behind():
    vit = vit_of("vit_tiny_patch16_224", {})
    state = [(b.attn.fused_attn, len(b.attn._forward_hooks), len(b.attn.attn_drop._forward_hooks)) for b in vit.blocks]
    x = image(vit)
    with torch.no_grad():
        before = vit.forward_features(x)
        with pytest.raises(ValueError): read_attention(nn.ModuleDict(dict(a=vit))["a"], x, layers=[7])
        class Broken(Exception): pass
        real, vit.norm.forward = vit.norm.forward, lambda t: (_ for _ in ()).throw(Broken)
        with pytest.raises(Broken): read_attention(vit, x)
        vit.norm.forward = real
        gc.collect()
        count = sum(type(o) is torch.Tensor for o in gc.get_objects())
        for _ in range(20): read_attention(vit, x)
        gc.collect()
        assert sum(type(o) is torch.Tensor for o in gc.get_objects()) == count
        assert torch.equal(vit.forward_features(x), before)
    assert state == [(b.attn.fused_attn, len(b.attn._forward_hooks), len(b.attn.attn_drop._forward_hooks)) for b in vit.blocks]


def test_other_threads_do_not_notice():
    from threading import Thread
    vit, found = vit_of("vit_tiny_patch16_224", {}), []
    x = image(vit)
    def work():
        with torch.no_grad(): found.append(read_attention(vit, x)[1])
    threads = [Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 4 and all(torch.equal(f, found[0]) for f in found)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), heads=st.integers(1, 3), d=st.integers(1, 6), kind=st.sampled_from(["none", "add", "bool"]), seed=st.integers(0, 99))
def test_attend_is_the_kernel(n, heads, d, kind, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, heads, n, d, generator=g).unbind(0)
    mask = dict(none=None, add=torch.randn(heads, n, n, generator=g), bool=torch.rand(n, n, generator=g).fill_diagonal_(1) > .3)[kind]
    y, a = _attend(q, k, v, mask)
    assert torch.allclose(y, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5)
    assert torch.allclose(a.sum(-1), torch.ones(2, n), atol=1e-5)


def test_half_precision_attention_is_accumulated_in_float32():
    q, k, v = torch.randn(3, 1, 2, 5, 4).bfloat16().unbind(0)
    y, a = _attend(q, k, v)
    assert y.dtype == torch.bfloat16 and a.dtype == torch.float32 and torch.allclose(a.sum(-1), torch.ones(1, 5), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(prefix=st.integers(0, 6), n=st.integers(1, 8), has_class=st.booleans())
def test_one_prefix(prefix, n, has_class):
    if has_class and prefix == 0: prefix = 1
    a = torch.rand(1, prefix + n, prefix + n).softmax(-1)
    b = _one_prefix(a, prefix, has_class)
    assert b.shape == (1, 1 + n, 1 + n) and torch.equal(b[:, 1:, 1:], a[:, prefix:, prefix:])
    if has_class: assert torch.equal(b[:, 0, 1:], a[:, 0, prefix:]) and torch.equal(b[:, 1:, 0], a[:, prefix:, 0])


@pytest.mark.parametrize("name", CNNS)
@torch.no_grad()
def test_own_head_has_exact_class_maps(name):
    "Mean of the class map plus bias = timm's own logits, on images of two shapes"
    torch.manual_seed(0)
    original = timm.create_model(name).eval()
    for p in original.parameters(): p.add_(.01 * torch.randn_like(p))
    folder = {k: v.clone() for k, v in original.state_dict().items()}
    head = _own_head(original, name)
    model = TwoBranch(name, "test_vit", None, img_size=None).eval()
    model.cnn.load_state_dict({k: v for k, v in folder.items() if k in model.cnn.state_dict()})
    model.conv_cls_head.load_state_dict(head.state_dict())
    for h, w in ((64, 96), (96, 96)):
        x = torch.randn(2, 3, h, w)
        xc = model._inputs(x)[0]
        conv, _ = model.features(x)
        logits, maps = original(xc), torch.einsum("kc,bchw->bkhw", model.conv_cls_head.weight, conv)
        scale = logits.abs().max() + 1
        assert torch.allclose(model(x)[0], logits, atol=1e-4 * scale)
        assert torch.allclose(maps.mean((2, 3)) + model.conv_cls_head.bias, logits, atol=1e-4 * scale)


@torch.no_grad()
def test_own_vit_head_is_timms():
    for name, options, *_ in VITS:
        vit = vit_of(name, options)
        head = _own_vit_head(vit)
        x = image(vit)
        if head is None: assert "dino" in name or "eva" in name
        else: assert torch.allclose(head(pooled_tokens(vit, vit.forward_features(x))), vit(x), atol=1e-4), name


def seen(name, options, K):
    "A pair, two images of 3 x 4 tokens, and what it makes of them."
    net = TwoBranch("test_resnet", name, K, depth=2, **options).eval()
    x = torch.randn(2, 3, 3 * net.stride, 4 * net.stride)
    return net, x, net.maps(x)


every_vit = pytest.mark.parametrize("name, options, prefix, has_class", VITS, ids=IDS)
every_head = pytest.mark.parametrize("K", [None, 3])  # None: the 1,000 classes of ImageNet


@every_head
@every_vit
@torch.no_grad()
def test_maps_have_the_shapes_of_the_contract(name, options, prefix, has_class, K):
    net, _, maps = seen(name, options, K)
    assert net.num_classes == (K or 1000)
    assert maps.cam.shape == (2, K or 1000, 3, 4)
    assert maps.attn.shape == (2, 2, 13, 13)


@every_head
@every_vit
@torch.no_grad()
def test_logits_beside_the_maps_are_those_of_forward(name, options, prefix, has_class, K):
    net, x, maps = seen(name, options, K)
    conv, trans = net(x)
    assert torch.equal(maps.conv_logits, conv)
    if trans is None: assert net.trans_cls_head is None and maps.trans_logits is None
    else: assert torch.allclose(maps.trans_logits, trans, atol=1e-5)


@every_head
@every_vit
@torch.no_grad()
def test_heads_on_pooled_features_give_the_logits(name, options, prefix, has_class, K):
    net, x, _ = seen(name, options, K)
    f, t = net.features(x)
    pooled = net.heads(f.mean((2, 3))[:, :, None, None], t[:, :1])
    assert all(a is b is None or torch.allclose(a, b, atol=1e-5) for a, b in zip(pooled, net(x)))


@every_vit
def test_each_parameter_is_in_one_group(name, options, prefix, has_class):
    net = TwoBranch("test_resnet", name, 3, depth=2, **options)
    groups = net.param_groups()
    assert sorted(groups["vit"] + groups["cnn"]) == sorted(n for n, _ in net.named_parameters())
    assert all(groups.values())


@every_vit
@torch.no_grad()
def test_an_image_has_the_maps_that_it_has_in_a_batch(name, options, prefix, has_class):
    net, x, maps = seen(name, options, 3)
    single = net.maps(x[1:])
    assert torch.allclose(single.cam, maps.cam[1:], atol=1e-5)
    assert torch.allclose(single.attn, maps.attn[1:], atol=1e-6)


@pytest.mark.parametrize("name, options", [v[:2] for v in VITS if v[2] == 1], ids=[i for v, i in zip(VITS, IDS) if v[2] == 1])  # rows sum to 1
@torch.no_grad()
def test_every_method_takes_the_maps(name, options):
    _, _, maps = seen(name, options, 3)
    for method in (cam_map, ts_cam, trans_cam, att_diffu): assert method(maps, classes=[0, 2]).shape == (2, 2, 3, 4)
    assert ad_cam(maps, k=5, classes=[1]).isfinite().all()


def test_gradients_do_not_cross():
    net = TwoBranch("resnet10t", "vit_tiny_patch16_224", 3, depth=1)
    groups, x = net.param_groups(), torch.randn(2, 3, 32, 32)
    for index, own, other in ((0, "cnn", "vit"), (1, "vit", "cnn")):
        net.zero_grad()
        net(x)[index].sum().backward()
        grads = {n: p.grad for n, p in net.named_parameters()}
        assert all(grads[n] is not None for n in groups[own]) and all(grads[n] is None for n in groups[other])


def test_maps_carry_gradients():
    net = TwoBranch("test_resnet", "vit_tiny_patch16_224", 2, depth=1).eval()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    maps = net.maps(x)
    (maps.cam.sum() + maps.attn.square().sum()).backward()
    assert x.grad.abs().sum() > 0 and net.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_normalization_per_branch():
    net = TwoBranch("tf_efficientnet_lite0", "deit_tiny_patch16_224", 2, depth=1)
    rgb = torch.rand(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    xc, xv = net._inputs((rgb - mean) / std)
    assert torch.allclose(xc, 2 * rgb - 1, atol=1e-5) and torch.allclose(xv, (rgb - mean) / std, atol=1e-6)
    assert not any("norm" in k.split(".")[0] for k in net.state_dict())


@torch.no_grad()
def test_output_stride_and_grid():
    x = torch.randn(1, 3, 64, 96)
    for stride, size in ((None, (2, 3)), (16, (4, 6)), (8, (8, 12))):
        net = TwoBranch("resnet10t", "vit_tiny_patch16_224", 2, output_stride=stride, depth=1).eval()
        assert net.features(x)[0].shape[2:] == size and net.maps(x).cam.shape[2:] == (4, 6)
    ramp = torch.arange(6.).expand(1, 1, 4, 6)
    assert torch.equal(_to_grid(ramp, (4, 6)), ramp) and torch.allclose(_to_grid(ramp, (2, 3)).mean(), ramp.mean())


@torch.no_grad()
def test_position_table_follows_the_image():
    "A dynamic ViT on its own size equals the fixed one; other sizes work and differ from a cropped table"
    torch.manual_seed(0)
    net = TwoBranch("test_resnet", "vit_tiny_patch16_224", 2, depth=1, img_size=64).eval()
    fixed = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=0).eval()
    fixed.load_state_dict(net.vit.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(net.vit.forward_features(x), fixed.forward_features(x), atol=1e-5)
    assert net.maps(torch.randn(1, 3, 32, 112)).attn.shape == (1, 1, 15, 15)


@pytest.mark.parametrize("vit, word",
                         [("swin_tiny_patch4_window7_224", "inside windows"), ("hiera_tiny_224", "inside windows"),
                          ("xcit_nano_12_p16_224", "one grid of patches"),
                                       ("cait_xxs24_224", "between all patches"), ("resnet10t", "one grid of patches"), ("pvt_v2_b0", "one grid of patches")])
def test_refused_transformers(vit, word):
    with pytest.raises(ValueError, match=word) as e: TwoBranch("test_resnet", vit)
    assert vit in str(e.value) and "take a plain ViT" in str(e.value)


@pytest.mark.parametrize("build, words", [
    (lambda: TwoBranch("resnet5O"), "nearest: .*resnet50"), (lambda: TwoBranch("test_resnet", "deit_smal"), "nearest: .*deit"),
    (lambda: TwoBranch("vit_tiny_patch16_224", "test_vit"), "cannot be the CNN branch"),
    (lambda: TwoBranch("mobilenetv3_small_050", "test_vit", None), "no class map"),
    (lambda: TwoBranch("mobilenetv3_small_050", "test_vit", 2, output_stride=16), "output_stride=16"),
    (lambda: TwoBranch("test_resnet", "test_vit", 0), "num_classes is 0"), (lambda: TwoBranch("test_resnet", "test_vit", 2, colour=3), "colour"),
    (lambda: TwoBranch("test_resnet", "test_vit", 2).grid((40, 64)), "height 40 .*nearest: 32"),
    (lambda: TwoBranch("test_resnet", "test_vit", 2).grid((64, 8)), "width 8 .*nearest: 16"),
    (lambda: TwoBranch("test_resnet", "beit_base_patch16_224", 2, depth=1).grid((64, 64)), "img_size="),
    (lambda: TwoBranch("test_resnet", "test_vit", 2)(torch.zeros(3, 32, 32)), r"x\[None\]"),
    (lambda: TwoBranch("test_resnet", "test_vit", 2)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "to_tensor"),
    (lambda: TwoBranch("test_resnet", "test_vit", 2).set_drop_path(1), "drop_path is 1")])
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words): build()


def test_a_new_head_fits_where_the_own_does_not():
    with torch.no_grad(): assert TwoBranch("mobilenetv3_small_050", "test_vit", 2).eval().maps(torch.randn(1, 3, 32, 32)).cam.shape == (1, 2, 2, 2)


def test_weight_files(tmp_path):
    "Files load strictly, are hashed, and files of other models are refused"
    from adcam.pipeline import file_sha256
    torch.manual_seed(3)
    cnn, vit = timm.create_model("test_resnet"), timm.create_model("test_vit")
    save_file(cnn.state_dict(), tmp_path / "c.safetensors")
    torch.save({"model": vit.state_dict()}, tmp_path / "v.pth")
    net = TwoBranch("test_resnet", "test_vit", None, cnn_weights=tmp_path / "c.safetensors", vit_weights=tmp_path / "v.pth").eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        conv, trans = net(x)
        xc, xv = net._inputs(x)
        assert torch.allclose(conv, cnn.eval()(xc), atol=1e-4)
        assert torch.allclose(trans, _with(vit)(xv), atol=1e-4)
    assert net.weights["cnn"] == dict(source="c.safetensors", sha256=file_sha256(tmp_path / "c.safetensors"))
    with pytest.raises(ValueError, match="does not fit test_vit"): TwoBranch("test_resnet", "test_vit", vit_weights=tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="does not fit resnet10t"): TwoBranch("resnet10t", "test_vit", cnn_weights=tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match="no weight file"): TwoBranch("test_resnet", "test_vit", cnn_weights=tmp_path / "none.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not fit"): TwoBranch("test_resnet", "test_vit", cnn_weights=tmp_path / "junk.safetensors")


def _with(vit):
    "The same weights in a ViT that takes any size"
    other = timm.create_model("test_vit", dynamic_img_size=True).eval()
    other.load_state_dict(vit.state_dict())
    return other


def test_no_network(monkeypatch, tmp_path):
    "Pretrained weights without a network: the message says how to give a file"
    import huggingface_hub
    def unreachable(*a, **k): raise OSError("network is unreachable")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    with pytest.raises(ConnectionError, match="--cnn-weights FILE"): TwoBranch("resnet10t", "test_vit", pretrained=True)
    cnn = timm.create_model("test_resnet")
    save_file(cnn.state_dict(), tmp_path / "c.safetensors")
    with pytest.raises(ConnectionError, match="--vit-weights FILE"):
        TwoBranch("test_resnet", "deit_tiny_patch16_224", cnn_weights=tmp_path / "c.safetensors", pretrained=True)


def test_a_silent_name_server_costs_seconds(monkeypatch):
    "requests knows no timeout for names: the question is left after a while, and the reason is one line"
    import time
    import adcam.branches as branches
    monkeypatch.setattr("requests.head", lambda *a, **k: time.sleep(30))
    began = time.monotonic()
    assert branches._silent("https://example.org", .2) == "no answer in 0.2 s" and time.monotonic() - began < 2


def test_checkpoint(tmp_path):
    from adcam.classifier import save_weights
    build = lambda K=2, **o: TwoBranch("test_resnet", "test_vit", K, **o)
    net = build().eval()
    save_weights(net, tmp_path / "both.safetensors")
    again = build(checkpoint=tmp_path / "both.safetensors").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(net(x), again(x)))
    with pytest.raises(ValueError, match="3 classes"): build(3, checkpoint=tmp_path / "both.safetensors")


def test_drop_path():
    net = TwoBranch("test_resnet", "vit_tiny_patch16_224", 2, depth=3)
    keys = list(net.state_dict())
    net.set_drop_path(.2)
    assert [b.drop_path1.drop_prob for b in net.vit.blocks] == [0, .1, .2] and list(net.state_dict()) == keys


def test_every_imagenet_index_belongs_to_its_group():
    from timm.data import ImageNetInfo
    from adcam.data import VOC_CLASSES
    info, of = ImageNetInfo(), {}
    assert tuple(VOC_IMAGENET) == VOC_CLASSES and not VOC_IMAGENET["person"]
    words = dict(aeroplane="airliner warplane", bicycle="bicycle-built mountain",
                 boat="canoe catamaran fireboat gondola lifeboat schooner speedboat trimaran yawl", bottle="bottle",
                 bus="bus", car="ambulance wagon cab convertible jeep limousine minivan Model racer sports", cat="cat tabby", chair="chair", cow="ox",
                 diningtable="table",
                 horse="sorrel", motorbike="moped scooter", pottedplant="pot", sheep="ram", sofa="couch",
                 train="train locomotive passenger streetcar", tvmonitor="monitor screen television")
    for name, group in VOC_IMAGENET.items():
        texts = [info.index_to_description(i).lower() for i in group]
        assert len(set(group)) == len(group) and all(of.setdefault(i, name) == name for i in group)
        if name in words: assert all(any(w.lower() in t for w in words[name].split()) for t in texts), (name, texts)
    # all dogs and birds by WordNet's own ranges: the first and last of each run, and their neighbors outside
    at = lambda i: info.index_to_description(i).split(",")[0]
    assert [at(i) for i in (7, 24, 80, 100, 127, 146)] == ["cock", "great grey owl", "black grouse", "black swan", "white stork", "albatross"]
    assert [at(i) for i in (6, 25, 79, 101, 126, 147)] == ["stingray", "European fire salamander", "centipede", "tusker", "isopod", "grey whale"]
    assert ([at(i) for i in (150, 151, 268, 269, 280, 281, 285, 286)]
            == ["sea lion", "Chihuahua", "Mexican hairless", "timber wolf", "grey fox", "tabby", "Egyptian cat", "cougar"])


def test_group_maps_bad_index():
    with pytest.raises(ValueError, match="outside the 5 classes"): group_maps(torch.zeros(1, 5, 2, 2), [(5,)])
    with pytest.raises(ValueError, match="top=0"): group_maps(torch.zeros(1, 5, 2, 2), [(1,)], 0)


@pytest.fixture(scope="module")
def with_heads():
    "A pair whose heads have learned, scenes, the losses, and the weights before"
    from adcam.classifier import HeadsConfig, train_heads
    from adcam.scenes import Scenes
    ds = Scenes("train", 12, 64)
    torch.manual_seed(0)
    net = TwoBranch("test_resnet", "vit_small_patch14_reg4_dinov2", 10, depth=1, embed_dim=48, num_heads=2, img_size=56)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    return net, ds, train_heads(net, ds, HeadsConfig(steps=15), progress=False), before


OF_SEEDS = dict(method="ad_cam", scales=(1., 1.5), flip=True, k=4, steps=1, clip_k=True)


def test_heads_learn_and_nothing_else_does(with_heads):
    net, _, history, before = with_heads
    assert history[-1]["loss"] < history[0]["loss"]
    assert {n.split(".")[0] for n, p in net.named_parameters() if not torch.equal(p, before[n])} == {"conv_cls_head", "trans_cls_head"}


def test_a_pickled_pair_makes_the_same_seeds(with_heads):
    import pickle
    from adcam.seeds import extract, model_fingerprint
    net, ds = with_heads[0].eval(), with_heads[1]
    again = pickle.loads(pickle.dumps(net))
    assert model_fingerprint(again) == model_fingerprint(net)
    a, b = (extract(m, ds[0].image, ds[0].label, **OF_SEEDS) for m in (net, again))
    assert (a.high_res == b.high_res).all()


@pytest.mark.parametrize("rows,options", [(64, OF_SEEDS), (50, dict(size_mode="pad", k=4, steps=1, clip_k=True))])
def test_seeds_of_a_pair_have_the_size_of_the_picture(with_heads, rows, options):
    from adcam.seeds import extract
    net, ds = with_heads[0].eval(), with_heads[1]
    seed = extract(net, ds[0].image[:rows], ds[0].label, **options)
    assert seed.high_res.shape == (len(seed.keys), rows, 64)


def test_seeds_of_a_pair_in_bfloat16_are_close(with_heads):
    from adcam.seeds import extract
    net, ds = with_heads[0].eval(), with_heads[1]
    full, half = (extract(net, ds[0].image, ds[0].label, precision=p, **OF_SEEDS) for p in ("fp32", "bf16"))
    assert abs(half.high_res - full.high_res).mean() < .1
