"""One shard in, one table out, whatever is done to the images."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from tiny_shards import write_labelled
from torchvision.transforms.functional import to_tensor

from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading, ShardJob
from patchrank.model.tower import Tower
from patchrank.store.folder import Reject


@pytest.fixture
def shard(tmp_path):
    write_labelled(tmp_path / "a.tar")
    return tmp_path / "a.tar"


def keys(batch):
    """A table of the keys of a batch, of which "2" overflows."""
    good = [key for key in batch.keys if key != "2"]
    return pa.table({"key": pa.array(good, pa.string())}), torch.tensor([key != "2" for key in batch.keys])


def made(tower, **options):
    return ShardJob("count", "the count", tower, pa.table({"key": pa.array([], pa.string())}), keys, **options)


def test_every_image_is_in_the_table_or_a_reject_with_its_reason(small_clip, shard):
    progress = Progress()
    found = made(Tower(small_clip().visual)).run(str(shard), Reading(to_tensor, batch=2, num_classes=3), progress)
    assert found.table["key"].to_pylist() == ["0", "1", "5", "6"] and found.error is None
    assert [(reject.key, reject.reason) for reject in found.rejects] == [
        ("2", "the count overflows in torch.float32; use --dtype float32"),
        ("3", "label -1 is negative"),
        ("4", "label 999999999 is not one of the 3 classes, 0 to 2"),
    ]
    assert (progress.images, progress.rejects) == (4, 3)


def test_the_time_is_booked_to_the_stage_that_the_job_names(small_clip, shard):
    progress = Progress()
    assert progress.seconds == {}
    made(Tower(small_clip().visual)).run(str(shard), Reading(to_tensor), progress)
    assert list(progress.seconds) == ["read", "decode", "count", "write"]
    assert progress.seconds["count"] > 0 and progress.seconds["read"] > 0 and progress.seconds["write"] == 0


def test_what_comes_before_the_damage_is_kept(small_clip, shard):
    content = shard.read_bytes()
    shard.write_bytes(content[: content.index(b"5.png")])
    found = made(Tower(small_clip().visual)).run(str(shard), Reading(to_tensor), Progress())
    assert "truncated" in found.error and found.table["key"].to_pylist() == ["0", "1", "4"]
    shard.unlink()
    found = made(Tower(small_clip().visual)).run(str(shard), Reading(to_tensor), Progress())
    assert "No such file" in found.error and found.table.column_names == ["key"] and not len(found.table)


def test_samples_that_are_not_wanted_are_left_out_or_rejected(small_clip, shard):
    def wanted(samples):
        for sample in samples:
            if sample.key != "0":
                yield Reject(sample.key, "unwanted") if sample.key == "1" else sample

    found = made(Tower(small_clip().visual), wanted=wanted).run(str(shard), Reading(to_tensor, limit=3), Progress())
    assert [(reject.key, reject.reason[:8]) for reject in found.rejects] == [("1", "unwanted"), ("2", "the coun")]
    assert len(found.table) == 0
