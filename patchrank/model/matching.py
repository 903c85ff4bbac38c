"""Which tokens are alike, and become one: bipartite soft matching, of token merging (ToMe; Bolya et al., 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(
    x: Tensor, sizes: Tensor, metric: Tensor, merges: int, first: int = 1, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every second patch looks for the most similar one of the others; the best `merges` of these pairs become a token.

    That is their mean, weighted by how many patches each stands for.

    Args:
        x: (B, n, D); all tokens that are not said to merge stay as they are.
        sizes: (B, n) float32 or float64, the patches that each token stands for, or its gate; a gradient flows to them.
        metric: (B, n, d), whose cosine tells how alike two tokens are.
        merges: 1 .. count // 2.
        first, count: those that merge are first .. first + count - 1; to the last one where None.

    Returns:
        (B, n - merges, D), (B, n - merges), and (B, n - merges) int64, where each token stood: those before the first,
        those that looked and stay, all that were looked at, and those behind. A token that others merged into is still
        where it was.
    """
    end = x.shape[1] if count is None else first + count
    metric = F.normalize(metric[:, first:end], dim=-1)
    alike = metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)  # (B, look, others)
    best, partner = alike.max(dim=-1)  # (B, look) each
    order = best.argsort(dim=-1, descending=True)  # (B, look)
    leaving = order[:, :merges]  # (B, merges)
    staying = order[:, merges:].sort(dim=-1).values  # (B, look - merges)
    target = partner.gather(1, leaving)  # (B, merges)
    # Whole rows: a gather goes number by number, and takes ten times as long on a CPU.
    rows = torch.arange(x.shape[0], device=x.device)[:, None]  # the shape: torch.export takes len(x) for a constant
    looks, others = first + 1 + 2 * leaving, x[:, first:end:2]  # (B, merges), (B, others, D)
    weights, gone = sizes[:, first:end:2], sizes.gather(1, looks)  # (B, others), (B, merges)
    width = x.shape[2]
    summed = others * weights[..., None]
    summed = summed.scatter_add(1, target[..., None].expand(-1, -1, width), x[rows, looks] * gone[..., None])
    total = weights.scatter_add(1, target, gone)  # (B, others)
    merged = (summed / total[..., None]).to(x.dtype)  # (B, others, D)
    stood = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)  # (B, n)
    stays = first + 1 + 2 * staying  # (B, look - merges)
    tokens = torch.cat([x[:, :first], x[rows, stays], merged, x[:, end:]], dim=1)
    sizes = torch.cat([sizes[:, :first], sizes.gather(1, stays), total, sizes[:, end:]], dim=1)
    return tokens, sizes, torch.cat([stood[:, :first], stays, stood[:, first:end:2], stood[:, end:]], dim=1)
