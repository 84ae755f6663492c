"""Photographs per second without a model: decoding on one core, and the loader from a folder and from tar shards.

    python tests/bench/loader.py [--workers 1 2] [--json FILE]

The photographs are procedural, 500 x 375 and 375 x 500 pixels, about 100 kB as JPEG of quality 90, like the average
of ImageNet; all of them fit into the page cache, so no disk is measured. "plain" is what a user would write:
torchvision's ImageFolder, open_clip's validation transform, torch's DataLoader; it reads the same photographs in the
same order, and its pixels must be equal.

The first table uses one thread without loader processes. It compares ways to decode and resize, and the difference of
their pixels from those of the published transform, in levels of 255. The second table counts the time of all
processes, including the main one: `images_s` uses wall time and is meaningful only on an idle machine;
`images_core_s`, photographs per second of processor time, is also valid on a busy one. Both are differences between a
long and a short run, which excludes the start of the processes. `at_16_cores` is an EXTRAPOLATION, 16 times
`images_core_s`: linear, without losses for memory or disk. If you have 16 cores, measure it: --workers 16."""
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

SIZE, BATCH = 224, 32  # pixels, photographs per batch
CORES, TARGET = 16, 600  # cores, and the target in photographs per second
GRAIN = 20  # standard deviation of the noise, levels
GEOMETRY = Geometry(SIZE)
TRANSFORM = open_clip.image_transform(SIZE, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))  # the model normalises


def photograph(width, height, seed):
    "JPEG bytes of a random image: smooth fields of all scales, and noise."
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        field = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(field[..., c]).resize((width, height), Image.BICUBIC) for c in range(3)]
        total += 90/cells**.6*np.stack(layers, -1)
    pixels = 128+total+rng.normal(scale=GRAIN, size=(height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ---- one core -----------------------------------------------------------------------------------------------

def ours(content): return GEOMETRY.image(read_rgb(io.BytesIO(content)))


def plain(content): return TRANSFORM(Image.open(io.BytesIO(content)))


def draft(content):
    "libjpeg halves the photograph while decoding, as long as it remains large enough."
    picture = Image.open(io.BytesIO(content))
    picture.draft("RGB", (SIZE, SIZE))
    return GEOMETRY.image(picture.convert("RGB"))


def decoded(content): return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def torchvision_decode(content): return GEOMETRY.image(Image.fromarray(decoded(content).permute(1, 2, 0).numpy()))


def torchvision_all(content):
    "Without Pillow: decoded and resized as a tensor."
    return TF.center_crop(TF.resize(decoded(content), SIZE, InterpolationMode.BICUBIC, antialias=True), SIZE)/255


def crop_first(content):
    "Only the pixels of the central square are resampled."
    picture = read_rgb(io.BytesIO(content))
    w, h = picture.size
    short = min(w, h)
    new = [SIZE if s == short else SIZE*s//short for s in (w, h)]
    left, top = (round((n-SIZE)/2) for n in new)
    box = (left*w/new[0], top*h/new[1], (left+SIZE)*w/new[0], (top+SIZE)*h/new[1])
    return TF.pil_to_tensor(picture.resize((SIZE, SIZE), Image.BICUBIC, box=box))/255


WAYS = (ours, plain, torchvision_decode, torchvision_all, crop_first, draft)


def decoding(size, count, repeats):
    "Milliseconds of each way, in alternating rounds, and its difference from the published pixels."
    files = [photograph(*(size if k % 2 else size[::-1]), seed=k) for k in range(count)]
    times = {way: [] for way in WAYS}
    for r in range(repeats+1):
        for way in WAYS:
            start = time.process_time()
            for content in files: way(content)
            if r: times[way].append((time.process_time()-start)/count)  # the first round warms up
    kb = sum(map(len, files))/count/1000
    return [decoding_row(way, files, times, pixels="{} x {}".format(*size), kb=kb) for way in WAYS]


def decoding_row(way, files, times, **more):
    "The row of one way to decode."
    seconds, plain_seconds = times[way], times[plain]
    differences = [(way(content)-plain(content)).abs()*255 for content in files]
    return dict(way=way.__name__, **more, ms=min(seconds)*1000, ratio=min(plain_seconds)/min(seconds),
                ratio_median=statistics.median(plain_seconds)/statistics.median(seconds),
                largest_difference=max(d.max().item() for d in differences),
                mean_difference=statistics.mean(d.mean().item() for d in differences))


# ---- the loader ---------------------------------------------------------------------------------------------

def write(root, photos, distinct=64):
    "Write the same photographs as class folders and as tar shards of 128."
    files = [photograph(*((500, 375) if k % 3 else (375, 500)), seed=k) for k in range(min(distinct, photos))]
    for k in range(photos):
        path = root/"folder"/"train"/f"{k//128:04d}"/f"{k:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[k % len(files)])
    (root/"shards"/"train").mkdir(parents=True)
    classes = sorted((root/"folder"/"train").iterdir())
    (root/"shards"/"classes.txt").write_text("\n".join(c.name for c in classes))
    for k, folder in enumerate(classes): write_shard(root/"shards"/"train"/f"{k:04d}.tar", folder, k)


def write_shard(file, folder, label):
    "Write the photographs of a folder and their label as one tar file."
    content = str(label).encode()
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
            member = tarfile.TarInfo(f"{path.stem}.cls")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def through_loader(data, steps, workers):
    return (batch["image"] for _, batch in step_batches(data, BATCH, 0, 0, steps, workers))


def through_plain(data, steps, workers):
    order = list(step_indices(len(data), BATCH, 0, 0, steps))
    return (x for x, _ in DataLoader(data, batch_sampler=order, num_workers=workers))


def processor_seconds():
    "Processor time of this process and of its child processes that have ended."
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime+usage.ru_stime for usage in usages)


def cost(program, steps, workers):
    "Wall seconds and processor seconds of a run, loader processes included."
    wall, cpu = time.perf_counter(), processor_seconds()
    for _ in program(steps, workers): pass
    return np.array([time.perf_counter()-wall, processor_seconds()-cpu])


def loading(programs, steps, workers, repeats):
    "Rates of each program with a number of loader processes, in alternating rounds."
    short = 2
    images = (steps-short)*BATCH
    rounds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            rounds[name].append(cost(program, steps, workers)-cost(program, short, workers))
    wall, cpu = ({name: [r[k] for r in costs] for name, costs in rounds.items()} for k in (0, 1))
    rows = []
    for name in programs:
        per_core = images/min(cpu[name])
        rows.append(dict(program=name, workers=workers, images_s=images/min(wall[name]), images_core_s=per_core,
                         at_16_cores=CORES*per_core, asked=TARGET, ratio=min(cpu["plain"])/min(cpu[name]),
                         ratio_median=statistics.median(cpu["plain"])/statistics.median(cpu[name])))
        print("{program:7} {workers} workers  {images_s:6.0f} images/s  {images_core_s:6.0f} per core second  ratio "
              "{ratio:.2f} ({ratio_median:.2f})  extrapolated to 16 cores: {at_16_cores:.0f}".format(**rows[-1]))
    return rows


def indexing(folder):
    "Photographs indexed per second of processor time."
    cache = folder/"shards.json"
    cache.unlink()
    start = time.process_time()
    count = len(shard_index(sorted(folder.glob("*.tar")), cache)["name"])
    return count/(time.process_time()-start)


def setting():
    "Machine, cores and versions."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {n: importlib.metadata.version(n) for n in ("torch", "torchvision", "pillow")}
    return dict(**machine(), cores=cores, **versions)


def main(args):
    ways = decoding((500, 375), 16, args.repeats)+decoding((2000, 1500), 4, args.repeats)
    for row in ways:
        print("{way:18} {pixels:11} {ms:6.2f} ms  ratio {ratio:.2f} ({ratio_median:.2f})  "
              "pixels differ by at most {largest_difference:.0f} levels".format(**row))
    root = Path(tempfile.mkdtemp())
    try:
        write(root, args.photos)
        programs = {"folder": partial(through_loader, open_dataset("imagefolder", root/"folder", "train")),
                    "shards": partial(through_loader, open_dataset("shards", root/"shards", "train"))}
        programs["plain"] = partial(through_plain, torchvision.datasets.ImageFolder(root/"folder"/"train", TRANSFORM))
        first = [next(iter(program(1, 0))) for program in programs.values()]
        assert all(torch.equal(x, first[0]) for x in first)
        rates = [row for workers in args.workers for row in loading(programs, args.steps, workers, args.repeats)]
        index_rate = indexing(root/"shards"/"train")
    finally: shutil.rmtree(root)
    print(f"index of shards: {index_rate:.0f} photographs per second")
    if args.json:
        what = (f"photographs per second without a model, {SIZE} px, from the page cache; target: {TARGET} per second "
                f"on {CORES} cores; at_16_cores is an extrapolation, {CORES} x images_core_s")
        result = dict(what=what, machine=setting(), one_thread=ways, loader=rates,
                      shard_index=dict(photographs_s=index_rate))
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 4))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="loader processes")
    parser.add_argument("--photos", type=int, default=1024, help="files in the folder and in the shards")
    parser.add_argument("--steps", type=int, default=34, help=f"number of batches of {BATCH} in a long run")
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds")
    parser.add_argument("--json", help="file for the tables")
    main(parser.parse_args())
