"Network dissection against the arrays of the reference programs, on the folders they were run on; damaged folders."
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_nb.data import batches
from reclip_nb.data.photos import Unreadable
from reclip_nb.dissect import BrodenFolder, make_broden, netdissect, top_quantile
from reclip_nb.dissect.network import View, mask_quantile, netdissect_all, protocol_sweep
from reclip_nb.dissect.tally import Plan, Tally, tally, upsampled

GOLDEN = Path(__file__).parent/"golden"/"dissection"
PIXELS = dict(dyadic=0, float=2)  # counts may differ by rounding if activations are not binary fractions
each = pytest.mark.parametrize("name", PIXELS)
AREAS = dict(unit_area="unit_area", area_image="unit_area_by_category_image", area_mask="unit_area_by_category_mask")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    "Arrays and the unpacked folder of each set."
    found = {}
    for name in PIXELS:
        arrays, folder = dict(np.load(GOLDEN/f"netdissect_{name}.npz")), tmp_path_factory.mktemp(name)
        for file in [k for k in arrays if k.startswith("file:")]:
            path = folder/file.removeprefix("file:")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(arrays.pop(file).tobytes())
        found[name] = arrays, folder
    return found


@pytest.fixture
def folder(golden, tmp_path):
    "A copy of a sound folder, to be damaged."
    return shutil.copytree(golden["dyadic"][1], tmp_path/"broden")


def edit(file, change):
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))


# The folder

@each
def test_folder_is_read_as_by_the_reference(golden, name):
    z, root = golden[name]
    broden = BrodenFolder(root)
    assert broden.check() == []
    assert broden.categories == z["categories"].tolist() and broden.mask_size == tuple(z["seg"])
    assert broden.labels.number.tolist() == z["label_numbers"].tolist()
    assert broden.labels.name.tolist() == z["label_names"].tolist()
    assert (broden.primary == z["primary_category"][broden.labels.number]).all()
    for k in range(8):
        item = broden[k]
        assert item["planes"].dtype == np.int32 and (item["planes"] == z[f"decoded_{k}"]).all()
        assert item["whole"].tolist() == [n for n in z[f"scalars_{k}"] if n], "0 is no label"
    assert [len(b["image"]) for b in batches(broden.images, 10)] == [10, 10, 4]


def test_category_order_and_kept_rows(golden):
    z, root = golden["dyadic"]
    subset = BrodenFolder(root, categories=["part", "object"])
    assert subset.categories == ["object", "part"] and subset.rows.tolist() == z["subset_kept"].tolist()
    train, val = (BrodenFolder(root, split=s) for s in ("train", "val"))
    assert sorted([*train.rows, *val.rows]) == list(range(24))


def test_numbers_above_255(folder):
    renumbered = lambda text: text.replace("\n8,object8", "\n300,object8").replace(",8,object8", ",300,object8")
    for file in ("label.csv", "c_object.csv"): edit(folder/file, renumbered)
    mask = next((folder/"images").rglob("*_object.png"))
    Image.fromarray(np.full((32, 32, 3), (300-256, 1, 77), np.uint8)).save(mask)
    broden = BrodenFolder(folder)
    i = next(i for i, row in enumerate(broden.index) if row["object"] and (folder/"images"/row["object"]) == mask)
    planes, _ = broden.concepts(i)
    assert (planes[1] == 300).all() and (broden.columns[planes[1]] == broden.labels.number.tolist().index(300)).all()


# Counts

@each
def test_counts(golden, name):
    z, root = golden[name]
    broden = BrodenFolder(root)
    t = tally(z["activations"], broden, z["thresholds"])
    assert (t.label_area == z["label_area"][broden.labels.number]).all()
    assert abs(t.intersections-z["intersections"][:, broden.labels.number]).max() <= PIXELS[name]
    for ours, theirs in AREAS.items(): assert abs(getattr(t, ours)-z[theirs]).max() <= PIXELS[name]


@each
def test_counts_of_a_subset(golden, name):
    z, root = golden[name]
    broden = BrodenFolder(root, categories=["object", "part"])
    t = netdissect(View(z["activations"], broden.rows), broden, thresholds=z["thresholds"]).total
    assert (t.label_area == z["subset_label_area"][broden.labels.number]).all()
    assert abs(t.intersections-z["subset_intersections"][:, broden.labels.number]).max() <= PIXELS[name]
    for ours, theirs in list(AREAS.items())[1:]:
        assert abs(getattr(t, ours)-z[f"subset_{theirs}"]).max() <= PIXELS[name]


@each
def test_iou_best_and_detectors(golden, name):
    z, root = golden[name]
    result = netdissect(z["activations"], BrodenFolder(root), thresholds=z["thresholds"], blocks=5)
    tolerance = 1e-12 if name == "dyadic" else 2e-3
    for scope, key in dict(image="image", mask="mask", none="all").items():
        r = replace(result, scope=scope)
        np.testing.assert_allclose(r.iou, z[f"iou_{key}"][:, r.labels.number], rtol=0, atol=tolerance)
        assert r.best().number.tolist() == z[f"best_label_{key}"].tolist()
        assert [r.detectors(), r.detectors(unique=True)] == z[f"detectors_{key}"].tolist()
        assert sum(r.detectors(by_category=True).values()) == r.detectors()
    assert result.best().number.tolist()[:len(z["planted"])].count(0) == 0


@each
def test_upsampling(golden, name):
    z, _ = golden[name]
    maps = upsampled(z["activations"][:3], tuple(z["seg"]))
    np.testing.assert_allclose(maps, z["upsampled_first3"], rtol=0, atol=0 if name == "dyadic" else 1e-6)


@each
def test_thresholds(golden, name):
    z, _ = golden[name]
    assert (top_quantile(z["activations"], float(z["quantile"])) == z["threshold_exact_topk"]).all()


def test_without_thresholds_the_share_is_exact(golden):
    z, root = golden["float"]
    result = netdissect(z["activations"], BrodenFolder(root), q=.01)
    assert ((z["activations"] > result.thresholds[:, None, None]).sum((0, 2, 3)) == int(.01*24*49)).all()


def test_blocks_add_up(golden):
    z, root = golden["dyadic"]
    broden = BrodenFolder(root)
    halves = [tally(z["activations"], broden, z["thresholds"], rows) for rows in (range(10), range(10, 24))]
    whole = netdissect(z["activations"], broden, thresholds=z["thresholds"], blocks=7)
    assert (sum(halves[1:], halves[0]).intersections == whole.total.intersections).all()
    assert (whole.total.area_mask == Tally.__add__(*halves).area_mask).all()
    frame = whole.summary(repeats=20).set_index("statistic")
    assert frame.value.detectors == whole.detectors()
    assert (frame.low <= frame.value).all() and (frame.value <= frame.high).all()


def test_many_plans_in_one_pass(golden, monkeypatch):
    "Every plan gives the same result as alone; every image and its activations are read once."
    class Counting(View):
        def __getitem__(self, i):
            if not isinstance(i, slice): read.append(i)
            return super().__getitem__(i)

    z, root = golden["dyadic"]
    broden, read, T = BrodenFolder(root), [], z["thresholds"]
    acts, others = Counting(z["activations"]), View(z["activations"], np.arange(24)[::-1])
    options = [dict(blocks=5), dict(order="before"), dict(upsample="bicubic", blocks=24)]
    plans = [Plan(acts, T, **o) for o in options]+[Plan(others, T+1/8)]
    alone = [netdissect(p.acts, broden, thresholds=p.thresholds, order=p.order, upsample=p.upsample, blocks=p.blocks)
             for p in plans]
    read.clear()
    concepts, seen = broden.concepts, []

    def counting(i):
        seen.append(i)
        return concepts(i)

    monkeypatch.setattr(broden, "concepts", counting)
    for one, each in zip(alone, netdissect_all(plans, broden), strict=True):
        for field, sums in vars(one.blocks).items(): np.testing.assert_array_equal(sums, getattr(each.blocks, field))
    assert seen == read == list(range(24))
    with pytest.raises(ValueError, match="thresholds must be"): netdissect_all([*plans, Plan(acts, T[1:])], broden)


def test_stored_activations(golden, tmp_path):
    "Half precision from a mapped file: thresholds belong to the stored values; tensors and arrays agree."
    z, root = golden["float"]
    np.save(tmp_path/"acts.npy", z["activations"].astype(np.float16))
    mapped, broden = np.load(tmp_path/"acts.npy", mmap_mode="r"), BrodenFolder(root)
    stored, inside = netdissect(mapped, broden), netdissect(torch.from_numpy(np.array(mapped)), broden)
    assert (stored.iou == inside.iou).all() and np.isin(stored.thresholds, np.array(mapped, np.float32)).all()


def test_order_before_counts_cells(golden):
    z, root = golden["dyadic"]
    result = netdissect(z["activations"], BrodenFolder(root), thresholds=z["thresholds"], order="before")
    hot = (z["activations"] > z["thresholds"][:, None, None]).sum((0, 2, 3))
    assert (result.total.unit_area == hot*16).all()


def test_sweep(golden):
    z, root = golden["float"]
    table = protocol_sweep(z["activations"], BrodenFolder(root))
    assert len(table) == 10 and table.detectors[0] == netdissect(z["activations"], BrodenFolder(root)).detectors()
    T = mask_quantile(z["activations"], (24, 24), .01)
    share = (upsampled(z["activations"], (24, 24)) > T[:, None, None]).mean((0, 2, 3))
    np.testing.assert_allclose(share, .01, atol=2e-4)   # corner pixels repeat the corner cell: ties


# What does not fit

def test_not_a_broden_folder(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="not an unpacked Broden folder: no index.csv.*images/"):
        BrodenFolder(tmp_path/"nowhere")
    (folder/"label.csv").unlink()
    shutil.rmtree(folder/"images")
    with pytest.raises(FileNotFoundError, match="no label.csv, images/"): BrodenFolder(folder)


def test_missing_category_table(folder):
    (folder/"c_part.csv").unlink()
    with pytest.raises(FileNotFoundError, match="c_part.csv"): BrodenFolder(folder)
    assert len(BrodenFolder(folder, categories=["color"])) == 24, "the table of an unused category may be missing"


def test_truncated_index(folder):
    edit(folder/"index.csv", lambda t: t[:len(t)*2//3].rsplit(",", 3)[0])
    with pytest.raises(ValueError, match="row .* truncated"): BrodenFolder(folder)


def test_index_cut_between_rows(folder):
    edit(folder/"index.csv", lambda t: "".join(t.splitlines(True)[:15]))
    assert any("truncated" in line for line in BrodenFolder(folder).check())


def test_empty_index(folder):
    edit(folder/"index.csv", lambda t: t.splitlines()[0])
    with pytest.raises(ValueError, match="no image"): BrodenFolder(folder)


def test_masks_of_another_size(golden, folder):
    z, _ = golden["dyadic"]
    mask = sorted((folder/"images").rglob("*_color.png"))[3]
    Image.open(mask).resize((64, 64), Image.Resampling.NEAREST).save(mask)
    broden = BrodenFolder(folder)
    with pytest.raises(ValueError, match=r"is \(64, 64\), index.csv says \(32, 32\)"):
        netdissect(z["activations"], broden)
    assert len(broden.check()) == 1


def test_unreadable_mask_and_image(folder):
    mask, image = sorted((folder/"images").rglob("*_color.png"))[3], sorted((folder/"images").rglob("*.jpg"))[5]
    for file in (mask, image): file.write_bytes(file.read_bytes()[:40])
    broden = BrodenFolder(folder)
    with pytest.raises(Unreadable, match=mask.name): broden.concepts(3)
    with pytest.raises(Unreadable, match=image.name): broden.images[5]


def test_unknown_label_number(folder):
    mask = sorted((folder/"images").rglob("*_color.png"))[3]
    Image.new("RGB", (32, 32), (200, 3, 0)).save(mask)
    with pytest.raises(ValueError, match="no number 968"): BrodenFolder(folder).concepts(3)


def test_names_stay_in_the_folder(folder):
    outside = {"syn/im0003_color.png": "../../secret_color.png", "syn/im0005.jpg": "/etc/im.jpg"}
    for name, path in outside.items(): edit(folder/"index.csv", lambda text, n=name, p=path: text.replace(n, p))
    broden = BrodenFolder(folder)
    with pytest.raises(ValueError, match="leads out"): broden.concepts(3)
    with pytest.raises(ValueError, match="leads out"): broden.images[5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite(golden, bad):
    z, root = golden["dyadic"]
    acts = z["activations"].copy()
    acts[11, 4, 2, 2] = bad
    with pytest.raises(ValueError, match="unit 4 on image 11"): netdissect(acts, BrodenFolder(root))
    with pytest.raises(ValueError, match="image 11: activations of units .4. are not finite"):
        netdissect(acts, BrodenFolder(root), thresholds=z["thresholds"])


def test_dead_units_detect_nothing(golden):
    z, root = golden["dyadic"]
    acts = z["activations"].copy()
    acts[:, 3] = 0
    result = netdissect(acts, BrodenFolder(root))
    assert result.iou[3].max() == 0 and result.total.unit_area[3] == 0 and result.detectors() > 0


def test_rows_that_do_not_match(golden):
    z, root = golden["dyadic"]
    with pytest.raises(ValueError, match="24 rows of activations for 12 images"):
        netdissect(z["activations"], BrodenFolder(root, categories=["object", "part"]), thresholds=z["thresholds"])


# The embedded world

def test_made_folder(tmp_path):
    root = make_broden(tmp_path/"broden", "smoke", 3, 30)
    assert [p.name for p in tmp_path.iterdir()] == ["broden"], "nothing else is left"
    broden = BrodenFolder(root)
    assert broden.check() == [] and broden.mask_size == (16, 16) and len(broden) == 30
    again = BrodenFolder(make_broden(tmp_path/"again", "smoke", 3, 30))
    for i in range(30):
        for key in ("image", "planes"): assert (broden[i][key] == again[i][key]).all()
    other = BrodenFolder(make_broden(tmp_path/"other", "smoke", 4, 5))
    assert not (other[0]["image"] == broden[0]["image"]).all()
