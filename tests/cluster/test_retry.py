"""Rejected samples are tried again, and nothing else is."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_model import save_model
from tiny_shards import tar

from cluster.places import Machines
from cluster.rank import SearchJob, search
from patchrank.errors import UserError
from patchrank.model.loading import ModelSource
from patchrank.search.config import SearchConfig
from patchrank.store import rankings
from patchrank.store.folder import BESIDE, file_name

pytest_plugins = ["shared_ray"]


def png(seed, size=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def shard(path, broken=()):
    """Six images, the fourth of 60 x 60 pixels; of two samples with one key the second is not used."""
    files = [(f"{n}.png", b"not an image" if n in broken else png(n, 60 if n == 3 else 24)) for n in range(6)]
    path.write_bytes(tar(*files, ("2.png", png(9))))
    return str(path)


@pytest.fixture
def job(address, tmp_path):
    def make(*shards, out="out", **more):
        model = ModelSource(save_model(tmp_path / f"model-{len(list(tmp_path.iterdir()))}"), dtype="float32")
        settings = {"model": model, "machines": Machines(address, 1, 1), "config": SearchConfig(steps=2)}
        return SearchJob(shards, str(tmp_path / out), **settings, **more)

    return make


@pytest.mark.long
def test_what_was_mended_comes_to_its_place(job, tmp_path):
    good, bad = shard(tmp_path / "good.tar"), shard(tmp_path / "bad.tar", broken=(0, 4))
    before = search(job(good, bad, max_pixels=3000))
    assert (before.total("images"), before.total("rejects")) == (8, 6)
    shard(tmp_path / "bad.tar", broken=(4,))  # the first image is mended
    again = job(good, bad, max_pixels=3000, retry_rejects=True)
    found = search(again)
    assert (found.total("images"), found.total("rejects"), found.resumed) == (1, 5, 0)
    assert search(again).total("images") == 0

    larger = search(job(good, bad, max_pixels=4000, retry_rejects=True))  # and now the limit is
    assert (larger.total("images"), larger.total("rejects")) == (2, 3)
    assert rankings.open(larger.folder).settings["max_pixels"] == 3000
    whole = search(job(good, bad, out="whole", max_pixels=4000))
    for uri in (good, bad):
        tables = [pq.read_table(f"{folder}/{file_name(uri)}") for folder in (larger.folder, whole.folder)]
        told, wanted = (table.select(["key", "ranking", "step"]).to_pylist() for table in tables)
        assert told == wanted
        scores = [np.array(table["score"].to_pylist()) for table in tables]  # images in other batches round otherwise
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
        rejects = [pq.read_table(f"{each.folder}/{BESIDE}/rejects/{file_name(uri)}") for each in (larger, whole)]
        assert sorted(map(str, rejects[0].to_pylist())) == sorted(map(str, rejects[1].to_pylist()))
    with pytest.raises(UserError, match="max_pixels: 3000 there, 4000 now"):
        search(job(good, bad, max_pixels=4000))


@pytest.mark.long
def test_a_shard_that_cannot_be_read_by_now_keeps_what_it_has(job, tmp_path):
    bad = shard(tmp_path / "bad.tar", broken=(0,))
    search(job(bad, max_pixels=3000))
    table = tmp_path / "out" / file_name(bad)
    there = table.read_bytes()
    (tmp_path / "bad.tar").write_bytes((tmp_path / "bad.tar").read_bytes()[:2000])
    found = search(job(bad, max_pixels=3000, retry_rejects=True))
    assert list(found.failures) == [bad] and "truncated" in found.failures[bad]
    assert table.read_bytes() == there
    assert search(job(bad, max_pixels=3000)).resumed == 1  # it still is finished
