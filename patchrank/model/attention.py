"""Attention with gates on keys, for every kind of tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_BYTES = 8 << 20  # at once, on a CPU


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value, with gates: (C, heads, q, d), twice (C, heads, n, d) -> the first's.

    Fused, except with gates, and in bfloat16 on a CPU: there PyTorch's kernel takes twice the time of two products of
    matrices on logits that fit the cache, so a few heads or images have theirs at a time.

    Args:
        gates, bias: (C, n) each, or None; as of `Adapter.attention`.
        dropout: the share of attention weights that are dropped, the others raised to make up for it.
    """
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if gates is None and not slow:
        added = None if bias is None else bias.to(query.dtype)[:, None, None]  # (C, 1, 1, n)
        return F.scaled_dot_product_attention(query, key, value, added, dropout)
    # What is traced or compiled is for other numbers of images, too.
    if gates is not None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _weighted(query, key, value, gates, bias, dropout)
    one = query.shape[2] * key.shape[2] * query.itemsize  # bytes of a head's logits
    images, heads = (max(1, LOGIT_BYTES // (one * each)) for each in (query.shape[1], 1))
    rows = []
    for image in range(0, len(query), images):
        row = slice(image, image + images)
        masked = None if bias is None else bias[row]
        parts = []
        for head in range(0, query.shape[1], heads):
            q, k, v = (x[row, head : head + heads] for x in (query, key, value))
            parts.append(_weighted(q, k, v, None, masked, dropout))
        rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _weighted(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, bias: Tensor | None, dropout: float
) -> Tensor:
    """`attend`, by two products of matrices."""
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (C, heads, q, n)
    logits = logits if bias is None else logits + bias.to(query.dtype)[:, None, None]
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
