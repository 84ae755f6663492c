"""Cost of APGD: an iteration on ViT-B/16 against torchattacks, and the forward passes saved by dropping broken images.

    python tests/bench/apgd.py [--peers FOLDER] [--json FILE]

FOLDER contains torchattacks (`pip install --no-deps --target FOLDER torchattacks`). The time of an iteration is the
difference between a long and a short run, with random weights, two images of 224 pixels, one thread; the programs
alternate and times are process seconds. The second table attacks a small classifier of scikit-learn's digits at
increasing radii, with 100 iterations of the cross-entropy and of the targeted loss, with and without compaction; the
decisions must be equal."""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.nn.functional as F
from machine import machine
from sklearn.datasets import load_digits
from torch import nn

from reclip_nb.attacks import apgd
from reclip_nb.evaluations import ClipClassifier, robust_eval
from reclip_nb.models import load_clip

SHORT, LONG, BATCH = 1, 4, 2
EPS = 1e-6  # radius of the timed attacks: no image is broken, so every image is attacked in every iteration
RADII = (4, 12, 20, 28, 40, 60, 90)  # for the digits, in 1/255
TARGETS = dict(fp32=1.0, bf16=.45)  # maximum share of torchattacks' time


# ---- an iteration -------------------------------------------------------------------------------------------

def vit():
    "ViT-B/16 as a classifier of ten classes, and two images that it assigns to class 0 with a large margin."
    clip = load_clip("ViT-B-16", seed=0)
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, 3, 224, 224, generator=gen)
    with torch.no_grad(): mean = clip.encode_image(x).mean(0, keepdim=True)
    weights = torch.cat([mean, torch.randn(9, mean.shape[1], generator=gen)])
    return ClipClassifier(clip, F.normalize(weights, dim=-1), 100.), x, torch.zeros(BATCH, dtype=torch.long)


class Plain(nn.Module):
    "The same classifier with open_clip's own forward pass, as a user of torchattacks would write it."
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f.scale*F.normalize(self.f.visual((x-self.f.mean)/self.f.std), dim=-1) @ self.f.weights.mT


def ours(f, x, y, steps, grad_dtype=None): return apgd(f, x, y, eps=EPS, n_iter=steps, grad_dtype=grad_dtype)


def torchattacks(f, x, y, steps):
    import torchattacks
    return torchattacks.APGD(f, eps=EPS, steps=steps)(x, y)


def torchattacks_plain(f, x, y, steps): return torchattacks(Plain(f).eval(), x, y, steps)


PROGRAMS = dict(fp32=ours, bf16=partial(ours, grad_dtype=torch.bfloat16), torchattacks=torchattacks_plain,
                same_forward=torchattacks)  # torchattacks with our classifier isolates the overhead of the attack


def seconds(program, *args):
    start = time.process_time()
    program(*args)
    return time.process_time()-start


def iterations(names, repeats):
    "Seconds of one iteration of each program, one number per round."
    f, x, y = vit()
    for name in names: PROGRAMS[name](f, x, y, SHORT)  # warm-up
    rounds = []
    for r in range(repeats):
        spent = {(n, steps): seconds(PROGRAMS[n], f, x, y, steps) for steps in (SHORT, LONG) for n in names}
        rounds.append({n: (spent[n, LONG]-spent[n, SHORT])/(LONG-SHORT) for n in names})
        print(f"round {r+1}:", "  ".join(f"{n} {v:.2f} s" for n, v in rounds[-1].items()))
    return rounds


def ratios(rounds):
    "Our time as a share of torchattacks' time: of minima, of medians, and the target."
    rows = []
    for name, target in TARGETS.items():
        ours, theirs, same = ([r[n] for r in rounds] for n in (name, "torchattacks", "same_forward"))
        row = dict(ours=name, seconds=min(ours), torchattacks=min(theirs), ratio=min(ours)/min(theirs),
                   ratio_median=statistics.median(ours)/statistics.median(theirs), at_most=target, rounds=len(rounds),
                   ratio_same_forward=min(ours)/min(same))
        print(f"{name}: {row['ratio']:.2f} of torchattacks' iteration (median {row['ratio_median']:.2f}), "
              f"target: at most {target}")
        rows.append(row)
    return rows


# ---- compaction ---------------------------------------------------------------------------------------------

def digits():
    "A convolutional classifier of the digits, and the held-out quarter of the digits as grey images (N,3,8,8)."
    raw = load_digits()
    gen = torch.Generator().manual_seed(0)
    x = torch.tensor(raw.images/16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1).contiguous()
    y, order = torch.tensor(raw.target), torch.randperm(len(x), generator=gen)
    x, y = x[order], y[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
                          nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    opt = torch.optim.Adam(f.parameters(), 3e-3)
    cut = len(x)*3//4
    for _ in range(500):
        rows = torch.randint(cut, (64,), generator=gen)
        noisy = (x[rows]+.1*torch.randn(x[rows].shape, generator=gen)).clamp(0, 1)
        opt.zero_grad()
        F.cross_entropy(f(noisy), y[rows]).backward()
        opt.step()
    return f.eval().requires_grad_(False), x[cut:], y[cut:]


def compaction(n_iter):
    "Forward passes and time with and without compaction at each radius."
    f, x, y = digits()
    rows = []
    for radius in RADII:
        runs, spent = {}, {}
        for compact in (False, True):
            start = time.process_time()
            runs[compact] = robust_eval(f, x, y, (radius/255,), n_iter=n_iter, compact=compact)
            spent[compact] = time.process_time()-start
        full, compacted, eps = runs[False], runs[True], radius/255
        cost = {compact: report.card["cost"]["forward"] for compact, report in runs.items()}
        stages = ("apgd-ce", "apgd-t1")
        equal = all(torch.equal(full.stands(eps, stage), compacted.stands(eps, stage)) for stage in stages)
        rows.append(dict(eps_255=radius, images=len(x), clean=full.clean.double().mean().item(),
                         robust=compacted.stands(eps).double().mean().item(), forward_all=cost[False],
                         forward=cost[True], saved=cost[False]/cost[True], faster=spent[False]/spent[True],
                         equal=equal))
        print("eps {eps_255:3}/255  robust {robust:6.1%}  forward passes {forward_all:6} -> {forward:6}  "
              "saved {saved:5.2f}x  time {faster:5.2f}x  decisions equal: {equal}".format(**rows[-1]))
    return rows


def setting():
    "Machine, threads and versions."
    versions = {n: importlib.metadata.version(n) for n in ("torch", "open_clip_torch", "torchattacks")
                if any(importlib.metadata.Distribution.discover(name=n))}
    return dict(**machine(), threads=1, versions=versions)


def main(args):
    torch.set_num_threads(1)
    if args.peers: sys.path.append(args.peers)
    with_peer = importlib.util.find_spec("torchattacks") is not None
    if not with_peer: print("torchattacks is not installed: only our iterations are timed")
    rounds = iterations([*PROGRAMS] if with_peer else [*TARGETS], args.repeats)
    what = (f"process seconds of an APGD iteration, ViT-B/16, batch {BATCH}, 224 px, random weights; forward passes of "
            f"two stages of {args.n_iter} iterations")
    result = dict(what=what, machine=setting(), iteration=ratios(rounds) if with_peer else rounds,
                  compaction=compaction(args.n_iter))
    if args.json:
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 4))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default=os.environ.get("RECLIP_PEERS"), help="folder with torchattacks")
    parser.add_argument("--repeats", type=int, default=3, help="alternating rounds")
    parser.add_argument("--n-iter", type=int, default=100, help="iterations of the attacks on the digits")
    parser.add_argument("--json", help="file for the tables")
    main(parser.parse_args())
