"Models behind the golden arrays."
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file

from reclip_nb.models import Clip, load_visual

GOLDEN = Path(__file__).parent/"golden"


def golden(*names):
    "An npz file of golden arrays as float64/int tensors where numeric."
    data = np.load(GOLDEN.joinpath(*names), allow_pickle=False)
    return {k: data[k] if data[k].dtype.kind == "U" else torch.from_numpy(data[k]) for k in data}


def aft_clip(student: bool, quick_gelu: bool) -> Clip:
    "The tiny CLIP of golden/aft in float64; the student has the fine-tuned tower."
    folder = GOLDEN/"aft"
    cfg = json.loads((folder/"tiny_config.json").read_text())
    m = cfg["model"]
    model = open_clip.CLIP(m["embed_dim"], m["vision_cfg"], m["text_cfg"], quick_gelu=quick_gelu)
    model.load_state_dict(load_file(folder/"tiny_clip_full.safetensors"), strict=False)
    clip = Clip(model, "golden", tuple(cfg["image_mean"]), tuple(cfg["image_std"]))
    if student: assert load_visual(clip, folder/"tiny_aft_visual.safetensors").layout == "bare"
    clip.double().eval()
    for name in ("mean", "std"):   # float32 constants would cost two digits more than the goldens allow
        setattr(clip, name, torch.tensor(cfg[f"image_{name}"], dtype=torch.float64).view(1, 3, 1, 1))
    return clip
