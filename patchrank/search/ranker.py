"""One shard in, one table of golden rankings out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from patchrank.data.loader import Batch
from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading, ShardJob, ShardResult
from patchrank.search.objective import SCORES
from patchrank.search.searcher import Searcher, SearchResult
from patchrank.store import rankings
from patchrank.store.partial import Partial
from patchrank.store.retry import Known


class ShardRanker:
    """Ranks the images of one shard after the other.

    The table depends on the shard, the searcher and the batches' size alone: whoever ranks a shard makes the same one.

    Args:
        searcher: the search, on its device.
        reading: how shards are read; whether a label is needed follows from the search.
    """

    def __init__(self, searcher: Searcher, reading: Reading) -> None:
        self.searcher = searcher
        self.reading = replace(reading, label_needed=SCORES[searcher.config.score].labels)

    def rank(
        self,
        shard: str,
        progress: Progress | None = None,
        device: AbstractContextManager[object] | None = None,
        known: Known | None = None,
        part: Partial | None = None,
    ) -> ShardResult:
        """Search the images of a shard.

        Args:
            progress: is kept up to date meanwhile.
            device: as `turn` in `ShardJob.run`.
            known: what the shard's table has already: the other samples alone are searched, and put in their places.
            part: as in `ShardJob.run`.
        """
        progress = progress or Progress()
        progress.cosine = [0.0] * len(self.searcher.keep_rates)

        def rows(batch: Batch) -> tuple[pa.Table, Tensor]:
            return self._search(shard, batch, progress)

        job = ShardJob("search", "the search", self.searcher.tower, self._no_rows(shard), rows)
        if known is None:
            return job.run(shard, self.reading, progress, device, part)
        found = replace(job, wanted=known.others).run(shard, self.reading, progress, device, part)
        return found if found.error else replace(found, table=known.joined(found.table))

    def _search(self, shard: str, batch: Batch, progress: Progress) -> tuple[pa.Table, Tensor]:
        labels = None
        if self.reading.label_needed:  # so every sample has one
            labels = torch.tensor([label for label in batch.labels if label is not None])
        result = self.searcher.search(batch.pixels, labels)
        rows = result.finite.nonzero()[:, 0].tolist()
        progress.candidates += result.candidates
        sums = result.pruned_cosine[rows].double().sum(dim=0).tolist()
        progress.cosine = [total + more for total, more in zip(progress.cosine, sums, strict=True)]
        keys, known = [batch.keys[row] for row in rows], [batch.labels[row] for row in rows]
        return self._table(shard, keys, known, result, rows), result.finite

    def _table(
        self, shard: str, keys: list[str], labels: list[int | None], result: SearchResult, rows: list[int]
    ) -> pa.Table:
        def take(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor[rows].numpy()

        found = rankings.Ranked(
            keys=keys,
            labels=labels,
            ranking=take(result.ranking),
            score=take(result.score),
            step=take(result.step),
            prediction=take(result.prediction),
            confidence=take(result.confidence),
            keep_rates=self.searcher.keep_rates,
            pruned_prediction=take(result.pruned_prediction),
            pruned_confidence=take(result.pruned_confidence),
            pruned_cosine=take(result.pruned_cosine),
        )
        return rankings.table(shard, found)

    def _no_rows(self, shard: str) -> pa.Table:
        """The table of a shard without an image: it has the same columns as every other."""
        tokens, rates = self.searcher.tower.num_tokens, len(self.searcher.keep_rates)
        ids, values = torch.empty(0, tokens, dtype=torch.int64), torch.empty(0, tokens)
        pruned, nothing = torch.empty(0, rates), torch.empty(0, dtype=torch.bool)
        result = SearchResult(ids, values, ids, None, None, None, None, pruned, nothing, 0)
        return self._table(shard, [], [], result, [])
