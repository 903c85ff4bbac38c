"""The cost of a search, told up front."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_search import search_here
from torch.utils.flop_counter import FlopCounterMode

from patchrank.model.tower import Tower
from patchrank.search import estimate
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.store import rankings
from patchrank.store.folder import Folder

pytest_plugins = ["tiny_results"]


def counted(call):
    """Multiply-adds of the matrix products, attention and convolutions of a call, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("rank_by", ["effects", "scores"])
def test_multiply_adds_are_those_that_pytorch_counts(small_clip, rank_by):
    tower = Tower(small_clip().visual)
    config = SearchConfig(rank_by=rank_by, rescore=1, remove_per_step=3)
    searcher = Searcher(tower, config, keep_rates=[0.8, 0.5])
    image = torch.randn(1, 3, 16, 20)
    assert estimate.multiply_adds(searcher) == pytest.approx(counted(lambda: searcher.search(image)), rel=1e-3)
    assert tower.prefix_multiply_adds() == pytest.approx(counted(lambda: tower.prefix(image)), rel=1e-6)


def test_a_small_budget_times_forward_passes_and_a_large_one_searches(small_clip, monkeypatch):
    searcher = Searcher(Tower(small_clip().visual), SearchConfig(remove_per_step=3), keep_rates=[0.5])
    searched = []
    search_ = searcher.search
    monkeypatch.setattr(searcher, "search", lambda pixels: searched.append(len(pixels)) or search_(pixels))
    pixels = torch.randn(3, 3, 16, 20)
    assert estimate.seconds_per_image(searcher, pixels, budget=0.0) > 0
    assert searched == []
    assert estimate.seconds_per_image(searcher, pixels, budget=60.0) > 0
    assert searched == [3, 3]


def test_every_forward_pass_of_the_search_is_timed(small_clip, monkeypatch):
    """With a clock that counts candidates times tokens instead of seconds, the sum is known."""
    tower = Tower(small_clip().visual)
    pixels = torch.randn(2, 3, 16, 20)
    work = []
    suffix = tower.suffix

    def working(tokens, kept=None, image=None):
        length = tower.num_tokens if kept is None else kept.shape[1]
        work.append(length * len(tokens if image is None else image))
        return suffix(tokens, kept, image)

    def clock(call, device):
        before = sum(work)
        call()
        return sum(work) - before

    tower.suffix = working
    searcher = Searcher(tower, SearchConfig(remove_per_step=3), keep_rates=[0.8, 0.5], chunk=7)
    searcher.search(pixels)
    expected = sum(work)
    monkeypatch.setattr(estimate.clock, "seconds", clock)
    assert estimate.seconds_per_image(searcher, pixels, budget=-1.0) * len(pixels) == pytest.approx(expected)


@pytest.mark.parametrize("tokens, rates", [(20, (0.9, 0.7, 0.5)), (196, (0.8, 0.5))])
def test_bytes_are_those_of_a_file_of_noise(tmp_path, tokens, rates):
    predicted = estimate.bytes_per_image(tokens, rates, images=500)
    rng = np.random.default_rng(5)
    found = rankings.Ranked(
        keys=[f"n{key:07d}" for key in range(500)],
        labels=rng.integers(1000, size=500).tolist(),
        ranking=rng.permuted(np.tile(np.arange(tokens), (500, 1)), axis=1),
        score=1 - rng.random((500, tokens), dtype=np.float32) / 50,
        step=rng.integers(20, size=(500, tokens)),
        prediction=rng.integers(1000, size=500),
        confidence=rng.random(500, dtype=np.float32),
        keep_rates=rates,
        pruned_prediction=rng.integers(1000, size=(500, len(rates))),
        pruned_confidence=rng.random((500, len(rates)), dtype=np.float32),
        pruned_cosine=rng.random((500, len(rates)), dtype=np.float32),
    )
    uri = "/data/train-000007.tar"
    written = Folder(str(tmp_path)).write(uri, rankings.table(uri, found), encode=rankings.encode)
    assert predicted * 500 == pytest.approx(written, rel=0.1)


def test_the_job_tells_the_cost_and_writes_nothing(data, address, tmp_path):
    out = tmp_path / "out"
    told = search_here(data, out, "--estimate", address=address)
    assert told.returncode == 0, told.stderr
    assert "images        72 in 6 shards" in told.stdout
    for word in ("candidates", "multiply-adds", "GB an actor", "device-hours", "MB of Parquet"):
        assert word in told.stdout
    assert not out.exists()


def test_finished_shards_cost_nothing(data, undisturbed, address):
    before = sorted(path.name for path in undisturbed.rglob("*"))
    told = search_here(data, undisturbed, "--estimate", address=address)
    assert told.returncode == 0, told.stderr
    assert "images        0 in 0 shards; 6 shards are finished" in told.stdout
    assert sorted(path.name for path in undisturbed.rglob("*")) == before


def test_a_folder_of_another_search_is_refused(data, undisturbed, address):
    told = search_here(data, undisturbed, "--estimate", "--cut", "2", address=address)
    assert told.returncode != 0
    assert "holds another search (model.cut: 1 there, 2 now)" in told.stderr and "Traceback" not in told.stderr


def test_a_folder_that_cannot_be_used_is_refused_in_one_line(data, address, tmp_path):
    for flags in ([], ["--estimate"]):
        told = search_here(data, tmp_path / ("x" * 300), *flags, address=address)
        assert told.returncode != 0
        assert "File name too long" in told.stderr and "Traceback" not in told.stderr


def test_a_shard_that_cannot_be_read_is_named(data, address, tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    told = search_here(data, tmp_path / "out", "--estimate", shards=tmp_path / "broken.tar", address=address)
    assert told.returncode != 0
    assert "broken.tar" in told.stderr and "Traceback" not in told.stderr
