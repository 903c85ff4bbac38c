"""What a lost actor and a lost driver had done of a shard is not done again, on a disk and in a bucket."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import boto3
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image
from tiny_search import command, once_waiting, search, search_here, wait_for

from cluster import embed, evaluate
from cluster.places import Machines
from patchrank.data.images import MAX_PIXELS
from patchrank.evaluation.latency import Timing
from patchrank.model.loading import ModelSource
from patchrank.store import rankings
from patchrank.store.folder import Folder, file_name
from patchrank.store.partial import Partial, kept

pytest_plugins = ["s3", "tiny_results"]

CHEAP = ["--steps", "1"]
COUNT = 500
FIRST, SECOND = 253, 405  # where an actor and a driver are lost


def made_before(number):
    """Images that were worked on once that one is read: whole batches of 4, without 8 being decoded, and the broken."""
    return (number - 1 - 8) // 4 * 4


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


@pytest.fixture(scope="module")
def whole(data, one, address, tmp_path_factory):
    """The search of that shard which nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = search_here(data, out, *CHEAP, shards=one, address=address)
    assert done.returncode == 0, done.stderr
    return content(out)


def content(out):
    """The rows of a folder, and its rejects, whatever the place of the shard."""
    corpus = rankings.open(str(out))
    return [[row | {"shard": ""} for row in part.to_pylist()] for part in (corpus.dataset.to_table(), corpus.rejects())]


def kept_images(folder, shard, about=None):
    """Of how many images of a shard in work rows are kept."""
    if (there := folder.read()) is None:
        return 0
    found = Partial(Folder(folder.uri, folder.kind, there["fingerprint"]), shard, about=about).found()
    return 0 if found is None else len(found.table["key"].unique())


@pytest.mark.long
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_lost_actor_and_a_lost_driver_cost_a_part_of_it(data, one, whole, address, hold, tmp_path, s3_bucket, where):
    shard, out = str(one), str(tmp_path / "out")
    flags = ["--actors", "1", "--keep-work", "0", *CHEAP, "--address", address]
    if where == "bucket":  # whose endpoint a Ray of their own knows
        shard, out, flags = f"{s3_bucket}/w.tar", f"{s3_bucket}/out", flags[:-2]
        boto3.client("s3").upload_file(str(one), s3_bucket.removeprefix("s3://"), "w.tar")

    def done():
        return kept_images(Folder(out), shard, {"max_pixels": MAX_PIXELS, "again": False})

    hold.at(f"w-{FIRST}", f"w-{SECOND}")
    pipe = subprocess.PIPE
    with subprocess.Popen(command(data, out, *flags, shards=shard), stdout=pipe, stderr=pipe, text=True) as process:
        wait_for(lambda: done() == made_before(FIRST), process)
        (first,) = hold.waiting(f"w-{FIRST}")
        hold.release(f"w-{FIRST}")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: done() == made_before(SECOND), process)
        (second,) = hold.waiting(f"w-{SECOND}")
        process.kill()
        process.communicate(timeout=120)
    wait_for(lambda: not psutil.pid_exists(second), seconds=120)
    hold.release()
    last = search(data, out, *flags, shards=shard)
    assert last.returncode == 0, last.stderr
    there, rest = made_before(SECOND), COUNT - 1 - made_before(SECOND)
    assert re.search(rf"images +{rest} ranked, {there} kept from tries that were cut off, 1 rejected", last.stdout)
    assert content(out) == whole
    assert kept(Folder(out), [shard]) == set()


def evaluated(name, machines, shard, out):
    job = evaluate.EvaluationJob(
        shards=[shard],
        out=out,
        model=evaluate.EvaluatedModel(name, dtype="float32"),
        pruning=evaluate.Pruning(methods=("class-attention", "random"), keep_rates=(0.5,)),
        timing=Timing((), (0.5,), 0),
        machines=machines,
        keep_work=0,
        images_per_batch=4,
    )
    return evaluate.run(job)


def embedded(name, machines, shard, out):
    model = ModelSource(name, dtype="float32")
    job = embed.EmbedJob([shard], out, model=model, machines=machines, keep_work=0, images_per_batch=4)
    return embed.embed(job)


@pytest.mark.parametrize(
    "kind, work", [pytest.param("evaluation", evaluated, marks=pytest.mark.long), ("embedding", embedded)]
)
def test_a_lost_actor_costs_an_evaluation_and_an_embedding_no_more(data, one, address, hold, tmp_path, kind, work):
    name, machines, shard = f"local-dir:{data / 'model'}", Machines(address, 1, cpus_per_actor=1), str(one)
    whole, disturbed = str(tmp_path / "whole"), str(tmp_path / "disturbed")
    work(name, machines, shard, whole)

    def lose(actor):
        wait_for(lambda: kept_images(Folder(disturbed, kind), shard) >= made_before(FIRST))
        os.kill(actor, signal.SIGKILL)

    with once_waiting(hold, f"w-{FIRST}", lose):
        found = work(name, machines, shard, disturbed)
    there = made_before(FIRST)
    assert [found.total(what) for what in ("kept", "images", "rejects")] == [there, COUNT - 1 - there, 1]
    first, second = (pq.read_table(f"{out}/{file_name(shard)}") for out in (whole, disturbed))
    assert first.equals(second) and len({*first["key"].to_pylist()}) == COUNT - 1
    assert kept(Folder(disturbed, kind), [shard]) == set()
