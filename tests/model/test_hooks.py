"""Hooks on every module of every kind of tower: they do what they do in the model's own pass, or are refused."""

from __future__ import annotations

import re

import pytest
import torch
import towers

import patchrank
from patchrank.errors import UserError
from patchrank.model.adapter import embedding_of
from patchrank.model.kinds import adapt
from patchrank.model.tower import Tower
from patchrank.pruning.selector import Selector

KEPT = [0, 3, 7, 12, 19, 18, 4, 9, 15, 11]


class Fixed(Selector):
    """The same tokens of every image."""

    def __init__(self, patches=20):
        super().__init__()
        self.patches = patches

    def forward(self, tokens, count, attention, batch=None):
        return torch.zeros(len(tokens), self.patches).index_fill(1, torch.tensor(KEPT), 1.0)


def louder(_, given, found):
    """What a module gives, times 1.5."""
    if isinstance(found, dict):  # an output class of transformers
        return type(found)(**{name: 1.5 * part for name, part in found.items()})
    return tuple(None if part is None else 1.5 * part for part in found) if isinstance(found, tuple) else 1.5 * found


def build(small_clip, name):
    if name in towers.NAMES:
        return towers.build(small_clip, name, torch.float64)
    return small_clip(torch.float64, **({"qk_norm": True, "block_type": "custom"} if name == "custom" else {}))


@pytest.mark.parametrize("name", ["clip", "custom", *towers.NAMES])
def test_a_hook_on_any_module_changes_the_pruned_tower_as_it_changes_the_model(small_clip, name):
    model = build(small_clip, name)
    visual = model.visual
    images, patches = torch.randn(1, 3, *visual.image_size, dtype=torch.float64), adapt(visual).num_tokens
    plain, computed, refused = embedding_of(visual(images)), [], []
    for where, module in visual.named_modules():
        if re.search(r"(blocks|layers?)\.[012]\b", where):
            continue  # as block 3, except that of that some towers read the class token alone
        if not where and name in towers.TRANSFORMERS:
            continue  # which is ours, around the vision model
        hook = module.register_forward_hook(louder)
        own = embedding_of(visual(images))
        try:
            patchrank.prune(model, Fixed(patches), keep=len(KEPT) / patches)
        except UserError as error:
            assert "has a hook, which would never be called" in str(error), (where, error)
            refused.append(where)
        else:
            pruned = embedding_of(model.visual(images))
            patchrank.restore(model)
            computed.append(where)
            wanted = towers.embed(visual, towers.prefix(visual, images[0], 1), KEPT)[None]
            # What the slow way leaves out does nothing in training alone: then the two differ by what the hook does.
            if not re.search("drop", where):
                torch.testing.assert_close(
                    pruned, wanted, rtol=0, atol=1e-10, msg=lambda text, where=where: f"{where}: {text}"
                )
            tower = Tower(visual, 1, torch.float64)
            torch.testing.assert_close(
                tower(images), own, rtol=0, atol=1e-10, msg=lambda text, where=where: f"{where}: {text}"
            )
        hook.remove()
    assert torch.equal(embedding_of(visual(images)), plain)
    assert any("mlp" in where for where in computed) and any(where.endswith(("attn", "attention")) for where in refused)


KINDS = {
    "register_forward_pre_hook": lambda _, given: (1.5 * given[0], *given[1:]),
    "register_full_backward_hook": lambda _, into, out: (1.5 * into[0],),
    "register_full_backward_pre_hook": lambda _, out: (1.5 * out[0],),
}


@pytest.mark.parametrize("register", KINDS)
@pytest.mark.parametrize(
    "name, called, read",
    [
        ("clip", "transformer.resblocks.2.mlp", "transformer.resblocks.2.attn"),
        ("siglip", "trunk.blocks.2.mlp", "trunk.blocks.2.attn.qkv"),
    ],
)
def test_hooks_of_other_kinds(small_clip, register, name, called, read):
    """Values and gradients, with all tokens, against the model's own pass; where weights are read, they are refused."""
    model = build(small_clip, name)
    visual, images = model.visual, torch.randn(1, 3, 16, 20, dtype=torch.float64, requires_grad=True)

    def run(module):
        found = module(images)
        return [found.detach(), *torch.autograd.grad(found.square().sum(), images)]

    plain = run(visual)
    hook = getattr(visual.get_submodule(called), register)(KINDS[register])
    own = run(visual)
    assert not all(map(torch.allclose, plain, own))
    torch.testing.assert_close(run(Tower(visual, 1, torch.float64)), own)
    patchrank.prune(model, Fixed(), keep=0.5)
    half = run(model.visual)
    hook.remove()
    assert not all(map(torch.allclose, run(model.visual), half))  # so it was called
    patchrank.restore(model)
    getattr(visual.get_submodule(read), register)(KINDS[register])
    with pytest.raises(UserError, match=r"block 2 has a hook, which would never be called"):
        patchrank.prune(model, Fixed(), keep=0.5)


def test_a_hook_that_comes_after_pruning_is_refused_when_it_would_be_left_out(small_clip):
    model = patchrank.prune(small_clip(), Fixed(), keep=0.5)
    images = torch.randn(1, 3, 16, 20)
    before = model.visual(images)
    block = model.visual.original.transformer.resblocks[3]
    block.mlp.register_forward_hook(louder)
    assert not torch.allclose(model.visual(images), before)
    hook = block.register_forward_hook(louder)
    with pytest.raises(UserError, match="this pruned model: its block 3 has a hook, which would never be called"):
        model.visual(images)
    hook.remove()
    model.visual(images)


def test_a_hook_on_an_activation_is_in_the_search_too(small_clip):
    """Which replaces QuickGELU by a faster one, unless someone looks at it."""
    visual = small_clip(torch.float64, quick_gelu=True).visual
    images = torch.randn(1, 3, 16, 20, dtype=torch.float64)
    visual.transformer.resblocks[2].mlp.gelu.register_forward_hook(louder)
    torch.testing.assert_close(Tower(visual, 1, torch.float64)(images), visual(images), rtol=0, atol=1e-10)
