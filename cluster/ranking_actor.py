"""The Ray actor that ranks shards on one device, and times the search there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.actor import ShardCost, Shared, TowerActor, keeper
from cluster.pool import Failed
from patchrank.data.progress import Progress, ShardReport
from patchrank.data.prototypes import embedded
from patchrank.data.shard_job import Reading, ShardResult
from patchrank.data.shards import ShardError
from patchrank.search.config import SearchConfig
from patchrank.search.estimate import seconds_per_image
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import Searcher
from patchrank.store import partial, rankings
from patchrank.store.folder import Folder
from patchrank.store.partial import Partial
from patchrank.store.retry import Known


@dataclass(frozen=True)
class Plan:
    """What an actor must know to rank a shard; `classes` is (K, E) or None, `bank` (M, E) or None."""

    folder: Folder
    config: SearchConfig
    keep_rates: tuple[float, ...]
    classes: Tensor | None
    logit_scale: float
    images_per_batch: int
    candidates_per_batch: int | None
    limit: int | None
    keep_work: float = partial.SECONDS
    bank: Tensor | None = None
    again: frozenset[str] = frozenset()  # finished shards of which what was rejected is tried again


class RankingActor(TowerActor):
    """Holds the tower on one device and ranks the shards it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._ranker: ShardRanker | None = None  # kept: its searcher knows how many candidates the memory has room for

    def _ranking(self, shared: Shared, plan: Plan) -> ShardRanker:
        tower, preprocess = self._load(shared)
        with self._loading:
            if self._ranker is None:
                chunk = plan.candidates_per_batch
                searcher = Searcher(
                    tower, plan.config, plan.classes, plan.logit_scale, plan.keep_rates, chunk, plan.bank
                )
                num_classes = None if plan.classes is None else len(plan.classes)
                threads = shared.places.threads
                reading = Reading(preprocess, plan.images_per_batch, plan.limit, threads, num_classes)
                self._ranker = ShardRanker(searcher, reading)
            return self._ranker

    def rank(self, shared: Shared, shard: str, plan: Plan) -> ShardReport | Failed:
        """Rank a shard and write its table and its rejects; `Failed` where it was finished, and cannot be read by now.

        Raises:
            OutputError: they cannot be written.
        """
        known = Known(plan.folder, shard) if shard in plan.again else None

        def work(progress: Progress, part: Partial) -> ShardResult:
            found = self._ranking(shared, plan).rank(shard, progress, self._device, known, part)
            if known is not None and found.error:
                raise ShardError(found.error)  # what is there stays
            return found

        # Of a try of rejects the limit of pixels is not that of the folder, and the rows are not all.
        about = {"max_pixels": shared.max_pixels, "again": known is not None}
        part = Partial(plan.folder, shard, plan.keep_work, about, keeper(plan.folder))
        try:
            return self._made(shard, plan.folder, work, part, rankings.encode)
        except ShardError as error:
            return Failed(str(error))

    def embeddings(self, shared: Shared, shard: str, count: int, images_per_batch: int) -> Tensor | Failed:
        """Of a shard's first so many samples the embeddings, (M, E) float32; `Failed` where it cannot be read."""
        tower, preprocess = self._load(shared)
        with self._watched(shard) as progress:
            try:
                reading = Reading(preprocess, images_per_batch, count, shared.places.threads)
                parts = [found for found, _ in embedded(tower, shard, reading, progress, self._device)]
            except ShardError as error:
                return Failed(str(error))
            return torch.cat([torch.empty(0, tower.embed_dim), *(part.float() for part in parts)])

    def estimate(self, shared: Shared, shard: str, plan: Plan, seconds: float) -> ShardCost | Failed:
        """How long an image of a shard takes, from about so many seconds of timing; nothing is written."""
        counted = self._counted(shared, shard, plan.limit)
        if isinstance(counted, Failed):
            return counted
        samples, first, _ = counted
        tower, _ = self._load(shared)
        searcher = Searcher(tower, plan.config, None, keep_rates=plan.keep_rates, chunk=plan.candidates_per_batch)
        pixels = first.expand(min(plan.images_per_batch, samples), -1, -1, -1)
        took = seconds_per_image(searcher, pixels, seconds)
        return ShardCost(samples, took, *shared.places.peak_bytes())
