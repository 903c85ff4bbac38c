"""What tells a pruned tower which patch tokens stay: a predictor, golden rankings, class-token attention, chance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.pruning.baselines import class_attention
from patchrank.pruning.predictor import Predictor
from patchrank.store import rankings
from patchrank.store.corpus import Rankings


class Selector(nn.Module):
    """Tells the usefulness of patch tokens where some have to leave.

    Attributes:
        tells_anew: whether it is asked before every block of a schedule; else its first word counts for all.
        needs_a_block: whether it looks into the block before.
    """

    tells_anew = False
    needs_a_block = False

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any) -> Tensor:
        """Usefulness of each patch, high = keep.

        Args:
            tokens: (B, 1 + n, D), the class token and the patches that are there.
            before: (B, 1 + n, D), the same before the previous block; None at the input.
            block: the previous block, or None.

        Returns:
            (B, n) float.
        """
        raise NotImplementedError

    def multiply_adds(self, visual: Any, schedule: Mapping[int, int]) -> int:
        """What an image costs it."""
        return 0


class PredictorSelector(Selector):
    """Asks a predictor once, of all tokens before the cut."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any) -> Tensor:
        """As `Selector.forward`."""
        return self.predictor(tokens)

    def multiply_adds(self, visual: Any, schedule: Mapping[int, int]) -> int:
        """As `Selector.multiply_adds`."""
        return self.predictor.multiply_adds() if schedule else 0


class ClassAttentionSelector(Selector):
    """How much the class token attends to each patch in the block before, as in EViT (Liang et al., 2022)."""

    tells_anew = True
    needs_a_block = True

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any) -> Tensor:
        """As `Selector.forward`."""
        assert before is not None
        return class_attention(block, before)

    def multiply_adds(self, visual: Any, schedule: Mapping[int, int]) -> int:
        """As `Selector.multiply_adds`. The block's keys are computed twice, for it does not give them away."""
        width, there, total = visual.transformer.width, visual.grid_size[0] * visual.grid_size[1], 0
        for kept in schedule.values():
            total += (2 * there + 3) * width * width + (there + 1) * width
            there = kept
        return total


class RandomSelector(Selector):
    """Chance: other tokens for every image and call."""

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any) -> Tensor:
        """As `Selector.forward`."""
        return torch.rand(tokens.shape[0], tokens.shape[1] - 1, device=tokens.device)


class Golden(Selector):
    """Golden rankings of images that were searched, which have to be named:

    golden = patchrank.Golden("rankings")
    patchrank.prune(model, golden, keep=0.6)
    with golden.of(keys):
        embeddings = model.encode_image(images)

    Args:
        folder: of the rankings; all of them are kept in memory, 2 N bytes an image.

    Raises:
        UserError: no rankings there, or two of one key.
    """

    def __init__(self, folder: str | Rankings) -> None:
        super().__init__()
        corpus = rankings.open(folder) if isinstance(folder, str) else folder
        self.folder = corpus.folder
        found = corpus.tensors(["ranking"])
        self._rows = {key: row for row, key in enumerate(found["key"])}
        if len(self._rows) < len(found["key"]):
            raise UserError(f"{corpus.folder}: several images share a key, so a key does not tell the ranking")
        self._rankings = found["ranking"].to(torch.int16 if corpus.num_tokens < 2**15 else torch.int32)  # (images, N)
        self._current: Tensor | None = None

    @contextlib.contextmanager
    def of(self, keys: Sequence[str]) -> Iterator[None]:
        """The images of the next calls, in their order. Raises UserError for a key without a ranking."""
        missing = [key for key in keys if key not in self._rows]
        if missing:
            raise UserError(f"{self.folder}: holds no ranking of {missing[0]!r}")
        self._current = self._rankings[[self._rows[key] for key in keys]].long()  # (B, N)
        try:
            yield
        finally:
            self._current = None

    def forward(self, tokens: Tensor, before: Tensor | None, block: Any) -> Tensor:
        """As `Selector.forward`; raises UserError where the images were not named, or are not as many."""
        ranking, shape = self._current, (tokens.shape[0], tokens.shape[1] - 1)
        if ranking is None or tuple(ranking.shape) != shape:
            named = "none" if ranking is None else " x ".join(map(str, ranking.shape))
            raise UserError(
                f"golden rankings of {named} named for {shape[0]} images of {shape[1]} tokens: "
                "encode them inside `with golden.of(keys):`, a key an image"
            )
        places = torch.arange(shape[1], 0, -1, device=tokens.device).expand(shape)  # (B, N), the best highest
        return torch.zeros_like(places).scatter(1, ranking.to(tokens.device), places)


METHODS: dict[str, type[Selector]] = {"class-attention": ClassAttentionSelector, "random": RandomSelector}
"""Selectors that need nothing, by name."""
