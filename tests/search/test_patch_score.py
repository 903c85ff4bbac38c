"""The score "patches": how well the patches that stay stand for all, by the nearest of each."""

from __future__ import annotations

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
import towers

import patchrank
from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher

GRID = (4, 5)


def nearest(token, kept, grid=GRID):
    """Of the patches that are left, by the distance of their middles; the lower id of equals."""
    place = divmod(token, grid[1])
    return min(kept, key=lambda other: (math.dist(place, divmod(other, grid[1])), other))


def cosines(visual, prefix, kept):
    """(N,) cosines of the whole image's final patch features to those that stand for them, by masks."""

    def features(stay):
        x = towers.masked(visual, prefix, stay)[1]
        return visual.ln_post(x)[0, -20:]  # (N, D)

    whole, found = features(range(20)), features(kept)
    return torch.stack([F.cosine_similarity(whole[i], found[nearest(i, kept)], dim=0) for i in range(20)])


@pytest.mark.parametrize("settings", [{"rank_by": "effects"}, {"rank_by": "scores", "rescore": 2, "block": 2}])
def test_the_search_agrees_with_masks(small_clip, settings):
    visual = small_clip(torch.float64).visual
    image = torch.randn(3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    config = SearchConfig(score="patches", remove_per_step=5, keep=0.5, **settings)
    found = Searcher(Tower(visual, 1, torch.float64), config, keep_rates=(0.5,), chunk=7).search(image[None])

    start = towers.prefix(visual, image, 1)
    find = reference.by_effects if config.rank_by == "effects" else reference.by_scores
    side = range(config.block)
    blocks = [
        {(row + i) * 5 + column + j for i in side for j in side}
        for row in range(5 - config.block)
        for column in range(6 - config.block)
    ]
    with torch.no_grad():
        gone, scores, step, candidates = find(
            config, set(range(20)), blocks, lambda kept: cosines(visual, start, kept), lambda each: each.mean().item()
        )
    assert found.ranking[0].tolist() == gone[::-1] and found.candidates == candidates
    assert found.step[0].tolist() == [step[token] for token in range(20)]
    assert found.score[0].tolist() == pytest.approx([scores[token] for token in range(20)], abs=1e-6)
    whole = towers.embed(visual, start, range(20))  # cosines beside it are of the embedding, as for other scores
    wanted = F.cosine_similarity(whole, towers.embed(visual, start, gone[::-1][:10]), dim=0)
    assert found.pruned_cosine[0, 0].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_patches_that_are_alike_can_go(small_clip):
    """A search for patches keeps their features better than one for the embedding."""
    visual = small_clip().visual
    images = torch.randn(4, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    rankings = {
        score: Searcher(Tower(visual, 1), SearchConfig(score=score, keep=0.3)).search(images).ranking
        for score in ("patches", "preservation")
    }
    worth = {
        score: sum(
            cosines(visual, towers.prefix(visual, image, 1), row[:8].tolist()).mean().item()
            for image, row in zip(images, ranking, strict=True)
        )
        for score, ranking in rankings.items()
    }
    assert worth["patches"] > worth["preservation"]


@pytest.mark.parametrize("fill", ["zeros", "nearest"])
def test_features_are_put_back_where_they_were(fill):
    ids = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:6] for seed in range(3)])
    features = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    found = patchrank.on_grid(features, ids, GRID, fill)
    assert found.shape == (3, 8, 4, 5)
    for row, kept in enumerate(ids.tolist()):
        for token in range(20):
            here = found[row, :, token // 5, token % 5]
            source = nearest(token, kept) if fill == "nearest" or token in kept else None
            assert torch.equal(here, here * 0 if source is None else features[row, kept.index(source)])
    found.sum().backward()
    assert features.grad.sum() == 3 * 8 * (20 if fill == "nearest" else 6)
    for bad in ((features, ids, (2, 2), fill), (features[:, :5], ids, GRID, fill), (features, ids, GRID, "none")):
        with pytest.raises(UserError):
            patchrank.on_grid(*bad)


@pytest.mark.parametrize("name", ["plain", "tokens", "siglip", "registers", "eva-rope"])
def test_intermediates_are_of_the_tokens_that_are_left(small_clip, name):
    """In open_clip and timm: at keep 1 what the original gives; below, what masks in its modules leave."""
    model = small_clip() if name == "plain" else towers.build(small_clip, name)
    model = model.double()
    images = torch.randn(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    visual = model.visual
    whole = visual.forward_intermediates(images, indices=[0, 3], output_extra_tokens=True, normalize_intermediates=True)
    patchrank.prune(model, "class-attention", keep=1.0)
    again = model.visual.forward_intermediates(images, indices=[0, 3], normalize_intermediates=True)
    assert torch.equal(again["image_intermediates"][1], whole["image_intermediates"][1])

    patchrank.prune(model, "class-attention", keep=0.5)
    given = {"indices": [0, 3], "output_extra_tokens": True, "normalize_intermediates": True}
    maps = model.visual.forward_intermediates(images, **given)
    found = model.visual.forward_intermediates(images, output_fmt="NLC", **given)
    ids = model.visual.patch_ids
    assert found["image_patch_ids"][0].tolist() == [list(range(20))] * 2
    assert torch.equal(found["image_patch_ids"][1], ids) and ids.shape == (2, 10)
    torch.testing.assert_close(maps["image_intermediates"][0], whole["image_intermediates"][0])
    wanted = patchrank.on_grid(found["image_intermediates"][1], ids, GRID, "nearest")
    assert torch.equal(maps["image_intermediates"][1], wanted)
    assert ("image_intermediates_prefix" in found) == ("image_intermediates_prefix" in whole) == (name != "siglip")
    embeddings = model.visual(images)
    torch.testing.assert_close(found["image_features"], embeddings[0] if name == "tokens" else embeddings)
    early = model.visual.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert list(early) == ["image_intermediates", "image_patch_ids"] and early["image_patch_ids"][0].shape == (2, 10)
    adapter = patchrank.model.kinds.adapt(visual)
    for row, image in enumerate(images):
        _, x, stays = towers.masked(visual, towers.prefix(visual, image, 1), ids[row].tolist())
        x = adapter.final_norm(x)[0]
        torch.testing.assert_close(found["image_intermediates"][1][row], x[len(stays) - 20 + ids[row]])
    if name != "eva-rope":
        patchrank.prune(model, "token-merging", keep=0.5)
        with pytest.raises(UserError, match="merged tokens have no place"):
            model.visual.forward_intermediates(images)


def test_whole_models_give_intermediates(small_clip):
    model = small_clip()
    patchrank.prune(model, "random", keep=0.5)
    found = model.forward_intermediates(torch.randn(2, 3, 16, 20), torch.randint(0, 100, (2, 8)), image_indices=2)
    assert [tuple(each.shape) for each in found["image_intermediates"]] == [(2, 32, 4, 5)] * 2
    assert found["image_features"].shape == found["text_features"].shape == (2, 24)


def test_output_tokens_are_those_of_the_ids(small_clip):
    model = towers.build(small_clip, "tokens")
    patchrank.prune(model, "class-attention", keep=0.5)
    images = torch.randn(2, 3, 16, 20)
    _, tokens = model.visual(images)
    found = model.visual.forward_intermediates(images, indices=1, output_fmt="NLC", normalize_intermediates=True)
    torch.testing.assert_close(tokens, found["image_intermediates"][0])
    assert copy.deepcopy(model).visual.patch_ids.shape == (2, 10)
