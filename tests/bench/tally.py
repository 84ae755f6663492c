"""Time of the network-dissection tally against full-resolution maps: 768 units, 14x14 -> 112x112, one thread.

    python tests/bench/tally.py [--images N] [--json FILE]

Both read the same Broden-format folder of six categories (masks are decoded in both) and give the same counts, which is
checked. "dense" upsamples every unit, thresholds, and multiplies the 0/1 maps with the 0/1 masks of the image's labels;
"active" does so only for units that exceed their threshold in the image. Runs alternate; times are process seconds an
image, ratios are of minima and of medians."""
import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch
import torch.nn.functional as F
from machine import machine
from PIL import Image

UNITS, GRID, SIZE = 768, 14, 112
ACTIVE = (.07, .22, .45)          # shares of (image, unit) pairs above the threshold
PLANES = dict(color=(1, 11, 14), object=(12, 40, 8), part=(52, 40, 9), part_2=(52, 40, 9),
              material=(92, 15, 6))  # first label, number of labels, cells
WHOLE = dict(scene=(107, 60), texture=(167, 47))


def smooth(rng, levels, cells):
    "A patchwork of `levels` values at the size of the masks."
    noise = torch.from_numpy(rng.standard_normal((1, levels, cells, cells)))
    fields = F.interpolate(noise, (SIZE, SIZE), mode="bilinear")
    return fields[0].argmax(0).numpy()


def write_folder(root, images, rng):
    "A Broden folder of six categories; every plane shows up to eight labels."
    (root/"images").mkdir(parents=True)
    rows = ["image,split,ih,iw,sh,sw,color,object,part,material,scene,texture"]
    for i in range(images):
        Image.new("RGB", (2*SIZE, 2*SIZE)).save(root/"images"/f"{i}.jpg")
        names = {}
        for plane, (first, count, cells) in PLANES.items():
            chosen = first+rng.permutation(count)[:min(count, 8)]
            number = chosen[smooth(rng, len(chosen), cells)]
            number[smooth(rng, 2, 4) == 1] *= plane == "color"  # parts of the image have a colour label only
            names[plane] = f"{i}_{plane}.png"
            rgb = np.stack([number % 256, number//256, 0*number], -1).astype(np.uint8)
            Image.fromarray(rgb).save(root/"images"/names[plane])
        whole = [str(first+rng.integers(count)) for first, count in WHOLE.values()]
        part = f"{names['part']};{names['part_2']}"
        rows.append(",".join([f"{i}.jpg,train,{2*SIZE},{2*SIZE},{SIZE},{SIZE}",
                              names["color"], names["object"], part, names["material"], *whole]))
    labels = {c: range(f, f+k) for c, (f, k, *_) in {**PLANES, **WHOLE}.items() if c != "part_2"}
    (root/"index.csv").write_text("\n".join(rows)+"\n")
    (root/"category.csv").write_text("name\n"+"".join(f"{c}\n" for c in labels))
    (root/"label.csv").write_text("number,name\n"+"".join(f"{n},{c}{n}\n" for c, own in labels.items() for n in own))
    for c, own in labels.items():
        (root/f"c_{c}.csv").write_text("number,frequency,coverage\n"+"".join(f"{n},1,1\n" for n in own))


def activations(images, rng):
    "Smooth grids in multiples of 1/256, so that no rounding can tell the programs apart."
    x = np.arange(GRID)
    blur = np.exp(-(x[:, None]-x)**2/2/1.2**2)
    blur /= np.sqrt((blur**2).sum(1, keepdims=True))
    acts = blur @ rng.standard_normal((images, UNITS, GRID, GRID)) @ blur.T
    acts += .8*rng.standard_normal((images, UNITS, 1, 1))
    return (np.round(acts*256)/256).astype(np.float32)


# ---- programs -----------------------------------------------------------------------------------------------

def ours(acts, broden, thresholds):
    from reclip_nb.dissect.tally import tally
    return tally(acts, broden, thresholds)


def dense(acts, broden, thresholds, active=False):
    "Full-resolution maps of all units, or of the active ones, times the masks of the labels."
    from reclip_nb.dissect.tally import Tally
    t = Tally.zeros(UNITS, len(broden.primary), len(broden.categories))
    member = np.eye(len(broden.categories))[broden.primary]
    for i, a in enumerate(acts):
        planes, whole = (broden.columns[n] for n in broden.concepts(i))
        on = np.flatnonzero(a.max((1, 2)) > thresholds) if active else np.arange(UNITS)
        maps = F.interpolate(torch.from_numpy(a[on])[None], (SIZE, SIZE), mode="bilinear")[0].flatten(1)
        inside = (maps > torch.from_numpy(thresholds[on])[:, None]).float()
        columns = np.append(np.unique(planes[planes >= 0]), whole)
        masks = np.stack([(planes == c).sum(0) if c not in whole else np.ones((SIZE, SIZE), int) for c in columns])
        masks = torch.from_numpy(masks.reshape(len(columns), -1).astype(np.float32))
        area, under = inside.sum(1).numpy().astype(int), (inside @ masks.T).numpy().astype(int)
        t.intersections[on[:, None], columns] += under
        t.label_area[columns] += masks.sum(1).numpy().astype(int)
        t.unit_area[on] += area
        t.area_image[on] += area[:, None]*(member[columns].sum(0) > 0)
        t.area_mask[on] += area[:, None]*((under > 0) @ member[columns] > 0)
    return t


def dense_active(acts, broden, thresholds): return dense(acts, broden, thresholds, active=True)


# ---- comparing ----------------------------------------------------------------------------------------------

def seconds(program, *data):
    start = time.process_time()
    found = program(*data)
    return time.process_time()-start, found


def compare(acts, broden, share, repeats):
    "Milliseconds an image of each program in alternating runs at a share of active pairs."
    thresholds = np.quantile(acts.max((2, 3)), 1-share, axis=0).astype(np.float32)+np.float32(2**-18)
    programs = dict(ours=ours, dense=dense, active=dense_active)
    for p in programs.values(): p(acts[:2], broden, thresholds)
    runs = [{name: seconds(p, acts, broden, thresholds) for name, p in programs.items()} for _ in range(repeats)]
    for name in ("dense", "active"):
        for field, value in vars(runs[0][name][1]).items():
            assert (value == getattr(runs[0]["ours"][1], field)).all(), f"{name}: other {field}"
    times = {name: [1000*run[name][0]/len(acts) for run in runs] for name in programs}
    ratio = {f"ratio_{n}{end}": pick(times[n])/pick(times["ours"]) for n in ("dense", "active")
             for end, pick in (("", min), ("_median", statistics.median))}
    pairs = float((acts.max((2, 3)) > thresholds).mean())
    return dict(active_pairs=pairs, **{f"{n}_ms": min(t) for n, t in times.items()}, **ratio, runs=repeats)


def setting():
    "What the numbers depend on."
    versions = {n: importlib.metadata.version(n) for n in ("numpy", "torch", "pillow")}
    return dict(**machine(), threads=1, ours=versions)


def main(args):
    from reclip_nb.dissect import BrodenFolder
    torch.set_num_threads(1)
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder)/"broden", args.images, rng)
        broden, acts = BrodenFolder(Path(folder)/"broden"), activations(args.images, rng)
        decode = min(seconds(lambda: [broden.concepts(i) for i in range(args.images)])[0] for _ in range(3))
        for share in ACTIVE:
            rows.append(compare(acts, broden, share, args.repeats))
            print("{active_pairs:4.0%} active  ours {ours_ms:6.2f} ms per image  "
                  "dense {dense_ms:6.2f} ({ratio_dense:.1f}x)  "
                  "active units only {active_ms:6.2f} ({ratio_active:.1f}x)".format(**rows[-1]))
    if args.json:
        what = (f"process milliseconds per image, mask decoding included; "
                f"{UNITS} units, {GRID}x{GRID} -> {SIZE}x{SIZE}, six categories")
        result = dict(what=what, machine=setting(), images=args.images, decoding_ms=1000*decode/args.images, rows=rows)
        short = json.loads(json.dumps(result), parse_float=lambda v: round(float(v), 3))
        Path(args.json).write_text(json.dumps(short, indent=1)+"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=50, help="images of the folder")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs")
    parser.add_argument("--json", help="file for the table")
    main(parser.parse_args())
