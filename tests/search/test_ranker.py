"""What becomes of a shard without Ray in between."""

from __future__ import annotations

import copy
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from torchvision.transforms.functional import to_tensor

from patchrank.data.loader import Batch, ahead
from patchrank.data.progress import Progress
from patchrank.data.prototypes import class_sums
from patchrank.model.tower import Tower
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import SearchConfig, Searcher

LABELS = [0, 2, 2, -1, 999_999_999, 0, 1]


@pytest.fixture
def shard(tmp_path):
    """A shard of random images with the labels above, two of them out of any range, and its pixels."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (len(LABELS), 16, 20, 3), dtype=np.uint8)
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, label in enumerate(LABELS):
            writer.write({"__key__": str(number), "png": Image.fromarray(pixels[number]), "cls": label})
    return str(tmp_path / "a.tar"), torch.stack([to_tensor(image) for image in pixels])


@pytest.mark.parametrize("num_classes", [None, 3, 5])
def test_class_sums_are_those_of_the_models_own_embeddings(small_clip, shard, num_classes):
    model, (uri, pixels) = small_clip(), shard
    progress = Progress()
    sums, counts = class_sums(Tower(model.visual), uri, to_tensor, num_classes, batch=2, progress=progress)
    embeddings = F.normalize(model.encode_image(pixels), dim=-1).double()
    expected = torch.stack([embeddings[[0, 5]].sum(dim=0), embeddings[6], embeddings[[1, 2]].sum(dim=0)])
    torch.testing.assert_close(sums[:3], expected, atol=1e-6, rtol=0)
    assert counts.tolist() == [2, 1, 2] + [0] * ((num_classes or 3) - 3)
    assert (progress.images, progress.rejects) == (5, 2)


def test_an_image_that_overflows_is_left_out_of_its_class(small_clip, shard):
    uri, pixels = shard
    tower = Tower(small_clip().visual)
    usual, progress = tower.forward, Progress()
    tower.forward = lambda images: usual(images).masked_fill(
        (images == pixels[5]).all(dim=(1, 2, 3))[:, None], math.inf
    )
    sums, counts = class_sums(tower, uri, to_tensor, 3, batch=1, progress=progress)
    torch.testing.assert_close(sums[0], F.normalize(usual(pixels[:1]), dim=-1)[0].double())
    assert counts.tolist() == [1, 1, 2] and (progress.images, progress.rejects) == (4, 3)


def test_the_batch_does_not_show_in_the_table(small_clip, shard):
    uri, _ = shard
    tower = Tower(small_clip(torch.float64).visual, dtype=torch.float64)
    by_batch = []
    for batch in (1, 3, 16):
        searcher = Searcher(tower, SearchConfig(), keep_rates=[0.5])
        ranked = ShardRanker(searcher, to_tensor, batch=batch).rank(uri, progress := Progress())
        assert [reject.key for reject in ranked.rejects] == ["3"] and ranked.error is None
        assert progress.images == len(ranked.table) == 6
        by_batch.append(ranked.table.to_pydict())
    assert by_batch[0]["key"] == ["0", "1", "2", "4", "5", "6"]
    assert by_batch[0]["ranking"] == by_batch[1]["ranking"] == by_batch[2]["ranking"]


def test_shards_on_threads_take_turns_on_the_device(small_clip, shard):
    """The second is decoded while the first has the device; both make the tables that they make alone."""
    ranker = ShardRanker(Searcher(Tower(small_clip().visual), SearchConfig()), to_tensor, batch=2)
    alone = ranker.rank(shard[0]).table.to_pydict()
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
        first = pool.submit(ranker.rank, shard[0], None, device)
        other = copy.copy(ranker)
        other.reading = replace(ranker.reading, preprocess=to_tensor_2)
        while not events:
            time.sleep(0.01)
        late = pool.submit(other.rank, shard[0], None, device)
        results = [first.result(), late.result()]
    assert [result.table.to_pydict() for result in results] == [alone, alone]
    assert len(set(events[:3])) == len(set(events[3:])) == 1 and len(set(events)) == 2


def test_the_limit_counts_samples(small_clip, shard):
    searcher = Searcher(Tower(small_clip().visual), SearchConfig())
    ranked = ShardRanker(searcher, to_tensor, limit=4).rank(shard[0])
    assert ranked.table["key"].to_pylist() == ["0", "1", "2"] and len(ranked.rejects) == 1


def test_the_next_batch_is_made_while_this_one_is_worked_on():
    begun = [threading.Event() for _ in range(3)]

    def made():
        for number, event in enumerate(begun):
            event.set()
            yield Batch([str(number)], torch.zeros(1, 3, 4, 4), [None], [()], 0.0)
        raise OSError("the shard ends here")

    found = ahead(made(), pin=False)
    assert next(found).keys == ["0"]
    assert begun[1].wait(timeout=60) and not begun[2].is_set()  # one ahead, not more
    assert next(found).keys == ["1"]
    assert next(found).keys == ["2"]
    with pytest.raises(OSError, match="the shard ends here"):
        next(found)
