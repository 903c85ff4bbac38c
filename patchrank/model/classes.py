"""Class embeddings: from the text tower and prompt templates, from a file, or as prototypes of labelled images."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from patchrank.errors import UserError
from patchrank.model.loading import Model
from patchrank.store import storage, text
from patchrank.store.rankings import Rankings
from patchrank.store.unfetched import stand_in

CLASSES_FILE = "classes.safetensors"  # beside rankings or tokens: the class embeddings that they go with
Template = Callable[[str], str]  # class name -> text

TEMPLATES = ("photo", "imagenet", "imagenet-simple")  # names; see `_named`


@dataclass(frozen=True)
class Classes:
    """What images are classified into.

    Attributes:
        embeddings: (K, E) float32, normalised.
        identity: tells sets of class embeddings apart: a digest of what they were made from.
        names: the K class names, if known.
    """

    embeddings: Tensor
    identity: str
    names: list[str] | None


def read_names(path: str, flag: str = "--classes") -> list[str]:
    """Class names by label from a JSON list, or from a text file with one name a line.

    Args:
        flag: that named the file, for messages.

    Raises:
        UserError: the file cannot be read, or is not such a list.
    """
    try:
        content = text.decode(_read(path, flag))
    except ValueError as error:
        raise UserError(f"{flag} {path}: {error}") from None
    if path.lower().endswith(".json") or content.lstrip().startswith('["'):
        try:
            names = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {path}: not JSON: {error}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{flag} {path}: must be a JSON list of names, in the order of the labels")
    else:
        names = [line.strip() for line in text.lines(content.rstrip())] if content.strip() else []
        if "" in names:  # left out, it would give all that follow the name of another
            raise UserError(f"{flag} {path}: line {names.index('') + 1} is blank; a line is a class, so take it out")
    if not names:
        raise UserError(f"{flag} {path}: holds no names")
    return names


def templates(values: Sequence[str]) -> list[Template]:
    """Prompt templates from the names in `TEMPLATES` and from texts with a {} for the class name.

    Raises:
        UserError: neither a name nor a text with {}.
    """
    result: list[Template] = []
    for value in values:
        if value in TEMPLATES:
            result.extend(_named(value))
        elif value.count("{}") == 1 and not set("{}") & set(value.replace("{}", "")):
            result.append(value.format)
        else:
            raise UserError(f"--templates {value!r}: must hold one {{}}, or be one of {', '.join(TEMPLATES)}")
    return result


def _named(name: str) -> Sequence[Template]:
    import open_clip

    if name == "photo":
        return ["a photo of a {}.".format]
    if name == "imagenet":
        return open_clip.OPENAI_IMAGENET_TEMPLATES  # OpenAI's 80
    return open_clip.SIMPLE_IMAGENET_TEMPLATES  # the 7 of them that do best together


def text_identity(model: Model, names: Sequence[str], prompts: Sequence[Template]) -> str:
    """The identity of what `from_text` makes of the same arguments, without the work.

    Raises:
        UserError: the model was loaded without its text tower.
    """
    if not model.has_text:
        raise UserError(
            f"{model.name}: its text tower is missing, or its file holds the image tower alone, so --classes cannot "
            "be turned into class embeddings; add --class-embeddings or --prototypes"
        )
    prompted = [prompt(name) for name in names for prompt in prompts]
    return f"text {_digest(model.text_weights, json.dumps(prompted))}"


def from_text(model: Model, names: Sequence[str], prompts: Sequence[Template]) -> Classes:
    """Class embeddings of the text tower: of each class, the normalised mean over the templates.

    Raises:
        UserError: the model was loaded without its text tower.
    """
    import open_clip

    identity = text_identity(model, names, prompts)
    weights = open_clip.build_zero_shot_classifier(
        model.clip, model.tokenizer(), list(names), list(prompts), use_tqdm=sys.stderr.isatty() and len(names) > 10
    )  # (E, K)
    return Classes(weights.T.float().contiguous(), identity, list(names))


def from_file(
    spec: str, embed_dim: int, names: Sequence[str] | None = None, flag: str = "--class-embeddings"
) -> Classes:
    """Class embeddings from a file.

    Args:
        spec: FILE.safetensors or FILE.npz; followed by ":ARRAY" if the file holds several arrays of two dimensions. An
            array ARRAY_names beside it, of K texts, gives the names where `names` is None.
        embed_dim: E of the model.
        names: class names, which must be as many as the embeddings.
        flag: that named the file, for messages.

    Raises:
        UserError: the file cannot be read, or the array has another width than the model, or the names another number.
    """
    path, array = _split(spec, flag)
    arrays = _arrays(path, flag)
    if array is None:
        tables = [name for name, value in arrays.items() if value.ndim == 2]
        if len(tables) != 1:
            held = ", ".join(tables) or "no table"
            raise UserError(f"{flag} {path}: holds {held}; name one, as {path}:ARRAY")
        array = tables[0]
    if array not in arrays:
        raise UserError(f"{flag} {spec}: no array {array!r}; the file holds {', '.join(arrays)}")
    found = arrays[array]
    if found.ndim != 2 or found.shape[1] != embed_dim:
        shape = " x ".join(str(size) for size in found.shape)
        raise UserError(f"{flag} {spec}: is {shape}, but the model's embeddings have width {embed_dim}")
    embeddings = torch.from_numpy(found.astype(np.float32))  # (K, E)
    if not embeddings.isfinite().all() or not embeddings.norm(dim=1).all():
        raise UserError(f"{flag} {spec}: holds an embedding that is zero or not finite")
    if names is None and f"{array}_names" in arrays:
        names = [str(name) for name in arrays[f"{array}_names"]]
    if names is not None and len(names) != len(embeddings):
        raise UserError(f"{flag} {spec}: {len(embeddings)} embeddings, but {len(names)} class names")
    digest = hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()[:16]
    return Classes(F.normalize(embeddings, dim=-1), f"file {digest}", None if names is None else list(names))


def from_sums(sums: Tensor, counts: Tensor, identity: str, names: Sequence[str] | None = None) -> Classes:
    """Prototypes: of each class, the normalised mean of the normalised embeddings of its images.

    Args:
        sums: (K, E) float64, sums of normalised embeddings.
        counts: (K,) int64, the number of images in each sum.
        identity: what they were made from.
        names: the K class names.

    Raises:
        UserError: a class without an image.
    """
    if not len(sums):
        raise UserError("--prototypes: no image in these shards has a label, and classes are made of labelled images")
    if names is not None and len(names) > len(sums):
        missing = len(sums)
    else:
        missing = next(iter((counts == 0).nonzero()[:, 0].tolist()), -1)
    if missing >= 0:
        name = f" ({names[missing]})" if names is not None else ""
        raise UserError(f"--prototypes: no image of class {missing}{name} in these shards; every class needs one")
    return Classes(F.normalize(sums, dim=-1).float(), identity, None if names is None else list(names))


def save(uri: str, classes: Classes) -> None:
    """Keep class embeddings in a safetensors file, so that a resumed search uses the very same ones."""
    metadata = {"identity": classes.identity}
    storage.write_atomic(uri, safetensors.torch.save({"embeddings": classes.embeddings}, metadata))


def load(uri: str, identity: str, names: Sequence[str] | None) -> Classes | None:
    """What `save` kept; None where there is no file, or one made from something else."""
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as safetensors lays its files out
        if header.get("__metadata__", {}).get("identity") != identity:
            return None
        return Classes(safetensors.torch.load(data)["embeddings"], identity, None if names is None else list(names))
    except (SafetensorError, ValueError, KeyError):
        raise UserError(f"{uri}: cannot be read; delete it") from None


def classes_of(corpus: Rankings) -> tuple[str | None, Classes | None]:
    """The identity of a search's class embeddings, and these; None twice where it had none.

    Raises:
        UserError: they are missing, or those of other classes.
    """
    identity = corpus.settings.get("classes")
    if identity is None:
        return None, None
    known = load(corpus.home.beside(CLASSES_FILE), identity, corpus.class_names)
    if known is None:
        raise UserError(f"{corpus.folder}: its {CLASSES_FILE} is missing or of other classes; run the search again")
    return identity, known


def _split(spec: str, flag: str) -> tuple[str, str | None]:
    for suffix in (".npz", ".safetensors"):
        path, found, array = spec.partition(f"{suffix}:")
        if found:
            return path + suffix, array
        if spec.endswith(suffix):
            return spec, None
    raise UserError(f"{flag} {spec}: must be a .safetensors or .npz file")


def _arrays(path: str, flag: str) -> dict[str, np.ndarray]:
    data = _read(path, flag)
    if reason := stand_in(data[:512], binary=True):
        raise UserError(f"{flag} {path}: {reason}")
    try:
        if path.endswith(".npz"):
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return {name: value.float().numpy() for name, value in safetensors.torch.load(data).items()}
    except Exception as error:  # zip, header and pickle errors alike mean: not such a file
        raise UserError(f"{flag} {path}: cannot be read ({storage.one_line(error)})") from None


def _read(path: str, flag: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: {storage.one_line(error)}") from None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
