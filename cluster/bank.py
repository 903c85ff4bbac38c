"""Banks of images, whose embeddings an actor of the search makes."""

from __future__ import annotations

from torch import Tensor

from cluster.pool import Failed, Pool
from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.model.classes import Classes
from patchrank.search.bank import BANK_FILE, IMAGES, FoundBank, checked
from patchrank.store.folder import Folder


def settle(pool: Pool, found: FoundBank | None, folder: Folder, images_per_batch: int) -> Tensor | None:
    """The bank, (M, E), by now made if it is of images, and kept in the folder for a run that goes on; None where none.

    Raises:
        UserError: its shard cannot be read, or holds too few images.
    """
    if found is None:
        return None
    known = found.known or _embedded(pool, found, images_per_batch)
    classes.save(folder.beside(BANK_FILE), known)
    return known.embeddings


def _embedded(pool: Pool, found: FoundBank, images_per_batch: int) -> Classes:
    """The bank of the first images of a shard."""
    assert found.shard is not None  # `find` has it, or a bank that is known
    for uri, result in pool.run("embeddings", [found.shard], IMAGES, images_per_batch):
        if isinstance(result, Failed):
            raise UserError(f"{uri}: {result.reason}; the bank is made of its images, unless --bank names others")
        return checked(Classes(result, found.identity, None), uri)
    raise AssertionError("the pool gives an answer for every shard")
