"""Shards made and read for tests."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import webdataset

from patchrank.data import shards
from patchrank.data.shards import Reject, Sample, ShardError


def tar(*files: tuple[str, bytes], **options) -> bytes:
    """A tar with these files, in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def samples(count: int, size: int = 700) -> list[Sample]:
    """Samples of random bytes, of sizes that do and do not fill the last block of a tar."""
    source = random.Random(0)
    return [Sample(f"{i:04d}", source.randbytes(size + 300 * (i % 3)), i % 10) for i in range(count)]


def write(path: Path, content: list[Sample]) -> bytes:
    """Write a shard with WebDataset's own writer. Its bytes."""
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for sample in content:
            writer.write({"__key__": sample.key, "jpg": sample.image, "cls": sample.label})
    return path.read_bytes()


def read_all(path: Path | str) -> tuple[list[Sample | Reject], str | None]:
    """What is read of a shard, and the error at its end."""
    found = []
    try:
        for sample in shards.read(str(path)):
            found.append(sample)
    except ShardError as error:
        assert "\n" not in str(error)
        return found, str(error)
    return found, None
