"""The embedded SigLIP-type model, on real images: it works, and its golden rankings say what it needs."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from safetensors.torch import load_file

import patchrank
from patchrank import assets
from patchrank.model import classes, loading
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.tokens import by_rank, select

FOLDER = Path(assets.SIGLIP.removeprefix("local-dir:"))


@pytest.fixture(scope="module")
def model():
    return loading.load(assets.SIGLIP)


@pytest.fixture(scope="module")
def test_images(model):
    """Some of the test images, (n, 3, 28, 28), and their labels."""
    preprocess = model.preprocess()
    samples = list(wds.WebDataset(assets.TEST_SHARDS[:1], shardshuffle=False).decode("pil"))[:200]
    return torch.stack([preprocess(sample["png"]) for sample in samples]), torch.tensor([s["cls"] for s in samples])


def test_it_is_pooled_by_attention_and_small(model):
    assert type(model.visual).__name__ == "TimmModel" and model.visual.trunk.attn_pool is not None
    assert Tower(model.visual).num_tokens == 196 and Tower(model.visual).adapter.prefix_tokens == 0
    assert model.clip.logit_bias is not None  # of the sigmoid loss
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
    assert {tensor.dtype for tensor in load_file(FOLDER / "open_clip_model.safetensors").values()} == {torch.float16}


def test_it_knows_the_test_images(model, test_images):
    images, labels = test_images
    names = classes.read_names(str(assets.CLASSNAMES))
    found = classes.from_text(model, names, classes.templates(["photo"]))
    with torch.no_grad():
        logits = F.normalize(model.clip.encode_image(images), dim=-1) @ found.embeddings.T
    assert (logits.argmax(dim=-1) == labels).float().mean() > 0.8


def test_golden_rankings_beat_chance_and_the_pooling_querys_attention(model, test_images):
    images, tower = test_images[0][:6], Tower(model.visual)
    found = Searcher(tower, SearchConfig(), None, keep_rates=(0.5,)).search(images)
    with torch.no_grad():
        tokens = tower.prefix(images)
        whole = tower.suffix(tokens)
        by_attention = tower.adapter.class_attention(tokens, tower.cut)  # (B, N)
        chance = torch.rand(6, 196, generator=torch.Generator().manual_seed(0))

        def cosine(usefulness):
            return F.cosine_similarity(tower.suffix(tokens, select(usefulness, 98)), whole)

        golden = cosine(by_rank(found.ranking))
        assert golden.min() > 0.99
        assert (golden > cosine(by_attention)).all() and (golden > cosine(chance)).all()
        torch.testing.assert_close(golden, found.pruned_cosine[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "pure_bf16", "pure_fp16"])
def test_in_open_clips_precisions(test_images, precision):
    model = open_clip.create_model(assets.SIGLIP, precision=precision).eval()
    images = test_images[0][:4].to(next(model.visual.parameters()).dtype)
    with torch.no_grad():
        whole = model.encode_image(images)
        patchrank.prune(model, "class-attention", keep=0.9)
        found = model.encode_image(images)
    assert found.dtype == whole.dtype
    assert F.cosine_similarity(found.float(), whole.float()).min() > 0.8
    assert torch.equal(patchrank.restore(model).encode_image(images), whole)
