"""Cost of a step of adversarial fine-tuning, ViT-B/16 with random weights: time, stored memory, bfloat16.

    python tests/bench/aft.py [--device cpu|cuda] [--model NAME] [--batch N] [--repeats N] [--large NAME]
                              [--peak-tflops T] [--json FILE]

"plain" is the published loop, written below from its description on open_clip's own forward pass: single precision,
uniform start, ten sign steps with momentum, smoothing noise and the pixel penalty; weights require gradients during
the attack, the clean images are encoded once more for the log, and every iteration checks its numbers on the host.
"fp32" and "bf16" are this library as a user calls it: `AFT`, `backward`, `gradient_norm` and `optimizer`. All three
use the same start and the same noise.

The programs alternate in one process. Times on the CPU are process seconds of one thread, on a GPU wall seconds
between synchronisations; ratios are of minima and of medians. Memory is the size of the storages that a forward
pass leaves behind, per image: two images minus one, so that weights and their casts do not count. Without --device,
the CPU is measured and, if there is one, the GPU; rows of a device that is not measured keep the numbers in FILE,
or say "not measured"."""
import argparse
import contextlib
import copy
import gc
import importlib.metadata
import itertools
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.nn.functional as F
from machine import machine
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reclip_nb.explain import EXPLAINERS, explain
from reclip_nb.models import AttackEncoder, UpdateEncoder, check_pixels, frozen, load_clip
from reclip_nb.objectives import AFT, EPG, Attack, epg_loss
from reclip_nb.training import FitConfig
from reclip_nb.training.loop import backward, gradient_norm
from reclip_nb.training.schedule import autocast, optimizer, step_generator

MODEL = "ViT-B-16-quickgelu"
STEPS, EPS, ALPHA, ETA, SIGMA, LR = 10, 4/255, 1/255, 1/255, 1/255, 1e-5
PAPER_HOURS, PAPER_STEPS = 34.6, 20_000
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A6000": 155, "4090": 165, "3090": 71,
         "L4": 121}  # bf16 TFLOP/s, dense

# targets
SPEEDUP = dict(fp32=1.05, bf16=2.8)  # minimum speed-up over plain, on the CPU
STORED = {"attack": 55, "update": 80}  # maximum MB per image in bfloat16
LOSS = dict(fp32=1e-2, bf16=2e-2)  # maximum relative difference from the loss that plain's attack reaches
GPU_SECONDS, GPU_EPG, EPG_COSINE = .30, 1.5, .95


# ---- plain programs -----------------------------------------------------------------------------------------

def embed(clip, x):
    "Unit embeddings by open_clip's own forward pass."
    return F.normalize(clip.visual((x-clip.mean)/clip.std), dim=-1)


def plain_attack(student, x, target, gen):
    "The published inner loop; returns the perturbation."
    delta = ((2*torch.rand(x.shape, generator=gen, device=x.device)-1)*EPS).requires_grad_()
    velocity = torch.zeros_like(x)
    for _ in range(STEPS):
        noise = torch.randn(x.shape, generator=gen, device=x.device)*SIGMA
        gain = (embed(student, (x+noise).clamp(0, 1)+delta)-target).square().sum(1).mean()
        penalty = ETA/EPS*delta.norm(dim=1).mean()
        grad, = torch.autograd.grad(gain-penalty, delta)
        with torch.no_grad():
            if grad.isnan().any():
                print("NaN gradients set to 0")
                grad[grad.isnan()] = 0
            velocity = (.9*velocity+grad.sign()).sign()
            delta += ALPHA*velocity
            delta.clamp_(-EPS, EPS)
            delta.copy_((x+delta).clamp(0, 1)-x)
            assert not delta.isnan().any()
            assert (x+delta).min() >= -1e-6 and (x+delta).max() <= 1+1e-6
    return delta.detach()


def plain_step(student, teacher, opt, x, gen):
    "The published step; returns the loss."
    with torch.no_grad(): target = embed(teacher, x)
    student.visual.eval()
    delta = plain_attack(student, x, target, gen)
    student.visual.train()
    clean = embed(student, x)  # for the log, with a graph
    adv = embed(student, x+delta)
    loss = (adv-target).square().sum(1).mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    (clean-target).square().sum(1).mean().item()  # read for the log, like the next line
    F.cosine_similarity(adv, target).mean().item()
    return loss.item()


def plain_epg(student, target, x, mask):
    "Share of the gradient outside the mask, differentiable; single precision, torch's math attention."
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        score = (embed(student, x)*target).sum()
        saliency = torch.autograd.grad(score, x, create_graph=True)[0].abs().sum(1)
        return (1-(saliency*mask).sum((1, 2))/saliency.sum((1, 2))).mean()


# ---- ours ---------------------------------------------------------------------------------------------------

def config(precision, batch): return FitConfig(steps=PAPER_STEPS, batch_size=batch, lr=LR, precision=precision)


def our_attack(student, teacher, x, gen, precision, steps=STEPS):
    "The perturbation found by the attack of the objective."
    aft = AFT(student, teacher, Attack(steps=steps))
    with autocast(x.device, precision): return aft.perturb(x, aft.references(dict(image=x))[0], None, gen)


class Step:
    "One update of the training loop, as `fit` makes it."
    def __init__(self, objective, student, cfg):
        self.objective = objective
        self.module = student.visual
        self.cfg = cfg
        self.opt = optimizer(student.visual, cfg)
        self.n = 0

    def __call__(self, batch):
        check_pixels(batch["image"])
        backward(self.objective, batch, self.cfg, self.n)
        gradient_norm(self.module, batch, self.n)
        self.opt.step()
        self.opt.zero_grad()
        self.n += 1


# ---- measuring ----------------------------------------------------------------------------------------------

def models(name, device="cpu"):
    "A student that differs from its teacher, as in training, and the teacher."
    teacher = frozen(load_clip(name, seed=0))
    gen = torch.Generator().manual_seed(0)
    student = load_clip(name, seed=0)
    with torch.no_grad():
        for p in student.visual.parameters(): p.add_(.002*torch.randn(p.shape, generator=gen))
    return student.to(device).train(), teacher.to(device)


def images(n, clip):
    "Images for a model, and masks of their lower right quarter."
    (h, w), device = clip.image_size, clip.mean.device
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    mask[:, h//2:, w//2:] = True
    return dict(image=x.to(device), mask=mask.to(device))


def seconds(program, *args, device="cpu"):
    "Process seconds on the CPU, wall seconds on a GPU."
    clock = time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    start = clock()
    program(*args)
    if device == "cuda": torch.cuda.synchronize()
    return clock()-start


def alternate(programs, repeats, device="cpu"):
    "Seconds of every program, one number per round."
    rounds = []
    for r in range(repeats):
        rounds.append({name: seconds(f, device=device) for name, f in programs.items()})
        print(f"round {r+1}:", "  ".join(f"{n} {v:.3g} s" for n, v in rounds[-1].items()), flush=True)
    return {name: [r[name] for r in rounds] for name in programs}


class LiveStorages(TorchDispatchMode):
    "Counts the bytes of the storages that were allocated in its context and are not freed."
    def __init__(self):
        super().__init__()
        self.old, self.new = set(), {}  # storages from outside; those allocated inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = lambda tree: [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        self.old |= {s._cdata for s in storages((args, kwargs))}-self.new.keys()
        out = func(*args, **(kwargs or {}))
        for s in storages(out):
            if s._cdata not in self.old: self.new.setdefault(s._cdata, (StorageWeakRef(s), s.nbytes()))
        return out

    def bytes(self):
        gc.collect()
        return sum(n for ref, n in self.new.values() if not ref.expired())


def stored_mb(forward, *inputs):
    "MB per image that a forward pass stores for the backward pass: two images minus one."
    sizes = []
    for n in (1, 2):
        with LiveStorages() as live: out = forward(*(t[:n].clone() for t in inputs))
        sizes.append(live.bytes())
        del out
    return (sizes[1]-sizes[0])/1e6


def forwards(student, target, precision):
    "Our forward passes of the attack, of the update and of the saliency term."
    encoder, device = AttackEncoder(student), target.device
    def attack(x):
        with autocast(device, precision): return encoder.sync().encode_image(x.requires_grad_())
    def update(x):
        with autocast(device, precision): return UpdateEncoder(encoder.sync()).encode_image(x)
    def epg(x, mask):
        with autocast(device, precision): return epg_loss(student, target[:len(x)], x, mask)
    with autocast(device, precision): encoder.sync()  # makes the copy before anything is counted
    return dict(attack=attack, update=update, epg=epg)


# ---- the CPU's tables ---------------------------------------------------------------------------------------

def compare_attacks(student, teacher, x):
    "How far our attacks agree with plain's, by precision; losses are evaluated in single precision."
    with torch.no_grad(): target = embed(teacher, x)
    gen = lambda: step_generator(0, 0)
    plain = plain_attack(student, x, target, gen())
    deltas = {p: our_attack(student, teacher, x, gen(), p) for p in SPEEDUP}
    first = {p: our_attack(student, teacher, x, gen(), p, 1) for p in SPEEDUP}
    @torch.no_grad()
    def loss(delta): return (embed(student, x+delta)-target).square().sum(1).mean().item()
    return {p: dict(loss=loss(deltas[p])/loss(plain), loss_within=LOSS[p],
                    same_first_signs=(first[p] == first["fp32"]).float().mean().item(),
                    same_delta=((deltas[p]-plain).abs() < 1e-5).float().mean().item()) for p in SPEEDUP}


def time_steps(student, teacher, data, batch, repeats):
    "Seconds of a step of each program, one number per round."
    published = copy.deepcopy(student)
    opt = torch.optim.AdamW(published.visual.parameters(), lr=LR, weight_decay=1e-4)
    steps = itertools.count()
    programs = {"plain": lambda: plain_step(published, teacher, opt, data["image"], step_generator(0, next(steps)))}
    for p in SPEEDUP:
        ours = copy.deepcopy(student)
        step = Step(AFT(ours, teacher, Attack(steps=STEPS)), ours, config(p, batch))
        programs[p] = partial(step, data)
        Step(AFT(ours, teacher, Attack(steps=1)), ours, config(p, batch))(data)  # warm-up
    return alternate(programs, repeats)


def times(name, batch, repeats):
    "Seconds of a step, and the loss that its attack reaches."
    student, teacher = models(name)
    data = images(batch, student)
    agreement = compare_attacks(student, teacher, data["image"])
    spent = time_steps(student, teacher, data, batch, repeats)
    rows = []
    for p, at_least in SPEEDUP.items():
        ours, plain = spent[p], spent["plain"]
        row = dict(ours=p, seconds=min(ours), plain=min(plain), ratio=min(plain)/min(ours),
                   ratio_median=statistics.median(plain)/statistics.median(ours), at_least=at_least, rounds=repeats)
        row |= agreement[p]
        if abs(row["loss"]-1) > LOSS[p]: raise SystemExit(f"{p}: the attack reaches {row['loss']:.4f} of plain's loss")
        print("{ours}: {ratio:.2f}x plain (median {ratio_median:.2f}), target {at_least}; "
              "loss reached {loss:.4f} of plain's".format(**row))
        rows.append(row)
    return rows


def memory(name):
    "MB per image of each pass."
    student, teacher = models(name)
    x, mask = images(2, student).values()
    with torch.no_grad(): target = embed(teacher, x)
    loss = lambda v: (embed(student, v)-target[:len(v)]).square().sum(1).mean()
    plain = dict(attack=stored_mb(lambda v: loss(v.requires_grad_()), x),
                 update=stored_mb(lambda v: (loss(v), loss(v)), x),
                 epg=stored_mb(lambda v, m: plain_epg(student, target[:len(v)], v, m), x, mask))
    ours = {p: forwards(student, target, p) for p in SPEEDUP}
    rows = []
    for part in plain:
        inputs = (x, mask) if part == "epg" else (x,)
        row = {"pass": part, "plain": plain[part]} | {p: stored_mb(ours[p][part], *inputs) for p in SPEEDUP}
        if part == "update":
            student.visual.set_grad_checkpointing()
            row |= {"bf16 checkpointing": stored_mb(ours["bf16"][part], x)}
            student.visual.set_grad_checkpointing(False)
        rows.append(row | dict(at_most=STORED.get(part, "")))
        print("MB per image", rows[-1])
    return rows


def fits(name, batch=128, card_gb=24):
    """Estimated peak memory of a step of a large model.

    It is the permanent state plus the activations of a micro-batch, extrapolated from one and two images."""
    student = load_clip(name)
    x = images(2, student)["image"]
    forward = forwards(student, torch.zeros(2, 1), "bf16")
    attack = stored_mb(forward["attack"], x)
    update = {False: stored_mb(forward["update"], x)}
    student.visual.set_grad_checkpointing()
    update[True] = stored_mb(forward["update"], x)
    bytes_per_weight = dict(weights=4, gradients=4, moments=8, copy=2, teacher=4, copy_of_teacher=2)
    state = sum(p.numel() for p in student.visual.parameters())*sum(bytes_per_weight.values())/1e9
    rows = []
    for recompute, accumulate in itertools.product((False, True), (1, 2, 4, 8)):
        peak = state+max(attack, update[recompute])*batch/accumulate/1e3
        rows.append(dict(model=name, batch=batch, accumulate=accumulate, checkpointing=recompute, attack_mb=attack,
                         update_mb=update[recompute], state_gb=state, peak_gb=peak, fits_24_gb=peak < .9*card_gb))
        print("{model} accumulate {accumulate} checkpointing {checkpointing}: {peak_gb:.1f} GB".format(**rows[-1]))
    return rows


def saliency(name, batch, repeats, step_seconds):
    "Exact double backward: ours, also in bfloat16, against plain single precision."
    student, teacher = models(name)
    x, mask = images(batch, student).values()
    with torch.no_grad(): target = embed(teacher, x)
    params = [*student.visual.parameters()]
    def plain(): return torch.autograd.grad(plain_epg(student, target, x, mask), params)
    def ours(precision):
        with autocast(x.device, precision): loss = epg_loss(student, target, x, mask)
        return torch.autograd.grad(loss, params, allow_unused=True)
    def flat(grads):
        pairs = zip(grads, params, strict=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]).double()
    programs = dict(plain=plain) | {p: partial(ours, p) for p in SPEEDUP}
    gradients = {name: flat(program()) for name, program in programs.items()}
    spent = alternate(programs, repeats)
    rows = []
    for p in SPEEDUP:
        low, high = min(spent[p]), min(spent["plain"])
        cosine = F.cosine_similarity(gradients[p], gradients["plain"], dim=0).item()  # over 86 million weights
        if cosine < EPG_COSINE: raise SystemExit(f"{p}: cosine {cosine:.3f} with the exact gradient")
        rows.append(dict(ours=p, seconds=low, plain=high, ratio=high/low, rounds=repeats, cosine=cosine,
                         cosine_above=EPG_COSINE, step_with_epg=1+low/step_seconds[p]))
        print("EPG {ours}: {ratio:.2f}x plain, cosine {cosine:.3f}; a step with EPG takes {step_with_epg:.2f} times "
              "a step without".format(**rows[-1]))
    return rows


# ---- the GPU's tables ---------------------------------------------------------------------------------------

def flops(visual):
    "FLOPs of the forward pass of one image: matrix products of the patches, of the blocks, of attention."
    p, q = visual.conv1.kernel_size
    n, d = visual.positional_embedding.shape
    layers = len(visual.transformer.resblocks)
    return layers*(24*n*d*d+4*n*n*d)+2*(n-1)*3*p*q*d


def gpu_row(program, step, batch, repeats, f, peak):
    "The row of one program on the GPU; without `step`, a row without numbers."
    row = dict(program=program, batch=batch, seconds=None, utilisation=None, peak_gb=None, hours_20000_steps=None,
               paper_hours=PAPER_HOURS)
    if step is None: return row
    for _ in range(3): step()
    torch.cuda.reset_peak_memory_stats()
    spent = [seconds(step, device="cuda") for _ in range(repeats)]
    low = min(spent)
    used = f*batch/low/peak/1e12 if peak else None
    row |= dict(seconds=low, median=statistics.median(spent), utilisation=used,
                peak_gb=torch.cuda.max_memory_allocated()/1e9, hours_20000_steps=low*PAPER_STEPS/3600)
    print("GPU {program}: {seconds:.3f} s per step, {peak_gb:.1f} GB".format(**row), flush=True)
    return row


def gpu_programs(batch, student, teacher):
    """Name, cost in forward passes, and maker of every step.

    The cost: reference 1, attack 10 x 2, update 3; the exact double backward of EPG adds 6."""
    opt = torch.optim.AdamW(student.visual.parameters(), lr=LR, weight_decay=1e-4)
    gen = lambda: step_generator(0, 0, device="cuda")
    aft = {c: AFT(student, teacher, Attack(steps=STEPS), compiled=c) for c in (False, True)}
    cfg = config("bf16", batch)
    yield "bf16", 24, lambda: Step(aft[False], student, cfg)
    yield "bf16, compiled", 24, lambda: Step(aft[True], student, cfg)
    yield "bf16 with EPG", 30, lambda: Step(EPG(aft[False]), student, cfg)
    yield "plain fp32", 24, lambda: lambda batch: plain_step(student, teacher, opt, batch["image"], gen())


def gpu_steps(name, batch, repeats, peak):
    "Seconds, utilisation and memory of every step; rows without numbers if there is no GPU or not enough memory."
    names = ("bf16", "bf16, compiled", "bf16 with EPG", "plain fp32")
    if not torch.cuda.is_available(): return [gpu_row(n, None, batch, 0, 0, None) for n in names]
    student, teacher = models(name, "cuda")
    data, f = images(batch, student), flops(student.visual)
    rows = []
    for program, passes, make in gpu_programs(batch, student, teacher):
        try: rows.append(gpu_row(program, partial(make(), data), batch, repeats, passes*f, peak))
        except torch.OutOfMemoryError: rows.append(gpu_row(program, None, batch, 0, 0, None))
        torch.cuda.empty_cache()
    return rows


def gpu_explainers(model, repeats, batch=32, texts=1):
    "Images per second of every explainer that fits the model, single precision."
    if not torch.cuda.is_available(): return [dict(explainer=n, images_s=None) for n in sorted(EXPLAINERS)]
    _, teacher = models(model, "cuda")
    x = images(batch, teacher)["image"]
    with torch.no_grad(): queries = embed(teacher, x)[:texts]
    rows = []
    for name in sorted(EXPLAINERS):
        run = partial(explain, teacher, x, queries, name)
        with contextlib.suppress(TypeError):
            run()  # warm-up
            fastest = min(seconds(run, device="cuda") for _ in range(repeats))
            rows.append(dict(explainer=name, images_s=batch/fastest))
    return rows


def gpu(name, batch, repeats, peak):
    "All tables of the GPU."
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if card and not peak: peak = next((v for k, v in PEAKS.items() if k in card), None)
    steps = gpu_steps(name, batch, repeats, peak)
    time_of = {r["program"]: r["seconds"] for r in steps}
    measured = time_of["bf16 with EPG"] and time_of["bf16"]
    ratio = time_of["bf16 with EPG"]/time_of["bf16"] if measured else None
    summary = dict(card=card, peak_tflops=peak, step_at_most_s=GPU_SECONDS, step_with_epg=ratio,
                   step_with_epg_at_most=GPU_EPG)
    return dict(gpu=summary, gpu_steps=steps, gpu_explainers=gpu_explainers(name, repeats))


# ---- all tables ---------------------------------------------------------------------------------------------

def setting():
    "Machine, threads and versions."
    versions = {n: importlib.metadata.version(n) for n in ("torch", "open_clip_torch")}
    return dict(**machine(), threads=1, versions=versions)


def on_cpu(args):
    "All tables of the CPU."
    batch = args.batch or 2
    rows = times(args.model, batch, args.repeats)
    step_seconds = {r["ours"]: r["seconds"] for r in rows}
    tables = dict(step=rows, saliency=saliency(args.model, batch, args.repeats, step_seconds),
                  kept_mb=memory(args.model))
    if args.large: tables["large"] = fits(args.large)
    return tables


def main(args):
    torch.set_num_threads(1)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device; use --device cpu")
    old = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).exists() else {}
    what = (f"process seconds of a step of adversarial fine-tuning, {STEPS} PGD iterations, {args.model}, random "
            f"weights, batch {args.batch or 2} on the CPU; MB per image that each pass stores; estimated peak memory "
            "of a large model")
    if args.model != MODEL: what += f". A trial: the targets are for {MODEL}"
    result = dict(what=what)
    if args.device != "cuda": result |= dict(machine=setting()) | on_cpu(args)
    if args.device != "cpu" and torch.cuda.is_available() or "gpu" not in old:
        result |= gpu(args.model, args.batch or 128, 10, args.peak_tflops)
    if args.json:
        short = json.loads(json.dumps(old | result), parse_float=lambda v: round(float(v), 4))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure this device only")
    parser.add_argument("--model", default=MODEL, help="a vision transformer of open_clip; targets are for the default")
    parser.add_argument("--batch", type=int, help="images per step; default: 2 on the CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="alternating rounds on the CPU")
    parser.add_argument("--large", default="ViT-L-14-quickgelu", help="model of the memory estimate; '' skips it")
    parser.add_argument("--peak-tflops", type=float, help="bf16 peak of the GPU, if its name is unknown")
    parser.add_argument("--json", help="file for the tables")
    main(parser.parse_args())
