"""What pruning does to an index of embeddings: how many of an image's nearest neighbours stay its nearest ones."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.dataset as ds
import torch
from torch import Tensor

from patchrank.evaluation import tables
from patchrank.evaluation.record import Neighbours
from patchrank.evaluation.tables import Tables
from patchrank.pruning.methods import UNPRUNED

NEAREST = 10
IMAGES = 5000  # in the index, unless another number is asked for
_BLOCK = 1024  # queries whose similarities are there at a time
_LEVEL = 0.01  # what an index of both kinds may keep less than one that is pruned throughout, to be called as good
_ROUNDING = 1e-6  # of similarities: an image and its copy are equally near


def neighbours(folder: str, names: Sequence[str], most: int = IMAGES) -> list[Neighbours]:
    """By method and keep rate; nothing where fewer than two images have embeddings.

    Args:
        folder: of an evaluation, local, s3:// or gs://.
        names: of the tables to look at, one at least.
        most: only the first so many images.

    Raises:
        UserError: the tables cannot be read.
    """
    data = Tables(folder, names)
    there = ds.field("embedding").is_valid() & (ds.field("method") == UNPRUNED)
    row_of = {image: row for row, image in enumerate(tables.images(data.rows(["shard", "key"], there))[:most])}
    count = min(NEAREST, len(row_of) - 1)
    if count < 1:
        return []
    whole = torch.from_numpy(data.embeddings(UNPRUNED, 1.0, row_of))  # (I, E)
    wanted, _ = _nearest(whole, whole, count)
    found = []
    for method, keep in data.cells():
        if method == UNPRUNED:
            continue
        pruned = torch.from_numpy(data.embeddings(method, keep, row_of))  # (I, E)
        mixed = whole.clone()
        mixed[::2] = pruned[::2]
        by_pruned, first_by_pruned = _nearest(pruned, whole, count)
        by_whole, first_by_whole = _nearest(whole, pruned, count)
        halves = (_share(wanted, _nearest(queries, mixed, count)[0]) for queries in (pruned, whole))
        found.append(
            Neighbours(
                method=method,
                keep=keep,
                images=len(row_of),
                nearest=count,
                pruned_queries=_share(wanted, by_pruned),
                pruned_index=_share(wanted, by_whole),
                pruned=_share(wanted, _nearest(pruned, pruned, count)[0]),
                mixed=sum(halves) / 2,
                first_by_pruned_queries=first_by_pruned,
                first_in_pruned_index=first_by_whole,
            )
        )
    return found


def sentence(one: Neighbours) -> str:
    """Whether pruned and unpruned embeddings can share an index, with the figures that say so.

    They can where an index of both kinds keeps as many neighbours as one that is pruned throughout: then nothing but
    the pruning itself is lost.
    """
    can = "can" if one.mixed >= one.pruned - _LEVEL else "should not"
    return (
        f"At keep rate {one.keep:g}, pruned and unpruned embeddings {can} share an index: of the {one.nearest} nearest "
        f"neighbours among {one.images:,} images, {100 * one.mixed:.1f} % stay where every other image is pruned, "
        f"{100 * one.pruned:.1f} % where all are, and {100 * one.pruned_queries:.1f} % where queries alone are."
    )


def _nearest(queries: Tensor, index: Tensor, count: int) -> tuple[Tensor, float]:
    """The images nearest to each query, itself aside, (I, count) int64, and the share of queries to which their own
    image is the nearest of all: recall at 1. Row i of both, (I, E), is image i."""
    nearest, first = [], 0
    for start in range(0, len(queries), _BLOCK):
        similar = queries[start : start + _BLOCK] @ index.T  # (q, I)
        rows = torch.arange(len(similar))
        own = similar[rows, rows + start].clone()  # (q,)
        similar[rows, rows + start] = -torch.inf
        values, ids = similar.topk(count, dim=1)  # (q, count)
        first += int((own >= values[:, 0] - _ROUNDING).sum())
        nearest.append(ids)
    return torch.cat(nearest), first / len(queries)


def _share(wanted: Tensor, found: Tensor) -> float:
    """The share of the wanted images that were found: (I, k) ids each."""
    return (wanted[:, :, None] == found[:, None]).any(dim=2).double().mean().item()
