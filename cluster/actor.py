"""The Ray actor that ranks shards on one device."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from cluster.places import Places
from cluster.pool import Failed
from patchrank import rankings, storage
from patchrank.ranker import Progress, ShardRanker, class_sums
from patchrank.search import SearchConfig, Searcher
from patchrank.shards import ShardError
from patchrank.vit import Tower


@dataclass(frozen=True)
class Shared:
    """What every actor needs: references to a `Tower` and to its preprocessing, and what an actor takes."""

    tower: ray.ObjectRef
    preprocess: ray.ObjectRef
    places: Places


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
    candidates_per_batch: int | None
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
        process: which process that was, on which machine.
    """

    progress: Progress
    error: str | None
    seconds: float
    bytes: int
    memory: int
    process: str


class OutputError(Exception):
    """The rankings cannot be written; those of no other shard could be either."""


# A disk that is full or over quota, read-only, or closed to us stays so; other errors may pass.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class RankingActor:
    """Holds the tower on one device and ranks the shards it is given."""

    def __init__(self) -> None:
        self._tower: Tower | None = None
        self._preprocess: Callable[..., Tensor] | None = None
        self._progress = Progress()

    def ready(self, shared: Shared) -> None:
        """Returns once the model is on the device."""
        self._load(shared)

    def _load(self, shared: Shared) -> tuple[Tower, Callable[..., Tensor]]:
        if self._tower is None or self._preprocess is None:
            torch.set_num_threads(shared.places.cpus)
            self._tower = ray.get(shared.tower).to("cuda" if shared.places.gpu else "cpu")
            self._preprocess = ray.get(shared.preprocess)
        return self._tower, self._preprocess

    @ray.method(concurrency_group="progress")
    def progress(self) -> Progress:
        """How far the shard in work is."""
        return self._progress

    def rank(self, shared: Shared, shard: str, plan: Plan) -> ShardReport:
        """Rank a shard and write its table and its rejects. Raises OutputError where they cannot be written."""
        start, self._progress = time.monotonic(), Progress()
        if not rankings.holds(plan.folder, plan.fingerprint):  # a local folder of another machine, or one taken away
            raise OutputError(
                f"{plan.folder}: as seen from {socket.gethostname()} not the folder of this search; with several nodes "
                "it must be in a bucket or on a shared disk"
            )
        tower, preprocess = self._load(shared)
        searcher = Searcher(
            tower, plan.config, plan.classes, plan.logit_scale, plan.keep_rates, plan.candidates_per_batch
        )
        num_classes = None if plan.classes is None else len(plan.classes)
        ranker = ShardRanker(searcher, preprocess, num_classes, plan.images_per_batch, plan.limit)
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
            if error.errno not in _LASTING:
                raise
            raise OutputError(f"{plan.folder}: cannot be written: {storage.one_line(error)}") from None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        process = f"{socket.gethostname()} {os.getpid()}"
        return ShardReport(self._progress, ranked.error, time.monotonic() - start, size, memory, process)

    def class_sums(
        self, shared: Shared, shard: str, num_classes: int | None, images_per_batch: int
    ) -> tuple[Tensor, Tensor, Progress] | Failed:
        """Sums of normalised embeddings by class, and the counts; `Failed` where the shard cannot be read."""
        self._progress = Progress()
        tower, preprocess = self._load(shared)
        try:
            sums, counts = class_sums(tower, shard, preprocess, num_classes, images_per_batch, self._progress)
        except ShardError as error:
            return Failed(str(error))
        return sums, counts, self._progress
