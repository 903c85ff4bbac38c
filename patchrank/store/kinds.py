"""The corpus in a folder, whatever it is of."""

from __future__ import annotations

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.embeddings import Embeddings
from patchrank.store.folder import find
from patchrank.store.rankings import Rankings


def open(folder: str) -> Rankings | Embeddings:
    """The rankings or embeddings of a folder.

    Raises:
        UserError: no such folder, or none of these.
    """
    return Embeddings(folder) if holds_embeddings(folder) else Rankings(folder)


def holds_embeddings(folder: str) -> bool:
    """Whether a folder is one of embeddings. Raises UserError where it cannot be read."""
    try:
        home = find(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({storage.one_line(error)})") from None
    return home is not None and home.kind == "embedding"
