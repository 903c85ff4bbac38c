"""Other ways to tell the usefulness of patch tokens, behind one interface: (tokens, batch) -> (B, N), high = keep."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from torch import Tensor

from patchrank.errors import UserError
from patchrank.pairs import PairBatch
from patchrank.predictor import Predictor, targets
from patchrank.vit import Tower

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
        attn = self.block.attn
        x = self.block.ln_1(self.before.prefix(batch.pixels))  # (B, 1 + N, D)
        projected = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        query, key = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in projected[:2])
        if isinstance(attn, Attention):
            query, key = attn.ln_q(query), attn.ln_k(key)  # (B, heads, 1 + N, D / heads)
        logits = query[:, :, :1].float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1).mean(dim=1)[:, 0, 1:]  # (B, N)
