"""A folder of tables, a file a shard, as its readers see it: rows, rejects, shards, whatever the rows are of.

`patchrank.store.folder` says how a folder keeps them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from patchrank.errors import UserError
from patchrank.store import card, storage
from patchrank.store.folder import FINGERPRINT, REJECTS_SCHEMA, SHARD, VERBS, Folder, Kind, file_name, parquet_files

DONE: dict[str, str] = {"search": "ranked", "embedding": "embedded"}  # what happened to an image, by kind
_TABLE = re.compile(r"-[0-9a-f]{8}\.parquet$")  # the name of a shard's table, as `file_name` makes it


class Corpus:
    """The tables of one job.

    Attributes:
        kind: of the folder.
        rows: what its rows are, for messages.
        folder: its URI, absolute.
        home: the folder itself.
        settings: of the job, from KIND.json.
        fingerprint: of the settings.

    Raises:
        UserError: no such folder, no KIND.json in it, or no tables yet. Whatever opens its files raises it too, for one
            that is damaged or belongs to another job.
    """

    kind: ClassVar[Kind]
    rows: ClassVar[str]

    def __init__(self, folder: str) -> None:
        self.home = Folder(folder, self.kind)
        self.folder = self.home.uri
        try:
            if not storage.exists(self.folder):
                raise UserError(f"{folder}: no such folder")
            found = self.home.read()
            if found is None:
                raise UserError(f"{folder}: holds no {self.kind}.json, so it is not a folder of {self.rows}")
            self.files = parquet_files(self.folder)  # base names
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({storage.one_line(error)})") from None
        if not self.files:
            raise UserError(f"{folder}: holds no {self.rows} yet; run the {self.kind} again to go on with it")
        self._named: set[str] = set()  # files that were left out, and named
        self.settings: dict[str, Any] = found["settings"]
        self.fingerprint: str = found["fingerprint"]

    def __len__(self) -> int:
        return self.dataset.count_rows()

    @functools.cached_property
    def dataset(self) -> ds.Dataset:
        """All rows, sorted by file."""
        found = self._dataset(self.folder, self.files)
        if found is None:
            raise UserError(f"{self.folder}: none of its Parquet files is the table of a shard")
        return found

    @property
    def class_names(self) -> list[str] | None:
        """The name of each label, where the job knew them."""
        return self.settings.get("about", {}).get("class_names")

    def rejects(self) -> pa.Table:
        """The samples that could not be used: `key`, `shard`, `reason`."""
        folder = self.home.beside("rejects")
        found = self._dataset(folder, parquet_files(folder))
        return REJECTS_SCHEMA.empty_table() if found is None else found.to_table()

    def shards(self) -> list[str]:
        """The URIs of the shards that have tables, sorted by their names."""

        def shard(name: str) -> str | None:
            path = storage.join(self.folder, name)
            system, inner = storage.resolve(path)
            try:
                return _shard_of(pq.read_metadata(inner, filesystem=system).metadata)
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(path, error) from None

        files = self._named_as_tables(self.folder, self.files)
        with ThreadPoolExecutor(16) as pool:  # for buckets
            found = dict(zip(files, pool.map(shard, files), strict=True))
        return [uri for name, uri in found.items() if uri and name in self._own(self.folder, found)]

    def shard(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one shard, in the order of its samples; all columns unless some are named.

        Raises:
            UserError: the shard has no table in this folder.
        """
        path = storage.join(self.folder, file_name(uri))
        system, inner = storage.resolve(path)
        try:
            with pq.ParquetFile(inner, filesystem=system) as file:
                self._check(path, file.metadata.metadata)
                return file.read(columns=None if columns is None else list(columns)).replace_schema_metadata(None)
        except FileNotFoundError:
            missing = f"holds no {self.rows} of {uri}; run the {self.kind} on that shard first"
            raise UserError(f"{self.folder}: {missing}") from None
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(path, error) from None

    def push_to_hub(self, repo: str, private: bool | None = None) -> str:
        """Put the folder, which is local, on the Hugging Face hub as a dataset.

        The card becomes the README.md there, unless there is one, which may have been edited since.

        Args:
            repo: "me/my-rankings"; made where there is none.
            private: as huggingface_hub has it.

        Returns:
            The dataset's URI, hf://datasets/REPO.

        Raises:
            UserError: the folder is none of this machine, or what the hub says.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if not storage.is_local(self.folder):
            raise UserError(f"{self.folder}: must be a folder of this machine to be put on the hub")
        api = HfApi()
        where: dict[str, Any] = {"repo_id": repo, "repo_type": "dataset"}
        try:
            api.create_repo(**where, private=private, exist_ok=True)
            api.upload_folder(**where, folder_path=self.folder, ignore_patterns=["**/.*", ".*"])
            read_me = self.home.beside(card.FILE)
            if storage.exists(read_me) and not api.file_exists(**where, filename=card.FILE):
                api.upload_file(**where, path_or_fileobj=read_me, path_in_repo=card.FILE)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(f"{repo}: {storage.one_line(error)}") from None
        return f"hf://datasets/{repo}"

    def _dataset(self, folder: str, names: Sequence[str]) -> ds.Dataset | None:
        """A dataset over files of a folder, all of this job, without those that are no table of a shard; or None."""
        names = self._named_as_tables(folder, names)
        if not names:
            return None
        system, inner = storage.resolve(folder)

        def checked(fragment: ds.ParquetFileFragment) -> tuple[str, str | None]:
            name = fragment.path.rpartition("/")[2]
            path = storage.join(folder, name)
            try:
                self._check(path, fragment.metadata.metadata)
                return name, _shard_of(fragment.metadata.metadata)
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(path, error) from None

        try:
            schema = pq.read_schema(f"{inner}/{names[0]}", filesystem=system).remove_metadata()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(storage.join(folder, names[0]), error) from None
        dataset = ds.dataset([f"{inner}/{name}" for name in names], schema, format="parquet", filesystem=system)
        with ThreadPoolExecutor(16) as pool:  # for buckets; a scan needs these footers anyway and finds them read
            found = dict(pool.map(checked, dataset.get_fragments()))
        own = self._own(folder, found)
        return dataset if len(own) == len(names) else self._dataset(folder, own)

    def _named_as_tables(self, folder: str, names: Sequence[str]) -> list[str]:
        """Those of some files that may be tables by their names; the others, which anybody may have put there, are not
        asked to be readable, and named on stderr."""
        for name in names:
            if not _TABLE.search(name):
                system, path = storage.resolve(storage.join(folder, name))
                shard = None
                with contextlib.suppress(pa.ArrowException, OSError):
                    shard = _shard_of(pq.read_metadata(path, filesystem=system).metadata)
                self._leave_out(folder, name, _not_of(shard))
        return [name for name in names if _TABLE.search(name)]

    def _own(self, folder: str, shards: Mapping[str, str | None]) -> list[str]:
        """Those of some files, by name, that are tables of shards, each shard once; the others are named on stderr."""
        own: dict[str, str] = {}  # by where a shard really is
        for name, shard in shards.items():
            place = None if shard is None else storage.place(shard)
            if shard is None or name != file_name(shard):
                reason = _not_of(shard)
            elif place in own:
                reason = f"is of the same shard as {own[place]}, by another path"
            else:
                own[str(place)] = name
                continue
            self._leave_out(folder, name, reason)
        return list(own.values())

    def _leave_out(self, folder: str, name: str, reason: str) -> None:
        if name not in self._named:
            print(f"warning: {storage.join(folder, name)}: left out, as it {reason}", file=sys.stderr)
            self._named.add(name)

    def _check(self, path: str, metadata: Mapping[bytes, bytes] | None) -> None:
        theirs = (metadata or {}).get(FINGERPRINT.encode(), b"none").decode()
        if theirs != self.fingerprint:
            raise UserError(
                f"{path}: a file of another {self.kind} (fingerprint {theirs}; the folder's is {self.fingerprint}); "
                "take it out of the folder"
            )

    def _unreadable(self, path: str, error: BaseException) -> UserError:
        again = f"if it is damaged, delete it and {VERBS[self.kind]} again"
        return UserError(f"{path}: cannot be read ({storage.one_line(error)}); {again}")


def _not_of(shard: str | None) -> str:
    """Why a file is not the table of the shard that its metadata name."""
    if shard is None:
        return "is no table of a shard"
    return f"has another name than the table of its shard, {file_name(shard)}"


def _shard_of(metadata: Mapping[bytes, bytes] | None) -> str | None:
    """The URI of a table's shard; None of a file of others."""
    shard = (metadata or {}).get(SHARD.encode())
    return None if shard is None else shard.decode()
