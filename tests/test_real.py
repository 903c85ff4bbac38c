"""The search on real photos with the real OpenAI ViT-B/16: slow, and skipped where these are not at hand.

PATCHRANK_VIT_B16=ViT-B-16-quickgelu-visual.safetensors PATCHRANK_PHOTOS=imagenette-000002.tar make test
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from patchrank import images, models, shards
from patchrank.search import SearchConfig, Searcher, tokens_kept
from patchrank.vit import Tower

WEIGHTS, PHOTOS = os.environ.get("PATCHRANK_VIT_B16"), os.environ.get("PATCHRANK_PHOTOS")
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not (WEIGHTS and PHOTOS), reason="PATCHRANK_VIT_B16 and PATCHRANK_PHOTOS are not set"),
]


def test_the_default_search_keeps_the_embedding_where_random_tokens_do_not():
    model = models.load("ViT-B-16-quickgelu", WEIGHTS)
    preprocess = model.preprocess()
    photos = (sample for sample in shards.read(PHOTOS) if isinstance(sample, shards.Sample))
    pixels = torch.stack([preprocess(images.decode(photo.image)) for photo in itertools.islice(photos, 4)])
    tower = Tower(model.visual, dtype=models.resolve_dtype("auto", gpu=False))
    found = Searcher(tower, SearchConfig(), keep_rates=[0.6], chunk=8).search(pixels)

    tokens, kept = tower.prefix(pixels), tokens_kept(196, 0.6)
    random = torch.stack([torch.randperm(196)[:kept].sort().values for _ in pixels])
    chance = torch.cosine_similarity(tower.suffix(tokens, random), tower.suffix(tokens))
    assert found.pruned_cosine.mean() > 0.985
    assert (found.pruned_cosine[:, 0] > chance).all()
