"""What tells which patch tokens stay: the base of all ways of pruning that choose tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchrank.data.pair_batches import PairBatch


class Selector(nn.Module):
    """Tells the usefulness of patch tokens where some have to leave.

    Attributes:
        tells_anew: whether it is asked before every block of a schedule; else its first word counts for all.
        needs_a_block: whether it looks into the block before.
    """

    tells_anew = False
    needs_a_block = False

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any, batch: PairBatch | None = None) -> Tensor:
        """Usefulness of each patch, high = keep.

        Args:
            tokens: (B, 1 + n, D), the class token and the patches that are there.
            before: (B, 1 + n, D), the same before the previous block; None at the input.
            block: the previous block, or None.
            batch: the images, where they are known: in an evaluation, not in a model that `patchrank.prune` made.

        Returns:
            (B, n), float or int64.
        """
        raise NotImplementedError

    def multiply_adds(self, visual: Any, schedule: Mapping[int, int]) -> int:
        """What an image costs it."""
        return 0
