"""Lessons, what a training step is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from patchrank.data.pair_batches import PairBatch


@dataclass(frozen=True)
class Lesson:
    """A batch of images and the step that it is of, from 0."""

    step: int
    images: PairBatch


def lessons(batches: Iterator[PairBatch], accumulation: int, start: int) -> Iterator[Lesson]:
    """Batches with their steps, each of `accumulation` batches, from step `start` on."""
    for number, batch in enumerate(batches):
        yield Lesson(start + number // accumulation, batch)
