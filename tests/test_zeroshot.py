"""Class prompts in two styles, the classifier's weights, and the classifier as a function of pixels."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, golden
from open_clip import CLIP
from safetensors.torch import load_file
from torchvision.datasets import Imagenette

from reclip_nb.data import class_prompts, imagenet_names, open_dataset
from reclip_nb.data.prompts import EUROSAT, IMAGENETTE, PAPER_TEMPLATES, STL10, TEMPLATES, caltech_name, synsets
from reclip_nb.evaluations import ClipClassifier, held_out, prompts_of, robustness_probe, text_classifier
from reclip_nb.evaluations.zeroshot import correct, logit_scale, mean_direction
from reclip_nb.models import Clip, load_clip
from reclip_nb.worlds import CLASSES, prompts

# Weights

def test_weights_are_the_golden_ones():
    g = golden("robust", "zeroshot.npz")
    weights = mean_direction(g["text"])
    torch.testing.assert_close(weights.mT, g["classifier"], rtol=0, atol=1e-12)
    logits = 100*F.normalize(g["image"], dim=-1) @ weights.mT
    torch.testing.assert_close(logits, g["logits"], rtol=0, atol=1e-10)
    assert torch.equal(logits.argmax(-1), g["pred"]) and torch.equal(logits.topk(5).indices, g["top5"])
    for wrong in ("wrong_mean_before_norm", "wrong_no_renorm"):
        assert not torch.allclose(weights.mT, g[wrong], atol=1e-3), f"{wrong}: a step is missing or in the wrong order"


def test_text_classifier_is_normalise_mean_normalise():
    clip, texts = load_clip("tiny-smoke", seed=0), prompts("ensemble")
    weights = text_classifier(clip, texts, batch=7)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    with torch.no_grad():
        for k in (0, 9, 23):
            embeddings = torch.cat([clip.encode_text([t]) for t in texts[k]])
            torch.testing.assert_close(weights[k], F.normalize(embeddings.mean(0), dim=0))


def test_classes_with_different_numbers_of_prompts():
    clip, texts = load_clip("tiny-smoke", seed=0), prompts("ensemble")
    weights = text_classifier(clip, [texts[0], texts[1][:1]])
    expected = torch.stack([text_classifier(clip, texts)[0], text_classifier(clip, prompts())[1]])
    torch.testing.assert_close(weights, expected)


def test_classes_with_the_same_embedding():
    clip = load_clip("tiny-smoke", seed=0)
    names = [*CLASSES, "Red plain shape"]  # another text with the same tokens
    with pytest.raises(ValueError, match="same embedding.*'a photo of a red plain shape.'.*rename"):
        text_classifier(clip, class_prompts(names), batch=3)


# Names and templates

@pytest.mark.parametrize("classes, templates, words", [
    (["cat", "dog", "cat"], PAPER_TEMPLATES, "occur twice.*'cat'"),
    ([("chain saw", "chainsaw")], PAPER_TEMPLATES, "choose one name"),
    ([""], PAPER_TEMPLATES, "non-empty"),
    (["cat"], ["a photo of a cat"], "write {} once"),
    (["cat"], ["a photo of a {c}."], "another library's syntax"),
    (["cat"], ["a {}.", "a photo of a {c}."], "another library's syntax"),
    (["cat"], ["a {0}."], "write {} once"),
    (["cat"], ["{} and {}"], "write {} once"),
    (["cat"], [lambda c: f"a {c}"], "function of the class name"),
    (["cat"], "a photo of a {}.", "give a list"),
    (["cat"], [], "give a list"),
])
def test_wrong_names_and_templates(classes, templates, words):
    with pytest.raises(ValueError, match=words): class_prompts(classes, templates)


def test_template_lists():
    assert {k: len(v) for k, v in TEMPLATES.items()} == dict(
        imagenet=80, imagenette=80, cifar10=18, caltech256=34, stl10=2, fgvc_aircraft=2, eurosat=3)
    for templates in TEMPLATES.values():
        assert len({p[0] for p in class_prompts(["cat", "dog"], templates)}) == 2
        assert len(set(templates)) == len(templates)
    assert {"a blurry photo of the {}.", "a photo of a big {}.", "a photo of a {}."} <= set(TEMPLATES["cifar10"])
    assert {"the {} in a video game.", "a origami {}.", "art of the {}."} <= set(TEMPLATES["caltech256"])


def test_curated_names():
    assert imagenet_names(IMAGENETTE) == ["tench", "English Springer Spaniel", "cassette player", "chainsaw", "church",
                                          "French horn", "garbage truck", "gas pump", "golf ball", "parachute"]
    assert dict(zip(IMAGENETTE, synsets(IMAGENETTE))) == Imagenette._WNID_TO_CLASS
    assert list(EUROSAT) == sorted(EUROSAT) and len(set(EUROSAT.values())) == len(set(STL10)) == 10
    assert EUROSAT["SeaLake"] == "lake or sea" and EUROSAT["Residential"].startswith("residential")
    assert [caltech_name(f) for f in ("101.head-phones", "251.airplanes-101")] == ["head phones", "airplanes"]


def test_styles_of_the_embedded_world():
    data = open_dataset("shapes", world="smoke", kind="zero_shot")
    assert prompts_of(data) == prompts() and prompts_of(data, "paper")[20] == ["a photo of a orange plain shape."]
    with pytest.raises(ValueError, match="'paper', 'reference'"): prompts_of(data, "synsets")


# The classifier

@pytest.fixture(scope="module")
def clip(): return load_clip("tiny-smoke", seed=0)


@pytest.fixture(scope="module")
def weights(clip): return text_classifier(clip, prompts())


@pytest.fixture
def x(): return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-9)])
def test_golden_logits_from_pixels(dtype, tolerance):
    file = load_file(GOLDEN/"robust"/"clip.safetensors")
    vision = dict(image_size=32, patch_size=8, layers=2, width=32, head_width=16)
    model = CLIP(32, vision, dict(context_length=8, vocab_size=16, width=16, heads=2, layers=1), quick_gelu=True)
    missing = model.load_state_dict({k: v for k, v in file.items() if k.startswith("visual.")}, strict=False)
    assert not missing.unexpected_keys and not [k for k in missing.missing_keys if k.startswith("visual.")]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    clip = Clip(model, "golden", mean, std)
    f = ClipClassifier(clip, file["text_embeddings"], file["logit_scale_exp"].item()).to(dtype)
    f.mean, f.std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (mean, std))  # not rounded to float32
    g = golden("robust", "clip_inputs.npz")
    expected = g["logits_f32" if dtype == torch.float32 else "logits_f64"]
    torch.testing.assert_close(f(g["x"].to(dtype)), expected, rtol=0, atol=tolerance)


def test_the_model_is_not_changed(clip, weights, x):
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    flags = [p.requires_grad for p in clip.parameters()]
    f = ClipClassifier(clip, weights)
    assert not f.training and not any(p.requires_grad for p in f.parameters())
    x.requires_grad_()
    f(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())
    assert flags == [p.requires_grad for p in clip.parameters()]
    assert all(torch.equal(before[k], v) for k, v in clip.state_dict().items())
    out = f(x)
    with torch.no_grad():
        for p in clip.visual.parameters(): p.add_(.1)
    try: assert torch.equal(f(x), out), "further training of the model changed its classifier"
    finally: clip.load_state_dict(before)


def test_a_training_model_gives_a_classifier_in_evaluation_mode(clip, weights, x):
    expected = ClipClassifier(clip, weights)(x)
    clip.train()
    try: assert torch.equal(ClipClassifier(clip, weights)(x), expected) and clip.visual.training
    finally: clip.eval()
    with pytest.raises(RuntimeError, match="training mode"): ClipClassifier(clip, weights).train()(x)


def test_small_images_are_resized_inside(clip, weights, x):
    f, small = ClipClassifier(clip, weights), x[..., ::4, ::4]
    torch.testing.assert_close(f(small), f(F.interpolate(small, 32, mode="bicubic")))
    torch.testing.assert_close(f(x), logit_scale(clip)*clip.encode_image(x) @ weights.T)


@pytest.mark.parametrize("scale", [1.0, np.log(100), 1e3, float("nan")])
def test_wrong_logit_scales(clip, weights, scale):
    with pytest.raises(ValueError, match="logit scale.*exp"): ClipClassifier(clip, weights, scale)


def test_openai_weights_have_a_scale_of_100(clip):
    with pytest.raises(ValueError, match="14.29.*OpenAI's weights have 100"): logit_scale(clip, "openai")
    trained = load_clip("tiny-smoke", seed=0)
    trained.model.logit_scale.data.fill_(np.log(100.4))
    assert abs(logit_scale(trained, "openai")-100.4) < 1e-3


def test_weights_of_another_shape(clip, weights):
    for bad in (weights.T, weights*2, weights[0]):
        with pytest.raises(ValueError, match="rows of length 1"): ClipClassifier(clip, bad)


def test_scale_does_not_change_the_prediction(clip, weights, x):
    logits = lambda scale: ClipClassifier(clip, weights, scale)(x)
    assert torch.equal(logits(10).argmax(-1), logits(100).argmax(-1))
    torch.testing.assert_close(logits(100), 10*logits(10), rtol=1e-5, atol=1e-4)


# Accuracy

def test_held_out_images_have_labels_for_any_kind_of_training_data():
    x, y, texts = held_out("shapes", world="smoke", seed=0, kind="scenes", size=32, limit=48)
    assert x.shape == (48, 3, 32, 32) and torch.equal(y, torch.linspace(0, 383, 48).long() % 24) and texts == prompts()


def test_probe_is_reproducible_and_counts_images(clip, x):
    y = torch.arange(6)
    f = ClipClassifier(clip, text_classifier(clip, prompts()))
    probe = robustness_probe(clip, x, y, prompts(), n_robust=3)
    assert probe["clean"] == correct(f, x, y).double().mean().item() and (probe["n"], probe["n_robust"]) == (6, 3)
    again = robustness_probe(clip, x, y, prompts(), n_robust=3)
    assert probe == again
