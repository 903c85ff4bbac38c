"""The search by exchanges: against a slow oracle in float64, which starts from the ranking through gates."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.search.by_exchanges import Plan
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher

EXCHANGES = {"rank_by": "exchanges", "steps": 6, "remove_per_step": 3}


def pictures(count=3, dtype=torch.float64, size=(16, 20)):
    return torch.randn(count, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def slow_search(ranking, plan, proposals, embedding_of, score_of):
    """One image, one candidate and one pair at a time, from the ranking through gates on."""
    stay, inner, outer, leave = plan
    core, near, tail = ranking[: stay - inner], ranking[stay - inner : stay + outer], ranking[stay + outer :]
    inside = near[:inner]
    now = embedding_of(core + inside)
    effects = {token: embedding_of(core + [one for one in inside if one != token]) - now for token in inside}
    effects |= {token: embedding_of([*core, *inside, token]) - now for token in near[inner:]}
    exchanged = 0
    for _ in range(5):
        then, said, moved = now, score_of(now), []
        while True:
            pairs = [(one, other) for one in inside for other in near if other not in inside]
            pairs = [pair for pair in pairs if not set(pair) & set(moved)]
            scores = [score_of(then + effects[one] + effects[other]) for one, other in pairs]
            if not pairs or max(scores) <= 1 - (1 - said) * (1 - 1e-5):
                break
            said, pair = max(scores), pairs[scores.index(max(scores))]
            then, moved = then + effects[pair[0]] + effects[pair[1]], [*moved, *pair]
        if not moved:
            break
        tried = [token for token in near if (token in inside) != (token in moved)]
        found = embedding_of(core + tried)
        if better := score_of(found) > score_of(now):
            now, inside, exchanged = found, tried, exchanged + 1
        else:
            wrong = (found - then) / len(moved)
        effects.update({token: -effects[token] if better else effects[token] + wrong for token in moved})
    gone = [token for token in near if token not in inside]
    step, scores = dict.fromkeys(ranking, 0), dict.fromkeys(gone + tail, score_of(now))
    step |= dict.fromkeys(gone + tail, 1)
    left = []
    for number, count in enumerate(leave, start=2):
        sets, among = [], set(inside)
        for _ in range(min(proposals, len(inside) // count)):
            chosen, then, said = [], now, {}
            for _ in range(count):
                token = min(among, key=lambda token: (-score_of(then + effects[token]), token))
                then = then + effects[token]
                said[token] = score_of(then)
                chosen.append(token)
                among.remove(token)
            sets.append((chosen, then, said))
        found = [embedding_of(core + [token for token in inside if token not in one[0]]) for one in sets]
        best = max(range(len(sets)), key=lambda one: (score_of(found[one]), -one))
        for one, (chosen, then, _) in enumerate(sets):
            for token in chosen if one != best else []:
                effects[token] = effects[token] + (found[one] - then) / count
        now, chosen = found[best], sets[best][0]
        scores |= sets[best][2]
        step |= dict.fromkeys(chosen, number)
        left, inside = chosen[::-1] + left, [token for token in inside if token not in chosen]
    scores |= dict.fromkeys(core + inside, score_of(now))
    return core + inside + left + gone + tail, step, scores, exchanged


PLANS = {  # how many of 48 tokens stay, are measured inside and outside, and leave later, by three
    0.0: (19, 10, 6, [3, 3, 3, 1]),
    0.4: (29, 10, 6, [3, 3, 3, 1]),
    0.7: (36, 10, 6, [2]),
    0.9: (43, 10, 5, []),
}


@pytest.mark.parametrize(
    "score, cut, keep, proposals",
    [
        *((score, 1, 0.4, 2) for score in ("preservation", "similarities", "confidence", "label")),
        ("preservation", 0, 0.0, 3),
        ("preservation", 3, 0.7, 1),
        ("label", 2, 0.9, 2),
    ],
)
def test_agrees_with_a_slow_search(small_clip, score, cut, keep, proposals):
    visual = small_clip(torch.float64, image_size=(24, 32)).visual
    images, labels = pictures(2, size=(24, 32)), torch.arange(2)
    classes = torch.nn.functional.normalize(torch.randn(5, 24, dtype=torch.float64), dim=-1)
    settings = {**EXCHANGES, "score": score, "keep": keep, "proposals": proposals}
    tower = Tower(visual, cut, torch.float64)

    def search(**changed):
        config = SearchConfig(**settings | changed)
        return Searcher(tower, config, classes, 3.0, chunk=7, bank=classes).search(images, labels)

    found, start = search(), search(rank_by="gates").ranking
    exchanged = 0
    for row, image in enumerate(images):
        before = reference.prefix(visual, image, cut)
        full = reference.embed(visual, before, range(48))

        def score_of(embedding, full=full, label=row):
            return reference.token_score(score, embedding, full, classes, 3.0, label)

        def embedding_of(kept, before=before):
            return reference.embed(visual, before, kept)

        ranking, step, scores, accepted = slow_search(
            start[row].tolist(), PLANS[keep], proposals, embedding_of, score_of
        )
        exchanged += accepted
        assert found.ranking[row].tolist() == ranking
        assert found.step[row].tolist() == [step[token] for token in range(48)]
        expected = torch.tensor([scores[token] for token in range(48)])
        torch.testing.assert_close(found.score[row], expected, rtol=0, atol=1e-6)
    assert exchanged and found.finite.all()


@pytest.mark.parametrize("keep, proposals", [(0.4, 2), (0.1, 3)])
def test_what_a_search_will_cost_is_known(small_clip, keep, proposals):
    tower, sizes = Tower(small_clip().visual), []
    suffix = tower.suffix

    def counted(tokens, kept=None, image=None, gates=None):
        sizes.extend([] if kept is None else [(kept.shape[1], gates is not None)] * len(kept))
        return suffix(tokens, kept, image, gates)

    tower.suffix = counted
    config = SearchConfig(**EXCHANGES, keep=keep, proposals=proposals)
    found = Searcher(tower, config, chunk=5).search(pictures(1, torch.float32))
    cost = config.cost(tower.grid)
    assert [(step.kept, step.backward == 1) for step in cost for _ in range(step.candidates)] == sizes
    assert sum(step.candidates for step in cost) == found.candidates
    assert sum(step.removed for step in cost) == 20 - found.step[0].eq(0).sum()
    assert config.strategy.start_multiply_adds(tower) == SearchConfig(rank_by="gates").strategy.start_multiply_adds(
        tower
    )


def test_batch_chunk_and_memory_do_not_matter(small_clip, monkeypatch):
    tower = Tower(small_clip(torch.float64, image_size=(24, 32)).visual, dtype=torch.float64)
    images = pictures(3, size=(24, 32))
    together = Searcher(tower, SearchConfig(**EXCHANGES), chunk=64).search(images)
    monkeypatch.setattr("patchrank.search.by_exchanges.PREDICTED_NUMBERS", 500)  # three rows of pairs at once
    alone = [Searcher(tower, SearchConfig(**EXCHANGES), chunk=1).search(image[None]) for image in images]
    assert torch.equal(together.ranking, torch.cat([one.ranking for one in alone]))
    assert together.candidates == sum(one.candidates for one in alone)


def test_an_overflow_is_marked_and_touches_no_other_image(small_clip):
    tower, images = Tower(small_clip().visual), pictures(3, torch.float32)
    good = Searcher(tower, SearchConfig(**EXCHANGES), keep_rates=[0.5]).search(images)
    images[1, 0, 0, 0] = float("inf")
    found = Searcher(tower, SearchConfig(**EXCHANGES), keep_rates=[0.5]).search(images)
    assert found.finite.tolist() == [True, False, True]
    assert torch.equal(found.ranking[[0, 2]], good.ranking[[0, 2]])
    assert found.ranking[1].sort().values.tolist() == list(range(20))


@pytest.mark.parametrize("size", [(4, 8), (8, 8), (8, 12)])
@pytest.mark.parametrize("keep", [0.0, 0.4, 0.99])
def test_few_tokens(small_clip, size, keep):
    tower = Tower(small_clip(torch.float64, image_size=size).visual, dtype=torch.float64)
    searcher = Searcher(tower, SearchConfig(rank_by="exchanges", keep=keep))
    found = searcher.search(pictures(2, size=size))
    assert found.finite.all() and found.ranking.sort(dim=1).values.tolist() == [list(range(math.prod(size) // 16))] * 2
    assert found.candidates == 2 * sum(step.candidates for step in searcher.config.cost(tower.grid))


def test_what_is_measured_of_196_tokens():
    config = SearchConfig(rank_by="exchanges")
    assert Plan.of(config, 196) == Plan(118, 40, 25, [4] * 10)
    cost = config.cost((14, 14))[16:]
    assert [(step.kept, step.candidates) for step in cost[:5]] == [(118, 1), (117, 40), (119, 25), (118, 5), (114, 2)]
    assert [step.candidates for step in cost[5:]] == [2] * 8 + [1]  # of the last four there is one set


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"block": 2}, "--rank-by exchanges is of single tokens: it needs --block 1"),
        ({"score": "patches"}, "--rank-by exchanges: goes through the embedding, which --score patches is not of"),
        ({"rescore": 1}, "--rank-by exchanges measures effects once: it needs --rescore 0"),
        ({"rescore": None}, "--rank-by exchanges measures effects once: it needs --rescore 0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(UserError, match=f"^{words}$"):
        SearchConfig(rank_by="exchanges", **settings)
