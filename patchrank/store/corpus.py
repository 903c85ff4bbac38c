"""Reading a rankings folder: as a pyarrow dataset, shard by shard, and as torch tensors."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from patchrank.errors import UserError
from patchrank.store import storage

VERSION = "1"  # of the layout of the folder and its files
FINGERPRINT, FORMAT, SHARD = "patchrank.fingerprint", "patchrank.format", "patchrank.shard"  # metadata of every file
REJECTS_SCHEMA = pa.schema([("key", pa.string()), ("shard", pa.string()), ("reason", pa.string())])

_INTEGERS = ("ranking", "step", "label", "prediction")
_TENSORS = (*_INTEGERS, "score", "confidence")


class Rankings:
    """The rankings of one search.

    Attributes:
        folder: its URI, absolute.
        settings: of the search, from search.json.

    Raises:
        UserError: no such folder, no search.json in it, or no rankings yet. Whatever opens its files raises it too,
            for one that is damaged or belongs to another search.
    """

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        try:
            if not storage.exists(self.folder):
                raise UserError(f"{folder}: no such folder")
            found = read_search(self.folder)
            if found is None:
                raise UserError(f"{folder}: holds no search.json, so it is not a folder of rankings")
            self.files = parquet_files(self.folder)  # base names
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({storage.one_line(error)})") from None
        if not self.files:
            raise UserError(f"{folder}: holds no rankings yet; run the search again to go on with it")
        self.settings: dict[str, Any] = found["settings"]
        self._fingerprint: str = found["fingerprint"]

    def __len__(self) -> int:
        return self.dataset.count_rows()

    @functools.cached_property
    def dataset(self) -> ds.Dataset:
        """All rankings, sorted by file; the columns are those of `patchrank.store.rankings.schema`."""
        return self._dataset(self.folder, self.files)

    @property
    def num_tokens(self) -> int:
        """N, the patch tokens of an image."""
        return self.dataset.schema.field("ranking").type.list_size

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The rates at which the pruned images were predicted."""
        return tuple(self.settings["keep_rates"])

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches, where the search knew them; a token's id is row * columns + column."""
        grid = self.settings.get("grid")
        return grid and (grid[0], grid[1])

    @property
    def class_names(self) -> list[str] | None:
        """The name of each label, where the search knew them."""
        return self.settings.get("about", {}).get("class_names")

    def rejects(self) -> pa.Table:
        """The samples that could not be ranked: `key`, `shard`, `reason`."""
        folder = storage.join(self.folder, "rejects")
        files = parquet_files(folder)
        return self._dataset(folder, files).to_table() if files else REJECTS_SCHEMA.empty_table()

    def shards(self) -> list[str]:
        """The URIs of the shards that have rankings, sorted by their tables' names."""

        def shard(name: str) -> str:
            path = storage.join(self.folder, name)
            system, inner = storage.resolve(path)
            try:
                return pq.read_metadata(inner, filesystem=system).metadata[SHARD.encode()].decode()
            except (pa.ArrowException, OSError, KeyError, TypeError) as error:
                raise _unreadable(path, error) from None

        with ThreadPoolExecutor(16) as pool:  # for buckets
            return list(pool.map(shard, self.files))

    def shard(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rankings of one shard, in the order of its samples; all columns unless some are named.

        Raises:
            UserError: the shard has no rankings in this folder.
        """
        path = storage.join(self.folder, file_name(uri))
        system, inner = storage.resolve(path)
        try:
            with pq.ParquetFile(inner, filesystem=system) as file:
                self._check(path, file.metadata.metadata)
                return file.read(columns=None if columns is None else list(columns)).replace_schema_metadata(None)
        except FileNotFoundError:
            raise UserError(f"{self.folder}: holds no rankings of {uri}; run the search on that shard first") from None
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None

    def tensors(self, columns: Sequence[str] = ("ranking", "score"), shard: str | None = None) -> dict[str, Any]:
        """Columns as torch tensors, of one shard or of all.

        Args:
            columns: any of ranking, score, step, label, prediction, confidence.

        Returns:
            `ranking`, `step`: (B, N) int64; `score`: (B, N) float32; `label`, `prediction`: (B,) int64, -1 where there
            is none; `confidence`: (B,) float32, NaN where there is none; and always `key`, a list of B strings.

        Raises:
            ValueError: another column.
        """
        import torch  # here, because queries do without it and it takes seconds to import

        for name in columns:
            if name not in _TENSORS:
                raise ValueError(f"{name}: no tensor of that name; there are {', '.join(_TENSORS)}")
        wanted = list(dict.fromkeys([*columns, "key"]))
        table = self.dataset.to_table(wanted) if shard is None else self.shard(shard, wanted)
        result: dict[str, Any] = {"key": table["key"].to_pylist()}
        for name in columns:
            column = table[name].combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                flat = column.flatten().to_numpy().reshape(len(table), column.type.list_size)  # (B, N)
            else:
                flat = column.fill_null(-1 if name in _INTEGERS else np.nan).to_numpy()  # (B,)
            result[name] = torch.from_numpy(flat.astype(np.int64 if name in _INTEGERS else np.float32))
        return result

    def _dataset(self, folder: str, names: Sequence[str]) -> ds.Dataset:
        """A dataset over files of a folder, all of this search."""
        system, inner = storage.resolve(folder)

        def check(fragment: ds.ParquetFileFragment) -> None:
            path = storage.join(folder, fragment.path.rpartition("/")[2])
            try:
                self._check(path, fragment.metadata.metadata)
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, error) from None

        try:
            schema = pq.read_schema(f"{inner}/{names[0]}", filesystem=system).remove_metadata()
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(storage.join(folder, names[0]), error) from None
        dataset = ds.dataset([f"{inner}/{name}" for name in names], schema, format="parquet", filesystem=system)
        with ThreadPoolExecutor(16) as pool:  # for buckets; a scan needs these footers anyway and finds them read
            list(pool.map(check, dataset.get_fragments()))
        return dataset

    def _check(self, path: str, metadata: Mapping[bytes, bytes] | None) -> None:
        theirs = (metadata or {}).get(FINGERPRINT.encode(), b"none").decode()
        if theirs != self._fingerprint:
            raise UserError(
                f"{path}: a file of another search (fingerprint {theirs}; the folder's is {self._fingerprint}); "
                "take it out of the folder"
            )


def file_name(shard: str) -> str:
    """The name of a shard's rankings file. It follows from the shard's absolute URI alone, without options.

    The hash keeps apart shards of one base name in different folders; the stem is there for people.
    """
    uri, _ = storage.split_options(storage.absolute(shard))  # the same shard at any endpoint and region
    base = re.sub(r"\.(tar|tar\.gz|tgz)$", "", uri.rpartition("/")[2])
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", base)[:100]  # no glob characters, and no name too long for a disk
    return f"{stem}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}.parquet"


def read_search(folder: str, kind: str = "search") -> dict[str, Any] | None:
    """The content of search.json: `settings` and their `fingerprint`; None where there is no such file.

    Args:
        kind: of what the folder holds, "search" or "evaluation"; the file is named after it.

    Raises:
        UserError: it is damaged, has been edited, or has another version.
        OSError: it cannot be read.
    """
    path = storage.join(folder, f"{kind}.json")
    verb = "search" if kind == "search" else "evaluate"
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(data)
        version, theirs, ours = content["format"], content["fingerprint"], fingerprint(content["settings"])
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UserError(f"{path}: damaged; restore it, or delete the folder and {verb} again") from None
    if version != VERSION:
        raise UserError(f"{path}: has format {version}, and this version of patchrank reads {VERSION}")
    if theirs != ours:
        raise UserError(
            f"{path}: was edited, these are not the settings of the {kind}; restore it or delete the folder"
        )
    return content


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that two searches share if all their settings but `about` are equal."""
    deciding = {name: value for name, value in settings.items() if name != "about"}
    canonical = json.dumps(deciding, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def parquet_files(folder: str) -> list[str]:
    """Base names of the Parquet files right below a folder, sorted; none where the folder does not exist."""
    # An upload to a bucket that dies before its first byte can leave an empty object: that is no file yet.
    return [info.base_name for info in storage.files(folder) if info.base_name.endswith(".parquet") and info.size]


def tables(folder: str, shards: Sequence[str]) -> list[str]:
    """Base names of the Parquet files that a folder has of these shards."""
    there = set(parquet_files(folder))
    return [name for name in map(file_name, shards) if name in there]


def _unreadable(path: str, error: BaseException) -> UserError:
    return UserError(
        f"{path}: cannot be read ({storage.one_line(error)}); if it is damaged, delete it and search again"
    )
