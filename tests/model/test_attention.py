"""Attention a few heads or images at a time, as bfloat16 on a CPU has it, is attention."""

from __future__ import annotations

import pytest
import torch

import patchrank
from patchrank.model import attention
from patchrank.model.tower import Tower

ONE = 30 * 40 * 2  # bytes of a head's logits


@pytest.mark.parametrize("most", [1, ONE, 3 * ONE, 4 * ONE, 9 * ONE, 1 << 23])
@pytest.mark.parametrize("biased", [False, True])
def test_in_parts(monkeypatch, most, biased):
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 4, n, 16, dtype=torch.bfloat16) for n in (30, 40, 40))
    bias = torch.randn(5, 40) if biased else None
    monkeypatch.setattr(attention, "LOGIT_BYTES", most)
    found = attention.attend(query, key, value, bias=bias)
    wanted = attention.attend(query.double(), key.double(), value.double(), bias=bias)
    torch.testing.assert_close(found.double(), wanted, atol=0.03, rtol=0.03)


def test_logits_are_of_so_many_bytes_at_most(monkeypatch):
    seen, weighted = [], attention._weighted

    def watched(query, key, *others):
        seen.append(query.shape[0] * query.shape[1])
        return weighted(query, key, *others)

    monkeypatch.setattr(attention, "_weighted", watched)
    query, key = (torch.randn(5, 4, n, 16, dtype=torch.bfloat16) for n in (30, 40))
    for most, parts in ((ONE, [1] * 20), (3 * ONE, [3, 1] * 5), (9 * ONE, [8, 8, 4]), (1 << 23, [20])):
        monkeypatch.setattr(attention, "LOGIT_BYTES", most)
        attention.attend(query, key, key)
        assert seen == parts
        seen.clear()


def test_what_is_traced_is_for_any_number_of_images(small_clip, monkeypatch):
    monkeypatch.setattr(attention, "LOGIT_BYTES", 1)
    model = patchrank.prune(small_clip(torch.bfloat16), "class-attention", keep=0.5)
    images = torch.randn(3, 3, 16, 20, dtype=torch.bfloat16)
    traced = torch.jit.trace(model.visual, (images[:1],))
    torch.testing.assert_close(traced(images), model.visual(images), atol=0.05, rtol=0.05)
    assert Tower(small_clip().visual, 1, torch.bfloat16)(images).isfinite().all()
