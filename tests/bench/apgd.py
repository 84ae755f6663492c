"""Cost of APGD: an iteration on ViT-B/16 against torchattacks, and the forward passes that letting broken images go saves.

    python tests/bench/apgd.py [--peers FOLDER] [--json FILE]

FOLDER holds torchattacks (`pip install --no-deps --target FOLDER torchattacks`), which is imported from there. An iteration is
the difference between a long and a short run, on random weights, two images of 224 pixels, one thread; the programs alternate and
times are process seconds. The second table attacks a small classifier of scikit-learn's digits at growing radii, with 100
iterations of the cross-entropy and of the targeted loss, with and without compaction: decisions must be equal."""
import argparse
import importlib.metadata
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
EPS = 1e-6                     # of the timed attacks: nothing breaks, so that every image is attacked to the end
RADII = (4, 12, 20, 28, 40, 60, 90)   # of the digits, in 1/255
TARGETS = dict(fp32=1.0, bf16=.45)    # at most this share of torchattacks' time


# ---- an iteration -------------------------------------------------------------------------------------------

def vit():
    "ViT-B/16 as a classifier of ten classes, and two images that it puts into class 0 by a wide margin."
    clip, gen = load_clip("ViT-B-16", seed=0), torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, 3, 224, 224, generator=gen)
    with torch.no_grad(): mean = clip.encode_image(x).mean(0, keepdim=True)
    weights = torch.cat([mean, torch.randn(9, mean.shape[1], generator=gen)])
    return ClipClassifier(clip, F.normalize(weights, dim=-1), 100.), x, torch.zeros(BATCH, dtype=torch.long)


class Plain(nn.Module):
    "The same classifier by open_clip's own forward pass, which is what a user of torchattacks would write."
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f.scale*F.normalize(self.f.visual((x-self.f.mean)/self.f.std), dim=-1) @ self.f.weights.mT


def ours(f, x, y, steps, grad_dtype=None): return apgd(f, x, y, eps=EPS, n_iter=steps, grad_dtype=grad_dtype)


def torchattacks(f, x, y, steps):
    import torchattacks
    return torchattacks.APGD(f, eps=EPS, steps=steps)(x, y)


PROGRAMS = dict(fp32=ours, bf16=partial(ours, grad_dtype=torch.bfloat16), torchattacks=lambda f, *a: torchattacks(Plain(f).eval(), *a),
                same_forward=torchattacks)   # torchattacks around our classifier: what is left is the attack's own overhead


def seconds(program, *args):
    start = time.process_time()
    program(*args)
    return time.process_time()-start


def iterations(names, repeats):
    "Seconds of one iteration of each program, one number a round."
    f, x, y = vit()
    for name in names: PROGRAMS[name](f, x, y, SHORT)          # warm-up
    rounds = []
    for r in range(repeats):
        spent = {(n, steps): seconds(PROGRAMS[n], f, x, y, steps) for steps in (SHORT, LONG) for n in names}
        rounds.append({n: (spent[n, LONG]-spent[n, SHORT])/(LONG-SHORT) for n in names})
        print(f"round {r+1}:", "  ".join(f"{n} {v:.2f} s" for n, v in rounds[-1].items()))
    return rounds


def ratios(rounds):
    "Our time as a share of torchattacks': of minima, of medians, and the target."
    rows = []
    for name, target in TARGETS.items():
        ours, theirs, same = ([r[n] for r in rounds] for n in (name, "torchattacks", "same_forward"))
        row = dict(ours=name, seconds=min(ours), torchattacks=min(theirs), ratio=min(ours)/min(theirs),
                   ratio_median=statistics.median(ours)/statistics.median(theirs), at_most=target, rounds=len(rounds),
                   ratio_same_forward=min(ours)/min(same))
        print(f"{name}: {row['ratio']:.2f} of torchattacks' iteration (median {row['ratio_median']:.2f}), at most {target}")
        rows.append(row)
    return rows


# ---- compaction ---------------------------------------------------------------------------------------------

def digits():
    "A convolutional classifier of the digits, and the held-out quarter of them as grey images (N,3,8,8)."
    raw, gen = load_digits(), torch.Generator().manual_seed(0)
    x = torch.tensor(raw.images/16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1).contiguous()
    y, order = torch.tensor(raw.target), torch.randperm(len(x), generator=gen)
    x, y = x[order], y[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(512, 10))
    opt, cut = torch.optim.Adam(f.parameters(), 3e-3), len(x)*3//4
    for step in range(500):
        rows = torch.randint(cut, (64,), generator=gen)
        noisy = (x[rows]+.1*torch.randn(x[rows].shape, generator=gen)).clamp(0, 1)
        opt.zero_grad(); F.cross_entropy(f(noisy), y[rows]).backward(); opt.step()
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
        (a, b), eps = runs.values(), radius/255
        cost = {c: r.card["cost"]["forward"] for c, r in runs.items()}
        same = all(torch.equal(a.stands(eps, s), b.stands(eps, s)) for s in ("apgd-ce", "apgd-t1"))
        rows.append(dict(eps_255=radius, images=len(x), clean=a.clean.double().mean().item(), robust=b.stands(eps).double().mean().item(),
                         forward_all=cost[False], forward=cost[True], saved=cost[False]/cost[True], faster=spent[False]/spent[True], equal=same))
        print("eps {eps_255:3}/255  robust {robust:6.1%}  forwards {forward_all:6} -> {forward:6}  saved {saved:5.2f}x  "
              "time {faster:5.2f}x  decisions equal: {equal}".format(**rows[-1]))
    return rows


def setting():
    "What the numbers depend on."
    versions = {n: importlib.metadata.version(n) for n in ("torch", "open_clip_torch", "torchattacks")
                if any(importlib.metadata.Distribution.discover(name=n))}
    return dict(**machine(), threads=1, versions=versions)


def main(args):
    torch.set_num_threads(1)
    if args.peers: sys.path.append(args.peers)
    try: import torchattacks; names = [*PROGRAMS]
    except ImportError: names = print("torchattacks is not installed: our own iterations only") or [*TARGETS]
    rounds = iterations(names, args.repeats)
    result = dict(what=f"process seconds of an APGD iteration, ViT-B/16, batch {BATCH}, 224 px, random weights; forward passes of two stages of {args.n_iter}",
                  machine=setting(), iteration=ratios(rounds) if "torchattacks" in names else rounds, compaction=compaction(args.n_iter))
    if args.json:
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 4))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default=os.environ.get("RECLIP_PEERS"), help="folder that has torchattacks")
    parser.add_argument("--repeats", type=int, default=3, help="alternating rounds")
    parser.add_argument("--n-iter", type=int, default=100, help="iterations of the attacks on the digits")
    parser.add_argument("--json", help="file for the tables")
    main(parser.parse_args())
