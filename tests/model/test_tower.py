"""The cut tower against open_clip's own forward pass."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from patchrank.errors import UserError
from patchrank.model.tower import Tower, default_cut


def assert_same(model, cut=None):
    size = model.visual.image_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    tower = Tower(model.visual, cut)
    tokens = tower.prefix(images)
    everything = torch.arange(tower.num_tokens).expand(2, -1)
    assert tokens.shape == (2, 1 + tower.num_tokens, tower.width)
    with torch.inference_mode():
        expected = model.encode_image(images)
    tolerance = 1e-5 * expected.abs().max().item()
    for found in (tower.suffix(tokens, everything), tower.suffix(tokens), tower(images)):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max().item() < tolerance


@pytest.mark.parametrize(
    "name, changes", [("ViT-B-16", {}), ("ViT-B-32", {}), ("ViT-B-32-quickgelu", {}), ("ViT-L-14", {"layers": 4})]
)
def test_equals_encode_image(name, changes):
    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    model = open_clip.CLIP(
        config["embed_dim"],
        CLIPVisionCfg(**config["vision_cfg"] | changes),
        CLIPTextCfg(layers=1, width=64),
        quick_gelu=config.get("quick_gelu", False),
    )
    assert_same(model.eval())


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"ls_init_value": 0.5},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"block_type": "custom"},
        {"qk_norm": True},
        {"scale_heads": True, "scale_attn_inner": True},
        {"scale_attn": True, "scale_fc": True, "ls_init_value": 0.5},
        {"patch_dropout": 0.5},  # off in eval mode
    ],
    ids=lambda vision: "+".join(vision) or "plain",
)
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_equals_encode_image_for_every_kind_of_block(small_clip, vision, cut, quick_gelu):
    assert_same(small_clip(quick_gelu=quick_gelu, **vision), cut)


def test_the_order_of_kept_tokens_does_not_matter_and_their_choice_does(small_clip):
    tower = Tower(small_clip(torch.float64).visual, dtype=torch.float64)
    tokens = tower.prefix(torch.randn(2, 3, 16, 20, dtype=torch.float64))
    kept = torch.tensor([[0, 3, 7], [1, 2, 19]])
    expected = tower.suffix(tokens, kept)
    torch.testing.assert_close(tower.suffix(tokens, kept.flip(1)), expected)
    torch.testing.assert_close(tower.suffix(tokens, kept.flip(0), torch.tensor([1, 0])), expected.flip(0))
    assert (tower.suffix(tokens, kept[:, :2]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("vision", [{}, {"qk_norm": True}], ids=["plain", "qk_norm"])
def test_low_precision_stays_close(small_clip, vision, dtype, tolerance):
    model = small_clip(**vision)
    images = torch.randn(4, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    found = Tower(model.visual, dtype=dtype)(images)
    assert found.dtype == torch.float32
    cosine = torch.cosine_similarity(found, model.encode_image(images))
    assert (1 - cosine).max() < tolerance


def test_the_model_is_left_alone(small_clip):
    model = small_clip()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tower = Tower(model.visual, dtype=torch.bfloat16)
    assert torch.equal(tower.visual.proj, model.visual.proj) and tower.visual.conv1.weight.dtype == torch.bfloat16
    assert torch.equal(tower.visual.ln_post.weight, model.visual.ln_post.weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.visual.proj.dtype == torch.float32


def test_default_cut_is_a_quarter_of_the_depth():
    assert [default_cut(blocks) for blocks in (1, 4, 12, 24, 32)] == [0, 1, 3, 6, 8]


@pytest.mark.parametrize(
    "vision, reason",
    [
        ({"layers": (1, 1, 1, 1), "image_size": 32, "patch_size": 16}, "ModifiedResNet"),
        ({"pool_type": "none"}, "pools tokens by 'none'"),
        ({"attentional_pool": "parallel", "attn_pooler_heads": 4}, "by attention, parallel"),
        ({"scaled_cosine_attn": True}, "scaled cosine"),
    ],
    ids=["resnet", "no-pool", "attention-pool", "cosine"],
)
def test_other_towers_are_refused_with_name_and_reason(small_clip, vision, reason):
    with pytest.raises(UserError, match=f"my-model: .*{reason}"):
        Tower(small_clip(**vision).visual, name="my-model")


def test_another_tower_of_timm_is_refused():
    model = open_clip.CustomTextCLIP(
        16, {"timm_model_name": "test_convnext", "image_size": 64}, {"layers": 1, "width": 16, "heads": 2}
    )
    with pytest.raises(UserError, match="its image tower is a ConvNeXt; patchrank takes"):
        Tower(model.visual)


@pytest.mark.parametrize("cut", [-1, 4])
def test_a_cut_outside_the_tower_is_refused(small_clip, cut):
    with pytest.raises(UserError, match="has 4 blocks: the cut must be 0 to 3"):
        Tower(small_clip().visual, cut)
