"""Memory and time of exact recall: a gallery of Flickr30k's size, and 1,000 images compared with dense programs.

    python tests/bench/recall.py [--json FILE]

Both cases use synthetic embeddings of width 512. The large case, 31,783 images and 158,915 captions, runs in a separate
process; its score matrix would take 20 GB. The small case, 1,000 images and 5,000 captions, alternates in one process
with two dense programs written below: `topk` on the full matrix, and the published pattern, which also stores a boolean
matrix of pairs and expands the indices of `topk` to one-hot vectors. Times are process seconds; ratios are of minima
and of medians."""
import argparse
import importlib.metadata
import json
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

CAPTIONS, WIDTH, KS = 5, 512, (1, 5)
LARGE, SMALL = 31_783, 1_000  # images of all of Flickr30k and of its usual test split


def embeddings(images, noise=.15):
    "Unit embeddings of images, caption embeddings near them, and the image of each caption."
    gen = torch.Generator().manual_seed(0)
    img = F.normalize(torch.randn(images, WIDTH, generator=gen), dim=-1)
    cap2img = torch.arange(images).repeat_interleave(CAPTIONS)
    txt = torch.randn(images*CAPTIONS, WIDTH, generator=gen).mul_(noise)
    for part, places in zip(txt.split(4096), cap2img.split(4096)):  # in place, to save memory
        part.add_(img[places]).div_(part.norm(dim=1, keepdim=True))
    return img, txt, cap2img


# ---- programs -----------------------------------------------------------------------------------------------

def ours(img, txt, cap2img):
    from reclip_nb.evaluations import recall_at_k
    return recall_at_k(img, txt, cap2img, KS)["mean"].tolist()


def dense_topk(img, txt, cap2img):
    "The full score matrix and the best five of every row and column."
    scores = txt @ img.T
    t2i = scores.topk(max(KS), dim=1).indices == cap2img[:, None]
    i2t = cap2img[scores.T.topk(max(KS), dim=1).indices] == torch.arange(len(img))[:, None]
    return [hit[:, :k].any(1).double().mean().item() for hit in (t2i, i2t) for k in KS]


def dense_onehot(img, txt, cap2img, batch=64):
    "The published pattern: pairs as a boolean matrix, and for every k the indices of topk as one-hot vectors."
    scores = txt @ img.T
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    pairs[torch.arange(len(txt)), cap2img] = True
    recalls = []
    for s, p in ((scores, pairs), (scores.T, pairs.T)):
        for k in KS:
            chosen = [F.one_hot(part.topk(k, dim=1).indices, part.shape[1]).sum(1).bool() for part in s.split(batch)]
            hits = torch.cat([(c & q).any(1) for c, q in zip(chosen, p.split(batch))])
            recalls.append(hits.double().mean().item())
    return recalls


# ---- measuring ----------------------------------------------------------------------------------------------

def peak(reset=False):
    "Highest resident memory in MB since the last reset; None where the system does not say."
    try:
        if reset: Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(l.split()[1])/1024 for l in lines if l.startswith("VmHWM"))
    except OSError: return None


def large(images):
    "One run of our program in this process: seconds, memory above the embeddings, recall."
    img, txt, cap2img = embeddings(images)
    ours(img[:100], txt[:100*CAPTIONS], cap2img[:100*CAPTIONS])  # warm-up
    before, start = peak(reset=True), time.process_time()
    recall = ours(img, txt, cap2img)
    seconds, size = time.process_time()-start, img.nbytes+txt.nbytes+cap2img.nbytes
    return dict(images=images, captions=images*CAPTIONS, seconds=seconds, extra_mb=before and peak()-before,
                embeddings_mb=size/2**20, scores_mb=images*images*CAPTIONS*4/2**20, recall=recall)


def compare(repeats):
    "Alternating runs on 1,000 images; all programs must give the same recall."
    data = embeddings(SMALL)
    recall = ours(*data)
    times = {f: [] for f in (ours, dense_topk, dense_onehot)}
    for n in range(repeats+1):
        for f in times:
            start = time.process_time()
            assert f(*data) == recall, f.__name__
            if n: times[f].append(time.process_time()-start)  # the first round is the warm-up
    own = times.pop(ours)
    rows = [dict(other=f.__name__, ours=min(own), theirs=min(t), ratio=min(t)/min(own), runs=repeats,
                 ratio_median=statistics.median(t)/statistics.median(own)) for f, t in times.items()]
    return dict(images=SMALL, captions=SMALL*CAPTIONS, rows=rows, recall=recall)


def setting():
    "The machine and the version of torch, on which the numbers depend."
    return dict(**machine(), threads=1, torch=importlib.metadata.version("torch"))


def main(args):
    small = compare(args.repeats)
    for row in small["rows"]:
        print(f"{SMALL} images  {row['other']:13} ours {row['ours']:.3f} s  theirs {row['theirs']:.3f} s "
              f" ratio {row['ratio']:.2f}")
    command = [sys.executable, str(Path(__file__).resolve()), "--large", str(args.images)]
    full = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    memory = "unknown" if full["extra_mb"] is None else f"{full['extra_mb']:.0f} MB"
    print(f"{full['images']} images, {full['captions']} captions: {full['seconds']:.0f} s, {memory} above "
          f"{full['embeddings_mb']:.0f} MB of embeddings; the score matrix would take {full['scores_mb']:.0f} MB")
    if args.json:
        result = dict(what="recall at 1 and 5 in both directions, width 512, float32", machine=setting(),
                      large=full, small=small)
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 4))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=LARGE, help="images of the large case")
    parser.add_argument("--repeats", type=int, default=9, help="alternating runs of the small case")
    parser.add_argument("--json", help="file for the table")
    parser.add_argument("--large", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.large: print(json.dumps(large(args.large)))
    else: main(args)
