"Objectives and training loop, beyond the checks of the notebooks: ResNet, bf16, text objective, probes, energy."
import pytest
import torch

from reclip_nb.data import step_batches
from reclip_nb.models import frozen, load_clip
from reclip_nb.objectives import AFT, EPG, Attack, aft_loss, epg_loss
from reclip_nb.study import read_rows, start_run
from reclip_nb.training import FitConfig, energy_meter, energy_used, fit, schedule
from reclip_nb.training.checkpoints import drop_checkpoints
from reclip_nb.worlds import ShapesDataset, World


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    return start_run("t", "r", "test", {})


@pytest.fixture(scope="module")
def data(): return ShapesDataset(World(size=32, train=64), "train", seed=0)


@pytest.fixture
def student(): return load_clip("tiny-smoke", seed=0)


def batch_of(data, n=8): return next(step_batches(data, n, 0, 0, 1))[1]


def test_epg_on_a_resnet():
    "Double backward through ResNet-50 and its attention pool, against a central difference."
    clip, ref = (load_clip("RN50", image_size=64, seed=s).double() for s in (0, 1))
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 64, 64, generator=gen, dtype=torch.float64)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[:, 16:40, 16:40] = True
    target = ref.encode_image(x).detach()
    p = clip.visual.attnpool.c_proj.weight
    grad, = torch.autograd.grad(epg_loss(clip, target, x, mask), p)
    direction = torch.randn(p.shape, generator=gen, dtype=p.dtype)
    direction /= direction.norm()
    def loss_at(h):
        with torch.no_grad(): p.add_(h*direction)
        value = epg_loss(clip, target, x, mask, create_graph=False).item()
        with torch.no_grad(): p.sub_(h*direction)
        return value
    difference = (loss_at(1e-5)-loss_at(-1e-5))/2e-5
    assert (grad*direction).sum().item() == pytest.approx(difference, rel=1e-3)


def test_first_epg_step_from_the_reference_is_not_noise(run, student, data):
    "The gradient of the score is zero at the reference; its rounding errors must not train the model."
    objective = EPG(AFT(student, frozen(student), Attack(steps=1)), w_s=.6)
    rows = fit(student.visual, objective, data, FitConfig(2, 8, 1e-4), run)
    assert rows[0]["epg"] == 0 and rows[0]["grad_norm"] < 10 and rows[1]["epg"] > 0


def test_text_objective_is_bounded_by_the_image_objective(student, data):
    teacher, batch = frozen(student), batch_of(data)
    with torch.no_grad():
        for p in student.visual.parameters():
            p.add_(.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    aft = AFT(student, teacher, Attack(steps=1), compare="text")
    target, text = aft.references(batch)
    zero = torch.zeros_like(batch["image"])
    by_text, by_image = (aft_loss(student, batch["image"], zero, target, text=t) for t in (text, None))
    assert (by_text <= by_image+1e-6).all() and by_text.sum() > 0
    assert aft(batch, torch.Generator().manual_seed(0))["loss"].requires_grad
    del batch["caption"]
    with pytest.raises(ValueError, match="needs captions"): aft(batch, None)


def test_clean_weight_and_trades(student, data):
    x = batch_of(data)["image"]
    delta = .03*torch.ones_like(x)
    target = load_clip("tiny-smoke", seed=1).encode_image(x).detach()
    both = [aft_loss(student, x, d, target) for d in (torch.zeros_like(x), delta)]
    torch.testing.assert_close(aft_loss(student, x, delta, target, clean_weight=.3), .3*both[0]+.7*both[1])
    trades = aft_loss(student, x, delta, target, trades=True)
    torch.testing.assert_close(trades, aft_loss(student, x, delta, student.encode_image(x).detach()))


def test_expectation_over_noise_is_inside_the_norm(student, data):
    x = batch_of(data)["image"]
    target = load_clip("tiny-smoke", seed=1).encode_image(x).detach()
    z = .05*torch.randn((3, *x.shape), generator=torch.Generator().manual_seed(0))
    mean = torch.stack([student.encode_image((x+zi).clamp(0, 1)) for zi in z]).mean(0)
    loss = aft_loss(student, x, torch.zeros_like(x), target, z=z)
    torch.testing.assert_close(loss, (mean-target).square().sum(-1), rtol=1e-4, atol=1e-6)


def test_bf16_follows_fp32(tmp_path, monkeypatch, data):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    curves = {}
    for precision in ("fp32", "bf16"):
        student = load_clip("tiny-smoke", seed=0)
        aft = AFT(student, frozen(student), Attack(steps=2))
        cfg = FitConfig(6, 16, 5e-4, precision=precision)
        rows = fit(student.visual, aft, data, cfg, start_run("t", precision, "test", {}))
        curves[precision] = torch.tensor([r["aft"] for r in rows])
    assert not torch.equal(*curves.values())
    torch.testing.assert_close(curves["bf16"], curves["fp32"], rtol=.25, atol=.01)


def test_probe_rows_state_their_cost(run, student, data):
    aft = AFT(student, frozen(student), Attack(steps=1))
    modes = []
    def probe():
        modes.append(student.visual.training)
        return dict(clean=.5)
    rows = fit(student.visual, aft, data, FitConfig(6, 8, 1e-4), run, probe=probe, probe_every=2, log_every=2)
    probes = read_rows(run, "probes.jsonl")
    assert [p["step"] for p in probes] == [1, 3, 5] and all(p["seconds"] >= 0 and p["clean"] == .5 for p in probes)
    assert modes == [False]*3 and [r["step"] for r in rows] == [0, 2, 4, 5]
    drop_checkpoints(run)
    assert not list(run.path.glob("checkpoint*"))


def test_settings_are_checked():
    for bad in (dict(steps=0), dict(warmup=10), dict(accumulate=3), dict(precision="fp16")):
        with pytest.raises(ValueError): FitConfig(**dict(steps=10, batch_size=8, lr=1e-3) | bad)
    assert schedule(9, 1., 0, 10) < .1


def test_energy(run):
    with energy_meter(run, ""): pass
    assert energy_used(run) == {}
    with energy_meter(run, "NLD"): torch.rand(500, 500) @ torch.rand(500, 500)
    used = energy_used(run)
    assert used["kwh"] == pytest.approx(used["cpu"]+used["gpu"]+used["ram"])
    assert used["co2e_kg"] >= 0 and used["country"] == "NLD"
    with energy_meter(run, "NLD"): torch.rand(500, 500) @ torch.rand(500, 500)
    assert energy_used(run)["kwh"] >= used["kwh"], "the energy of a resumed run is added"
