"""Dropout and stochastic depth of a model in train mode are a pruned tower's, too; a frozen tower has none."""

from __future__ import annotations

import re

import pytest
import torch
import towers
from timm.layers import DropPath

import patchrank
from patchrank.model.adapter import embedding_of
from patchrank.model.kinds import adapt
from patchrank.model.tower import Tower
from patchrank.pruning.selector import Selector

KEPT = [0, 3, 7, 12, 19, 18, 4, 9, 15, 11]
SHARES = ("p", "drop_prob", "dropout", "attention_dropout")  # as modules that drop something name their shares
OWN = {"clip": {}, "custom": {"block_type": "custom", "qk_norm": True}}
NAMES = [*OWN, "coca", "siglip", "gap-prefix", "registers", "eva", "eva-post-norm", "eva-rope", "pe"]
NAMES += ["hf-clip", "hf-siglip", "hf-dinov2", "hf-vit"]


class Fixed(Selector):
    """The same tokens of every image."""

    def __init__(self, patches):
        super().__init__()
        self.patches = patches

    def forward(self, tokens, count, attention, batch=None):
        return torch.zeros(len(tokens), self.patches).index_fill(1, torch.tensor(KEPT), 1.0)


def build(small_clip, name):
    """A model with stochastic depth, at a share of none, wherever its classes have some."""
    model = small_clip(torch.float64, **OWN[name]) if name in OWN else towers.build(small_clip, name, torch.float64)
    for module in list(model.visual.modules()):
        for path in ("drop_path1", "drop_path2", "drop_path"):
            if hasattr(module, path):
                setattr(module, path, DropPath(0.0))
    return model


def places(visual):
    """Names and modules that drop something."""
    return [(name, module) for name, module in visual.named_modules() if not vars(module).keys().isdisjoint(SHARES)]


def drop(module, share):
    for name in vars(module).keys() & SHARES:
        setattr(module, name, share)


def pruned(model):
    patches = adapt(model.visual).num_tokens
    return patchrank.prune(model, Fixed(patches), keep=len(KEPT) / patches)


def pictures(visual):
    return torch.randn(2, 3, *visual.image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masked(visual):
    rows = [towers.embed(visual, towers.prefix(visual, image, 1), KEPT) for image in pictures(visual)]
    return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_what_drops_everything_drops_it_in_a_pruned_tower_too(small_clip, name):
    """A share of 1 leaves nothing to chance."""
    model = build(small_clip, name)
    visual, images = model.visual, pictures(model.visual)
    calm = masked(visual)
    found = places(visual)
    assert len(found) >= 4
    for where, module in found:
        if re.search(r"(blocks|layers?)\.[012]\.", where):
            continue  # as block 3
        drop(module, 1.0)
        visual.train()
        wanted = masked(visual)
        assert not torch.allclose(wanted, calm), where
        pruned(model)
        torch.testing.assert_close(embedding_of(model.visual(images)), wanted, rtol=0, atol=1e-10, msg=where)
        model.visual.eval()
        torch.testing.assert_close(embedding_of(model.visual(images)), calm, rtol=0, atol=1e-10, msg=where)
        patchrank.restore(model)
        drop(module, 0.0)
    for _, module in found:
        drop(module, 1.0)
    tower = Tower(visual, 1, torch.float64).train()  # as a part of something that is trained
    gates = torch.zeros(2, tower.num_tokens, dtype=torch.float64).index_fill(1, torch.tensor(KEPT), 1.0)
    tokens = tower.prefix(images)
    torch.testing.assert_close(tower.suffix(tokens, gates=gates), calm, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["clip", "siglip", "eva-rope"])
def test_what_is_left_makes_up_for_it_on_average(small_clip, name):
    """Attention weights are dropped by chance, and others raised: the mean over many passes is as without."""
    model = build(small_clip, name)
    for where, module in places(model.visual):
        if "blocks.3.attn" in where and not where.endswith("proj_drop"):
            drop(module, 0.3)
    pruned(model)
    images = pictures(model.visual)
    calm, images = embedding_of(model.visual(images)), images.repeat(256, 1, 1, 1)
    model.train()
    torch.manual_seed(0)
    found = embedding_of(model.visual(images)).unflatten(0, (256, 2))
    spread = found.std(dim=0)
    assert spread.min() > 1e-6
    assert ((found.mean(dim=0) - calm).abs() / spread).mean() < 0.25  # 1 / 16 by chance, and what is not linear


def test_modules_stay_in_their_modes(small_clip):
    model = small_clip(torch.float64)
    model.train()
    model.visual.transformer.resblocks[2].eval()
    modes = [module.training for module in model.visual.modules()]
    visual = model.visual
    pruned(model)
    assert model.visual.training and [module.training for module in visual.modules()] == modes
