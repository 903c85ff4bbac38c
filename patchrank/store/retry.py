"""Rejected samples tried again: what a shard's table has is left out of the work, and put together afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import pyarrow as pa

from patchrank.store import rankings
from patchrank.store.folder import Folder, Reject, file_name, parquet_files


class _Keyed(Protocol):
    """A sample of a shard, or a reject."""

    @property
    def key(self) -> str: ...


_Sample = TypeVar("_Sample", bound=_Keyed)


def with_rejects(folder: Folder, shards: Iterable[str]) -> set[str]:
    """Those of finished shards of which samples were rejected."""
    there = set(parquet_files(folder.beside("rejects")))
    return {shard for shard in shards if file_name(shard) in there}


class Known:
    """What a finished shard has.

    Args:
        folder, shard: which.
    """

    def __init__(self, folder: Folder, shard: str) -> None:
        self.table = rankings.open(folder.uri).shard(shard)
        self._keys = set(self.table["key"].to_pylist())
        self._order: dict[str, int] = {}  # of the samples of the shard

    def others(self, samples: Iterable[_Sample]) -> Iterator[_Sample]:
        """The samples without those that have a row; a reject with the key of a row is one again."""
        for sample in samples:
            self._order.setdefault(sample.key, len(self._order))
            if sample.key not in self._keys or isinstance(sample, Reject):
                yield sample

    def joined(self, found: pa.Table) -> pa.Table:
        """The rows of before and what was found of `others`, once all of these were seen, in the shard's order."""
        table = pa.concat_tables([self.table, found.cast(self.table.schema)])
        places = [self._order.get(key, -1) for key in table["key"].to_pylist()]
        return table.take(sorted(range(len(places)), key=places.__getitem__))
