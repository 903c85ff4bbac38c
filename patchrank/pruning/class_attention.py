"""Pruning by class-token attention, as in EViT (Liang et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchrank.data.pair_batches import PairBatch
from patchrank.model.tower import project
from patchrank.pruning.selector import Selector


class ClassAttention(Selector):
    """How much the class token attends to each patch in the block before.

    The mean over heads of softmax(q k^T / sqrt(d)).
    """

    tells_anew = True
    needs_a_block = True

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any, batch: PairBatch | None = None) -> Tensor:
        """As `Selector.forward`; float32."""
        assert before is not None
        query, key, _ = project(block.attn, block.ln_1(before), class_token_only=True)  # (B, heads, 1 and 1 + n, d)
        logits = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, heads, 1, 1 + n)
        return logits.softmax(dim=-1).mean(dim=1)[:, 0, 1:]

    def multiply_adds(self, visual: Any, schedule: Mapping[int, int]) -> int:
        """As `Selector.multiply_adds`. The block's keys are computed twice, for it does not give them away."""
        width, there, total = visual.transformer.width, visual.grid_size[0] * visual.grid_size[1], 0
        for kept in schedule.values():
            total += (2 * there + 3) * width * width + (there + 1) * width
            there = kept
        return total
