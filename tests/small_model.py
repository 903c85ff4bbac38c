"""A folder with a small CLIP of random weights, as open_clip's `local-dir:` loads it."""

from __future__ import annotations

import json

import open_clip
import torch
from safetensors.torch import save_file


def save_model(folder, seed=0, context_length=16, **vision):
    """Make the folder; returns the model's name."""
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": {"layers": 4, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 24, **vision},
            "text_cfg": {"context_length": context_length, "width": 8, "heads": 1, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"
