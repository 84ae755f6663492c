"""Time of our explainers compared with the published patterns and programs: ViT-B/16, random weights, one thread.

    python tests/bench/explainers.py [--peer-python /env/of/the/peers/bin/python] [--prompts 1 8 32] [--json FILE]

The "plain" implementations below follow the definitions of the methods in the pattern of the published programs: the
image is repeated for every text, attention is in the graph, and there is one gradient per layer. The published programs
(legrad_torch, which needs open_clip <= 2.23, and grad-cam) run on the same weights in a separate environment, given by
--peer-python or RECLIP_PEER_PYTHON. Runs alternate. Times are process seconds; ratios are of minima and of medians.
Each program runs in a separate process, so that its peak memory can be measured."""
import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.nn.functional as F
from machine import machine

LAYER = 8  # of Grad-CAM, block index from 0
LINE = "ours {ours:6.2f} s  theirs {theirs:6.2f} s  ratio {ratio:5.1f} (median {ratio_median:5.1f})"
COMPARE = [  # title, our case, their case, numbers of texts
    ("LeGrad, all layers, class token", "legrad_cls", "legrad_torch", (1, 8, 32)),
    ("LeGrad, all layers, token mean", "legrad_mean", "legrad_torch", (1, 8, 32)),
    ("LeGrad, all layers, class token", "legrad_cls", "plain_legrad", (1, 8)),
    (f"Grad-CAM, block {LAYER}", "gradcam", "pytorch_grad_cam", (1, 8)),
    (f"Grad-CAM, block {LAYER}", "gradcam", "plain_gradcam", (1, 8)),
    ("CheferCAM, all layers", "chefer", "plain_chefer", (1, 4)),
    ("Simple Gradient", "simple_gradient", "plain_simple_gradient", (8,)),
    ("Grad-ECLIP", "grad_eclip", "plain_grad_eclip", (1, 8, 32))]


# ---- plain implementations ----------------------------------------------------------------------------------

def cosine(f, texts): return (F.normalize(f, dim=-1)*texts).sum(-1)


def heads(z, h): return z.unflatten(-1, (h, -1)).transpose(1, 2)


def block(blk, h):
    "A block with its attention in the graph."
    q, k, v = F.linear(blk.ln_1(h), blk.attn.in_proj_weight, blk.attn.in_proj_bias).chunk(3, -1)
    q, k, v = (heads(z, blk.attn.num_heads) for z in (q, k, v))
    attn = (q @ k.mT*q.shape[-1]**-.5).softmax(-1)
    h = h+blk.attn.out_proj((attn @ v).transpose(1, 2).flatten(2))
    return attn, h+blk.mlp(blk.ln_2(h))


def forward(visual, image, texts):
    "The image repeated for every text: attention and tokens of every block."
    h = visual._embeds(image.expand(len(texts), -1, -1, -1))
    attn, tokens = [], []
    for blk in visual.transformer.resblocks:
        a, h = block(blk, h)
        attn.append(a)
        tokens.append(h)
    return attn, tokens


def plain_legrad(visual, image, texts):
    attn, tokens = forward(visual, image, texts)
    maps = 0
    for a, z in zip(attn, tokens):
        s = cosine(visual.ln_post(z[:, 0]) @ visual.proj, texts).sum()
        maps = maps+torch.autograd.grad(s, a, retain_graph=True)[0].relu().mean((1, 2))[:, 1:]
    return maps


def plain_chefer(visual, image, texts):
    attn, tokens = forward(visual, image, texts)
    s = 100*cosine(visual.ln_post(tokens[-1][:, 0]) @ visual.proj, texts).sum()
    R = torch.eye(attn[0].shape[-1]).expand(len(texts), -1, -1)
    for a in attn: R = R+(a*torch.autograd.grad(s, a, retain_graph=True)[0]).relu().mean(1).detach() @ R
    return R[:, 0, 1:]


def plain_gradcam(visual, image, texts):
    "One backward call that also fills the gradients of the parameters."
    h = visual._embeds(image.expand(len(texts), -1, -1, -1))
    for l, blk in enumerate(visual.transformer.resblocks):
        h = blk(h)
        if l == LAYER:
            z = h
            z.retain_grad()
    visual.zero_grad()
    cosine(visual.ln_post(h[:, 0]) @ visual.proj, texts).sum().backward()
    return torch.einsum("bd,bnd->bn", z.grad.mean(1), z[:, 1:]).relu()


def plain_simple_gradient(visual, image, texts):
    maps = []
    for t in texts:
        x = image.clone().requires_grad_()
        maps.append(torch.autograd.grad(cosine(visual(x), t).sum(), x)[0].abs().sum(1))
    return torch.cat(maps)


def plain_grad_eclip(visual, image, texts):
    with torch.no_grad():
        h = visual._embeds(image)
        for blk in visual.transformer.resblocks[:-1]: h = blk(h)
    blk, h = visual.transformer.resblocks[-1], h.requires_grad_()
    q, k, v = F.linear(blk.ln_1(h), blk.attn.in_proj_weight, blk.attn.in_proj_bias).chunk(3, -1)
    o = (torch.softmax(q @ k.mT*q.shape[-1]**-.5, -1)) @ v
    y = h+blk.attn.out_proj(o)
    f = visual.ln_post((y+blk.mlp(blk.ln_2(y)))[:, 0]) @ visual.proj
    w = F.cosine_similarity(q[:, :1], k[:, 1:], dim=-1)
    w = (w-w.min())/(w.max()-w.min())
    grads = [torch.autograd.grad(cosine(f, t).sum(), o, retain_graph=True)[0][:, :1] for t in texts]
    return torch.cat([((g*v[:, 1:]).sum(-1)*w).relu() for g in grads])


def ours(method, **kw):
    "A method of this package as a case."
    def run(visual, image, texts):
        from reclip_nb.explain import explain
        return explain(visual, image, texts, method, size=None, normalize="none", **kw)[0].flatten(1)
    return run


# ---- the programs themselves --------------------------------------------------------------------------------

def legrad_torch(visual, image, texts):
    "All layers; wrapped once, as a user would."
    if not hasattr(visual, "wrapped"):
        from legrad import LeWrapper
        visual.wrapped = [LeWrapper(visual.whole[0], layer_index=0)]
    return visual.wrapped[0].compute_legrad(texts, image=image)[0].flatten(1)


def pytorch_grad_cam(visual, image, texts):
    from pytorch_grad_cam import GradCAM
    side = image.shape[-1]//visual.conv1.stride[0]
    def grid(z):
        "Tokens as a grid; open_clip is batch-first since 2.25, token-first before."
        if not getattr(visual.transformer, "batch_first", False): z = z.transpose(0, 1)
        return z[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
    targets = [lambda f, t=t: cosine(f, t) for t in texts]
    with GradCAM(model=visual, target_layers=[visual.transformer.resblocks[LAYER]], reshape_transform=grid) as cam:
        return torch.from_numpy(cam(input_tensor=image.repeat(len(texts), 1, 1, 1), targets=targets)).flatten(1)


CASES = {"legrad_cls": ours("legrad"), "legrad_mean": ours("legrad", readout="mean"), "chefer": ours("chefer:all"),
         "gradcam": ours("gradcam", layer=LAYER), "simple_gradient": ours("simple_gradient"),
         "grad_eclip": ours("grad_eclip:released")}
PLAIN = {f.__name__: f for f in (plain_legrad, plain_chefer, plain_gradcam, plain_simple_gradient, plain_grad_eclip)}
PEERS = {"legrad_torch": ("legrad", legrad_torch), "pytorch_grad_cam": ("pytorch_grad_cam", pytorch_grad_cam)}


# ---- a process that runs cases ------------------------------------------------------------------------------

def tower(weights):
    "ViT-B/16 with the given weights; the peers need the whole model."
    import open_clip
    model = open_clip.create_model("ViT-B-16").eval()
    model.visual.load_state_dict(torch.load(weights, weights_only=True))
    model.visual.whole = [model]  # in a list, so that the modules do not contain each other
    return model.visual


def peak(reset=False):
    "Highest resident memory in MB since the last reset; None if the system does not report it."
    try:
        if reset: Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(l.split()[1])/1024 for l in lines if l.startswith("VmHWM"))
    except OSError: return None


def work(weights):
    "Answer requests on stdin: one JSON object per line, {case, texts}."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe, sys.stdout = sys.stdout, sys.stderr  # the peers print to stdout
    visual, image = tower(weights), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): visual(image)
    for line in sys.stdin:
        request = json.loads(line)
        name = request["case"]
        module, case = PEERS.get(name, (None, CASES.get(name, PLAIN.get(name))))
        if module and importlib.util.find_spec(module) is None:
            answer = dict(missing=module)
        else:
            texts = F.normalize(torch.randn(request["texts"], 512, generator=torch.Generator().manual_seed(1)), dim=-1)
            before, start = peak(reset=True), time.process_time()
            case(visual, image, texts)
            answer = dict(seconds=time.process_time()-start, peak=before and peak()-before)
        print(json.dumps(answer), file=pipe, flush=True)


class Worker:
    "A process with the tower loaded; `ask` runs one case in it."
    def __init__(self, python, weights):
        script = str(Path(__file__).resolve())
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([python, script, "--work", weights], text=True, **pipes)

    def ask(self, case, texts):
        print(json.dumps(dict(case=case, texts=texts)), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer: raise RuntimeError(f"{case} with {texts} texts ended its process")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- comparing ----------------------------------------------------------------------------------------------

def compare(mine, theirs, case, other, texts, repeats):
    "Seconds and ratios of alternating runs, after one warm-up each; None if the other program is not installed."
    warm_up = theirs.ask(other, texts if texts < 9 else 1)
    if "missing" in warm_up: return None
    mine.ask(case, texts)
    our_times, their_times = [], []
    for _ in range(repeats):
        our_times.append(mine.ask(case, texts)["seconds"])
        their_times.append(theirs.ask(other, texts)["seconds"])
    return dict(ours=min(our_times), theirs=min(their_times), ratio=min(their_times)/min(our_times),
                ratio_median=statistics.median(their_times)/statistics.median(our_times), runs=repeats)


def extra_memory(python, weights, case, texts):
    "Peak resident memory in MB above that of the loaded tower, in a separate process."
    worker = Worker(python, weights)
    answer = worker.ask(case, texts)
    worker.close()
    return answer.get("peak")


def setting(peer):
    "The machine and the versions of the programs, on which the numbers depend."
    names = ("torch", "open_clip_torch", "legrad_torch", "grad-cam")
    versions = f"{{n: m.version(n) for n in {names} if any(m.Distribution.discover(name=n))}}"
    command = [peer, "-c", f"import importlib.metadata as m; print({versions})"]
    peers = ast.literal_eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ours = {n: importlib.metadata.version(n) for n in ("torch", "open_clip_torch")}
    return dict(**machine(), threads=1, ours=ours, peers=peers)


def main(args):
    import open_clip
    torch.manual_seed(0)
    peer, rows = args.peer_python or sys.executable, []
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder)/"visual.pt")
        torch.save(open_clip.create_model("ViT-B-16").visual.state_dict(), weights)
        mine, theirs = Worker(sys.executable, weights), Worker(peer, weights)
        for title, case, other, counts in COMPARE:
            for n in [n for n in counts if n in (*args.prompts, 4)]:
                against = theirs if other in PEERS else mine
                times = compare(mine, against, case, other, n, args.repeats if n < 9 else 1)
                print(f"{title:34} {n:3} texts  {other:22}", LINE.format(**times) if times else "not installed")
                if times: rows.append(dict(method=title, ours_case=case, other=other, texts=n, **times))
        mine.close()
        theirs.close()
        memory = {c: extra_memory(p, weights, c, max(args.prompts)) for c, p in
                  (("legrad_cls", sys.executable), ("legrad_mean", sys.executable), ("legrad_torch", peer))}
    print("extra memory, MB:", {k: v and round(v) for k, v in memory.items()}, f"at {max(args.prompts)} texts")
    if args.json:
        result = dict(what="process seconds of one call, ViT-B/16, 224 px, random weights", machine=setting(peer),
                      texts_of_memory=max(args.prompts), extra_memory_mb=memory, rows=rows)
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 3))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=os.environ.get("RECLIP_PEER_PYTHON"),
                        help="interpreter of the environment with the published programs")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 32], help="numbers of texts")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each pair (one at 32 texts)")
    parser.add_argument("--json", help="file for the table")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work: work(args.work)
    else: main(args)
