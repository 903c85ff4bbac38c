"""How well a predicted usefulness agrees with a golden ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from patchrank.predictor import select


def matching_rate(usefulness: Tensor, ranking: Tensor, m: int) -> Tensor:
    """The share of the m best golden tokens that are among the m most useful predicted ones; m / N by chance.

    Args:
        usefulness: (B, N) by token id, high = keep.
        ranking: (B, N) int64, token ids, most useful first.
        m: 1 .. N.

    Returns:
        (B,) float32 in 0 .. 1.
    """
    predicted = torch.zeros_like(ranking).scatter_(1, select(usefulness, m), 1)  # (B, N), 1 where kept
    return predicted.gather(1, ranking[:, :m]).float().mean(dim=1)


def kendall_tau(usefulness: Tensor, ranking: Tensor) -> Tensor:
    """Kendall's rank correlation: (pairs in the golden order - pairs in the other) / all pairs; ties are in neither.

    Args:
        usefulness: (B, N) by token id, high = keep; N at least 2.
        ranking: (B, N) int64, token ids, most useful first.

    Returns:
        (B,) float32 in -1 .. 1; 0 on average by chance.
    """
    ordered = usefulness.float().gather(1, ranking)  # (B, N), best golden token first
    signs = (ordered[:, :, None] - ordered[:, None, :]).sign()  # (B, N, N)
    size = ranking.shape[1]
    return signs.triu(1).sum(dim=(1, 2)) / (size * (size - 1) / 2)
