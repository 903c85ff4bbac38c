"""The Ray actor that ranks shards on one device."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from cluster.places import Places
from patchrank import rankings, storage
from patchrank.ranker import Progress, ShardRanker, class_sums
from patchrank.search import SearchConfig, Searcher
from patchrank.vit import Tower


@dataclass(frozen=True)
class Plan:
    """What an actor must know to rank a shard; `classes` is (K, E) or None."""

    folder: str
    fingerprint: str
    config: SearchConfig
    keep_rates: tuple[float, ...]
    classes: Tensor | None
    logit_scale: float
    images_per_batch: int
    candidates_per_batch: int
    limit: int | None


@dataclass(frozen=True)
class ShardReport:
    """What an actor says of a shard that it has finished.

    Attributes:
        progress: images, rejects, candidates.
        error: why the shard could not be read to its end, or None.
        seconds: from the first byte read to the table written.
        bytes: of the table on disk.
        memory: peak memory of the actor's process so far, in bytes.
    """

    progress: Progress
    error: str | None
    seconds: float
    bytes: int
    memory: int


class OutputError(Exception):
    """The rankings cannot be written; no other shard could be either."""


class RankingActor:
    """Holds the tower on one device and ranks the shards it is given."""

    def __init__(self, shared: Sequence[ray.ObjectRef], places: Places) -> None:
        torch.set_num_threads(places.cpus)
        tower, self._preprocess = ray.get(list(shared))
        self._tower: Tower = tower.to("cuda" if places.gpu else "cpu")
        self._progress = Progress()

    def ready(self) -> None:
        """Returns once the model is loaded."""

    @ray.method(concurrency_group="progress")
    def progress(self) -> Progress:
        """How far the shard in work is."""
        return self._progress

    def rank(self, shard: str, plan: Plan) -> ShardReport:
        """Rank a shard and write its table and its rejects. Raises OutputError where they cannot be written."""
        start, self._progress = time.monotonic(), Progress()
        searcher = Searcher(
            self._tower, plan.config, plan.classes, plan.logit_scale, plan.keep_rates, plan.candidates_per_batch
        )
        num_classes = None if plan.classes is None else len(plan.classes)
        ranker = ShardRanker(searcher, self._preprocess, num_classes, plan.images_per_batch, plan.limit)
        ranked = ranker.rank(shard, self._progress)
        size = 0
        try:
            if ranked.error:  # first, lest the part that could be read should ever pass for the whole
                rankings.record_failure(plan.folder, shard, ranked.error)
            if ranked.error is None or len(ranked.table) or ranked.rejects:
                size = rankings.write(plan.folder, shard, ranked.table, ranked.rejects, plan.fingerprint)
            if ranked.error is None:
                rankings.clear_failure(plan.folder, shard)
        except OSError as error:
            raise OutputError(f"{plan.folder}: cannot be written: {storage.one_line(error)}") from None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return ShardReport(self._progress, ranked.error, time.monotonic() - start, size, memory)

    def class_sums(self, shard: str, num_classes: int | None, images_per_batch: int) -> tuple[Tensor, Tensor, Progress]:
        """Sums of normalised embeddings by class, and the counts. Raises ShardError where the shard cannot be read."""
        self._progress = Progress()
        sums, counts = class_sums(self._tower, shard, self._preprocess, num_classes, images_per_batch, self._progress)
        return sums, counts, self._progress
