"""What is done of a shard while the rest is in work, so that a lost machine costs minutes of it and not the shard.

OUT/__patchrank__/_partial/STEM-HASH.part   rows and lost samples so far; no reader of tables takes it for one

It starts with a digest of the rest, a table in Arrow's stream format; what it is of is in the metadata of that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import pyarrow as pa

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.folder import PARTIAL, Folder, Reject, file_name

SECONDS = 300.0  # of work that a lost machine may cost
_ABOUT = b"patchrank.part"
_DIGEST = 32  # bytes


@dataclass(frozen=True)
class Done:
    """The samples of a shard that need no more work: their rows, and those that were lost on the way to a row."""

    table: pa.Table
    lost: list[Reject]


class Partial:
    """Keeps what is done of one shard, on disk or in a bucket.

    Args:
        folder: of results.
        shard: its absolute URI.
        every: seconds of work after which what is done is written; less where the next batch would make it more.
        about: JSON values that what is found must have been written with, beside the folder's settings.
        write: a URI and bytes; as `storage.write_atomic`.
    """

    def __init__(
        self,
        folder: Folder,
        shard: str,
        every: float = SECONDS,
        about: Mapping[str, Any] | None = None,
        write: Callable[[str, bytes], None] = storage.write_atomic,
    ) -> None:
        self._uri = folder.beside(PARTIAL, _name(shard))
        self._every, self._write = every, write
        self._about = {"fingerprint": folder.fingerprint, "shard": shard, "file": _file(shard), **(about or {})}
        self._there = False  # as far as this try knows
        self._written = self._called = time.monotonic()

    def found(self) -> Done | None:
        """What an earlier try has left; None where that is nothing, damaged, or of another shard or other settings."""
        try:
            data = storage.read_bytes(self._uri)
            self._there = True
            if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
                return None
            table = pa.ipc.open_stream(memoryview(data)[_DIGEST:]).read_all()
            about = json.loads(table.schema.metadata[_ABOUT])
        except (OSError, pa.ArrowException, LookupError, ValueError, TypeError):
            return None
        lost = [Reject(*each) for each in about.pop("lost")]
        return Done(table.replace_schema_metadata(None), lost) if about == self._about else None

    def begin(self) -> None:
        """The work begins now; waiting for its turn, or for the first images, was none."""
        self._written = self._called = time.monotonic()

    def step(self, tables: Sequence[pa.Table], lost: Sequence[Reject]) -> None:
        """Called after each batch, with all that is done: written where it is time to.

        Raises:
            Exception: as `write` does.
        """
        now = time.monotonic()
        took, self._called = now - self._called, now
        if now + took - self._written > self._every:
            about = {**self._about, "lost": list(map(astuple, lost))}
            self._write(self._uri, _encode(pa.concat_tables(tables), about))
            self._there = True
            self._written = self._called = time.monotonic()

    def remove(self) -> None:
        """The shard has its table: what was found or written is of no more use, which in a bucket costs nothing to see.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._there:
            storage.delete(self._uri)


def kept(folder: Folder, shards: Iterable[str]) -> set[str]:
    """Those of some shards of which a part is kept: one listing."""
    there = {info.base_name for info in storage.files(folder.beside(PARTIAL))}
    return {shard for shard in shards if _name(shard) in there} if there else set()


class Watch:
    """Tells whether the parts of a folder's shards grow.

    Args:
        folder: of results.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._seen: dict[str, list[int | None] | None] = {}

    def grown(self, shard: str) -> bool:
        """Whether there is a part of a shard, and another than when this was last asked."""
        before = self._seen.get(shard)
        self._seen[shard] = found = _file(self._folder.beside(PARTIAL, _name(shard)))
        return found not in (None, [None, None], before)


def remove(folder: Folder, shards: Iterable[str]) -> None:
    """Remove the parts of shards that have their table, and what was left half-written when a machine was lost."""
    for shard in kept(folder, shards):
        storage.delete(folder.beside(PARTIAL, _name(shard)))


def _name(shard: str) -> str:
    return file_name(shard).removesuffix(".parquet") + ".part"


def _file(shard: str) -> list[int | None] | None:
    """What tells the file of a shard from another of the same name: its size, and nanoseconds since 1970."""
    with contextlib.suppress(OSError, UserError):  # whoever reads it says so
        system, path = storage.resolve(shard)
        info = system.get_file_info(path)
        return [info.size, info.mtime_ns]
    return None


def _encode(table: pa.Table, about: Mapping[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    schema = table.schema.with_metadata({_ABOUT: json.dumps(about)})
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    data = sink.getvalue().to_pybytes()
    return hashlib.sha256(data).digest() + data
