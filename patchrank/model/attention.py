"""Attention with gates on keys, for every kind of tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value, with gates: (C, heads, q, d), twice (C, heads, n, d) -> the first's.

    Fused, except with gates and in bfloat16 on a CPU, where that is slow.

    Args:
        gates, bias: (C, n) each, or None; as of `Adapter.attention`.
        dropout: the share of attention weights that are dropped, the others raised to make up for it.
    """
    added = None if bias is None else bias.to(query.dtype)[:, None, None]  # (C, 1, 1, n)
    if gates is None and not (query.device.type == "cpu" and query.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value, added, dropout)
    # PyTorch's fused kernel takes twice the time of two matrix products in bfloat16; a chunk's weights fit the cache.
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (C, heads, q, n)
    logits = logits if added is None else logits + added
    if gates is None:
        weights = logits.softmax(dim=-1)
    else:
        exact = torch.promote_types(query.dtype, torch.float32)  # what is left of a weight may be small
        weights = logits.softmax(dim=-1, dtype=exact) * gates.to(exact)[:, None, None]
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(value.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def attention_of(query: Tensor, key: Tensor) -> Tensor:
    """How much queries attend to each key: (C, heads, q, d), (C, heads, n, d) -> (C, n) float32.

    The mean over heads and queries of softmax(query key^T / sqrt(d)).
    """
    logits = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5  # (C, heads, q, n)
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def by_head(x: Tensor, head_width: int) -> Tensor:
    """(C, n, heads d) -> (C, heads, n, d)."""
    return x.unflatten(-1, (-1, head_width)).transpose(1, 2)


def weighted_mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over tokens, each counted by its weight: (C, n, D), (C, n) -> (C, D)."""
    if weights is None:
        return x.mean(dim=1)
    weights = weights.to(x.dtype)
    return (x * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
