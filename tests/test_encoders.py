"Every fast path computes what the plain one does: encoders, the update on the copy, micro-batches, the double backward, the optimiser."
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reclip_nb.attacks import pgd
from reclip_nb.models import AttackEncoder, UpdateEncoder, as_tower, frozen, frozen_encoder, load_clip
from reclip_nb.models.encoders import Bf16Copy, has_dropout, has_product_form, product_steps
from reclip_nb.objectives import AFT, Attack, epg_loss
from reclip_nb.training import FitConfig
from reclip_nb.training.loop import backward
from reclip_nb.training.schedule import autocast, optimizer
from reclip_nb.worlds import WORLDS, ShapesDataset

TOWERS = ("tiny-smoke", "tiny-siglip", "tiny-rn")     # class token, pooler, ResNet


def bf16(): return torch.autocast("cpu", torch.bfloat16)


def flat(grads): return torch.cat([g.flatten() for g in grads])


def apart(clip, scale=.02):
    "Move a student away from its reference, as training does."
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in clip.visual.parameters(): p.add_(scale*torch.randn(p.shape, generator=gen))
    return clip


@pytest.fixture(scope="module")
def images(): return ShapesDataset(WORLDS["smoke"], "train", seed=0).tensors(range(32))[0]


@pytest.fixture
def student(): return apart(load_clip("tiny-smoke", seed=0))


@pytest.fixture
def teacher(): return frozen(load_clip("tiny-smoke", seed=0))


def weight_gradients(clip, encode, x):
    "Of a fixed projection of the embeddings; a weight that is not used has none."
    e = encode(x)
    w = torch.linspace(-1, 1, e.numel()).view_as(e).to(e)
    grads = torch.autograd.grad((e*w).sum(), [*clip.visual.parameters()], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, clip.visual.parameters())]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("lean", [False, True])
def test_encoders_are_the_model(name, lean):
    "Value and pixel gradient in double precision."
    clip = load_clip(name, seed=0).double().eval()
    if lean and not has_product_form(clip.visual): pytest.skip("no lean form")
    x = torch.rand(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    tower = as_tower(clip.visual)
    fast = frozen_encoder(clip)
    if lean: fast = lambda v: tower.through(v, product_steps(tower))
    got, want = fast(clip.normalize(x)), clip.encode_image(x, normalize=False)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(e.square().sum(), x)[0] for e in (got, want)))


def test_last_block_for_the_class_token():
    "Its row is the whole block's, and no other row is computed."
    clip = load_clip("tiny-smoke", seed=0).double()
    tower = as_tower(clip)
    h = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row, whole = tower.last(h), tower.block(h, tower.n_layers-1)
    assert row.shape[1] == 1 < whole.shape[1]
    torch.testing.assert_close(row, whole[:, :1])


@pytest.mark.parametrize("name", TOWERS)
def test_without_autocast_live_is_the_model(name):
    "The update in double precision has the model's embeddings and the model's gradients."
    own, other = (load_clip(name, seed=0).double().train() for _ in range(2))
    x = torch.rand(2, 3, *own.image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    e, f = own.encode_image(x), UpdateEncoder(AttackEncoder(other).sync()).encode_image(x)
    torch.testing.assert_close(f, e)
    target = torch.randn(e.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for clip, v in ((own, e), (other, f)): (v*target).sum().backward()
    for p, q in zip(own.visual.parameters(), other.visual.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None: torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_update_on_the_copy(student, images, recompute):
    "Gradients reach every weight of the student, in its own precision, and are at least as exact as autocast's."
    want = weight_gradients(student, student.encode_image, images)
    with bf16(): auto = weight_gradients(student, student.encode_image, images)
    if recompute: student.visual.set_grad_checkpointing()
    with bf16():
        live = UpdateEncoder(AttackEncoder(student).sync())
        got = weight_gradients(student, live.encode_image, images)
    assert isinstance(live.attack_encoder.run, Bf16Copy) and {g.dtype for g in got} == {torch.float32}
    assert all(g.abs().sum() > 0 for g in got)
    assert F.cosine_similarity(flat(got), flat(want), dim=0) > .999
    assert (flat(got)-flat(want)).norm() <= (flat(auto)-flat(want)).norm()
    for g, a, w in zip(got, auto, want): assert (g-w).norm() <= 1.5*(a-w).norm()+1e-3*w.norm()


def test_recomputing_changes_nothing(student, images):
    "Checkpointed blocks give the same gradient to the last bit, and keep less."
    found, kept, fast = [], [], AttackEncoder(student)
    for recompute in (False, True):
        student.visual.set_grad_checkpointing(recompute)   # also after the copy was made
        sizes = {}
        def pack(t, sizes=sizes): sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        with bf16():
            live = UpdateEncoder(fast.sync())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): e = live.encode_image(images)
        kept.append(sum(sizes.values()))
        found.append(torch.autograd.grad(e[:, 0].sum(), [*student.visual.parameters()]))
    assert torch.equal(*map(flat, found)) and kept[1] < .8*kept[0]


def test_random_depth_is_not_skipped():
    "A tower that drops patches in training mode goes through its own forward pass."
    clip = load_clip("tiny-smoke", seed=0)
    assert not has_dropout(clip.visual)
    clip.visual.patch_dropout = torch.nn.Dropout(.5)
    assert has_dropout(clip.visual)
    clip.train()
    x = torch.rand(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    with bf16(), torch.random.fork_rng(devices=[]):
        live = UpdateEncoder(AttackEncoder(clip).sync())
        assert not torch.equal(live.encode_image(x), live.encode_image(x))


def test_attack_in_bfloat16(student, teacher, images):
    "Signs of the first step agree, and in single precision the attack reaches the same loss."
    target, deltas = teacher.encode_image(images), {}
    distance = lambda e: (e-target).square().sum(-1)
    for precision in ("fp32", "bf16"):
        with autocast(images.device, precision):
            fast = AttackEncoder(student).sync()
            deltas[precision] = [pgd(lambda v: distance(fast.encode_image(v)), images, steps=n, start="zero") for n in (1, 10)]
    (a, full), (b, coarse) = deltas.values()
    assert (a.sign() == b.sign()).float().mean() > .9
    with torch.no_grad(): worst, reached = (distance(student.encode_image(images+d)).mean() for d in (full, coarse))
    assert reached > .98*worst


def test_references_are_copied_once(student, teacher, images):
    "A fixed copy stays; the student's follows."
    with bf16():
        kept, follows = AttackEncoder(teacher, fixed=True), AttackEncoder(student)
        for fast, moves in ((kept, False), (follows, True)):
            before = fast.sync().encode_image(images)
            with torch.no_grad(): fast.clip.visual.proj.mul_(-1)
            assert torch.equal(fast.sync().encode_image(images), -before if moves else before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_add_up(student, teacher, images, precision):
    "Four micro-batches give the gradient of one batch: no noise, zero start, so that the attack does not depend on the draw."
    aft, grads = AFT(student, teacher, Attack(steps=2, start="zero", sigma=0.)), []
    for accumulate in (1, 4):
        student.zero_grad()
        backward(aft, dict(image=images), FitConfig(steps=1, batch_size=32, lr=1e-3, accumulate=accumulate, precision=precision), 0)
        grads.append(flat([p.grad for p in student.visual.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > (.99999 if precision == "fp32" else .99)
    assert abs(grads[0].norm()/grads[1].norm()-1) < (1e-4 if precision == "fp32" else .05)


def saliency_gradients(clip, teacher, x):
    mask = torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool); mask[:, 8:24, 8:24] = True
    return flat(torch.autograd.grad(epg_loss(clip, teacher, x, mask), [*clip.visual.parameters()], allow_unused=False))


def test_double_backward_is_exact(student, images):
    "Explicit softmax against torch's math attention, in double precision."
    x = images[:8].double()
    clip = student.double().eval()
    v = clip.normalize(x)
    e, twice = clip.visual(v), as_tower(clip, trainable=True).encode_second_order
    torch.testing.assert_close(twice(v), e)
    found = {}
    for name, encode in dict(plain=clip.visual, explicit=twice).items():
        z = v.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            g, = torch.autograd.grad(F.normalize(encode(z), dim=-1)[:, 0].sum(), z, create_graph=True)
            found[name] = flat(torch.autograd.grad(g.abs().sum(), [*clip.visual.parameters()], allow_unused=False))
    torch.testing.assert_close(found["explicit"], found["plain"])


def test_saliency_loss_in_bfloat16(student, teacher, images):
    "What bfloat16 leaves of the exact gradient."
    want = saliency_gradients(student, teacher, images)
    with bf16(): got = saliency_gradients(student, teacher, images)
    assert F.cosine_similarity(got, want, dim=0) > .95


def test_fused_optimiser(student):
    "One kernel for all weights makes the update of the default one, up to the last digits."
    start, found = {k: v.clone() for k, v in student.visual.state_dict().items()}, []
    for precision in ("fp32", "bf16"):
        student.visual.load_state_dict(start)
        opt = optimizer(student.visual, FitConfig(steps=3, batch_size=1, lr=1e-3, precision=precision))
        assert bool(opt.defaults["fused"]) == (precision == "bf16")
        gen = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in student.visual.parameters(): p.grad = torch.randn(p.shape, generator=gen)
            opt.step()
        found.append(flat(student.visual.parameters()).detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert (found[0]-flat(start[k] for k, _ in student.visual.named_parameters())).abs().mean() > 1e-3


@pytest.mark.slow
def test_compiled_copy(student, images):
    "torch.compile builds the copy; values and pixel gradients agree up to bfloat16's rounding."
    found = []
    for compiled in (False, True):
        v = images.clone().requires_grad_()
        with bf16(): e = AttackEncoder(student, compiled=compiled).sync().encode_image(v)
        found.append((e, torch.autograd.grad(e[:, 0].sum(), v)[0]))
    for a, b in zip(*found): assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > .99


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_aft", Path(__file__).parent/"bench"/"aft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_compares_like_with_like(bench):
    "The loop that tests/bench times against ours finds the same perturbation, update and saliency loss."
    student, teacher = bench.models("tiny-smoke")
    x, mask = bench.images(4, student).values()
    gen = lambda: bench.step_generator(0, 0)
    with torch.no_grad(): target = bench.embed(teacher, x)
    ours, plain = bench.our_attack(student, teacher, x, gen(), "fp32"), bench.plain_attack(student, x, target, gen())
    assert (ours-plain).abs().lt(1e-5).float().mean() > .99 and plain.abs().max() > 2/255
    torch.testing.assert_close(epg_loss(student, target, x, mask), bench.plain_epg(student, target, x, mask), rtol=1e-4, atol=1e-5)
    own = bench.AFT(student, teacher, bench.Attack())(dict(image=x), gen())["loss"].item()
    opt = torch.optim.AdamW(student.visual.parameters(), lr=bench.LR)
    assert bench.plain_step(student, teacher, opt, x, gen()) == pytest.approx(own, rel=1e-3)


def test_benchmark_counts_what_is_kept(bench):
    "One float32 tensor for an image, none for weights and none for what is gone again."
    layer = torch.nn.Linear(10, 1000)
    def forward(x):
        x.exp().sum()
        return layer(x)
    assert bench.kept(forward, torch.rand(2, 10)) == pytest.approx((1000+10)*4/1e6, rel=.05)
    visual = load_clip("tiny-smoke", seed=0).visual
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        visual(torch.rand(1, 3, 32, 32))
    assert bench.flops(visual) == pytest.approx(counter.get_total_flops(), rel=.01)
