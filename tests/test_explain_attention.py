"""Attention explainers compared with plain autograd through the installed open_clip and timm, and edge cases in which
the published programs fail."""
import copy
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from towers import class_vit, clip_cls, open_clip_vit, sharp, siglip_map, timm_vit

from reclip_nb.explain import EXPLAINERS, explain, explain_many, layer_maps, minmax, trainable_maps
from reclip_nb.models import Clip, as_tower

RAW = dict(size=None, normalize="none")
SIGLIP = dict(class_token=False, global_pool="map")
TOWERS = {  # name: constructor, its options, and the number of leading tokens that are not patches
    "open_clip": (open_clip_vit, {}, 1), "quick_gelu": (open_clip_vit, dict(act_layer=QuickGELU), 1),
    "layer_scale": (open_clip_vit, dict(ls_init_value=.5, block_type="custom"), 1),
    "average": (open_clip_vit, dict(pool_type="avg"), 1),
    "late_norm": (open_clip_vit, dict(pool_type="avg", final_ln_after_pool=True), 1),
    "coca": (open_clip_vit, dict(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5), 1),
    "siglip": (timm_vit, SIGLIP, 0), "siglip2": (timm_vit, SIGLIP | dict(act_layer="gelu_tanh"), 0),
    "pooled_cls": (timm_vit, dict(global_pool="map"), 1),
    "registers": (timm_vit, dict(reg_tokens=4, init_values=.5), 5),
    "timm_average": (timm_vit, dict(global_pool="avg", reg_tokens=2), 3)}
POOLED = ("coca", "siglip", "siglip2", "pooled_cls")
CLASS_TOKEN = ("open_clip", "quick_gelu", "layer_scale", "registers")
each_tower = pytest.mark.parametrize("name", TOWERS)


def make(name):
    "Tower, two images, three texts, prefix tokens."
    kind, kw, prefix = TOWERS[name]
    gen = torch.Generator().manual_seed(1)
    net = kind(**kw)
    x = torch.randn(2, 3, 32, 32, generator=gen, dtype=torch.float64)
    texts = F.normalize(torch.randn(3, net(x[:1]).shape[-1], generator=gen, dtype=torch.float64), dim=-1)
    return net, x, texts, prefix


# ---- the oracle: independent of the package, with attention as a node of autograd's graph -------------------

def attend(q, k, v, heads, leaf):
    "Softmax attention and its output; with `leaf` the attention is a leaf of the graph."
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    a = (q @ k.mT/q.shape[-1]**.5).softmax(-1)
    a = a.detach().requires_grad_() if leaf else a
    return a, (a @ v).transpose(1, 2).flatten(2)


def block(net, blk, h, leaf=False):
    "One block of open_clip or timm, computed from its layers: attention and output."
    if hasattr(blk, "ln_1"):
        q, k, v = F.linear(blk.ln_1(h), blk.attn.in_proj_weight, blk.attn.in_proj_bias).chunk(3, -1)
        a, o = attend(q, k, v, blk.attn.num_heads, leaf)
        h = h+blk.ls_1(blk.attn.out_proj(o))
        return a, h+blk.ls_2(blk.mlp(blk.ln_2(h)))
    a, o = attend(*blk.attn.qkv(blk.norm1(h)).chunk(3, -1), blk.attn.num_heads, leaf)
    h = h+blk.ls1(blk.attn.proj(o))
    return a, h+blk.ls2(blk.mlp(blk.norm2(h)))


def head(net, h, apply_norm=True, leaf=False):
    "Tokens -> attention of the pooler (None if there is no pooler) and embedding."
    if hasattr(net, "transformer"):
        if net.attn_pool is None: return None, net._pool(h)[0] @ net.proj
        pool, d = net.attn_pool, net.attn_pool.attn.embed_dim
        w = [pool.attn.q_proj_weight, pool.attn.k_proj_weight, pool.attn.v_proj_weight]
        if w[0] is None: w = pool.attn.in_proj_weight.chunk(3)
        z = pool.ln_k(h)
        parts = (pool.ln_q(pool.query[:1]).expand(len(h), 1, d), z, z)
        q, k, v = (F.linear(*args) for args in zip(parts, w, pool.attn.in_proj_bias.chunk(3)))
        a, o = attend(q, k, v, pool.attn.num_heads, leaf)
        return a, net.ln_post(pool.attn.out_proj(o))[:, 0] @ net.proj
    if net.attn_pool is None: return None, net.forward_head(net.norm(h))
    pool, h = net.attn_pool, (net.norm(h) if apply_norm else h)[:, net.num_prefix_tokens:]
    a, o = attend(pool.q(pool.latent).expand(len(h), -1, -1), *pool.kv(h).chunk(2, -1), pool.num_heads, leaf)
    o = pool.proj(o)
    return a, (o+pool.mlp(pool.norm(o)))[:, 0]


def blocks(net): return net.transformer.resblocks if hasattr(net, "transformer") else net.blocks
def embed(net, x): return net._embeds(x) if hasattr(net, "transformer") else net._pos_embed(net.patch_embed(x))


def gradients(f, texts, inputs):
    "Gradient of every cosine, (B, T, ...) for each input."
    s = F.normalize(f, dim=-1) @ texts.T
    grads = [torch.autograd.grad(s[:, i].sum(), inputs, retain_graph=True) for i in range(len(texts))]
    return [torch.stack(g, 1) for g in zip(*grads)]


def legrad_oracle(net, x, texts, apply_norm=True):
    "E^l of every layer: (L, B, T, n); the patches are the last 16 keys."
    h, maps = embed(net, x), []
    for blk in blocks(net):
        a, z = block(net, blk, h.detach(), leaf=True)
        pooled, f = head(net, z, apply_norm, leaf=True)
        g, = gradients(f, texts, [a if pooled is None else pooled])
        maps.append(g.relu().mean((2, 3))[..., -16:])
        h = z.detach()
    return torch.stack(maps)


def final_oracle(net, x, texts):
    "A of every block and the pooler, and the gradient of the final score with respect to each."
    h = embed(net, x).detach().requires_grad_()
    attentions = []
    for blk in blocks(net):
        a, h = block(net, blk, h)
        attentions.append(a)
    pooled, f = head(net, h)
    if pooled is not None: attentions.append(pooled)
    return [a.detach() for a in attentions], gradients(f, texts, attentions)


@each_tower
def test_oracle_is_the_model(name):
    net, x, texts, _ = make(name)
    h = embed(net, x)
    for blk in blocks(net): h = block(net, blk, h)[1]
    torch.testing.assert_close(head(net, h)[1], net(x))
    torch.testing.assert_close(as_tower(net).encode(x), net(x))


# ---- closed forms -----------------------------------------------------------------------------------------

@each_tower
def test_legrad(name):
    net, x, texts, _ = make(name)
    layers = layer_maps(net, x, texts).flatten(3)
    torch.testing.assert_close(layers, legrad_oracle(net, x, texts))
    torch.testing.assert_close(explain(net, x, texts, **RAW).flatten(2), layers.sum(0))


@pytest.mark.parametrize("name", ["siglip", "siglip2", "pooled_cls"])
def test_legrad_without_the_trunks_norm(name):
    net, x, texts, _ = make(name)
    layers = layer_maps(net, x, texts, apply_norm=False).flatten(3)
    torch.testing.assert_close(layers, legrad_oracle(net, x, texts, apply_norm=False))


@each_tower
def test_last_layer_maps(name):
    net, x, texts, prefix = make(name)
    attn, grads = final_oracle(net, x, texts)
    a, g = attn[-1], grads[-1]
    rows = slice(0, 1) if name in POOLED+CLASS_TOKEN else slice(prefix, None)
    keys = slice(-16, None)
    read = a[:, :, rows].mean(2)
    many = explain_many(net, x, texts, ["raw_attention", "attention_cam", "attention_cam:chefer"], **RAW)
    raw = read.mean(1)[:, None, keys].expand(-1, 3, -1)
    torch.testing.assert_close(many["raw_attention"].flatten(2), raw)
    paper = (g.mean((3, 4))[..., None]*read[:, None]).sum(2)[..., keys]
    torch.testing.assert_close(many["attention_cam"].flatten(2), paper)
    weight = g[..., rows, keys].mean((3, 4))[..., None]
    chefers = (weight*read[:, None]).mean(2)[..., keys].relu()
    torch.testing.assert_close(many["attention_cam:chefer"].flatten(2), chefers)


@each_tower
@pytest.mark.parametrize("start,scale", [("last", 100.), (1, 1.), (0, 100.)])
def test_chefer_and_rollout(name, start, scale):
    net, x, texts, prefix = make(name)
    attn, grads = final_oracle(net, x, texts)
    first, n = 2 if start == "last" else start, attn[0].shape[-1]
    eye = torch.eye(n, dtype=torch.float64)
    R = M = eye.expand(2, -1, -1)[:, None]
    for a, g in zip(attn[first:3], grads[first:3]):
        R = R+(a[:, None]*scale*g).relu().mean(2) @ R
        M = (a.mean(1)[:, None]+eye)/2 @ M
    if name in POOLED:
        pad = n-attn[3].shape[-1]
        row = F.pad((attn[3][:, None]*scale*grads[3]).relu().mean(2), (pad, 0))
        top = F.pad(attn[3].mean(1)[:, None], (pad, 0))
    else:
        row = top = eye[:1] if name in CLASS_TOKEN else eye[prefix:].mean(0, keepdim=True)
    maps = explain(net, x, texts, "chefer", start=start, scale=scale, **RAW).flatten(2)
    torch.testing.assert_close(maps, (row @ R)[:, :, 0, prefix:])
    rolled = explain(net, x, texts, "rollout", start=first, **RAW).flatten(2)
    torch.testing.assert_close(rolled, (top @ M)[:, :, 0, prefix:].expand(-1, 3, -1))


@pytest.mark.parametrize("name", ["open_clip", "layer_scale", "average", "registers"])
def test_final_score_ablation(name):
    net, x, texts, prefix = make(name)
    _, grads = final_oracle(net, x, texts)
    expected = torch.stack([g.relu().mean((2, 3))[..., prefix:] for g in grads])
    torch.testing.assert_close(layer_maps(net, x, texts, finalscore=True).flatten(3), expected)


@each_tower
def test_gradcam_and_simple_gradient(name):
    net, x, texts, prefix = make(name)
    h, z = embed(net, x), x.clone().requires_grad_()
    for l, blk in enumerate(blocks(net)):
        h = block(net, blk, h)[1]
        if l == 1: h = acts = h.detach().requires_grad_()
    g, = gradients(head(net, h)[1], texts, [acts])
    expected = torch.einsum("btd,bnd->btn", g.mean(2), acts[:, prefix:]).relu().detach()
    torch.testing.assert_close(explain(net, x, texts, "gradcam", layer=1, **RAW).flatten(2), expected)
    sg, = gradients(net(z), texts, [z])
    torch.testing.assert_close(explain(net, x, texts, "simple_gradient", **RAW), sg.abs().sum(2))


# ---- cases in which the published programs fail -------------------------------------------------------------

MAPS = ("legrad", "raw_attention", "attention_cam", "rollout", "chefer", "chefer:all", "gradcam", "simple_gradient")


@each_tower
def test_batch_and_texts_are_independent(name):
    "Published LeGrad averages over images (CLIP) or sums over prompts (SigLIP); here each pair has its own map."
    net, x, texts, _ = make(name)
    many = explain_many(net, x, texts, MAPS, **RAW)
    for m in MAPS:
        one = explain(net, x[1:], texts[2:], m, **RAW)
        torch.testing.assert_close(many[m][1:, 2:], one)


@pytest.mark.parametrize("name", ["open_clip", "siglip", "registers", "coca"])
def test_as_many_images_as_tokens(name):
    "With a layout guessed from shapes, attention would mix images without an error."
    net, _, texts, _ = make(name)
    n = embed(net, torch.zeros(1, 3, 32, 32, dtype=torch.float64)).shape[1]
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for m in ("legrad", "chefer:all"):
        torch.testing.assert_close(explain(net, x, texts, m, **RAW)[3:4], explain(net, x[3:4], texts, m, **RAW))


@each_tower
def test_other_shapes_leave_the_model_usable(name):
    net, x, texts, _ = make(name)
    before = copy.deepcopy(net.state_dict())
    wide = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = explain_many(net, wide, texts, MAPS, **RAW)
    assert all(m.shape == ((2, 3, 48, 80) if k == "simple_gradient" else (2, 3, 6, 10)) for k, m in many.items())
    net.load_state_dict(before)
    torch.testing.assert_close(explain(net, x, texts, **RAW).flatten(2), layer_maps(net, x, texts).sum(0).flatten(2))
    assert net(x).shape[0] == 2 and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_grid_is_row_major():
    "The map follows a bright patch through the image, row first."
    net, texts = open_clip_vit(), F.normalize(torch.randn(1, 32, dtype=torch.float64), dim=-1)
    with torch.no_grad(): net.positional_embedding.zero_()  # then the map moves exactly with the patch
    for row, col in ((0, 0), (1, 4), (3, 2)):
        x = torch.zeros(1, 3, 32, 48, dtype=torch.float64)
        x[..., 8*row:8*row+8, 8*col:8*col+8] = 2
        m = explain(net, x, texts, slope=1., **RAW)[0, 0]
        brightest = (m-m.median()).abs().flatten().argmax()
        assert divmod(int(brightest), 6) == (row, col)


@each_tower
def test_under_no_grad_and_inference_mode(name):
    net, x, texts, _ = make(name)
    expected = explain_many(net, x, texts, MAPS)
    with torch.no_grad(): no_grad = explain_many(net, x, texts, MAPS)
    with torch.inference_mode(): inference = explain_many(net, x.clone(), texts.clone(), MAPS)
    assert all(torch.equal(expected[m], no_grad[m]) and torch.equal(expected[m], inference[m]) for m in MAPS)
    assert not any(m.requires_grad for m in expected.values())
    assert all(p.grad is None for p in net.parameters())


@each_tower
def test_zero_range_maps_are_zeros(name):
    net, x, texts, _ = make(name)
    maps = explain_many(net, x, 0*texts, [m for m in MAPS if m not in ("raw_attention", "rollout")])
    assert all(m.eq(0).all() for m in maps.values())
    flat = explain(net, torch.zeros(1, 3, 8, 8, dtype=torch.float64), texts)  # one patch, so the map is constant
    assert flat.shape == (1, 3, 8, 8) and flat.eq(0).all()


@pytest.mark.parametrize("make_tower", [clip_cls, siglip_map])
def test_nothing_of_a_tower_changes(make_tower):
    net, e = make_tower()
    net.train()
    handle = net.register_forward_pre_hook(lambda *a: pytest.fail("a hook of the model ran"))
    before = {k: (id(v), v.clone(), v._version) for k, v in net.state_dict(keep_vars=True).items()}
    state = [(m.training, [*vars(m)]) for m in net.modules()]
    x = torch.randn(2, 3, 48, 32)
    explain_many(net, x, e["text"], MAPS)
    trainable_maps(net, x, e["text"])
    handle.remove()
    now = net.state_dict(keep_vars=True)
    assert all(before[k][::2] == (id(v), v._version) and torch.equal(before[k][1], v) for k, v in now.items())
    assert state == [(m.training, [*vars(m)]) for m in net.modules()]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_empty_prompt_correction():
    "The raw grid is zero where the map of the empty prompt exceeds 0.8 of its range; then min-max, then resize."
    net, e = siglip_map(torch.float64)
    plain = explain(net, e["image"], e["text"], **RAW)
    empty = explain(net, e["image"], e["empty"], **RAW)
    expected = torch.where(minmax(empty) > .8, 0, plain)
    torch.testing.assert_close(explain(net, e["image"], e["text"], empty=e["empty"], **RAW), expected)
    torch.testing.assert_close(explain(net, e["image"], e["text"], empty=e["empty"], empty_threshold=1., **RAW), plain)
    per_image = e["empty"][None].expand(2, -1, -1)
    torch.testing.assert_close(explain(net, e["image"], e["text"], empty=per_image, **RAW), expected)
    before_resize = explain(net, e["image"], e["text"], empty=e["empty"], normalize="grid")
    after_resize = explain(net, e["image"], e["text"], empty=e["empty"])
    assert (before_resize.amax((2, 3)) < 1).any() and after_resize.amax((2, 3)).eq(1).all()  # resizing lowers a peak


# ---- precision, scores, inputs ------------------------------------------------------------------------------

@pytest.mark.parametrize("make_tower", [clip_cls, siglip_map])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(make_tower, kind):
    "Compared with the same rounded weights in float32; the read-out and its gradient are float32 in both."
    net, e = make_tower()
    half = net.to(kind)
    rounded = copy.deepcopy(half).float()
    for m in ("legrad", "attention_cam", "chefer", "chefer:all"):
        maps, expected = (explain(t, e["image"], e["text"], m, **RAW) for t in (half, rounded))
        assert maps.dtype == torch.float32
        tol = .1 if kind is torch.bfloat16 else .02
        assert (maps-expected).abs().max() <= tol*expected.abs().max(), m
    tower, h = as_tower(half), torch.randn(1, 17, 64 if make_tower is clip_cls else 48, dtype=kind)
    assert tower.readout("model")(h).dtype == torch.float32
    assert tower.readout("model").vjp(h, torch.randn(1, 2, tower.dim)).dtype == torch.float32


def test_more_texts_than_dimensions():
    "D basis gradients serve any number of texts: 40 texts together give the maps of single texts."
    net, e = clip_cls()
    texts = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    for m in ("simple_gradient", "legrad", "legrad:released", "chefer:all"):
        maps = explain(net, e["image"], texts, m, chunk=7, **RAW)
        expected = torch.cat([explain(net, e["image"], texts[i:i+1], m, **RAW) for i in (0, 39)], 1)
        torch.testing.assert_close(maps[:, [0, -1]], expected, atol=1e-6, rtol=1e-4)


def test_benchmark_compares_like_with_like():
    "The plain implementations that tests/bench measures give the same maps as the package."
    spec = importlib.util.spec_from_file_location("bench", Path(__file__).parent/"bench"/"explainers.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    net = sharp(VisionTransformer(32, 8, 64, 9, 4, 4., output_dim=32)).float()  # the Grad-CAM layer is the ninth
    x, texts = torch.randn(1, 3, 32, 32), F.normalize(torch.randn(3, 32), dim=-1)
    for case, plain in {(case, plain) for _, case, plain, _ in bench.COMPARE if plain in bench.PLAIN}:
        maps, expected = bench.CASES[case](net, x, texts), bench.PLAIN[plain](net, x, texts).flatten(1).detach()
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4*expected.abs().max().item())


def test_class_scores():
    "Class indices and class weights both explain the logit."
    net, e = class_vit(torch.float64)
    methods = [m for m in EXPLAINERS if m != "lrp"]
    by_index = explain_many(net, e["image"], e["classes"], methods, score="class", **RAW)
    by_weight = explain_many(net, e["image"], net.head.weight[e["classes"]].detach(), methods, score="dot", **RAW)
    assert all(torch.equal(by_index[m], by_weight[m]) for m in methods)
    x = e["image"].double().requires_grad_()
    g, = torch.autograd.grad(net.eval()(x)[0, e["classes"][0]], x)
    torch.testing.assert_close(by_index["simple_gradient"][0, 0], g.abs().sum(1)[0])
    per_image = explain(net, e["image"], e["classes"][None], score="class", **RAW)
    assert torch.equal(per_image, by_index["legrad"])


def test_pixels_of_a_clip_with_a_timm_tower():
    "A Clip normalises its input, so the map of an image in pixels is the map of the normalised image."
    net, e = siglip_map()
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = net
    clip = Clip(Model(), "siglip", (.5,)*3, (.5,)*3)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(explain(clip, x, e["text"]), explain(net, 2*x-1, e["text"]))


def test_trainable_maps_train_a_tower():
    "One backward pass through a closed form reaches every weight below the read-out of the last layer."
    for make_tower in (clip_cls, siglip_map):
        net, e = make_tower()
        frozen = net.requires_grad_(False)
        with pytest.raises(ValueError, match="closed form"): trainable_maps(frozen, e["image"], e["text"])
        net.requires_grad_(True)
        maps = trainable_maps(net, e["image"], e["text"])
        torch.testing.assert_close(maps.detach(), explain(net, e["image"], e["text"], **RAW))
        maps.sum().backward()
        no_grad = [k for k, p in net.named_parameters() if p.grad is None or p.grad.eq(0).all()]
        assert not [k for k in no_grad if "attn_pool" not in k and "bias" not in k and "ln_post" not in k], no_grad


@pytest.mark.parametrize("name,method,error", [
    ("siglip", "grad_eclip", "class token"), ("average", "textspan", "class token"),
    ("coca", "maskclip", "class token"),
    ("siglip", dict(readout="cls"), "no read-out 'cls'"), ("coca", dict(readout="mean"), "no read-out 'mean'"),
    ("siglip", dict(finalscore=True), "layers=\\[-1\\]")])
def test_methods_that_a_tower_does_not_support_raise(name, method, error):
    net, x, texts, _ = make(name)
    options = dict(method=method) if isinstance(method, str) else method
    with pytest.raises(TypeError, match=error): explain(net, x, texts, **options)


@pytest.mark.parametrize("kw,layer", [
    (dict(qk_norm=True), "attn.q_norm"), (dict(mlp_layer=timm.layers.SwiGLU), "SwiGLU"),
    (dict(attn_layer="diff"), "DiffAttention"),
    (dict(block_fn=timm.models.vision_transformer.ParallelScalingBlock), "ParallelScalingBlock")])
def test_unknown_blocks_raise_in_attention_methods_only(kw, layer):
    net = timm_vit(**kw)
    x, texts = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.randn(2, 48, dtype=torch.float64)
    for m in ("legrad", "rollout", "chefer"):
        with pytest.raises(TypeError, match=layer): explain(net, x, texts, m)
    assert explain_many(net, x, texts, ["simple_gradient", "gradcam"])["gradcam"].shape == (1, 2, 32, 32)


def test_unknown_readouts_raise():
    for kw, layer in ((dict(global_pool="max"), "max"), (dict(norm_layer="rmsnorm"), "RmsNorm"),
                      (SIGLIP | dict(norm_layer="rmsnorm"), "RmsNorm")):
        with pytest.raises(TypeError, match=layer): as_tower(timm_vit(**kw))
    with pytest.raises(TypeError, match="Distilled"): as_tower(timm.create_model("deit_tiny_distilled_patch16_224"))
    swin = timm.models.SwinTransformer(img_size=32, depths=(1,), num_heads=(2,), embed_dim=8, window_size=4)
    with pytest.raises(TypeError, match="SwinTransformer"): as_tower(swin)
