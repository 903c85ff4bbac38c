"""What tells which patch tokens stay: the base of all ways of pruning that choose tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from patchrank.data.pair_batches import PairBatch
from patchrank.model.adapter import Adapter

Attention = Callable[[], Tensor] | None
"""Computes how much the class token attends to each patch: (B, n) float32, as `Adapter.class_attention`."""


class Selector(nn.Module):
    """Tells the usefulness of patch tokens where some have to leave.

    Attributes:
        tells_anew: whether it is asked before every block of a schedule; else its first word counts for all.
        needs_a_block: whether it looks into the block before.
    """

    tells_anew = False
    needs_a_block = False

    def forward(self, tokens: Tensor, count: int, attention: Attention, batch: PairBatch | None = None) -> Tensor:
        """Usefulness of each patch, high = keep.

        Args:
            tokens: (B, p + n, D), the prefix tokens and the patches that are there.
            count: n.
            attention: the class token's to the patches in the block before; None at the input.
            batch: the images, where they are known: in an evaluation, not in a model that `patchrank.prune` made.

        Returns:
            (B, n), float or int64.
        """
        raise NotImplementedError

    def multiply_adds(self, adapter: Adapter, schedule: Mapping[int, int]) -> int:
        """What an image costs it."""
        return 0
