"""The bank of the score "similarities": embeddings that images are compared with, the same ones for a whole search.

Texts by the text tower, embeddings of a file, or those of images, which actors have yet to make. None needs a label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from patchrank.data import shards
from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.model.classes import Classes
from patchrank.model.loading import Model
from patchrank.store import storage
from patchrank.store.folder import Folder

BANK_FILE = "bank.safetensors"  # beside rankings
IMAGES = 512  # of a shard
FILES = (".npz", ".safetensors")  # of embeddings


@dataclass(frozen=True)
class FoundBank:
    """What the flag comes to.

    Attributes:
        identity: what tells these embeddings from others.
        known: (M, E) embeddings; None where they are of images, and yet to be made.
        shard: URI of the shard of these images, where there is one.
    """

    identity: str
    known: Classes | None = None
    shard: str | None = None


def find(source: str | None, model: Model, folder: Folder, uris: Sequence[str]) -> FoundBank:
    """The bank of a search. That which an earlier run kept in the folder comes first, as for class embeddings.

    Args:
        source: embeddings as for `classes.from_file`; a shard; or texts as for `classes.read_names`. Where None, the
            folder's bank of images, or the first images of the search.
        folder: of the search's results.
        uris: the shards of the search.

    Raises:
        UserError: a source that cannot be used, or a folder that cannot be read.
    """
    with storage.one_line_errors(folder.uri):
        kept = folder.beside(BANK_FILE)
        if source is None:
            there = folder.read()
            identity = str(there["settings"].get("bank")) if there else ""
            if identity.startswith("images ") and (known := classes.load(kept, identity, None)):
                return FoundBank(identity, known)
        elif source.endswith(FILES) or any(f"{suffix}:" in source for suffix in FILES):
            known = classes.from_file(source, model.visual.output_dim, flag="--bank")
            return FoundBank(known.identity, checked(known, f"--bank {source}"))
        elif not source.endswith(shards.SHARD_SUFFIXES):
            texts = classes.read_names(source, "--bank")
            if not model.has_text:
                raise UserError(
                    f"--bank {source}: {model.name} has no weights of a text tower; name embeddings or a shard"
                )
            prompts = classes.templates(["{}"])
            identity = classes.text_identity(model, texts, prompts)
            known = classes.load(kept, identity, texts) or classes.from_text(model, texts, prompts)
            return FoundBank(identity, checked(known, f"--bank {source}"))
        shard = shards.expand([source])[0] if source else uris[0]
        made_from = chr(10).join([model.weights, str(IMAGES), shard])
        identity = f"images {hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
        return FoundBank(identity, classes.load(kept, identity, None), shard)


def checked(bank: Classes, source: str) -> Classes:
    """The same. Raises UserError where there is nothing to choose among."""
    if len(bank.embeddings) < 2:
        raise UserError(f"{source}: a bank of similarities needs two embeddings at least")
    return bank
