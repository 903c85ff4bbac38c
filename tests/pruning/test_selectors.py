"""What tells which tokens stay: class-token attention, chance, golden rankings, a predictor."""

from __future__ import annotations

import pytest
import torch

from patchrank.data.pair_batches import PairBatch
from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.pruning.chance import Chance
from patchrank.pruning.class_attention import ClassAttention
from patchrank.pruning.comparison import before_cut
from patchrank.pruning.golden import OfBatches


def make_batch(keys, pixels=None, ranked=True):
    count = len(keys)
    source = torch.Generator().manual_seed(count)
    ranking = torch.stack([torch.randperm(20, generator=source) for _ in keys])
    return PairBatch(
        keys=list(keys),
        pixels=torch.randn(count, 3, 16, 20, generator=source) if pixels is None else pixels,
        labels=torch.zeros(count, dtype=torch.int64),
        ranking=ranking if ranked else None,
        score=torch.rand(count, 20, generator=source) if ranked else None,
    )


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("vision", [{}, {"qk_norm": True}], ids=["plain", "qk_norm"])
def test_class_attention_is_that_of_the_models_last_block_before_the_cut(small_clip, vision, cut):
    model, batch = small_clip(**vision), make_batch("ab")
    tower = Tower(model.visual, cut)
    x = model.visual._embeds(batch.pixels)
    for block in model.visual.transformer.resblocks[: cut - 1]:
        x = block(x)
    block = model.visual.transformer.resblocks[cut - 1]
    x = block.ln_1(x)
    expected = torch.zeros(2, 20)
    for head in range(4):  # width 32 in heads of 8
        rows = slice(8 * head, 8 * head + 8)
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        query = x[:, 0] @ weight[:32][rows].T + bias[:32][rows]  # (2, 8)
        key = x @ weight[32:64][rows].T + bias[32:64][rows]  # (2, 21, 8)
        if vision:
            query, key = block.attn.ln_q(query), block.attn.ln_k(key)
        expected += torch.einsum("bd,bnd->bn", query, key).div(8**0.5).softmax(dim=1)[:, 1:] / 4
    tokens, count, attention = before_cut(tower, batch.pixels)
    assert torch.equal(tokens, tower.prefix(batch.pixels))
    found = ClassAttention()(tokens, count, attention)
    torch.testing.assert_close(found, expected)
    if not vision:
        weights = block.attn(x, x, x, need_weights=True)[1]  # (2, 21, 21), the mean over heads
        torch.testing.assert_close(found, weights[:, 0, 1:])
    assert tower.cut == cut


def test_random_depends_on_the_key_alone():
    tokens = torch.zeros(3, 1 + 20, 8)

    def random(tokens, batch):
        return Chance()(tokens, 20, None, batch)

    found = random(tokens, make_batch(["a", "b", "c"]))
    again = random(tokens.flip(0), make_batch(["c", "b", "a"]))
    assert found.shape == (3, 20) and torch.equal(found, again.flip(0))
    assert not torch.equal(found[0], found[1])
    assert random(tokens, make_batch(["a", "b", "c"], ranked=False)).equal(found)


def test_golden_gives_the_ranking_back_and_refuses_images_without_one():
    batch = make_batch("abc")
    usefulness = OfBatches()(torch.zeros(3, 21, 8), 20, None, batch)
    assert torch.equal(usefulness.argsort(dim=1, descending=True), batch.ranking)
    with pytest.raises(UserError, match=r"these images have no golden rankings; run jobs/search\.py"):
        OfBatches()(torch.zeros(3, 21, 8), 20, None, make_batch("abc", ranked=False))
