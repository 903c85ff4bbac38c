"""Batches of images, with their golden rankings where there are some."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchrank.data import decoding
from patchrank.data.decoding import Undecodable
from patchrank.data.features import Features
from patchrank.data.join import Pair
from patchrank.data.shards import Sample, read, readable
from patchrank.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """B images, with their golden rankings where they have some.

    Attributes:
        keys: B strings.
        pixels: (B, 3, H, W) float32, preprocessed; without rows where there are `tokens`.
        labels: (B,) int64, -1 where there is none.
        ranking: (B, N) int64, token ids, most useful first; None where the images were never ranked.
        score: (B, N) float32, by token id; None likewise.
        tokens: (B, p + N, D), the tower's prefix, where it is kept on disk; else None.
        embeddings: (B, E) float32, of the unpruned model; there where `tokens` are.
    """

    keys: list[str]
    pixels: Tensor
    labels: Tensor
    ranking: Tensor | None
    score: Tensor | None
    tokens: Tensor | None = None
    embeddings: Tensor | None = None


def batches(
    pairs: Iterable[Pair],
    preprocess: Callable[..., Tensor],
    size: int,
    threads: int,
    undecodable: Callable[[Pair], None],
    features: Features | None = None,
    *,
    in_step: bool,
) -> Iterator[PairBatch]:
    """Batches of every `size` pairs, less those that cannot be decoded; the next batch is decoded meanwhile.

    Args:
        preprocess: PIL image -> (3, H, W).
        threads: that decode images.
        undecodable: is told of every pair that cannot be decoded.
        features: where the images' tokens are taken from, instead of decoding them.
        in_step: whether ranks must have as many batches each, so that a batch of which nothing is left is an error.

    Raises:
        UserError: such a batch.
    """

    def load(pair: Pair) -> tuple[Tensor, ...]:
        if features is None:
            return (decoding.pixels(pair.image, preprocess),)
        if (found := features.of(pair.shard, pair.key)) is None:
            raise Undecodable
        return found

    loaded = decoding.on_threads(pairs, load, threads, ahead=size + 1)  # so the next batch is whole under way
    while chunk := list(itertools.islice(loaded, size)):
        good: list[tuple[Pair, tuple[Tensor, ...]]] = []
        for pair, tensors in chunk:
            if isinstance(tensors, Undecodable):
                undecodable(pair)
            else:
                good.append((pair, tensors))
        if good:
            yield _batch(good)
        elif in_step:
            raise UserError(f"{chunk[0][0].shard}: its images cannot be decoded any more, {len(chunk)} in a row")


def unranked(
    shards: Iterable[str],
    preprocess: Callable[..., Tensor],
    size: int,
    limit: int | None = None,
    threads: int = 2,
    undecodable: Callable[[str], None] = lambda key: None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[PairBatch]:
    """The images of shards that were never ranked, once, for evaluation.

    Args:
        limit: the first so many, of all shards and ranks together.
        rank, world: this process and how many there are; each takes every world-th image.
        undecodable: is told the key of every image that cannot be decoded.

    Raises:
        UserError: a shard cannot be read.
    """

    def pairs() -> Iterator[Pair]:
        for uri in shards:
            with readable(uri):
                for sample in read(uri):
                    if isinstance(sample, Sample):
                        yield Pair(sample.key, sample.image, sample.label, (), uri)

    mine = itertools.islice(pairs(), rank, limit, world)
    return batches(mine, preprocess, size, threads, lambda pair: undecodable(pair.key), in_step=False)


def _batch(loaded: list[tuple[Pair, tuple[Tensor, ...]]]) -> PairBatch:
    """Of pixels, or of tokens and embeddings."""
    pairs = [pair for pair, _ in loaded]
    first, *rest = (torch.stack(tensors) for tensors in zip(*(tensors for _, tensors in loaded), strict=True))

    def stacked(name: str) -> Any:
        tensors = [getattr(pair, name) for pair in pairs]
        return None if tensors[0] is None else torch.stack(tensors)

    return PairBatch(
        keys=[pair.key for pair in pairs],
        pixels=torch.empty(0) if rest else first,
        labels=torch.tensor([-1 if pair.label is None else pair.label for pair in pairs]),
        ranking=stacked("ranking"),
        score=stacked("score"),
        tokens=first if rest else None,
        embeddings=rest[0] if rest else None,
    )
