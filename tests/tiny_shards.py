"""Shards made and read for tests."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from patchrank.data import shards
from patchrank.data.shards import Sample, ShardError
from patchrank.store.folder import Reject


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


LABELS = (0, 2, 2, -1, 999_999_999, 0, 1)


def write_labelled(path: Path) -> Tensor:
    """Write a shard of random images with these labels, two of them out of any range. Its pixels, (7, 3, 16, 20)."""
    random_ = np.random.default_rng(0)
    pixels = random_.integers(0, 256, (len(LABELS), 16, 20, 3), dtype=np.uint8)
    with webdataset.TarWriter(str(path)) as writer:
        for number, label in enumerate(LABELS):
            writer.write({"__key__": str(number), "png": Image.fromarray(pixels[number]), "cls": label})
    return torch.stack([to_tensor(image) for image in pixels])


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
