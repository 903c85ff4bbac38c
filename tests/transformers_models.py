"""Small models of transformers with random weights, and what open_clip's weights are called there."""

from __future__ import annotations

import string

import torch
import transformers
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
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


def siglip():
    """A SigLIP with 5 x 5 patches."""
    text = {**TEXT, "projection_size": VISION["hidden_size"]}
    return moved(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION)))


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


def siglip_twins(act_layer=None, **shape):
    """SigLIP's image tower as open_clip has it, which is timm's, and a SiglipVisionModel with its weights."""
    vision = {**VISION, "layer_norm_eps": 1e-6, **shape}
    size = {"img_size": vision["image_size"], "patch_size": vision["patch_size"], "embed_dim": vision["hidden_size"]}
    depth = {"depth": vision["num_hidden_layers"], "num_heads": vision["num_attention_heads"], "mlp_ratio": 2}
    visual = TimmModel("test_vit", 32, image_size=vision["image_size"], pool="token", proj="none")
    visual.trunk = VisionTransformer(
        **size, **depth, num_classes=0, class_token=False, global_pool="map", act_layer=act_layer
    )
    visual.head, visual.preprocess_cfg = torch.nn.Sequential(), {}
    moved(visual)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    names = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        "attn_pool.mlp.fc1": "head.mlp.fc1",
        "attn_pool.mlp.fc2": "head.mlp.fc2",
    }
    weights = visual.trunk.state_dict()
    state = {
        "embeddings.position_embedding.weight": weights.pop("pos_embed")[0],
        "head.probe": weights.pop("attn_pool.latent"),
    }
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
        state[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    for key, value in weights.items():
        module, kind = key.rsplit(".", 1)
        block, inner = "", module
        if module.startswith("blocks."):
            _, number, inner = module.split(".", 2)
            block = f"encoder.layers.{number}."
        if inner == "attn.qkv":
            for name, third in zip("qkv", value.chunk(3), strict=True):
                state[f"{block}self_attn.{name}_proj.{kind}"] = third
        else:
            state[f"{block}{names[inner]}.{kind}"] = value
    model.load_state_dict(state)
    return visual.eval().requires_grad_(False), model.eval().requires_grad_(False)


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
