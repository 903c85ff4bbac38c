"""A new kind of tower is one adapter: with registers, or without a prefix token and read out by the mean."""

from __future__ import annotations

import pytest
import torch

import patchrank
from patchrank.errors import UserError
from patchrank.model import fidelity, kinds
from patchrank.model.kinds import adapt
from patchrank.model.open_clip_vit import OpenClipViT
from patchrank.model.tower import Tower
from patchrank.pruning.stand_in import count_multiply_adds


class WithRegisters(OpenClipViT):
    """Two registers behind the class token."""

    prefix_tokens = 3

    def embed(self, images):
        x = super().embed(images)
        registers = torch.linspace(-1, 1, 2 * self.width, device=x.device).view(2, -1).to(x.dtype)
        return torch.cat([x[:, :1], registers.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)


class Averaged(OpenClipViT):
    """No class token; the embedding is that of the mean over patches."""

    prefix_tokens = 0

    def embed(self, images):
        return super().embed(images)[:, 1:]

    def attention(self, x, number, gates=None, bias=None, places=None):
        block = self.blocks[number]
        y = block.ln_1(x)
        return x + block.attn(y, y, y, need_weights=False)[0], y[:, None, :, : self.head_width]

    def readout(self, x, weights=None):
        return super().readout(x.mean(dim=1, keepdim=True))

    def block_multiply_adds(self, n, last=False):
        return super().block_multiply_adds(n)


def slow(adapter, images, cut, kept):
    """An image and a block at a time, through open_clip's own blocks."""
    embeddings = []
    for image, ids in zip(images, kept, strict=True):
        x = adapter.embed(image[None])
        for number, block in enumerate(adapter.blocks):
            if number == cut:
                p = adapter.prefix_tokens
                x = torch.cat([x[:, :p]] + [x[:, p + token, None] for token in ids], dim=1)
            x = block(x)
        x = x.mean(dim=1) if adapter.prefix_tokens == 0 else x[:, 0]
        embeddings.append(adapter.visual.ln_post(x) @ adapter.visual.proj)
    return torch.cat(embeddings)


@pytest.mark.parametrize("kind", [WithRegisters, Averaged])
def test_another_kind_is_cut_and_pruned_and_counted(small_clip, monkeypatch, kind):
    monkeypatch.setattr(kinds, "kinds", lambda: (kind,))
    monkeypatch.setattr(fidelity, "check", lambda adapter: None)  # the module has neither registers nor a mean
    model = small_clip()
    images = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    kept, everything = torch.tensor([[0, 3, 7], [1, 2, 19]]), torch.arange(20).expand(2, -1)
    tower = Tower(model.visual, cut=1)
    tokens = tower.prefix(images, extra=torch.zeros(0, 32))
    assert tokens.shape == (2, kind.prefix_tokens + 20, 32) == (2, tower.length, 32)
    for ids in (kept, everything):
        torch.testing.assert_close(tower.suffix(tokens, ids), slow(adapt(model.visual), images, 1, ids.tolist()))
    torch.testing.assert_close(tower.suffix(tokens), tower.suffix(tokens, everything))

    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.arange(float(shape[1])).expand(shape))
    patchrank.prune(model, "random", keep=0.5)
    torch.testing.assert_close(model.encode_image(images), tower.suffix(tokens, torch.arange(10, 20).expand(2, -1)))
    assert count_multiply_adds(model.visual) == model.visual.multiply_adds()
    patchrank.prune(model, "token-merging", keep=0.5)
    assert count_multiply_adds(model.visual) == model.visual.multiply_adds()


def test_the_first_kind_that_takes_a_module_serves_it_and_the_last_reason_is_told(small_clip, monkeypatch):
    class Picky(Averaged):
        @classmethod
        def refusal(cls, visual):
            return None if visual.pool_type == "avg" else "it is read at a token"

    monkeypatch.setattr(kinds, "kinds", lambda: (Picky, OpenClipViT))
    assert type(adapt(small_clip().visual)) is OpenClipViT and type(adapt(small_clip(pool_type="avg").visual)) is Picky
    monkeypatch.setattr(kinds, "kinds", lambda: (OpenClipViT, Picky))
    with pytest.raises(UserError, match="my-model: it is read at a token"):
        adapt(small_clip(scaled_cosine_attn=True).visual, "my-model")
