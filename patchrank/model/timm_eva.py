"""timm's EVA transformers in open_clip: EVA, EVA02 and Meta's Perception Encoder, with RoPE or without."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from patchrank.model.attention import by_head
from patchrank.model.timm_vit import TimmViT


class TimmEva(TimmViT):
    """A `TimmModel` around an `Eva`. A token is turned by its own place, whichever others have left."""

    trunk = Eva
    known_blocks = (EvaBlock, EvaBlockPostNorm)
    known_attention = (EvaAttention, AttentionRope)

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.rotary = visual.trunk.rope is not None

    @classmethod
    def refusal(cls, visual: Any) -> str | None:
        """As `Adapter.refusal`."""
        if visual.trunk.rope_mixed:
            return "its blocks turn tokens by angles of their own (mixed RoPE)"
        if getattr(visual.trunk.blocks[0].attn, "num_kv_groups", 1) != 1:
            return "its heads share keys (grouped queries)"
        return super().refusal(visual)

    def structure(self) -> str:
        """As `Adapter.structure`."""
        rope, told = self.visual.trunk.rope, None
        if rope is not None:  # its angles are no weights, and are rounded with them
            kinds, state = (int, float, str, tuple, list), vars(rope).items()
            facts = {name: it for name, it in state if isinstance(it, kinds) and name != "training" and name[0] != "_"}
            told = f"{type(rope).__name__} {sorted(facts.items())} {self.blocks[0].attn.rotate_half}"
        return super().structure() + f" {type(self.blocks[0]).__name__} rotary {told}"

    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """As `Adapter.prepare`; sines and cosines are not rounded."""
        rope = copy.deepcopy(self.visual.trunk.rope)
        super().prepare(dtype, device)
        if rope is not None:
            self.visual.trunk.rope = rope.to(device)

    def own_block(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.own_block`."""
        return self.blocks[number](x, rope=self.visual.trunk.rope.get_embed() if self.rotary else None)

    def embed(self, images: Tensor) -> Tensor:
        """As `Adapter.embed`."""
        trunk = self.visual.trunk
        x, _ = trunk._pos_embed(trunk.patch_embed(images))
        return trunk.norm_pre(x)

    def mlp(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.mlp`."""
        block = self.blocks[number]
        if isinstance(block, EvaBlockPostNorm):
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        added = block.mlp(block.norm2(x))
        return x + block.drop_path2(added if block.gamma_2 is None else block.gamma_2 * added)

    @property
    def _skipped(self) -> int:
        return 0 if self.visual.trunk.attn_pool is not None else self.prefix_tokens

    def _normed(self, block: Any, x: Tensor) -> Tensor:
        return x if isinstance(block, EvaBlockPostNorm) else block.norm1(x)

    def _attended(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        if isinstance(block, EvaBlockPostNorm):
            return x + block.drop_path1(block.norm1(attended))
        return x + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)

    def _project(
        self, attn: Any, x: Tensor, places: Tensor | None, class_token_only: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        if attn.qkv is not None:
            query, key, value = super()._project(attn, x, places, class_token_only)
        else:
            asked = x[:, :1] if class_token_only else x
            projected = attn.q_proj(asked), attn.k_proj(x), attn.v_proj(x)
            query, key, value = (by_head(part, self.head_width) for part in projected)
            query, key = attn.q_norm(query), attn.k_norm(key)
        if not self.rotary:
            return query, key, value
        table = self.visual.trunk.rope.get_embed().to(x.device)  # (N, 2 d): sines, then cosines
        still = torch.cat([torch.zeros_like(table[:1]).chunk(2, -1)[0], torch.ones_like(table[:1]).chunk(2, -1)[1]], -1)
        places = self.in_order(x.shape[1], x.device) if places is None else places
        turned = torch.cat([table, still])[places][:, None]  # (C or 1, 1, n, 2 d)
        key = apply_rot_embed_cat(key, turned, half=attn.rotate_half).type_as(value)
        query = apply_rot_embed_cat(query, turned[:, :, : query.shape[2]], half=attn.rotate_half).type_as(value)
        return query, key, value

    def _bias(self, attn: Any) -> Tensor | None:
        if isinstance(attn, AttentionRope):
            return attn.qkv.bias
        return None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
