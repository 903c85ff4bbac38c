"""Equal cost: what is compared takes as many multiply-adds, and learnable tokens pay for themselves."""

from __future__ import annotations

import pytest
import torch
from test_pruned import N, bundle_for

import patchrank
from patchrank.data.pair_batches import PairBatch
from patchrank.errors import UserError
from patchrank.model.kinds import adapt
from patchrank.model.tower import Tower
from patchrank.pruning import methods
from patchrank.pruning.comparison import Comparison, Pruner
from patchrank.pruning.merging import merging_multiply_adds
from patchrank.pruning.pruned import pruned_tower
from patchrank.pruning.schedule import at_keep_rate, scheduled_multiply_adds
from patchrank.pruning.stand_in import StandIn, count_multiply_adds

CUT = 1
SELECTING = ("predictor", "predictor-tokens", "class-attention", "random")


@pytest.fixture
def batch():
    images = torch.randn(5, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    return PairBatch([str(key) for key in range(5)], images, torch.full((5,), -1), None, None)


def nearest_merging(adapter, multiply_adds):
    """How near merging can come with the same r in each block but the last, or one more in the first of them."""
    away, blocks = [], adapter.depth - 1
    for total in range(2 * N):
        left, merges = N, []
        for number in range(blocks):
            merges.append(min(total // blocks + (number < total % blocks), left // 2))
            left -= merges[-1]
        away.append(abs(merging_multiply_adds(adapter, merges) - multiply_adds))
    return min(away)


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("place, merged", [(None, 0.0), ("cut", 0.0), ("input", 0.0), ("cut", 0.3), ("input", 0.3)])
def test_ways_of_pruning_are_compared_at_equal_multiply_adds(small_clip, place, merged, keep):
    """All take as many as the predictor with m * N tokens past the cut, or less than a token short of it."""
    model = small_clip(layers=8 if merged else 4)
    visual = model.visual
    bundle, adapter = bundle_for(model, place, merged=merged), adapt(visual)
    told = bundle.predictor.multiply_adds()
    budget = scheduled_multiply_adds(adapter, {CUT: round(keep * N)}) + told
    towers = {name: pruned_tower(name, visual, CUT, keep, bundle) for name in methods.METHODS}
    cost = {name: tower.multiply_adds() for name, tower in towers.items()}
    assert {name: count_multiply_adds(tower) for name, tower in towers.items()} == cost
    assert cost["predictor"] == budget and cost["golden"] == budget - told
    assert merged or place == "input" or cost["predictor-tokens"] == budget
    if merged:  # more go past the cut, as they merge later
        alone = pruned_tower("predictor-tokens", visual, CUT, keep, bundle_for(model, place))
        assert towers["predictor-tokens"].schedule[CUT] > alone.schedule[CUT]
    for name in ("predictor-tokens", "class-attention", "random"):
        assert cost[name] <= budget
        towers[name].schedule = {CUT: towers[name].schedule[CUT] + 1}
        assert towers[name].multiply_adds() > budget  # not a token is wasted
    assert abs(cost["token-merging"] - budget) == nearest_merging(adapter, budget)


@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("place, merged", [(None, 0.0), ("cut", 0.0), ("input", 0.0), ("cut", 0.3), ("input", 0.3)])
def test_comparisons_prune_as_what_is_timed_and_counted_does(small_clip, batch, place, merged, keep):
    model = small_clip(layers=8 if merged else 4)
    bundle = bundle_for(model, place, merged=merged)
    tower = Tower(model.visual, CUT)
    made = methods.make([*SELECTING, "token-merging"], tower.device, bundle)
    found = list(Pruner(tower, made, [keep]).prune(batch))
    comparison = Comparison(tower, made, [keep])
    assert [len(one.embeddings) for one in comparison.add(batch)] == [5] * len(found)
    for pruned, row in zip(found[1:], comparison.rows()[1:], strict=True):
        timed = pruned_tower(pruned.method, model.visual, CUT, keep, bundle)
        assert (row.method, row.keep) == (pruned.method, keep)
        if pruned.method != "token-merging":
            assert timed.schedule.get(CUT, N) == pruned.kept.shape[1]
        if pruned.method != "random":  # a tower does not know keys, and draws anew
            torch.testing.assert_close(timed(batch.pixels), pruned.embeddings)


def test_without_a_predictor_what_is_matched_takes_no_more_than_the_tokens_of_the_keep_rate(small_clip):
    visual = small_clip().visual
    budget = scheduled_multiply_adds(adapt(visual), {CUT: N // 2})
    assert pruned_tower("random", visual, CUT, 0.5).multiply_adds() == budget
    assert pruned_tower("class-attention", visual, CUT, 0.5).multiply_adds() <= budget
    model = patchrank.prune(small_clip(), "class-attention", keep=0.5)
    assert model.visual.schedule == {CUT: N // 2}  # a user gets the tokens that were asked for


@pytest.mark.parametrize("how", [{"keep": 0.5, "blocks": [1, 2, 3]}, {"keep": {1: 0.8, 3: 0.4}}])
def test_learnable_tokens_cost_nothing_where_patches_leave_in_parts(small_clip, how):
    """They take as many places before every block: their own number at the cut, more at the input, but none in vain."""
    model = small_clip()
    plain = patchrank.prune(model, bundle_for(patchrank.restore(model), None), **how).visual
    at_cut = patchrank.prune(model, bundle_for(patchrank.restore(model), "cut"), **how).visual
    assert at_cut.schedule == {block: count - 3 for block, count in plain.schedule.items()}
    assert at_cut.multiply_adds() == plain.multiply_adds() == count_multiply_adds(at_cut)
    at_input = patchrank.prune(model, bundle_for(patchrank.restore(model), "input"), **how).visual
    (taken,) = {count - at_input.schedule[block] for block, count in plain.schedule.items()}
    assert taken > 3 and at_input.multiply_adds() == count_multiply_adds(at_input) <= plain.multiply_adds()
    at_input.schedule = {block: count + 1 for block, count in at_input.schedule.items()}
    assert at_input.multiply_adds() > plain.multiply_adds()


@pytest.mark.parametrize(
    "place, keep, rate",
    [
        ("cut", 0.15, 0.15),
        ("input", 0.2, 0.2),  # there is a place for a patch, but the blocks before the cut cost more than that
        ("cut", {1: 0.8, 2: 0.15}, 0.15),
    ],
)
def test_keep_rates_that_learnable_tokens_fill_are_refused(small_clip, place, keep, rate):
    model = small_clip()
    bundle = bundle_for(model, place)
    wrong = rf"{rate}: leaves no place for patches beside 3 learnable tokens; keep more$"
    with pytest.raises(UserError, match=f"^keep {wrong}"):
        patchrank.prune(model, bundle, keep=keep)
    assert not isinstance(model.visual, StandIn)
    made = methods.make(["predictor-tokens"], torch.device("cpu"), bundle)
    with pytest.raises(UserError, match=f"^--keep-rates {wrong}"):
        Comparison(Tower(model.visual, CUT), made, [0.5, rate])


def test_what_is_matched_keeps_a_patch_even_where_that_takes_more(small_clip):
    adapter = adapt(small_clip().visual)
    (attention,) = methods.make(["class-attention"], torch.device("cpu")).values()
    assert at_keep_rate(adapter, attention, CUT, 1 / N) == {CUT: 1}
