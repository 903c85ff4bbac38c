"""What peft tunes is pruned as it was tuned, or refused by name: LoRA on attention, the MLP and both, merged or not."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import towers

import patchrank
from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.pruning.selector import Selector

USEFULNESS = torch.randperm(20, generator=torch.Generator().manual_seed(3))
KEPT = USEFULNESS.topk(10).indices

ATTENTION = {
    "clip": r"visual.*resblocks.*attn",  # nn.MultiheadAttention, in and out
    "custom": r"visual.*resblocks.*attn.out_proj",
    "siglip": r"visual.*(qkv|attn.proj)",
    "pe": r"visual.*(qkv|attn.proj)",
    "eva-rope": r"visual.*(q_proj|k_proj|v_proj|attn.proj)",
}
MLP = {"clip": r"visual.*(c_fc|c_proj)", "custom": r"visual.*(c_fc|c_proj)"}  # the others' are fc1 and fc2
REFUSED = ("clip", "siglip", "pe")  # where weights are read; the others' linear layers are called


class Fixed(Selector):
    """The same tokens of every image."""

    def forward(self, tokens, count, attention, batch=None):
        return USEFULNESS.expand(len(tokens), -1)


def targets(kind, where):
    mlp = MLP.get(kind, r"visual.*(fc1_g|fc1_x|fc1|fc2)")
    return {"attention": ATTENTION[kind], "mlp": mlp, "both": f"({ATTENTION[kind]})|({mlp})"}[where]


def build(small_clip, kind):
    if kind in towers.NAMES:
        return towers.build(small_clip, kind, torch.float64)
    return small_clip(torch.float64, **({"qk_norm": True} if kind == "custom" else {}))


def tuned(model, pattern):
    config = peft.LoraConfig(target_modules=pattern, r=2, init_lora_weights=False)
    torch.manual_seed(4)
    return peft.get_peft_model(model, config).double().eval()


def masked(visual, images, cut=1):
    """The tuned model's own modules on some of the tokens."""
    rows = [towers.embed(visual, towers.prefix(visual, image, cut), KEPT.tolist()) for image in images]
    return torch.stack(rows).detach()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found, wanted):
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("where", ["attention", "mlp", "both"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_a_tuned_model_is_pruned_or_refused_and_pruned_once_it_is_merged(small_clip, images, kind, where):
    model = build(small_clip, kind)
    untuned = model.visual(images)
    wrapped = tuned(model, targets(kind, where))
    wanted = masked(model.visual, images)
    assert not torch.allclose(model.visual(images), untuned, atol=1e-3)  # the tuning is at work
    if where != "mlp" and kind in REFUSED:
        for state in ("tuned", "merged"):  # what is merged stays in peft's layers until it is unloaded
            for use in (lambda: patchrank.prune(wrapped, Fixed(), keep=0.5), lambda: Tower(model.visual)):
                with pytest.raises(UserError, match=r"block 0 is a peft\.tuners.*merge_and_unload"):
                    use()
            if state == "tuned":
                wrapped.merge_adapter()
        wrapped.unmerge_adapter()
    else:
        assert patchrank.prune(wrapped, Fixed(), keep=0.5) is wrapped
        close(model.visual(images), wanted)
        patchrank.restore(wrapped)
        tower = Tower(model.visual, 1, torch.float64)
        close(tower.suffix(tower.prefix(images), KEPT.expand(2, -1)), wanted)
    merged = wrapped.merge_and_unload()
    close(masked(merged.visual, images), wanted)
    patchrank.prune(merged, Fixed(), keep=0.5)
    close(merged.visual(images), wanted)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_is_tuned_after_pruning_counts_too_or_is_refused(small_clip, images, kind):
    """LoRA that is to recover what pruning costs: it must be trained in the place where it is used."""
    model = patchrank.prune(build(small_clip, kind), Fixed(), keep=0.5)
    untuned = model.visual(images)
    wrapped = tuned(copy.deepcopy(model), targets(kind, "mlp"))
    visual = wrapped.get_base_model().visual
    found = visual(images)
    close(found, masked(visual.original, images))
    assert not torch.allclose(found, untuned, atol=1e-3)
    found.square().sum().backward()
    trained = {name: value.grad for name, value in wrapped.named_parameters() if value.requires_grad}
    assert trained and all(grad is not None and grad.any() for name, grad in trained.items() if "resblocks.3" in name)
    wrapped = tuned(model, targets(kind, "attention"))
    with pytest.raises(UserError, match=r"this pruned model: .* block 0 is a peft\.tuners"):
        model.visual(images)
    restored = patchrank.restore(wrapped.merge_and_unload())
    patchrank.prune(restored, Fixed(), keep=0.5)
    close(restored.visual(images), masked(restored.visual.original, images))
