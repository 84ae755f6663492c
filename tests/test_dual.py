"The dual objective: compared with automatic differentiation of the full Jacobian, its limits, and training with it."
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from reclip_nb.models import frozen, load_clip
from reclip_nb.objectives import AFT, EPG, Attack, Dual, aft_loss, dual_penalty
from reclip_nb.objectives.dual import embedding_gradients, huber, random_directions, text_directions
from reclip_nb.objectives.epg import feature_saliency
from reclip_nb.study import start_run
from reclip_nb.training import FitConfig, fit
from reclip_nb.worlds import WORLDS, ShapesDataset


def gen(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair():
    "Student, teacher, images and masks in float64."
    x, mask = ShapesDataset(WORLDS["smoke"], "train", seed=0).tensors(range(3))
    return load_clip("tiny-smoke", seed=1).double(), load_clip("tiny-smoke", seed=0).double(), x.double(), mask


@pytest.mark.parametrize("eta", [0., 2e-3])
def test_loss_and_gradient_are_those_of_the_full_jacobian(pair, eta):
    student, teacher, x, _ = pair
    dual = Dual(student, teacher, eps=3/255, weight=5., n=2, eta=eta, sigma=0.)
    loss = dual({"image": x}, gen())["loss"]
    p = student.visual.class_embedding
    (grad,) = torch.autograd.grad(loss, p)

    def plain(q):
        "The loss as a function of the class embedding."
        def encode(y):
            e = functional_call(student.visual, {"class_embedding": q}, student.normalize(y[None]))
            return F.normalize(e, dim=-1)[0]
        target, total = teacher.encode_image(x).detach(), 0
        v = F.normalize(torch.randn(3, 2, 64, generator=gen(), dtype=x.dtype), dim=-1)
        for y, t, w in zip(x, target, v):
            J = jacrev(encode)(y).flatten(1)  # (D, pixels)
            u = w @ J
            size = torch.where(u.abs() <= eta, u*u/(2*eta), u.abs()-eta/2) if eta else u.abs()
            total = total+(encode(y)-t).square().sum()/2+5*((3/255*size.sum(1)).square()/2).mean()
        return total/3
    q = p.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        expected_loss = plain(q)
        (expected_grad,) = torch.autograd.grad(expected_loss, q)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad, expected_grad)


def test_literal_form_is_the_mass_that_epg_normalises_by(pair):
    "eps |J^T r|_1 = eps |gradient of the consistency score|_1, which is zero where the models agree."
    student, teacher, x, _ = pair
    penalty = lambda s: Dual(s, teacher, eps=1/255, form="literal", sigma=0.)({"image": x}, gen())["penalty"].item()
    target = teacher.encode_image(x).detach()
    assert penalty(student) == pytest.approx(feature_saliency(student, x, target, False).sum((1, 2)).mean().item()/255)
    assert penalty(frozen(teacher)) < 1e-12


def test_bounds_of_the_attack(pair):
    "Mean over random v <= maximum over the box <= D times the mean, to second order."
    _, teacher, x, _ = pair
    eps, inner = 1e-4, .2+.6*x  # inside the pixel range, so that only eps limits the attack
    I = teacher.encode_image(inner).detach()
    v = random_directions(I, 64, gen())
    low = dual_penalty(embedding_gradients(teacher, inner, v, create_graph=False)[1], eps)
    aft = AFT(frozen(teacher), teacher, Attack(eps, eps/4, 20, penalty="none", sigma=0.), loss="half_l2")
    attacked = aft_loss(aft.student, inner, aft.perturb(inner, I, None, gen()), I, loss="half_l2").detach()
    assert ((low < attacked) & (attacked < 64*low)).all()


def test_huber_between_its_limits():
    u = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(huber(u, 1e-9), u.abs(), rtol=0, atol=1e-9)
    torch.testing.assert_close(huber(u, 2.), u*u/4)
    g = torch.randn(2, 3, 3, 4, 4, generator=gen())
    h = .1*g.abs().sum((2, 3, 4))
    torch.testing.assert_close(dual_penalty(g, .1, order=1), h.mean(1))
    torch.testing.assert_close(dual_penalty(g, .1), (h*h).mean(1)/2)
    with pytest.raises(ValueError, match="allowed: 1"): dual_penalty(g, .1, order=3)


def test_directions_are_unit_and_reproducible(pair):
    texts = F.normalize(torch.randn(5, 16, generator=gen(1)), dim=-1)
    for draw in (lambda s: random_directions(texts[:4], 7, gen(s)), lambda s: text_directions(texts, 4, 7, gen(s))):
        v = draw(0)
        assert v.shape == (4, 7, 16) and torch.equal(v, draw(0)) and not torch.equal(v, draw(1))
        torch.testing.assert_close(v.norm(dim=-1), torch.ones(4, 7))
    for form, pool, words in (("max", None, "allowed: random"), ("text", texts[:1], "or more")):
        with pytest.raises(ValueError, match=words): Dual(*pair[:2], form=form, texts=pool)


def test_embedding_and_gradient_belong_together(pair):
    student, _, x, _ = pair
    v = random_directions(torch.empty(3, 64, dtype=x.dtype), 2, gen())
    e, g = embedding_gradients(student, x, v)
    assert g.shape == (3, 2, 3, 32, 32) and g.requires_grad and e.requires_grad
    torch.testing.assert_close(e, student.encode_image(x))
    h = 1e-6*torch.randn(x.shape, generator=gen(), dtype=x.dtype)
    rise = ((student.encode_image(x+h)-student.encode_image(x-h))[:, None]*v).sum(-1)/2
    torch.testing.assert_close((g*h[:, None]).sum((2, 3, 4)), rise, rtol=1e-4, atol=1e-12)


def test_training_loop_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    student = load_clip("tiny-smoke", seed=0)
    teacher = frozen(student)
    texts = teacher.encode_text(["a photo of a red plain shape", "a photo of a blue dotted shape"]).detach()
    data = ShapesDataset(WORLDS["smoke"], "train", seed=0)
    rows = fit(student.visual, Dual(student, teacher, form="text", texts=texts), data,
               FitConfig(steps=2, batch_size=4, lr=1e-4), start_run("t", "dual", "toy", {}))
    assert len(rows) == 2 and rows[1]["anchor"] > 0 and rows[1]["penalty"] > 0
    assert all(p.grad is None for p in teacher.visual.parameters())


def test_epg_accepts_it(pair):
    student, teacher, x, mask = pair
    out = EPG(Dual(student, teacher), w_s=.5)({"image": x, "mask": mask}, gen())
    assert out["loss"].item() == pytest.approx((out["anchor"]+4*out["penalty"]+.5*out["epg"]).item())
