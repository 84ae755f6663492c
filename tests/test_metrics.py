"Localisation metrics against the stored cases, scikit-learn and their own identities."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from reclip_nb.benchmarks import metrics as M
from reclip_nb.benchmarks import segmentation as S
from reclip_nb.explain.base import minmax
from reclip_nb.study.statistics import summarise, wilson

GOLDEN = Path(__file__).parent/"golden"/"explainers"
CASES = json.loads((GOLDEN/"metrics.json").read_text())["cases"]
POINTS = json.loads((GOLDEN/"pointwise_miou.json").read_text())


def same(value, expected):
    "Equality up to rounding; null in the file is NaN here."
    np.testing.assert_allclose(np.ravel(value), np.ravel(np.nan if expected is None else expected), atol=1e-9)


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request):
    "Map (1,H,W) float64, mask (1,H,W), expected values."
    saliency = torch.tensor(np.array(request.param["saliency"], dtype=float))[None]
    return saliency, torch.tensor(request.param["mask"])[None], request.param["expected"]


@pytest.fixture
def rng(): return torch.Generator().manual_seed(0)


def random_pair(rng, n=32, size=20, f=.25):
    return torch.rand(n, size, size, generator=rng), torch.rand(n, size, size, generator=rng) < f


# stored cases

def test_pointing_game(case):
    s, m, e = case
    for ties in ("first", "any", "mean"): same(M.pointing_game(s, m, ties=ties), e["pg"][ties])
    for tolerance in (1, 2): same(M.pointing_game(s, m, tolerance), e[f"pg_tol{tolerance}"])


def test_energy(case):
    s, m, e = case
    same(M.energy_pointing(s, m), e["energy"])
    same(M.energy_pointing(minmax(s), m), e["energy_after_minmax"])


def test_average_precision(case):
    s, m, e = case
    same(M.average_precision(s, m), e["ap"])


def test_top20(case):
    s, m, e = case
    same(M.pixel_accuracy(s, m), e["top20"]["pa"])
    same(M.iou(s, m), e["top20"]["iou"])
    assert M.topk_mask(s).sum() == (e["top20"]["k"] or 0)


def test_mean_threshold(case):
    s, m, e = case
    segmentation, e = S.MeanThresholdSegmentation(), e["mean_threshold"]
    segmentation.update(s, m)
    result = segmentation.compute()
    same(result["pixel_accuracy"], e["pa"])
    if e["pa"] is None:
        assert result["n"] == 0 and result["undefined"] == 1 and np.isnan(result["value"])
        return
    assert segmentation.inter.tolist() == e["inter"] and segmentation.union.tolist() == e["union"]
    same(result["iou_background"], e["iou_bg"])
    same(result["iou_foreground"], e["iou_fg"])
    same(result["value"], (e["iou_bg"] + e["iou_fg"])/2)
    if e["ap2"] != "unstable": same(result["average_precision"], e["ap2"])


def test_pointwise_miou():
    expected = POINTS["expected"]
    for average, value in (("class", expected["p_miou_class"]), ("image", expected["p_miou_per_image_fg"])):
        score = S.PointwiseMIoU(POINTS["threshold"], average)
        for item in POINTS["items"]:
            heat = np.array(item["heatmap"])
            score.update(heat[None], [item["points"]], [item["class_id"]])
            counts = S.point_counts(heat, item["points"], POINTS["threshold"])
            assert dict(zip(("tp", "fp", "fn"), counts.tolist())).items() <= item["counts"].items()
        same(score.compute()["value"], value)
        if average == "class":
            per_class = score.compute()["per_key"]
            same([per_class[c] for c in sorted(per_class)], expected["per_class_iou"])


# references and identities

@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("levels", [0, 1, 2, 5])
def test_average_precision_equals_sklearn(rng, dtype, levels):
    s, m = random_pair(rng)
    s = (s*(levels or 1000)).floor().to(dtype) if levels or dtype == torch.int32 else s.to(dtype)
    m[0] = False # undefined sample in the middle of a batch
    expected = [average_precision_score(b.flatten(), a.double().flatten()) if b.any() else np.nan for a, b in zip(s, m)]
    same(M.average_precision(s, m), expected)


@pytest.mark.parametrize("f", [.05, .2, .5])
def test_random_maps_meet_chance_and_masks_meet_the_ceiling(rng, f):
    s, m = random_pair(rng, n=1500, f=f)
    f = M.mask_fraction(m).numpy()
    for name, metric in M.METRICS.items():
        assert abs(metric.function(s, m).mean() - metric.chance(f, .2).mean()) < .03, name
        best = metric.function(m + 1e-6*s, m).numpy()
        np.testing.assert_allclose(best, metric.ceiling(f, .2), atol=1e-4, err_msg=name)


def test_pixel_accuracy_and_iou_determine_each_other(rng):
    s, m = random_pair(rng)
    f, overlap = M.mask_fraction(m), M.iou(s, m)
    tp = overlap*(.2 + f)/(1 + overlap)
    same(M.pixel_accuracy(s, m), .8 - f + 2*tp)


def test_rank_metrics_ignore_monotone_transforms(rng):
    s, m = random_pair(rng)
    s = s.double()
    for transform in (lambda x: x**3 + 7, lambda x: -1/(x + .1), torch.exp):
        for f in (M.pointing_game, M.average_precision, M.topk_mask, M.pixel_accuracy, M.iou):
            args = () if f is M.topk_mask else (m,)
            assert torch.equal(f(transform(s), *args), f(s, *args))


def test_energy_is_scale_but_not_shift_invariant(rng):
    s, m = random_pair(rng)
    same(M.energy_pointing(4*s, m), M.energy_pointing(s, m))
    peaked = s**8
    assert (M.energy_pointing(peaked + 1, m) - M.energy_pointing(peaked, m)).abs().min() > 1e-4


def test_ge_quantile_selects_the_whole_image_of_a_sparse_map():
    s = torch.zeros(1, 10, 10)
    s[0, 4, :5] = torch.arange(1., 6)
    area = {ties: M.selected_area(s, ties=ties).item() for ties in ("stable", "ge", "gt")}
    assert area == dict(stable=.2, ge=1., gt=.05)


@pytest.mark.parametrize("frac", [0, .001, .1, .2, .5, 1])
def test_topk_selects_exactly_k(rng, frac):
    s = (torch.rand(8, 15, 13, generator=rng)*4).floor()
    chosen = M.topk_mask(s, frac).flatten(1)
    order = np.argsort(-s.flatten(1).numpy(), axis=1, kind="stable")[:, :int(frac*15*13)]
    expected = np.zeros(chosen.shape, bool)
    np.put_along_axis(expected, order, True, axis=1)
    assert (chosen.numpy() == expected).all()


@pytest.mark.parametrize("tolerance", [.5, 1, 1.5, 3, 7])
def test_tolerance_is_a_strict_distance(rng, tolerance):
    s = torch.rand(64, 12, 12, generator=rng)
    m = torch.zeros_like(s, dtype=torch.bool)
    m[:, 3:5, 6:9] = True
    for heat, mask, hit in zip(s, m, M.pointing_game(s, m, tolerance)):
        y, x = divmod(heat.argmax().item(), 12)
        v, u = mask.nonzero().T
        assert hit == (((v - y)**2 + (u - x)**2).sqrt() < tolerance).any()


@pytest.mark.parametrize("shape", [(9, 9), (11, 6), (1, 7)])
@pytest.mark.parametrize("tolerance", [.5, 1, 1.5, 2, 7.5, 15, 1e4])
def test_hit_zone_equals_a_search_over_all_pixels(rng, shape, tolerance):
    at = torch.cartesian_prod(*map(torch.arange, shape)).double()
    spots = torch.eye(len(at)).unflatten(1, shape) # one map for each pixel
    for share in (0, .03, .3, 1):
        mask = torch.rand(shape, generator=rng) < share
        near = (torch.cdist(at, at[mask.flatten()], compute_mode="donot_use_mm_for_euclid_dist") < tolerance).any(1)
        expected = near.double() if mask.any() else torch.full((len(at),), torch.nan)
        for ties in ("first", "any", "mean"):
            same(M.pointing_game(spots, mask.expand_as(spots), tolerance, ties), expected)
        if mask.any():
            constant = torch.ones(1, *shape)
            for ties, value in (("first", near[0]), ("any", near.any()), ("mean", near.double().mean())):
                same(M.pointing_game(constant, mask[None], tolerance, ties), value)


# corner cases and interfaces

def test_undefined_samples_do_not_touch_their_neighbours(rng):
    s, m = random_pair(rng, n=6)
    alone = M.localisation_scores(s, m)
    s[1, 0, 0], s[2, 3, 3], s[3] = torch.nan, torch.inf, 0
    m[4] = False
    scores = M.localisation_scores(s, m)
    for name, value in scores.items():
        assert value.shape == (6,) and value.dtype == np.float64
        np.testing.assert_array_equal(value[[0, 5]], alone[name][[0, 5]])
    for name in M.METRICS:
        assert np.isnan(scores[name][[1, 2]]).all()
        assert np.isnan(scores[name][4]) == (name != "pixel_accuracy")
    assert np.isnan(scores["energy_pointing"][3]) and scores["pointing_game"][3] == 0
    assert scores["tied_maxima"][3] == 400


def test_ignored_pixels_act_as_if_cut_away(rng):
    s, m = random_pair(rng, n=8)
    valid = torch.zeros_like(m)
    valid[:, :, :11] = True
    s[:, :, 11:] = torch.nan
    cut = M.localisation_scores(s[:, :, :11], m[:, :, :11])
    for name, value in M.localisation_scores(s, m, valid).items(): same(value, cut[name])
    for ties in ("ge", "gt"):
        assert torch.equal(M.topk_mask(s, ties=ties, valid=valid)[:, :, :11], M.topk_mask(s[:, :, :11], ties=ties))


def test_no_valid_pixel_and_no_sample():
    s, none = torch.rand(2, 4, 4), torch.zeros(2, 4, 4)
    for name, metric in M.METRICS.items():
        assert metric.function(s, none + 1, valid=none).isnan().all(), name
        assert metric.function(s[:0], none[:0]).shape == (0,), name


def test_wrong_inputs_are_refused():
    s = torch.rand(2, 8, 8)
    with pytest.raises(ValueError, match=r"masks have shape \(2, 4, 4\) but the maps have \(2, 8, 8\)"):
        M.iou(s, torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="0/1"): M.energy_pointing(s, torch.full((2, 8, 8), .5))
    with pytest.raises(ValueError, match="0/1"): M.energy_pointing(s, torch.full((2, 8, 8), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(N,H,W\)"): M.average_precision(s[None], s[None] > .5)
    with pytest.raises(ValueError, match="'first', 'any' or 'mean'"): M.pointing_game(s, s > .5, ties="last")
    with pytest.raises(ValueError, match="'stable', 'ge' or 'gt'"): M.topk_mask(s, ties="first")
    with pytest.raises(ValueError, match="frac"): M.topk_mask(s, frac=20)
    with pytest.raises(ValueError, match=r"\[0,1\]"): S.PointwiseMIoU().update(s*3, [[], []], [0, 1])
    with pytest.raises(ValueError, match="unsure"): S.PointwiseMIoU().update(s[:1], [[(.1, .1, "maybe")]], [0])


def test_inputs_are_left_alone(rng):
    s, m = random_pair(rng, n=4)
    s.requires_grad_()
    before = s.detach().clone()
    scores = M.localisation_scores(s, m)
    assert torch.equal(s, before) and s.grad is None
    for name, value in M.localisation_scores(before.numpy(), m.numpy()).items(): same(value, scores[name])


def test_undefined_points_and_broken_maps_are_counted():
    score, s = S.PointwiseMIoU(), torch.full((3, 4, 4), .2)
    s[1] = torch.nan
    score.update(s, [[(.5, .5, "yes")], [(.5, .5, "yes")], [(.5, .5, "no")]], [0, 0, 1])
    result = score.compute()
    assert (result["value"], result["n"], result["undefined"]) == (0, 1, 2) # class 1: only a true negative


def test_summaries():
    low, high = wilson(0, 10)
    assert low == 0 and np.isclose(high, .27753, atol=1e-5) # Wilson 1927, upper limit z^2/(n+z^2)
    assert summarise(torch.tensor([1., 0, torch.nan]))["interval"] == "wilson"
    s = summarise([.1, .2, .3, np.nan])
    assert s["interval"] == "normal" and np.isclose(s["high"] - s["mean"], 1.959964*.1/3**.5)
    assert (s["n"], s["undefined"]) == (3, 1)
    assert np.isnan([summarise([])[k] for k in ("mean", "low", "high")]).all()


def test_score_table_counts_and_bounds(rng):
    s, m = random_pair(rng, n=40)
    m[3] = False
    table = M.score_table(M.localisation_scores(s, m))
    assert list(table.index) == [metric.label for metric in M.METRICS.values()]
    assert table.loc["AP", "undefined"] == 1 and table.loc["PA", "undefined"] == 0
    assert (table["mean"] <= table.ceiling).all()
