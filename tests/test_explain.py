"Explanation maps compared with the golden arrays of the reference programs; models must stay unchanged."
import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import aft_clip, golden
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import Transformer, VisionTransformer
from towers import clip_cls

from reclip_nb.explain import EXPLAINERS, PRESETS, clip99, explain, explain_many, input_gradient, open_tap
from reclip_nb.explain.cam import qk_similarity

RAW = dict(size=None, normalize="none")
LRP = ("transformer_attribution", "partial_lrp", "lrp")  # these explain logits
METHODS = [m for m in EXPLAINERS if m not in LRP]
VARIANTS = [m for m in PRESETS if m.split(":")[0] not in LRP and m != "gradcam:legrad"]  # which needs nine blocks
ANY_TOWER = ("simple_gradient", "smoothgrad", "integrated_gradients", "gradcam", "random", "center")
QG = pytest.mark.parametrize("qg", [1, 0])
VIEWS = pytest.mark.parametrize("qg,who,view", [
    *((qg, "student", v) for qg in (1, 0) for v in ("sq0", "sq1", "wide")),
    (1, "teacher", "sq0"), (1, "teacher", "wide")])


def close(actual, expected, tol):
    "The largest difference is at most `tol` times the largest expected value."
    expected = expected.to(actual)
    assert actual.shape == expected.shape
    assert (actual-expected).abs().max() <= tol*expected.abs().max().clamp(min=1e-12)


# ---- golden/aft: float64 ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def aft():
    return golden("aft", "inputs.npz"), golden("aft", "saliency.npz")


def setting(aft, qg, who, view):
    "Clip, its images (1, 3, H, W) and texts (3, D)."
    clip = aft_clip(who == "student", qg)
    images = aft[0]["wide_u8"] if view == "wide" else aft[0]["x_u8"][int(view[-1])][None]
    with torch.no_grad(): return clip, images.double()/255, clip.encode_text(aft[0]["text_tokens"])


@VIEWS
@pytest.mark.parametrize("h", [1, 4])
def test_aft_grad_eclip(aft, qg, who, view, h):
    clip, x, t = setting(aft, qg, who, view)
    heads, name = "model" if h == 4 else "merged", f"qg{qg}_{who}_{view}_geclip"
    kw = dict(heads=heads, antialias=False, **RAW)
    cases = {f"nb_h{h}_n1": {}, f"nb_h{h}_n2": dict(n_layers=2), f"script_h{h}_ksim1": dict(projqk=True),
             f"script_h{h}_ksim0": dict(ksim=False)}
    for key, options in cases.items():
        close(explain(clip, x, t, "grad_eclip", **options, **kw)[0], aft[1][f"{name}_{key}"], 1e-6)


@VIEWS
@pytest.mark.parametrize("h", [1, 4])
def test_aft_gradcam_and_similarity(aft, qg, who, view, h):
    clip, x, t = setting(aft, qg, who, view)
    heads = "model" if h == 4 else "merged"
    for source in ("nb", "script"):  # the input of the last block is the output of the previous one
        maps = explain(clip, x, t, "gradcam", layer=-2, heads=heads, antialias=False, **RAW)[0]
        close(maps, aft[1][f"qg{qg}_{who}_{view}_gradcam_{source}_h{h}"], 1e-6)
    tap, texts = open_tap(clip, x, t, antialias=False)
    blk = tap.tower.view(-1)
    q, k, _ = blk.qkv(blk.norm1(tap.state(2)))
    close(qk_similarity(q, k).view(tap.tower.grid), aft[1][f"qg{qg}_{who}_{view}_qkweight_h{h}"], 1e-6)
    f = tap.tower.tail(tap.state(2), 2, 1 if h == 1 else None)
    close(tap.scores(f, texts)[0], aft[1][f"qg{qg}_{who}_{view}_cos_h{h}"], 1e-9)


@pytest.mark.parametrize("qg,who", [(1, "student"), (1, "teacher"), (0, "student")])
def test_aft_true_cosines(aft, qg, who):
    clip, _, t = setting(aft, qg, who, "sq0")
    x = aft[0]["x_u8"].double()/255
    with torch.no_grad(): close(clip.encode_image(x) @ t.T, aft[1][f"qg{qg}_{who}_cos_true"], 1e-9)
    tap, texts = open_tap(clip, x, t)
    close(tap.scores(tap.tower.head(tap.state(3)), texts), aft[1][f"qg{qg}_{who}_cos_true"], 1e-9)


@QG
@pytest.mark.parametrize("view", ["sq0", "sq1"])
def test_aft_simple_gradient_and_library_gradcam(aft, qg, view):
    clip, x, t = setting(aft, qg, "student", view)
    g = input_gradient(clip.visual, clip.normalize(x), t[None, :2])[0]
    for p in range(2):
        key = f"qg{qg}_sg_img{view[-1]}_txt{p}"
        close(g[p][None], aft[1][f"{key}_grad_norminput"], 1e-6)
        sg = explain(clip, x, t[p][None], "simple_gradient", space="normalized", **RAW)[0, 0]
        close(clip99(sg), aft[1][f"{key}_clip99"], 1e-6)
        cam = explain(clip, x, t[p][None], "gradcam:aft")[0, 0]
        close(cam, aft[1][f"qg{qg}_gradcam_aftlib_img{view[-1]}_txt{p}"], 1e-4)


# ---- a tower in float32 and float64 -------------------------------------------------------------------

@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["f32", "f64"])
def cls(request):
    return clip_cls(request.param)


# ---- layouts, towers, resolutions ---------------------------------------------------------------------

@pytest.mark.parametrize("flag", [True, False], ids=["3.x", "before 2.25"])
def test_token_first_layout_gives_the_same_maps(cls, flag):
    "17 images of 17 tokens: with a layout guessed from shapes, attention would mix images."
    tower, e = cls
    token_first = copy.deepcopy(tower)
    token_first.transformer = Transformer(64, 3, 4, batch_first=False).to(next(tower.parameters()).dtype)
    token_first.load_state_dict(tower.state_dict())
    if not flag: del token_first.transformer.batch_first
    x = torch.randn(17, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, maps = (explain_many(t, x, e["text"], METHODS+VARIANTS) for t in (tower, token_first))
    for name in METHODS+VARIANTS: torch.testing.assert_close(maps[name], expected[name], atol=2e-4, rtol=1e-4)


def resnet():
    torch.manual_seed(0)
    net = ModifiedResNet((1, 1, 1, 1), 16, 4, image_size=64, width=8)
    for name, p in net.named_parameters():
        if name.endswith("bn3.weight"): torch.nn.init.ones_(p)
    return net


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1])
def test_resnet_gradcam_against_autograd(layer):
    net, x, t = resnet(), torch.randn(2, 3, 64, 64), F.normalize(torch.randn(3, 16), dim=-1)
    maps = explain(net.train(), x, t, "gradcam", layer=layer, **RAW)
    ref = copy.deepcopy(net).eval()
    states = [ref.stem(x)]
    for block in (ref.layer1, ref.layer2, ref.layer3, ref.layer4): states.append(block(states[-1]))
    z, s = states[1:][layer], F.normalize(ref.attnpool(states[-1]), dim=-1) @ t.T
    for i in range(3):
        g, = torch.autograd.grad(s[:, i].sum(), z, retain_graph=True)
        close(maps[:, i], (g.mean((2, 3), keepdim=True)*z).sum(1).relu().detach(), 1e-4)


def test_position_embedding_is_resampled_on_a_copy(cls):
    tower, e = cls
    before = tower.positional_embedding.detach().clone()
    x = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    maps = {a: explain(tower, x, e["text"], "grad_eclip", antialias=a, **RAW) for a in (True, False)}
    assert maps[True].shape == (2, 3, 5, 7) and not torch.equal(maps[True], maps[False])
    assert torch.equal(tower.positional_embedding, before)


# ---- the model is not changed -------------------------------------------------------------------------

def fingerprint(model):
    "Values of all tensors, and everything else about tensors and modules that a call could change."
    tensors = [*model.named_parameters(), *model.named_buffers()]
    values = [t.detach().clone() for _, t in tensors]
    flags = [(n, id(t), t._version, t.requires_grad, t.grad is None) for n, t in tensors]
    modules = [(n, m.training, [len(getattr(m, h)) for h in vars(m) if h.endswith("_hooks")], [*vars(m)])
               for n, m in model.named_modules()]
    return values, (flags, modules, torch.is_grad_enabled())


def same(a, b):
    "Whether two fingerprints are equal."
    return a[1] == b[1] and all(map(torch.equal, a[0], b[0]))


@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "mixed"])
def test_nothing_of_the_model_changes(mode):
    calls = []
    for model, shape in ((aft_clip(True, 1), (2, 3, 32, 48)), (resnet(), (2, 3, 64, 96))):
        model.train(mode != "eval")
        if mode == "frozen": model.requires_grad_(False)
        if mode == "mixed": next(model.children()).eval()
        next(model.modules()).register_forward_hook(lambda *a: calls.append(1))
        for m in model.modules(): m.register_forward_pre_hook(lambda *a: calls.append(1))
        calls.clear()
        before, x = fingerprint(model), torch.rand(shape, dtype=next(model.parameters()).dtype)
        vit = hasattr(model, "visual")
        texts = torch.randn(3, 32 if vit else 16)
        methods = METHODS if vit else ANY_TOWER
        explain_many(model, x, texts, methods)
        with torch.no_grad(): explain_many(model, x, texts, methods)
        with torch.inference_mode(): explain_many(model, x.clone(), texts.clone(), methods)
        input_gradient(model, x, texts.expand(2, -1, -1).to(x), create_graph=True)
        for bad in (dict(method="gradcam", layer=99), dict(method="nope"), dict(method="center", space="?")):
            with pytest.raises(ValueError): explain(model, x, texts, **bad)
        assert same(before, fingerprint(model)) and not calls and not x.requires_grad
        assert all(p.grad is None for p in model.parameters())


def test_an_error_inside_a_method_leaves_the_model_unchanged():
    model = aft_clip(True, 1).train()
    calls = []
    def broken(*args):
        calls.append(1)
        raise RuntimeError("stop")
    model.visual.transformer.resblocks[0].mlp.gelu.forward = broken  # in vars(), so the read-only view inherits it
    before = fingerprint(model)
    for method in ("simple_gradient", "gradcam", "grad_eclip", "legrad", "rollout", "textspan"):
        with pytest.raises(RuntimeError, match="stop"):
            explain(model, torch.rand(1, 3, 32, 32), torch.randn(2, 32), method)
    assert calls and same(before, fingerprint(model))


# ---- contract -----------------------------------------------------------------------------------------

def test_many_equals_one_by_one_and_is_per_image(cls):
    tower, e = cls
    methods = [m for m in METHODS+VARIANTS if m not in ("random", "smoothgrad", "textspan:published")]
    many = explain_many(tower, e["image"], e["text"], methods)
    for m in methods:
        for b in range(2):
            for i in range(3):
                one = explain(tower, e["image"][b][None], e["text"][i][None], m)
                torch.testing.assert_close(many[m][b, i], one[0, 0], atol=2e-4, rtol=0)


def test_texts_per_image_and_chunks(cls):
    tower, e = cls
    texts = torch.stack([e["text"], e["text"].flip(0)])
    for m in ("simple_gradient", "gradcam", "grad_eclip", "legrad", "legrad:released", "chefer:all"):
        maps = explain(tower, e["image"], texts, m, chunk=2)
        ref = explain(tower, e["image"], e["text"], m)
        torch.testing.assert_close(maps[0], ref[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(maps[1], ref[1].flip(0), atol=1e-4, rtol=0)


def test_feature_consistency_score(aft):
    "The score of the EPG loss: a frozen embedding per image, gradients in pixel space."
    student, teacher = aft_clip(True, 1), aft_clip(False, 1)
    x, expected = aft[0]["x_u8"].double()/255, golden("aft", "epg.npz")
    with torch.no_grad(): ref = teacher.encode_image(x)[:, None]
    close(explain(student, x, ref, "simple_gradient", **RAW)[:, 0], expected["qg1_saliency_map"], 1e-6)
    close(input_gradient(student, x, ref, create_graph=True)[:, 0].detach(), expected["qg1_grad_x"], 1e-6)


def test_zero_range_and_scores(cls):
    tower, e = cls
    zero = torch.zeros_like(e["text"])
    for m in [m for m in METHODS if m not in ("random", "center", "raw_attention", "rollout")]+VARIANTS:
        assert explain(tower, e["image"], zero, m).eq(0).all()
    raw = explain(tower, e["image"], e["text"], "grad_eclip", score="dot", **RAW)
    cosine = explain(tower, e["image"], e["text"], "grad_eclip", **RAW)
    assert torch.isfinite(raw).all() and not torch.allclose(raw, cosine)


def test_size_and_normalize(cls):
    tower, e = cls
    args = tower, e["image"], e["text"], "grad_eclip"
    assert explain(*args).shape == (2, 3, 32, 32) and explain(*args, size=None).shape == (2, 3, 4, 4)
    small = explain(*args, size=(10, 20))
    assert small.shape == (2, 3, 10, 20) and small.amin((-2, -1)).eq(0).all()
    empty = explain(*args, **RAW).amax((-2, -1)) == 0  # no patch has a positive value
    torch.testing.assert_close(small.amax((-2, -1)), (~empty).to(small))


@pytest.mark.parametrize("change,error", [
    (dict(method="grad_clip"), "known are"), (dict(images=torch.full((1, 3, 32, 32), 1.5)), "allowed is"),
    (dict(images=torch.full((1, 3, 32, 32), torch.nan)), "values span"),
    (dict(images=torch.rand(3, 32, 32)), "B,3,H,W"),
    (dict(images=torch.rand(1, 3, 30, 32)), "cannot be tiled"), (dict(texts=torch.rand(2, 16)), "16 wide"),
    (dict(texts=torch.rand(2, 2, 32)), "B = 1"), (dict(texts=torch.full((1, 32), torch.nan)), "NaN"),
    (dict(normalize="max"), "minmax"), (dict(score="angle"), "cosine"),
    (dict(method="gradcam", layer=3), "3 blocks"),
    (dict(method="grad_eclip", n_layers=4), "3 blocks"), (dict(method="gradcam", at="input"), "norm1")])
def test_errors(change, error):
    given = dict(images=torch.rand(1, 3, 32, 32), texts=torch.rand(2, 32), method="grad_eclip") | change
    with pytest.raises(ValueError, match=error): explain(aft_clip(False, 1), **given)


def test_compiled_and_half_precision_models(cls):
    tower, e = cls
    for method in ("grad_eclip", "gradcam", "simple_gradient"):
        expected = explain(tower, e["image"], e["text"], method)
        torch.testing.assert_close(explain(torch.compile(tower), e["image"], e["text"], method), expected)
        half = explain(copy.deepcopy(tower).bfloat16(), e["image"], e["text"], method)
        assert half.dtype == torch.float32 and (half-expected).abs().mean() < .05


def test_custom_blocks_are_refused_inside_and_explained_outside():
    torch.manual_seed(0)
    tower = VisionTransformer(32, 8, 64, 2, 4, 4., output_dim=32, qk_norm=True)
    x, t = torch.randn(1, 3, 32, 32), torch.randn(2, 32)
    with pytest.raises(TypeError, match="attn.ln_q"): explain(tower, x, t, "grad_eclip")
    assert explain_many(tower, x, t, ["simple_gradient", "gradcam"])["gradcam"].shape == (1, 2, 32, 32)
