"LeGrad's benchmarks: stored reference results, identities, undefined cases, and damaged files."
import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import golden
from scipy.stats import spearmanr

from reclip_nb.benchmarks import funnybirds as F
from reclip_nb.benchmarks import layers as L
from reclip_nb.benchmarks import perturbation as P
from reclip_nb.benchmarks import pointwise as W
from reclip_nb.benchmarks.fills import linear_fill
from reclip_nb.benchmarks.subjects import Subject, named_model, open_subject
from reclip_nb.evaluations import text_classifier
from reclip_nb.models import Clip, load_classifier, load_clip
from reclip_nb.worlds import ShapesDataset, prompts, write_funnybirds
from reclip_nb.worlds.birds import PART_COLOURS

FOLDER = Path(__file__).parent/"golden"/"explainers"
BIRDS = json.loads((FOLDER/"funnybirds.json").read_text())


@pytest.fixture(scope="module")
def zero_shot():
    "An untrained zero-shot model of the shapes world, 32 pixels."
    clip = load_clip("tiny-smoke", seed=0)
    return Subject("clip", clip, text_classifier(clip, prompts()))


@pytest.fixture(scope="module")
def scenes():
    "Images (48,3,32,32) and labels (48,), two of each class."
    data = ShapesDataset("smoke", "val", kind="zero_shot")
    return data.tensors(slice(0, 48))[0], data.labels[:48]


def rng(): return torch.Generator().manual_seed(0)


# ---- perturbation -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reference():
    "Stored arrays, and the tower they were made with as logits of pixels."
    z, tower = golden("explainers", "perturbation.npz"), golden("explainers", "clip_cls.npz")
    cfg = dict(image_size=32, patch_size=8, width=64, layers=3, head_width=16)
    model = open_clip.CLIP(32, cfg, dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1))
    model.visual.load_state_dict({k[2:]: v for k, v in tower.items() if k.startswith("w.")})
    clip = Clip(model.eval(), "golden", open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return z, Subject("golden", clip, z["classifier"])


@pytest.mark.parametrize("sign, order", [("pos", "morf"), ("neg", "lerf")])
def test_perturbation_reference(reference, sign, order):
    z, subject = reference
    logits = P.perturbed_logits(subject, z["rgb"], z["maps"], order)
    torch.testing.assert_close(logits, z[f"e.{sign}.logits"], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits[0], z["logits0"], atol=2e-4, rtol=1e-4)
    prob = logits.softmax(-1).gather(-1, z["target"].expand(10, -1)[..., None])[..., 0]
    torch.testing.assert_close(prob, z[f"e.{sign}.prob_target"], atol=1e-4, rtol=1e-3)
    meter = P.Perturbation(order)
    meter.update(subject, z["rgb"], z["maps"], z["target"])
    out = meter.compute()
    np.testing.assert_allclose(out["curve"], z[f"e.{sign}.acc"], atol=1e-6)
    assert out["value"] == pytest.approx(z[f"e.{sign}.auc"].item(), abs=1e-5)
    assert (out["n"], out["undefined"], out["ties"]) == (6, 0, 0)
    mean = P.perturbed_logits(subject, z["rgb"], z["maps"], order, fill="mean", mean=subject.model.mean)
    torch.testing.assert_close(mean, z[f"e.{sign}.fillmean.logits"], atol=2e-4, rtol=1e-4)


def test_random_maps_lose_as_fast_in_both_orders(zero_shot, scenes):
    x, _ = scenes
    predicted = zero_shot(x).argmax(-1)  # used as labels: the accuracy starts at 100 %
    auc = {}
    for order in ("morf", "lerf"):
        meter = P.Perturbation(order)
        for k in range(0, 48, 16):
            maps = torch.rand(16, 32, 32, generator=rng().manual_seed(k))
            meter.update(zero_shot, x[k:k+16], maps, predicted[k:k+16])
        auc[order] = meter.compute()
    assert auc["morf"]["curve"][0] == 1 and abs(auc["morf"]["value"]-auc["lerf"]["value"]) < 12
    assert auc["morf"]["low"] < auc["lerf"]["high"] and auc["lerf"]["low"] < auc["morf"]["high"]


@pytest.mark.parametrize("fill", ["zero_rgb", "mean"])
def test_removing_everything_leaves_one_answer(zero_shot, scenes, fill):
    "All images become one image: accuracy is the share of whichever class that is."
    meter = P.Perturbation("morf", fill, (0, 1), zero_shot.model.mean)
    meter.update(zero_shot, scenes[0], torch.rand(48, 32, 32, generator=rng()), scenes[1])
    assert meter.compute()["curve"][1] == pytest.approx(1/24)


@pytest.mark.parametrize("fill", P.PERTURBATION_FILLS)
def test_fills(scenes, fill):
    x, maps = scenes[0][:2], torch.rand(2, 32, 32, generator=rng())
    masks = P.removal_masks(maps, "morf", (0, .5, .9))
    out = P.remove(x, masks, fill, torch.full((1, 3, 1, 1), .5), rng())
    kept = ~masks[:, :, None].expand_as(out)
    assert out.shape == (3, 2, 3, 32, 32) and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out[kept], x.expand_as(out)[kept]) and not torch.equal(out[1], out[2])
    assert torch.equal(out, P.remove(x, masks, fill, torch.full((1, 3, 1, 1), .5), rng())), "seeded"


def test_unknown_order_and_fill():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="'morf' or 'lerf'"): P.removal_masks(x[:, 0], "best")
    with pytest.raises(ValueError, match="choose one of"): P.remove(x, x[None, :, 0] > 0, "white")
    with pytest.raises(ValueError, match="mean colour"): P.remove(x, x[None, :, 0] > 0, "mean")


def test_linear_fill_is_the_sparse_system(scenes):
    "Conjugate gradients against a dense solve of the same equations."
    x, gone = scenes[0][:1, :, :7, :8].double(), torch.rand(1, 7, 8, generator=rng()) < .7
    w, n = {1: 1/6, 2: 1/12}, 56
    a = np.zeros((n, n))
    for p in range(n):
        for q in range(n):
            d = np.array(divmod(p, 8))-np.array(divmod(q, 8))
            if p != q and abs(d).max() == 1:
                weight = w[int(abs(d).sum())]
                a[p, p] += weight
                a[p, q] -= weight
    m = gone.flatten().numpy()
    for c in range(3):
        v = x[0, c].flatten().numpy().copy()
        v[m] = np.linalg.solve(a[np.ix_(m, m)], -a[np.ix_(m, ~m)] @ v[~m])
        np.testing.assert_allclose(linear_fill(x, gone, 1e-12)[0, c].flatten(), v, atol=1e-9)
    with pytest.raises(ValueError, match="1 images have no pixel left"): linear_fill(x, gone | True)


def test_ties_and_undefined_maps_are_counted(zero_shot, scenes):
    x, y = scenes[0][:4], scenes[1][:4]
    maps = torch.rand(4, 32, 32, generator=rng())
    maps[1], maps[2, 0, 0] = 0., torch.nan
    meter = P.Perturbation()
    meter.update(zero_shot, x, maps, y)
    out = meter.compute()
    assert (out["n"], out["undefined"]) == (3, 1) and out["ties"] == 1 and math.isfinite(out["value"])
    assert math.isnan(P.Perturbation().compute()["value"])


def test_class_agnostic_methods_have_equal_columns(zero_shot, scenes):
    methods = {k: (k, {}) for k in ("random", "center", "gradcam")}
    meters = P.perturbation(zero_shot, [(scenes[0][:12], scenes[1][:12])], methods, fractions=(0, .4))
    auc = {k: m.compute()["value"] for k, m in meters.items()}
    for method in ("random", "center"):
        for sign in ("negative", "positive"): assert auc[method, f"{sign}_predicted"] == auc[method, f"{sign}_target"]


def test_a_classifier_explains_its_own_logits(scenes):
    net = load_classifier(classes=24, image_size=32, seed=0)
    subject, x = Subject("vit", net), scenes[0][:2].requires_grad_()
    classes = torch.tensor([[3], [5]])
    maps = subject.maps(x.detach(), classes, {"sg": ("simple_gradient", {})}, normalize="none")["sg"][:, 0]
    net(x)[[0, 1], [3, 5]].sum().backward()
    torch.testing.assert_close(maps, x.grad.abs().sum(1), atol=1e-6, rtol=1e-4)
    x.requires_grad_(False)


def test_subjects_are_refused_where_classes_differ(tmp_path):
    from reclip_nb.models import save_classifier
    save_classifier(load_classifier(classes=5, image_size=32), tmp_path/"c.safetensors")
    with pytest.raises(ValueError, match="5 classes, the data set 24"):
        open_subject("", f"tiny-vit@{tmp_path}/c.safetensors", prompts())
    with pytest.raises(ValueError, match="no model 'vit_bose"): named_model("", "vit_bose_patch16@timm")


# ---- points -------------------------------------------------------------------------------------------

@pytest.fixture
def point_files(tmp_path): return W.write_points(tmp_path, "smoke", images=12)


def table(folder): return folder/"oidv7-val-annotations-point-labels.csv"


def test_points_of_masks_score_one(point_files):
    "A map that is the mask has p-mIoU 1; everything positive has the share of yes."
    data, scenes = W.PointPhotos(point_files, 32), ShapesDataset("smoke", "val", 0)
    score = W.PointwiseMIoU()
    for i in range(len(data)):
        for k, points in data.points(i).items():
            masks = [m for s, m in scenes.objects(i) if f"{s.colour} {s.pattern} shape" == data.classes[k]]
            mask = torch.stack(masks).any(0)
            score.update(mask[None].float(), [points], [k])
    assert score.compute()["value"] == 1 and .3 < W.everything(data, range(len(data))) < .6


@pytest.mark.parametrize("edit, message", [
    (lambda t: "", "is empty"), (lambda t: t.split("\n")[0], "no rows"), (lambda t: t[:-40], "line .* incomplete rows"),
    (lambda t: t.replace("Label,", "Klass,", 1), r"no column \['Label'\]"),
    (lambda t: t.replace(",yes,", ",perhaps,", 1), "answer 'perhaps'"),
    (lambda t: t.replace(",0.", ",-0.", 1), "not in"), (lambda t: t.replace(",yes,", ",no,"), "no 'yes' among")])
def test_damaged_points(point_files, edit, message):
    table(point_files).write_text(edit(table(point_files).read_text()))
    with pytest.raises(ValueError, match=message): W.PointPhotos(point_files, 32)


def test_missing_point_files(point_files):
    (point_files/"oidv7-class-descriptions.csv").unlink()
    assert W.PointPhotos(point_files, 32).classes, "the points' own TextLabel names the classes"
    lines = [line.rsplit(",", 1)[0]+"," for line in table(point_files).read_text().splitlines()]
    table(point_files).write_text("\n".join([lines[0]+"TextLabel", *lines[1:]]))
    with pytest.raises(ValueError, match="labels without a name"): W.PointPhotos(point_files, 32)
    table(point_files).unlink()
    with pytest.raises(FileNotFoundError, match="point labels"): W.PointPhotos(point_files, 32)


def test_missing_photograph(point_files, zero_shot):
    "It is left out and listed, or raises an error on request; the other photographs are scored."
    data, methods = W.PointPhotos(point_files, 32), {"center": ("center", {})}
    (point_files/"validation"/data.names[2]).unlink()
    weights = text_classifier(zero_shot.model, [[f"a photo of a {c}"] for c in data.classes])
    subject = Subject("clip", zero_shot.model, weights)
    with pytest.warns(UserWarning, match="left out"): scores = W.pointwise(subject, data, methods, batch_size=5)
    assert list(data.skipped) == [data.names[2]] and scores["center"].compute()["n"] > 5
    with pytest.raises(OSError, match="repair it"):
        W.pointwise(subject, W.PointPhotos(point_files, 32, on_error="raise"), methods)


# ---- FunnyBirds ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def observed():
    "The stored birds as `Observation`s, with their attributions (n,C,H,W)."
    parts, colour = BIRDS["parts"], list(BIRDS["part_colors"])
    assert all(tuple(v) == PART_COLOURS[k] for k, v in BIRDS["part_colors"].items())
    seen = []
    columns = [BIRDS[k] for k in ("class_idx", "label_map", "logits_removed", "logits_background_removed")]
    for label, marks, removed, background in zip(*columns, strict=True):
        marks = np.array(marks)
        rgb = np.zeros((*marks.shape, 3), np.uint8)
        for k, name in enumerate(colour): rgb[marks == k+1] = PART_COLOURS[name]
        for k in range(BIRDS["n_background"]): rgb[marks == 100+k] = (204, 204, 204+k)
        names = ["+".join(p for b, p in enumerate(parts) if gone >> b & 1) or "none" for gone in range(32)]
        seen.append(F.Observation(label, torch.tensor([removed[n] for n in names], dtype=torch.float64),
                                  torch.tensor(background, dtype=torch.float64),
                                  F.part_regions(rgb, parts, BIRDS["n_background"]),
                                  F.minimal_sufficient_sets(BIRDS["classes"], label, parts),
                                  F.target_pair(BIRDS["classes"], label, parts)))
    return seen, torch.from_numpy(np.load(FOLDER/"funnybirds_attr.npz")["attribution"])


def test_part_importance_reference(observed):
    for seen, maps, want in zip(*observed, BIRDS["expected"]["part_importance_of_true_class"]):
        importance = F.part_importance(maps[seen.label][None], seen.regions)[0]
        np.testing.assert_allclose(importance[:5], [want[p] for p in BIRDS["parts"]], rtol=1e-5)


def test_minimal_sufficient_sets_reference():
    "The published loop finds none for the last class of the list, so its birds score 0 there."
    sets = BIRDS["expected"]["minimal_sufficient_sets"]
    assert sets.pop("6") == [] and F.minimal_sufficient_sets(BIRDS["classes"], 6, BIRDS["parts"]) == [{0}, {3}, {4}]
    for label, want in sets.items():
        look, parts = BIRDS["classes"][int(label)]["parts"], BIRDS["parts"]
        minimal = F.minimal_sufficient_sets(BIRDS["classes"], int(label), parts)
        named = [{f"{parts[p]}_{look[parts[p]]}" for p in subset} for subset in minimal]
        assert sorted(map(sorted, named)) == sorted(map(sorted, want))


def test_co12_reference(observed):
    want = BIRDS["expected"]
    scores = [F.bird_scores(seen, maps[seen.asked]) for seen, maps in zip(*observed)]
    for name, key in (("csdc", "csdc"), ("pc", "pc"), ("dc", "dc"), ("d", "distractibility")):
        np.testing.assert_allclose(np.nanmean([s[name] for s in scores], 0), want[key], atol=1e-8)
    rows = F.co12(scores).set_index("metric")
    for name in F.CO12_SCORES[:5]: assert rows["mean"][name] == pytest.approx(want["final"][name.upper()], abs=1e-8)
    assert rows.threshold.iloc[0] == pytest.approx(want["best_threshold"])
    assert F.background_independence(observed[0]) == pytest.approx(want["background_independence"])


def test_target_sensitivity_reference(observed):
    "If no two classes qualify, the published loop uses the last pair that it tried; our score is undefined there."
    scores = []
    for seen, maps in zip(*observed, strict=True):
        look = BIRDS["classes"][seen.label]["parts"]
        shared = {k: [p for p, part in enumerate(BIRDS["parts"]) if c["parts"][part] == look[part]]
                  for k, c in enumerate(BIRDS["classes"])}
        pair = seen.pair or tuple([(k, parts) for k, parts in shared.items() if len(parts) == 2][-2:])
        importance = F.part_importance(maps[[pair[0][0], pair[1][0]]], seen.regions)[:, :5]
        scores.append(F.target_sensitivity(seen.logits, importance, pair))
    assert [s.pair is None for s in observed[0]] == [False, False, True, True, False]
    assert np.nanmean(scores) == BIRDS["expected"]["target_sensitivity"]
    assert np.isnan(scores).tolist() == [True, True, False, True, True]


def test_with_a_negative_total_zero_importance_is_not_important(observed):
    "The published rule would call every part important whose importance is 0."
    seen, maps = observed[0][0], -observed[1][0]
    scores = F.bird_scores(seen, maps[seen.asked])
    assert (scores["d"] == 1).all() and (scores["dc"] == 0).all() and np.isfinite(scores["sd"])
    zero = F.bird_scores(seen, torch.zeros_like(maps[seen.asked]))
    assert (zero["csdc"] == 0).all() and np.isnan(zero["sd"])


def test_no_class_pair_is_undefined(observed):
    seen, maps = observed[0][0], observed[1][0]
    alone = F.Observation(seen.label, seen.logits, seen.background, seen.regions, seen.sets, None)
    assert alone.asked[2:] == [seen.label]*2 and np.isnan(F.bird_scores(alone, maps[alone.asked])["ts"])
    assert F.co12([F.bird_scores(alone, maps[alone.asked])]).set_index("metric").undefined["ts"] == 1


def test_nothing_divides_by_zero(observed):
    "A wrong prediction, no irrelevant part, no background, a map that is not finite."
    seen, maps = observed[0][0], observed[1][0]
    other = (seen.label+1) % 7
    wrong = F.Observation(other, seen.logits, seen.background[:0], seen.regions[:5], seen.sets, seen.pair)
    scores = F.bird_scores(wrong, maps[wrong.asked])
    assert np.isnan(scores["csdc"]).all() and np.isfinite(scores["pc"]).all()
    broken = F.bird_scores(wrong, torch.full_like(maps[wrong.asked], torch.nan))
    assert all(np.isnan(v).all() for v in broken.values())
    rows = F.co12([broken]).set_index("metric")
    assert rows["mean"].isna().all() and rows.undefined["pc"] == 1
    assert np.isnan(F.background_independence([wrong]))


def test_single_deletion_is_spearman():
    a, b = torch.rand(5, generator=rng()), torch.tensor([1., 1., 0., 3., 2.])
    assert F.single_deletion(a, b) == pytest.approx(.5+.5*spearmanr(a, b).statistic)


def test_damaged_birds(tmp_path):
    folder = write_funnybirds(tmp_path, "smoke", rows=[0])
    (folder/"test_interventions/0/000000/body_beak.png").unlink()
    with pytest.raises(OSError, match="body_beak.png"): F.FunnyBirds(folder).interventions(0)
    (folder/"dataset_test.json").write_text("[{")
    with pytest.raises(ValueError, match="damaged"): F.FunnyBirds(folder)
    (folder/"dataset_test.json").unlink()
    with pytest.raises(FileNotFoundError, match="dataset_test.json"): F.FunnyBirds(folder)


def test_class_pairs_of_the_embedded_birds(tmp_path):
    "Most classes have a pair, and every class its own sufficient sets."
    birds = F.FunnyBirds(write_funnybirds(tmp_path, "smoke", rows=[0]))
    assert sum(F.target_pair(birds.combinations, k, birds.parts) is not None for k in range(20)) > 12
    for k in range(20):
        for s in F.minimal_sufficient_sets(birds.combinations, k, birds.parts):
            look = {birds.parts[p]: birds.combinations[k]["parts"][birds.parts[p]] for p in s}
            assert [c["class_idx"] for c in birds.combinations if look.items() <= c["parts"].items()] == [k]


# ---- layers -------------------------------------------------------------------------------------------

def test_layer_shares_reference():
    "From the stored per-layer grids of LeGrad (class-token readout)."
    z = golden("explainers", "clip_cls.npz")
    maps, mean = z["e.legrad.cls.layers"], z["e.legrad.cls.layers"].mean((-2, -1)).double()
    torch.testing.assert_close(L.layer_shares(maps), mean/mean.sum(0), atol=1e-6, rtol=0)
    assert L.layer_shares(torch.zeros_like(maps)).isnan().all()


def test_layer_distribution_counts_every_class_of_an_image(zero_shot):
    class Two(torch.utils.data.Dataset):
        "Three images; the first holds two classes."
        x, classes = torch.rand(3, 3, 32, 32, generator=rng()), ["a", "b"]
        def __len__(self): return 3
        def __getitem__(self, i): return dict(image=self.x[i], index=i)
        def present(self, i): return [[0, 1], [1], [1]][i]
    shares = L.gradient_distribution(zero_shot, Two(), batch_size=2)
    assert {k: v.shape for k, v in shares.items()} == {0: (1, 2), 1: (3, 2)}
    alone = L.gradient_distribution(zero_shot, Two(), batch_size=1)
    for k in shares: np.testing.assert_allclose(shares[k], alone[k], atol=1e-6)
    table = L.layer_table(shares, Two.classes)
    assert table[table["class"] == "all"]["mean"].sum() == pytest.approx(1)
