"""A small tower of each kind, and the slow, plain way to what it makes of some of its tokens: by masks."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

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
NAMES = [*OPEN_CLIP, *TIMM]


def build(small_clip, name, dtype=torch.float32):
    """A model of a kind, with random weights, a grid of 4 x 5 tokens and embeddings of 24 numbers."""
    if name in OPEN_CLIP:
        return small_clip(dtype, **OPEN_CLIP[name])
    model = small_clip()
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
    tokens, cut = prefix
    p = len(tokens) - 20
    stays = torch.tensor([True] * p + [token in set(kept) for token in range(20)])
    mask = torch.zeros(len(tokens), len(tokens), dtype=tokens.dtype).masked_fill(~stays, float("-inf"))
    x, parts = tokens[None], _parts(visual)
    for block in parts.blocks[cut:]:
        x = block(x, attn_mask=mask, **parts.rope)
    return parts.head(x, stays)[0]


def prefix(visual, image, cut):
    """As `reference.prefix`."""
    parts = _parts(visual)
    x = parts.embed(image[None])
    for block in parts.blocks[:cut]:
        x = block(x, **parts.rope)
    return x[0], cut


def _parts(visual):
    """The modules of a tower: how it embeds, its blocks and what they take, and how it is read out."""
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
