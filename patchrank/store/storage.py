"""One file-system layer for shards and results: local paths, s3:// and gs://, through pyarrow.fs.

hf:// (datasets and models of the Hugging Face hub) and https://, which can only be read, go through fsspec.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pyarrow import fs

from patchrank.errors import UserError

# How often S3 is asked before an error is reported: with pauses that double, two minutes of a bucket that only fails.
ATTEMPTS = 10
# Seconds before what was denied is asked for once more: a role that was just made, or a clock that was just set, takes
# up to a minute to be known everywhere.
DENIED_PAUSES = (1, 4, 10, 20)
_in_vain: set[str] = set()  # buckets that denied all of these: where a thousand shards are denied, one is waited for
# Seconds before a read of hf:// or https:// that failed is tried once more.
READ_PAUSES = (0.5, 1, 2, 4, 8, 16)
_READ_ONLY = ("http", "https")
_BLOCK = 4 << 20  # bytes a request
_S3_OPTIONS = {
    "connect_timeout": 10,  # seconds
    "request_timeout": 20,  # seconds without a byte
    "allow_delayed_open": True,  # one request for a small object instead of three, and no leftovers of a killed run
}


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine (no scheme, or file://)."""
    return "://" not in uri or uri.startswith("file://")


def listable(uri: str) -> bool:
    """Whether folders there can be listed, and files written: all but https://."""
    return uri.partition("://")[0] not in _READ_ONLY or is_local(uri)


def absolute(uri: str) -> str:
    """The one spelling of a URI: a local path is absolute and has no scheme; no trailing slash.

    Raises:
        UserError: credentials in the URI, which would show in every log and table.
    """
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    scheme, _, rest = uri.partition("://")
    user, at, bucket = rest.partition("/")[0].rpartition("@")
    if at and user != "anonymous":  # which is how gs:// asks to go without any
        raise UserError(
            f"{scheme}://{bucket}: credentials in a URI would show in logs and tables; put them into the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws"
        )
    path, options = split_options(uri)
    if listable(uri):  # nothing is found by a name with a double slash, and by one with dots what lies elsewhere
        path = f"{scheme}://{posixpath.normpath(path.partition('://')[2]).removeprefix('.')}"
    return path.rstrip("/") + options


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these from the "?" on; a local path has none, and may hold a "?"."""
    path, mark, options = (uri, "", "") if is_local(uri) else uri.partition("?")
    return path, mark + options


def place(uri: str, real: Callable[[str], str] = os.path.realpath) -> str:
    """Where a file is, by whatever path, link or options one comes to it; `real` may remember folders."""
    if not is_local(uri):
        return split_options(uri)[0]
    path = absolute(uri)
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(real(folder), name)


def join(folder: str, *names: str) -> str:
    """The URI of a file below a folder; the options of a remote URI, after "?", stay at its end."""
    path, options = split_options(folder)
    return "/".join([path.rstrip("/"), *names]) + options


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path inside it.

    Raises:
        UserError: the scheme is not known, or the bucket cannot be reached.
    """
    if is_local(uri):
        return fs.LocalFileSystem(), absolute(uri)
    path, mark_and_query = split_options(absolute(uri))
    scheme, _, rest = path.partition("://")
    if scheme in _READ_ONLY:
        return _remote(f"{scheme}://", ""), path + mark_and_query
    query = mark_and_query.removeprefix("?")
    options = [query] if query else []
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        options.append("retry_limit_seconds=30")  # pyarrow's default is a quarter of an hour
    bucket, slash, key = rest.partition("/")  # of the key "#" is a character like others
    system = _remote(f"{scheme}://{bucket}", "?" + "&".join(options) if options else "")
    return system, f"{bucket.rpartition('@')[2]}{slash}{key}".rstrip("/")


@functools.lru_cache(maxsize=64)  # connecting to a bucket asks for its region: one request a bucket, not one a shard
def _remote(bucket: str, query: str) -> fs.FileSystem:
    scheme = bucket.partition("://")[0]
    try:
        if scheme == "hf":
            from huggingface_hub import HfFileSystem

            return fs.PyFileSystem(_Handler(HfFileSystem()))
        if scheme in _READ_ONLY:
            import fsspec

            return fs.PyFileSystem(_Handler(fsspec.filesystem(scheme)))
        system = fs.FileSystem.from_uri(bucket + query)[0]
    except Exception as error:  # of file systems that are not Arrow's own, whatever their libraries raise
        known = "use a path, s3://, gs://, hf:// or https://"
        raise UserError(f"{bucket}: cannot be opened ({one_line(error)}); {known}") from None
    if isinstance(system, fs.S3FileSystem):
        # A URI cannot ask for these, so the file system is built again from what pickle would keep of it. Its own
        # retries come every 0.2 s for 6 s: too fast for a bucket that throttles us, and over too soon.
        _, (options,) = system.__reduce__()
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)  # pauses that double, up to 20 s, at random
        system = fs.S3FileSystem(**options | {"retry_strategy": retries, **_S3_OPTIONS})
    return system


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, for reports; its type's name where it has no message."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def one_line_errors(folder: str) -> Iterator[None]:
    """Errors of the disk or the bucket that has the folder of a job become one line: UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: {one_line(error)}; finished shards are kept") from None


_Found = TypeVar("_Found")


def patiently(uri: str, call: Callable[[], _Found]) -> _Found:
    """What a call gives that asks for a remote file; where it is denied, after some seconds, what it gives then.

    Raises:
        OSError: as the call does, once it was denied after every pause, or for another reason.
    """
    bucket = "/".join(uri.split("/")[:3])
    for pause in () if is_local(uri) or bucket in _in_vain else DENIED_PAUSES:
        try:
            return call()
        except OSError as error:
            if "ACCESS_DENIED" not in str(error):
                raise
        time.sleep(pause)
    try:
        return call()
    except OSError as error:
        if "ACCESS_DENIED" in str(error):
            _in_vain.add(bucket)
        raise


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Whatever a library raises of a network becomes an OSError, as Arrow's own file systems raise them."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), error.filename or str(error)) from None
    except OSError:
        raise
    except Exception as error:
        raise OSError(one_line(error)) from None


class _Handler(fs.FSSpecHandler):
    """A file system of fsspec's that is asked anew what there is: other processes write into a folder of results, too.

    The hub's keeps listings whatever it is told, and takes a network that is down for a folder that is not there.
    """

    def _forget(self) -> None:
        self.fs.dircache.clear()

    def get_file_info(self, paths: Any) -> list[fs.FileInfo]:
        self._forget()
        with _as_os_errors():
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        if selector.recursive:
            raise NotImplementedError("folders are listed one at a time")
        self._forget()
        try:
            with _as_os_errors():
                found = self.fs.ls(selector.base_dir, detail=True)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        return [self._create_file_info(info["name"], info) for info in found]

    def open_input_stream(self, path: str) -> Any:  # of small files, which are replaced
        self._forget()
        with _as_os_errors():
            return super().open_input_stream(path)

    def open_input_file(self, path: str) -> Any:  # of tables, which stay
        with _as_os_errors():
            try:
                return super().open_input_file(path)
            except FileNotFoundError:
                self._forget()
                return super().open_input_file(path)


class _Patient(io.RawIOBase):
    """A file of fsspec's that is read again where that fails, and fails with an OSError, whatever library it is of.

    Args:
        open: takes a block size; where that is 0 the file is sent in one go. So it is from a server that sends no
            parts, which cannot be asked twice for one, either.
    """

    def __init__(self, open: Callable[[int], Any]) -> None:
        super().__init__()
        self._open = open
        self._file = open(_BLOCK)
        self._parts = self._file.size is not None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            raise OSError("cannot be read from its end")
        if self._parts:
            self._file.seek(offset)
            self._position = offset
        while self._position < offset and self.read(min(_BLOCK, offset - self._position)):
            pass
        if self._position > offset:
            raise OSError("is sent from its beginning to its end alone")
        return self._position

    def readinto(self, buffer: Any) -> int:
        for pause in (*(READ_PAUSES if self._parts else ()), None):
            try:
                data = self._file.read(len(buffer))
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            except Exception as error:
                if self._parts and isinstance(error, ValueError):  # as fsspec has it where no parts are sent
                    self._in_one_go()
                    return self.readinto(buffer)
                if pause is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise OSError(one_line(error)) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _in_one_go(self) -> None:
        self._file.close()
        self._file, self._parts = self._open(0), False
        reached, self._position = self._position, 0
        self.seek(reached)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_input(uri: str) -> Any:
    """A file to read from its beginning, with `readinto`. Raises OSError where it cannot be read, here and later."""
    system, path = resolve(uri)
    if not isinstance(system, fs.PyFileSystem):
        return system.open_input_file(path)
    with _as_os_errors():
        return _Patient(lambda block: system.handler.fs.open(path, "rb", block_size=block))


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises OSError where it cannot be read."""
    system, path = resolve(uri)
    with system.open_input_stream(path, compression=None) as stream:
        return stream.read()


def exists(uri: str) -> bool:
    """Whether there is a file or folder at the URI."""
    system, path = resolve(uri)
    return system.get_file_info(path).type != fs.FileType.NotFound


def files(folder: str) -> list[fs.FileInfo]:
    """The files right below a folder, sorted by path; none where the folder does not exist.

    Raises:
        UserError: as `listing`.
    """
    return [info for info in listing(folder) if info.type == fs.FileType.File]


def listing(folder: str) -> list[fs.FileInfo]:
    """What is right below a folder, sorted by path; nothing where the folder does not exist.

    Raises:
        UserError: a name in it cannot be read as text.
    """
    system, path = resolve(folder)
    infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    try:
        return sorted(infos, key=lambda info: info.path)
    except UnicodeDecodeError as error:
        name = os.path.basename(os.fsdecode(error.object))
        raise UserError(f"{folder}: the name of {name!a} in it is no UTF-8; rename it") from None


def write_atomic(uri: str, data: bytes) -> None:
    """Write a file so that it exists whole or not at all: a temporary name and a rename on disk, one upload elsewhere.

    Raises:
        OSError: the data could not be written; nothing is left behind.
    """
    if not listable(uri):
        raise UserError(f"{uri}: can only be read; write to a path, s3://, gs:// or hf://")
    system, path = resolve(uri)
    if not is_local(uri):
        stream = system.open_output_stream(path)
        stream.write(data)
        stream.close()  # the object becomes visible here
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A file of a temporary name, to be written in the block, that takes the name of a local path when the block ends.

    Where the block ends with an error, nothing is left behind.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the data
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def delete(uri: str) -> None:
    """Delete a file; no error where there is none."""
    system, path = resolve(uri)
    # S3's own looks whether there is one, by one request; to ask what there is takes two where there is nothing.
    if isinstance(system, fs.S3FileSystem) or system.get_file_info(path).type == fs.FileType.File:
        with contextlib.suppress(FileNotFoundError):
            system.delete_file(path)


_UMASK = os.umask(0)  # mkstemp makes files private; the umask can only be read by setting it
os.umask(_UMASK)
