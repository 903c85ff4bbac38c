"""Pruning by golden rankings: what a perfect predictor would do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from patchrank.data.pair_batches import PairBatch
from patchrank.errors import UserError
from patchrank.pruning.selector import Attention, Selector
from patchrank.store import rankings
from patchrank.store.rankings import Rankings
from patchrank.tokens import by_rank


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
        self._current: Tensor | None = None
        corpus = rankings.open(folder) if isinstance(folder, str) else folder
        self.folder = corpus.folder
        found = corpus.tensors(["ranking"])
        self._rows = {key: row for row, key in enumerate(found["key"])}
        if len(self._rows) < len(found["key"]):
            raise UserError(f"{corpus.folder}: several images share a key, so a key does not tell the ranking")
        self._rankings = found["ranking"].to(torch.int16 if corpus.num_tokens < 2**15 else torch.int32)  # (images, N)

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

    def forward(self, tokens: Tensor, count: int, attention: Attention, batch: PairBatch | None = None) -> Tensor:
        """As `Selector.forward`; raises UserError where the images were not named, or are not as many."""
        ranking, shape = self._current, (tokens.shape[0], count)
        if ranking is None or tuple(ranking.shape) != shape:
            named = "none" if ranking is None else " x ".join(map(str, ranking.shape))
            raise UserError(
                f"golden rankings of {named} named for {shape[0]} images of {shape[1]} tokens: "
                "encode them inside `with golden.of(keys):`, a key an image"
            )
        return by_rank(ranking.to(tokens.device))


class OfBatches(Selector):
    """Golden rankings that batches bring along, as in an evaluation."""

    def forward(self, tokens: Tensor, count: int, attention: Attention, batch: PairBatch | None = None) -> Tensor:
        """As `Selector.forward`; raises UserError where the images have no rankings."""
        if batch is None or batch.ranking is None:
            raise UserError("these images have no golden rankings; run jobs/search.py on their shards first")
        return by_rank(batch.ranking.to(tokens.device))
