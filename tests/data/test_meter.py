"""How much time is left is told as soon as it can be known."""

from __future__ import annotations

import pytest

from patchrank.data.meter import Meter
from patchrank.data.progress import Progress
from patchrank.store import status
from patchrank.store.folder import Folder


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told to go on."""
    now = [100.0]
    monkeypatch.setattr("patchrank.data.meter.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def folder(tmp_path):
    Folder(str(tmp_path)).prepare({})
    status.write_shards(str(tmp_path), ["a.tar", "b.tar", "c.tar"])
    return str(tmp_path)


def seconds_left(meter, folder):
    meter.close()
    return status.read(folder).run.seconds_left


@pytest.mark.parametrize(("limit", "expected"), [(None, None), (20, 110.0)])
def test_before_a_shard_is_read_it_has_as_many_images_as_the_limit(folder, clock, limit, expected):
    meter = Meter("search", 3, folder, limit=limit)
    clock[0] += 10.0
    meter.show({"a.tar": Progress(images=5)}, 1)  # half an image a second, 55 of 60 to come
    assert seconds_left(meter, folder) == expected


def test_then_the_mean_of_those_that_are_done_tells(folder, clock):
    meter = Meter("search", 3, folder, limit=20)
    clock[0] += 10.0
    meter.add(Progress(images=10))
    meter.show({}, 1)  # an image a second, 20 to come
    assert seconds_left(meter, folder) == 20.0
