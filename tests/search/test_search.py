"""The fast search against the slow reference, in float64, where rounding cannot hide a difference."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch

from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.search.candidates import block_cover
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.tokens import tokens_kept

KEEP_RATES = (0.8, 0.5, 0.3)
SCORES = ("preservation", "similarities", "confidence", "label")


def agree(model, config, cut=1, images=3, chunk=7, logit_scale=3.0):
    torch.manual_seed(1)
    pixels = torch.randn(images, 3, *model.visual.image_size, dtype=torch.float64)
    classes = torch.nn.functional.normalize(torch.randn(5, 24, dtype=torch.float64), dim=-1)
    labels = torch.arange(images) % 5
    tower = Tower(model.visual, cut=cut, dtype=torch.float64)
    bank = classes
    if config.score == "similarities":  # one of the images is in the bank, and has its classes
        bank = classes = torch.cat([classes, torch.nn.functional.normalize(tower(pixels[:1]), dim=-1)])
    found = Searcher(tower, config, classes, logit_scale, KEEP_RATES, chunk, bank).search(pixels, labels)
    expected = [
        reference.search(model.visual, image, config, cut, classes, logit_scale, label, KEEP_RATES)
        for image, label in zip(pixels, labels.tolist(), strict=True)
    ]
    assert found.ranking.tolist() == [one["ranking"] for one in expected]
    assert found.step.tolist() == [one["step"] for one in expected]
    assert found.candidates == sum(one["candidates"] for one in expected)
    torch.testing.assert_close(found.score, torch.tensor([one["score"] for one in expected]))  # stored in float32
    for row, one in enumerate(expected):
        for column, (cosine, likely) in enumerate(one["pruned"]):
            assert found.pruned_cosine[row, column].item() == pytest.approx(cosine, abs=1e-6)
            assert found.pruned_prediction[row, column].item() == likely.argmax().item()
            assert found.pruned_confidence[row, column].item() == pytest.approx(likely.max().item(), abs=1e-6)
        likely = reference.softmax(one["full"], classes, logit_scale)
        assert found.prediction[row].item() == likely.argmax().item()
        assert found.confidence[row].item() == pytest.approx(likely.max().item(), abs=1e-6)
    assert found.finite.all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("rank_by", ["effects", "scores"])
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 1},
        {"rescore": None, "remove_per_step": 3, "keep": 0.5},  # 10 tokens leave: the last step is uneven
        {"rescore": 1, "remove_per_step": 4, "keep": 0.5},
        {"rescore": 2, "remove_per_step": 3, "keep": 0.33},
    ],
    ids=["one-shot", "exact", "lazy-1", "lazy-2"],
)
def test_agrees_with_reference(small_clip, score, block, rank_by, how):
    agree(small_clip(torch.float64), SearchConfig(score=score, block=block, rank_by=rank_by, **how), images=2)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block", [1, 2])
def test_the_search_that_scores_once_agrees(small_clip, score, block):
    agree(small_clip(torch.float64), SearchConfig(score=score, block=block, rescore=0, remove_per_step=3), images=2)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block, rescore", [(1, 0), (1, 2), (2, 0), (1, None)])
@pytest.mark.parametrize("proposals", [1, 3])
def test_any_number_of_proposals_agrees(small_clip, score, block, rescore, proposals):
    config = SearchConfig(score=score, block=block, rescore=rescore, proposals=proposals, remove_per_step=3, keep=0.1)
    agree(small_clip(torch.float64), config, images=2)


@pytest.mark.parametrize("score", ["confidence", "label"])
def test_where_the_model_is_sure_the_odds_still_rank(small_clip, score):
    """Every probability is 1 to float64's last digit; what the other classes have left is not."""
    visual = small_clip(torch.float64).visual
    pixels = torch.randn(1, 3, 16, 20, dtype=torch.float64)
    prefix = reference.prefix(visual, pixels[0], 1)
    full = reference.embed(visual, prefix, range(20))
    classes = torch.nn.functional.normalize(torch.stack([-full, full, full.roll(1), full.roll(2)]), dim=-1)

    def odds(token):
        embedding = reference.embed(visual, prefix, set(range(20)) - {token})
        logits = 200 * torch.nn.functional.normalize(embedding, dim=-1) @ classes.T
        return (logits[[0, 2, 3]].logsumexp(dim=0) - logits[1]).item()

    config = SearchConfig(score=score, steps=1, rank_by="scores")
    found = Searcher(Tower(visual, 1, torch.float64), config, classes, 200.0).search(pixels, torch.tensor([1]))
    assert (found.score == 1).all()
    assert found.ranking[0].tolist() == sorted(range(20), key=odds, reverse=True) != list(reversed(range(20)))


@pytest.mark.parametrize(
    "rank_by, rescore", [("effects", 0), ("effects", 2), ("effects", None), ("scores", 2), ("scores", None)]
)
@pytest.mark.parametrize("proposals", [1, 2, 4])
def test_what_a_search_will_cost_is_known(small_clip, rank_by, rescore, proposals):
    config = SearchConfig(rank_by=rank_by, rescore=rescore, proposals=proposals, remove_per_step=3, keep=0.3)
    tower = Tower(small_clip().visual)
    sizes = []
    suffix = tower.suffix

    def counted(tokens, kept=None, image=None):
        sizes.extend([] if kept is None else [kept.shape[1]] * len(kept))
        return suffix(tokens, kept, image)

    tower.suffix = counted
    found = Searcher(tower, config, chunk=5).search(torch.randn(1, 3, 16, 20))
    cost = config.cost(tower.grid)
    assert sum(step.candidates for step in cost) == found.candidates
    assert [step.kept for step in cost for _ in range(step.candidates)] == sizes
    assert sum(step.removed for step in cost) == 14


@pytest.mark.parametrize("cut", [0, 2, 3])
def test_agrees_at_every_cut(small_clip, cut):
    agree(small_clip(torch.float64), SearchConfig(remove_per_step=5), cut=cut, images=2)


@pytest.mark.parametrize("keep, steps", [(0.0, None), (0.02, None), (0.5, 2), (0.99, None), (0.9, 7)])
def test_agrees_at_the_ends(small_clip, keep, steps):
    agree(small_clip(torch.float64), SearchConfig(keep=keep, steps=steps, remove_per_step=3, rescore=3), images=1)


def test_agrees_with_all_tokens_leaving_in_blocks(small_clip):
    agree(small_clip(torch.float64), SearchConfig(keep=0.0, block=2, rescore=None, remove_per_step=6), images=1)


def test_agrees_with_the_other_attention_class(small_clip):
    model = small_clip(torch.float64, block_type="custom", scale_heads=True, scale_attn=True, ls_init_value=0.7)
    agree(model, SearchConfig(remove_per_step=3), images=1)


def test_batch_and_chunk_do_not_matter(small_clip):
    tower = Tower(small_clip(torch.float64).visual, dtype=torch.float64)
    images = torch.randn(5, 3, 16, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    together = Searcher(tower, SearchConfig(), chunk=64).search(images)
    alone = [Searcher(tower, SearchConfig(), chunk=3).search(image[None]) for image in images]
    assert torch.equal(together.ranking, torch.cat([one.ranking for one in alone]))
    assert together.candidates == sum(one.candidates for one in alone)


def test_ranking_is_consistent_with_steps_and_scores(small_clip):
    tower = Tower(small_clip().visual)
    config = SearchConfig(keep=0.5, remove_per_step=3, rescore=2, rank_by="scores")
    found = Searcher(tower, config).search(torch.randn(4, 3, 16, 20))
    for ranking, score, step in zip(found.ranking, found.score, found.step, strict=True):
        assert sorted(ranking.tolist()) == list(range(20))
        assert step.bincount().tolist() == [10, 3, 3, 3, 1]
        in_order = step[ranking]  # most useful first: those that never left, then the last step, ..., the first step
        assert in_order.tolist() == [0] * 10 + [4] + [3] * 3 + [2] * 3 + [1] * 3
        for one in range(5):
            block = score[ranking][in_order == one]
            assert torch.equal(block, block.sort().values)


def test_without_classes_predictions_are_empty(small_clip):
    found = Searcher(Tower(small_clip().visual), SearchConfig(), keep_rates=[0.5]).search(torch.randn(2, 3, 16, 20))
    assert found.prediction is found.confidence is found.pruned_prediction is found.pruned_confidence is None
    assert found.pruned_cosine.shape == (2, 1)


def test_out_of_memory_halves_the_chunk_and_goes_on(small_clip):
    tower = Tower(small_clip().visual)
    images = torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(5))
    expected = Searcher(tower, SearchConfig(), chunk=2).search(images)
    suffix = tower.suffix

    def small_memory(tokens, kept=None, image=None):
        if len(image) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return suffix(tokens, kept, image)

    tower.suffix = small_memory
    searcher = Searcher(tower, SearchConfig(), chunk=16)
    found = searcher.search(images)
    assert searcher.candidates.chunk == 2
    assert torch.equal(found.ranking, expected.ranking)
    assert found.candidates == expected.candidates


def test_other_errors_are_not_taken_for_a_full_memory(small_clip):
    tower = Tower(small_clip().visual)

    def broken(tokens, kept=None, image=None):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    tower.suffix = broken
    with pytest.raises(RuntimeError, match="shapes"):
        Searcher(tower, SearchConfig()).search(torch.randn(1, 3, 16, 20))


def test_an_overflow_is_marked_and_touches_no_other_image(small_clip):
    tower = Tower(small_clip().visual)
    images = torch.randn(3, 3, 16, 20)
    good = Searcher(tower, SearchConfig(), keep_rates=[0.5]).search(images)
    images[1, 0, 0, 0] = float("inf")
    found = Searcher(tower, SearchConfig(), keep_rates=[0.5]).search(images)
    assert found.finite.tolist() == [True, False, True]
    assert torch.equal(found.ranking[[0, 2]], good.ranking[[0, 2]])


@pytest.mark.parametrize("rows, columns, block", [(4, 5, 1), (4, 5, 2), (5, 3, 3), (3, 3, 3)])
def test_block_cover(rows, columns, block):
    cover = block_cover((rows, columns), block)
    assert cover.shape == ((rows - block + 1) * (columns - block + 1), rows * columns)
    for index, (row, column) in enumerate(itertools.product(range(rows - block + 1), range(columns - block + 1))):
        inside = [(row + i) * columns + column + j for i in range(block) for j in range(block)]
        assert cover[index].nonzero()[:, 0].tolist() == inside


def test_tokens_kept_rounds_half_up():
    assert [tokens_kept(196, keep) for keep in (1, 0.8, 0.7, 0.6, 0.5, 0.4, 0)] == [196, 157, 137, 118, 98, 78, 0]
    assert tokens_kept(5, 0.5) == 3


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"score": "entropy"}, "--score entropy"),
        ({"keep": 1.0}, "--keep 1.0"),
        ({"keep": -0.1}, "--keep -0.1"),
        ({"steps": 0}, "--steps 0"),
        ({"remove_per_step": 0}, "--remove-per-step 0"),
        ({"block": 0}, "--block 0"),
        ({"rescore": -1}, "--rescore -1"),
        ({"proposals": 0}, "--proposals 0"),
        ({"rank_by": "scores"}, "--rank-by scores needs --rescore"),
        ({"rank_by": "size"}, "--rank-by size"),
    ],
)
def test_bad_settings_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        SearchConfig(**settings)


def test_settings_that_do_not_fit_the_model(small_clip):
    tower = Tower(small_clip().visual)
    with pytest.raises(UserError, match="--block 5"):
        Searcher(tower, SearchConfig(block=5))
    with pytest.raises(UserError, match="--score label needs class embeddings"):
        Searcher(tower, SearchConfig(score="label"))
    for keep in (0.0, 1.2, 0.01):
        with pytest.raises(UserError, match="--keep-rates"):
            Searcher(tower, SearchConfig(), keep_rates=[keep])
