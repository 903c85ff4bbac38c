"""The search through gates: against a slow oracle in float64, with exact costs, for every kind of tower."""

from __future__ import annotations

import math
import random

import pytest
import reference
import torch
import towers
from torch.utils.flop_counter import FlopCounterMode

from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.search import estimate
from patchrank.search.by_gates import counts
from patchrank.search.candidates import Candidates
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher

GATES = {"rank_by": "gates", "steps": 6}


def pictures(count=3, dtype=torch.float64, size=(16, 20)):
    return torch.randn(count, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gated(visual, start, ids, gates):
    """Embeddings, (P, E), for as many gates, (P, n), by open_clip's blocks: their logarithms in the mask."""
    tokens, cut = start
    x = torch.stack([tokens[0]] + [tokens[1 + token] for token in ids]).expand(len(gates), -1, -1)
    mask = torch.cat([torch.zeros_like(gates[:, :1]), gates.log()], dim=1)[:, None].expand(-1, x.shape[1], -1)
    for block in visual.transformer.resblocks[cut:]:
        x = block(x, attn_mask=mask.repeat_interleave(4, dim=0))  # one for each of 4 heads
    return visual._pool(x)[0] @ visual.proj


def slow_search(visual, image, config, cut, missing):
    """One image, one token at a time; derivatives by differences. `missing` is what an embedding lacks of a score 1."""
    start = reference.prefix(visual, image, cut)
    full = reference.embed(visual, start, range(20))
    attention = Tower(visual, cut, torch.float64).adapter.class_attention(start[0][None], cut)[0].tolist()
    order = sorted(range(20), key=lambda token: -attention[token])
    standard = math.sqrt((20**2 - 1) / 12)
    useful = {token: (9.5 - place) / standard for place, token in enumerate(order)}
    mean, square, scores = dict.fromkeys(range(20), 0.0), 0.0, {}
    sizes = [8, 10, 12, 14, 16] if config.keep == 0.4 else [14, 15, 16]
    chance, turns = random.Random(0), []
    while len(turns) < config.steps:
        turns += chance.sample(sizes, len(sizes))
    for number, count in enumerate(turns[: config.steps], start=1):
        ranked = sorted(useful, key=lambda token: -useful[token])
        there = ranked[: count + 3]
        threshold = (useful[ranked[count - 1]] + useful[ranked[count]]) / 2
        gates = torch.tensor([1.0] * count + [1e-300] * (len(there) - count), dtype=torch.float64)

        def lost(gates, there=there):
            return [missing(embedding, full).log().item() for embedding in gated(visual, start, there, gates)]

        (whole,) = lost(gates[None])
        scores[count] = 1 - math.exp(whole)
        moved = 1e-5 * torch.eye(len(there), dtype=torch.float64)
        less = torch.where(gates[:, None] == 1, -moved, 2 * moved)  # a gate below 0 has no logarithm
        gradient = dict.fromkeys(range(20), 0.0)
        for place, (token, up, other) in enumerate(zip(there, lost(gates + moved), lost(gates + less), strict=True)):
            slope = (up - other) / 2e-5 if place < count else (4 * up - 3 * whole - other) / 2e-5
            soft = 1 / (1 + math.exp(-(useful[token] - threshold) / 0.5))
            gradient[token] = slope * soft * (1 - soft)
        square = 0.95 * square + 0.05 * sum(value**2 for value in gradient.values()) / 20
        for token in mean:
            mean[token] = 0.8 * mean[token] + 0.2 * gradient[token]
            move = mean[token] / (1 - 0.8**number) / math.sqrt(square / (1 - 0.95**number))
            useful[token] -= (0.3 - 0.27 * (number - 1) / config.steps) * max(-3.0, min(3.0, move))
        centre = sum(useful.values()) / 20
        deviation = math.sqrt(sum((value - centre) ** 2 for value in useful.values()) / 20)
        useful = {token: (value - centre) / deviation for token, value in useful.items()}
    ranking, step, score = sorted(useful, key=lambda token: -useful[token]), [0] * 20, [0.0] * 20
    for place, token in enumerate(ranking):
        ends = [count for count in sorted(scores, reverse=True) if count <= place]
        step[token] = len([count for count in scores if count > place]) + 1 if ends else 0
        score[token] = scores[max(ends) if ends else min(scores)]
    return ranking, step, score


@pytest.mark.parametrize(
    "score, cut, keep",
    [
        *((score, 1, 0.4) for score in ("preservation", "similarities", "confidence", "label")),
        ("preservation", 0, 0.7),
        ("label", 3, 0.4),
    ],
)
def test_agrees_with_a_slow_search(small_clip, score, cut, keep):
    visual, images = small_clip(torch.float64).visual, pictures(2)
    classes = torch.nn.functional.normalize(torch.randn(5, 24, dtype=torch.float64), dim=-1)
    config = SearchConfig(**GATES, score=score, keep=keep)
    searcher = Searcher(Tower(visual, cut, torch.float64), config, classes, 3.0, (0.5,), chunk=1, bank=classes)
    found = searcher.search(images, torch.arange(2))
    assert found.candidates == 2 * 6 and found.finite.all()
    for row, image in enumerate(images):

        def missing(embedding, full, row=row):
            if score == "preservation":
                return 1 - torch.cosine_similarity(embedding, full, dim=0)
            if score == "similarities":
                whole, likely = (reference.softmax(each, classes, 3.0) for each in (full, embedding))
                return (whole * (whole / likely).log()).sum()
            likely = reference.softmax(embedding, classes, 3.0)
            return 1 - (likely.max() if score == "confidence" else likely[row])

        ranking, step, scores = slow_search(visual, image, config, cut, missing)
        assert found.ranking[row].tolist() == ranking
        assert found.step[row].tolist() == step
        torch.testing.assert_close(found.score[row], torch.tensor(scores), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", towers.NAMES)
def test_every_kind_of_tower(small_clip, name):
    """Derivatives are what differences of gates say, and cost what PyTorch counts."""
    tower = Tower(towers.build(small_clip, name, torch.float64).visual, 1, torch.float64)
    size = tower.visual.image_size
    tokens, ids = tower.prefix(pictures(2, size=size)), torch.tensor([[0, 3, 7, 12], [1, 2, 5, 19]])
    gates = torch.tensor([[1.0, 1.0, 0.5, 0.0]] * 2, dtype=torch.float64)
    found, slopes = Candidates(tower, chunk=4).derive(tokens, ids, gates, lambda e, image: e[:, 5] * (1 + image))
    torch.testing.assert_close(found, tower.suffix(tokens, ids, gates=gates))
    for place in range(4):
        step = 1e-6 * torch.eye(4, dtype=torch.float64)[place]
        up, down = (tower.suffix(tokens, ids, gates=gates + sign * step)[:, 5] for sign in (1, -1))
        expected = (up - down) / 2e-6 * torch.tensor([1.0, 2.0])
        torch.testing.assert_close(slopes[:, place], expected, rtol=1e-5, atol=1e-7)
    searcher = Searcher(tower, SearchConfig(**GATES), keep_rates=[0.5])
    with FlopCounterMode(display=False) as counter:
        searcher.search(pictures(1, size=size))
    assert estimate.multiply_adds(searcher) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


def test_batch_chunk_and_inference_mode_do_not_matter(small_clip):
    tower, images = Tower(small_clip(torch.float64).visual, dtype=torch.float64), pictures(5)
    together = Searcher(tower, SearchConfig(**GATES), chunk=64).search(images)
    alone = [Searcher(tower, SearchConfig(**GATES), chunk=1).search(image[None]) for image in images]
    assert torch.equal(together.ranking, torch.cat([one.ranking for one in alone]))
    with torch.inference_mode():
        assert torch.equal(Searcher(tower, SearchConfig(**GATES)).search(images.clone()).ranking, together.ranking)


def test_out_of_memory_halves_the_images_and_goes_on(small_clip):
    tower, images = Tower(small_clip().visual), pictures(5, torch.float32)
    expected = Searcher(tower, SearchConfig(**GATES), chunk=4).search(images)
    suffix = tower.suffix

    def small_memory(tokens, kept=None, image=None, gates=None):
        if gates is not None and len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return suffix(tokens, kept, image, gates)

    tower.suffix = small_memory
    searcher = Searcher(tower, SearchConfig(**GATES))
    found = searcher.search(images)
    assert searcher.candidates.derived in (1, 2)
    assert torch.equal(found.ranking, expected.ranking)


def test_an_overflow_is_marked_and_touches_no_other_image(small_clip):
    tower, images = Tower(small_clip().visual), pictures(3, torch.float32)
    good = Searcher(tower, SearchConfig(**GATES), keep_rates=[0.5]).search(images)
    images[1, 0, 0, 0] = float("inf")
    found = Searcher(tower, SearchConfig(**GATES), keep_rates=[0.5]).search(images)
    assert found.finite.tolist() == [True, False, True]
    assert torch.equal(found.ranking[[0, 2]], good.ranking[[0, 2]])
    assert found.ranking[1].sort().values.tolist() == list(range(20))


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.79, 0.99])
def test_what_stays_takes_turns(keep):
    config = SearchConfig(rank_by="gates", keep=keep)
    kept = counts(config, 196)
    assert len(kept) == 16 and all(1 <= count < 196 for count in kept)
    assert min(kept) == max(1, min(195, math.floor(keep * 196 + 0.5)))
    times = [kept.count(count) for count in set(kept)]
    assert max(times) - min(times) <= 1
    assert [step.candidates for step in config.cost((14, 14))] == [1] * 16 + [0]


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="--block 1"):
        SearchConfig(rank_by="gates", block=2)
