"""Photographs a second, apart from any model: one core's decoding, and the loader from a folder and from tar shards.

    python tests/bench/loader.py [--workers 1 2] [--json FILE]

The photographs are procedural, 500 x 375 and 375 x 500 pixels, about 100 kB as JPEG of quality 90, as ImageNet's are on average; all of
them fit into the page cache, so no disk is measured. "plain" is what a user would write: torchvision's ImageFolder, open_clip's
validation transform, torch's DataLoader; it reads the same photographs in the same order, and its pixels must be equal.

The first table is one thread without loader processes: ways to decode and resize, and how far their pixels are from the
published transform's, in levels of 255. The second counts all processes, the reading one included: `images_s` is by the wall clock
and means something on an idle machine only; `images_core_s`, photographs a second of processor time, holds on a busy one as
well. Both are differences between a long and a short run, so the start of the processes is left out. `at_16_cores` is an
EXTRAPOLATION, 16 times `images_core_s`: linear, with no loss for memory or disk. With 16 cores, measure: --workers 16."""
import argparse
import importlib.metadata
import io
import json
import os
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import open_clip
import torch
import torchvision
from machine import machine
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from reclip_nb.data import Geometry, open_dataset, step_batches
from reclip_nb.data.batches import step_indices
from reclip_nb.data.photos import read_rgb
from reclip_nb.data.tars import shard_index

SIZE, BATCH, CORES, TARGET = 224, 32, 16, 600     # pixels, photographs, and the rate asked for
GRAIN = 20                                        # levels
GEOMETRY = Geometry(SIZE)
TRANSFORM = open_clip.image_transform(SIZE, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))   # the model normalises


def photograph(width, height, seed):
    "JPEG bytes of smooth fields of all scales, and grain."
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        field = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(field[..., c]).resize((width, height), Image.BICUBIC) for c in range(3)]
        total += 90/cells**.6*np.stack(layers, -1)
    pixels = 128+total+rng.normal(scale=GRAIN, size=(height, width, 1))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue()


# ---- one core -----------------------------------------------------------------------------------------------

def ours(content): return GEOMETRY.image(read_rgb(io.BytesIO(content)))


def plain(content): return TRANSFORM(Image.open(io.BytesIO(content)))


def draft(content):
    "libjpeg halves the photograph while decoding, as long as it stays large enough."
    picture = Image.open(io.BytesIO(content))
    picture.draft("RGB", (SIZE, SIZE))
    return GEOMETRY.image(picture.convert("RGB"))


def decoded(content): return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def torchvision_decode(content): return GEOMETRY.image(Image.fromarray(decoded(content).permute(1, 2, 0).numpy()))


def torchvision_all(content):
    "No Pillow: decoded and resized as a tensor."
    return TF.center_crop(TF.resize(decoded(content), SIZE, InterpolationMode.BICUBIC, antialias=True), SIZE)/255


def crop_first(content):
    "Only what the centre square needs is resampled."
    picture = read_rgb(io.BytesIO(content))
    (w, h), short = picture.size, min(picture.size)
    new = [SIZE if s == short else SIZE*s//short for s in (w, h)]
    left, top = (round((n-SIZE)/2) for n in new)
    box = (left*w/new[0], top*h/new[1], (left+SIZE)*w/new[0], (top+SIZE)*h/new[1])
    return TF.pil_to_tensor(picture.resize((SIZE, SIZE), Image.BICUBIC, box=box))/255


WAYS = (ours, plain, torchvision_decode, torchvision_all, crop_first, draft)


def decoding(size, count, repeats):
    "Milliseconds of each way, alternating, and its distance from the published pixels."
    files = [photograph(*(size if k % 2 else size[::-1]), seed=k) for k in range(count)]
    times = {way: [] for way in WAYS}
    for r in range(repeats+1):
        for way in WAYS:
            start = time.process_time()
            for content in files: way(content)
            if r: times[way].append((time.process_time()-start)/count)     # the first round warms up
    apart = {way: [(way(c)-plain(c)).abs()*255 for c in files] for way in WAYS}
    return [dict(way=way.__name__, pixels="{} x {}".format(*size), kb=sum(map(len, files))/count/1000, ms=min(t)*1000, ratio=min(times[plain])/min(t),
                 ratio_median=statistics.median(times[plain])/statistics.median(t), largest_difference=max(d.max().item() for d in apart[way]),
                 mean_difference=statistics.mean(d.mean().item() for d in apart[way])) for way, t in times.items()]


# ---- the loader ---------------------------------------------------------------------------------------------

def write(root, photos, distinct=64):
    "The same photographs as class folders and as shards of 128."
    files = [photograph(*((500, 375) if k % 3 else (375, 500)), seed=k) for k in range(min(distinct, photos))]
    for k in range(photos):
        path = root/"folder"/"train"/f"{k//128:04d}"/f"{k:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[k % len(files)])
    (root/"shards"/"train").mkdir(parents=True)
    classes = sorted((root/"folder"/"train").iterdir())
    (root/"shards"/"classes.txt").write_text("\n".join(c.name for c in classes))
    for k, folder in enumerate(classes):
        with tarfile.open(root/"shards"/"train"/f"{k:04d}.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
                (member := tarfile.TarInfo(f"{path.stem}.cls")).size = len(label := str(k).encode())
                tar.addfile(member, io.BytesIO(label))


def through_loader(data, steps, workers): return (b["image"] for _, b in step_batches(data, BATCH, 0, 0, steps, workers))


def through_plain(data, steps, workers):
    order = list(step_indices(len(data), BATCH, 0, 0, steps))
    return (x for x, _ in DataLoader(data, batch_sampler=order, num_workers=workers))


def cost(program, steps, workers):
    "Wall seconds and processor seconds, of this process and of the loader processes, which have ended."
    def spent(): return sum(getattr(resource.getrusage(who), f"ru_{k}time") for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) for k in "us")
    wall, cpu = time.perf_counter(), spent()
    for _ in program(steps, workers): pass
    return np.array([time.perf_counter()-wall, spent()-cpu])


def loading(programs, steps, workers, repeats):
    "Rates of each program with so many loader processes, alternating rounds."
    short, images = 2, (steps-2)*BATCH
    rounds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items(): rounds[name].append(cost(program, steps, workers)-cost(program, short, workers))
    wall, cpu = ({name: [r[k] for r in found] for name, found in rounds.items()} for k in (0, 1))
    rows = []
    for name in programs:
        per_core = images/min(cpu[name])
        rows.append(dict(program=name, workers=workers, images_s=images/min(wall[name]), images_core_s=per_core, at_16_cores=CORES*per_core, asked=TARGET,
                         ratio=min(cpu["plain"])/min(cpu[name]), ratio_median=statistics.median(cpu["plain"])/statistics.median(cpu[name])))
        print("{program:7} {workers} workers  {images_s:6.0f} images/s  {images_core_s:6.0f} a core second  ratio {ratio:.2f} ({ratio_median:.2f})  "
              "extrapolated to 16 cores: {at_16_cores:.0f}".format(**rows[-1]))
    return rows


def indexing(folder):
    "Photographs listed a second of processor time."
    (cache := folder/"shards.json").unlink()
    start = time.process_time()
    found = len(shard_index(sorted(folder.glob("*.tar")), cache)["name"])
    return found/(time.process_time()-start)


def setting():
    "What the numbers depend on."
    return dict(**machine(), cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 
                **{n: importlib.metadata.version(n) for n in ("torch", "torchvision", "pillow")})


def main(args):
    ways = [row for size, count in (((500, 375), 16), ((2000, 1500), 4)) for row in decoding(size, count, args.repeats)]
    for row in ways: print("{way:18} {pixels:11} {ms:6.2f} ms  ratio {ratio:.2f} ({ratio_median:.2f})  pixels differ by at most {largest_difference:.0f} levels".format(**row))
    root = Path(tempfile.mkdtemp())
    try:
        write(root, args.photos)
        sets = {kind: open_dataset(name, root/kind, "train") for kind, name in (("folder", "imagefolder"), ("shards", "shards"))}
        programs = {name: partial(through_loader, data) for name, data in sets.items()}
        programs["plain"] = partial(through_plain, torchvision.datasets.ImageFolder(root/"folder"/"train", TRANSFORM))
        first = [next(iter(program(1, 0))) for program in programs.values()]
        assert all(torch.equal(x, first[0]) for x in first)
        rates = [row for workers in args.workers for row in loading(programs, args.steps, workers, args.repeats)]
        listed = indexing(root/"shards"/"train")
    finally: shutil.rmtree(root)
    print(f"index of shards: {listed:.0f} photographs a second")
    if args.json:
        what = (f"photographs a second without a model, {SIZE} px, from the page cache; asked for: {TARGET} a second on {CORES} cores; "
                f"at_16_cores is an extrapolation, {CORES} x images_core_s")
        result = dict(what=what, machine=setting(), one_thread=ways, loader=rates, shard_index=dict(photographs_s=listed))
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 4))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="loader processes")
    parser.add_argument("--photos", type=int, default=1024, help="files in the folder and in the shards")
    parser.add_argument("--steps", type=int, default=34, help=f"batches of {BATCH} of a long run")
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds")
    parser.add_argument("--json", help="file for the tables")
    main(parser.parse_args())
