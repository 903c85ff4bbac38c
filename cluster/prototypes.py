"""Prototypes, the class embeddings that the actors of a job make."""

from __future__ import annotations

import contextlib
import sys
from collections import deque

from torch import Tensor

from cluster.pool import Failed, Pool
from patchrank.data.meter import Meter
from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.model.class_source import FoundClasses
from patchrank.model.classes import CLASSES_FILE, Classes
from patchrank.store.folder import Folder


def settle(pool: Pool, found: FoundClasses, folder: Folder, images_per_batch: int) -> Classes | None:
    """The class embeddings, by now made if they are prototypes, and kept in the folder for a run that goes on."""
    known = found.known
    if found.identity and known is None:
        known = _make_prototypes(pool, found, found.identity, folder.uri, images_per_batch)
    if known:
        classes.save(folder.beside(CLASSES_FILE), known)
    return known


def _make_prototypes(pool: Pool, found: FoundClasses, identity: str, folder: str, images_per_batch: int) -> Classes:
    """Have the prototypes made."""
    uris, names = list(found.prototypes), found.names
    order, early = deque(uris), {}
    total: tuple[Tensor, Tensor] | None = None  # (K, E), (K,)
    left_out = 0
    with contextlib.closing(Meter("prototypes", len(uris), folder)) as meter:

        def show() -> None:
            meter.show(pool.running(), pool.actors_up)

        for uri, result in pool.run("class_sums", uris, names and len(names), images_per_batch, tick=show):
            if isinstance(result, Failed):
                raise UserError(f"--prototypes {uri}: {result.reason}")
            sums, counts, progress = result
            early[uri] = sums, counts
            left_out += progress.rejects
            meter.add(progress)
            show()
            while order and order[0] in early:  # not in the order of the actors: addition rounds
                sums, counts = early.pop(order.popleft())
                total = (sums, counts) if total is None else (_added(total[0], sums), _added(total[1], counts))
    if left_out:
        print(
            f"warning: {left_out} samples of --prototypes have no readable image and label of a class", file=sys.stderr
        )
    assert total is not None  # there is a shard, and none has failed
    return classes.from_sums(*total, identity, names)


def _added(total: Tensor, more: Tensor) -> Tensor:
    """The sum of two by class, of which one may know of more classes than the other: (K, ...), (k, ...) -> (K, ...)."""
    if len(total) < len(more):
        total, more = more, total
    result = total.clone()
    result[: len(more)] += more
    return result
