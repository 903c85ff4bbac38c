"""What training leaves behind: NAME.safetensors, the weights, and NAME.json, what they are and for which model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.store import storage

VERSION = "1"  # of the layout of these files


def save(folder: str, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write both files, the json last, each whole or not at all. Weights are stored in float32.

    Raises:
        UserError: the folder cannot be written.
    """
    plain = {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}
    data = safetensors.torch.save(plain)
    content = {**record, "format": VERSION, "sha256": _digest(data)}
    try:
        storage.write_atomic(storage.join(folder, f"{name}.safetensors"), data)
        storage.write_atomic(storage.join(folder, f"{name}.json"), json.dumps(content, indent=2).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({storage.one_line(error)}); give another --out") from None


def load(folder: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, float32 on the CPU, and the content of the json.

    Raises:
        UserError: the files are not there, damaged, of another version, or do not belong together.
    """
    try:
        record = json.loads(storage.read_bytes(storage.join(folder, f"{name}.json")))
        data = storage.read_bytes(storage.join(folder, f"{name}.safetensors"))
    except OSError as error:
        raise UserError(f"{folder}: holds no {name} ({name}.json: {storage.one_line(error)})") from None
    except ValueError:
        raise UserError(f"{storage.join(folder, f'{name}.json')}: is not JSON; train again") from None
    with readable(folder, name):
        version, digest = record["format"], record["sha256"]
    if version != VERSION:
        raise UserError(f"{folder}: {name}.json has format {version}, and this version of patchrank reads {VERSION}")
    if digest != _digest(data):
        raise UserError(f"{folder}: {name}.safetensors is damaged, or not the one {name}.json was written for")
    with readable(folder, name):
        return safetensors.torch.load(data), record


@contextlib.contextmanager
def readable(folder: str, name: str) -> Iterator[None]:
    """Errors of content that does not make sense become one line."""
    try:
        yield
    except (SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
        reason = storage.one_line(error)[:200]
        raise UserError(f"{folder}: {name}.json and {name}.safetensors make no sense: {reason}") from None


def check(what: str, model: Mapping[str, Any], tower: Tower | None, weights: str | None) -> None:
    """Refuse what was made for another model, or for the same one cut elsewhere.

    Args:
        what: the folder and "this predictor was" or the like, the beginning of the error.
        model: `weights`, the digest of an image tower, `cut`, and `grid`, rows and columns; those there are.
        tower, weights: the tower in use and its digest; not compared where None.

    Raises:
        UserError: names the first thing that differs, and both values.
    """
    ours: dict[str, Any] = {"weights": weights}
    if tower is not None:
        ours |= {"grid": list(tower.grid), "cut": tower.cut}
    advice = {
        "weights": ("another model: weights", "name the --model and --pretrained of then"),
        "grid": ("another image size: a grid of tokens of", "name the --model of then"),
        "cut": ("another --cut:", "give the same --cut, or make it again"),
    }
    for name, (differs, remedy) in advice.items():
        there, here = model.get(name), ours.get(name)
        if there is not None and here is not None and there != here:
            raise UserError(f"{what} made for {differs} {_spelled(there)}, here {_spelled(here)}; {remedy}")


def _spelled(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
