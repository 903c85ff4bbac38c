"""Other ways to tell the usefulness of patch tokens, behind one interface: (tokens, batch) -> (B, N), high = keep."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchrank.data.pair_batches import PairBatch
from patchrank.errors import UserError
from patchrank.model.tower import Tower, project
from patchrank.pruning.predictor import Predictor, targets

Usefulness = Callable[[Tensor, PairBatch], Tensor]
"""(B, 1 + N, D) tokens before the cut, and the images they are of -> (B, N) float32 usefulness."""


def predicted(predictor: Predictor) -> Usefulness:
    """A predictor behind the interface of the baselines."""
    return lambda tokens, batch: predictor(tokens)


def golden(tokens: Tensor, batch: PairBatch) -> Tensor:
    """The golden rankings themselves: what a perfect predictor would say.

    Raises:
        UserError: the images were never ranked.
    """
    if batch.ranking is None or batch.score is None:
        raise UserError("these images have no golden rankings; run jobs/search.py on their shards first")
    return targets(batch.ranking, batch.score, "rank").to(tokens.device)


def random(tokens: Tensor, batch: PairBatch) -> Tensor:
    """Uniform random numbers that depend on the key of the image alone: the same in every run and batch."""

    def drawn(key: str) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
        return torch.rand(tokens.shape[1] - 1, generator=torch.Generator().manual_seed(seed))

    return torch.stack([drawn(key) for key in batch.keys]).to(tokens.device)


class ClassAttention:
    """How much the class token attends to each patch in the last block before the cut, as in EViT (Liang et al., 2022).

    The mean over heads of softmax(q k^T / sqrt(d)). EViT has this from the block itself; here the blocks before it run
    a second time, because `Tower.prefix` does not keep it.

    Raises:
        UserError: there is no block before the cut.
    """

    def __init__(self, tower: Tower) -> None:
        if tower.cut == 0:
            raise UserError(
                "--cut 0: there is no block before the cut whose class-token attention could rank the tokens"
            )
        self.block = tower.visual.transformer.resblocks[tower.cut - 1]
        self.before = copy.copy(tower)  # shares the weights
        self.before.cut = tower.cut - 1

    @torch.no_grad()
    def __call__(self, tokens: Tensor, batch: PairBatch) -> Tensor:
        """(B, N) float32: the attention to each patch."""
        return class_attention(self.block, self.before.prefix(batch.pixels))


def class_attention(block: Any, x: Tensor) -> Tensor:
    """How much the class token attends to each other token in a block: (B, 1 + n, D) before it -> (B, n) float32."""
    query, key, _ = project(block.attn, block.ln_1(x), class_token_only=True)  # (B, heads, 1 and 1 + n, D / heads)
    logits = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, heads, 1, 1 + n)
    return logits.softmax(dim=-1).mean(dim=1)[:, 0, 1:]
