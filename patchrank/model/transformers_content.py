"""What transformers' weights are called in the libraries that open_clip has the same models from.

A bundle knows a model by the digest of its weights and structure. So those of CLIP are told as open_clip's own towers
tell them, and those of SigLIP as timm's, and a bundle that was made in one library prunes the model of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OPEN_CLIP = {"QuickGELUActivation": "QuickGELU None", "GELUActivation": "GELU none"}  # its activations
# The two are told as one: transformers has SigLIP with the approximation that it was trained with, open_clip has most
# of it without, and the difference, 5e-4 at most, is less than what bfloat16 rounds.
_TIMM = {"GELUActivation": "GELU", "GELUTanh": "GELU"}


def as_open_clip(adapter: Any) -> tuple[dict[str, Tensor], str]:
    """CLIP: weights and structure as `OpenClipViT` would tell those of the same model in open_clip."""
    visual, vision = adapter.visual, adapter.visual.vision
    state = {
        "class_embedding": vision.embeddings.class_embedding,
        "positional_embedding": vision.embeddings.position_embedding.weight,
        "conv1.weight": vision.embeddings.patch_embedding.weight,
    }
    if visual.projection is not None:
        state["proj"] = visual.projection.weight.T
    modules = [("ln_pre", vision.pre_layrnorm), ("ln_post", vision.post_layernorm)]
    for number, block in enumerate(adapter.blocks):
        name, attn = f"transformer.resblocks.{number}", block.self_attn
        modules += [(f"{name}.ln_1", block.layer_norm1), (f"{name}.ln_2", block.layer_norm2)]
        modules += [(f"{name}.mlp.c_fc", block.mlp.fc1), (f"{name}.mlp.c_proj", block.mlp.fc2)]
        modules += [(f"{name}.attn.out_proj", attn.out_proj)]
        state |= {f"{name}.attn.in_proj_{kind}": value for kind, value in _joined(attn).items()}
    state |= _weights(modules)
    norms = [vision.pre_layrnorm, *_block_norms(adapter), vision.post_layernorm]
    activation = adapter.activation()
    return state, (
        f"heads {adapter.inner // adapter.head_width} grid {adapter.grid} patch {visual.patch_size} "
        f"activation {_OPEN_CLIP.get(activation, activation)} norms {[norm.eps for norm in norms]} "
        "pooled before the last False"
    )


def as_timm(adapter: Any) -> tuple[dict[str, Tensor], str]:
    """SigLIP, pooled by its learnt query: as `TimmViT` would tell the same model in open_clip, which has it of timm."""
    vision, width = adapter.visual.vision, adapter.width
    head = vision.head
    query, key_value = (slice(0, width), slice(width, None))
    projected = {"weight": head.attention.in_proj_weight, "bias": head.attention.in_proj_bias}
    state = {"trunk.pos_embed": vision.embeddings.position_embedding.weight, "trunk.attn_pool.latent": head.probe}
    for kind, value in projected.items():
        state |= {f"trunk.attn_pool.q.{kind}": value[query], f"trunk.attn_pool.kv.{kind}": value[key_value]}
    modules = [
        ("trunk.patch_embed.proj", vision.embeddings.patch_embedding),
        ("trunk.norm", vision.post_layernorm),
        ("trunk.attn_pool.proj", head.attention.out_proj),
        ("trunk.attn_pool.norm", head.layernorm),
        ("trunk.attn_pool.mlp.fc1", head.mlp.fc1),
        ("trunk.attn_pool.mlp.fc2", head.mlp.fc2),
    ]
    for number, block in enumerate(adapter.blocks):
        name, attn = f"trunk.blocks.{number}", block.self_attn
        modules += [(f"{name}.norm1", block.layer_norm1), (f"{name}.norm2", block.layer_norm2)]
        modules += [(f"{name}.mlp.fc1", block.mlp.fc1), (f"{name}.mlp.fc2", block.mlp.fc2)]
        modules += [(f"{name}.attn.proj", attn.out_proj)]
        state |= {f"{name}.attn.qkv.{kind}": value for kind, value in _joined(attn).items()}
    state |= _weights(modules)
    norms = [*_block_norms(adapter), vision.post_layernorm, head.layernorm]
    activation = adapter.activation()
    return state, (
        f"VisionTransformer heads {adapter.inner // adapter.head_width} grid {adapter.grid} "
        f"activation {_TIMM.get(activation, activation)} norms {[norm.eps for norm in norms]} "
        f"pool {adapter.visual.pool} {head.attention.num_heads} prefix 0"
    )


def _joined(attn: Any) -> dict[str, Tensor]:
    """The weights of a block's queries, keys and values in one, (3 heads d, D) and (3 heads d,)."""
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    return {kind: torch.cat([getattr(part, kind) for part in parts]) for kind in ("weight", "bias")}


def _block_norms(adapter: Any) -> list[Any]:
    return [norm for block in adapter.blocks for norm in (block.layer_norm1, block.layer_norm2)]


def _weights(modules: list[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": value for name, module in modules for kind, value in module.named_parameters()}
