"""What a hostile shard or weights file cannot do, and what a local search does not open to the network."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from ipaddress import ip_address
from pathlib import Path

import pytest
import torch
from here import ROOT
from PIL import Image

from patchrank.data import images, shards
from patchrank.data.shards import Sample, ShardError
from patchrank.errors import UserError
from patchrank.model import loading
from patchrank.store.folder import Reject


@pytest.fixture
def at_most():
    """A function that limits the pixels of an image, for one test."""
    before = Image.MAX_IMAGE_PIXELS
    yield images.limit_pixels
    Image.MAX_IMAGE_PIXELS = before


def png(*size: int) -> bytes:
    Image.new("RGB", size).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def test_the_limit_on_pixels_can_be_set_both_ways(at_most):
    image = png(20, 10)
    for limit in (199, 50):  # Pillow itself would refuse the second, but only warn of the first
        at_most(limit)
        with pytest.raises(ValueError, match=r"200 pixels.* limit"):
            images.decode(image)
    at_most(200)
    assert images.decode(image).size == (20, 10)


def member(archive: tarfile.TarFile, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> None:
    """A file of zeros."""
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    archive.fileobj.write(header.tobuf(tarfile.USTAR_FORMAT))
    padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    for start in range(0, padded, 1 << 20):
        archive.fileobj.write(bytes(min(1 << 20, padded - start)))


def shard(path: Path, *files: tuple[str, int, bytes]) -> str:
    """A gzip of a few kilobytes that holds files of zeros; of headers of that size where the type says so."""
    with gzip.open(path, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, size, kind in files:
            member(archive, name, size, kind)
    return str(path)


def test_a_gzip_bomb_costs_its_sample_and_no_memory(tmp_path, at_most):
    at_most(1000)
    huge = 256 << 20
    uri = shard(
        tmp_path / "a.tar.gz",
        ("image.jpg", huge, tarfile.REGTYPE),
        ("label.jpg", 5, tarfile.REGTYPE),
        ("label.json", huge, tarfile.REGTYPE),
        ("good.jpg", 7, tarfile.REGTYPE),
        ("good.txt", huge, tarfile.REGTYPE),
    )
    tracemalloc.start()
    try:
        found = list(shards.read(uri))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [
        Reject("image", f"its jpg of {huge} bytes exceeds the limit of {images.max_bytes()}"),
        Reject("label", f"its json of {huge} bytes exceeds the limit of {1 << 20}"),
        Sample("good", bytes(7), None),
    ]
    assert peak < 40 << 20
    at_most(huge // 8)
    assert isinstance(next(shards.read(uri)), Sample)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_damage(tmp_path, kind):
    uri = shard(tmp_path / "a.tar.gz", ("good.jpg", 7, tarfile.REGTYPE), ("x", 256 << 20, kind))
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=f"a header of {256 << 20} bytes"):
            list(shards.read(uri))
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_no_member_of_a_tar_is_ever_written(tmp_path):
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../up.jpg", f"{tmp_path}/absolute.jpg", "link/through.jpg"):
            if name.startswith("link"):
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
                archive.addfile(link)
            header = tarfile.TarInfo(name)
            header.size = 3
            archive.addfile(header, io.BytesIO(b"abc"))
    before = sorted(tmp_path.rglob("*"))
    keys = [sample.key for sample in shards.read(str(path))]
    assert keys == ["../up", f"{tmp_path}/absolute", "link/through"]
    assert sorted(tmp_path.rglob("*")) == before


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "here I was")


@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_that_are_a_program_are_not_run(tmp_path, how, name):
    weights = {"visual.proj": Evil(tmp_path / "trace")}
    if how == "torch":
        torch.save(weights, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(weights))
    with pytest.raises(UserError, match="cannot be read as weights"):
        loading.load("ViT-B-32", str(tmp_path / name))
    assert not (tmp_path / "trace").exists()
    if how == "torch":
        torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=False)
        assert (tmp_path / "trace").exists()  # so it would have worked


LISTENING = """
import psutil, ray
from cluster.places import Machines, connected
with connected(Machines("local", 1, 1, 0)):
    ray.get(ray.remote(num_cpus=1)(lambda: None).remote())
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                print("listens", connection.laddr.ip)
"""


@pytest.mark.ray
def test_a_local_search_listens_on_the_loopback_interface_alone():
    done = subprocess.run([sys.executable, "-c", LISTENING], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    listening = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("listens ")]
    assert len(listening) > 3
    for address in map(ip_address, listening):
        assert (getattr(address, "ipv4_mapped", None) or address).is_loopback
