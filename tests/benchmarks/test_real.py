"""The search on real photos with the real OpenAI ViT-B/16: slow, and skipped where these are not at hand.

PATCHRANK_VIT_B16=ViT-B-16-quickgelu-visual.safetensors PATCHRANK_PHOTOS=imagenette-000002.tar make test
"""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict

import pytest
import torch
import transformers_models

import patchrank
from benchmarks.precision import KEEP_RATES, RoundedProducts, judge
from patchrank.data import shards
from patchrank.model import loading
from patchrank.model.loading import tower_digest
from patchrank.model.tower import Tower
from patchrank.model.transformers_tower import ImageTower
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.predictor import PredictorConfig
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


@torch.no_grad()
def test_the_same_weights_in_transformers_are_the_same_model():
    """One digest, and a bundle that was made with open_clip prunes transformers' model to the same embeddings."""
    model, pixels = model_and_photos(2)
    other = transformers_models.from_open_clip(model.visual)
    assert tower_digest(ImageTower(other.vision_model, other.visual_projection)) == model.weights
    tower = Tower(model.visual)
    about = {
        "name": model.name,
        "pretrained": None,
        "weights": {"float32": model.weights},
        "cut": tower.cut,
        "grid": [14, 14],
        "blocks": 12,
    }
    torch.manual_seed(0)
    bundle = Bundle(about, asdict(PredictorConfig.of(tower)))
    for parameter in bundle.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    whole = model.clip.encode_image(pixels)
    torch.testing.assert_close(other(pixels).image_embeds, whole, rtol=0, atol=1e-4)
    patchrank.prune(model.clip, bundle, keep=0.6)
    patchrank.prune(other, bundle, keep=0.6)
    pruned = model.clip.encode_image(pixels)
    torch.testing.assert_close(other(pixels).image_embeds, pruned, rtol=0, atol=1e-4)
    assert torch.equal(other.vision_model.patch_ids.sort(dim=1).values, model.visual.patch_ids.sort(dim=1).values)
    assert not torch.allclose(pruned, whole, atol=1e-2)
