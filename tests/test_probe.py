"The linear probe: compared with its golden optimum, under attack, in maps, and on real photographs."
import pytest
import torch
import torch.nn.functional as F
from helpers import golden

from reclip_nb.attacks import apgd
from reclip_nb.data import open_dataset
from reclip_nb.evaluations import LinearProbe, fit_linear_probe
from reclip_nb.evaluations.probe import COCO_SIX, CocoClasses, ProbeClassifier, features, six_classes
from reclip_nb.explain import explain
from reclip_nb.models import load_clip
from reclip_nb.worlds import ShapesDataset


def objective(w, b, C, X, y): return C*F.cross_entropy(X @ w.T+b, y, reduction="sum")+(w**2).sum()/2


@pytest.fixture(scope="module")
def want():
    g = golden("robust", "linear_probe.npz")
    n = int(g["n_train"])
    return g | dict(fit=(g["X"][:n], g["y"][:n]), test=(g["X"][n:], g["y"][n:]), C=g["C"].item())


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cholesky"])
def test_golden_optimum(want, solver):
    probe = fit_linear_probe(*want["fit"], want["C"], normalize=False, solver=solver, tol=1e-10)
    torch.testing.assert_close(probe.weight, want["coef"], rtol=0, atol=1e-5)
    torch.testing.assert_close(probe.bias, want["intercept"], rtol=0, atol=1e-5)
    value = objective(probe.weight, probe.bias, want["C"], *want["fit"])
    torch.testing.assert_close(value, want["objective"], rtol=1e-12, atol=0)
    X, y = want["test"]
    assert probe(X).argmax(1).tolist() == want["test_pred"].tolist()
    assert (probe(X).argmax(1) == y).sum() == round(want["test_acc"].item()*len(y))


def test_default_tolerance_is_enough(want):
    probe = fit_linear_probe(*want["fit"], want["C"], normalize=False)
    value = objective(probe.weight, probe.bias, want["C"], *want["fit"])
    torch.testing.assert_close(value, want["objective"], rtol=1e-8, atol=0)


def test_two_classes_minimise_the_same_objective(want):
    X, y = want["fit"]
    probe = fit_linear_probe(X, y % 2, 3.16, normalize=False, solver="newton-cholesky", tol=1e-10)
    w, b = (v.clone().requires_grad_() for v in (probe.weight, probe.bias))
    slopes = torch.autograd.grad(objective(w, b, 3.16, X, y % 2), (w, b))
    assert max(g.abs().max() for g in slopes) < 1e-7


def test_the_length_of_a_feature_does_not_matter_when_normalised(want):
    X, y = want["fit"]
    stretched = X*torch.linspace(.1, 10, len(X))[:, None]
    a, b = (fit_linear_probe(v, y, 10., solver="newton-cholesky") for v in (X, stretched))
    torch.testing.assert_close(a.weight, b.weight)
    torch.testing.assert_close(a(X), a(stretched))


def test_sweep_is_seeded_and_prefers_the_smaller_of_equals(want):
    X, y = want["fit"]
    a, b = (fit_linear_probe(X, y, (100., 1., .01), seed=3) for _ in range(2))
    assert a.sweep == b.sweep and list(a.sweep) == [.01, 1., 100.]
    assert a.C == min(c for c, accuracy in a.sweep.items() if accuracy == max(a.sweep.values()))
    torch.testing.assert_close(a.weight, fit_linear_probe(X, y, a.C).weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("X, y, options, words", [
    (torch.eye(4), [0, 0, 0, 0], {}, "two classes"), (torch.eye(4), [0, 1, 0], {}, "needs features"),
    (torch.eye(4), [0, 1, 2, 7], {}, "no image"), (torch.eye(4), [0, 1, 2, -1], {}, "allowed is 0 to 2"),
    (torch.eye(4), [0, 1, 2, 3], dict(n_classes=3), "allowed is 0 to 2"),
    (torch.eye(4)*torch.nan, [0, 1, 0, 1], {}, "4 of 4"),
    (torch.zeros(0, 4), [], {}, "needs features"), (torch.eye(4), [0, 1, 2, 3], {}, "single C")])
def test_invalid_features_and_labels_raise(X, y, options, words):
    with pytest.raises(ValueError, match=words): fit_linear_probe(X, torch.tensor(y, dtype=torch.long), **options)


@pytest.fixture(scope="module")
def small():
    clip, data = load_clip("tiny-smoke", seed=0), ShapesDataset("smoke", "train", kind="zero_shot")
    X, y = features(clip, data, limit=96)
    x = torch.stack([data[i]["image"] for i in torch.linspace(0, 383, 96).long().tolist()])
    return clip, x, X, y//4


@pytest.mark.parametrize("normalize", [True, False])
def test_class_weights_are_the_texts_of_a_map(small, normalize):
    "With class weights as texts, Simple Gradient explains the probe's logit; the norm of the weights does not matter."
    clip, x, X, y = small
    probe = fit_linear_probe(X, y, 10. if normalize else .01, normalize=normalize)
    x, y = x[::24], y[::24]
    texts = probe.weight[y][:, None]
    maps = explain(clip, x, texts, "simple_gradient", normalize="none", score=probe.score)
    v = x.clone().requires_grad_()
    g, = torch.autograd.grad(ProbeClassifier(clip, probe)(v).gather(1, y[:, None]).sum(), v)
    torch.testing.assert_close(maps[:, 0], g.abs().sum(1), rtol=1e-3, atol=1e-6*float(g.abs().max()))
    cams, scaled = (explain(clip, x, k*texts, "gradcam", score=probe.score) for k in (1, 3))
    torch.testing.assert_close(scaled, cams, rtol=1e-3, atol=1e-5)


def test_probe_in_apgd(small):
    clip, x, X, y = small
    f = ProbeClassifier(clip, fit_linear_probe(X, y, 100.))
    right = f(x).argmax(1) == y
    result = apgd(f, x[::4], y[::4], eps=8/255, n_iter=10)
    assert right[::4].any() and result.broken[~right[::4]].all() and result.broken[right[::4]].any()
    assert all(not p.requires_grad for p in f.probe.parameters()) and isinstance(f.probe, LinearProbe)


@pytest.mark.sample
def test_coco_six_classes(sample_data):
    photos = open_dataset("coco", sample_data/"coco_ccby_small", split="all", size=64)
    data = six_classes(photos)
    assert isinstance(data, CocoClasses) and len(data) < len(photos)
    assert {data.classes[k] for k in data.labels} == set(COCO_SIX)
    names = {k: c["name"] for k, c in data.coco.cats.items()}
    for i in range(0, len(data), 7):
        objects = [a for a in photos.coco.imgToAnns[data.rows[i]["id"]] if not a["iscrowd"]]
        largest = max((a for a in objects if names[a["category_id"]] in COCO_SIX), key=lambda a: a["area"])
        assert data.classes[data.labels[i]] == names[largest["category_id"]]
        assert {a["category_id"] for a in data.instances(i)} == {largest["category_id"]}
    assert data[0]["label"] == data.labels[0] and data[0]["mask"].any()
    with pytest.raises(ValueError, match="unicorn"): CocoClasses(photos, ("person", "unicorn"))


@pytest.mark.sample
def test_cifar10_probe(sample_data):
    "A probe on a random tower classifies photographs above chance, and an attack breaks most correct predictions."
    clip = load_clip("tiny-cifar", seed=0)
    train, test = (open_dataset("cifar10_small", sample_data/"cifar10_small", split=s) for s in ("train", "val"))
    probe = fit_linear_probe(*features(clip, train, limit=1000), C=(1, 100))
    X, y = features(clip, test, limit=300)
    right = probe(X).argmax(1) == y
    assert right.double().mean() > .18, "chance is 0.1"
    x = torch.stack([test[i]["image"] for i in torch.linspace(0, len(test)-1, 300).long().tolist()])
    result = apgd(ProbeClassifier(clip, probe), x[right][:32], y[right][:32], eps=8/255, n_iter=10)
    assert result.broken.double().mean() > .5
