"""A new strategy is one file and its line, a new score one function and its line; settings and jobs load fast."""

from __future__ import annotations

import subprocess
import sys
import types

import torch
from here import ROOT

from patchrank.model.tower import Tower
from patchrank.search import config as settings
from patchrank.search import objective
from patchrank.search.config import SearchConfig
from patchrank.search.objective import Score
from patchrank.search.searcher import Searcher
from patchrank.search.strategy import Strategy


class InOrder(Strategy):
    """Tokens leave by their id, unmeasured."""

    @classmethod
    def cost(cls, config, grid):
        return []

    def leave(self, count, first):
        return self.alive[:, :count]

    def rest(self):
        return self.alive


def test_a_strategy_is_one_file_and_its_line(small_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "patchrank.search.in_order", types.SimpleNamespace(InOrder=InOrder))
    monkeypatch.setitem(settings.STRATEGIES, "order", "in_order.InOrder")
    config = SearchConfig(rank_by="order", keep=0.5, remove_per_step=4)
    found = Searcher(Tower(small_clip().visual), config).search(torch.randn(2, 3, 16, 20))
    assert found.ranking.tolist() == [list(range(19, -1, -1))] * 2
    assert found.step[0].tolist() == [1] * 4 + [2] * 4 + [3] * 2 + [0] * 10
    assert found.candidates == sum(step.candidates for step in config.cost((4, 5))) == 0


def test_a_score_is_one_function_and_its_line(small_clip, monkeypatch):
    def worse(batch, embeddings, image):
        return -objective.SCORES["preservation"].minus_one(batch, embeddings, image)

    monkeypatch.setitem(objective.SCORES, "worse", Score(worse))
    tower, images = Tower(small_clip(torch.float64).visual, dtype=torch.float64), torch.randn(2, 3, 16, 20)
    best, worst = (
        Searcher(tower, SearchConfig(score=score, rank_by="scores", steps=1)).search(images)
        for score in ("preservation", "worse")
    )
    assert torch.equal(worst.ranking, best.ranking.flip(1))


def test_settings_and_jobs_load_without_what_takes_seconds():
    code = (
        "import sys; from patchrank.search.config import SearchConfig; SearchConfig().cost((14, 14)); "
        "from jobs import embed, evaluate, fit, query, report, search, status, train_predictor, train_tokens; "
        "print({'open_clip', 'timm', 'transformers', 'deepspeed', 'duckdb', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
