"""How well the patches that stay stand for all: what the score "patches" is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.model.tower import Tower
from patchrank.tokens import nearest


class PatchCosines:
    """Cosines between the final features of an image's patches and what stands for them where some have left.

    For a patch stands the nearest one that is left (`patchrank.on_grid`), with the features that it has without the
    others. They take the place of embeddings in a search: (C, N) numbers, 1 where nothing has changed.

    Args:
        tower: the image tower, cut where tokens leave.
        tokens: (B, p + N, D) of a batch of images, from `Tower.prefix`.
        chunk: images a forward pass.
    """

    def __init__(self, tower: Tower, tokens: Tensor, chunk: int) -> None:
        self.tower = tower
        parts = [tower.patches(part) for part in tokens.split(chunk)]
        self.whole = F.normalize(torch.cat(parts).float(), dim=-1)  # (B, N, D)

    def __call__(self, tokens: Tensor, kept: Tensor | None, image: Tensor) -> Tensor:
        """As `Tower.suffix`: (C, n) token ids and the images that they are of -> (C, N) float32."""
        if kept is None:
            kept = torch.arange(self.tower.num_tokens, device=image.device).expand(len(image), -1)
        found = F.normalize(self.tower.patches(tokens, kept, image).float(), dim=-1)  # (C, n, D)
        stands = nearest(kept, self.tower.grid)  # (C, N)
        found = found.gather(1, stands[..., None].expand(-1, -1, found.shape[2]))  # (C, N, D)
        return (found * self.whole[image]).sum(dim=-1)
