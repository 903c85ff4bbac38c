"""Image files to WebDataset shards."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from webdataset import ShardWriter

from patchrank.data import images
from patchrank.data.image_folder import extension, walk
from patchrank.data.shards import IMAGE_EXTENSIONS
from patchrank.errors import UserError
from patchrank.store import storage, text
from patchrank.store.storage import one_line

LABEL = "label"  # the column of a CSV file that has them, unless another is named
_WINDOW = 64  # images in memory at a time


@dataclass(frozen=True)
class SourceImage:
    """An image to write: `path` as the user names it, relative to `folder`; `label` is None where it has none."""

    folder: str
    path: str
    label: int | None


@dataclass(frozen=True)
class Skipped:
    """An image that was not written; `reason` is one line."""

    path: str
    reason: str


def from_folders(folder: str) -> tuple[list[SourceImage], list[str]]:
    """The images of an ImageFolder tree, FOLDER/CLASS/**/x.jpg, sorted, and its class names by label.

    Labels number the sorted names of the class folders, as torchvision's ImageFolder does. Hidden files and folders do
    not count. Links to folders are followed, but every folder is visited once, as that of the class that it lies in.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of images")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"{folder}: the name of its folder {name!a} is no UTF-8; rename it, as it names a class")
    seen = {os.path.realpath(folder): "."}
    for name in names:
        place = os.path.realpath(os.path.join(folder, name))
        if place in seen:
            raise UserError(f"{folder}: {name} and {seen[place]} are one folder by two names; an image has one class")
        seen[place] = name
    walked = set(seen)
    files = [
        SourceImage(folder, os.path.relpath(os.path.join(parent, file), folder), label)
        for label, name in enumerate(names)
        for parent, file in walk(os.path.join(folder, name), walked)
        if extension(file) in IMAGE_EXTENSIONS
    ]
    if not files:
        raise UserError(f"{folder}: no image there; expected CLASS/IMAGE with a name in {', '.join(IMAGE_EXTENSIONS)}")
    return files, names


def from_any_folder(folder: str) -> list[SourceImage]:
    """The images of a folder and of those below it, sorted, without labels.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of images")
    files = [
        SourceImage(folder, os.path.relpath(os.path.join(parent, file), folder), None)
        for parent, file in walk(folder, {os.path.realpath(folder)})
        if extension(file) in IMAGE_EXTENSIONS
    ]
    if not files:
        raise UserError(f"{folder}: no image there with a name in {', '.join(IMAGE_EXTENSIONS)}, and no shard")
    return files


def from_csv(
    file: str, root: str | None = None, path_column: str = "path", label_column: str | None = None
) -> tuple[list[SourceImage], list[str] | None]:
    """The images of a CSV file with a header line, in its order, and the class names by label where labels are names.

    Args:
        file: the CSV file, with commas, its text as of `patchrank.store.text`.
        root: folder that the paths are relative to; None for the CSV file's.
        path_column: column of the paths.
        label_column: column of the labels; None for "label", which then may be missing. Labels are all integers, or all
            class names, which are numbered in sorted order. An empty label means none.

    Raises:
        UserError: the file cannot be read, has no such column, no rows, a row without a path, a negative label, or
            labels of both kinds.
    """
    try:
        with io.StringIO(text.decode(Path(file).read_bytes()), newline="") as stream:
            rows = csv.DictReader(stream, strict=True)
            rows.fieldnames = header = [name.strip() for name in rows.fieldnames or []]
            if not any(header):
                raise UserError(f"{file}: its first line is blank, and names the columns: {path_column} and others")
            columns = [path_column, *([label_column] if label_column else [])]
            for column in columns:
                if column not in header:
                    others = next((mark for mark in ";\t|" if mark in header[0]), None)
                    advice = f"; separate columns by commas, not by {others!r}" if others else ""
                    raise UserError(f"{file}: no column {column!r}, only {', '.join(header)}{advice}")
            if double := next((name for name in (path_column, label_column or LABEL) if header.count(name) > 1), None):
                raise UserError(f"{file}: two columns are named {double!r}: take one out")
            lines = []
            for row in rows:
                if any(row.get(None) or ()):
                    raise UserError(
                        f"{file}, line {rows.line_num}: more fields than the {len(header)} columns; commas in a field "
                        "need quotes around it"
                    )
                label = (row.get(label_column or LABEL) or "").strip()
                path = row[path_column] or ""
                if broken := next((field for field in (path, label) if re.search(r"[\r\n]", field)), None):
                    raise UserError(f"{file}, line {rows.line_num}: a line break in {broken!r}: a quote is not closed")
                lines.append((rows.line_num, path, label))
    except csv.Error as error:
        told = "a quote is not closed" if "end of data" in str(error) else one_line(error)
        raise UserError(f"{file}: cannot be read ({told})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
    if not lines:
        raise UserError(f"{file}: no rows")
    for number, path, _ in lines:
        if not path:
            raise UserError(f"{file}, line {number}: no path")
    labels = sorted({label for _, _, label in lines if label})
    if missing := next((label for label in labels if label.lower() in ("nan", "<na>")), None):
        raise UserError(f"{file}: label {missing} is none; leave it empty where an image has none")
    numbers = {label: text.label(label) for label in labels}
    if odd := next((label for label in labels if numbers[label] is None and text.is_number(label)), None):
        raise UserError(f"{file}: label {odd} is a number, but not an integer of up to nine digits")
    integers = [label for label in labels if numbers[label] is not None]
    if integers and len(integers) < len(labels):
        name = next(label for label in labels if label not in integers)
        raise UserError(f"{file}: labels are either integers or names, but there are {integers[0]!r} and {name!r}")
    if negative := next((label for label in integers if (numbers[label] or 0) < 0), None):
        raise UserError(f"{file}: label {negative} is negative; leave it empty where an image has none")
    if not integers:
        numbers = {label: index for index, label in enumerate(labels)}
        if like := next((label for label in labels if re.fullmatch(r"[+-]?\d[\d.,_' ]*([eE][+-]?\d+)?", label)), None):
            print(f"warning: {file}: label {like} is taken for the name of a class, not for a number", file=sys.stderr)
    if labels == [] and label_column is None and LABEL not in header and len(header) > 1:
        others = ", ".join(name for name in header if name != path_column)
        print(f"warning: {file}: no column {LABEL!r}, only {others}: no image has a label", file=sys.stderr)
    folder = root if root is not None else os.path.dirname(file)
    files = [SourceImage(folder, path, numbers.get(label)) for _, path, label in lines]
    return files, None if integers or not labels else labels


def write(
    files: Sequence[SourceImage], out: str, class_names: list[str] | None, prefix: str, samples_per_shard: int
) -> Generator[Skipped | None, None, None]:
    """Write images into OUT/PREFIX-000000.tar and so on, and the class names, if any, into OUT/classnames.json.

    A generator that works as it is iterated and yields once an image: None where it was written. A sample has the bytes
    of the image file, its label (cls) and its path (json); its key is its running number. A shard gets its name when it
    is complete; closing the generator early leaves only complete ones. The same input gives the same bytes.

    Args:
        files: the images, in the order in which to write them.
        out: local folder, made if there is none.
        class_names: the names by label; None where they are not known.
        prefix: first part of the shards' names.
        samples_per_shard: at most so many samples in a shard; only the last one has fewer.

    Raises:
        UserError: OUT has such shards or other class names already or cannot be written, or no image could be read.
    """
    if not re.fullmatch(r"\w[\w.-]*", prefix):
        raise UserError(f"--prefix {prefix}: takes letters, digits, '_', '-' and '.', but no '-' or '.' at the start")
    names = json.dumps(class_names).encode()
    names_path = Path(out, "classnames.json")
    try:
        os.makedirs(out, exist_ok=True)
        if any(re.fullmatch(rf"{re.escape(prefix)}-\d+\.tar", name) for name in os.listdir(out)):
            raise UserError(
                f"{out}: already has shards {prefix}-*.tar; choose another --out or --prefix, or delete them"
            )
        if class_names is not None and names_path.exists() and names_path.read_bytes() != names:
            raise UserError(f"{names_path}: has other class names; choose another --out, or delete it")
        with _shard_writer(out, prefix, samples_per_shard) as writer, ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(files), _WINDOW):
                window = files[start : start + _WINDOW]
                for file, content in zip(window, pool.map(_load, window), strict=True):
                    if isinstance(content, Skipped):
                        yield content
                        continue
                    sample = {extension(file.path): content, "json": json.dumps({"path": file.path}).encode()}
                    if file.label is not None:
                        sample["cls"] = str(file.label).encode()
                    writer.write({"__key__": f"{writer.total:09d}", **sample})
                    yield None
            if not writer.total:
                raise UserError(f"none of the {len(files)} images could be read")
        if class_names is not None:
            storage.write_atomic(str(names_path), names)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({one_line(error)})") from None


@contextlib.contextmanager
def _shard_writer(out: str, prefix: str, samples_per_shard: int) -> Iterator[ShardWriter]:
    """A ShardWriter whose shards have a temporary name until they are complete."""

    def publish(temporary: str) -> None:
        os.replace(temporary, os.path.join(out, os.path.basename(temporary)[1:].removesuffix(".tmp")))

    # Absolute, because ShardWriter takes what is before a colon for a scheme; its pattern is a format string.
    pattern = os.path.join(os.path.abspath(out).replace("%", "%%"), f".{prefix}-%06d.tar.tmp")
    writer = ShardWriter(
        pattern, samples_per_shard, maxsize=float("inf"), post=publish, verbose=0, encoder=False, mtime=0
    )
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.post = None  # what is open is not a complete shard
        with contextlib.suppress(OSError):
            writer.close()
        Path(writer.fname).unlink(missing_ok=True)
        raise


def _load(file: SourceImage) -> bytes | Skipped:
    """The content of an image file that can be decoded."""
    try:
        if extension(file.path) not in IMAGE_EXTENSIONS:
            raise ValueError(f"the name does not end in one of {', '.join(IMAGE_EXTENSIONS)}")
        content = Path(file.folder, file.path).read_bytes()
        images.decode(content)
        return content
    except (OSError, ValueError) as error:
        return Skipped(file.path, one_line(error))
