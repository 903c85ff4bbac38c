"""Pruning by class-token attention, as in EViT (Liang et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from patchrank.data.pair_batches import PairBatch
from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.pruning.methods import Need
from patchrank.pruning.selector import Attention, Selector


class ClassAttention(Selector):
    """How much the class token attends to each patch in the block before."""

    tells_anew = True
    needs_a_block = True

    def forward(self, tokens: Tensor, count: int, attention: Attention, batch: PairBatch | None = None) -> Tensor:
        """As `Selector.forward`, float32; raises UserError where there is no block before."""
        if attention is None:
            raise UserError(Need.BLOCK.value)
        return attention()

    def multiply_adds(self, adapter: Adapter, schedule: Mapping[int, int]) -> int:
        """As `Selector.multiply_adds`. The block's keys are computed twice, for it does not give them away."""
        there = [adapter.num_tokens, *schedule.values()][:-1]  # before tokens leave
        return sum(adapter.class_attention_multiply_adds(adapter.prefix_tokens + count) for count in there)
