"""Class embeddings for a job on Ray: known at once, or prototypes, which its actors have yet to make."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from cluster.pool import Failed, Pool
from cluster.progress import Meter
from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.model.classes import CLASSES_FILE, Classes
from patchrank.model.loading import Model
from patchrank.store import storage


class AsksForClasses(Protocol):
    """What a job says of its classes; see the flags of jobs/search.py."""

    @property
    def templates(self) -> Sequence[str]: ...

    @property
    def class_embeddings(self) -> str | None: ...


@contextlib.contextmanager
def usable(folder: str) -> Iterator[None]:
    """Errors of the disk or the bucket become one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: {storage.one_line(error)}; finished shards are kept") from None


def class_source(
    job: AsksForClasses, model: Model, folder: str, names: list[str] | None, prototypes: list[str]
) -> tuple[str | None, Classes | None]:
    """The identity of the class embeddings, and these unless they are prototypes, which actors have yet to make.

    Those that an earlier run kept in the folder come first: rounding depends on the machine, so a search that goes on
    elsewhere must not make its own.
    """
    if job.class_embeddings and prototypes:
        raise UserError("--class-embeddings and --prototypes exclude each other: choose one")
    with usable(folder):
        if job.class_embeddings:
            found = classes.from_file(job.class_embeddings, model.visual.output_dim, names)
            return found.identity, found
        kept = storage.join(folder, CLASSES_FILE)
        if prototypes:
            made_from = [model.weights, str(names and len(names)), *prototypes]
            identity = f"prototypes {hashlib.sha256(chr(10).join(made_from).encode()).hexdigest()[:16]}"
            return identity, classes.load(kept, identity, names)
        if names:
            prompts = classes.templates(job.templates)
            identity = classes.text_identity(model, names, prompts)
            return identity, classes.load(kept, identity, names) or classes.from_text(model, names, prompts)
    return None, None


def settle(
    pool: Pool,
    prototypes: list[str],
    folder: str,
    identity: str | None,
    known: Classes | None,
    names: list[str] | None,
    images_per_batch: int,
) -> Classes | None:
    """The class embeddings, by now made if they are prototypes, and kept in the folder for a run that goes on."""
    if identity and known is None:
        known = _make_prototypes(pool, prototypes, folder, identity, names, images_per_batch)
    if known:
        classes.save(storage.join(folder, CLASSES_FILE), known)
    return known


def _make_prototypes(
    pool: Pool, uris: list[str], folder: str, identity: str, names: list[str] | None, images_per_batch: int
) -> Classes:
    """Have the prototypes made."""
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
