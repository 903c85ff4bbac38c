"""The Ray actor that ranks shards on one device."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import ray
import torch
from torch import Tensor

from cluster.metrics import Metrics
from cluster.places import Places
from cluster.pool import Failed, process_id
from cluster.progress import ShardReport
from patchrank.data import shards
from patchrank.data.images import decode, limit_pixels
from patchrank.data.progress import Progress
from patchrank.data.prototypes import class_sums
from patchrank.data.shard_job import ShardResult
from patchrank.data.shards import Sample, ShardError
from patchrank.model.tower import Tower
from patchrank.search.estimate import seconds_per_image
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import SearchConfig, Searcher
from patchrank.store import rankings, storage
from patchrank.store.folder import Folder, serialise


@dataclass(frozen=True)
class Shared:
    """What every actor needs: references to a `Tower` and to its preprocessing, and what an actor takes."""

    tower: ray.ObjectRef
    preprocess: ray.ObjectRef
    places: Places
    max_pixels: int


@dataclass(frozen=True)
class Plan:
    """What an actor must know to rank a shard; `classes` is (K, E) or None."""

    folder: Folder
    config: SearchConfig
    keep_rates: tuple[float, ...]
    classes: Tensor | None
    logit_scale: float
    images_per_batch: int
    candidates_per_batch: int | None
    limit: int | None


@dataclass(frozen=True)
class Timing:
    """What an actor found out about the cost of a shard.

    Attributes:
        samples: of the shard, up to the limit.
        seconds: of the search, an image.
        memory, gpu_memory: peak of the actor's process, and of the GPU, in bytes.
    """

    samples: int
    seconds: float
    memory: int
    gpu_memory: int


class OutputError(Exception):
    """The rankings cannot be written; those of no other shard could be either."""


# A disk that is full or over quota, read-only, or closed to us stays so; other errors may pass.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class RankingActor:
    """Holds the tower on one device and ranks the shards it is given."""

    def __init__(self) -> None:
        self._tower: Tower | None = None
        self._preprocess: Callable[..., Tensor] | None = None
        self._searcher: Searcher | None = None  # kept, for it knows how many candidates the memory has room for
        self._loading = threading.Lock()
        self._device = threading.Lock()  # one shard has it, the next is read and decoded meanwhile, the last written
        self._progress: dict[str, Progress] = {}  # by shard in work
        self._metrics: dict[str, Metrics] = {}

    def ready(self, shared: Shared) -> str:
        """Returns the process's id, once the model is on the device."""
        self._load(shared)
        return process_id()

    def _load(self, shared: Shared) -> tuple[Tower, Callable[..., Tensor]]:
        with self._loading:
            if self._tower is None or self._preprocess is None:
                torch.set_num_threads(shared.places.cpus)
                torch.backends.cudnn.allow_tf32 = False  # in convolutions PyTorch has it on, and float32 is not float32
                limit_pixels(shared.max_pixels)
                self._tower = ray.get(shared.tower).to("cuda" if shared.places.gpu else "cpu")
                self._preprocess = ray.get(shared.preprocess)
            return self._tower, self._preprocess

    def _search(self, tower: Tower, plan: Plan) -> Searcher:
        with self._loading:
            if self._searcher is None:
                chunk = plan.candidates_per_batch
                self._searcher = Searcher(tower, plan.config, plan.classes, plan.logit_scale, plan.keep_rates, chunk)
            return self._searcher

    @ray.method(concurrency_group="progress")
    def progress(self, shard: str) -> Progress | None:
        """How far a shard is; None where it is not in work."""
        if metrics := self._metrics.get(shard):
            metrics.tell()
        return self._progress.get(shard)

    @contextlib.contextmanager
    def _watched(self, shard: str) -> Iterator[Progress]:
        """What `progress` tells of a shard during the `with` statement."""
        self._progress[shard] = Progress()
        try:
            yield self._progress[shard]
        finally:
            self._progress.pop(shard, None)

    def rank(self, shared: Shared, shard: str, plan: Plan) -> ShardReport:
        """Rank a shard and write its table and its rejects. Raises OutputError where they cannot be written.

        Can be called from several threads: then the device goes from one shard to the next without a break.
        """
        with self._watched(shard) as progress:
            metrics = self._metrics[shard] = Metrics(progress)
            check_folder(plan.folder)
            tower, preprocess = self._load(shared)
            searcher = self._search(tower, plan)
            num_classes = None if plan.classes is None else len(plan.classes)
            threads = shared.places.threads
            ranker = ShardRanker(searcher, preprocess, num_classes, plan.images_per_batch, plan.limit, threads)
            ranked = ranker.rank(shard, progress, self._device)
            with progress.timed("write"):
                size = write(plan.folder, shard, ranked, rankings.encode)
            self._metrics.pop(shard, None)
            metrics.tell()
            return report(ranked, progress, size)

    def estimate(self, shared: Shared, shard: str, plan: Plan, seconds: float) -> Timing | Failed:
        """How long an image of a shard takes, from about so many seconds of timing; nothing is written."""
        tower, preprocess = self._load(shared)
        searcher = Searcher(tower, plan.config, None, keep_rates=plan.keep_rates, chunk=plan.candidates_per_batch)
        samples = 0
        first: Tensor | None = None
        try:
            for sample in shards.read(shard, plan.limit):
                samples += 1
                if first is None and isinstance(sample, Sample):
                    with contextlib.suppress(Exception):  # an image that cannot be decoded: the next one will do
                        first = preprocess(decode(sample.image))
        except ShardError as error:
            return Failed(str(error))
        if first is None:
            return Failed("holds no image that can be read")
        pixels = first.expand(min(plan.images_per_batch, samples), -1, -1, -1)
        took = seconds_per_image(searcher, pixels, seconds)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Timing(samples, took, memory, torch.cuda.max_memory_allocated() if shared.places.gpu else 0)

    def class_sums(
        self, shared: Shared, shard: str, num_classes: int | None, images_per_batch: int
    ) -> tuple[Tensor, Tensor, Progress] | Failed:
        """Sums of normalised embeddings by class, and the counts; `Failed` where the shard cannot be read."""
        tower, preprocess = self._load(shared)
        with self._watched(shard) as progress:
            try:
                threads = shared.places.threads
                sums, counts = class_sums(
                    tower, shard, preprocess, num_classes, images_per_batch, progress, threads, self._device
                )
            except ShardError as error:
                return Failed(str(error))
            return sums, counts, progress


def report(found: ShardResult, progress: Progress, size: int) -> ShardReport:
    """Of a shard whose files take so many bytes."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    process = f"{socket.gethostname()} {os.getpid()}"
    return ShardReport(progress, found.error, size, memory, process)


def write(
    folder: Folder,
    shard: str,
    found: ShardResult,
    encode: Callable[[pa.Table, Mapping[str, str]], bytes] = serialise,
) -> int:
    """Write what came of a shard, as `Folder.write` does; the number of bytes.

    Raises:
        OutputError: it cannot be written, nor could that of any other shard.
    """
    try:
        # It may have been taken away meanwhile, and writing would make another, without its settings.
        check_folder(folder)
        return folder.write(shard, found.table, found.rejects, found.error, encode)
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        raise OutputError(f"{folder.uri}: cannot be written: {storage.one_line(error)}") from None


def check_folder(folder: Folder) -> None:
    """Raises OutputError where this machine does not see the folder of the job."""
    if not folder.holds():
        raise OutputError(
            f"{folder.uri}: as seen from {socket.gethostname()} not the folder of this {folder.kind}; it must stay "
            "where it is, and with several nodes be in a bucket or on a shared disk"
        )
