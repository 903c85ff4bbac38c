"""What a lost actor and a lost driver had done of a shard is not done again, on a disk and in a bucket."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import boto3
import numpy as np
import psutil
import pytest
import webdataset as wds
from PIL import Image
from tiny_search import command, search, search_here, wait_for

from patchrank.data.images import MAX_PIXELS
from patchrank.store import rankings
from patchrank.store.folder import Folder
from patchrank.store.partial import Partial, kept

pytest_plugins = ["s3", "tiny_results"]

COUNT = 32


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A shard of images "w-0", "w-1", ..., of which "w-3" is broken."""
    path = tmp_path_factory.mktemp("shard") / "w.tar"
    random = np.random.default_rng(0)
    with wds.TarWriter(str(path)) as writer:
        for number in range(COUNT):
            pixels = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            writer.write({"__key__": f"w-{number}", **({"jpg": b""} if number == 3 else {"png": pixels}), "cls": 0})
    return path


def content(out):
    """The rows of a folder, and its rejects, whatever the place of the shard."""
    corpus = rankings.open(str(out))
    return [[row | {"shard": ""} for row in part.to_pylist()] for part in (corpus.dataset.to_table(), corpus.rejects())]


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_lost_actor_and_a_lost_driver_cost_a_part_of_the_shard(data, one, address, hold, tmp_path, s3_bucket, where):
    undisturbed = search_here(data, tmp_path / "undisturbed", shards=one, address=address)
    assert undisturbed.returncode == 0, undisturbed.stderr
    shard, out, flags = str(one), str(tmp_path / "out"), ["--actors", "1", "--keep-work", "0", "--address", address]
    if where == "bucket":  # whose endpoint a Ray of their own knows
        shard, out, flags = f"{s3_bucket}/w.tar", f"{s3_bucket}/out", flags[:4]
        boto3.client("s3").upload_file(str(one), s3_bucket.removeprefix("s3://"), "w.tar")

    def done():
        if (there := Folder(out).read()) is None:
            return 0
        about = {"max_pixels": MAX_PIXELS, "again": False}
        found = Partial(Folder(out, fingerprint=there["fingerprint"]), shard, about=about).found()
        return 0 if found is None else len(found.table)

    hold.at("w-21", "w-29")
    pipe = subprocess.PIPE
    with subprocess.Popen(command(data, out, *flags, shards=shard), stdout=pipe, stderr=pipe, text=True) as process:
        wait_for(lambda: done() == 12, process)  # whole batches of 4 of what is read, but for 8 that are being decoded
        (first,) = hold.waiting("w-21")
        hold.release("w-21")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: done() == 20, process)
        (second,) = hold.waiting("w-29")
        process.kill()
        process.communicate(timeout=120)
    wait_for(lambda: not psutil.pid_exists(second), seconds=120)
    hold.release()
    last = search(data, out, *flags, shards=shard)
    assert last.returncode == 0, last.stderr
    assert re.search(r"images +11 ranked, 20 kept from tries that were cut off, 1 rejected", last.stdout)
    assert content(out) == content(tmp_path / "undisturbed")
    assert kept(Folder(out), [shard]) == set()
