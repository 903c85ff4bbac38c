"""What a training comes to: OUT/figures.json, its figures before and after. A folder that has it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping

from patchrank.errors import UserError
from patchrank.store import storage

FILE = "figures.json"

Figures = Mapping[str, float]


def write(folder: str, before: Figures, after: Figures) -> None:
    """Note that the training of a folder is finished, and its figures. Raises OSError."""
    content = json.dumps({"before": before, "after": after}, indent=2)
    storage.write_atomic(storage.join(folder, FILE), content.encode() + b"\n")


def read(folder: str) -> tuple[Figures, Figures] | None:
    """The figures before and after of a finished training; None of one that is not.

    Raises:
        UserError: they are damaged, or cannot be read.
    """
    path = storage.join(folder, FILE)
    try:
        found = json.loads(storage.read_bytes(path))
        return found["before"], found["after"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        raise UserError(f"{path}: damaged; delete the folder and train again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({storage.one_line(error)}); put that right and train again") from None
