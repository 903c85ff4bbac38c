"""Where class embeddings come from: class names and the text tower, a file, or labelled shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from patchrank.errors import UserError
from patchrank.flags import flag
from patchrank.model import classes
from patchrank.model.classes import CLASSES_FILE, TEMPLATES, Classes
from patchrank.model.loading import Model
from patchrank.store import storage
from patchrank.store.folder import Folder


@dataclass(frozen=True)
class ClassSource:
    """What a job says of its classes; by default that there are none."""

    class_names: str | None = flag(
        None,
        "class names by label: JSON list or one a line; the text tower embeds them",
        name="classes",
        metavar="FILE",
    )
    templates: Sequence[str] = flag(("photo",), f"prompts with {{}}, or {', '.join(TEMPLATES)}", metavar="T")
    class_embeddings: str | None = flag(
        None, "class embeddings: FILE.safetensors or FILE.npz, :ARRAY if several", metavar="FILE"
    )
    prototypes: Sequence[str] = flag((), "labelled shards whose mean embeddings to use", metavar="SHARDS")

    def names(self) -> list[str] | None:
        """The class names; None where there are none. Raises UserError where their file cannot be read."""
        return classes.read_names(self.class_names) if self.class_names else None

    @property
    def given(self) -> bool:
        """Whether it names any classes."""
        return bool(self.class_names or self.class_embeddings or self.prototypes)


@dataclass(frozen=True)
class FoundClasses:
    """What a source comes to.

    Attributes:
        identity: what tells these embeddings from others; None where there are no classes.
        names: of the classes, by label, where they are known.
        known: None where there are no classes, or prototypes, which are yet to be made.
        prototypes: URIs of the shards that these are made of.
    """

    identity: str | None = None
    names: list[str] | None = None
    known: Classes | None = None
    prototypes: Sequence[str] = ()


def find(
    source: ClassSource, names: list[str] | None, model: Model, folder: Folder, prototypes: Sequence[str]
) -> FoundClasses:
    """The class embeddings of a job, unless they are prototypes that actors have yet to make.

    Those that an earlier run kept in the folder come first: rounding depends on the machine, so a search that goes on
    elsewhere must not make its own.

    Args:
        names: `source.names()`, which is asked for before a model is loaded.
        folder: of the job's results.
        prototypes: URIs of the shards that `source.prototypes` stands for.

    Raises:
        UserError: a source that cannot be used, or two of them, or a folder that cannot be read.
    """
    if source.class_embeddings and prototypes:
        raise UserError("--class-embeddings and --prototypes exclude each other: choose one")
    with storage.one_line_errors(folder.uri):
        if source.class_embeddings:
            known = classes.from_file(source.class_embeddings, model.visual.output_dim, names)
            return FoundClasses(known.identity, known.names, known)
        kept = folder.beside(CLASSES_FILE)
        if prototypes:
            made_from = [model.weights, str(names and len(names)), *prototypes]
            identity = f"prototypes {hashlib.sha256(chr(10).join(made_from).encode()).hexdigest()[:16]}"
            earlier = classes.load(kept, identity, names)
            return FoundClasses(identity, earlier.names if earlier else names, earlier, prototypes)
        if names:
            prompts = classes.templates(source.templates)
            identity = classes.text_identity(model, names, prompts)
            known = classes.load(kept, identity, names) or classes.from_text(model, names, prompts)
            return FoundClasses(identity, known.names, known)
    return FoundClasses()
