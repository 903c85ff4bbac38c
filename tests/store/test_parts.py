"""What is done of a shard in work is kept: a later try takes it from there, and the table is the same."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from PIL import Image
from tiny_shards import tar
from torchvision.transforms.functional import to_tensor

from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading, ShardJob
from patchrank.model.tower import Tower
from patchrank.store import partial, status
from patchrank.store.folder import Folder
from patchrank.store.partial import Partial

pytest_plugins = ["s3"]

BAD = {3: "no image", 4: "no image", 7: "overflows", 13: "no image", 17: "no label"}
COUNT = 20


class Lost(Exception):
    """The machine."""


def images(seed=0):
    """Samples of which some cannot be used: one of each kind before, in and after the part that is kept."""
    random = np.random.default_rng(seed)
    files = []
    for number in range(COUNT):
        Image.fromarray(random.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(stream := io.BytesIO(), "png")
        content = stream.getvalue()
        files.append((f"{number:02d}.png", b"broken" if BAD.get(number) == "no image" else content))
        if BAD.get(number) == "no label":
            files.append((f"{number:02d}.cls", b"nothing"))
    return tar(*files, ("05.png", content))


@pytest.fixture
def folder(request, tmp_path):
    bucket = getattr(request, "param", "disk") == "bucket"
    uri = f"{request.getfixturevalue('s3_bucket')}/out" if bucket else str(tmp_path / "out")
    return Folder(uri).prepare({"seed": 1})


@pytest.fixture
def shard(tmp_path):
    (tmp_path / "a.tar").write_bytes(images())
    return str(tmp_path / "a.tar")


@pytest.fixture
def work(small_clip, shard):
    """Make the table of the shard in batches of three, and lose the machine before some batch; its batches' keys."""
    tower = Tower(small_clip().visual)

    def run(part=None, lost_before=None, shard=shard):
        seen: list[list[str]] = []

        def rows(batch):
            if len(seen) == lost_before:
                raise Lost
            seen.append(batch.keys)
            good = torch.tensor([BAD.get(int(key)) != "overflows" for key in batch.keys])
            keys = [key for key, each in zip(batch.keys, good.tolist(), strict=True) if each]
            return table(keys, batch.pixels[good].sum(dim=(1, 2, 3)).tolist()), good

        def table(keys, values):
            sums = pa.array(values, pa.float32())
            shards = pa.array([shard] * len(keys), pa.string()).dictionary_encode()
            return pa.table({"key": pa.array(keys, pa.string()), "sum": sums, "shard": shards})

        job = ShardJob("count", "the count", tower, table([], []), rows)
        try:
            return job.run(shard, Reading(to_tensor, batch=3), Progress(), part=part), seen
        except Lost:
            return None, seen

    return run


@pytest.fixture
def clock(monkeypatch):
    """Every look at it is ten seconds after the last."""
    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(partial, "time", SimpleNamespace(monotonic=lambda: next(now)))


@pytest.mark.parametrize("folder", ["disk", "bucket"], indirect=True)
def test_a_lost_try_is_gone_on_with(folder, work, shard):
    whole, batches = work()
    assert [len(keys) for keys in batches] == [3] * 5 + [1] and len(whole.table) == 15
    assert [reject.key for reject in whole.rejects] == ["03", "04", "05", "07", "13", "17"]  # in the shard's order
    for start, lost_before in ((0, 0), (0, 2), (2, 2)):
        assert work(Partial(folder, shard, 0), lost_before)[1] == batches[start : start + lost_before]
    found, seen = work(part := Partial(folder, shard, 0))
    assert seen == batches[4:]
    assert found.table.equals(whole.table) and found.rejects == whole.rejects
    part.remove()
    assert part.found() is None and partial.kept(folder, [shard]) == set()


def test_as_much_work_as_was_told_is_repeated_at_most(folder, work, shard, clock):
    """A batch takes ten seconds here, and what would be lost with the next one counts."""
    for seconds, kept in ((1000, 0), (35, 3), (25, 4)):
        partial.remove(folder, [shard])
        work(Partial(folder, shard, seconds), 5)
        done = Partial(folder, shard).found()
        assert (0 if done is None else len(done.table) + sum(reject.key == "07" for reject in done.lost)) == 3 * kept


@pytest.mark.parametrize("what", ["shard", "settings", "about", "cut", "flipped", "emptied", "foreign"])
def test_what_is_damaged_or_of_something_else_is_ignored(folder, work, shard, tmp_path, what):
    about = {"max_pixels": 100}
    work(Partial(folder, shard, 0, about), 3)
    (file,) = (tmp_path / "out" / "__patchrank__" / "_partial").iterdir()
    assert Partial(folder, shard, 0, about).found() is not None
    data = file.read_bytes()
    if what == "shard":
        (tmp_path / "a.tar").write_bytes(images(seed=1))
        os.utime(shard, ns=(1, 1))
    elif what == "settings":
        folder = Folder(folder.uri, fingerprint="another")
    elif what == "about":
        about = {"max_pixels": 200}
    else:
        middle = len(data) // 2
        changed = {
            "cut": data[:middle],
            "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "emptied": b"",
            "foreign": b"something else",
        }
        file.write_bytes(changed[what])
    found, seen = work(part := Partial(folder, shard, 0, about))
    assert len(seen) == 6 and found.table.equals(work()[0].table)
    part.remove()
    assert not list(file.parent.iterdir())


@pytest.mark.parametrize("folder", ["disk", "bucket"], indirect=True)
def test_whether_a_try_got_further_is_told(folder, work, shard):
    watch = partial.Watch(folder)
    assert not watch.grown(shard)
    told = []
    for lost_before in (2, 0, 1, 0):  # by the batch before which it was lost, of those that it made
        work(Partial(folder, shard, 0), lost_before)
        told.append(watch.grown(shard))
    assert told == [True, False, True, False]


def test_a_shard_that_is_damaged_at_its_end_keeps_whole_batches(folder, work, shard, tmp_path):
    """The batch before the damage is short; it is made again, lest all that follow should be others."""
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: content.index(b"14.png")])
    found, seen = work(Partial(folder, shard, 0))
    assert "truncated" in found.error and [len(keys) for keys in seen] == [3, 3, 3, 2]
    assert Partial(folder, shard).found().table["key"].to_pylist() == ["00", "01", "02", "05", "06", "08", "09", "10"]
    again, late = work(Partial(folder, shard, 0))  # as where storage failed for a moment: the shard is the same
    assert late == seen[3:] and again.table.equals(found.table)


def test_no_reader_of_tables_sees_it(folder, work, shard, tmp_path):
    work(Partial(folder, shard, 0), 3)
    assert folder.finished([shard]) == set() and partial.kept(folder, [shard, "/b.tar"]) == {shard}
    status.write_shards(folder.uri, [shard, "/b.tar"])
    assert status.read(folder.uri).kept == [shard]
    readers = ds.dataset(str(tmp_path / "out"), exclude_invalid_files=True)  # as pandas and others do
    assert readers.files == []
    half = tmp_path / "out" / "__patchrank__" / "_partial" / ".a.part.xyz.tmp"
    half.touch()
    folder.prepare({"seed": 1})  # what a killed run left half-written is removed, and what it finished is not
    assert not half.exists() and partial.kept(folder, [shard]) == {shard}
    partial.remove(folder, [shard])
    assert not list(half.parent.iterdir())
