"""What prototypes, class embeddings made of images, and banks of images are made of: embeddings of a shard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading
from patchrank.model.tower import Tower
from patchrank.store.folder import Reject

MAX_CLASSES = 100_000  # without class names: one wrong label could else ask for all memory


def class_sums(
    tower: Tower,
    shard: str,
    reading: Reading,
    progress: Progress,
    device: AbstractContextManager[object] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums of the normalised embeddings of a shard's images, by class.

    Args:
        reading: how the shard is read; a label is needed in any case.
        device: entered while a batch is embedded; a lock makes several threads take turns.

    Returns:
        Sums (K, E) float64 and counts (K,) int64; K is `reading.num_classes`, or the largest label + 1 where None.
        Samples that cannot be used are counted in `progress` and left out.

    Raises:
        ShardError: the shard cannot be read.
    """
    sums = torch.zeros(reading.num_classes or 0, tower.embed_dim, dtype=torch.float64)
    counts = torch.zeros(reading.num_classes or 0, dtype=torch.int64)
    reading = replace(reading, num_classes=reading.num_classes or MAX_CLASSES, label_needed=True)
    for embeddings, found in embedded(tower, shard, reading, progress, device):
        labels = torch.tensor(found)  # (b,)
        grow = max(0, int(labels.max()) + 1 - len(sums))
        sums, counts = F.pad(sums, (0, 0, 0, grow)), F.pad(counts, (0, grow))
        sums.index_add_(0, labels, embeddings)
        counts += labels.bincount(minlength=len(counts))
    return sums, counts


def embedded(
    tower: Tower,
    shard: str,
    reading: Reading,
    progress: Progress,
    device: AbstractContextManager[object] | None = None,
) -> Iterator[tuple[Tensor, list[int | None]]]:
    """Embeddings of a shard's images, normalised, (b, E) float64 on the CPU, a batch at a time, and their labels.

    Arguments as of `class_sums`; samples that cannot be used are counted and left out. Raises ShardError.
    """

    def reject(_: Reject) -> None:
        progress.rejects += 1

    progress.begin("embed")
    for images in reading.batches(shard, reject, progress):
        progress.seconds["decode"] += images.decode_seconds
        with device or contextlib.nullcontext(), progress.timed("embed"):
            embeddings = F.normalize(tower(images.pixels), dim=-1).double().cpu()  # (B, E)
        finite = embeddings.isfinite().all(dim=1)  # (B,); False where a low precision overflowed
        rows = finite.nonzero()[:, 0].tolist()
        progress.rejects += len(finite) - len(rows)
        progress.images += len(rows)
        if rows:
            yield embeddings[finite], [images.labels[row] for row in rows]
