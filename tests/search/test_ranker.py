"""What becomes of a shard without Ray in between."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_shards import write_labelled
from torchvision.transforms.functional import to_tensor

from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import Searcher


@pytest.fixture
def shard(tmp_path):
    write_labelled(tmp_path / "a.tar")
    return str(tmp_path / "a.tar")


def test_the_batch_does_not_show_in_the_table(small_clip, shard):
    tower = Tower(small_clip(torch.float64).visual, dtype=torch.float64)
    by_batch = []
    for batch in (1, 3, 16):
        searcher = Searcher(tower, SearchConfig(), keep_rates=[0.5])
        ranked = ShardRanker(searcher, Reading(to_tensor, batch)).rank(shard, progress := Progress())
        assert [reject.key for reject in ranked.rejects] == ["3"] and ranked.error is None
        assert progress.images == len(ranked.table) == 6
        by_batch.append(ranked.table.to_pydict())
    assert by_batch[0]["key"] == ["0", "1", "2", "4", "5", "6"]
    assert by_batch[0]["ranking"] == by_batch[1]["ranking"] == by_batch[2]["ranking"]


def test_shards_on_threads_take_turns_on_the_device(small_clip, shard):
    """The second is decoded while the first has the device; both make the tables that they make alone."""
    ranker = ShardRanker(Searcher(Tower(small_clip().visual), SearchConfig()), Reading(to_tensor, 2))
    alone = ranker.rank(shard).table.to_pydict()
    device, second, events = threading.Lock(), threading.Event(), []
    usual = ranker.searcher.search

    def search(pixels, labels):
        events.append(threading.get_ident())
        assert second.wait(timeout=60)
        return usual(pixels, labels)

    def to_tensor_2(image):
        second.set()
        return to_tensor(image)

    ranker.searcher.search = search
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ranker.rank, shard, None, device)
        other = copy.copy(ranker)
        other.reading = replace(ranker.reading, preprocess=to_tensor_2)
        while not events:
            time.sleep(0.01)
        late = pool.submit(other.rank, shard, None, device)
        results = [first.result(), late.result()]
    assert [result.table.to_pydict() for result in results] == [alone, alone]
    assert len(set(events[:3])) == len(set(events[3:])) == 1 and len(set(events)) == 2


def test_the_limit_counts_samples(small_clip, shard):
    searcher = Searcher(Tower(small_clip().visual), SearchConfig())
    ranked = ShardRanker(searcher, Reading(to_tensor, limit=4)).rank(shard)
    assert ranked.table["key"].to_pylist() == ["0", "1", "2"] and len(ranked.rejects) == 1
