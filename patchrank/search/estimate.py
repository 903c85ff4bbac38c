"""What a search will cost, from its arithmetic and a few seconds of timing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from patchrank import clock
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.store import rankings
from patchrank.tokens import tokens_kept


def multiply_adds(searcher: Searcher) -> int:
    """Exact multiply-adds of an image: prefix, whole embedding, all candidates, and the pruned ones at the keep rates.

    Norms, activations and the arithmetic on embeddings are not counted.
    """
    tower = searcher.tower
    kept = [tower.num_tokens, *(tokens_kept(tower.num_tokens, keep) for keep in searcher.keep_rates)]
    whole = sum(tower.suffix_multiply_adds(count) for count in kept)
    return tower.prefix_multiply_adds() + search_multiply_adds(searcher.config, tower) + whole


def search_multiply_adds(config: SearchConfig, tower: Tower) -> int:
    """Those of an image's candidates alone, of passes back through them, and of what the search starts from."""
    return config.strategy.start_multiply_adds(tower) + sum(
        step.candidates * tower.suffix_multiply_adds(step.kept)
        + (step.backward * tower.derivative_multiply_adds(step.kept) if step.backward else 0)
        for step in config.cost(tower.grid)
    )


def seconds_per_image(searcher: Searcher, pixels: Tensor, budget: float) -> float:
    """Seconds that the search takes an image, in batches like this one.

    The batch is searched, if that can be done within the budget. Else forward passes of candidates are timed, as long
    and as short as the search has them, and what lies between is interpolated.

    Args:
        searcher: the search.
        pixels: (B, 3, H, W), preprocessed images.
        budget: seconds; a few forward passes are timed whatever it is.
    """
    batch = len(pixels)
    seconds = _forward_seconds(searcher, pixels)
    if 2 * seconds <= budget:  # the first search warms up what the forward passes have not
        searcher.search(pixels)
        seconds = clock.seconds(lambda: searcher.search(pixels), searcher.tower.device)
    return seconds / batch


def _forward_seconds(searcher: Searcher, pixels: Tensor) -> float:
    """The seconds of all forward passes of a batch, from timings of a few."""
    tower, batch = searcher.tower, len(pixels)
    everything = list(range(tower.num_tokens))
    with torch.no_grad():
        tower.prefix(pixels)
        total = clock.seconds(lambda: tower.prefix(pixels), tower.device)
        tokens = tower.prefix(pixels)  # (B, p + N, D)

        def forward(kept: int, candidates: int) -> float:
            ids = torch.tensor(everything[:kept], device=tokens.device).expand(candidates, -1)
            image = torch.arange(candidates, device=tokens.device) % batch
            tower.suffix(tokens, ids, image)
            return clock.seconds(lambda: tower.suffix(tokens, ids, image), tower.device) / candidates

        def there_and_back(kept: int) -> float:
            ids = torch.tensor(everything[:kept], device=tokens.device).expand(batch, -1)
            gates = torch.ones(ids.shape, dtype=torch.float64, device=tokens.device)

            def call() -> object:
                return searcher.candidates.derive(tokens, ids, gates, lambda embeddings, image: embeddings.sum(dim=1))

            call()
            return clock.seconds(call, tower.device)

        cost = searcher.config.cost(tower.grid)
        if back := [step.kept for step in cost if step.backward]:
            lengths = sorted({min(back), max(back)})
            timed = [there_and_back(kept) for kept in lengths]
            total += sum(float(np.interp(kept, lengths, timed)) for kept in back)
        passes = [(step.kept, step.candidates) for step in cost if step.candidates and not step.backward]
        passes += [(tower.num_tokens, 1)] + [(tokens_kept(tower.num_tokens, keep), 1) for keep in searcher.keep_rates]
        chunk = searcher.candidates.chunk
        for size in {min(chunk, batch * candidates) for _, candidates in passes}:
            mine = [(kept, n) for kept, n in passes if min(chunk, batch * n) == size]
            lengths = sorted({min(kept for kept, _ in mine), max(kept for kept, _ in mine)})
            timed = [forward(kept, size) for kept in lengths]
            total += sum(batch * n * float(np.interp(kept, lengths, timed)) for kept, n in mine)
    return total


def bytes_per_image(num_tokens: int, keep_rates: Sequence[float], images: int = 1000) -> float:
    """Bytes of Parquet an image in shards of so many, of rankings that are pure noise: real ones take a little less."""
    rng = np.random.default_rng(0)
    shape = (images, len(keep_rates))
    noise = rankings.Ranked(
        keys=[f"{key:08d}" for key in range(images)],
        labels=rng.integers(1000, size=images).tolist(),
        ranking=rng.permuted(np.tile(np.arange(num_tokens), (images, 1)), axis=1),
        score=1 - rng.random((images, num_tokens), dtype=np.float32) / 100,
        step=rng.integers(30, size=(images, num_tokens)),
        prediction=rng.integers(1000, size=images),
        confidence=rng.random(images, dtype=np.float32),
        keep_rates=tuple(keep_rates),
        pruned_prediction=rng.integers(1000, size=shape),
        pruned_confidence=rng.random(shape, dtype=np.float32),
        pruned_cosine=rng.random(shape, dtype=np.float32),
    )
    table = rankings.table("s3://bucket/train-000000.tar", noise)
    return len(rankings.encode(table, {})) / images
