"""Learning for models that read patches: how well those that stay stand for all, with a gradient to their usefulness.

For every patch of the whole image stands the nearest one that is left, as the score "patches" has it. With gates g of
the patches by their distance, nearest first, the k-th stands for it with weight g_k (1 - g_1) ... (1 - g_{k-1}): 1 for
the nearest that stays and 0 for all others, and the gradient tells a gate what its patch would stand for better than
the one behind it. A second gradient goes through the gates as keys, as where the embedding teaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.data.pair_batches import PairBatch
from patchrank.model.tower import Tower
from patchrank.search.patch_cosines import PatchCosines
from patchrank.tokens import by_distance, select
from patchrank.training.gating import gates, standardized, weight


def cosines(tower: Tower, tokens: Tensor, usefulness: Tensor, patches: int, noise: Tensor | float = 0.0) -> Tensor:
    """The cosines that `PatchCosines` gives where the most useful patches stay, with a gradient to the usefulness.

    Args:
        tower: the frozen model.
        tokens: (B, p + N, D) before the cut.
        usefulness, patches, noise: as of `gating.embeddings`.

    Returns:
        (B, N) float32.
    """
    with torch.no_grad():
        whole = F.normalize(tower.patches(tokens).float(), dim=-1)  # (B, N, D)
    ids, there = gates(standardized(usefulness) + noise, patches)  # (B, n) each
    left = F.normalize(tower.patches(tokens, ids, gates=there).float(), dim=-1)  # (B, n, D)
    # By token id; what is not there has gate 0, and stands for nothing.
    found = torch.zeros_like(whole).scatter(1, ids[..., None].expand_as(left), left)  # (B, N, D)
    gate = whole.new_zeros(usefulness.shape).scatter(1, ids, there.to(whole))  # (B, N)
    order = by_distance(tower.grid).to(ids.device)  # (N, N)
    near = gate[:, order]  # (B, N, N), of each patch those by their distance
    none_before = F.pad((1 - near).cumprod(dim=2)[..., :-1], (1, 0), value=1.0)
    similar = (whole @ found.transpose(1, 2)).gather(2, order.expand_as(near))  # (B, N, N)
    return (near * none_before * similar).sum(dim=2)


def lacking(found: Tensor, keep: float) -> Tensor:
    """How far patches are from those of the unpruned model, by its usual size: (B, N) cosines -> (B,) float32."""
    return (1 - found.mean(dim=1)) * weight(keep)


@torch.no_grad()
def figures(
    tower: Tower,
    module: nn.Module,
    counts: Mapping[float, int],
    batches: Iterable[PairBatch],
    add: Callable[[Tensor], Tensor],
) -> dict[float, float]:
    """The mean cosine of patches to what stands for them, by keep rate; without images nothing.

    Args:
        module: tells usefulness of tokens before the cut.
        counts: how many patches stay, by keep rate.
        add: adds the sums of all workers.
    """
    sums = torch.zeros(len(counts) + 1, dtype=torch.float64)
    for batch in batches:
        tokens = tower.prefix(batch.pixels)  # (B, p + N, D)
        usefulness, rows = module(tokens), torch.arange(len(tokens), device=tokens.device)
        whole = PatchCosines(tower, tokens, len(tokens))
        for place, count in enumerate(counts.values()):
            sums[place] += whole(tokens, select(usefulness, count), rows).mean(dim=1).double().sum().item()
        sums[-1] += len(tokens)
    *totals, images = add(sums).tolist()
    return {keep: total / images for keep, total in zip(counts, totals, strict=True)} if images else {}
