"""The registry of ways of pruning: what may be asked for, and that a line in it is all that a new way takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_selectors import make_batch

import patchrank
from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.pruning import methods
from patchrank.pruning.comparison import Comparison
from patchrank.pruning.methods import METHODS, Entry, Method, Need, choose, there_is
from patchrank.pruning.pruned import pruned_tower
from patchrank.pruning.selector import Selector
from patchrank.pruning.stand_in import count_multiply_adds
from patchrank.tokens import tokens_kept

CAPABLE = set(Need)


class Longest(Selector):
    """Keeps the tokens of the largest norm."""

    def forward(self, tokens, count, attention, batch=None):
        return tokens[:, -count:].norm(dim=-1)


@pytest.fixture
def longest(monkeypatch):
    monkeypatch.setitem(METHODS, "longest", Entry("Longest", lambda bundle: Method(Longest()), "#000000", "x", "-", 9))


def test_a_new_method_is_in_prune_and_in_comparisons(small_clip, longest):
    model, batch = small_clip(), make_batch("abc")
    tower = Tower(model.visual)
    tokens = tower.prefix(batch.pixels)
    count = tokens_kept(20, 0.5)
    kept = tokens[:, 1:].norm(dim=-1).topk(count, dim=1).indices.sort(dim=1).values
    expected = tower.suffix(tokens, kept)
    assert choose(None, {Need.MERGEABLE}) == ["token-merging", "random", "longest"]

    comparison = Comparison(tower, methods.make(["longest"], tower.device), [0.5])
    found = comparison.add(batch)[1]
    assert torch.equal(found.kept, kept) and torch.equal(found.embeddings, expected)
    assert [row.method for row in comparison.rows()] == ["unpruned", "longest"]

    timed = pruned_tower("longest", model.visual, tower.cut, 0.5)
    assert timed.multiply_adds() == count_multiply_adds(timed)
    patchrank.prune(model, "longest", keep=0.5)
    torch.testing.assert_close(model.encode_image(batch.pixels), expected)


def test_what_is_missing_for_a_method_is_named(longest):
    assert choose(None, CAPABLE) == list(METHODS)
    assert choose(["random", "golden"], CAPABLE) == ["golden", "random"]
    assert there_is(0, None, False) == {Need.MERGEABLE}
    assert there_is(1, None, True, rotary=True) == {Need.BLOCK, Need.RANKINGS}
    for name, need, words in (
        ("golden", Need.RANKINGS, "--methods golden: needs --rankings"),
        ("predictor", Need.PREDICTOR, "--methods predictor: needs --predictor or --bundle"),
        ("predictor-tokens", Need.PREDICTOR, "--methods predictor-tokens: needs --predictor or --bundle"),
        ("predictor-tokens", Need.TOKENS, "--methods predictor-tokens: needs --tokens or --bundle"),
        ("token-merging", Need.MERGEABLE, "--methods token-merging: takes no tower that turns tokens by their places"),
        ("class-attention", Need.BLOCK, "--cut 0: there is no block before the cut"),
        ("guess", Need.BLOCK, "--methods guess: must be one of golden, .*, random, longest"),
    ):
        with pytest.raises(UserError, match=words):
            choose(["longest", name], CAPABLE - {need})
        assert name not in choose(None, CAPABLE - {need})


def test_reading_the_registry_takes_no_torch():
    code = "import sys, patchrank.pruning.methods; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
