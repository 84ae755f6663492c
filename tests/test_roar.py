"Remove and retrain: golden masks, fills against other implementations, faults, an interrupted run, real photographs."
import json

import numpy as np
import pytest
import torch
from helpers import golden
from scipy.ndimage import convolve
from test_experiments import metrics, papermill

from reclip_nb.benchmarks.fills import apply_removal, linear_fill
from reclip_nb.benchmarks.roar import (
    Removal,
    Retraining,
    Split,
    removal_count,
    removal_mask,
    removed,
    retrain,
    roar_run,
    roar_table,
    static_maps,
    tie_counts,
)
from reclip_nb.benchmarks.roar.images import split_maps
from reclip_nb.benchmarks.roar.trainings import hits_of
from reclip_nb.models import load_clip, save_clip
from reclip_nb.study import Run, start_run

GOLDEN = golden("robust", "roar_masks.npz")


@pytest.mark.parametrize("k", [25, 50, 75, 95])
def test_golden_masks_and_images(k):
    mask = removal_mask(GOLDEN["maps"], k, "index")
    assert torch.equal(mask, GOLDEN[f"removed_{k}"]) and removal_count(k, 72) == GOLDEN[f"n_{k}"]
    filled = apply_removal(GOLDEN["images"], mask, "mean", GOLDEN["mean"])
    torch.testing.assert_close(filled, GOLDEN[f"filled_{k}"], rtol=0, atol=1e-12)


def test_count_is_exact_for_every_percentage():
    for entries in (72, 100, 224*224, 3*224*224):
        assert [removal_count(k, entries) for k in range(101)] == [k*entries//100 for k in range(101)]


@pytest.mark.parametrize("unit", ["pixel", "pixel_channel"])
@pytest.mark.parametrize("ties", ["random", "index"])
def test_masks_are_exact_nested_and_hottest_first(unit, ties):
    g = torch.Generator().manual_seed(0)
    maps = torch.randint(6, (20, 7, 9) if unit == "pixel" else (20, 3, 7, 9), generator=g).float()   # many ties
    ks = (0, 10, 55, 100)
    masks = [removal_mask(maps, k, ties, unit) for k in ks]
    assert [int(m.flatten(1).sum(1).unique()) for m in masks] == [removal_count(k, maps[0].numel()) for k in ks]
    for small, large in zip(masks, masks[1:]): assert not (small & ~large).any()
    for mask in masks[1:3]:
        assert all(values[~gone].max() <= values[gone].min() for values, gone in zip(maps, mask, strict=True))


def test_random_ties_do_not_prefer_a_place_and_follow_the_generator():
    maps = torch.zeros(400, 6, 6)
    share = removal_mask(maps, 75).double().mean(0)
    assert (share-.75).abs().max() < .1
    bottom = removal_mask(maps, 75)[:, -1].sum()
    assert removal_mask(maps, 75, "index")[:, -1].sum() < bottom, "reading order spares the bottom"
    draw = lambda seed: removal_mask(maps, 75, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_linear_filling_is_harmonic():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 16, 20, generator=g, dtype=torch.float64)
    hole = torch.rand(4, 16, 20, generator=g) < torch.tensor([.25, .5, .75, .95])[:, None, None]
    filled = linear_fill(x, hole, tol=1e-12)
    assert torch.equal(filled[~hole[:, None].expand_as(x)], x[~hole[:, None].expand_as(x)])
    w = np.array([[1, 2, 1], [2, 0, 2], [1, 2, 1]])/12
    around = lambda v: convolve(v, w, mode="constant")
    neighbour_mean = around(filled[3, 1].numpy())/around(np.ones((16, 20)))
    np.testing.assert_allclose(filled[3, 1].numpy()[hole[3]], neighbour_mean[hole[3]], atol=1e-9)


def test_noise_is_added_to_removed_pixels_only():
    x = torch.full((2, 3, 24, 24), .5)
    hole = removal_mask(torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)), 50)
    noisy = apply_removal(x, hole, "noisy_linear", noise=.01)
    where = hole[:, None].expand_as(x)
    assert torch.equal(noisy[~where], x[~where]) and .008 < noisy[where].std() < .012


def splits(n=96, classes=3, side=16):
    "Images whose left half has the colour of the class."
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    images = torch.randint(256, (n, 3, side, side), generator=g, dtype=torch.uint8)
    images[torch.arange(n), labels, :, :side//2] = 255
    return Split(images[:-24], labels[:-24]), Split(images[-24:], labels[-24:])


SHORT = Retraining(epochs=5, batch_size=8, milestones=(4,), lr=.05, shift=0, flip=False)
LEFT = lambda s: torch.arange(16.).flip(0).expand(len(s), 16, 16)   # the class is on the left
RIGHT = lambda s: torch.arange(16.).expand(len(s), 16, 16)


def test_the_better_map_falls_faster_and_an_interrupted_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    train, val = splits()
    maps = {("edge", "good"): (LEFT(train), LEFT(val)), ("edge", "bad"): (RIGHT(train), RIGHT(val))}
    run, calls = start_run("halves", "roar", "roar", {}), []
    train_all = lambda seeds=(0, 1): roar_run(run, "halves", train, val, maps, (50,), seeds, (0,), recipe=SHORT)
    stored = lambda: len((run/"trainings.jsonl").read_text().splitlines())

    def interrupted(*args, **kwargs):
        if len(calls) == 4: raise KeyboardInterrupt
        calls.append(1)
        return retrain(*args, **kwargs)

    monkeypatch.setattr("reclip_nb.benchmarks.roar.trainings.retrain", interrupted)
    with pytest.raises(KeyboardInterrupt): train_all()
    assert stored() == 4
    calls.append("no further interruption")
    rows = train_all()
    assert len(rows) == 2+3*3 == stored() == len(calls)-1
    assert train_all() == rows and len(calls) == len(rows)+1, "finished trainings are reused"
    assert len(train_all((0, 1, 2))) == len(rows)+1+3 == len(calls)-1, "a third seed adds trainings"
    table = roar_table(rows, [("good", "bad"), ("good", "random")]).set_index(["model", "metric"])
    means = table["mean"]
    assert means["none", "accuracy@0"] == 1
    assert means["good", "accuracy@50"] < .7 < means["bad", "accuracy@50"]
    difference = table.loc[("good - bad", "area difference")]
    assert difference.high < 0
    assert difference["mean"] == pytest.approx(means["good", "area"]-means["bad", "area"])
    assert all(table.chance == 1/3) and all(hits_of(r).mean() == r["accuracy"] for r in rows)


def test_rows_of_other_maps_or_settings_are_not_reused(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIP_RUNS", str(tmp_path))
    train, val = splits(48)
    run = start_run("halves", "roar", "roar", {})
    one_epoch = Retraining(epochs=1, batch_size=8, warmup=0, milestones=())
    two_epochs = Retraining(epochs=2, batch_size=8, warmup=0, milestones=())

    def keys(make_maps, **options):
        "Keys of the trainings with one map."
        maps = {("edge", "m"): (make_maps(train), make_maps(val))}
        rows = roar_run(run, "halves", train, val, maps, (50,), (0,), (), **(dict(recipe=one_epoch) | options))
        return {row["key"] for row in rows}

    first = keys(LEFT)
    assert len(first & keys(RIGHT)) == 2, "the whole images and random pixels are shared"
    assert not first & keys(LEFT, removal=Removal("image_mean"))
    assert not first & keys(LEFT, recipe=two_epochs)


def test_constant_maps_are_counted_and_nan_maps_refused():
    train, _ = splits(44)
    flat = np.random.default_rng(0).random((20, 16, 16))
    flat[:5] = 0
    assert removed(train, flat, 50, Removal(), train.mean())[2]["constant"] == 5
    assert tie_counts(torch.zeros(3, 4, 4), 50)["tied"] == 3
    flat[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 20 maps contain NaN"): removed(train, flat, 50, Removal(), train.mean())
    with pytest.raises(ValueError, match="19 maps for 20"): removed(train, flat[1:], 50, Removal(), train.mean())


def test_static_maps_explain_the_predicted_class_once(tmp_path):
    clip = load_clip("tiny-smoke", seed=0)
    images = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Split(images, torch.tensor([1, 0, 2, 1, 0]))
    weights = torch.nn.functional.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    maps = static_maps(tmp_path, clip, data, weights, {"simple_gradient": {}}, batch_size=2)["simple_gradient"]
    whole = next(split_maps(clip, data, weights, {"simple_gradient": {}}))["simple_gradient"]
    np.testing.assert_allclose(maps, whole.numpy(), atol=1e-6)
    true = next(split_maps(clip, data, weights, {"simple_gradient": {}}, target="true"))["simple_gradient"]
    predicted = (clip.encode_image(data.pixels()) @ weights.T).argmax(-1)
    assert [bool((a == b).all()) for a, b in zip(true, whole)] == (predicted == data.labels).tolist()
    with pytest.raises(ValueError, match="depend on the label"):
        next(split_maps(clip, data, weights, {"simple_gradient": {}}, target="label"))


@pytest.mark.parametrize("network", ["tiny-cnn", "resnet18"])
def test_a_probe_reads_the_features_of_any_network(network):
    train, val = splits(40)
    recipe = Retraining(network, epochs=1, batch_size=8, warmup=0, milestones=(), shift=1)
    seen = []
    result = retrain(train, val, 3, recipe, probe=lambda X, y: seen.append((X.shape, y)) or (lambda Z: Z[:, :3]))
    assert seen[0][0] == (16, 96 if network == "tiny-cnn" else 512) and torch.equal(seen[0][1], train.labels)
    assert result["probe_hits"].shape == result["hits"].shape == (24,)


@pytest.mark.sample
def test_on_cifar10(root, tmp_path):
    "Real photographs through the notebook, with the tiny architecture untrained."
    words = "a photo of airplane automobile bird cat deer dog frog horse ship truck".split()
    weights = tmp_path/"c.safetensors"
    save_clip(load_clip("tiny-cifar", words=words), weights)
    papermill(root, tmp_path, "roar", "-f", "configs/sample/roar.yaml", "-p", "pretrained", weights,
              "-y", "models: [clip]", "-y", "ks: [50]", "-p", "limit", 400,
              "-p", "retrainings", 1, "-p", "epochs", 4, "-y", "milestones: [3]")
    rows = metrics(tmp_path, "sample/cifar", "roar")["table"]
    whole = next(r for r in rows if r["metric"] == "accuracy@0")
    assert whole["mean"] > .13 and whole["n"] == 400 and whole["chance"] == .1
    assert {r["method"] for r in rows} == {"none", "random", "simple_gradient", "gradcam"}
    card = json.loads((tmp_path/"sample/cifar/roar/run.json").read_text())["protocol"]
    assert card["target"] == "predicted" and Run(tmp_path/"sample/cifar/roar").info["status"] == "finished"
