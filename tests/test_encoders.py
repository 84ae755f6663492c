"""The encoders of attack and update equal the model; so do micro-batches, the double backward and the fused optimiser.

Also: the benchmark tests/bench/aft.py compares like with like."""
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

TOWERS = ("tiny-smoke", "tiny-siglip", "tiny-rn")  # class token, pooler, ResNet


def bf16(): return torch.autocast("cpu", torch.bfloat16)


def flat(grads): return torch.cat([g.flatten() for g in grads])


def perturbed(clip, scale=.02):
    "A student moved away from its reference, as training does."
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in clip.visual.parameters(): p.add_(scale*torch.randn(p.shape, generator=gen))
    return clip


@pytest.fixture(scope="module")
def images(): return ShapesDataset(WORLDS["smoke"], "train", seed=0).tensors(range(32))[0]


@pytest.fixture
def student(): return perturbed(load_clip("tiny-smoke", seed=0))


@pytest.fixture
def teacher(): return frozen(load_clip("tiny-smoke", seed=0))


def weight_gradients(clip, encode, x):
    "Gradients of a fixed projection of the embeddings; zero for a weight that is not used."
    e = encode(x)
    w = torch.linspace(-1, 1, e.numel()).view_as(e).to(e)
    parameters = [*clip.visual.parameters()]
    grads = torch.autograd.grad((e*w).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("rewritten", [False, True], ids=["frozen_encoder", "product_steps"])
def test_matrix_products_equal_the_model(name, rewritten):
    "Value and pixel gradient in double precision."
    clip = load_clip(name, seed=0).double().eval()
    if rewritten and not has_product_form(clip.visual): pytest.skip("no matrix-product form")
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *clip.image_size, generator=gen, dtype=torch.float64).requires_grad_()
    tower = as_tower(clip.visual)
    encode = (lambda v: tower.through(v, product_steps(tower))) if rewritten else frozen_encoder(clip)
    embeddings, want = encode(clip.normalize(x)), clip.encode_image(x, normalize=False)
    torch.testing.assert_close(embeddings, want)
    torch.testing.assert_close(*(torch.autograd.grad(e.square().sum(), x)[0] for e in (embeddings, want)))


def test_last_block_for_the_class_token():
    "Only the row of the class token is computed, and it equals that of the full block."
    clip = load_clip("tiny-smoke", seed=0).double()
    tower = as_tower(clip)
    h = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row, every_row = tower.last(h), tower.block(h, tower.n_layers-1)
    assert row.shape[1] == 1 < every_row.shape[1]
    torch.testing.assert_close(row, every_row[:, :1])


@pytest.mark.parametrize("name", TOWERS)
def test_without_autocast_the_update_encoder_equals_the_model(name):
    "In double precision: same embeddings, same weight gradients."
    model, other = (load_clip(name, seed=0).double().train() for _ in range(2))
    x = torch.rand(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want, embeddings = model.encode_image(x), UpdateEncoder(AttackEncoder(other).sync()).encode_image(x)
    torch.testing.assert_close(embeddings, want)
    target = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for e in (want, embeddings): (e*target).sum().backward()
    for p, q in zip(model.visual.parameters(), other.visual.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None: torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_update_through_the_bfloat16_copy(student, images, recompute):
    "Gradients reach every weight of the student, in its own precision, and are at least as exact as autocast's."
    exact = weight_gradients(student, student.encode_image, images)
    with bf16(): autocasts = weight_gradients(student, student.encode_image, images)
    if recompute: student.visual.set_grad_checkpointing()
    with bf16():
        encoder = UpdateEncoder(AttackEncoder(student).sync())
        ours = weight_gradients(student, encoder.encode_image, images)
    assert isinstance(encoder.attack_encoder.run, Bf16Copy) and {g.dtype for g in ours} == {torch.float32}
    assert all(g.abs().sum() > 0 for g in ours)
    assert F.cosine_similarity(flat(ours), flat(exact), dim=0) > .999
    assert (flat(ours)-flat(exact)).norm() <= (flat(autocasts)-flat(exact)).norm()
    for g, a, e in zip(ours, autocasts, exact, strict=True):
        assert (g-e).norm() <= 1.5*(a-e).norm()+1e-3*e.norm()


def stored(encode, images):
    "The embeddings, and the bytes that their forward pass stores for the backward pass."
    sizes = {}
    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor): e = encode(images)
    return e, sum(sizes.values())


def test_recomputing_does_not_change_the_gradient(student, images):
    "Checkpointed blocks give the same gradient to the last bit and store less."
    grads, sizes = [], []
    encoder = AttackEncoder(student)
    for recompute in (False, True):
        student.visual.set_grad_checkpointing(recompute)  # also after the copy was made
        with bf16(): e, size = stored(UpdateEncoder(encoder.sync()).encode_image, images)
        sizes.append(size)
        grads.append(torch.autograd.grad(e[:, 0].sum(), [*student.visual.parameters()]))
    assert torch.equal(*map(flat, grads)) and sizes[1] < .8*sizes[0]


def test_dropout_is_not_skipped():
    "A tower that drops patches in training mode uses its own forward pass."
    clip = load_clip("tiny-smoke", seed=0)
    assert not has_dropout(clip.visual)
    clip.visual.patch_dropout = torch.nn.Dropout(.5)
    assert has_dropout(clip.visual)
    clip.train()
    x = torch.rand(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    with bf16(), torch.random.fork_rng(devices=[]):
        encoder = UpdateEncoder(AttackEncoder(clip).sync())
        assert not torch.equal(encoder.encode_image(x), encoder.encode_image(x))


def test_attack_in_bfloat16(student, teacher, images):
    "Signs of the first step agree, and in single precision the attack reaches the same loss."
    target = teacher.encode_image(images)
    distance = lambda e: (e-target).square().sum(-1)
    def attack(precision, steps):
        with autocast(images.device, precision):
            encoder = AttackEncoder(student).sync()
            return pgd(lambda v: distance(encoder.encode_image(v)), images, steps=steps, start="zero")
    first = [attack(precision, 1) for precision in ("fp32", "bf16")]
    assert (first[0].sign() == first[1].sign()).float().mean() > .9
    with torch.no_grad():
        worst, reached = (distance(student.encode_image(images+attack(p, 10))).mean() for p in ("fp32", "bf16"))
    assert reached > .98*worst


def test_references_are_copied_once(student, teacher, images):
    "A fixed encoder keeps its first copy; that of the student is refreshed."
    with bf16():
        for encoder in (AttackEncoder(teacher, fixed=True), AttackEncoder(student)):
            before = encoder.sync().encode_image(images)
            with torch.no_grad(): encoder.clip.visual.proj.mul_(-1)
            assert torch.equal(encoder.sync().encode_image(images), before if encoder.fixed else -before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_add_up(student, teacher, images, precision):
    "Four micro-batches give the gradient of one batch. No noise and a zero start, so the attack is not random."
    aft = AFT(student, teacher, Attack(steps=2, start="zero", sigma=0.))
    grads = []
    for accumulate in (1, 4):
        student.zero_grad()
        cfg = FitConfig(steps=1, batch_size=32, lr=1e-3, accumulate=accumulate, precision=precision)
        backward(aft, dict(image=images), cfg, 0)
        grads.append(flat([p.grad for p in student.visual.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > (.99999 if precision == "fp32" else .99)
    assert abs(grads[0].norm()/grads[1].norm()-1) < (1e-4 if precision == "fp32" else .05)


def saliency_gradients(clip, teacher, x):
    mask = torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool)
    mask[:, 8:24, 8:24] = True
    return flat(torch.autograd.grad(epg_loss(clip, teacher, x, mask), [*clip.visual.parameters()], allow_unused=False))


def test_double_backward_is_exact(student, images):
    "The explicit softmax equals torch's math attention, in double precision."
    x = images[:8].double()
    clip = student.double().eval()
    v = clip.normalize(x)
    second_order = as_tower(clip, trainable=True).encode_second_order
    torch.testing.assert_close(second_order(v), clip.visual(v))
    grads = []
    for encode in (clip.visual, second_order):
        z = v.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            g, = torch.autograd.grad(F.normalize(encode(z), dim=-1)[:, 0].sum(), z, create_graph=True)
            grads.append(flat(torch.autograd.grad(g.abs().sum(), [*clip.visual.parameters()], allow_unused=False)))
    torch.testing.assert_close(*grads)


def test_saliency_loss_in_bfloat16(student, teacher, images):
    "The bfloat16 gradient has nearly the direction of the exact one."
    exact = saliency_gradients(student, teacher, images)
    with bf16(): coarse = saliency_gradients(student, teacher, images)
    assert F.cosine_similarity(coarse, exact, dim=0) > .95


def test_fused_optimiser(student):
    "A single kernel for all weights makes the same update as the default, up to the last digits."
    start = {k: v.clone() for k, v in student.visual.state_dict().items()}
    weights = []
    for precision in ("fp32", "bf16"):
        student.visual.load_state_dict(start)
        opt = optimizer(student.visual, FitConfig(steps=3, batch_size=1, lr=1e-3, precision=precision))
        assert bool(opt.defaults["fused"]) == (precision == "bf16")
        gen = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in student.visual.parameters(): p.grad = torch.randn(p.shape, generator=gen)
            opt.step()
        weights.append(flat(student.visual.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    assert (weights[0]-flat(start[k] for k, _ in student.visual.named_parameters())).abs().mean() > 1e-3


@pytest.mark.slow
def test_compiled_copy(student, images):
    "With torch.compile, the copy gives the same values and pixel gradients up to the rounding of bfloat16."
    embeddings, grads = [], []
    for compiled in (False, True):
        v = images.clone().requires_grad_()
        with bf16(): e = AttackEncoder(student, compiled=compiled).sync().encode_image(v)
        embeddings.append(e.flatten())
        grads.append(torch.autograd.grad(e[:, 0].sum(), v)[0].flatten())
    assert F.cosine_similarity(*embeddings, dim=0) > .99 and F.cosine_similarity(*grads, dim=0) > .99


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_aft", Path(__file__).parent/"bench"/"aft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_compares_like_with_like(bench):
    "The published loop, as tests/bench times it, gives the same perturbation, update and saliency loss as ours."
    student, teacher = bench.models("tiny-smoke")
    x, mask = bench.images(4, student).values()
    gen = lambda: bench.step_generator(0, 0)
    with torch.no_grad(): target = bench.embed(teacher, x)
    ours, plain = bench.our_attack(student, teacher, x, gen(), "fp32"), bench.plain_attack(student, x, target, gen())
    assert (ours-plain).abs().lt(1e-5).float().mean() > .99 and plain.abs().max() > 2/255
    saliency_losses = epg_loss(student, target, x, mask), bench.plain_epg(student, target, x, mask)
    torch.testing.assert_close(*saliency_losses, rtol=1e-4, atol=1e-5)
    loss = bench.AFT(student, teacher, bench.Attack())(dict(image=x), gen())["loss"].item()
    opt = torch.optim.AdamW(student.visual.parameters(), lr=bench.LR)
    assert bench.plain_step(student, teacher, opt, x, gen()) == pytest.approx(loss, rel=1e-3)


def test_benchmark_counts_stored_bytes(bench):
    "Input and output of each image are counted; weights and tensors that are already freed are not."
    layer = torch.nn.Linear(10, 1000)
    def forward(x):
        x.exp().sum()
        return layer(x)
    assert bench.stored_mb(forward, torch.rand(2, 10)) == pytest.approx((1000+10)*4/1e6, rel=.05)
    visual = load_clip("tiny-smoke", seed=0).visual
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        visual(torch.rand(1, 3, 32, 32))
    assert bench.flops(visual) == pytest.approx(counter.get_total_flops(), rel=.01)
