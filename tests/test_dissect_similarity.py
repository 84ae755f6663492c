"CLIP-Dissect's scores against its golden arrays, against dense forms, and against what a score of alignment must do."
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import golden

from reclip_nb.dissect import SIMILARITIES, alignment_summary, describe, similarity

NAMES = dict(soft_wpmi="soft_wpmi", wpmi="wpmi", cos="cos_similarity", cos_cubed="cos_similarity_cubed",
             pearson="pearson")
TOLERANCE = {torch.float64: dict(soft_wpmi=1e-7, wpmi=1e-6, cos=1e-12, cos_cubed=1e-12, pearson=1e-12),
             torch.float32: dict(soft_wpmi=3e-4, wpmi=1e-4, cos=1e-6, cos_cubed=1e-6, pearson=1e-6)}
FILES = pytest.mark.parametrize("file", ["defaults", "custom"])


def load(file, dtype):
    "Golden arrays, their parameters, and the three inputs in a precision."
    g = golden("dissection", f"similarity_{file}.npz")
    inputs = [g[k].to(dtype) for k in ("target_feats", "image_features", "text_features")]
    return g, json.loads(str(g["settings"])), inputs


def apart(got, want):
    "Largest difference; NaN must meet NaN."
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    return (got.double()-want.double()).abs().nan_to_num().max().item()


# ---- the published program ----------------------------------------------------------------------------------

@FILES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
@pytest.mark.parametrize("metric", NAMES)
def test_golden(file, dtype, metric):
    g, settings, inputs = load(file, dtype)
    got, name = similarity(*inputs, metric, dtype=dtype, block=90, **settings.get(metric, {})), NAMES[metric]
    assert apart(got, g[f"{name}_f64"]) <= TOLERANCE[dtype][metric]
    if metric == "pearson": return      # the one score that CLIP-Dissect does not have
    assert torch.equal(got.argmax(1), g[f"{name}_best_id"])
    mean, lower, average = g[f"{name}_best_mean_median"].tolist()
    summary = alignment_summary(got, draws=2).set_index("statistic").value
    for statistic, value in dict(mean=mean, median_lower=lower, median=average).items():
        assert abs(summary[statistic]-value) <= 3e-4  # the reference is in single precision


def test_golden_cubed_without_floor():
    g, _, inputs = load("defaults", torch.float64)
    got = similarity(*inputs, "cos_cubed", dtype=torch.float64, min_norm=1e-12)
    assert apart(got, g["cos_similarity_cubed_f64_min_norm_1e-12"]) <= 1e-12


@FILES
def test_golden_rank_reorder(file):
    g, settings, inputs = load(file, torch.float32)
    got = similarity(*inputs, "rank_reorder", baseline=g["rank_reorder_baseline"], **settings["rank_reorder"])
    assert apart(got, g["rank_reorder_seed1234"]) <= 2e-6
    assert torch.equal(got.argmax(1), g["rank_reorder_seed1234_best_id"])
    ours = similarity(*inputs, "rank_reorder", **settings["rank_reorder"])  # with the expected baseline: deterministic
    ratio = ours/got
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4), "one factor per neuron"
    assert ratio[:, 0].mean().sub(1).abs() < .1, "five permutations scatter around their expectation"


# ---- dense forms --------------------------------------------------------------------------------------------

def dense(acts, images, texts, metric):
    "The formulas as they are written, with S and q whole."
    S, N = images @ texts.T, acts.shape[1]
    if metric in ("cos", "pearson", "cos_cubed"):
        if metric != "cos": acts, S = acts-acts.mean(0), S-S.mean(0)
        if metric == "cos_cubed": acts, S = acts**3, S**3
        floor = 1e-3 if metric == "cos_cubed" else 1e-300
        return (acts/acts.norm(dim=0).clamp(min=floor)).T @ (S/S.norm(dim=0).clamp(min=floor))
    k, a, lam = (100, 10, 1) if metric == "soft_wpmi" else (28, 2, .6)
    q, top = (a*S).softmax(1), acts.topk(k, dim=0).indices.T
    w = (.998-torch.arange(k)/k*(.998-.97)).double()[:, None]
    log = (lambda p: torch.log(1+w*(p-1)+1e-7)) if metric == "soft_wpmi" else (lambda p: torch.log(p+1e-7))
    E = torch.stack([log(q[rows]).sum(0) for rows in top])
    return E-lam*(E.logsumexp(0)-math.log(N))


def random_case(P=700, N=19, C=83, D=24, seed=0):
    "Activations with offsets and different scales, and unit embeddings with a common direction, as CLIP's have."
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    images, texts = F.normalize(draw(P, D)+draw(D), dim=1), F.normalize(draw(C, D)+.5*draw(D), dim=1)
    return draw(P, N)*draw(N).exp()+draw(N)+3*images @ draw(D, N), images, texts


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("block", [1, 64, 10000])
def test_equals_dense_form(metric, block):
    case = random_case()
    assert apart(similarity(*case, metric, dtype=torch.float64, block=block), dense(*case, metric)) <= 2e-9


@pytest.mark.parametrize("metric", NAMES)
def test_single_precision_and_half_precision_storage(metric):
    acts, images, texts = random_case()
    exact = dense(acts, images, texts, metric)
    assert apart(similarity(acts.float(), images.float(), texts.float(), metric), exact) <= 1e-4
    stored = acts.half()
    of_stored = similarity(stored, images.float(), texts.float(), metric)
    assert apart(of_stored, dense(stored.double(), images, texts, metric)) <= 1e-4


def test_many_images_of_one_neuron_do_not_overflow():
    "Products of up to 300 factors of almost 500 in single precision."
    images = F.normalize(torch.ones(400, 8)+.01*torch.arange(400)[:, None], dim=1)
    texts = F.normalize(torch.eye(8)[:2]+.3, dim=1)
    got = similarity(torch.arange(400.)[:, None], images, texts, "soft_wpmi", top_k=300, lam=0)
    assert got.isfinite().all()
    with pytest.raises(ValueError, match="float64"):
        similarity(torch.arange(400.)[:, None], images, texts, "wpmi", min_prob=1e-45)


# ---- what a score must do -----------------------------------------------------------------------------------

def labelled(labels):
    "Embeddings whose similarities are half of the given 0/1 labels (P, C)."
    s = .5*labels.double()/labels.sum(1, keepdim=True).clamp(min=1).sqrt().amax()
    rest = (1-s.square().sum(1, keepdim=True)).sqrt()
    return torch.cat([s, rest], 1), torch.eye(s.shape[1]+1, dtype=torch.float64)[:-1]


@pytest.fixture(scope="module")
def neuron():
    "A neuron (400, 1) that fires, with noise, on 80 of 400 images, and which images those are."
    gen, concept = torch.Generator().manual_seed(0), torch.arange(400) % 5 == 0
    return (concept+.1*torch.randn(400, generator=gen, dtype=torch.float64))[:, None], concept


def test_missing_labels_lower_pearson(neuron):
    "Half of a concept's labels taken away: the score must fall (first test of Neuron_Eval)."
    acts, concept = neuron
    missing = concept & (torch.arange(400) % 10 == 0)
    whole, half = similarity(acts, *labelled(torch.stack([concept, missing], 1)), "pearson", dtype=torch.float64)[0]
    assert whole > .9 and half < whole-.1


def test_extra_labels_lower_pearson(neuron):
    "As many wrong labels as right ones: the score must fall (second test)."
    acts, concept = neuron
    extra = concept | (torch.arange(400) % 5 == 1)
    whole, double = similarity(acts, *labelled(torch.stack([concept, extra], 1)), "pearson", dtype=torch.float64)[0]
    assert whole > .9 and double < whole-.1


def test_offset_of_a_neuron_moves_cos_alone(neuron):
    acts, concept = neuron
    images, texts = labelled(torch.stack([concept, torch.ones(400, dtype=torch.bool)], 1))
    for metric in NAMES:
        options = dict(top_k=20) if "pmi" in metric else {}
        before, after = (similarity(acts+c, images, texts, metric, dtype=torch.float64, **options) for c in (0, 10))
        assert (apart(before, after) > .1) == (metric == "cos")
    assert similarity(acts+10, images, texts, "cos").argmax() == 1, "the constant concept wins"


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_concepts_and_images_have_no_order(metric):
    acts, images, texts = random_case()
    gen = torch.Generator().manual_seed(1)
    p, c = torch.randperm(len(images), generator=gen), torch.randperm(len(texts), generator=gen)
    got = similarity(acts[p], images[p], texts[c], metric, dtype=torch.float64)
    assert apart(got, similarity(acts, images, texts, metric, dtype=torch.float64)[:, c]) <= 1e-9


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_dead_neurons(metric):
    acts, images, texts = random_case(C=5)
    acts[:, 3] = 2.5
    sim = similarity(acts, images, texts, metric, dtype=torch.float64)
    assert not sim[3].any() and describe(sim, list("abcde")).groupby("unit").dead.all().sum() == 1
    assert alignment_summary(sim, draws=2)[["n", "dead"]].eq([18, 1]).all(axis=None)
    alive = [n for n in range(19) if n != 3]
    assert apart(sim[alive], similarity(acts[:, alive], images, texts, metric, dtype=torch.float64)) == 0
    assert not similarity(torch.ones(700, 2), images, texts, metric).any()


# ---- misuse -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (lambda a, i, t: (a[:50], i[:50], t), "the top 100 of 50 images"),
    (lambda a, i, t: (a.index_fill(0, torch.tensor([7]), torch.nan), i, t),
     "activations contain NaN .* first in row 7, column 0"),
    (lambda a, i, t: (a, i.index_fill(1, torch.tensor([2]), torch.inf), t), "image embeddings contain NaN"),
    (lambda a, i, t: (a, i[:-1], t), "700 rows of activations for 699 images"),
    (lambda a, i, t: (a, i, t[:, :-1]), "image embeddings are 24 wide, concepts 23"),
    (lambda a, i, t: (a, i, 100*t), "concept embeddings must have rows of length 1"),
    (lambda a, i, t: (a[:, :, None, None], i, t), "pool a grid first"),
    (lambda a, i, t: (a.long(), i, t), "floating matrix")])
def test_misuse(change, words):
    with pytest.raises(ValueError, match=words): similarity(*change(*random_case()), "soft_wpmi")
