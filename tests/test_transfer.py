"Maps on images and tasks that the fine-tuning never saw: out-of-distribution scenes, medical images, no masks."
import numpy as np
import pytest
import torch

from reclip_nb.benchmarks.localisation import masked_batches, text_source
from reclip_nb.benchmarks.transfer import concentration, gain_table, pooled, transfer_scores, transfer_table
from reclip_nb.data import open_dataset
from reclip_nb.evaluations.probe import ColouredScenes, six_classes
from reclip_nb.models import frozen, load_clip
from reclip_nb.worlds import Elsewhere, ShapesDataset
from reclip_nb.worlds.shapes import COLOURS, WORDS
from reclip_nb.worlds.unseen import KINDS

WORDS_OF_MEDICINE = "a an benign chest colonoscopy dermoscopy image lesion melanoma of photo polyp skin x-ray".split()


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_from_elsewhere(kind):
    data = Elsewhere(kind, "smoke", 30, seed=3)
    assert len(data) == 30 and data.images.shape == (30, 3, 32, 32) and data.masks.flatten(1).any(1).all()
    for i in (0, 7, 29):
        item = data[i]
        assert 0 <= item["image"].min() and item["image"].max() <= 1 and item["mask"].shape == (32, 32)
        assert set(item["caption"].split()) <= set(WORDS) and data.classes[item["label"]] in item["caption"]
    longer = Elsewhere(kind, "smoke", 40, seed=3)
    assert torch.equal(longer.images[:30], data.images), "a scene depends on its own place only"
    assert not torch.equal(Elsewhere(kind, "smoke", 30, seed=4).images, data.images)


def test_kinds_share_no_scene():
    images = [Elsewhere(kind, "smoke", 8).images for kind in KINDS]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("maps, want", [
    (torch.ones(1, 10, 10), .2), (torch.eye(10)[None]-.5, 1), (torch.eye(20)[None], 1),
    (torch.arange(100.).view(1, 10, 10), np.arange(80, 100).sum()/np.arange(100).sum())])
def test_concentration(maps, want): assert concentration(maps).item() == pytest.approx(want)


def test_concentration_without_heat_is_undefined():
    assert concentration(torch.zeros(1, 8, 8)).isnan() and concentration(torch.full((1, 8, 8), torch.nan)).isnan()


def test_colours_of_the_largest_object():
    scenes = ShapesDataset("smoke", "val")
    data = six_classes(scenes)
    assert isinstance(data, ColouredScenes) and len(data) == len(scenes) and data.classes == list(COLOURS)
    several = [i for i, shapes in enumerate(scenes.shapes) if len({s.colour for s in shapes}) > 1][:20]
    for i in several:
        others = scenes.instances[i][~data[i]["mask"]]
        assert others.any() and data[i]["mask"].sum() >= torch.bincount(others.flatten().long())[1:].max()


def test_an_image_without_a_text_is_refused():
    class Unlabelled:
        def __len__(self): return 1
    with pytest.raises(ValueError, match="label, COCO categories or a caption"):
        text_source(load_clip("tiny-smoke"), Unlabelled())


@pytest.mark.sample
def test_real_images_from_elsewhere(sample_data):
    "Polyps have masks, dermoscopy and X-rays have none; X-rays have no label either, so their text is the caption."
    clips = dict(clip=load_clip("tiny", seed=0, words=WORDS_OF_MEDICINE))
    clips["aft4"] = frozen(load_clip("tiny", seed=1))
    folders = dict(isic="isic2017", kvasir="kvasir", chest_xray="chest_xray")
    sets = {name: open_dataset(name, sample_data/"ood_medical"/folder, split="all", size=48)
            for name, folder in folders.items()}
    scores = {name: {m: transfer_scores(c, masked_batches(clips["clip"], data, 4, 6)) for m, c in clips.items()}
              for name, data in sets.items()}
    table, gains = transfer_table(scores), gain_table(scores)
    n = table[table.model == "clip"].set_index(["data", "metric"]).n
    assert n["isic"].to_dict() == dict(concentration=6) and n["chest_xray"].to_dict() == dict(concentration=1)
    assert (n["kvasir"] == 3).all() and len(n["kvasir"]) == 6
    assert table[table.metric == "concentration"]["mean"].between(.2, 1).all() and len(gains) == 8
    assert {*pooled(scores)["aft4"]} == {"concentration"} and len(pooled(scores)["aft4"]["concentration"]) == 10
