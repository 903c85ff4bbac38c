"""Patches that stay stand for the nearest ones: forwards as in a search, with a gradient to what is missed."""

from __future__ import annotations

import pytest
import torch

from patchrank.model.tower import Tower
from patchrank.search.patch_cosines import PatchCosines
from patchrank.tokens import by_distance, nearest, select
from patchrank.training import gating, patch_gating


@pytest.fixture
def setting(small_clip):
    """A tower in float64, tokens of two images before the cut, and some usefulness."""
    tower = Tower(small_clip(torch.float64).visual, dtype=torch.float64)
    torch.manual_seed(3)
    tokens = tower.prefix(torch.randn(2, 3, *tower.visual.image_size, dtype=torch.float64))
    return tower, tokens, torch.randn(2, tower.num_tokens, dtype=torch.float64)


def searched(tower, tokens, kept):
    return PatchCosines(tower, tokens, 2)(tokens, kept, torch.arange(2))


@pytest.mark.parametrize("count", [1, 7, 19, 20])
def test_forwards_they_are_the_cosines_of_a_search(setting, count):
    tower, tokens, usefulness = setting
    found = patch_gating.cosines(tower, tokens, usefulness, count)
    torch.testing.assert_close(found, searched(tower, tokens, select(usefulness, count)), rtol=1e-5, atol=1e-5)


def test_the_first_of_those_by_distance_that_are_left_is_the_nearest():
    grid, kept = (4, 5), torch.tensor([[18, 3, 7, 11]])
    order = by_distance(grid)
    assert order[:, 0].tolist() == list(range(20)) and order.sort(dim=1).values.eq(torch.arange(20)).all()
    first = [next(each for each in row if each in kept[0].tolist()) for row in order.tolist()]
    assert first == kept[0][nearest(kept, grid)[0]].tolist()


def test_the_gradient_says_which_patch_is_missed(setting):
    """What is lost at a keep rate falls as usefulness learns, by the cosines of a search."""
    tower, tokens, usefulness = setting
    learnt = usefulness.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([learnt], lr=0.05)
    before = searched(tower, tokens, select(usefulness, 8)).mean()
    for step in range(60):
        noise = 0.3 * (1 - step / 60) * gating.draw_noise(0, step, ["a", "b"], 20)
        optimizer.zero_grad()
        patch_gating.lacking(patch_gating.cosines(tower, tokens, learnt, 8, noise), 0.4).sum().backward()
        optimizer.step()
    assert (1 - searched(tower, tokens, select(learnt, 8)).mean()) < 0.9 * (
        1 - before
    )  # which is what random weights leave to gain
