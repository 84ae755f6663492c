"All arrays of golden/explainers, in single and double precision, within the tolerances of its README."
import functools

import pytest
import torch
import torch.nn.functional as F
from towers import class_vit, clip_cls, siglip_map

from reclip_nb.explain import explain, layer_maps, open_tap
from reclip_nb.explain.attention import reading, unroll
from reclip_nb.explain.base import block_state
from reclip_nb.explain.lrp import start_relevance, through_block, trace
from reclip_nb.models.blocks import attention_weights

RAW = dict(size=None, normalize="none")
PRECISION = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
load = functools.lru_cache(None)(lambda make, dtype: make(dtype))


def close(actual, expected, tol=1e-4):
    "The largest difference is at most `tol` times the largest expected value."
    expected = expected.to(actual)
    assert actual.shape == expected.shape
    assert (actual-expected).abs().max() <= tol*expected.abs().max().clamp(min=1e-12)


def legrad_cases(readout):
    "LeGrad keys of clip_cls for one read-out."
    return {f"legrad.{readout}.all.grid": ("legrad", dict(readout=readout))} | {
        f"legrad.{readout}.slope{s}.grid": ("legrad", dict(readout=readout, slope=s)) for s in (.1, .5, .7, 1.)}


CLS = legrad_cases("cls") | legrad_cases("mean") | {
    "rawattn.grid": ("raw_attention", {}),
    "rollout.start0.grid": ("rollout", dict(start=0)), "rollout.start1.grid": ("rollout", {}),
    "attncam.all.grid": ("attention_cam", {}), "attncam.cls.grid": ("attention_cam:chefer", {}),
    "chefer.last.scale1.grid": ("chefer", dict(scale=1)), "chefer.all.scale1.grid": ("chefer:all", dict(scale=1)),
    "chefer.all.scale100.grid": ("chefer:all", {}),
    **{f"gradcam.block{l}.{n}.grid": ("gradcam", dict(layer=l, include_cls=n == "withcls"))
       for l in range(3) for n in ("withcls", "nocls")},
    "gradeclip.heads.grid": ("grad_eclip", {}), "gradeclip.heads.noksim.grid": ("grad_eclip", dict(ksim=False)),
    "gradeclip.heads.n2.grid": ("grad_eclip", dict(n_layers=2)),
    "gradeclip.merged.grid": ("grad_eclip:released", {}),
    "gradeclip.merged.projqk.grid": ("grad_eclip:script", {}),
    "gradeclip.merged.n2.grid": ("grad_eclip:released", dict(n_layers=2)),
    "maskclip.grid": ("maskclip", {}), "textspan.exact.grid": ("textspan", {}),
    "textspan.prs.grid": ("textspan", dict(mode="prs")),
    "sg.px": ("simple_gradient", {}), "sg.maxc.px": ("simple_gradient", dict(reduce="max")),
    "smoothgrad.absofmean.px": ("smoothgrad", {}), "smoothgrad.meanofabs.px": ("smoothgrad", dict(mode="meanofabs")),
    "ig.px": ("integrated_gradients", {})}
CLS_SCALED = {  # min-max scaled pixel maps: method, options, largest difference
    "legrad.mean.all.px": ("legrad:released", dict(layers="all"), 2e-5),
    "legrad.mean.last2.px": ("legrad:released", {}, 2e-5),
    "gradcam.lib.block1.px": ("gradcam:aft", {}, 1e-4), "gradcam.lib.block2.px": ("gradcam:aft", dict(layer=-1), 1e-4),
    "gradcam.lib.lastln1.px": ("gradcam:aft", dict(layer=-1, at="norm1"), 1e-4),
    "gradcam.lib.multi.px": ("gradcam:aft", dict(layer=[0, 1]), 1e-4)}
CLS_LAYERS = {"legrad.cls.layers": dict(readout="cls"), "legrad.mean.layers": dict(readout="mean"),
              "legrad.finalscore.layers": dict(finalscore=True)}

NONORM, ALL = dict(apply_norm=False), dict(start=0, scale=1)
POOL = {
    "legrad.nonorm.grid": ("legrad", NONORM), "legrad.norm.grid": ("legrad", {}),
    "legrad.nonorm.slope0.5.grid": ("legrad", NONORM | dict(slope=.5)),
    "legrad.norm.slope0.5.grid": ("legrad", dict(slope=.5)),
    "rawattn.pool.grid": ("raw_attention", {}), "attncam.pool.grid": ("attention_cam", {}),
    "chefer.pool.plain.grid": ("chefer", ALL),
    "chefer.pool.normalized.grid": ("chefer", ALL | dict(pooler="normalized")),
    **{f"gradcam.block{l}.grid": ("gradcam", dict(layer=l)) for l in range(3)}, "sg.px": ("simple_gradient", {})}
POOL_SCALED = {f"legrad.ref.{layers}.{kind}.px": (layers, kind) for layers in ("all", "last2")
               for kind in ("plain", "corrected")}
POOL_LAYERS = {"legrad.nonorm.layers": NONORM, "legrad.norm.layers": {}}

CLASS = {
    "rollout.start0": ("rollout", dict(start=0)), "rollout.start1": ("rollout", {}), "rawattn": ("raw_attention", {}),
    "chefercam.all": ("chefer:all", {}), "partial_lrp": ("partial_lrp", {}),
    "transattr.start0": ("transformer_attribution", dict(start=0)), "transattr.start1": ("transformer_attribution", {}),
    "lrp_rollout.start0": ("transformer_attribution:lrp_rollout", dict(start=0)),
    "lrp_rollout.start1": ("transformer_attribution:lrp_rollout", {})}
SEPARATE_TESTS = {clip_cls: {"legrad.cls.gradrow"}, siglip_map: {"legrad.nonorm.empty.grid"},
            class_vit: {"attncam.cls.minmaxed", "full_lrp.px", "attn_relevance", "attn_grad"}}


@pytest.mark.parametrize("make,tables", [(clip_cls, (CLS, CLS_SCALED, CLS_LAYERS)),
                                         (siglip_map, (POOL, POOL_SCALED, POOL_LAYERS)), (class_vit, (CLASS,))])
def test_every_expected_array_has_a_test(make, tables):
    expected = {k[2:] for k in load(make, torch.float32)[1] if k.startswith("e.")}
    assert set().union(*tables, SEPARATE_TESTS[make]) == expected


# ---- class token ----------------------------------------------------------------------------------------

@PRECISION
@pytest.mark.parametrize("key", CLS)
def test_class_token(dtype, key):
    tower, e = load(clip_cls, dtype)
    method, options = CLS[key]
    if method == "smoothgrad": options = options | dict(noise=e["noise"])
    maps, expected = explain(tower, e["image"], e["text"], method, **options, **RAW), e[f"e.{key}"]
    close(maps, expected[:, None].expand_as(maps) if expected.ndim == 3 else expected)


@PRECISION
@pytest.mark.parametrize("key", CLS_SCALED)
def test_class_token_scaled(dtype, key):
    tower, e = load(clip_cls, dtype)
    method, options, tol = CLS_SCALED[key]
    assert (explain(tower, e["image"], e["text"], method, **options)-e[f"e.{key}"]).abs().max() <= tol


@PRECISION
@pytest.mark.parametrize("key", CLS_LAYERS)
def test_class_token_layers(dtype, key):
    tower, e = load(clip_cls, dtype)
    close(layer_maps(tower, e["image"], e["text"], **CLS_LAYERS[key]), e[f"e.{key}"])


@PRECISION
def test_class_token_signed_gradients(dtype):
    "ds^l/dA^l at the class token's row, from which all last-layer methods are computed."
    tower, e = load(clip_cls, dtype)
    with torch.no_grad():
        tap, texts = open_tap(tower, e["image"], e["text"])
        close(torch.stack([reading(tap, l).grad(texts)[:, :, :, 0] for l in range(3)]), e["e.legrad.cls.gradrow"])


# ---- pooler ---------------------------------------------------------------------------------------------

@PRECISION
@pytest.mark.parametrize("key", POOL)
def test_pooler(dtype, key):
    tower, e = load(siglip_map, dtype)
    method, options = POOL[key]
    maps, expected = explain(tower, e["image"], e["text"], method, **options, **RAW), e[f"e.{key}"]
    close(maps, expected[:, None].expand_as(maps) if expected.ndim == 3 else expected)


@PRECISION
@pytest.mark.parametrize("key", POOL_SCALED)
def test_pooler_as_published(dtype, key):
    "Several prompts at once; the published code gives one map for all of them."
    tower, e = load(siglip_map, dtype)
    layers, kind = POOL_SCALED[key]
    options = {} if layers == "last2" else dict(layers="all")
    if kind == "corrected": options["empty"] = e["empty"]
    maps = explain(tower, e["image"], e["text"], "legrad:released", normalize="grid", **options)
    assert (maps-e[f"e.{key}"]).abs().max() <= 2e-5


@PRECISION
@pytest.mark.parametrize("key", POOL_LAYERS)
def test_pooler_layers(dtype, key):
    tower, e = load(siglip_map, dtype)
    close(layer_maps(tower, e["image"], e["text"], **POOL_LAYERS[key]), e[f"e.{key}"])


@PRECISION
def test_pooler_empty_prompt(dtype):
    tower, e = load(siglip_map, dtype)
    close(explain(tower, e["image"], e["empty"], apply_norm=False, **RAW), e["e.legrad.nonorm.empty.grid"])


# ---- classifier -----------------------------------------------------------------------------------------

@PRECISION
@pytest.mark.parametrize("key", CLASS)
def test_classifier(dtype, key):
    tower, e = load(class_vit, dtype)
    method, options = CLASS[key]
    maps = explain(tower, e["image"], e["classes"], method, score="class", **options, **RAW)[0]
    close(maps, e[f"e.{key}"].expand_as(maps))


@PRECISION
def test_classifier_attention_cam_without_range(dtype):
    tower, e = load(class_vit, dtype)
    maps = explain(tower, e["image"], e["classes"], "attention_cam:chefer", score="class", size=None)[0]
    assert (maps-e["e.attncam.cls.minmaxed"].nan_to_num()).abs().max() <= 2e-5  # constant maps: NaN there, 0 here


@PRECISION
def test_classifier_relevance_and_gradient_of_attention(dtype):
    tower, e = load(class_vit, dtype)
    with torch.no_grad():
        tap, t = open_tap(tower, e["image"], e["classes"], "class")
        graph, r = unroll(tap, 0), start_relevance(tap, t)
        relevance, grads = [], []
        for l, u in reversed([*enumerate(graph.gradients(t))]):
            r, ra = through_block(trace(tap, l), r)
            relevance.append(ra[0, :, :, 0])
            u, v = u[0, :, 0].unflatten(-1, (4, -1)), graph.parts[l][2][0].unflatten(-1, (4, -1))
            grads.append(torch.einsum("the,nhe->thn", u, v))
    close(torch.stack(relevance[::-1], 1), e["e.attn_relevance"])
    close(torch.stack(grads[::-1], 1), e["e.attn_grad"])


def test_classifier_full_lrp_within_its_conditioning():
    "A change of the image in its last float32 digit changes this map as much as two programs differ."
    tower, e = load(class_vit, torch.float64)
    relevance = lambda x: explain(tower, x, e["classes"], "lrp", score="class", **RAW)[0]
    expected = e["e.full_lrp.px"].double()
    maps, top = relevance(e["image"].double()), expected.abs().max()
    noise = torch.randn(e["image"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    change = (relevance(e["image"]*(1+2**-24*noise))-maps).abs().max()
    assert change > 1e-3*top and (maps-expected).abs().max() < .03*top
    assert ((maps-expected).abs() <= 1e-4*top).double().mean() > .9


# ---- the towers themselves ------------------------------------------------------------------------------

@PRECISION
@pytest.mark.parametrize("make", [clip_cls, siglip_map])
def test_states_attention_and_embedding(dtype, make):
    tower, e = load(make, dtype)
    with torch.no_grad():
        tap, texts = open_tap(tower, e["image"], e["text"])
        states = [block_state(tap, l) for l in range(3)]
        close(torch.stack([attention_weights(b.q, b.k, 4) for b in states]), e["attn"])
        close(torch.stack([b.z for b in states]), e["hidden"])
        f = tap.tower.head(tap.state(3))
        close(f, e["feat"])
        close(tap.scores(f, texts), e["cos"])
        close(F.normalize(f, dim=-1), F.normalize(tower.eval()(e["image"].to(dtype)), dim=-1))
        if make is siglip_map: close(reading(tap, -1).weights(), e["attn_pool"])


@PRECISION
def test_logits(dtype):
    tower, e = load(class_vit, dtype)
    with torch.no_grad():
        tap, weights = open_tap(tower, e["image"], torch.arange(5), "class")
        close(tap.scores(tap.tower.head(tap.state(3)), weights)+tower.head.bias, e["logits"])
