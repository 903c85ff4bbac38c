"""Which tokens stay: how many at a keep rate, which by a usefulness, and how well that agrees with a golden ranking."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING

from patchrank.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def tokens_kept(num_tokens: int, keep: float) -> int:
    """The number of tokens that stay at a keep rate: keep * num_tokens, rounded half up."""
    return math.floor(keep * num_tokens + 0.5)


def count_kept(num_tokens: int, keep: float, flag: str = "--keep") -> int:
    """How many tokens stay at a keep rate. Raises UserError, naming the flag, where it is above 1 or leaves nothing."""
    if not isinstance(keep, numbers.Real):
        raise UserError(f"{flag} {keep!r}: must be a number")
    if not 0 < keep <= 1 or tokens_kept(num_tokens, keep) == 0:
        raise UserError(f"{flag} {keep}: must be at most 1 and leave at least one of {num_tokens} tokens")
    return tokens_kept(num_tokens, keep)


def select(usefulness: Tensor, count: int) -> Tensor:
    """The most useful tokens of each image: (B, N) -> (B, count) int64, ascending ids; the lower id where they tie."""
    return usefulness.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def by_rank(ranking: Tensor) -> Tensor:
    """A ranking as usefulness: (B, N) token ids, most useful first -> (B, N) int64 by token id, N .. 1, high = keep."""
    return ranking.shape[1] - ranking.argsort(dim=1)  # sorting a permutation gives the place of each token


def matching_rate(usefulness: Tensor, ranking: Tensor, m: int) -> Tensor:
    """The share of the m best golden tokens that are among the m most useful predicted ones; m / N by chance.

    Args:
        usefulness: (B, N) by token id, high = keep.
        ranking: (B, N) int64, token ids, most useful first.
        m: 1 .. N.

    Returns:
        (B,) float32 in 0 .. 1.
    """
    predicted = ranking.new_zeros(ranking.shape).scatter_(1, select(usefulness, m), 1)  # (B, N), 1 where kept
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


def by_distance(grid: tuple[int, int]) -> Tensor:
    """All patches by their distance from each one, as `nearest` has it: (N, N) int64 token ids, itself first."""
    import torch

    ids = torch.arange(grid[0] * grid[1])
    down, across = ids // grid[1], ids % grid[1]
    distance = (down[:, None] - down) ** 2 + (across[:, None] - across) ** 2  # (N, N)
    return (distance * len(ids) + ids).argsort(dim=1)


def nearest(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """The place of the nearest patch that is left, for every patch of an image.

    Args:
        ids: (B, n) int64, the patches that are left, in any order.
        grid: rows and columns of patches.

    Returns:
        (B, N) int64 in 0 .. n-1: by the distance between the middles of patches; of several, that with the lowest id.
    """
    import torch  # what else is here does without, and it takes seconds

    rows, columns = grid
    order = ids.argsort(dim=1)  # (B, n)
    there, wanted = ids.gather(1, order), torch.arange(rows * columns, device=ids.device)
    down = (there // columns)[:, None] - (wanted // columns)[None, :, None]  # (B, N, n)
    across = (there % columns)[:, None] - (wanted % columns)[None, :, None]
    # No two are equal so, and argmin does not promise the first of equals.
    distance = (down**2 + across**2) * ids.shape[1] + torch.arange(ids.shape[1], device=ids.device)
    return order.gather(1, distance.argmin(dim=2))
