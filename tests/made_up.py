"""A made-up search: its arrays, its settings, and the rankings folder that it would write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patchrank.store import rankings
from patchrank.store.folder import Folder, Reject

KEEP_RATES = (0.9, 0.7, 0.5)
CLASSES = ["ant", "bee", "cat's eye", "dog, hot", "elk"]


def settings(**changes: Any) -> dict[str, Any]:
    base = {
        "model": {"weights": "0123abcd", "cut": 3, "dtype": "float32"},
        "grid": [4, 5],
        "search": {"score": "preservation", "block": 1, "remove_per_step": 4},
        "keep_rates": list(KEEP_RATES),
        "classes": "4567",
        "limit": None,
        "about": {"class_names": CLASSES, "patchrank": "0.1.0"},
    }
    return base | changes


@dataclass
class Images:
    """What a search found on the images of one shard."""

    shard: str
    keys: list[str]
    labels: list[int | None]
    arrays: dict[str, Any]  # the other fields of `rankings.Ranked`

    def table(self) -> pa.Table:
        return rankings.table(self.shard, rankings.Ranked(self.keys, self.labels, **self.arrays))


def images(
    shard: str,
    count: int,
    num_tokens: int = 20,
    keep_rates: tuple[float, ...] = KEEP_RATES,
    num_classes: int = len(CLASSES),
    seed: int = 0,
    class_embeddings: bool = True,
) -> Images:
    """Random rankings as a lazy greedy search finds them: 4 tokens leave in a step until half are left."""
    rng = np.random.default_rng(seed)
    ranking = rng.permuted(np.tile(np.arange(num_tokens), (count, 1)), axis=1)  # (B, N)
    leaving = np.zeros(num_tokens, np.int64)  # by position in the ranking, of which the end leaves first
    removed = num_tokens // 2
    leaving[num_tokens - removed :] = np.arange(removed)[::-1] // 4 + 1
    step = np.empty_like(ranking)
    np.put_along_axis(step, ranking, np.tile(leaving, (count, 1)), axis=1)  # (B, N) by token id
    labels = rng.integers(0, num_classes, count)
    prediction = np.where(rng.random(count) < 0.7, labels, rng.integers(0, num_classes, count))
    shape = (count, len(keep_rates))
    changed = rng.integers(0, num_classes, shape)
    arrays = {
        "ranking": ranking,
        "score": (1 - np.abs(rng.normal(0, 0.01, (count, num_tokens)))).astype(np.float32),
        "step": step,
        "prediction": prediction,
        "confidence": rng.random(count).astype(np.float32),
        "keep_rates": keep_rates,
        "pruned_prediction": np.where(rng.random(shape) < 0.7, prediction[:, None], changed),
        "pruned_confidence": rng.random(shape).astype(np.float32),
        "pruned_cosine": (1 - np.abs(rng.normal(0, 0.01, shape))).astype(np.float32),
    }
    if not class_embeddings:
        for name in ("prediction", "confidence", "pruned_prediction", "pruned_confidence"):
            arrays[name] = None
    return Images(shard, [f"{row:06d}" for row in range(count)], labels.tolist(), arrays)


def save(folder: str | Path, found: Images, rejects: tuple[Reject, ...] = (), **changes) -> None:
    made = Folder(str(folder)).prepare(settings(**changes))
    made.write(found.shard, found.table(), rejects, encode=rankings.encode)


def written(folder: Path) -> list[str]:
    """All files below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
