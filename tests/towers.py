"Image towers for the tests: those of golden/explainers, and random ones with large weights."
import timm
import torch
from helpers import golden
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer


def weights(data: dict) -> dict:
    "The state dict inside a golden file."
    return {k[2:]: v for k, v in data.items() if k.startswith("w.")}


def clip_cls(dtype=torch.float32):
    "open_clip's VisionTransformer with class token, and its golden arrays."
    data = golden("explainers", "clip_cls.npz")
    tower = VisionTransformer(32, 8, 64, 3, 4, 4., output_dim=32)
    tower.load_state_dict(weights(data))
    return tower.to(dtype), data


def siglip_map(dtype=torch.float32):
    "SigLIP's tower as open_clip builds it, and its golden arrays."
    data = golden("explainers", "siglip_map.npz")
    tower = TimmModel("test_vit", 48, image_size=160, pool="avg", proj="none")
    tower.image_size = (32, 32)
    tower.trunk = timm.models.VisionTransformer(32, 8, num_classes=0, global_pool="map", class_token=False,
                                                embed_dim=48, depth=3, num_heads=4)
    tower.load_state_dict(weights(data))
    return tower.to(dtype), data


def class_vit(dtype=torch.float32):
    "A timm classification transformer, and its golden arrays."
    data = golden("explainers", "class_vit.npz")
    tower = timm.models.VisionTransformer(28, 2, num_classes=5, embed_dim=32, depth=3, num_heads=4)
    tower.load_state_dict(weights(data))
    return tower.to(dtype), data


def sharp(net, seed=0):
    "Set random weights, large enough that attention and activations are far from linear; float64, evaluation mode."
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            scale = .3 if "conv1" in name or "patch_embed" in name else 2*p.shape[-1]**-.5
            if p.ndim > 1: p.copy_(scale*torch.randn(p.shape, generator=gen))
            elif "ls" in name: p.copy_(.5+torch.rand(p.shape, generator=gen))
            else: p.add_(.1*torch.randn(p.shape, generator=gen))
    return net.double().eval()


def open_clip_vit(**kw):
    "An open_clip tower with weights by `sharp`: 32 px, 4x4 patches, D = 32."
    return sharp(VisionTransformer(32, 8, 64, 3, 4, 4., output_dim=32, **kw))


def timm_vit(**kw):
    "A timm tower with weights by `sharp`: 32 px, 4x4 patches, D = 48."
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0) | kw
    return sharp(timm.models.VisionTransformer(**args))
