"Recall compared with its definition, for all tie rules and tile sizes; invalid inputs; attacks on the gallery."
import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import golden
from PIL import Image

from reclip_nb.attacks import pgd
from reclip_nb.data import open_dataset
from reclip_nb.evaluations import recall_at_k, retrieval_ranks
from reclip_nb.evaluations.retrieval import (
    TIES,
    captions_of_images,
    chance_at_k,
    embedding_attack,
    encode_texts,
    gallery_batches,
    gallery_embeddings,
    gallery_texts,
    margin,
    margin_attack,
    paraphrases,
)
from reclip_nb.models import load_clip
from reclip_nb.worlds import WORLDS, ShapesDataset
from reclip_nb.worlds.shapes import COLOURS


@pytest.fixture(scope="module")
def arrays(): return golden("robust", "recall.npz")


def case(arrays, name):
    "Embeddings of a golden case; given scores become caption embeddings, with the identity as image embeddings."
    scores, cap2img = arrays.get(f"{name}_scores"), arrays[f"{name}_cap2img"]
    if scores is None: return arrays[f"{name}_img"], arrays[f"{name}_txt"], cap2img
    return torch.eye(scores.shape[1], dtype=scores.dtype), scores, cap2img


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("name", "abcde")
def test_golden_ranks(arrays, name, block):
    for side, ranks in retrieval_ranks(*case(arrays, name), block).items():
        for rule in TIES: assert torch.equal(ranks[rule], arrays[f"{name}_{side}_rank_{rule}"]), (side, rule)


@pytest.mark.filterwarnings("ignore:equal scores")
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", "abcde")
def test_golden_recall(arrays, name, ties):
    table = recall_at_k(*case(arrays, name), ks=(1, 5, 10), ties=ties)
    keys = {m: f"{name}_{m.replace('_r', '_R')}" for m in table.index}
    golden_keys = {m: key for m, key in keys.items() if f"{key}_{ties}" in arrays}
    assert len(golden_keys) >= 2
    for m, key in golden_keys.items():
        assert table.loc[m, "mean"] == arrays[f"{key}_{ties}"].item()
        gap = arrays[f"{key}_optimistic"]-arrays[f"{key}_pessimistic"]
        assert table.loc[m, "tied"] == round(gap.item()*table.loc[m, "n"])


def oracle(img, txt, cap2img, rule):
    "Ranks by the definition, one query and one correct answer at a time."
    def rank(scores, right):
        others = torch.tensor([j for j in range(len(scores)) if j not in right], dtype=torch.long)
        def of(p):
            equal = others[scores[others] == scores[p]]
            extra = dict(optimistic=0, index=int((equal < p).sum()), pessimistic=len(equal))[rule]
            return 1+int((scores[others] > scores[p]).sum())+extra
        return min(map(of, right))
    scores = txt @ img.T
    return dict(t2i=[rank(scores[t], [int(cap2img[t])]) for t in range(len(txt))],
                i2t=[rank(scores[:, i], (cap2img == i).nonzero()[:, 0].tolist()) for i in range(len(img))])


@pytest.mark.parametrize("seed", range(6))
def test_definition_with_many_ties(seed):
    "Small integers: exact products, a third of all scores tied; captions in any order, one to five per image."
    rng = np.random.default_rng(seed)
    cap2img = torch.from_numpy(rng.permutation(np.repeat(np.arange(9), rng.integers(1, 6, 9))))
    img, txt = (torch.from_numpy(rng.integers(-2, 3, (n, 3))).double() for n in (9, len(cap2img)))
    for rule in TIES:
        for side, expected in oracle(img, txt, cap2img, rule).items():
            for block in (1, 2, 4, 100):
                assert retrieval_ranks(img, txt, cap2img, block)[side][rule].tolist() == expected


def test_ties_order_the_recalls_and_give_a_warning():
    img, txt, cap2img = torch.ones(10, 4), torch.ones(50, 4), torch.arange(50) // 5
    with pytest.warns(UserWarning, match="equal scores decide .*'t2i_r1': 50"):
        means = [recall_at_k(img, txt, cap2img, ties=t)["mean"] for t in TIES]
    assert (means[0] == 1).all() and (means[2] == 0).all() and means[1]["t2i_r1"] == .1


def test_no_warning_without_ties(recwarn):
    img, txt, cap2img = torch.eye(6), torch.eye(6).repeat_interleave(2, 0), torch.arange(12) // 2
    assert (recall_at_k(img, txt, cap2img)["mean"] == 1).all() and not recwarn


def test_half_precision_is_not_converted():
    "Half-precision embeddings have many tied scores, which are counted."
    gen = torch.Generator().manual_seed(0)
    img, txt = torch.randn(300, 8, generator=gen).bfloat16(), torch.randn(600, 8, generator=gen).bfloat16()
    with pytest.warns(UserWarning, match="equal scores"): recall_at_k(img, txt, torch.arange(600) // 2)


@pytest.mark.parametrize("change, words", [
    (lambda i, t, c: (i, t, c.where(c != 2, 7)), "captions 4, 5 point to no image: .* from 0 to 5"),
    (lambda i, t, c: (i, t, c-1), "captions 0, 1 point to no image"),
    (lambda i, t, c: (i, t, c.where(c != 2, 1)), "images 2 have no caption"),
    (lambda i, t, c: (i, t, c.double()), "must contain integers"),
    (lambda i, t, c: (i.index_fill(0, torch.tensor([3]), torch.nan), t, c), "embeddings of images 3 are not finite"),
    (lambda i, t, c: (i, t.index_fill(0, torch.tensor([5, 8]), torch.inf), c), "captions 5, 8 are not finite"),
    (lambda i, t, c: (i[:0], t, c), "0 images"), (lambda i, t, c: (i, t[:0], c[:0]), "0 captions"),
    (lambda i, t, c: (i, t, c[1:]), "expected"), (lambda i, t, c: (i, t[:, 1:], c), "expected"),
    (lambda i, t, c: (i[0], t, c), "expected")])
def test_invalid_galleries_raise(change, words):
    gallery = change(torch.randn(6, 4), torch.randn(12, 4), torch.arange(12) // 2)
    with pytest.raises(ValueError, match=words): recall_at_k(*gallery)


def test_unknown_tie_rule():
    with pytest.raises(ValueError, match="allowed: optimistic, index, pessimistic"):
        recall_at_k(torch.eye(2), torch.eye(2), [0, 1], ties="topk")


def test_chance_is_the_mean_over_orders():
    "Two correct answers in a gallery of five, k = 3: 1 - (3 2 1)/(5 4 3)."
    assert chance_at_k(torch.tensor([2]), 5, 3) == pytest.approx(1-6/60)
    assert chance_at_k(torch.ones(3), 4, 9) == 1
    assert chance_at_k(torch.tensor([1]), 31_783, 1) == pytest.approx(1/31_783)


def test_part_of_a_gallery():
    txt, cap2img = torch.arange(10.)[:, None], torch.tensor([3, 0, 1, 2, 3, 0, 1, 2, 2, 3])
    selected, places = captions_of_images(txt, cap2img, torch.tensor([2, 0]))
    assert selected[:, 0].tolist() == [1, 3, 5, 7, 8] and places.tolist() == [1, 0, 1, 0, 0]


# The gallery of the embedded world

@pytest.fixture(scope="module")
def world():
    "A data set, a model, the rows of the gallery, its caption embeddings and the image of each caption."
    data, clip = ShapesDataset("smoke", "val"), load_clip("tiny-smoke", seed=0)
    rows, texts, cap2img = gallery_texts(data, 20)
    return data, clip, rows, encode_texts(clip, texts, batch=7), cap2img


def test_every_caption_of_the_world_names_one_image():
    data = ShapesDataset(WORLDS["smoke"], "val")
    rows, texts, cap2img = gallery_texts(data)
    assert len(set(texts)) == len(texts)
    assert len(data.content_ids(rows).unique()) == len(rows) == len(data.content.unique())
    first = [texts[(cap2img == n).nonzero()[0, 0]] for n in range(len(rows))]
    assert all(data.captions[i].split(" of ")[1] in text for i, text in zip(rows, first))
    twins = next(s for s in data.shapes if len(s) == 2 and s[0].label == s[1].label)
    assert len(paraphrases(twins)) == 3, "two objects of the same kind have only one order"


def test_photographs_without_captions(tmp_path):
    for label in "ab":
        (tmp_path/"val"/label).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path/"val"/label/"0.jpg")
    with pytest.raises(ValueError, match="no captions: choose flickr30k"):
        gallery_texts(open_dataset("imagefolder", tmp_path, size=16))


def flickr(folder, n=6):
    "A folder like Flickr30k with n small images, the last one damaged, two of them in Karpathy's test split."
    (folder/"images").mkdir()
    for k in range(n): Image.new("RGB", (24, 20), (40*k, 90, 200)).save(folder/"images"/f"{k}.jpg")
    (folder/"images"/f"{n-1}.jpg").write_bytes(b"not a photograph")
    lines = [f"{k}.jpg#{c}\t{'a '*c}photo of a {list(COLOURS)[k]} shape\n" for k in range(n) for c in range(5)]
    (folder/"results_20130124.token").write_text("".join(lines))
    images = [dict(filename=f"{k}.jpg", split="test" if k in (1, 3) else "train", sentences=[dict(raw="x")]*5)
              for k in range(n)]
    (folder/"dataset_flickr30k.json").write_text(json.dumps(dict(images=images)))


@pytest.mark.filterwarnings("ignore:left out")
def test_an_unreadable_photograph_is_left_out_with_its_captions(tmp_path):
    flickr(tmp_path)
    data = open_dataset("flickr30k", tmp_path, split="all", size=16)
    rows, texts, cap2img = gallery_texts(data)
    assert len(rows) == 6 and len(texts) == 30 and cap2img.tolist() == [k for k in range(6) for _ in range(5)]
    places = torch.cat([own for _, own in gallery_batches(data, rows, 4)])
    txt, readable = captions_of_images(torch.arange(30.)[:, None], cap2img, places)
    assert places.tolist() == [0, 1, 2, 3, 4] and txt[:, 0].tolist() == list(range(25)) and readable.max() == 4


def attacks(txt, cap2img):
    return [partial(embedding_attack, steps=5), partial(margin_attack, txt=txt, cap2img=cap2img, steps=5)]


@pytest.mark.parametrize("which", [0, 1])
def test_attacks_stay_in_the_ball_and_increase_their_loss(world, which):
    data, clip, rows, txt, cap2img = world
    x, own = data.tensors(rows)[0], torch.arange(len(rows))
    with torch.no_grad(): clean = clip.encode_image(x)
    distance = lambda v: (clip.encode_image(v)-clean).square().sum(-1)
    loss = [distance, lambda v: margin(clip.encode_image(v) @ txt.T, cap2img, own)][which]
    adv = [attacks(txt, cap2img)[which](clip, x, own, e/255) for e in (2, 4)]
    for a, e in zip(adv, (2, 4)): assert (a-x).abs().max() <= e/255+1e-6 and a.min() >= 0 and a.max() <= 1
    with torch.no_grad(): before, small, large = loss(x), loss(adv[0]), loss(adv[1])
    assert (small > before).all() and large.mean() > small.mean()


def test_margin_is_positive_exactly_where_image_to_text_fails(world):
    data, clip, rows, txt, cap2img = world
    own = torch.arange(len(rows))
    with torch.no_grad(): img = clip.encode_image(data.tensors(rows)[0])
    missed = retrieval_ranks(img, txt, cap2img)["i2t"]["optimistic"] > 1
    assert torch.equal(margin(img @ txt.T, cap2img, own) > 0, missed) and missed.any()


def test_attack_does_not_depend_on_the_batch(world):
    data, clip, rows, txt, cap2img = world
    by_name = {(str(n),): partial(a, eps=4/255) for n, a in enumerate(attacks(txt, cap2img))}
    by_name["clean",] = lambda clip, x, own: x
    (places, large_batch), (_, small_batches) = (
        gallery_embeddings({"m": clip}, gallery_batches(data, rows, size), by_name) for size in (20, 7))
    for key, e in large_batch.items(): torch.testing.assert_close(e, small_batches[key], atol=2e-3, rtol=0)
    assert places.tolist() == list(range(20)) and not torch.equal(large_batch["m", "0"], large_batch["m", "clean"])


def test_an_attack_from_the_clean_image_returns_it(world):
    "The gradient of the distance to the clean embedding is zero there, so [Re] Eq. 2 as written has no effect."
    data, clip, rows, *_ = world
    x = data.tensors(rows[:4])[0]
    with torch.no_grad(): clean = clip.encode_image(x)
    distance = lambda v: (clip.encode_image(v)-clean).square().sum(-1)
    assert not pgd(distance, x, 4/255, steps=10, start="zero").any()
    assert pgd(distance, x, 4/255, steps=2, generator=torch.Generator().manual_seed(0)).any()


def test_wrong_budget_raises(world):
    data, clip, rows, txt, cap2img = world
    x = data.tensors(rows[:2])[0]
    for attack in attacks(txt, cap2img):
        with pytest.raises(ValueError, match="did you mean 4/255"): attack(clip, x, torch.arange(2), eps=4)
