"""A small tower of each kind, and the slow, plain way to what it makes of some of its tokens: by masks."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from patchrank.model.kinds import adapt
from patchrank.model.transformers_tower import ImageTower

SHAPE = {"img_size": (16, 20), "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 0}

OPEN_CLIP = {
    "tokens": {"output_tokens": True},
    "average": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "average-normed": {"pool_type": "avg"},
    "coca": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True},
}
TIMM = {
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "gap": (VisionTransformer, {"class_token": False, "global_pool": "avg", "pos_embed": "none"}),
    "gap-prefix": (VisionTransformer, {"global_pool": "avg", "reg_tokens": 1, "fc_norm": False}),
    "registers": (
        VisionTransformer,
        {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5, "pre_norm": True, "num_classes": 24, "qkv_bias": True},
    ),
    "eva": (Eva, {"global_pool": "token", "init_values": 0.5, "num_classes": 24}),
    "eva-post-norm": (Eva, {"global_pool": "token", "use_post_norm": True, "num_classes": 24}),
    "eva-rope": (
        Eva,
        {
            "global_pool": "token",
            "qkv_fused": False,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "scale_attn_inner": True,
            "use_rot_pos_emb": True,
            "ref_feat_shape": (3, 3),
            "num_classes": 24,
        },
    ),
    "pe": (
        Eva,
        {
            "global_pool": "map",
            "attn_type": "rope",
            "use_pre_transformer_norm": True,
            "use_rot_pos_emb": True,
            "rope_grid_offset": 1.0,
            "rope_grid_indexing": "xy",
            "attn_pool_num_heads": 2,
            "num_classes": 24,
        },
    ),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 4,
}
TRANSFORMERS = {  # square, as these models are
    "hf-clip": ("CLIPVisionModel", {"hidden_act": "quick_gelu"}),
    "hf-siglip": ("SiglipVisionModel", {}),
    "hf-siglip-mean": ("SiglipVisionModel", {"vision_use_head": False}),
    "hf-siglip2": ("Siglip2VisionModel", {"num_patches": 25}),
    "hf-dinov2": ("Dinov2Model", {"mlp_ratio": 2}),
    "hf-dinov2-registers": (
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 2, "use_swiglu_ffn": True, "image_size": 28, "qkv_bias": False},
    ),
    "hf-vit": ("ViTModel", {}),
}
NAMES = [*OPEN_CLIP, *TIMM, *TRANSFORMERS]


def vision_model(name, attention="sdpa"):
    """A small vision model of transformers, its layer norms and biases moved as those of `small_clip`."""
    kind, shape = TRANSFORMERS[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**VISION, **shape})
    torch.manual_seed(0)
    vision = model_class._from_config(config, attn_implementation=attention)
    for parameter in vision.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vision.eval().requires_grad_(False)


def build(small_clip, name, dtype=torch.float32):
    """A model of a kind, with random weights and embeddings of 24 numbers, or of 32 without a projection.

    Its grid is 4 x 5 tokens, of those of transformers 5 x 5.
    """
    if name in OPEN_CLIP:
        return small_clip(dtype, **OPEN_CLIP[name])
    model = small_clip()
    if name in TRANSFORMERS:
        projection = nn.Linear(32, 24, bias=False) if name == "hf-clip" else None
        model.visual = ImageTower(vision_model(name), projection, (20, 20)).requires_grad_(False).eval()
        return model.to(dtype)
    kind, shape = TIMM[name]
    visual = TimmModel("test_vit", 24, image_size=(16, 20), pool="token", proj="none")
    visual.trunk = kind(**{**SHAPE, **shape})
    if not shape.get("num_classes"):
        visual.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 24, bias=False))
    visual.preprocess_cfg = {}
    for parameter in visual.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.visual = visual.eval().requires_grad_(False)
    return model.to(dtype)


def embed(visual, prefix, kept):
    """As `reference.embed`: the embedding of an image, (E,), without any gather: what has left is masked out of every
    attention and of the pooling, by the modules' own masks."""
    _, x, stays = masked(visual, prefix, kept)
    return _parts(visual).head(x, stays)[0]


def masked(visual, prefix, kept):
    """What the first block after the cut gives, and the last, (1, p + N, D), and which tokens there are, (p + N,)."""
    tokens, cut = prefix
    patches = 25 if isinstance(visual, ImageTower) else 20  # and not of `adapt`, which refuses what some tests tune
    p = len(tokens) - patches
    stays = torch.tensor([True] * p + [token in set(kept) for token in range(patches)])
    mask = torch.zeros(len(tokens), len(tokens), dtype=tokens.dtype).masked_fill(~stays, float("-inf"))
    x, parts, first = tokens[None], _parts(visual), None
    for block in parts.blocks[cut:]:
        x = block(x, attn_mask=mask, **parts.rope) if parts.rope is not None else block(x, mask[None, None])
        first = x if first is None else first
    return first, x, stays


def masked_tokens(visual, prefix, kept):
    """Tokens of an image in the order of `kept`, (p + n, D), prefix tokens first: what a vision model of transformers
    gives as its last hidden state, and what the first block after the cut gives."""
    first, x, stays = masked(visual, prefix, kept)
    p = len(stays) - adapt(visual).num_tokens
    places = [*range(p), *(token + p for token in kept)]
    last = x if visual.family == "CLIPVisionModel" else adapt(visual).final_norm(x)
    return last[0, places], first[0, places]


def prefix(visual, image, cut):
    """As `reference.prefix`."""
    parts = _parts(visual)
    x = parts.embed(image[None])
    for block in parts.blocks[:cut]:
        x = block(x, **parts.rope) if parts.rope is not None else block(x, None)
    return x[0], cut


def _parts(visual):
    """The modules of a tower: how it embeds, its blocks and what they take, and how it is read out.

    `rope` is None where blocks take a mask for every head.
    """
    if isinstance(visual, ImageTower):
        return _transformers_parts(visual)
    if not isinstance(visual, TimmModel):
        return SimpleNamespace(
            embed=visual._embeds, blocks=visual.transformer.resblocks, rope={}, head=lambda x, s: _read(visual, x, s)
        )
    trunk = visual.trunk

    def embed(images):
        x = trunk._pos_embed(trunk.patch_embed(images))
        return trunk.norm_pre(x[0] if isinstance(x, tuple) else x)

    rope = {"rope": trunk.rope.get_embed()} if getattr(trunk, "rope", None) is not None else {}

    def head(x, stays):
        x, p = trunk.norm(x), trunk.num_prefix_tokens
        if trunk.attn_pool is not None:
            skip = 0 if isinstance(trunk, Eva) else p
            mask = torch.zeros(1, 1, 1, len(stays), dtype=x.dtype).masked_fill(~stays, float("-inf"))
            x = trunk.attn_pool(x[:, skip:], attn_mask=mask[..., skip:])
        elif trunk.global_pool == "avg":
            x = x[:, p:][:, stays[p:]].mean(dim=1)
        else:
            x = x[:, 0]
        return visual.head(trunk.forward_head.__func__(_Pooled(trunk), x))

    return SimpleNamespace(embed=embed, blocks=trunk.blocks, rope=rope, head=head)


def _transformers_parts(visual):
    vision, siglip = visual.vision, visual.family.startswith("Siglip")
    norm = getattr(vision, "post_layernorm", None) or vision.layernorm

    def embed(images):
        if visual.family == "Siglip2VisionModel":
            patches = torch.stack([convert_image_to_patches(image, 4) for image in images])
            return vision.embeddings(patches, torch.tensor([[5, 5]]).expand(len(images), -1))
        return getattr(vision, "pre_layrnorm", nn.Identity())(vision.embeddings(images))

    def head(x, stays):
        x = norm(x)
        if not siglip:
            return visual.projection(x[:, 0]) if visual.projection is not None else x[:, 0]
        if not vision.use_head:
            return x[:, stays].mean(dim=1)
        pool = vision.head
        y = pool.attention(pool.probe, x, x, key_padding_mask=~stays[None], need_weights=False)[0]
        return (y + pool.mlp(pool.layernorm(y)))[:, 0]

    encoder = getattr(vision, "encoder", vision)
    blocks = getattr(encoder, "layers", None) or encoder.layer
    return SimpleNamespace(embed=embed, blocks=blocks, rope=None, head=head)


class _Pooled:
    """A trunk whose tokens are pooled already."""

    def __init__(self, trunk):
        self.trunk = trunk

    def __getattr__(self, name):
        return getattr(self.trunk, name)

    def pool(self, x):
        return x


def _read(visual, x, stays):
    if visual.attn_pool is not None:
        pool = visual.attn_pool
        x = pool.ln_k(x)
        query = pool.ln_q(pool.query)[None]
        x = visual.ln_post(pool.attn(query, x, x, key_padding_mask=~stays[None], need_weights=False)[0])[:, 0]
    elif visual.pool_type == "avg":
        x = x if visual.final_ln_after_pool else visual.ln_post(x)
        x = x[:, 1:][:, stays[1:]].mean(dim=1)
        x = visual.ln_post(x) if visual.final_ln_after_pool else x
    else:
        x = visual.ln_post(x)[:, 0]
    return x @ visual.proj
