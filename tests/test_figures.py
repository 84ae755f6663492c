"Figures: labels, undefined maps, refused shapes, no side effects in matplotlib."
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reclip_nb.show import figures, gallery, tables


@pytest.fixture
def images(): return torch.rand(3, 3, 16, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks():
    m = torch.zeros(3, 16, 12, dtype=torch.bool)
    m[0, 4:9, 3:8] = True  # an object
    m[1] = True  # the whole image; the third mask stays empty
    return m


@pytest.fixture
def scores():
    rows = [("sg", "clip", "PG", .1, 90), ("sg", "aft", "PG", .3, 100), ("cam", "clip", "PG", .5, 100),
            ("cam", "aft", "PG", np.nan, 0), ("sg", "clip", "error", .2, 100), ("sg", "aft", "error", .1, 100)]
    frame = pd.DataFrame(rows, columns=["method", "model", "metric", "mean", "n"])
    return frame.assign(low=frame["mean"] - .05, high=frame["mean"] + .05)


def draw(fig):
    "Render, so that layout and artists really run."
    fig.canvas.draw()
    return fig


@pytest.mark.parametrize("overlay", [True, False])
@pytest.mark.parametrize("scale", ["map", "shared"])
def test_gallery_has_labels_and_survives_broken_maps(images, masks, overlay, scale):
    maps = {"clip": torch.rand(3, 16, 12), "aft": torch.zeros(3, 16, 12)}
    maps["clip"][1, 0, 0] = torch.nan
    fig = draw(gallery.show_maps(images, maps, prompts=["a", "b", "c"], masks=masks, overlay=overlay, scale=scale))
    *axes, bar = fig.axes
    assert [a.get_ylabel() for a in axes[::3]] == ["image", "clip", "aft"] and "heat" in bar.get_ylabel()
    assert [a.get_title() for a in axes[:3]] == ["a", "b", "c"]
    assert [t.get_text() for a in axes for t in a.texts] == ["undefined"]


def test_gallery_takes_a_tensor_with_row_names(images):
    fig = draw(gallery.show_maps(images, torch.full((1, 3, 16, 12), torch.nan), rows=["legrad"], scale="shared"))
    assert fig.axes[3].get_ylabel() == "legrad"


def test_wrong_shapes_are_refused(images, masks):
    maps = torch.rand(2, 3, 16, 12)
    with pytest.raises(ValueError, match=r"\(3, 12, 16\), the images need \(3, 16, 12\)"):
        gallery.show_maps(images, {"legrad": maps[0].mT})
    with pytest.raises(ValueError, match="masks"): gallery.show_maps(images, maps, masks=masks[:2])
    with pytest.raises(ValueError, match="1 row names for 2 rows"): gallery.show_maps(images, maps, rows=["a"])
    with pytest.raises(ValueError, match="2 prompts for 3 images"): gallery.show_maps(images, maps, prompts=["a", "b"])
    with pytest.raises(ValueError, match="'map' or 'shared'"): gallery.display_maps(maps, "image")


def test_display_maps(images):
    shown = gallery.display_maps(torch.stack([images[:, 0], 3*images[:, 0] + 2]))
    np.testing.assert_allclose(shown[0], shown[1], atol=1e-6) # own range: affine changes vanish
    assert shown.min() == 0 and shown.max() == 1
    shared = gallery.display_maps(torch.stack([images[:, 0], 3*images[:, 0] + 2]), "shared")
    assert shared[0].max() < shared[1].min()


def test_scenes(images, masks):
    items = [dict(image=i, mask=m, label=k) for k, (i, m) in enumerate(zip(images, masks))]
    items[0]["caption"] = "a caption"
    fig = draw(gallery.show_scenes([*items, dict(image=images[0])], classes=["x", "y", "z"], columns=3))
    assert [a.get_xlabel() for a in fig.axes] == ["a caption", "y", "z", "", "", ""]


def test_history():
    rows = [dict(step=i, loss=1/(i + 1), name="run") | (dict(epg=.5) if i % 2 else {}) for i in range(6)]
    fig = draw(figures.plot_history(rows))
    assert [(a.get_xlabel(), a.get_ylabel()) for a in fig.axes] == [("step", "loss"), ("step", "epg")]
    assert len(fig.axes[1].lines[0].get_xdata()) == 3
    many = draw(figures.plot_history({f"run {i}": rows for i in range(9)}, ["loss"]))
    assert len(many.axes[0].lines) == len(many.legends[0].get_texts()) == 9
    with pytest.raises(ValueError, match="no 'epoch'"): figures.plot_history(rows, x="epoch")


def test_sweep():
    frame = pd.DataFrame(dict(w=[0, .5], pg=[.1, .2], pg_low=[.05, .1], pg_high=[.2, .4], acc=[.9, .8]))
    fig = draw(figures.plot_sweep(frame, "w", {"maps": ["pg"], "accuracy": ["acc"]}, labels=dict(pg="PG"),
                                  reference=frame[["w", "pg"]]))
    assert [(a.get_xlabel(), a.get_ylabel()) for a in fig.axes] == [("w", "maps"), ("w", "accuracy")]
    assert [[t.get_text() for t in a.get_legend().get_texts()] for a in fig.axes] == [["PG", "published"], ["acc"]]
    bars = fig.axes[0].containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bars, [[[0, .05], [0, .2]], [[.5, .1], [.5, .4]]])
    with pytest.raises(ValueError, match=r"no column \['iou'\]"): figures.plot_sweep(frame, "w", ["iou"])


def test_metric_table(scores):
    data = tables.metric_table(scores, ["method", "model"], higher=dict(error=False)).data
    assert data.loc[("sg", "clip")].tolist() == ["10.0 [5.0, 15.0] n=90", "20.0 [15.0, 25.0]"]
    assert data.loc[("cam", "clip"), "PG"] == "<b>50.0</b> [45.0, 55.0]"
    assert data.loc[("sg", "aft")].tolist() == ["30.0 [25.0, 35.0]", "<b>10.0</b> [5.0, 15.0]"]
    assert data.loc[("cam", "aft")].tolist() == ["–", "–"]
    grouped = tables.metric_table(scores, ["method", "model"], within=["method"]).data
    assert grouped.loc[("sg", "aft"), "PG"].startswith("<b>30.0</b>") and "<b>" in grouped.loc[("cam", "clip"), "PG"]
    html = tables.metric_table(scores, ["method", "model"]).to_html()
    assert "<b>50.0</b>" in html and html == tables.metric_table(scores, ["method", "model"]).to_html()
    with pytest.raises(ValueError, match=r"no column \['high'\]"): tables.metric_table(scores.drop(columns="high"))


def test_metric_markdown(scores):
    text = tables.metric_markdown(scores[scores.method == "sg"], digits=2, percent=False)
    assert text.splitlines()[:3] == ["| model | PG | error |", "| --- | --- | --- |",
                                     "| clip | 0.10 [0.05, 0.15] n=90 | **0.20** [0.15, 0.25] |"]


def test_nothing_is_left_in_matplotlib(images):
    before = dict(matplotlib.rcParams)
    gallery.show_maps(images, images[None, :, 0])
    figures.plot_history([dict(step=0, loss=1.)])
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before
