"""A folder of results: whose it is, what is finished in it, and what a shard leaves there, whole or not at all.

OUT/.huggingface.yaml                      what `datasets` is to read: the tables
OUT/STEM-HASH.parquet                      the table of one shard; it repeats the fingerprint of the settings
OUT/__patchrank__/KIND.json                settings of the search, evaluation or embedding, and their fingerprint
OUT/__patchrank__/README.md                the dataset card
OUT/__patchrank__/rejects/....parquet      the samples of a shard that could not be used, and why
OUT/__patchrank__/failed/....json          a shard that could not be read, or only in part: the next run tries it again
OUT/__patchrank__/_partial/....part        what is done of a shard in work: see `patchrank.store.partial`

What is no table has a folder of its own, whose name pyarrow, pandas, Spark, Ray Data and datasets all take for none of
theirs: the first four leave out what begins with "_", the last one folders that begin with "__", and any other file
beside the tables, a README.md too, would be opened as Parquet. In folders of before 0.2 it is right in OUT: they are
read, and gone on with, as they are. A training has no tables, and its settings in OUT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from patchrank.errors import UserError
from patchrank.store import card, storage

Kind = Literal["search", "evaluation", "embedding", "training"]
TABLED: tuple[Kind, ...] = ("search", "evaluation", "embedding")  # of which a folder holds tables
BESIDE = "__patchrank__"  # what of a folder is no table
VERSION = "1"  # of the layout of folders with tables, and of their files
FINGERPRINT, FORMAT, SHARD = "patchrank.fingerprint", "patchrank.format", "patchrank.shard"  # metadata of every file
PARTIAL = "_partial"  # other readers pass over what begins so
REJECTS_SCHEMA = pa.schema([("key", pa.string()), ("shard", pa.string()), ("reason", pa.string())])

_ADVICE = "give another --out, or delete the folder"
_RECORD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*-[0-9a-f]{8}\.json")  # a record of a failure, and no copy of one
VERBS: dict[Kind, str] = {"search": "search", "evaluation": "evaluate", "embedding": "embed", "training": "train"}


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used; `reason` is one line."""

    key: str
    reason: str


Encode = Callable[[pa.Table, Mapping[str, str]], bytes]  # a table and its metadata as the bytes of a file


def serialise(table: pa.Table, metadata: Mapping[str, str], **options: Any) -> bytes:
    """A table as the bytes of a Parquet file; options as for `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", **options)
    return sink.getvalue().to_pybytes()


class Folder:
    """One folder of results; nothing is read or written before a method is called.

    Args:
        uri: a path, s3:// or gs://.
        kind: of what it holds; the file of its settings is named after it.
        fingerprint: of the settings, where they are known without `prepare`.

    Attributes:
        uri: absolute.
    """

    def __init__(self, uri: str, kind: Kind = "search", fingerprint: str = "") -> None:
        self.uri = storage.absolute(uri)
        self.kind = kind
        self.fingerprint = fingerprint
        self._beside: str | None = None  # where what is no table is, once that is known

    def beside(self, *names: str) -> str:
        """The URI of what is in the folder and no table. Raises OSError where the folder cannot be read."""
        if self._beside is None:
            ours, settings = storage.join(self.uri, BESIDE), f"{self.kind}.json"
            if self._has_tables and storage.exists(storage.join(ours, settings)):
                self._beside = ours
            elif not self._has_tables or storage.exists(storage.join(self.uri, settings)):  # of before 0.2
                self._beside = self.uri
            else:  # nobody has begun it yet
                return storage.join(ours, *names)
        return storage.join(self._beside, *names)

    def read(self) -> dict[str, Any] | None:
        """The `settings` of the folder and their `fingerprint`; None where there are none yet.

        Raises:
            UserError: their file is damaged, has been edited, or has another version.
            OSError: it cannot be read.
        """
        path = self.beside(f"{self.kind}.json")
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            return None
        try:
            content = json.loads(data)
            theirs, ours = content["fingerprint"], _fingerprint(content["settings"])
            version = content["format"] if self._has_tables else VERSION
        except (ValueError, TypeError, LookupError, AttributeError):
            mend = f"{'restore it, or ' if self._has_tables else ''}delete the folder and {VERBS[self.kind]} again"
            raise UserError(f"{path}: damaged; {mend}") from None
        if version != VERSION:
            raise UserError(f"{path}: has format {version}, and this version of patchrank reads {VERSION}")
        if theirs != ours:
            raise UserError(
                f"{path}: was edited, these are not the settings of the {self.kind}; restore it or delete the folder"
            )
        return content

    def prepare(self, settings: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Self:
        """Take the folder for a job: a new one, or one that holds a part of the same job.

        Removes temporary files that killed runs left, so a folder belongs to one run at a time.

        Args:
            settings: what decides the result, JSON values, nested as you like; `settings["about"]` is stored for
                readers, but does not decide anything and is not compared.
            columns: what those of the tables mean, for the folder's card; no card where None.

        Returns:
            The folder itself, which from now on has the fingerprint of the settings: 16 hexadecimal digits.

        Raises:
            UserError: the folder holds another job, or tables without settings, or cannot be written.
        """
        self.fingerprint = _fingerprint(settings)
        with self.usable():
            found = self.read()
            if found is not None:
                self.check_same(found["settings"], settings)
            elif self._has_tables and parquet_files(self.uri):
                raise UserError(
                    f"{self.uri}: holds Parquet files, but no {self.kind}.json that says of what {self.kind}; {_ADVICE}"
                )
            else:
                version = {"format": VERSION} if self._has_tables else {}
                content = version | {"fingerprint": self.fingerprint, "settings": settings}
                path = self.beside(f"{self.kind}.json")
                storage.write_atomic(path, json.dumps(content, indent=2).encode() + b"\n")
            path = self.beside(card.FILE)
            if columns and self.beside() != self.uri and not storage.exists(path):
                storage.write_atomic(path, card.render(self.kind, settings, columns).encode())
                storage.write_atomic(storage.join(self.uri, card.CONFIGS_FILE), card.CONFIGS.encode())
            for place in {self.uri, self.beside(), *map(self.beside, ("rejects", "failed", PARTIAL))}:
                for info in storage.files(place):
                    if info.base_name.startswith(".") and info.base_name.endswith(".tmp"):
                        storage.delete(storage.join(place, info.base_name))
        return self

    def check_same(self, there: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raises UserError, naming two settings that differ, where those in the folder are others."""
        different = _differences(there, settings)
        if different:
            more = f", and {len(different) - 2} more" if len(different) > 2 else ""
            raise UserError(f"{self.uri}: holds another {self.kind} ({', '.join(different[:2])}{more}); {_ADVICE}")

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Errors of the disk or the bucket become one line."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be used ({storage.one_line(error)}); give another --out") from None

    def holds(self) -> bool:
        """Whether its settings are there, and have its fingerprint, as seen from this machine."""
        found = self.read()
        return found is not None and found["fingerprint"] == self.fingerprint

    def tables(self, shards: Sequence[str]) -> list[str]:
        """Base names of the tables of these shards, as far as they are there."""
        there = set(parquet_files(self.uri))
        return [name for name in map(file_name, shards) if name in there]

    def finished(self, shards: Sequence[str]) -> set[str]:
        """The shards that have their table and no failure record: two listings, no file is opened."""
        done = set(parquet_files(self.uri))
        failed = {info.base_name for info in storage.files(self.beside("failed"))}
        return {shard for shard in shards if file_name(shard) in done and _failure_name(shard) not in failed}

    def write(
        self,
        shard: str,
        table: pa.Table,
        rejects: Sequence[Reject] = (),
        error: str | None = None,
        encode: Encode = serialise,
    ) -> int:
        """Write what came of a shard, its rejects before its table, so that a shard with a table is finished.

        Args:
            shard: its absolute URI.
            error: why it could be read only in part, if so.
            encode: table, metadata -> the bytes of a file; the same rows must give the same bytes.

        Returns:
            The number of bytes of the two files.

        Raises:
            OSError: the disk is full, or the folder cannot be written; no part of a file is left behind.
        """
        if error is not None:  # first, lest the part that could be read should ever pass for the whole
            self.record_failure(shard, error)
            if not len(table) and not rejects:
                return 0
        metadata = {FINGERPRINT: self.fingerprint, FORMAT: VERSION, SHARD: shard}
        name, size = file_name(shard), 0
        rejects_file = self.beside("rejects", name)
        if rejects:
            rows = [{"key": reject.key, "shard": shard, "reason": reject.reason} for reject in rejects]
            data = serialise(pa.Table.from_pylist(rows, REJECTS_SCHEMA), metadata)
            self._write(rejects_file, data)
            size += len(data)
        else:
            storage.delete(rejects_file)  # of an earlier try that could read less of the shard
        data = encode(table, metadata)
        self._write(storage.join(self.uri, name), data)
        if error is None:
            self.clear_failure(shard)
        return size + len(data)

    def _write(self, uri: str, data: bytes) -> None:
        """As `storage.write_atomic`, and patient: minutes of work would be lost with a shard's rows."""
        storage.patiently(uri, lambda: storage.write_atomic(uri, data))

    def record_failure(self, shard: str, error: str) -> None:
        """Note that a shard could not be read, or only in part: it counts as not finished until `clear_failure`."""
        content = json.dumps({"shard": shard, "error": error}).encode() + b"\n"
        storage.write_atomic(self.beside("failed", _failure_name(shard)), content)

    def clear_failure(self, shard: str) -> None:
        """Take back what `record_failure` noted, if anything."""
        storage.delete(self.beside("failed", _failure_name(shard)))

    def failures(self) -> list[dict[str, str]]:
        """The recorded failures, as {"shard", "error"}, sorted by shard."""
        place = self.beside("failed")
        names = [info.base_name for info in storage.files(place) if _RECORD.fullmatch(info.base_name)]
        return sorted((_failure(place, name) for name in names), key=lambda record: record["shard"])

    @property
    def _has_tables(self) -> bool:
        return self.kind in TABLED


def find(uri: str) -> Folder | None:
    """The folder at a URI that holds tables, whatever they are of; None where there is none, or none yet.

    Raises:
        OSError: it cannot be read.
    """
    for place in (storage.join(uri, BESIDE), uri):
        names = {info.base_name for info in storage.files(place)}
        for kind in TABLED:
            if f"{kind}.json" in names:
                found = Folder(uri, kind)
                found._beside = storage.absolute(place)
                return found
    return None


def file_name(shard: str) -> str:
    """The name of a shard's table. It follows from the shard's absolute URI alone, without options.

    The hash keeps apart shards of one base name in different folders; the stem is there for people. It does not begin
    with "_" or ".": readers pass over such files.
    """
    uri, _ = storage.split_options(storage.absolute(shard))  # the same shard at any endpoint and region
    base = re.sub(r"\.(tar|tar\.gz|tgz)$", "", uri.rpartition("/")[2])
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", base)[:100]  # no glob characters, and no name too long for a disk
    return f"{stem.lstrip('_.') or 'shard'}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}.parquet"


def parquet_files(folder: str) -> list[str]:
    """Base names of the Parquet files right below a folder, sorted; none where the folder does not exist.

    Hidden ones do not count, nor those that begin with "_", which other readers skip as well.
    """
    # An upload to a bucket that dies before its first byte can leave an empty object: that is no file yet.
    names = [info.base_name for info in storage.files(folder) if info.extension.lower() == "parquet" and info.size]
    return [name for name in names if not name.startswith((".", "_"))]


def _failure_name(shard: str) -> str:
    return file_name(shard).removesuffix(".parquet") + ".json"


def _failure(place: str, name: str) -> dict[str, str]:
    """One record; one that is damaged, such as the empty object that a dying upload can leave, still is a failure."""
    try:
        record = json.loads(storage.read_bytes(storage.join(place, name)))
        return {"shard": str(record["shard"]), "error": str(record["error"])}
    except (ValueError, LookupError, TypeError):
        return {"shard": name.removesuffix(".json"), "error": f"failed, and its record failed/{name} is damaged"}


def _fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that two jobs share if all their settings but `about` are equal."""
    deciding = {name: value for name, value in settings.items() if name != "about"}
    canonical = json.dumps(deciding, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What tells two nested settings apart, one "NAME: VALUE there, VALUE now" a setting; `about` is not compared."""
    there, now = _flat(there), _flat(now)

    def spelled(settings: Mapping[str, Any], name: str) -> str:
        return json.dumps(settings[name]) if name in settings else "not set"

    names = [*now, *(name for name in there if name not in now)]
    pairs = [(name, spelled(there, name), spelled(now, name)) for name in names]
    return [f"{name}: {before} there, {after} now" for name, before, after in pairs if before != after]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, without `about`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return {name: value for name, value in flat.items() if name.partition(".")[0] != "about"}
