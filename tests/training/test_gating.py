"""Gates that are hard, and have a gradient: forwards the real gather, backwards a sigmoid; draws depend on the key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchrank.model.tower import Tower
from patchrank.tokens import select
from patchrank.training import gating


@pytest.fixture
def setting(small_clip):
    """A tower in float64, tokens of two images before the cut, their whole embeddings, and some usefulness."""
    tower = Tower(small_clip(torch.float64).visual, dtype=torch.float64)
    torch.manual_seed(3)
    tokens = tower.prefix(torch.randn(2, 3, *tower.visual.image_size, dtype=torch.float64))
    usefulness = torch.randn(2, tower.num_tokens, dtype=torch.float64)
    return tower, tokens, tower.suffix(tokens), usefulness


@pytest.mark.parametrize("count", [1, 7, 19, 20])
def test_forwards_hard_gates_are_the_real_gather(setting, count):
    tower, tokens, _, usefulness = setting
    found = gating.embeddings(tower, tokens, usefulness, count)
    torch.testing.assert_close(found, tower.suffix(tokens, select(usefulness, count)), rtol=1e-10, atol=1e-10)


def test_learnable_tokens_stay_and_get_a_gradient(setting):
    tower, tokens, _, usefulness = setting
    learnable = torch.randn(3, tokens.shape[2], dtype=torch.float64, requires_grad=True)
    longer = torch.cat([tokens, learnable.expand(2, -1, -1)], dim=1)
    found = gating.embeddings(tower, longer, usefulness, 7)
    torch.testing.assert_close(found, tower.suffix(longer, select(usefulness, 7)), rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    assert (learnable.grad.abs().sum(dim=1) > 0).all()


def test_backwards_a_gate_is_a_sigmoid_around_the_threshold():
    usefulness = torch.tensor([[3.0, -1.0, 0.5, 0.1, -2.0, 0.2, -3.0, 1.0, -0.5, 0.0]], requires_grad=True)
    ids, gates = gating.gates(usefulness, 4)
    assert ids.tolist() == [[0, 7, 2, 5, 3, 9, 8]]  # those that stay, and the next three tenths
    assert gates.tolist() == [[1, 1, 1, 1, 0, 0, 0]]
    wanted = torch.arange(1.0, 8.0)
    (gates * wanted).sum().backward()
    soft = ((usefulness.detach() - 0.15) / gating.TEMPERATURE).sigmoid()[0, ids[0]]
    expected = torch.zeros(10).scatter(0, ids[0], wanted * soft * (1 - soft) / gating.TEMPERATURE)
    torch.testing.assert_close(usefulness.grad[0], expected)


def test_the_gradient_says_which_token_is_missed(setting):
    """A small step against it makes up for a bad choice: the loss of the hard choice falls as usefulness learns."""
    tower, tokens, whole, usefulness = setting
    learnt = usefulness.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([learnt], lr=0.05)
    losses = []
    for step in range(60):
        noise = 0.3 * (1 - step / 60) * gating.draw_noise(0, step, ["a", "b"], 20)
        loss = gating.lacking(gating.embeddings(tower, tokens, learnt, 8, noise), whole, 0.4).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(gating.lacking(gating.embeddings(tower, tokens, learnt, 8), whole, 0.4).mean().item())
    random = [
        gating.lacking(tower.suffix(tokens, torch.stack([torch.randperm(20)[:8] for _ in range(2)])), whole, 0.4)
        for _ in range(50)
    ]
    assert min(losses[-10:]) < 0.7 * losses[0]
    assert losses[-1] < torch.stack(random).mean(dim=1).quantile(0.1)


def test_what_is_drawn_depends_on_seed_step_and_key_alone():
    one = gating.draw_noise(5, 9, ["a", "b", "c"], 20)
    torch.testing.assert_close(gating.draw_noise(5, 9, ["c", "a"], 20), one[[2, 0]], rtol=0, atol=0)
    for other in (gating.draw_noise(6, 9, ["a"], 20), gating.draw_noise(5, 8, ["a"], 20)):
        assert not torch.equal(other[0], one[0])
    many = gating.draw_noise(0, 0, [str(key) for key in range(500)], 20)
    assert abs(many.mean()) < 0.1 and many.std() == pytest.approx(torch.pi / 3**0.5, rel=0.05)  # logistic
    rates = [gating.draw_keep(0, step, (0.8, 0.6, 0.4)) for step in range(300)]
    assert rates == [gating.draw_keep(0, step, (0.8, 0.6, 0.4)) for step in range(300)]
    assert all(rates.count(rate) > 70 for rate in (0.8, 0.6, 0.4))


def test_the_loss_is_one_minus_cosine_by_its_usual_size():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    expected = (1 - F.cosine_similarity(a, b)) * 2**5
    torch.testing.assert_close(gating.lacking(a, 3 * b, 0.5), expected)
    assert gating.lacking(a.bfloat16(), b, 0.4).dtype == torch.float32


def test_blocks_that_are_run_again_backwards_give_the_same_gradient(setting):
    tower, tokens, whole, usefulness = setting
    gradients = []
    for recompute in (False, True):
        tower.recompute = recompute
        learnt = usefulness.clone().requires_grad_(True)
        gating.lacking(gating.embeddings(tower, tokens, learnt, 8), whole, 0.4).mean().backward()
        gradients.append(learnt.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
