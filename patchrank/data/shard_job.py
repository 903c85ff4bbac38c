"""One shard in, one table out: what is the same whatever is done to the images."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pyarrow as pa
from torch import Tensor

from patchrank.data import shards
from patchrank.data.loader import Batch, ahead, batches
from patchrank.data.progress import Progress
from patchrank.data.shards import Sample, ShardError
from patchrank.model.tower import Tower
from patchrank.store.folder import Reject
from patchrank.store.partial import Partial

_Samples = Iterator[Sample | Reject]


@dataclass(frozen=True)
class ShardResult:
    """The outcome of a shard.

    Attributes:
        table: what was found of its images; the rows before the damage where `error` is set.
        rejects: the samples that could not be used, in the shard's order.
        error: why the shard could not be read to its end, or None.
    """

    table: pa.Table
    rejects: list[Reject]
    error: str | None


@dataclass(frozen=True)
class Reading:
    """How the images of shards are read.

    Attributes:
        preprocess: PIL image -> (3, H, W).
        batch: images at a time.
        limit: only the first so many samples of a shard.
        threads: that decode images.
        num_classes: K; a label outside 0 .. K-1 makes a reject. None where the classes are not known.
        label_needed: whether a sample without a label is a reject.
    """

    preprocess: Callable[..., Tensor]
    batch: int = 16
    limit: int | None = None
    threads: int = 2
    num_classes: int | None = None
    label_needed: bool = False

    def batches(
        self,
        shard: str,
        reject: Callable[[Reject], None],
        progress: Progress,
        wanted: Callable[[_Samples], _Samples] = lambda samples: samples,
    ) -> Iterator[Batch]:
        """The images of a shard.

        Args:
            reject: is told of every sample that cannot be used.
            progress: the time of reading is counted to its stage "read".
            wanted: leaves samples out, or turns them to rejects.

        Raises:
            ShardError: the shard cannot be read to its end; after the images that came before.
        """
        samples = wanted(self._checked(_timed(shards.read(shard, self.limit), progress)))
        return batches(samples, self.preprocess, self.batch, reject, self.threads)

    def _checked(self, samples: _Samples) -> _Samples:
        """The samples, those turned to rejects whose label is missing where it is needed, or no label of any class."""
        for sample in samples:
            reason = None
            if isinstance(sample, Sample):
                if sample.label is None:
                    reason = "has no label, which is needed here" if self.label_needed else None
                elif sample.label < 0:
                    reason = f"label {sample.label} is negative"
                elif self.num_classes is not None and sample.label >= self.num_classes:
                    classes = f"the {self.num_classes} classes, 0 to {self.num_classes - 1}"
                    reason = f"label {sample.label} is not one of {classes}"
            yield Reject(sample.key, reason) if reason else sample


@dataclass(frozen=True)
class ShardJob:
    """What is done to the images of a shard.

    Attributes:
        stage: where the progress counts the time that `rows` takes.
        what: can overflow, as the reason of a reject names it.
        tower: in whose dtype, and on whose device, it is computed.
        nothing: the table of a shard without an image; it has the same columns as every other, `key` among them.
        rows: what is found of a batch: a table of the images for which all is finite, and which these are, (B,) bool.
        wanted: as for `Reading.batches`.
    """

    stage: str
    what: str
    tower: Tower
    nothing: pa.Table
    rows: Callable[[Batch], tuple[pa.Table, Tensor]]
    wanted: Callable[[_Samples], _Samples] = lambda samples: samples

    def run(
        self,
        shard: str,
        reading: Reading,
        progress: Progress,
        turn: AbstractContextManager[object] | None = None,
        part: Partial | None = None,
    ) -> ShardResult:
        """Make the table of a shard.

        Args:
            progress: is kept up to date meanwhile.
            turn: entered once the first images are there, left after the last were worked on. A lock makes several
                threads, each with a shard of its own, take turns on the device.
            part: what an earlier try has done is taken from here, and what is done is kept here. Batches are made of
                the same images as without, whole ones, so the table is the same.
        """
        rejects: list[Reject] = []  # those of the reader, which tells of them again in every try
        lost: list[Reject] = []  # those of samples that it took for good
        order: dict[str, int] = {}
        tables, error = [self.nothing], None
        if part is not None and (done := part.found()) is not None:
            tables.append(done.table)
            lost += done.lost
        there = set().union(*(table["key"].to_pylist() for table in tables))
        progress.kept = len(there)
        progress.rejects = len(lost)
        there.update(sample.key for sample in lost)

        def rest(samples: _Samples) -> _Samples:
            for sample in self.wanted(samples):
                order.setdefault(sample.key, len(order))
                if isinstance(sample, Reject):
                    rejects.append(sample)
                    progress.rejects += 1
                elif sample.key not in there:
                    yield sample

        def reject(sample: Reject) -> None:
            lost.append(sample)
            progress.rejects += 1

        progress.begin(self.stage)
        try:
            made = ahead(reading.batches(shard, reject, progress, rest), pin=self.tower.device.type == "cuda")
            first = next(made, None)
            with turn or contextlib.nullcontext():
                if part is not None:
                    part.begin()
                for batch in itertools.chain([] if first is None else [first], made):
                    progress.seconds["decode"] += batch.decode_seconds
                    with progress.timed(self.stage):
                        table, finite = self.rows(batch)
                    tables.append(table)
                    progress.images += int(finite.sum())
                    reason = f"{self.what} overflows in {self.tower.dtype}; use --dtype float32"
                    overflown = [key for key, good in zip(batch.keys, finite.tolist(), strict=True) if not good]
                    lost += [Reject(key, reason) for key in overflown]
                    if part is not None and len(batch.keys) == reading.batch:
                        part.step(tables, lost)
        except ShardError as damage:
            error = str(damage)
        rejects = sorted(rejects + lost, key=lambda sample: order.get(sample.key, len(order)))
        progress.rejects = len(rejects)
        return ShardResult(pa.concat_tables(tables), rejects, error)


def _timed(samples: _Samples, progress: Progress) -> _Samples:
    """The samples; the time that they take is counted to the stage "read"."""
    while True:
        with progress.timed("read"):
            sample = next(samples, None)
        if sample is None:
            return
        yield sample
