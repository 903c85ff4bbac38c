"""WebDataset shards: find them on a disk, in buckets, on the hub or the web, stream samples, say what is wrong."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import gzip
import io
import itertools
import json
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, cast
from urllib.parse import urlsplit

from braceexpand import braceexpand
from PIL import Image
from pyarrow import fs
from webdataset.tariterators import base_plus_ext

from patchrank.data import image_folder
from patchrank.data.images import decode, max_bytes
from patchrank.errors import UserError
from patchrank.store import storage, text
from patchrank.store.folder import Reject
from patchrank.store.storage import one_line
from patchrank.store.unfetched import stand_in

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
LIST_SUFFIXES = (".txt", ".list")
IMAGE_EXTENSIONS = image_folder.EXTENSIONS  # in the order in which they are preferred, see `read`
LABEL_EXTENSIONS = ("cls", "json")  # likewise
CAPTION_EXTENSION = "txt"

# The last four: from tarfile, on headers that pass their checksum and hold nonsense.
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, LookupError, OverflowError, MemoryError)
_BUFFER = 4 << 20  # bytes a read: on an object store every read is one request
_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_MAX_TEXT = 1 << 20  # bytes of a label or of a header
_COMPRESSED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "lz4"}
_ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"PAR1": "Parquet"}
_GZIP = b"\x1f\x8b"
_NO_TARS = {
    _GZIP: "compressed by gzip twice: decompress it once",
    **{
        magic: f"compressed by {kind}, and tars are read plain or by gzip: decompress it"
        for magic, kind in _COMPRESSED.items()
    },
    **{
        magic: f"a {kind} file, and shards are tars: unpack it, and jobs/make_shards.py makes them"
        for magic, kind in _ARCHIVES.items()
    },
}
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON can hold and no table
_QUERY = re.compile(r"\?\w+=.*")  # the options of a URI, as against `?` as a wildcard


@dataclass(frozen=True)
class Sample:
    """One image of a shard, still encoded. `label` is None where the sample has none, `captions` are empty."""

    key: str
    image: bytes
    label: int | None
    captions: tuple[str, ...] = ()


class ShardError(Exception):
    """The shard cannot be read (any further). The message is one line that says what happened, without the URI."""


def expand(specs: Sequence[str]) -> list[str]:
    """The URIs of all shards that the specs name, in order, without duplicates; one by two paths is told on stderr.

    A spec is, on disk, s3://, gs://, hf:// or https:// (which cannot be listed):

    - a shard, which need not exist: reading it raises `ShardError`, and the other shards can still be read;
    - a brace expression, `data/x-{000000..000012}.tar` or `{a,b}.tar`, of any of these specs;
    - a glob with `*`, `?` or `[...]`, none of which matches a slash or a leading dot;
    - a folder: the .tar, .tar.gz and .tgz files right in it, sorted; of a local one without any, the folders at and
      below it that hold images, each of which is read as a shard (see `patchrank.data.image_folder`);
    - a list file, .txt or .list: one spec a line, relative to the list file's folder; blank and # lines are skipped.

    Returns:
        URIs as `storage.absolute` spells them.

    Raises:
        UserError: a glob or folder matches no shard, a list file cannot be read, a bucket cannot be reached, a spec
            that is not named as a shard does not exist, or there is no spec at all.
    """
    found: dict[str, str] = {}  # by where it really is
    real = functools.cache(os.path.realpath)  # of folders: many shards are in one
    for uri in dict.fromkeys(uri for spec in specs if spec.strip() for uri in _expand(spec, ())):
        first = found.setdefault(storage.place(uri, real), uri)
        if first != uri:
            print(f"warning: {uri}: left out, as it is {first} by another path", file=sys.stderr)
    uris = list(found.values())
    if not uris:
        raise UserError("no shards given: name a shard, brace expression, glob, folder or list file (.txt, .list)")
    for uri in {urlsplit(uri)[:2]: uri for uri in reversed(uris) if not storage.is_local(uri)}.values():
        _info(uri)  # one a bucket: better to hear now than once a shard that it is out of reach
    return uris


def read(uri: str, limit: int | None = None) -> Iterator[Sample | Reject]:
    """Stream the samples of one shard in its order, in constant memory but for the keys (to find duplicates).

    WebDataset conventions: the files of a sample are adjacent and share the name up to the first dot of the base name,
    which is the key. Extensions count in any case. The image is jpg, jpeg, png or webp; where a sample has several, the
    first in this order, so that a mask.png beside a photo.jpg is not taken for the image. The label is `cls` (decimal
    text) or else the field `label` of `json`. Captions are the lines of `txt`, or else the field `caption` or
    `captions` of `json`, a text or a list of texts. Hidden files and other extensions are ignored.

    A `Reject` is a sample without an image, with an unreadable label or with a file that is larger than any image
    within the limit on pixels (`images.max_bytes`), or one whose key an accepted sample had before.

    Args:
        uri: a tar, plain or gzip (told by content, not by name), on disk, s3://, gs://, hf:// or https://; or a local
            folder of images.
        limit: stop after this many samples; rejects count.

    Raises:
        ShardError: the shard is missing, not a tar, or damaged. The samples before the damage come first, but not the
            last one: more of its files may have been cut off. A tar without its end-of-archive marker (two zero blocks;
            GNU tar, Python and WebDataset write them) counts as truncated: nothing else gives away a cut between two
            files. A cut in the padding after the marker loses nothing and is no error.
    """
    seen: set[str] = set()
    with contextlib.ExitStack() as opened:
        try:
            if storage.is_local(uri) and os.path.isdir(storage.absolute(uri)):
                found = image_folder.samples(storage.absolute(uri))
            else:
                file = storage.patiently(uri, lambda: storage.open_input(uri))
                found = _samples(opened.enter_context(io.BufferedReader(file, _BUFFER)))
        except (OSError, UserError) as error:
            raise ShardError(one_line(error)) from None
        samples = itertools.islice(found, limit)
        for count in itertools.count():
            try:
                key, files, problem = next(samples, (None, {}, None))
            except _READ_ERRORS as error:
                reason = "truncated" if str(error) == "unexpected end of data" else one_line(error)  # tarfile's words
                raise ShardError(f"{reason}, after {count} sample{'s' * (count != 1)}") from None
            if key is None:
                return
            sample = Reject(key, problem) if problem else _sample(key, files, seen)
            if isinstance(sample, Sample):
                seen.add(key)
            yield sample


def photos(uri: str) -> Iterator[tuple[str, Image.Image]]:
    """Key and decoded image of each sample of a shard that can be used, for scripts that look at a few.

    Raises:
        UserError: the shard cannot be read (any further).
    """
    with readable(uri):
        for sample in read(uri):
            if isinstance(sample, Sample):
                try:
                    image = decode(sample.image)
                except ValueError:
                    continue
                yield sample.key, image


@contextlib.contextmanager
def readable(uri: str) -> Iterator[None]:
    """What cannot do without a shard: its `ShardError` becomes a `UserError` that names it."""
    try:
        yield
    except ShardError as error:
        raise UserError(f"{uri}: {error}") from None


def _expand(spec: str, lists: tuple[str, ...], base: str = "") -> Iterator[str]:
    """The shards of one spec. `lists` are the list files that led to it, `base` the folder that it is relative to."""
    try:
        words = list(braceexpand(spec))
    except ValueError as error:
        raise UserError(f"{spec}: {one_line(error)}") from None
    for word in words:
        word.encode()  # a name that is no UTF-8 is refused by itself, wherever it would first have to be written
        options = None if storage.is_local(base or word) else _QUERY.search(word)
        query = options.group() if options else ""
        name = word.removesuffix(query)
        path = storage.absolute(_join(base, name))
        if wildcard := re.search(r"[*?[]", name):
            if not storage.listable(path):
                raise UserError(f"{word}: https:// cannot be listed; name shards by braces or in a list file")
            slash = name.rfind("/", 0, wildcard.start()) + 1
            yield from _matches(word, storage.absolute(_join(base, name[:slash])), name[slash:], query)
        elif path.lower().endswith(LIST_SUFFIXES):
            yield from _listed(path, query, lists)
        elif path.lower().endswith(SHARD_SUFFIXES):
            yield path + query  # not looked up: that would be a request for each of thousands of shards
        elif (kind := _info(path + query).type) == fs.FileType.Directory:
            images = image_folder.folders(path) if storage.is_local(path) and not any(_glob(path, ["*"], "")) else []
            yield from images or _matches(word, path, "*", query)
        elif kind == fs.FileType.NotFound:
            raise UserError(f"{word}: no such folder or shard; a shard's name ends in {', '.join(SHARD_SUFFIXES)}")
        else:
            yield path + query


def _matches(spec: str, folder: str, pattern: str, query: str) -> list[str]:
    uris = list(_glob(folder, pattern.split("/"), query))
    if not uris:
        raise UserError(f"{spec}: no shard there; a shard's name ends in {', '.join(SHARD_SUFFIXES)}")
    return uris


def _glob(folder: str, patterns: list[str], query: str) -> Iterator[str]:
    """The shards below a folder that match one pattern a level, sorted."""
    try:
        infos = storage.listing(folder + query)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({one_line(error)})") from None
    for info in infos:
        name = info.base_name
        if not fnmatch.fnmatchcase(name, patterns[0]) or (name.startswith(".") and not patterns[0].startswith(".")):
            continue
        uri = storage.join(folder, name)
        if len(patterns) > 1:
            if info.type == fs.FileType.Directory:
                yield from _glob(uri, patterns[1:], query)
        elif info.type == fs.FileType.File and name.lower().endswith(SHARD_SUFFIXES):
            yield uri + query


def _listed(path: str, query: str, lists: tuple[str, ...]) -> Iterator[str]:
    if path in lists:
        raise UserError(f"{path}: this list file names itself")
    try:
        lines = text.lines(text.decode(storage.read_bytes(path + query)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the list file cannot be read ({one_line(error)})") from None
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            relative = storage.is_local(line) and not os.path.isabs(os.path.expanduser(line.removeprefix("file://")))
            spec, base = (line + query, os.path.dirname(path)) if relative else (line, "")
            try:
                yield from _expand(spec, (*lists, path), base)
            except UserError as error:
                raise UserError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def _join(base: str, name: str) -> str:
    """A name below a folder, whose own name is no pattern whatever is in it."""
    return storage.join(base, name) if base else name


def _info(uri: str) -> fs.FileInfo:
    system, path = storage.resolve(uri)
    try:
        return system.get_file_info(path)
    except (
        Exception
    ) as error:  # of file systems that are not Arrow's own, such as hf://, whatever their libraries raise
        raise UserError(f"{uri}: cannot be reached ({one_line(error)})") from None


class _Header(tarfile.TarInfo):
    """A tar header that must be whole: tarfile takes a missing, cut or damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
            if header.type in _LONG_HEADERS and header.size > _MAX_TEXT:  # tarfile reads it in one piece
                raise tarfile.ReadError(f"damaged: a header of {header.size} bytes")
            return header
        except tarfile.HeaderError as error:
            if len(buf) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("truncated: no end-of-archive marker") from None
            if any(buf):
                raise tarfile.ReadError(f"damaged: {error}") from None
            raise  # a zero block: the end of the archive


def _samples(stream: io.BufferedReader) -> Iterator[tuple[str, dict[str, bytes], str | None]]:
    """Key, files by lower-case extension, and what is wrong with them, of each sample.

    A sample ends where the key changes or an extension comes again. The content of files that are not used, or are too
    large, is not read: a few bytes of a gzip can stand for any number.
    """
    start = stream.peek(tarfile.BLOCKSIZE)[: tarfile.BLOCKSIZE]
    if not start:
        raise ShardError("the file is empty")
    archive = cast(io.BufferedReader, gzip.GzipFile(fileobj=stream)) if start.startswith(_GZIP) else stream
    with contextlib.suppress(*_READ_ERRORS):  # that come again
        start = archive.peek(tarfile.BLOCKSIZE)[: tarfile.BLOCKSIZE]
    # Names that are not UTF-8 must still give keys that can be stored.
    try:
        tar = tarfile.TarFile(fileobj=archive, tarinfo=_Header, encoding="utf-8", errors="backslashreplace")
    except tarfile.ReadError as error:  # in the first header; that of a tar begins with a file's name, which may be any
        told = next((reason for magic, reason in _NO_TARS.items() if start.startswith(magic)), None)
        if told := told or stand_in(start, binary=True):
            raise ShardError(told) from None
        raise tarfile.ReadError(f"not a tar, or {error}") from None
    key, files, problem = "", dict[str, bytes](), None
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        name, extension = base_plus_ext(member.name)
        if name is None or not member.isreg() or os.path.basename(member.name).startswith("."):
            continue
        extension = extension.lower()
        if files and (name != key or extension in files):
            yield key, files, problem
            files, problem = {}, None
        key, files[extension] = name, b""
        if extension in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS, CAPTION_EXTENSION):
            limit = max_bytes() if extension in IMAGE_EXTENSIONS else _MAX_TEXT
            if member.size > limit and extension == CAPTION_EXTENSION:
                continue  # not a caption, whatever it is; the image is still good
            if member.size > limit:
                problem = f"its {extension} of {member.size} bytes exceeds the limit of {limit}"
            elif content := tar.extractfile(member):
                files[extension] = content.read()
    if files:
        yield key, files, problem
    if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself asks for one zero block only
        raise tarfile.ReadError("truncated: half an end-of-archive marker")
    while block := archive.read(_BUFFER):  # to the end: gzip has its checksum there
        if block.strip(b"\0"):
            raise tarfile.ReadError("data after the end-of-archive marker, as if several tars had been joined")
        if not key and len(block) > tarfile.RECORDSIZE:  # tars of no file are one record, as all their tools write them
            raise tarfile.ReadError("nothing but zeros, as of a download that was never filled in")


def _sample(key: str, files: dict[str, bytes], seen: set[str]) -> Sample | Reject:
    image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
    if key in seen and image is None:
        apart = f"only {_excerpt(', '.join(files))} here, and its image came before: a sample's files must be adjacent"
        return Reject(key, apart)
    if key in seen:
        return Reject(key, "duplicate key in this shard; the first one was kept")
    if image is None:
        reason = f"no image ({', '.join(IMAGE_EXTENSIONS)}) in the sample, only {_excerpt(', '.join(files))}"
        if any(name.rpartition(".")[2] in IMAGE_EXTENSIONS for name in files):
            reason += "; a key ends at the first dot of the file name"
        elif set(files) <= {*LABEL_EXTENSIONS, CAPTION_EXTENSION}:
            reason += "; a sample's files must be adjacent"
        return Reject(key, reason)
    try:
        return Sample(key, image, _label(files), _captions(files))
    except ValueError as error:
        return Reject(key, one_line(error))


def _label(files: dict[str, bytes]) -> int | None:
    """The label of a sample, None where it has none. Raises ValueError with the reason where it cannot be read."""
    if "cls" in files:
        try:
            label: object = text.decode(files["cls"])
        except ValueError as error:
            raise ValueError(f"the sample's cls is {error}") from None
    elif "json" in files:
        try:
            fields = json.loads(text.decode(files["json"]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the sample's json cannot be read: {one_line(error)}") from None
        label = fields.get("label") if isinstance(fields, dict) else None
        if label is None:
            return None
    else:
        return None
    written = label if isinstance(label, str) else json.dumps(label)
    if (found := text.label(written)) is None:
        raise ValueError(f"the label is not an integer of up to nine digits: {_excerpt(written)!r}")
    return found


def _captions(files: dict[str, bytes]) -> tuple[str, ...]:
    """The captions of a sample; none where there are none that can be read."""
    found: object = files.get(CAPTION_EXTENSION) and text.lines(text.decode(files[CAPTION_EXTENSION], errors="replace"))
    if not found and "json" in files:
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(text.decode(files["json"]))
            found = (fields.get("captions") or fields.get("caption")) if isinstance(fields, dict) else None
    lines = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    whole = (_SURROGATES.sub("\ufffd", line).strip() for line in lines if isinstance(line, str))
    return tuple(line for line in whole if line)


def _excerpt(content: str) -> str:
    """Text of unknown content, short and on one line."""
    content = " ".join(content.split())
    return content if len(content) <= 60 else content[:57] + "..."
