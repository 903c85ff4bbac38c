"""Small models of transformers with random weights, and what open_clip's weights are called there."""

from __future__ import annotations

import string

import torch
import transformers
from towers import VISION

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def clip(seed=0, projection_dim=24, **vision):
    """A CLIP with 5 x 5 patches, its layer norms and biases moved away from 1 and 0."""
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**VISION, "hidden_act": "quick_gelu", **vision}, projection_dim=projection_dim
    )
    torch.manual_seed(seed)
    return moved(transformers.CLIPModel(config), seed)


def moved(model, seed=0):
    """The model with other weights than those that are 0 or 1."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def tokenizer():
    """CLIP's, of letters."""
    letters = string.ascii_lowercase + "."
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def processor(size=20):
    """CLIP's, for images of so many pixels."""
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer())


def save_clip(folder, seed=0, **vision):
    """A folder as `save_pretrained` leaves it; returns its name for --model."""
    model = clip(seed, **vision)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return f"hf:{folder}"


def from_open_clip(visual):
    """A CLIPVisionModelWithProjection with the weights of open_clip's tower, which uses QuickGELU."""
    heads = visual.transformer.resblocks[0].attn.num_heads
    side, patch = visual.image_size[0], visual.conv1.kernel_size[0]
    config = transformers.CLIPVisionConfig(
        hidden_size=visual.transformer.width,
        intermediate_size=visual.transformer.resblocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        projection_dim=visual.proj.shape[1],
        hidden_act="quick_gelu",
    )
    model = transformers.CLIPVisionModelWithProjection(config)
    state = {}
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    outside = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    for key, value in visual.state_dict().items():
        if key == "proj":
            state["visual_projection.weight"] = value.T
        elif key in outside:
            state[f"vision_model.{outside[key]}"] = value
        elif key.startswith("ln_"):
            norm = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}[key.split(".")[0]]
            state[f"vision_model.{norm}.{key.split('.')[1]}"] = value
        else:
            _, _, number, inner = key.split(".", 3)
            block, (part, kind) = f"vision_model.encoder.layers.{number}", inner.rsplit(".", 1)
            if part == "attn":
                kind = kind.removeprefix("in_proj_")
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    state[f"{block}.self_attn.{name}_proj.{kind}"] = third
            else:
                state[f"{block}.{names[part]}.{kind}"] = value
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
