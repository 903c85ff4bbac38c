"""A folder of images read as if it were a shard: every image file right in it is a sample, folders below are others."""

from __future__ import annotations

import os
from collections.abc import Iterator

from patchrank.data.images import max_bytes
from patchrank.store.storage import one_line

EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def walk(folder: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Parent and name of files below a folder; folders whose real paths are in `seen` stay out, others are added."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        there, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        for name in there:
            real = os.path.realpath(os.path.join(parent, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        yield from ((parent, name) for name in sorted(files) if not name.startswith("."))


def folders(folder: str) -> list[str]:
    """Those of a local folder and the folders below it that hold an image, in the order in which they are found."""
    images = (parent for parent, name in walk(folder, {os.path.realpath(folder)}) if extension(name) in EXTENSIONS)
    return list(dict.fromkeys(images))


def extension(name: str) -> str:
    """Of a file's name: in lower case, without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def samples(folder: str) -> Iterator[tuple[str, dict[str, bytes], str | None]]:
    """Key, the image's bytes by extension, and what is wrong with it, of each image file right in a local folder.

    The key is the file's name. A file that cannot be read costs itself alone.

    Raises:
        OSError: the folder cannot be listed, or holds no image.
    """
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    # A link to nothing is told of; what is neither a file nor a link, such as a pipe, would keep us waiting.
    files = sorted(entry.name for entry in shown if entry.is_file() or (entry.is_symlink() and not entry.is_dir()))
    names = [name for name in files if extension(name) in EXTENSIONS]
    if not names:
        raise OSError("is a directory without an image")
    for name in names:
        key = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # that can be stored
        data, problem = b"", None
        try:
            with open(os.path.join(folder, name), "rb") as file:
                size, limit = os.fstat(file.fileno()).st_size, max_bytes()
                if size > limit:
                    problem = f"its file of {size} bytes exceeds the limit of {limit}"
                else:
                    data = file.read()
        except OSError as error:
            problem = f"cannot be read: {one_line(error)}"
        yield key, {extension(name): data}, problem
