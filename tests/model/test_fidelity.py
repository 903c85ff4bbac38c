"""Never another function than the model's own: what was put in the place of its modules is computed, or refused."""

from __future__ import annotations

import copy
import re
import types

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.nn.utils import parametrize

import patchrank
from patchrank.errors import UserError
from patchrank.model import fidelity
from patchrank.model.kinds import adapt
from patchrank.model.tower import Tower

IMAGES = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
KEPT = torch.arange(10).expand(2, -1)


class Louder(nn.Module):
    """What tuning puts in the place of a linear layer: it is called, and its weights are not all that it computes."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return 1.5 * self.linear(x)


class OwnBlock(ResidualAttentionBlock):
    pass


def own_block(visual):
    visual.transformer.resblocks[2].__class__ = OwnBlock


def own_attention(visual):
    class Attention(nn.MultiheadAttention):
        pass

    visual.transformer.resblocks[1].attn.__class__ = Attention


def own_output(visual):
    attn = visual.transformer.resblocks[0].attn
    attn.out_proj = Louder(attn.out_proj)


def own_forward(visual):
    block = visual.transformer.resblocks[3]
    block.forward = types.MethodType(lambda self, x, attn_mask=None: x, block)


def hook(visual):
    visual.transformer.resblocks[1].register_forward_hook(lambda *_: None)


def pre_hook(visual):
    visual.transformer.resblocks[1].attn.register_forward_pre_hook(lambda *_: None)


def backward_hook(visual):
    visual.transformer.register_full_backward_hook(lambda *_: None)


def hook_on_all(visual):
    visual.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change, words",
    [
        (own_block, "its block 2 is a test_fidelity.OwnBlock"),
        (own_attention, "the attention of its block 1 is a test_fidelity.own_attention.<locals>.Attention"),
        (own_output, "the output projection in the attention of its block 0 is a test_fidelity.Louder"),
        (own_forward, "the forward pass of its block 3 was replaced by another"),
        (hook, "its block 1 has a hook, which would never be called"),
        (pre_hook, "the attention of its block 1 has a hook"),
        (backward_hook, "its transformer has a hook"),
        (hook_on_all, "its image tower has a hook"),
    ],
)
def test_what_stands_in_the_place_of_a_module_that_is_not_called_is_refused(small_clip, change, words):
    model = small_clip()
    change(model.visual)
    for use in (lambda: patchrank.prune(model, "class-attention", keep=0.9), lambda: Tower(model.visual)):
        with pytest.raises(UserError, match=f"this model: {re.escape(words)}"):
            use()


def tuned_mlp(visual):
    for block in visual.transformer.resblocks:
        block.mlp.c_fc, block.mlp.c_proj = Louder(block.mlp.c_fc), Louder(block.mlp.c_proj)


def other_activation(visual):
    visual.transformer.resblocks[1].mlp.gelu = nn.ReLU()


def other_norm(visual):
    visual.transformer.resblocks[1].ln_1 = nn.Identity()


def parametrized(visual):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for block in visual.transformer.resblocks:
        parametrize.register_parametrization(block.attn, "in_proj_weight", Doubled())
        parametrize.register_parametrization(block.mlp.c_fc, "weight", Doubled())


def hooked_mlp(visual):
    visual.transformer.resblocks[2].mlp.register_forward_hook(lambda module, given, found: 2 * found)


@pytest.mark.parametrize("change", [tuned_mlp, other_activation, other_norm, parametrized, hooked_mlp])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_what_is_called_or_read_as_it_is_is_computed(small_clip, change, quick_gelu):
    """Half of the tokens, against the model's own blocks."""
    model = small_clip(quick_gelu=quick_gelu)
    before = model.encode_image(IMAGES)
    change(model.visual)
    assert not torch.allclose(model.encode_image(IMAGES), before, atol=1e-2)
    tower = Tower(model.visual, cut=1)
    x = model.visual._embeds(IMAGES)
    for number, block in enumerate(model.visual.transformer.resblocks):
        x = torch.cat([x[:, :1], x[:, 1:11]], dim=1) if number == 1 else x
        x = block(x)
    expected = model.visual.ln_post(x[:, 0]) @ model.visual.proj
    torch.testing.assert_close(tower.suffix(tower.prefix(IMAGES), KEPT), expected, atol=1e-4, rtol=1e-4)
    whole = model.encode_image(IMAGES)
    patchrank.prune(model, "random", keep=0.5)
    assert not torch.allclose(model.encode_image(IMAGES), whole, atol=1e-4)
    torch.testing.assert_close(patchrank.restore(model).encode_image(IMAGES), whole)


def test_a_tower_that_computes_something_else_is_refused_and_the_place_is_told(small_clip):
    model = small_clip()
    fidelity.check(adapt(model.visual))

    class Twice(type(model.visual)):
        def forward(self, images):
            return super().forward(images) + super().forward(images.flip(3))

    other = copy.deepcopy(model)
    other.visual.__class__ = Twice
    with pytest.raises(UserError, match="this model: what comes before or after its blocks computes something else"):
        patchrank.prune(other, "random", keep=0.5)
    assert type(other.visual) is Twice

    class Adapter(type(adapt(model.visual))):
        def mlp(self, x, number):
            return super().mlp(x, number) * (1.1 if number == 2 else 1)

    with pytest.raises(UserError, match="my-model: its block 2 computes something else"):
        fidelity.check(Adapter(model.visual), "my-model")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_and_modes_stay(small_clip, dtype):
    visual = small_clip(quick_gelu=True, patch_dropout=0.5).visual.to(dtype)
    visual.train()
    visual.transformer.resblocks[1].eval()
    modes = [module.training for module in visual.modules()]
    fidelity.check(adapt(visual))
    assert [module.training for module in visual.modules()] == modes
    fidelity.check(adapt(visual.to("meta")))  # where nothing can be computed


class Wrapper(nn.Module):
    """Hands on what is read, as peft and FSDP do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *given):
        return self.module(*given)


class Holder(nn.Module):
    def __init__(self, **models):
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: Wrapper(Wrapper(model)), torch.compile, lambda m: Holder(a=m)])
def test_the_model_in_a_wrapper_is_pruned_and_restored(small_clip, wrap):
    model = small_clip()
    own, original = model.encode_image(IMAGES), model.visual
    wrapped = wrap(model)
    assert patchrank.prune(wrapped, "class-attention", keep=0.3) is wrapped
    assert model.visual is not original and not torch.allclose(model.encode_image(IMAGES), own, atol=1e-4)
    assert patchrank.restore(wrapped) is wrapped and model.visual is original


@pytest.mark.parametrize("wrap, name", [(torch.compile, "OptimizedModule"), (nn.DataParallel, "DataParallel")])
def test_what_is_around_the_image_tower_alone_is_named(small_clip, wrap, name):
    """Where `prune` puts its tower into a model, only the model itself knows the place."""
    model = small_clip()
    own, visual = model.encode_image(IMAGES), model.visual
    model.visual = wrap(visual)
    with pytest.raises(UserError, match=f"its image tower is inside a {name}, which is to be put around it once"):
        patchrank.prune(model, "random")
    model.visual = visual
    patchrank.prune(model, "class-attention", keep=0.5)
    pruned = model.encode_image(IMAGES)
    if wrap is nn.DataParallel:
        model.visual = wrap(model.visual)
        torch.testing.assert_close(model.encode_image(IMAGES), pruned)
    assert not torch.allclose(pruned, own, atol=1e-4)


def test_a_quantized_tower_is_refused_by_name(small_clip):
    model = small_clip()
    model.visual = torch.ao.quantization.quantize_dynamic(model.visual, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UserError, match="this model: its image tower is quantized; prune the model that it"):
        patchrank.prune(model, "random")


@pytest.mark.parametrize("keep", ["0.6", [0.6], None])
def test_a_keep_rate_is_a_number(small_clip, keep):
    if keep is None:
        assert patchrank.prune(small_clip(), "random", keep=keep).visual.schedule
        return
    with pytest.raises(UserError, match=r"keep .*0\.6.*: must be a number"):
        patchrank.prune(small_clip(), "random", keep=keep)


def test_several_models_and_sharded_ones_are_refused(small_clip):
    with pytest.raises(UserError, match=r"a Holder holds several models with an image tower \(student, teacher\)"):
        patchrank.prune(Holder(student=small_clip(), teacher=small_clip()), "random")
    with pytest.raises(UserError, match="a Linear cannot be pruned: it has no image tower"):
        patchrank.prune(nn.Linear(2, 2), "random")
    sharded = type("FullyShardedDataParallel", (Wrapper,), {})(small_clip())
    with pytest.raises(UserError, match=r"this model is sharded \(FSDP\): prune it before it is wrapped"):
        patchrank.prune(sharded, "random")


def test_attributes_of_the_original_cannot_be_set_on_a_pruned_tower(small_clip):
    model = patchrank.prune(small_clip(), "random", keep=0.5)
    with pytest.raises(UserError, match=r"^output_tokens: is set on the unpruned tower, before `patchrank.prune`"):
        model.visual.output_tokens = True
    model.visual.image_mean = (0.5, 0.5, 0.5)  # as open_clip does once a model is there
    model.eval().train()
    assert model.encode_image(IMAGES).shape == (2, 24)
