"""Pruning by chance: what every other way must beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from patchrank.data.pair_batches import PairBatch
from patchrank.pruning.selector import Attention, Selector


class Chance(Selector):
    """Uniform random numbers. For images that are known they depend on the key alone, and are the same in every run and
    batch; else they are others for every image and call."""

    def forward(self, tokens: Tensor, count: int, attention: Attention, batch: PairBatch | None = None) -> Tensor:
        """As `Selector.forward`."""
        if batch is None:
            return torch.rand(tokens.shape[0], count, device=tokens.device)
        return torch.stack([_drawn(key, count) for key in batch.keys]).to(tokens.device)


def _drawn(key: str, count: int) -> Tensor:
    """(count,) float32."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
