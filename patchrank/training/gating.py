"""Learning through the frozen model: which tokens stay is decided by gates that are hard, and have a gradient.

The predictor's usefulness u, z-scored, with noise that fades away, gives the m most useful tokens gate 1 and the others
gate 0. Backwards the gate is sigmoid((u - t) / TEMPERATURE), t the threshold between the two, so that a token just out
of the number learns what the embedding would have gained by it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.model.adapter import NOTHING, Along
from patchrank.model.tower import Tower

TEMPERATURE = 0.5  # in standard deviations of the usefulness
NOISE = 0.3  # the scale of the logistic noise at first, likewise
# Share of all tokens, the next in usefulness, that are there for the gradient; the rest is left out for real.
NEXT = 0.3


def draw_keep(seed: int, step: int, keep_rates: Sequence[float]) -> float:
    """The keep rate of a step: the same for every number of workers and for a run that goes on."""
    return random.Random(f"{seed} {step}").choice(list(keep_rates))


def draw_noise(seed: int, step: int, keys: Sequence[str], num_tokens: int) -> Tensor:
    """Standard logistic noise, (B, N) float32, of images by their keys: it depends on seed, step and key alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(f"{seed} {step} {key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) % 2**63)
        rows.append(torch.rand(num_tokens, generator=generator))
    return torch.stack(rows).clamp(1e-6, 1 - 1e-6).logit()


def standardized(usefulness: Tensor) -> Tensor:
    """Usefulness, (B, N), with mean 0 and deviation 1 in every image."""
    centred = usefulness - usefulness.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)


def gates(usefulness: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that may matter at a keep rate, and their gates.

    Args:
        usefulness: (B, N) float32, standardized, noise included.
        count: m, how many stay.

    Returns:
        (B, n) int64 token ids, the most useful first, m <= n <= N, and (B, n) float32 gates: 1 for the first m, 0 for
        the others, with the gradient of sigmoid((u - t) / TEMPERATURE).
    """
    total = usefulness.shape[1]
    there = min(total, count + round(NEXT * total))
    ordered, ids = usefulness.sort(dim=1, descending=True, stable=True)  # (B, N)
    last, following = ordered[:, count - 1], ordered[:, min(count, total - 1)]
    threshold = ((last + following) / 2).detach()[:, None]  # (B, 1)
    soft = ((ordered[:, :there] - threshold) / TEMPERATURE).sigmoid()  # (B, n)
    hard = (torch.arange(there, device=soft.device) < count).to(soft)  # (n,)
    return ids[:, :there], hard + (soft - soft.detach())


def weight(keep: float) -> float:
    """What a loss of cosine counts at a keep rate.

    1 - cosine about doubles with every tenth of the tokens that leaves, from keep 0.8 to 0.4, on every model that was
    tried; it is divided by that, so that all keep rates have a say.
    """
    return 2 ** (10 * keep)


def lacking(embeddings: Tensor, wanted: Tensor, keep: float) -> Tensor:
    """How far embeddings are from those of the unpruned model, by its usual size: (B, E) twice -> (B,) float32."""
    return (1 - F.cosine_similarity(embeddings.float(), wanted.float(), dim=1)) * weight(keep)


def embeddings(
    tower: Tower,
    tokens: Tensor,
    usefulness: Tensor,
    patches: int,
    noise: Tensor | float = 0.0,
    along: Along = NOTHING,
) -> Tensor:
    """Embeddings of images of which the most useful patches stay, with a gradient to the usefulness of all near them.

    Args:
        tower: the frozen model.
        tokens: (B, p + N + b, D) before the cut; the b learnable ones always stay, and a gradient flows to them.
        usefulness: (B, N), high = keep.
        patches: m, how many stay.
        noise: (B, N), added to the standardized usefulness.
        along: as of `Adapter.through`; tokens with a gate of 0 do not merge.

    Returns:
        (B, E), not normalised.
    """
    ids, there = gates(standardized(usefulness) + noise, patches)  # (B, n) each
    return tower.suffix(tokens, ids, gates=there, along=along)
