"""Machines that round otherwise: a classifier as they compute it, and an attack that follows its reference there.

An attack takes the sign of a gradient, sorts logits and compares losses. Where such a decision lies within rounding of
a switch, two machines go different ways, and every later number differs. The state of the attack is exact bookkeeping:
rounding enters through the classifier alone. So a parting from a reference is one of rounding exactly if the same
attack takes the reference's way on a classifier whose logits and gradients are off by a few units in the last place.
"""
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from reclip_nb.attacks import AttackResult

MACHINES = 128
FACTORS = (-4658895280553007687, -7723592293110705685)   # those of splitmix64


def scatter(x: Tensor, n: int, seed: int) -> Tensor:
    "n numbers in [-1, 1) for each row of x, float64 (B,n): equal bits have equal numbers, on every machine."
    bits = x.detach().contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32).flatten(1).long()
    gen = torch.Generator().manual_seed(seed)
    keys = [torch.randint(-2**62, 2**62, (size,), generator=gen) for size in (bits.shape[1], n)]
    mixed = (bits*(keys[0] | 1)).sum(1, keepdim=True)+keys[1]
    for shift, factor in zip((30, 27), FACTORS): mixed = (mixed ^ ((mixed >> shift) & (2**(64-shift)-1)))*factor
    return (mixed >> 11).double()/2**52


def last_place(v: Tensor, ulps: float) -> Tensor:
    "What `ulps` units in the last place of the largest entry of each row are, (B,1)."
    return ulps*torch.finfo(v.dtype).eps*v.detach().flatten(1).abs().amax(1, keepdim=True)


class OtherGradient(torch.autograd.Function):
    "The identity; the gradient that comes back is off by rounding, its exact zeros are not."

    @staticmethod
    def forward(ctx, x, seed, ulps):
        ctx.save_for_backward(x)
        ctx.seed, ctx.ulps = seed, ulps
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        off = last_place(grad, ctx.ulps)*scatter(x, grad[0].numel(), ctx.seed).to(grad.dtype)
        return torch.where(grad == 0, grad, grad+off.view_as(grad)), None, None


def elsewhere(
    f: Callable, # images (B,3,H,W) -> logits (B,C)
    seed: int, # which machine
    ulps: float = 1., # how far off, in units in the last place of the largest logit or gradient entry of the image
) -> Callable:
    "f on a machine that rounds otherwise; like any machine, it computes the same from the same image."
    def rounded(v):
        logits = f(OtherGradient.apply(v, seed, ulps))
        return logits+last_place(logits, ulps)*scatter(v, logits.shape[1], seed+1).to(logits.dtype)
    return rounded


def with_rows_of(here: AttackResult, there: AttackResult, rows: Tensor) -> AttackResult:
    "The result `here`, with some images as `there`."
    def mix(a, b): return torch.where(rows.view(-1, *[1]*(a.ndim-1)), b, a)
    trace = {k: mix(v.T, there.trace[k].T).T for k, v in here.trace.items()}
    each = {s.name: mix(getattr(here, s.name), getattr(there, s.name)) for s in fields(here)
            if isinstance(getattr(here, s.name), Tensor)}
    return replace(here, trace=trace, **each)


def exceeded(
    bounds: dict[str, tuple], # name -> amount by which each image misses, (B,), and the sum that is allowed
) -> list[str]:
    "Names of the bounds that do not hold."
    return [name for name, (amount, allowed) in bounds.items() if amount.sum() > allowed]


def followed(
    attack: Callable, # classifier -> AttackResult with its trace
    f: Callable, # classifier
    bounds: Callable, # AttackResult -> what `exceeded` takes
    floor: Tensor, # the reference's best losses, less their tolerance, (B,)
    machines: int = MACHINES, # how many others are asked
) -> tuple[AttackResult, Tensor]:
    """Holds an attack to its reference. An image that parts must take the reference's way, to the old bounds and to the
    end, where nothing but rounding differs; a loss worse than the reference's must be so by rounding elsewhere too.
    Returns the attack's own result and the images that part, (B,) bool."""
    here = attack(f)
    nearest, parted = here, torch.zeros(len(floor), dtype=torch.bool)
    worse = here.loss_best < floor
    for seed in range(machines):
        if not exceeded(bounds(nearest)) and not worse.any(): break
        there = attack(elsewhere(f, 2*seed, 2.**(seed % 6-1)))
        far, near = (sum(amount.double() for amount, _ in bounds(found).values()) for found in (nearest, there))
        nearest, parted = with_rows_of(nearest, there, near < far), parted | (near < far)
        worse = worse & (there.loss_best > here.loss_best+1e-4*here.loss_best.abs())
    missed = exceeded(bounds(nearest))
    assert not missed, f"no rounding leads from this attack to {missed} of the reference"
    assert not worse.any(), f"images {worse.nonzero()[:, 0].tolist()} have a lower loss than any rounding explains"
    return here, parted
