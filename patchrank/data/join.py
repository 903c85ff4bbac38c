"""Shard k and its table k, joined by key, and shards alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from patchrank.data.shards import Sample, ShardError, read
from patchrank.store.rankings import Rankings


@dataclass(frozen=True)
class Pair(Sample):
    """A sample with the shard that it is from and its row of the table, (N,) each; None where it was never ranked."""

    shard: str = ""
    ranking: Tensor | None = None
    score: Tensor | None = None


@dataclass
class JoinReport:
    """How the samples of one shard and the rows of its table found each other.

    Attributes:
        joined: images with a ranking.
        without_ranking: samples of the shard that came without: it has no table, or its table does not have them.
        without_image: rows of the table without a readable sample in the shard.
        undecodable: keys of images that cannot be decoded, or cannot any more.
        error: why the shard could not be read to its end, or None.
    """

    joined: int = 0
    without_ranking: int = 0
    without_image: int = 0
    undecodable: set[str] = field(default_factory=set)
    error: str | None = None


def join(corpus: Rankings, shard: str, report: JoinReport) -> Iterator[Pair]:
    """The samples of a shard that have a ranking, in the shard's order. The report is whole at the end."""
    table = corpus.tensors(["ranking", "score"], shard)
    row = {key: number for number, key in enumerate(table["key"])}
    for sample in _samples(shard, corpus.settings.get("limit"), report):
        number = row.pop(sample.key, None)
        if number is None:
            report.without_ranking += 1
            continue
        report.joined += 1
        ranking, score = table["ranking"][number], table["score"][number]
        yield Pair(sample.key, sample.image, sample.label, (), shard, ranking, score)
    report.without_image = len(row)


def alone(shard: str, report: JoinReport) -> Iterator[Pair]:
    """The samples of a shard without rankings, in its order. The report is whole at the end."""
    for sample in _samples(shard, None, report):
        report.without_ranking += 1
        yield Pair(sample.key, sample.image, sample.label, (), shard)


def _samples(shard: str, limit: int | None, report: JoinReport) -> Iterator[Sample]:
    """The good samples of a shard; the report is told why it cannot be read to its end."""
    try:
        yield from (sample for sample in read(shard, limit) if isinstance(sample, Sample))
    except ShardError as error:  # the other shards are still good
        report.error = str(error)
