"""The folder of a training: whose it is, and whether it is finished."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from patchrank.errors import UserError
from patchrank.store import rankings, storage

SETTINGS, FIGURES = "training.json", "figures.json"

Figures = Mapping[str, float]


def prepare(folder: str, settings: Mapping[str, Any]) -> str:
    """Open a folder for a training: a new one, or one of the very same.

    Args:
        settings: JSON values that decide the result.

    Returns:
        The fingerprint of the settings.

    Raises:
        UserError: the folder holds another training, or cannot be written.
    """
    settings = json.loads(json.dumps(settings))  # as they come back from the file: tuples are lists
    fingerprint = rankings.fingerprint(settings)
    path = storage.join(folder, SETTINGS)
    with _usable(folder):
        found = _read(path)
        if found is None:
            content = {"fingerprint": fingerprint, "settings": settings}
            storage.write_atomic(path, json.dumps(content, indent=2).encode() + b"\n")
    if found is not None and found["fingerprint"] != fingerprint:
        different = rankings.differences(found["settings"], settings)
        more = f", and {len(different) - 2} more" if len(different) > 2 else ""
        raise UserError(
            f"{folder}: holds another training ({', '.join(different[:2])}{more}); give another --out, or delete the "
            "folder"
        )
    return fingerprint


def workers(folder: str) -> int | None:
    """How many workers the training of this folder has; None where there is none yet.

    Raises:
        UserError: its settings are damaged, or cannot be read.
    """
    with _usable(folder):
        found = _read(storage.join(folder, SETTINGS))
    return None if found is None else found["settings"]["workers"]


def holds(folder: str, fingerprint: str) -> bool:
    """Whether the folder is that of the training with this fingerprint, as seen from this machine."""
    found = _read(storage.join(folder, SETTINGS))
    return found is not None and found["fingerprint"] == fingerprint


def finish(folder: str, before: Figures, after: Figures) -> None:
    """Note that a training is finished, and its figures."""
    content = json.dumps({"before": before, "after": after}, indent=2)
    storage.write_atomic(storage.join(folder, FIGURES), content.encode() + b"\n")


def figures(folder: str) -> tuple[Figures, Figures] | None:
    """The figures before and after of a finished training; None of one that is not.

    Raises:
        UserError: they are damaged, or cannot be read.
    """
    path = storage.join(folder, FIGURES)
    try:
        found = _read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({storage.one_line(error)}); put that right and train again") from None
    return None if found is None else (found["before"], found["after"])


@contextlib.contextmanager
def _usable(folder: str) -> Iterator[None]:
    """Errors of the disk or the bucket become one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({storage.one_line(error)}); give another --out") from None


def _read(path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(storage.read_bytes(path))
        if not found.keys() & {"fingerprint", "after"}:
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: damaged; delete the folder and train again") from None
    return found
