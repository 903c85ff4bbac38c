"""From the samples of a shard to batches of pixels: decoding on threads, ahead of the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchrank.data.images import decode
from patchrank.data.shards import Reject, Sample
from patchrank.store.storage import one_line


@dataclass(frozen=True)
class Batch:
    """B images of a shard: keys, pixels (B, 3, H, W) float32, labels, and processor seconds that decoding them took."""

    keys: list[str]
    pixels: Tensor
    labels: list[int | None]
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
    loaded = _loaded(samples, preprocess, reject, threads, ahead=2 * size)
    rows: list[tuple[Sample, Tensor, float]] = []
    damage: Exception | None = None
    while damage is None:
        try:
            rows.append(next(loaded))
        except StopIteration:
            break
        except Exception as error:  # the images that came before are a batch of their own
            damage = error
        if len(rows) == size:
            yield _batch(rows)
            rows = []
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
        decode_seconds=sum(seconds for _, _, seconds in rows),
    )


def _loaded(
    samples: Iterable[Sample | Reject],
    preprocess: Callable[..., Tensor],
    reject: Callable[[Reject], None],
    threads: int,
    ahead: int,
) -> Iterator[tuple[Sample, Tensor, float]]:
    def load(sample: Sample) -> tuple[Tensor, float]:
        start = time.thread_time()
        return preprocess(decode(sample.image)), time.thread_time() - start

    failure: Exception | None = None
    source = iter(samples)
    waiting: deque[tuple[Sample, Future[tuple[Tensor, float]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        exhausted = False
        while waiting or not exhausted:
            while not exhausted and len(waiting) < ahead:
                try:
                    sample = next(source)
                except StopIteration:
                    exhausted = True
                except Exception as error:  # a damaged shard: the samples before the damage come first
                    exhausted, failure = True, error
                else:
                    if isinstance(sample, Reject):
                        reject(sample)
                    else:
                        waiting.append((sample, pool.submit(load, sample)))
            if waiting:
                sample, future = waiting.popleft()
                try:
                    pixels, seconds = future.result()
                except MemoryError:  # the machine's trouble, not the image's
                    raise
                except Exception as error:  # whatever an image does to its decoder, it must not cost the others
                    reject(Reject(sample.key, one_line(error)))
                else:
                    yield sample, pixels, seconds
    if failure is not None:
        raise failure
