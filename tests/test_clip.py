"Real architectures with random weights, every kind of checkpoint file, and the activation check."
import open_clip
import pytest
import torch
from torch import nn

from reclip_nb.models import frozen, load_clip, load_visual, save_clip, save_visual, weights
from reclip_nb.models.clip import activation
from reclip_nb.models.weights import read_state, visual_state

ARCHITECTURES = {  # name: image size, width of the embedding, activation, number of tensors in the image tower
    "ViT-B-16-quickgelu": (224, 512, "quick_gelu", 152), "ViT-L-14-quickgelu": (224, 768, "quick_gelu", 296),
    "RN50": (224, 1024, "relu", 339), "ViT-B-16-SigLIP": (224, 768, "gelu", None)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, tmp_path):
    pixels, dim, act, tensors = ARCHITECTURES[name]
    clip = load_clip(name)
    assert clip.image_size == (pixels, pixels) and clip.activation == act
    x = torch.rand(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): e = clip.encode_image(x)
    assert e.shape == (1, dim) and torch.isclose(e.norm(), torch.ones(()))
    if tensors: assert len(clip.visual.state_dict()) == tensors
    save_visual(clip, tmp_path/"v.safetensors", dict(eps=4/255))
    with torch.no_grad():
        for p in clip.visual.parameters(): p.mul_(1.01)
    report = load_visual(clip, tmp_path/"v.safetensors")
    assert report.activation == act and report.meta["eps"] == 4/255
    with torch.no_grad(): torch.testing.assert_close(clip.encode_image(x), e)


def test_normalisation_belongs_to_the_weights():
    assert torch.allclose(load_clip("ViT-B-16-SigLIP").mean, torch.tensor(.5))
    assert load_clip("RN50").mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_openai_tag_selects_quickgelu_and_the_error_states_how_to_get_weights(monkeypatch):
    def offline(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(RuntimeError, match="ViT-B-16-quickgelu are not cached .*pass the path of a file"):
        load_clip("ViT-B-16", "openai")


def test_recorded_activation_must_agree(tmp_path):
    source = load_clip("ViT-B-32-quickgelu", seed=1)
    save_visual(source, tmp_path/"v.safetensors")
    with pytest.raises(ValueError, match="trained with quick_gelu.*ViT-B-32-quickgelu"):
        load_visual(load_clip("ViT-B-32"), tmp_path/"v.safetensors")
    load_visual(load_clip("ViT-B-32-quickgelu"), tmp_path/"v.safetensors")
    save_clip(source, tmp_path/"c.safetensors")
    with pytest.raises(ValueError, match="trained with quick_gelu"): load_clip("ViT-B-32", tmp_path/"c.safetensors")
    assert activation(load_clip("ViT-B-32-quickgelu", tmp_path/"c.safetensors").visual) == "quick_gelu"


def test_open_clip_reads_our_files(tmp_path):
    source = load_clip("RN50", seed=2)
    save_clip(source, tmp_path/"c.safetensors")
    loaded = open_clip.create_model("RN50", pretrained=str(tmp_path/"c.safetensors"))
    assert all(torch.equal(v, source.model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_torchscript_archive(tmp_path):
    "OpenAI's releases are TorchScript archives."
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Linear(3, 2)
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x): return self.visual(x)
    module = Tower()
    torch.jit.script(module).save(str(tmp_path/"openai.pt"))
    state, layout = visual_state(read_state(tmp_path/"openai.pt")[0])
    assert layout == "visual.*" and state.keys() == {"weight", "bias"}
    assert torch.equal(state["weight"], module.visual.weight)


def test_hub_names(tmp_path, monkeypatch):
    source = load_clip("tiny", seed=3)
    save_visual(source, tmp_path/"v.safetensors")
    requested = []
    def download(name):
        requested.append(name)
        return tmp_path/"v.safetensors"
    monkeypatch.setattr(weights, "download_pretrained_from_hf", download)
    clip = load_clip("tiny")
    load_visual(clip, "hf-hub:someone/aft4")
    assert requested == ["someone/aft4"] and torch.equal(clip.visual.proj, source.visual.proj)


def test_non_finite_weights_are_rejected(tmp_path):
    clip = load_clip("tiny")
    with torch.no_grad(): clip.visual.proj[0, 0] = float("inf")
    save_visual(clip, tmp_path/"v.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in .'proj'"):
        load_visual(load_clip("tiny"), tmp_path/"v.safetensors")


def test_frozen_copies_only_the_image_tower():
    clip = load_clip("tiny")
    reference = frozen(clip)
    shared = {p.data_ptr() for p in clip.parameters()} & {p.data_ptr() for p in reference.parameters()}
    image_tower = {p.data_ptr() for p in clip.visual.parameters()}
    assert shared and not shared & image_tower
