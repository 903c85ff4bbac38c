"""How many samples shards have, where a file beside them tells: sizes.json, as open_clip reads it for its trainings."""

from __future__ import annotations

import json
from collections.abc import Mapping

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.storage import one_line

FILE = "sizes.json"  # {"train-000000.tar": 1000, ...}


class Sizes:
    """What the files beside shards tell; each is read once."""

    def __init__(self) -> None:
        self._folders: dict[str, Mapping[str, int]] = {}

    def of(self, shard: str) -> int | None:
        """The samples of a shard; None where it is not told.

        Args:
            shard: its absolute URI.

        Raises:
            UserError: the file beside it is damaged, or cannot be read.
        """
        uri, options = storage.split_options(shard)
        folder, _, name = uri.rpartition("/")
        path = storage.join(folder, FILE) + options
        if path not in self._folders:
            self._folders[path] = _read(path)
        return self._folders[path].get(name)


def write(folder: str, sizes: Mapping[str, int]) -> None:
    """Put sizes, by the shards' base names, into FOLDER/sizes.json, beside those of other shards that are in it.

    Raises:
        UserError: the file there is damaged, or cannot be written.
    """
    path = storage.join(folder, FILE)
    content = {**_read(path), **sizes}
    try:
        storage.write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from None


def _read(path: str) -> Mapping[str, int]:
    try:
        found = json.loads(storage.read_bytes(path))
        if not isinstance(found, dict) or not all(type(size) is int and size >= 0 for size in found.values()):
            raise ValueError("not a whole number a shard")
        return found
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); without it shards are counted by reading them") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
