"""From the samples of a shard to batches of pixels: decoding on threads, ahead of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchrank.data import decoding
from patchrank.data.decoding import Undecodable
from patchrank.data.shards import Sample
from patchrank.store.folder import Reject


@dataclass(frozen=True)
class Batch:
    """B images of a shard: keys, pixels (B, 3, H, W) float32, labels, captions, and processor seconds of decoding."""

    keys: list[str]
    pixels: Tensor
    labels: list[int | None]
    captions: list[tuple[str, ...]]
    decode_seconds: float


def batches(
    samples: Iterable[Sample | Reject],
    preprocess: Callable[..., Tensor],
    size: int,
    reject: Callable[[Reject], None],
    threads: int = 2,
) -> Iterator[Batch]:
    """Decode and preprocess samples and put them into batches, in their order.

    Args:
        samples: from `patchrank.data.shards.read`; what it raises is raised here, after the samples that came before.
        preprocess: PIL image -> (3, H, W).
        size: images a batch; the last one may be smaller.
        reject: is told of every sample that cannot be used. One bad image costs that image alone.
        threads: that decode. Two batches are under way at most, so memory does not grow with the shard.
    """

    def usable() -> Iterator[Sample]:
        for sample in samples:
            if isinstance(sample, Reject):
                reject(sample)
            else:
                yield sample

    def load(sample: Sample) -> tuple[Tensor, float]:
        start = time.thread_time()
        return decoding.pixels(sample.image, preprocess), time.thread_time() - start

    rows: list[tuple[Sample, Tensor, float]] = []
    damage: Exception | None = None
    try:
        for sample, loaded in decoding.on_threads(usable(), load, threads, ahead=2 * size):
            if isinstance(loaded, Undecodable):
                reject(Reject(sample.key, str(loaded)))
                continue
            rows.append((sample, *loaded))
            if len(rows) == size:
                yield _batch(rows)
                rows = []
    except Exception as error:  # the images that came before are a batch of their own
        damage = error
    if rows:
        yield _batch(rows)
    if damage is not None:
        raise damage


def ahead(made: Iterator[Batch], pin: bool) -> Iterator[Batch]:
    """The batches, of which the next is read and decoded on a thread while the caller works on this one.

    Args:
        made: the batches; what they raise is raised here.
        pin: put pixels where a GPU can fetch them while it computes.
    """

    def following() -> Batch | None:
        batch = next(made, None)
        return replace(batch, pixels=batch.pixels.pin_memory()) if batch is not None and pin else batch

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(following)
        while (batch := future.result()) is not None:
            future = pool.submit(following)
            yield batch


def _batch(rows: list[tuple[Sample, Tensor, float]]) -> Batch:
    return Batch(
        keys=[sample.key for sample, _, _ in rows],
        pixels=torch.stack([pixels for _, pixels, _ in rows]),
        labels=[sample.label for sample, _, _ in rows],
        captions=[sample.captions for sample, _, _ in rows],
        decode_seconds=sum(seconds for _, _, seconds in rows),
    )
