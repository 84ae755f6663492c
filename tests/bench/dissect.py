"""Time and memory of the neuron-concept scores against their dense forms: synthetic data of Broden's size, one thread.

    python tests/bench/dissect.py [--images 12000] [--concepts 20000] [--full 63305] [--json FILE]

The "dense" implementations below follow the formulas: they compute the whole images x concepts matrix first. Runs
alternate; times are process seconds, ratios are of minima and of medians. Memory is the peak resident set of a separate
process: `extra` above the loaded inputs, `data` with them, `total` also with the interpreter and the libraries."""
import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.nn.functional as F
from machine import machine

METRICS = ("soft_wpmi", "wpmi", "cos", "cos_cubed", "pearson")
NEURONS, WIDTH = 768, 512                   # of ViT-B/16
LINE = ("ours {ours:6.2f} s  dense {dense:6.2f} s  ratio {ratio:5.1f} (median {ratio_median:5.1f})  "
        "extra memory {memory}")


# ---- dense implementations ----------------------------------------------------------------------------------

def dense_pmi(acts, images, texts, k, a, lam, log):
    "Softmax of every image over every concept, then one neuron after another."
    q = (a*(images @ texts.T)).softmax(1)
    top = acts.topk(k, dim=0).indices.T
    E = torch.stack([log(q[rows]).sum(0) for rows in top])
    return E-lam*(E.logsumexp(0)-math.log(len(E)))


def dense_soft_wpmi(acts, images, texts):
    w = (.998-torch.arange(100)/100*(.998-.97))[:, None]
    return dense_pmi(acts, images, texts, 100, 10, 1, lambda q: torch.log(1+w*(q-1)+1e-7))


def dense_wpmi(acts, images, texts): return dense_pmi(acts, images, texts, 28, 2, .6, lambda q: torch.log(q+1e-7))


def dense_cos(acts, images, texts):
    S = images @ texts.T
    return (acts/acts.norm(dim=0)).T @ (S/S.norm(dim=0))


def dense_pearson(acts, images, texts):
    S = images @ texts.T
    acts, S = acts-acts.mean(0), S-S.mean(0)
    return (acts/acts.norm(dim=0)).T @ (S/S.norm(dim=0))


def dense_cos_cubed(acts, images, texts):
    S = images @ texts.T
    acts, S = (acts-acts.mean(0))**3, (S-S.mean(0))**3
    return (acts/acts.norm(dim=0).clamp(min=1e-3)).T @ (S/S.norm(dim=0).clamp(min=1e-3))


DENSE = {m: globals()[f"dense_{m}"] for m in METRICS}


# ---- a process that runs cases ------------------------------------------------------------------------------

def inputs(images, concepts):
    "Activations that follow directions of the embedding, embeddings with a common direction as CLIP's have."
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=gen)
    emb, texts = (F.normalize(draw(n, WIDTH)+w*draw(WIDTH), dim=1) for n, w in ((images, 1.3), (concepts, 1.)))
    return draw(images, NEURONS).add_(draw(NEURONS)).add_(emb @ draw(WIDTH, NEURONS)), emb, texts


def peak(reset=False):
    "Highest resident memory in MB since the last reset; None where the system does not say."
    try:
        if reset: Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(l.split()[1])/1024 for l in lines if l.startswith("VmHWM"))
    except OSError: return None


def work(images, concepts):
    "Answer requests on stdin: one JSON object a line, {metric, dense}."
    torch.set_num_threads(1)
    from reclip_nb.dissect import similarity
    empty, case = peak(), inputs(images, concepts)
    for line in sys.stdin:
        ask = json.loads(line)
        before, start = peak(reset=True), time.process_time()
        found = DENSE[ask["metric"]](*case) if ask["dense"] else similarity(*case, ask["metric"])
        seconds, total = time.process_time()-start, peak()
        shown = found[::97, ::97].tolist()
        del found
        memory = {} if total is None else dict(extra=total-before, data=total-empty, total=total)
        print(json.dumps(dict(seconds=seconds, **memory, shown=shown)), flush=True)


class Worker:
    "A process with the inputs loaded; `ask` runs one case in it."
    def __init__(self, images, concepts):
        command = [sys.executable, str(Path(__file__).resolve()), "--work",
                   "--images", str(images), "--concepts", str(concepts)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, metric, dense=False):
        print(json.dumps(dict(metric=metric, dense=dense)), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer: raise RuntimeError(f"{metric} ended its process: out of memory?")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- comparing ----------------------------------------------------------------------------------------------

def apart(ours, dense):
    "Largest difference of the shown scores."
    return (torch.tensor(ours)-torch.tensor(dense)).abs().max().item()


def compare(metric, images, concepts, repeats):
    "Seconds, ratios and memory of alternating runs, each program in a process of its own."
    mine, theirs = Worker(images, concepts), Worker(images, concepts)
    runs = [(mine.ask(metric), theirs.ask(metric, dense=True)) for _ in range(repeats)]
    mine.close(), theirs.close()
    ours_s, dense_s = ([r[i]["seconds"] for r in runs] for i in (0, 1))
    ours_m, dense_m = (runs[0][i].get("extra") for i in (0, 1))
    memory = {} if ours_m is None else dict(ours_mb=ours_m, dense_mb=dense_m, memory_ratio=dense_m/ours_m)
    return dict(metric=metric, ours=min(ours_s), dense=min(dense_s), ratio=min(dense_s)/min(ours_s), runs=repeats,
                ratio_median=statistics.median(dense_s)/statistics.median(ours_s), **memory,
                largest_difference=apart(runs[0][0]["shown"], runs[0][1]["shown"]))


def alone(metric, images, concepts):
    "Seconds and memory of one run of ours at full size."
    worker = Worker(images, concepts)
    answer = worker.ask(metric)
    worker.close()
    memory = {f"{k}_mb": answer.get(k) for k in ("extra", "data", "total")}
    return dict(metric=metric, seconds=answer["seconds"], **memory)


def setting():
    "What the numbers depend on."
    return dict(**machine(), threads=1, torch=importlib.metadata.version("torch"))


def main(args):
    rows, full = [], []
    for metric in args.metrics:
        rows.append(found := compare(metric, args.images, args.concepts, args.repeats))
        memory = f"{found['ours_mb']:.0f} of {found['dense_mb']:.0f} MB" if "ours_mb" in found else "unknown"
        print(f"{metric:10}", LINE.format(memory=memory, **found), flush=True)
    for metric in args.metrics if args.full else []:
        full.append(found := alone(metric, args.full, args.concepts))
        memory = {k: v and round(v) for k, v in found.items() if k.endswith("mb")}
        print(f"{metric:10} {args.full} images: {found['seconds']:.1f} s, memory {memory}", flush=True)
    if args.json:
        result = dict(what="process seconds of one call, synthetic embeddings and activations", machine=setting(),
                      images=args.images, concepts=args.concepts, neurons=NEURONS, width=WIDTH, rows=rows,
                      full_images=args.full, full=full)
        short = json.loads(json.dumps(result), parse_float=lambda v: float(f"{float(v):.4g}"))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=12000, help="images of the comparison")
    parser.add_argument("--concepts", type=int, default=20000, help="words")
    parser.add_argument("--full", type=int, default=63305, help="images of the run without a dense form; 0: none")
    parser.add_argument("--metrics", nargs="+", default=METRICS, choices=METRICS, help="scores")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each pair")
    parser.add_argument("--json", help="file for the table")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work(args.images, args.concepts) if args.work else main(args)
