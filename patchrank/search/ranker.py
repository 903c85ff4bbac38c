"""One shard in, one table of golden rankings out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.data import shards
from patchrank.data.loader import Batch, ahead, batches
from patchrank.data.progress import Progress
from patchrank.data.shards import Reject, Sample, ShardError
from patchrank.model.tower import Tower
from patchrank.search.searcher import Searcher, SearchResult
from patchrank.store import rankings

MAX_CLASSES = 100_000  # of prototypes without class names: one wrong label could else ask for all memory


@dataclass(frozen=True)
class ShardResult:
    """The outcome of a shard.

    Attributes:
        table: a row an image, as `patchrank.store.rankings.table` or `patchrank.evaluation.evaluate.schema` has it; the
            rows before the damage where `error` is set.
        rejects: the samples that could not be used.
        error: why the shard could not be read to its end, or None.
    """

    table: pa.Table
    rejects: list[Reject]
    error: str | None


class ShardRanker:
    """Ranks the images of one shard after the other.

    The table depends on the shard, the searcher and `batch` alone: whoever ranks a shard makes the same table.

    Args:
        searcher: the search, on its device.
        preprocess: PIL image -> (3, H, W).
        num_classes: K; a label outside 0 .. K-1 makes a reject. None where the classes are not known.
        batch: images searched at a time.
        limit: only the first so many samples of a shard.
        threads: that decode images.
    """

    def __init__(
        self,
        searcher: Searcher,
        preprocess: Callable[..., Tensor],
        num_classes: int | None = None,
        batch: int = 16,
        limit: int | None = None,
        threads: int = 2,
    ) -> None:
        self.searcher = searcher
        self.preprocess = preprocess
        self.num_classes = num_classes
        self.batch = batch
        self.limit = limit
        self.threads = threads

    def rank(
        self, shard: str, progress: Progress | None = None, device: AbstractContextManager[object] | None = None
    ) -> ShardResult:
        """Search the images of a shard.

        Args:
            progress: is kept up to date meanwhile.
            device: entered once the first images are there, left after the last were searched. A lock makes several
                threads, each with a shard of its own, take turns.
        """
        progress = progress or Progress()
        progress.cosine = [0.0] * len(self.searcher.keep_rates)
        rejects: list[Reject] = []

        def reject(sample: Reject) -> None:
            rejects.append(sample)
            progress.rejects += 1

        samples = _timed(shards.read(shard, self.limit), progress)
        samples = checked(samples, self.num_classes, self.searcher.config.score == "label")
        tables, error = [self._no_rows(shard)], None
        overflows: list[Reject] = []  # apart: the thread that reads ahead adds to the others at any time
        try:
            made = batches(samples, self.preprocess, self.batch, reject, self.threads)
            made = ahead(made, pin=self.searcher.tower.device.type == "cuda")
            first = next(made, None)
            with device or contextlib.nullcontext():
                for batch in itertools.chain([] if first is None else [first], made):
                    tables.append(self._search(shard, batch, progress, overflows))
        except ShardError as damage:
            error = str(damage)
        progress.rejects = len(rejects) + len(overflows)
        return ShardResult(pa.concat_tables(tables), rejects + overflows, error)

    def _search(self, shard: str, batch: Batch, progress: Progress, overflows: list[Reject]) -> pa.Table:
        labels = None
        if self.searcher.config.score == "label":  # every sample has one: see `checked`
            labels = torch.tensor([label for label in batch.labels if label is not None])
        progress.seconds["decode"] += batch.decode_seconds
        with progress.timed("search"):
            result = self.searcher.search(batch.pixels, labels)
        overflows += overflowed(batch.keys, result.finite, "the search", self.searcher.tower.dtype)
        rows = result.finite.nonzero()[:, 0].tolist()
        progress.images += len(rows)
        progress.candidates += result.candidates
        sums = result.pruned_cosine[rows].double().sum(dim=0).tolist()
        progress.cosine = [total + more for total, more in zip(progress.cosine, sums, strict=True)]
        return self._table(shard, [batch.keys[row] for row in rows], [batch.labels[row] for row in rows], result, rows)

    def _table(
        self, shard: str, keys: list[str], labels: list[int | None], result: SearchResult, rows: list[int]
    ) -> pa.Table:
        def take(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor[rows].numpy()

        return rankings.table(
            shard=shard,
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

    def _no_rows(self, shard: str) -> pa.Table:
        """The table of a shard without an image: it has the same columns as every other."""
        tokens, rates = self.searcher.tower.num_tokens, len(self.searcher.keep_rates)
        ids, values = torch.empty(0, tokens, dtype=torch.int64), torch.empty(0, tokens)
        pruned, nothing = torch.empty(0, rates), torch.empty(0, dtype=torch.bool)
        result = SearchResult(ids, values, ids, None, None, None, None, pruned, nothing, 0)
        return self._table(shard, [], [], result, [])


def _timed(samples: Iterator[Sample | Reject], progress: Progress) -> Iterator[Sample | Reject]:
    """The samples; the time that they take is counted to the stage "read"."""
    while True:
        with progress.timed("read"):
            sample = next(samples, None)
        if sample is None:
            return
        yield sample


def checked(
    samples: Iterator[Sample | Reject], num_classes: int | None, label_needed: bool
) -> Iterator[Sample | Reject]:
    """The samples, those turned to rejects whose label is missing where it is needed, or no label of any class."""
    for sample in samples:
        reason = None
        if isinstance(sample, Sample):
            if sample.label is None:
                reason = "has no label, which is needed here" if label_needed else None
            elif sample.label < 0:
                reason = f"label {sample.label} is negative"
            elif num_classes is not None and sample.label >= num_classes:
                reason = f"label {sample.label} is not one of the {num_classes} classes, 0 to {num_classes - 1}"
        yield Reject(sample.key, reason) if reason else sample


def overflowed(keys: Sequence[str], finite: Tensor, what: str, dtype: torch.dtype) -> list[Reject]:
    """A reject for each image for which something, in this precision, was not finite; `finite` is (B,) bool."""
    reason = f"{what} overflows in {dtype}; use --dtype float32"
    return [Reject(key, reason) for key, good in zip(keys, finite.tolist(), strict=True) if not good]


def class_sums(
    tower: Tower,
    shard: str,
    preprocess: Callable[..., Tensor],
    num_classes: int | None,
    batch: int,
    progress: Progress,
    threads: int = 2,
    device: AbstractContextManager[object] | None = None,
) -> tuple[Tensor, Tensor]:
    """What prototypes are made of: the sums of the normalised embeddings of a shard's images, by class.

    Args:
        num_classes: K, or None where it follows from the labels.
        batch: images embedded at a time.
        threads: that decode images.
        device: entered while a batch is embedded; a lock makes several threads take turns.

    Returns:
        Sums (K, E) float64 and counts (K,) int64; K is `num_classes`, or the largest label + 1 where None. Samples that
        cannot be used are counted in `progress` and left out.

    Raises:
        ShardError: the shard cannot be read.
    """

    def reject(_: Reject) -> None:
        progress.rejects += 1

    sums = torch.zeros(num_classes or 0, tower.embed_dim, dtype=torch.float64)
    counts = torch.zeros(num_classes or 0, dtype=torch.int64)
    samples = checked(shards.read(shard), num_classes or MAX_CLASSES, label_needed=True)
    for images in batches(samples, preprocess, batch, reject, threads):
        with device or contextlib.nullcontext():
            embeddings = F.normalize(tower(images.pixels), dim=-1).double().cpu()  # (B, E)
        labels = torch.tensor([label for label in images.labels if label is not None])  # (B,)
        finite = embeddings.isfinite().all(dim=1)  # (B,); False where a low precision overflowed
        progress.rejects += int((~finite).sum())
        embeddings, labels = embeddings[finite], labels[finite]
        if not len(labels):
            continue
        grow = max(0, int(labels.max()) + 1 - len(sums))
        sums, counts = F.pad(sums, (0, 0, 0, grow)), F.pad(counts, (0, grow))
        sums.index_add_(0, labels, embeddings)
        counts += labels.bincount(minlength=len(counts))
        progress.images += len(labels)
    return sums, counts
