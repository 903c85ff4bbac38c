"""What an evaluation comes to: figures by method and keep rate, by class, and of retrieval, from its Parquet files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.dataset as ds

from patchrank.errors import UserError
from patchrank.evaluation import tables
from patchrank.evaluation.record import RECALLS, ClassFigure, Figure, Retrieval
from patchrank.evaluation.tables import Tables
from patchrank.pruning.methods import UNPRUNED

_BLOCK = 4096  # rows of a similarity matrix that are there at a time

_FIGURES = """
    SELECT method, keep, count(*) AS images, count(label) FILTER (prediction IS NOT NULL) AS labelled,
        avg(CASE WHEN prediction = label THEN 1.0 ELSE 0.0 END)
            FILTER (label IS NOT NULL AND prediction IS NOT NULL) AS top1,
        avg(CASE WHEN top5 THEN 1.0 ELSE 0.0 END) FILTER (top5 IS NOT NULL) AS top5,
        avg(cosine::DOUBLE) AS cosine, avg(matching::DOUBLE) AS matching
    FROM evaluation GROUP BY method, keep
"""
_CLASSES = """
    SELECT label, method, keep, count(*) AS images, avg(CASE WHEN prediction = label THEN 1.0 ELSE 0.0 END) AS top1
    FROM evaluation WHERE label IS NOT NULL AND prediction IS NOT NULL
    GROUP BY label, method, keep ORDER BY label, method, keep DESC
"""


def figures(
    folder: str, names: Sequence[str], order: Sequence[str], cost: Callable[[str, float], tuple[int, int]]
) -> list[Figure]:
    """By method and keep rate.

    Args:
        folder: of an evaluation, local, s3:// or gs://.
        names: of the tables to sum up, one at least.
        order: of the methods.
        cost: from a method and a keep rate to multiply-adds of an image, by the formula and as PyTorch counts them.

    Raises:
        UserError: they hold no rows, or cannot be read.
    """
    rows = Tables(folder, names).query(_FIGURES)
    if not rows:
        raise UserError(f"{folder}: no image was evaluated; its rejects say why")
    place = {name: number for number, name in enumerate([UNPRUNED, *order])}
    found = []
    for row in sorted(rows, key=lambda row: (place.get(row["method"], len(place)), -row["keep"])):
        multiply_adds, counted = cost(row["method"], row["keep"])
        found.append(Figure(**row, multiply_adds=multiply_adds, counted=counted))
    return found


def by_class(folder: str, names: Sequence[str], class_names: Sequence[str] | None) -> list[ClassFigure]:
    """By label, method and keep rate, of the labelled images that were classified."""
    known = class_names or []
    return [
        ClassFigure(**row, name=known[row["label"]] if 0 <= row["label"] < len(known) else str(row["label"]))
        for row in Tables(folder, names).query(_CLASSES)
    ]


def retrieval(folder: str, names: Sequence[str], encode: Callable[[list[str]], np.ndarray]) -> list[Retrieval]:
    """Recall at 1, 5 and 10 from images to captions and back, by method and keep rate; nothing without captions.

    From image to text any of the image's own captions counts; from text to image, the image it is of.

    Args:
        encode: M captions -> (M, E) float32, normalised.

    Raises:
        UserError: the tables cannot be read.
    """
    data = Tables(folder, names)
    captioned = ds.field("captions").is_valid() & (ds.field("method") == UNPRUNED)
    whole = data.rows(["shard", "key", "captions"], captioned)
    if not len(whole):
        return []
    row_of = {image: row for row, image in enumerate(tables.images(whole))}
    captions = whole["captions"].to_pylist()
    owner = np.repeat(np.arange(len(row_of)), [len(texts) for texts in captions])  # (M,)
    texts = encode(list(itertools.chain.from_iterable(captions)))  # (M, E)
    result = []
    for method, keep in data.cells():
        vectors = data.embeddings(method, keep, row_of)  # (I, E)
        result.append(
            Retrieval(
                method=method,
                keep=keep,
                images=len(row_of),
                captions=len(owner),
                image_to_text=_recall(vectors, texts, lambda image, text: owner[text] == image[:, None]),
                text_to_image=_recall(texts, vectors, lambda text, image: owner[text][:, None] == image),
            )
        )
    return result


def _recall(
    queries: np.ndarray, gallery: np.ndarray, matches: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> dict[str, float | None]:
    """The share of queries that find one of theirs among the k nearest: (Q, E), (G, E) -> by k."""
    found = dict.fromkeys(map(int, RECALLS), 0)
    most = min(max(found), len(gallery))
    for start in range(0, len(queries), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(queries)))  # (q,)
        similar = queries[rows] @ gallery.T  # (q, G)
        nearest = np.argpartition(-similar, most - 1, axis=1)[:, :most]
        order = np.take_along_axis(similar, nearest, axis=1).argsort(axis=1)[:, ::-1]
        nearest = np.take_along_axis(nearest, order, axis=1)  # (q, 10), the nearest first
        right = matches(rows, nearest)  # (q, 10)
        for k in found:
            found[k] += int(right[:, :k].any(axis=1).sum())
    return {str(k): count / len(queries) for k, count in found.items()}
