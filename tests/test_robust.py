"APGD and the robust evaluation against the arrays of AutoAttack, and against what usually goes wrong."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, golden
from rounding import elsewhere, followed
from safetensors.torch import load_file

from reclip_nb.attacks import (
    AttackResult,
    apgd,
    auto_pgd,
    checkpoints,
    dlr,
    dlr_targeted,
    misclassified,
    nearest_classes,
)
from reclip_nb.attacks.apgd import AscentState, classifier_objective, paper_checkpoints
from reclip_nb.evaluations import robust_eval, robust_table
from reclip_nb.evaluations.attacked import scale_of, verified

FOLDER = GOLDEN/"robust"
CASES = sorted(p.stem for p in FOLDER.glob("apgd_*.npz"))
NAMES = {"ce": "ce", "dlr": "dlr", "dlrt": "dlr-t"}


def tiny(dtype=torch.float32):
    "The convolutional classifier of the golden arrays."
    w = {k: v.to(dtype) for k, v in load_file(FOLDER/"tiny.safetensors").items()}
    def f(v):
        h = F.avg_pool2d(F.gelu(F.conv2d(v, w["conv.weight"], w["conv.bias"], padding=1)), 4)
        return F.linear(h.flatten(1), w["fc.weight"], w["fc.bias"])
    return f


def clip(dtype=torch.float32):
    "The CLIP of the golden arrays as a classifier."
    state = load_file(FOLDER/"clip.safetensors")
    vision = dict(image_size=32, patch_size=8, layers=2, width=32, head_width=16)
    text = dict(context_length=4, vocab_size=8, width=32, heads=2, layers=1)
    visual = open_clip.CLIP(32, vision, text, quick_gelu=True).visual
    visual.load_state_dict({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")})
    visual = visual.to(dtype).eval().requires_grad_(False)
    published = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in published)
    text, scale = (state[k].to(dtype) for k in ("text_embeddings", "logit_scale_exp"))
    return lambda x: scale*F.normalize(visual((x-mean)/std), dim=-1) @ text.T


MODELS = dict(tiny=tiny, clip=clip)


@pytest.fixture(scope="module")
def data(): return golden("robust", "tiny_inputs.npz")


@pytest.fixture(scope="module")
def some(data): return data["x"][data["subset"]], data["y"][data["subset"]]


# The published program

def images(wrong):
    "Whether an image has a wrong number, (B,)."
    return wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong


class Case:
    "One attack of the golden arrays, and the bounds on every number of it."

    def __init__(self, name):
        _, model, loss, init, precision, _, n = name.split("_")
        self.want, inputs = golden("robust", f"{name}.npz"), golden("robust", f"{model}_inputs.npz")
        self.exact = precision == "f64"
        dtype, rows, eps = torch.float64 if self.exact else torch.float32, inputs["subset"], self.want["eps"].item()
        x = inputs["x"][rows]
        start = "clean" if init == "clean" else (x.double()+eps*inputs["u"].double()).clamp(0, 1).to(dtype)
        self.f, self.x, self.y = MODELS[model](dtype), x.to(dtype), inputs["y"][rows]
        self.options = dict(eps=eps, n_iter=int(n[1:]), loss=NAMES[loss], init=start, compact=False, trace=True)
        self.floor = self.want["loss_best"]-(1e-9 if self.exact else 1e-4*self.want["loss_best"].abs())

    def attack(self, f): return apgd(f, self.x, self.y, **self.options)

    def loss(self, images):
        "What the attack climbs, at other images."
        target = nearest_classes(self.f(self.x), self.y)[:, 0]
        return classifier_objective(self.f, self.y, self.options["loss"], target)(images, torch.arange(len(images)))[0]

    def bounds(self, found):
        "Of each bound its name, how much of it an image misses, (B,), and what all images together may miss."
        last, want = found.trace["step"][-1], self.want
        if not self.exact:
            ratio = last/want["step_final"]
            near = torch.isclose(found.loss_best, want["loss_best"], rtol=1e-4, atol=0)
            factor = (ratio != 1) & (ratio != 2) & (ratio != .5)
            missed = dict(loss_best=(~near, 0), factor=(factor, 0), step_final=(ratio != 1, 1))
            if "x_best" in want: missed["x_best"] = self.other_entries(found.x_best), 1e-3*len(self.x)
            return missed
        def far(a, b, bound=1e-9): return ~((a-b).abs() <= bound)
        missed = dict(losses=(images(far(found.trace["loss"], want["loss_steps"]).T), 0),
                      step_final=(last != want["step_final"], 0),
                      loss_best=(far(found.loss_best, want["loss_best"]), 0))
        if "x_best" in want: missed["x_best"] = images(far(found.x_best, want["x_best"])), 0
        if "x_best_adv_f32" in want:
            reached = found.x_adv.clone()
            reached[~want["robust"]] = want["x_best_adv_f32"].to(reached)
            missed["x_adv"] = images(far(found.x_adv.float(), reached.float(), 1e-6)), 0
        return missed

    def other_entries(self, best):
        """Share of the entries of the best image that differ in single precision, (B,). Near the top an attack visits
        points that rounding alone sets apart, as it does their losses: where the reference's best is such a point, last
        digits do not count."""
        theirs = self.want["x_best"]
        ours, other = (self.loss(v) for v in (best, theirs))
        tied = (ours-other).abs() <= 16*torch.finfo(ours.dtype).eps*torch.maximum(ours.abs(), other.abs())
        least = torch.where(tied, 8*torch.finfo(best.dtype).eps, 0.)
        return ((best-theirs).abs() > least[:, None, None, None]).flatten(1).double().mean(1)


@pytest.mark.parametrize("name", CASES)
def test_apgd(name):
    """Every loss of every step, the final step sizes, the best images: masks alone are weak evidence. An image that
    parts from the reference by rounding has the reference's mask here, and its numbers where rounding is alike."""
    case = Case(name)
    here, _ = followed(case.attack, case.f, case.bounds, case.floor)
    assert torch.equal(~here.broken, case.want["robust"])
    if "y_target" in case.want:
        assert torch.equal(nearest_classes(case.f(case.x).detach(), case.y)[:, 0], case.want["y_target"])


PARTING = {   # images that part where the rounding differs
    "apgd_tiny_dlrt_clean_f64_e10_n10": [14], "apgd_tiny_ce_clean_f64_e14_n20": [8, 9],
    "apgd_tiny_dlrt_given_f64_e14_n20": [7],
    "apgd_tiny_dlrt_given_f32_e14_n100": [1, 11, 13, 14, 15]}


@pytest.mark.parametrize("machine", range(1001, 1021, 2))
@pytest.mark.parametrize("name", PARTING)
def test_apgd_on_other_machines(name, machine):
    "Wherever it runs, few images part, always those whose decisions lie within rounding of a switch."
    case = Case(name)
    here, parted = followed(case.attack, elsewhere(case.f, machine, 2.), case.bounds, case.floor)
    assert torch.equal(~here.broken, case.want["robust"])
    assert {*parted.nonzero()[:, 0].tolist()} <= {*PARTING[name]}


class NoMomentum(AscentState):
    def move(self, a): super().move(1.)


class SmallSteps(AscentState):
    def __init__(self, x, eps, start):
        super().__init__(x, eps, start)
        self.step = self.step/2


class OneWrongSign(AscentState):
    "The largest gradient entry of each image has the wrong sign."
    def see(self, loss, grad):
        largest = grad.abs() == grad.abs().amax((1, 2, 3), keepdim=True)
        super().see(loss, torch.where(largest, -grad, grad))


class NeverHalves(AscentState):
    def check(self, window, rho): self.rises = torch.zeros_like(self.rises)


class OtherShare(AscentState):
    def check(self, window, rho): super().check(window, .5)


class NoReturn(AscentState):
    "The step is halved, but the attack does not go back to the best point."
    def check(self, window, rho):
        at, grad = self.at, self.grad
        super().check(window, rho)
        self.at, self.grad = at, grad


@pytest.mark.parametrize("name", ["apgd_tiny_dlrt_given_f64_e14_n20", "apgd_tiny_ce_clean_f64_e14_n20"])
@pytest.mark.parametrize("mistake", [NoMomentum, SmallSteps, OneWrongSign, NeverHalves, OtherShare, NoReturn])
def test_rounding_excuses_no_mistake(name, mistake, monkeypatch):
    case = Case(name)
    monkeypatch.setattr(sys.modules[apgd.__module__], "AscentState", mistake)
    with pytest.raises(AssertionError, match="no rounding leads"):
        followed(case.attack, case.f, case.bounds, case.floor, machines=12)


def test_losses():
    "Ties, zero denominators, scales."
    want = json.loads((FOLDER/"dlr.json").read_text())
    z, one, targeted = (torch.tensor(want[k], dtype=torch.float64) for k in ("logits", "dlr", "dlr_targeted"))
    y, t = torch.tensor(want["y"]), torch.tensor(want["target"])
    torch.testing.assert_close(dlr(z, y), one, rtol=1e-12, atol=0)
    torch.testing.assert_close(dlr_targeted(z, y, t), targeted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n, want", json.loads((FOLDER/"checkpoints.json").read_text()).items())
def test_checkpoints(n, want):
    found = checkpoints(int(n))
    assert [*found] == want["reference_iterations"] and [*found.values()] == want["reference_windows"]
    assert paper_checkpoints(int(n)) == want["paper_formula"]


PROTOCOLS = {"paper": ("apgd-ce", "apgd-t1"), "paper_bs7": ("apgd-ce", "apgd-t1"), "t9": ("apgd-ce", "apgd-t9"),
             "custom_default": ("apgd-ce5", "apgd-t9")}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model, eps", [("tiny", 10), ("tiny", 14), ("clip", 2), ("clip", 3)])
def test_end_to_end(model, eps, protocol):
    "AutoAttack's flags of every image after each stage, wrong labels included, with its own noise."
    want, inputs = golden("robust", f"e2e_{model}.npz"), golden("robust", f"{model}_inputs.npz")
    report = robust_eval(MODELS[model](), inputs["x"], inputs["y"], (eps/255,), PROTOCOLS[protocol], rng="autoattack",
                         batch_size=7 if protocol == "paper_bs7" else 500)
    assert torch.equal(report.clean, want["clean"])
    for attack, stage in zip(PROTOCOLS[protocol], ("ce", "t")):
        assert torch.equal(report.stands(eps/255, attack), want[f"e{eps}_{protocol}_after_{stage}"]), stage


# What must not change a decision

@pytest.mark.parametrize("loss", NAMES.values())
def test_compaction_changes_no_decision(some, loss):
    whole, small = (apgd(tiny(), *some, eps=14/255, loss=loss, n_iter=40, compact=c) for c in (False, True))
    assert torch.equal(whole.broken, small.broken) and whole.broken.any() and not whole.broken.all()
    assert whole.n_forward == 16*42 and whole.n_backward == 16*40
    assert small.n_forward < whole.n_forward
    assert torch.equal(misclassified(tiny()(small.x_adv), some[1]), small.broken), "every break is one"


def test_batches_do_not_matter(data):
    "The noise belongs to the image: batch size, order and company are free, in the last digit of float64."
    f, x, y = tiny(torch.float64), data["x"].double(), data["y"]
    whole = robust_eval(f, x, y, (12/255,), n_iter=25)
    assert 0 < whole.stands(12/255).sum() < whole.clean.sum()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for batch_size in (1, 7):
        part = robust_eval(f, x[order], y[order], (12/255,), n_iter=25, batch_size=batch_size, ids=order.tolist())
        for attack in ("apgd-ce", "apgd-t1"):
            assert torch.equal(part.stands(12/255, attack), whole.stands(12/255, attack)[order])


def test_global_generator_is_left_alone(some):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    apgd(tiny(), *some, eps=8/255, n_iter=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_coarse_gradients_claim_nothing_false(data):
    "bfloat16 logits break more images than there are; what is reported is wrong in float32 too."
    f, claims = tiny(), []
    def coarse(v):
        logits = f(v)
        if torch.is_autocast_enabled("cpu"): claims.append(misclassified(logits, data["y"][:len(v)]))
        return logits
    found = apgd(coarse, data["x"], data["y"], eps=10/255, n_iter=30, grad_dtype=torch.bfloat16)
    assert claims and found.x_adv.dtype == torch.float32
    assert torch.equal(misclassified(f(found.x_adv), data["y"]), found.broken)


def test_any_objective_climbs_higher_than_sign_steps(some):
    target = tiny()(some[0]).detach()
    far = lambda v: (tiny()(v)-target).square().sum(1)
    found = auto_pgd(far, some[0], 8/255, 20, generator=torch.Generator().manual_seed(0))
    assert found.abs().max() <= 8/255+1e-6 and (far(some[0]+found) > 0).all()
    with pytest.raises(FloatingPointError, match=r"images \[0, 1"):
        auto_pgd(lambda v: far(v)*torch.nan, some[0], 8/255, 2)


# What usually goes wrong

def test_refused(some):
    x, y = some
    with pytest.raises(ValueError, match="did you mean 2/255"): apgd(tiny(), x, y, eps=2)
    with pytest.raises(ValueError, match="did you mean 4/255"): robust_eval(tiny(), x, y, (2/255, 4))
    with pytest.raises(ValueError, match="leave normalisation to the model"): apgd(tiny(), 3*x-1, y, eps=2/255)
    with pytest.raises(ValueError, match="at least 3 classes, the logits have 2"):
        apgd(lambda v: tiny()(v)[:, :2], x, y % 2, eps=2/255, loss="dlr")
    with pytest.raises(ValueError, match="at least 4 classes"):
        robust_eval(lambda v: tiny()(v)[:, :3], x, y % 3, (8/255,), n_iter=2)
    with pytest.raises(ValueError, match="allowed: ce, dlr, dlr-t"): apgd(tiny(), x, y, eps=2/255, loss="margin")
    with pytest.raises(ValueError, match="within eps"): apgd(tiny(), x, y, eps=2/255, init=(x+.1).clamp(0, 1))
    with pytest.raises(ValueError, match="leave the softmax out"): robust_eval(lambda v: tiny()(v).softmax(1), x, y)
    with pytest.raises(ValueError, match="apgd-ce, apgd-dlr"): robust_eval(tiny(), x, y, attacks=["square"])
    with pytest.raises(ValueError, match="allowed: sample, autoattack"): robust_eval(tiny(), x, y, rng="torch")


def test_two_classes_have_a_cross_entropy(some):
    "No targeted attack exists, the report is made without one."
    report = robust_eval(lambda v: tiny()(v)[:, :2], some[0], some[1] % 2, (8/255,), ["apgd-ce"], n_iter=3)
    assert report.table()["chance"].eq(.5).all()


def test_nan_is_never_right(data):
    "All-NaN rows have argmax 0: labels 0 would count as robust."
    f = lambda v: tiny()(v)*torch.where(v[:, :1, 0, 0] > .5, torch.nan, 1.)
    x, y, numb = data["x"], torch.zeros(40, dtype=torch.long), data["x"][:, 0, 0, 0] > .5
    report = robust_eval(f, x, y, (2/255,), n_iter=3)
    assert numb.any() and not report.clean[numb].any() and not report.stands(2/255)[numb].any()
    assert report.table()["undefined"].tolist()[0] == numb.sum()


@pytest.mark.parametrize("scale, words", [(1e4, "too large"), (1e-3, "too small")])
def test_wrong_logit_scale_is_on_the_card(some, scale, words):
    with pytest.warns(UserWarning, match=words):
        report = robust_eval(lambda v: scale*tiny()(v), *some, (14/255,), ["apgd-ce"], n_iter=10)
    assert words in report.card["logits"]["note"]
    assert scale_of(tiny()(some[0]).detach(), some[1])["note"] == ""


def test_scale_fools_the_cross_entropy_only(some):
    "At a wrong scale the model looks robust, unless the loss has no scale."
    stands = lambda s, loss: (~apgd(lambda v: s*tiny()(v), *some, eps=14/255, loss=loss, n_iter=20).broken).sum().item()
    assert stands(1e4, "ce") > stands(1, "ce") and stands(1e4, "dlr") == stands(1, "dlr")


def test_images_outside_the_ball_are_an_error(some):
    x, y = some
    found = AttackResult(torch.ones(16, dtype=torch.bool), (x+.2).clamp(0, 1), x, torch.zeros(16))
    with pytest.raises(RuntimeError, match="left the ball"): verified(tiny(), x, y, found, 2/255)
    found.x_adv = x.clone()
    status, _ = verified(tiny(), x, y, found, 2/255)
    assert (status == 1).all(), "a success that is none does not count"


def test_training_mode_is_refused(some):
    with pytest.raises(ValueError, match="training mode"):
        robust_eval(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10)), *some)


def test_collapsed_predictor_is_flagged(data):
    constant = lambda v: torch.tensor([2., 0, 0, 0, 0, 0, 0, 0, 0, 0])+0*v.mean((1, 2, 3))[:, None]
    good, bad = (robust_eval(f, data["x"], data["y"], (2/255,), n_iter=2) for f in (tiny(), constant))
    assert bad.collapsed and not bad.valid and good.valid
    table = robust_table({("a", "m"): good, ("b", "m"): bad}).set_index(["data", "metric"])
    assert "near majority" in table.loc[("b", "robust_2"), "flags"]
    assert table.loc[("average_valid", "clean"), "mean"] == good.clean.double().mean().item()


# A killed run

WORK = """
import sys, time
sys.path[:0] = ["tests"]
import torch
torch.set_num_threads(1)
from test_robust import long_run, tiny
f = tiny()
long_run(lambda v: time.sleep(.002) or f(v), sys.argv[1])
"""


def long_run(f, path):
    d = golden("robust", "tiny_inputs.npz")
    return robust_eval(f, d["x"], d["y"], (10/255, 14/255), n_iter=30, batch_size=6, resume=path)


def test_killed_run_loses_nothing(root, tmp_path):
    state = tmp_path/"state.npz"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "-c", WORK, state], cwd=root, env=env)
    while first.poll() is None and not (state.exists() and np.load(state)["cost"][0] > 500): time.sleep(.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = np.load(state)
    stages = [k for k in before if "apgd" in k]
    assert len(stages) < 4 or (before[stages[-1]] == -1).any(), "the run was really stopped early"
    calls, f = [], tiny()
    resumed, whole = long_run(lambda v: calls.append(len(v)) or f(v), state), long_run(f, None)
    assert sum(calls) < whole.card["cost"]["forward"], "nothing was done twice"
    assert resumed.card == whole.card and resumed.table().equals(whole.table())
    for key, s in whole.status.items(): assert torch.equal(resumed.status[key], s)
