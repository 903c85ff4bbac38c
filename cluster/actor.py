"""The Ray actor that holds the tower on one device; those that rank and evaluate shards are of its kind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from cluster.metrics import Metrics
from cluster.places import Places
from cluster.pool import Failed, process_id
from patchrank.data import decoding, shards
from patchrank.data.decoding import Undecodable
from patchrank.data.images import limit_pixels
from patchrank.data.progress import Progress, ShardReport
from patchrank.data.prototypes import class_sums
from patchrank.data.shard_job import Reading, ShardResult
from patchrank.data.shards import Sample, ShardError
from patchrank.model.tower import Tower
from patchrank.store import storage
from patchrank.store.folder import Encode, Folder, serialise
from patchrank.store.partial import Partial


@dataclass(frozen=True)
class Shared:
    """What every actor needs: references to a `Tower` and to its preprocessing, and what an actor takes."""

    tower: ray.ObjectRef
    preprocess: ray.ObjectRef
    places: Places
    max_pixels: int


@dataclass(frozen=True)
class ShardCost:
    """What an actor found out about the cost of a shard.

    Attributes:
        samples: of the shard, up to the limit.
        seconds: of the job, an image.
        memory, gpu_memory: peak of the actor's process, and of the GPU, in bytes.
    """

    samples: int
    seconds: float
    memory: int
    gpu_memory: int


class OutputError(Exception):
    """A table cannot be written; that of no other shard could be either."""


# A disk that is full or over quota, read-only, or closed to us stays so; other errors may pass.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class TowerActor:
    """Holds the tower on one device, and has the shards it is given worked on there."""

    def __init__(self) -> None:
        self._tower: Tower | None = None
        self._preprocess: Callable[..., Tensor] | None = None
        self._sees_folder = False
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

    def _made(
        self,
        shard: str,
        folder: Folder,
        work: Callable[[Progress, Partial], ShardResult],
        part: Partial,
        encode: Encode = serialise,
    ) -> ShardReport:
        """Have a shard worked on and write its table and its rejects. Raises OutputError where they cannot be written.

        Can be called from several threads: then the device goes from one shard to the next without a break.

        Args:
            work: makes the table, and keeps the progress up to date.
            part: is for the work, and removed once there is a table of the whole shard.
            encode: as for `Folder.write`.
        """
        with self._watched(shard) as progress:
            metrics = self._metrics[shard] = Metrics(progress)
            if not self._sees_folder:  # before there is work to lose; before each table it is looked at anyway
                check_folder(folder)
                self._sees_folder = True
            found = work(progress, part)
            with progress.timed("write"):
                size = write(folder, shard, found, encode)
                if found.error is None:
                    with contextlib.suppress(OSError):  # then the next run removes it
                        part.remove()
            self._metrics.pop(shard, None)
            metrics.tell()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return ShardReport(progress, found.error, size, memory, f"{socket.gethostname()} {os.getpid()}")

    def _counted(self, shared: Shared, shard: str, limit: int | None) -> tuple[int, Tensor, float] | Failed:
        """The samples of a shard, its first image that can be read, (3, H, W), and the seconds that decoding it takes.

        `Failed` where the shard cannot be read, or holds no such image.
        """
        _, preprocess = self._load(shared)
        samples = 0
        first: Tensor | None = None
        seconds = 0.0
        try:
            for sample in shards.read(shard, limit):
                samples += 1
                if first is None and isinstance(sample, Sample):
                    with contextlib.suppress(Undecodable):  # the next one will do
                        decoding.pixels(sample.image, preprocess)  # the first time is no measure
                        start = time.perf_counter()
                        first = decoding.pixels(sample.image, preprocess)
                        seconds = time.perf_counter() - start
        except ShardError as error:
            return Failed(str(error))
        return Failed("holds no image that can be read") if first is None else (samples, first, seconds)

    def class_sums(
        self, shared: Shared, shard: str, num_classes: int | None, images_per_batch: int
    ) -> tuple[Tensor, Tensor, Progress] | Failed:
        """Sums of normalised embeddings by class, and the counts; `Failed` where the shard cannot be read."""
        tower, preprocess = self._load(shared)
        with self._watched(shard) as progress:
            try:
                reading = Reading(preprocess, images_per_batch, None, shared.places.threads, num_classes)
                sums, counts = class_sums(tower, shard, reading, progress, self._device)
            except ShardError as error:
                return Failed(str(error))
            return sums, counts, progress


def write(folder: Folder, shard: str, found: ShardResult, encode: Encode = serialise) -> int:
    """Write what came of a shard, as `Folder.write` does; the number of bytes.

    Raises:
        OutputError: it cannot be written, nor could that of any other shard.
    """
    with _writable(folder):
        return folder.write(shard, found.table, found.rejects, found.error, encode)


def keeper(folder: Folder) -> Callable[[str, bytes], None]:
    """How the parts of a folder's shards are written; where that fails for a moment, the next time will do."""

    def keep(uri: str, data: bytes) -> None:
        with contextlib.suppress(OSError), _writable(folder):
            storage.patiently(uri, lambda: storage.write_atomic(uri, data))

    return keep


@contextlib.contextmanager
def _writable(folder: Folder) -> Iterator[None]:
    """Raises OutputError where what is written in the block cannot be, nor could anything else of the folder."""
    try:
        # It may have been taken away meanwhile, and writing would make another, without its settings.
        check_folder(folder)
        yield
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
