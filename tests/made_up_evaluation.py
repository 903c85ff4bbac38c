"""A made-up evaluation of the images of real shards: its folder, and the rankings folder that it compares with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchrank.data import shards
from patchrank.store import rankings, storage
from patchrank.store.folder import Folder, file_name

KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
# How much worse than the unpruned model each method is, and how far its choice of tokens is from the golden one.
METHODS = {
    "golden": (0.3, 0.0),
    "predictor": (0.6, 0.5),
    "predictor-tokens": (0.4, 0.5),
    "class-attention": (1.0, 1.0),
    "token-merging": (0.8, None),
    "random": (2.0, 9.0),
}
PREPROCESS = {  # of the embedded model
    "size": [28, 28],
    "mode": "RGB",
    "mean": [0.286] * 3,
    "std": [0.353] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("label", pa.int32()),
        ("method", pa.dictionary(pa.int32(), pa.string())),
        ("keep", pa.float64()),
        ("prediction", pa.int32()),
        ("top5", pa.bool_()),
        ("confidence", pa.float32()),
        ("cosine", pa.float32()),
        ("matching", pa.float32()),
        ("kept", pa.list_(pa.uint16())),
    ]
)


@dataclass(frozen=True)
class Made:
    """How an evaluation is made up: with labels and class embeddings, latency and retrieval, golden rankings or not."""

    preprocess: dict[str, Any] = field(default_factory=lambda: PREPROCESS)
    model: str = "embedded"
    labels: bool = True
    latency: bool = True
    ranked: bool = True
    multiply_adds: float = 20e6


def write(
    folder: Path,
    uris: Sequence[str],
    class_names: Sequence[str],
    images: int = 40,
    grid: tuple[int, int] = (14, 14),
    **options: Any,
) -> dict[str, Any]:
    """Write `folder/evaluation` and, where it is `ranked`, `folder/rankings`.

    Args:
        images: how many of each shard.
        options: of `Made`.

    Returns:
        The content of figures.json.
    """
    made = Made(**options)
    uris = [storage.absolute(uri) for uri in uris]
    rng = np.random.default_rng(0)
    out = folder / "evaluation"
    out.mkdir(parents=True)
    parts = [
        _shard(uri, images, grid, len(class_names), made.labels, folder if made.ranked else None, rng) for uri in uris
    ]
    for uri, rows in zip(uris, parts, strict=True):
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out / file_name(uri))
    every = [row for rows in parts for row in rows]
    lines = [_figure(every, method, keep, made.multiply_adds) for method, keep in _settings()]
    figures = {
        "model": {
            "name": made.model,
            "pretrained": None,
            "weights": "0123456789abcdef",
            "cut": 3,
            "grid": list(grid),
            "dtype": "float32",
            "preprocess": made.preprocess,
        },
        "class_names": list(class_names) if made.labels else None,
        "shards": uris,
        "rankings": str(folder / "rankings") if made.ranked else None,
        "device": "a made-up CPU, 2 cores",
        "images": len({(row["shard"], row["key"]) for row in every}),
        "figures": lines,
        "classes": _classes(every, class_names) if made.labels else [],
        "latency": _latency() if made.latency else [],
        "retrieval": _retrieval() if made.latency else [],
    }
    settings = {"settings": {"about": {"shards": uris}}, "fingerprint": "0123456789abcdef"}
    (out / "evaluation.json").write_text(json.dumps(settings))
    (out / "figures.json").write_text(json.dumps(figures))
    return figures


def _settings() -> list[tuple[str, float]]:
    return [("unpruned", 1.0), *((method, keep) for method in METHODS for keep in KEEP_RATES)]


def _shard(
    uri: str,
    images: int,
    grid: tuple[int, int],
    classes: int,
    labels: bool,
    folder: Path | None,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """The rows of one shard; its rankings are written below `folder`."""
    samples = [sample for sample in shards.read(uri, images) if isinstance(sample, shards.Sample)]
    number = grid[0] * grid[1]
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in grid), indexing="ij"))  # (2, rows, columns)
    middle = 0.4 * rng.normal(size=(len(samples), 2, 1, 1))
    usefulness = -((place - middle) ** 2).sum(axis=1).reshape(-1, number)  # (B, N): nearness to some point
    usefulness += 0.2 * rng.normal(size=usefulness.shape)
    golden = usefulness.argsort(axis=1)[:, ::-1]  # (B, N)
    if folder is not None:
        settings = {"model": {}, "grid": list(grid), "search": {}, "keep_rates": [], "about": {}}
        found = rankings.Ranked(
            keys=[sample.key for sample in samples],
            labels=[sample.label for sample in samples],
            ranking=golden,
            score=usefulness.astype(np.float32),
            step=np.zeros_like(golden),
            prediction=None,
            confidence=None,
            keep_rates=[],
            pruned_prediction=None,
            pruned_confidence=None,
            pruned_cosine=np.empty((len(samples), 0), np.float32),
        )
        Folder(str(folder / "rankings")).prepare(settings).write(uri, rankings.table(uri, found))
    rows = []
    for sample, useful, order in zip(samples, usefulness, golden, strict=True):
        difficulty, wrong = rng.random(), int(rng.integers(classes))  # one wrong answer an image, whatever the method
        for method, keep in _settings():
            damage, noise = METHODS.get(method, (0.0, None))
            harm = damage * (1 - keep) ** 2
            stay = None if method == "token-merging" else np.arange(number)
            matching = None
            if noise is not None:
                count = round(keep * number)
                stay = np.sort((useful + noise * rng.normal(size=number)).argsort()[::-1][:count])
                matching = float(np.isin(order[:count], stay).mean())
            right = sample.label if sample.label is not None else 0
            prediction = right if difficulty > 0.06 + harm else wrong
            rows.append(
                {
                    "key": sample.key,
                    "shard": uri,
                    "label": sample.label if labels else None,
                    "method": method,
                    "keep": keep,
                    "prediction": prediction if labels else None,
                    "top5": difficulty > 0.02 + harm / 3 if labels else None,
                    "confidence": 0.9 - harm if labels else None,
                    "cosine": 1.0 - harm / 3 * (0.5 + rng.random()),
                    "matching": matching if folder is not None else None,
                    "kept": None if stay is None or method == "unpruned" else stay.tolist(),
                }
            )
    return rows


def _figure(rows: list[dict[str, Any]], method: str, keep: float, multiply_adds: float) -> dict[str, Any]:
    mine = [row for row in rows if row["method"] == method and row["keep"] == keep]
    labelled = [row for row in mine if row["prediction"] is not None]
    matching = [row["matching"] for row in mine if row["matching"] is not None]
    return {
        "method": method,
        "keep": keep,
        "images": len(mine),
        "labelled": len(labelled),
        "top1": float(np.mean([row["prediction"] == row["label"] for row in labelled])) if labelled else None,
        "top5": float(np.mean([row["top5"] for row in labelled])) if labelled else None,
        "cosine": float(np.mean([row["cosine"] for row in mine])),
        "matching": float(np.mean(matching)) if matching else None,
        "multiply_adds": round(multiply_adds * (0.28 + 0.72 * keep) * (1.02 if method.startswith("predictor") else 1)),
    }


def _classes(rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for label in sorted({row["label"] for row in rows}):
        for method, keep in _settings():
            mine = [row for row in rows if (row["label"], row["method"], row["keep"]) == (label, method, keep)]
            top1 = float(np.mean([row["prediction"] == label for row in mine]))
            about = {"label": label, "name": names[label], "method": method, "keep": keep}
            found.append({**about, "images": len(mine), "top1": top1})
    return found


def _latency() -> list[dict[str, Any]]:
    found = []
    for batch in (1, 64):
        for method in ("predictor", "class-attention", "token-merging"):
            for keep in KEEP_RATES:
                predicted = 1 / (0.28 + 0.72 * keep)
                speedup = predicted * {"predictor": 0.97, "class-attention": 0.94, "token-merging": 0.86}[method]
                times = {"seconds": 0.0141 * batch / speedup, "unpruned_seconds": 0.0141 * batch}
                about = {"method": method, "keep": keep, "batch": batch}
                found.append({**about, **times, "speedup": speedup, "predicted": predicted})
    return found


def _retrieval() -> list[dict[str, Any]]:
    found = []
    for method, keep in (("unpruned", 1.0), ("predictor", 0.6), ("random", 0.6)):
        harm = METHODS.get(method, (0.0, None))[0] * (1 - keep) ** 2
        recalls = [
            {k: round(start - harm, 4) for k, start in zip(("1", "5", "10"), row, strict=True)} for row in _RECALLS
        ]
        about = {"method": method, "keep": keep, "images": 500, "captions": 2500}
        found.append({**about, "image_to_text": recalls[0], "text_to_image": recalls[1]})
    return found


_RECALLS = ((0.812, 0.957, 0.981), (0.624, 0.861, 0.917))
