"""Gates on keys: a token with gate 0 is as good as gone, and the gradient to gates is the true one."""

from __future__ import annotations

import pytest
import torch

from patchrank.model.adapter import Along
from patchrank.model.tower import Tower


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tower_and_tokens(small_clip, images, cut, **vision):
    tower = Tower(small_clip(torch.float64, **vision).visual, cut, torch.float64)
    return tower, tower.prefix(images)


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize(
    "vision",
    [{}, {"qk_norm": True}, {"scale_heads": True, "scale_attn_inner": True}],
    ids=["plain", "qk_norm", "scale"],
)
def test_hard_gates_are_a_gather(small_clip, images, vision, cut):
    tower, tokens = tower_and_tokens(small_clip, images, cut, **vision)
    generator = torch.Generator().manual_seed(1)
    kept = torch.stack([torch.randperm(20, generator=generator)[:7].sort().values for _ in images])
    gates = torch.zeros(3, 20, dtype=torch.float64).scatter(1, kept, 1.0)
    torch.testing.assert_close(tower.suffix(tokens, gates=gates), tower.suffix(tokens, kept), rtol=0, atol=1e-12)


def test_gates_go_with_kept_tokens_images_and_learnable_tokens(small_clip, images):
    tower, _ = tower_and_tokens(small_clip, images, 1)
    extra = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens, image = tower.prefix(images, extra), torch.tensor([2, 0])
    kept = torch.tensor([[1, 4, 6, 9], [0, 2, 11, 19]])
    gates = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.float64)
    found = tower.suffix(tokens, kept, image, gates)
    for row, ids in enumerate(([1, 6, 9], [2, 11])):
        expected = tower.suffix(tokens, torch.tensor([ids]), image[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-12)


def test_gates_of_one_change_nothing_and_their_scale_matters_beside_the_class_token(small_clip, images):
    tower, tokens = tower_and_tokens(small_clip, images, 1)
    whole, ones = tower.suffix(tokens), torch.ones(3, 20, dtype=torch.float64)
    torch.testing.assert_close(tower.suffix(tokens, gates=ones), whole, rtol=0, atol=1e-12)
    assert (tower.suffix(tokens, gates=ones / 2) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("at", ["inside", "at one", "at zero"])
def test_the_gradient_agrees_with_finite_differences(small_clip, images, at):
    tower, tokens = tower_and_tokens(small_clip, images[:1], 1)
    gates = torch.rand(1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gates = {"inside": gates, "at one": torch.ones_like(gates), "at zero": (gates > 0.5).double()}[at]
    direction = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def value(gates):
        return (tower.suffix(tokens, gates=gates) @ direction).sum()

    (gradient,) = torch.autograd.grad(value(gates.requires_grad_()), gates)
    gates, step = gates.detach(), 1e-6
    for token in range(20):
        change = torch.zeros_like(gates)
        change[0, token] = step
        expected = (value(gates + change) - value(gates - change)) / (2 * step)
        torch.testing.assert_close(gradient[0, token], expected, rtol=1e-5, atol=1e-8)


def test_what_has_a_gate_of_zero_does_not_merge_and_the_gradient_through_merging_is_the_true_one(small_clip, images):
    """Of 12 tokens 9 have gate 1; they merge among themselves, as if the others were not there."""
    tower, tokens = tower_and_tokens(small_clip, images, 1)
    extra = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = torch.cat([tokens, extra.expand(3, -1, -1)], dim=1)
    kept = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(row))[:12] for row in range(3)])
    along = Along(merges={1: 3, 2: 1}, first=1, patches=9)
    gates = (torch.arange(12) < 9).double().expand(3, -1).clone()
    alone = tower.suffix(tokens, kept[:, :9], along=along)
    assert (alone - tower.suffix(tokens, kept[:, :9])).abs().max() > 1e-3
    torch.testing.assert_close(tower.suffix(tokens, kept, gates=gates, along=along), alone, rtol=0, atol=1e-12)
    direction = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def value(gates):
        return (tower.suffix(tokens, kept, gates=gates, along=along) @ direction).sum()

    found = value(gates.requires_grad_())
    torch.testing.assert_close(found, (alone @ direction).sum(), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(found, gates)
    gates, step = gates.detach(), 1e-6
    for token in range(12):
        change = torch.zeros_like(gates)
        change[0, token] = step
        expected = (value(gates + change) - value(gates - change)) / (2 * step)
        torch.testing.assert_close(gradient[0, token], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_gates_in_low_precision(small_clip, images, dtype, tolerance):
    tower = Tower(small_clip().visual, 1, dtype)
    tokens, kept = tower.prefix(images), torch.tensor([[0, 3, 7, 12, 19]] * 3)
    gates = torch.zeros(3, 20).scatter(1, kept, 1.0)
    found = tower.suffix(tokens, gates=gates)
    assert found.dtype == torch.float32
    assert (1 - torch.cosine_similarity(found, tower.suffix(tokens, kept))).max() < tolerance
