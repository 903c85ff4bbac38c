"""The search on real photos with the real OpenAI ViT-B/16: slow, and skipped where these are not at hand.

PATCHRANK_VIT_B16=ViT-B-16-quickgelu-visual.safetensors PATCHRANK_PHOTOS=imagenette-000002.tar make test
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from benchmarks.precision import KEEP_RATES, RoundedProducts, judge
from patchrank.data import shards
from patchrank.model import loading
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.tokens import tokens_kept

WEIGHTS, PHOTOS = os.environ.get("PATCHRANK_VIT_B16"), os.environ.get("PATCHRANK_PHOTOS")
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not (WEIGHTS and PHOTOS), reason="PATCHRANK_VIT_B16 and PATCHRANK_PHOTOS are not set"),
]


def model_and_photos(count):
    model = loading.load("ViT-B-16-quickgelu", WEIGHTS)
    preprocess = model.preprocess()
    return model, torch.stack([preprocess(photo) for _, photo in itertools.islice(shards.photos(PHOTOS), count)])


def test_the_default_search_keeps_the_embedding_where_random_tokens_do_not():
    model, pixels = model_and_photos(4)
    tower = Tower(model.visual, dtype=loading.resolve_dtype("auto", gpu=False))
    found = Searcher(tower, SearchConfig(), keep_rates=[0.6], chunk=8).search(pixels)

    tokens, kept = tower.prefix(pixels), tokens_kept(196, 0.6)
    random = torch.stack([torch.randperm(196)[:kept].sort().values for _ in pixels])
    chance = torch.cosine_similarity(tower.suffix(tokens, random), tower.suffix(tokens))
    assert found.pruned_cosine.mean() > 0.985
    assert (found.pruned_cosine[:, 0] > chance).all()


def test_a_low_precision_keeps_other_tokens_that_are_nearly_as_good():
    model, pixels = model_and_photos(2)
    tower, rankings = Tower(model.visual), {}
    paper = SearchConfig(rank_by="scores", steps=1, block=2)
    lost = 1 - Searcher(tower, paper, keep_rates=[0.6]).search(pixels).pruned_cosine.mean()
    with torch.inference_mode(), RoundedProducts():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = Searcher(Tower(model.visual, dtype=dtype), SearchConfig()).search(pixels)
            rankings[loading.dtype_name(dtype)] = found.ranking
    worth = {name: figures[KEEP_RATES.index(0.6)] for name, figures in judge(tower, pixels, rankings).items()}
    assert 1 - worth["float32"][1] < 0.45 * lost
    for name, least in (("float16", 0.7), ("bfloat16", 0.65)):  # chance is 0.6
        same, cosine = worth[name]
        assert same > least and 1 - cosine < 0.7 * lost, worth
