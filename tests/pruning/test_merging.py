"""Token merging against a version of loops, and its cost."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import patchrank
from patchrank.model.kinds import adapt
from patchrank.model.matching import merge
from patchrank.pruning.merging import MergedTower, beside_dropping, merge_block, merges_for, merging_multiply_adds
from patchrank.pruning.schedule import scheduled_multiply_adds
from patchrank.pruning.stand_in import count_multiply_adds


def slow_merge(x, sizes, metric, merges):
    """One image, a pair at a time: (n, D), (n,), (n, d) -> tokens, sizes."""
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    pairs = []
    for one in even:
        if one == 0:
            continue
        alike = {other: F.cosine_similarity(metric[one], metric[other], dim=0).item() for other in odd}
        partner = max(alike, key=alike.get)
        pairs.append((alike[partner], one, partner))
    pairs.sort(reverse=True)
    groups = {place: [place] for place in range(len(x))}
    for _, one, partner in pairs[:merges]:
        groups[partner] += groups.pop(one)
    order = [place for place in even if place in groups] + odd
    tokens, new_sizes = [], []
    for place in order:
        members = groups[place]
        weight = sum(sizes[member] for member in members)
        tokens.append(sum(x[member] * sizes[member] for member in members) / weight)
        new_sizes.append(weight)
    return torch.stack(tokens), torch.stack(new_sizes)


@pytest.mark.parametrize("n, merges", [(7, 1), (7, 3), (8, 3), (21, 10), (2, 0)])
def test_merging_is_what_the_slow_version_does(n, merges):
    generator = torch.Generator().manual_seed(n)
    x, metric = torch.randn(3, n, 6, generator=generator), torch.randn(3, n, 4, generator=generator)
    sizes = torch.randint(1, 5, (3, n), generator=generator).float()
    tokens, new_sizes, stood = merge(x, sizes, metric, merges)
    assert tokens.shape == (3, n - merges, 6) and stood.shape == (3, n - merges)
    for row in range(3):
        expected, expected_sizes = slow_merge(x[row], sizes[row], metric[row], merges)
        torch.testing.assert_close(tokens[row], expected)
        torch.testing.assert_close(new_sizes[row], expected_sizes)
        alone = new_sizes[row] == sizes[row, stood[row]]  # what nothing merged into is as it was
        torch.testing.assert_close(tokens[row, alone], x[row, stood[row, alone]])
    # Others before and behind those that may merge stay, and nothing else changes.
    around = [torch.cat([2 * part[:, :2], part, 3 * part[:, :1]], dim=1) for part in (x, sizes, metric)]
    inside = merge(*around, merges, 3, n - 1)
    torch.testing.assert_close(inside[0], torch.cat([2 * x[:, :2], tokens, 3 * x[:, :1]], dim=1))
    torch.testing.assert_close(inside[1], torch.cat([2 * sizes[:, :2], new_sizes, 3 * sizes[:, :1]], dim=1))
    assert torch.equal(inside[2][:, 2:-1], stood + 2) and torch.equal(inside[2][:, -1], torch.full((3,), n + 2))


def test_a_token_that_stands_for_two_patches_is_attended_to_twice(small_clip):
    """Proportional attention: merging two equal tokens changes nothing."""
    visual = small_clip().visual
    x = torch.randn(2, 6, 32)
    x[:, 3] = x[:, 4] = x[:, 5]
    merged, sizes = merge_block(adapt(visual), 0, x[:, :4], torch.tensor([[1.0, 1, 1, 3]] * 2), 0)
    torch.testing.assert_close(merged, visual.transformer.resblocks[0](x)[:, :4])
    assert sizes.tolist() == [[1, 1, 1, 3]] * 2


def test_without_merges_the_model_is_its_own(small_clip):
    model = small_clip()
    images = torch.randn(3, 3, 16, 20)
    expected = model.encode_image(images)
    patchrank.prune(model, "token-merging", keep=1.0)
    assert torch.equal(model.encode_image(images), expected)
    torch.testing.assert_close(
        MergedTower(model.visual.original, [0, 0, 1])(images).shape, model.visual.original(images).shape
    )


def test_sizes_add_up_and_every_patch_counts_once(small_clip):
    """With uniform attention and no MLP, the mean over tokens weighted by sizes would be the mean over patches."""
    generator = torch.Generator().manual_seed(0)
    x, sizes = torch.randn(2, 21, 8, generator=generator), torch.ones(2, 21)
    total = (x * sizes[..., None])[:, 1:].sum(dim=1)
    for merges in (5, 4, 3):
        x, sizes, _ = merge(x, sizes, x, merges)
        torch.testing.assert_close((x * sizes[..., None])[:, 1:].sum(dim=1), total)
        assert sizes[:, 0].tolist() == [1, 1] and sizes.sum(dim=1).tolist() == [21, 21]


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3])
def test_merging_takes_as_many_multiply_adds_as_pruning(small_clip, keep):
    adapter = adapt(small_clip(layers=8, image_size=(32, 32)).visual)  # 64 patches
    schedule = {2: math.floor(64 * keep + 0.5)}
    target = scheduled_multiply_adds(adapter, schedule)
    merges = merges_for(adapter, target)
    assert len(merges) == 7 and sum(merges[:3]) <= 32  # half of the tokens at most find a partner
    assert merging_multiply_adds(adapter, merges) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("merges", [[0, 0, 0], [3, 2, 1]])
def test_the_formula_counts_what_pytorch_counts(small_clip, merges):
    visual = small_clip().visual
    tower = MergedTower(visual, merges)
    assert count_multiply_adds(tower) == tower.multiply_adds()
    assert count_multiply_adds(visual) == adapt(visual).full_multiply_adds()


def test_beside_dropping_fewer_merge_where_few_leave_or_few_are_left(small_clip):
    adapter = adapt(small_clip(layers=10, image_size=(32, 32)).visual)  # 64 patches
    assert beside_dropping(adapter, {2: 40}, 0.375) == {block: 5 for block in range(4, 9)}  # 24 of 64, of five blocks
    assert beside_dropping(adapter, {2: 50, 6: 40}, 0.375) == {6: 8, 7: 8, 8: 6}
    assert beside_dropping(adapter, {2: 62}, 0.375) == {block: 2 for block in range(4, 9)}
    assert beside_dropping(adapter, {2: 9}, 0.375) == {4: 2, 5: 1, 6: 1, 7: 1, 8: 1}
    assert beside_dropping(adapter, {2: 40}, 0.0) == beside_dropping(adapter, {}, 0.375) == {}
