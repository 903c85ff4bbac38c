"""Learnable tokens: what the model makes of them, what learns, and what stays as it is."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from patchrank import assets
from patchrank.errors import UserError
from patchrank.model import loading
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.pruning import prompts
from patchrank.pruning.dropping import PrunedTower
from patchrank.pruning.prompts import PromptedText, TokensConfig, VisualTokens
from patchrank.pruning.selector import Selector

VISION = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=4, image_size=16)


def make(**config):
    """Tokens large enough to be felt."""
    torch.manual_seed(0)
    tokens = VisualTokens(TokensConfig(32, count=3, **config))
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.normal_()
    return tokens


def open_clip_embeddings(model, images, cut, extra, place, kept, learnt=None):
    """The same through open_clip's own blocks, image by image."""
    result = []
    for image, ids in zip(images, kept, strict=True):
        x = model.visual._embeds(image[None])  # (1, 21, D)
        if place == "input":
            x = torch.cat([x, extra[None]], dim=1)
        for number, block in enumerate(model.visual.transformer.resblocks):
            if number == cut:
                learned = x[:, 21:] if place == "input" else extra[None]
                x = torch.cat([x[:, :1], x[:, 1:21][:, ids], learned], dim=1)
            if learnt is not None and number >= cut:
                left = (20 - len(ids) - 3) / 20  # of 20 patches; 3 learnable tokens take places of others
                parts = (0, 0), (slice(1, 1 + len(ids)), 1), (slice(1 + len(ids), None), slice(2, None))
                for there, row in parts:
                    if learnt.scales is not None:
                        x[:, there] *= 1 + left * learnt.scales[number - cut, row]
                    x[:, there] += left * learnt.shifts[number - cut, row]
            x = block(x)
        result.append(model.visual._pool(x)[0][0] @ model.visual.proj)
    return torch.stack(result)


@pytest.mark.parametrize("place", prompts.PLACES)
@pytest.mark.parametrize("text_width", [None, 16])
def test_tokens_join_the_patches_at_their_place_and_are_never_pruned(small_clip, place, text_width):
    model = small_clip()
    images = torch.randn(2, 3, 16, 20)
    kept = torch.tensor([[0, 3, 7, 19], [1, 2, 5, 6]])
    tokens = make(place=place, text_width=text_width)
    for cut in (1, 3):
        tower, seen = Tower(model.visual, cut), []
        found = tokens.embeddings(tower, images, lambda x: seen.append((x.shape, torch.is_grad_enabled())) or kept)  # noqa: B023
        expected = open_clip_embeddings(model, images, cut, tokens.extra(), place, kept)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert seen == [((2, 1 + 20 + 3, 32), False)]
        everything = torch.arange(20).expand(2, -1)
        torch.testing.assert_close(
            tokens.embeddings(tower, images),
            open_clip_embeddings(model, images, cut, tokens.extra(), place, everything),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", prompts.PLACES)
def test_shifts_and_scales_before_every_block_are_in_proportion_to_what_has_left(small_clip, place, scaled):
    model = small_clip()
    images, cut = torch.randn(2, 3, 16, 20), 2
    kept = torch.tensor([[0, 3, 7, 19], [1, 2, 5, 6]])
    tokens = make(place=place, shifted=len(model.visual.transformer.resblocks) - cut, scaled=scaled)
    tokens.requires_grad_(False)
    expected = open_clip_embeddings(model, images, cut, tokens.extra(), place, kept, tokens)
    tower = Tower(model.visual, cut)
    found = tokens.embeddings(tower, images, lambda _: kept)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    without = open_clip_embeddings(model, images, cut, tokens.extra(), place, kept)
    assert not torch.allclose(found, without, atol=1e-2)

    class Known(Selector):
        def forward(self, x, count, attention, batch=None):
            return torch.zeros(2, 20).scatter(1, kept, 1.0)

    pruned = PrunedTower(model.visual, {cut: 4}, Known(), tokens, cut)
    torch.testing.assert_close(pruned(images), expected, atol=1e-4, rtol=1e-4)
    in_parts = PrunedTower(model.visual, {cut: 4, cut + 1: 3}, Known(), tokens, cut)
    assert not torch.allclose(in_parts(images), expected, atol=1e-2)
    whole = tokens.along(tower.adapter, cut, 20).before
    x = torch.randn(2, 24, 32)
    torch.testing.assert_close(whole(x, cut), x)  # where nothing leaves, nothing is added
    torch.testing.assert_close(tokens.along(tower.adapter, cut, 10).before(x, cut - 1), x)


@pytest.mark.parametrize("place", prompts.PLACES)
@pytest.mark.parametrize("text_width", [None, 16])
def test_only_the_tokens_learn(small_clip, place, text_width):
    tower = Tower(small_clip().visual)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    tokens = make(place=place, text_width=text_width)
    names = {"visual"} if text_width is None else {"text", "coupling.weight"}
    assert {name for name, _ in tokens.named_parameters()} == names == set(tokens.state_dict())
    images, target = torch.randn(4, 3, 16, 20), torch.randn(4, 24)
    optimizer = torch.optim.Adam(tokens.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        embeddings = tokens.embeddings(tower, images, lambda x: torch.arange(10).expand(4, -1))
        loss = 1 - F.cosine_similarity(embeddings, target).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in tokens.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_tokens_work_beside_a_tower_of_low_precision(small_clip):
    tower = Tower(small_clip().visual, dtype=torch.bfloat16)
    for place in prompts.PLACES:
        tokens = make(place=place)
        embeddings = tokens.embeddings(tower, torch.randn(2, 3, 16, 20))
        assert embeddings.dtype == torch.float32
        embeddings.sum().backward()
        assert tokens.visual.grad.dtype == torch.float32 and tokens.visual.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [{"place": "middle"}, {"count": -1}, {"merged": 1.0}, {"merged": -0.1}])
def test_tokens_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=r"--(place middle|tokens -1|merged 1|merged -0.1): must be"):
        TokensConfig(32, **wrong)


def custom_text_clip(**text):
    """An open_clip model whose text tower is a module of its own, as a `Model`."""
    config = {"context_length": 77, "width": 16, "heads": 2, "layers": 2, "vocab_size": 49408, **text}
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(24, VISION, CLIPTextCfg(**config)).eval().requires_grad_(False)
    return Model("ViT-B-32", clip, True, "0123abcd", "4567", 100.0)


def embedded():
    return loading.load(assets.MODEL)


@pytest.mark.parametrize(
    "build",
    [
        embedded,
        custom_text_clip,
        lambda: custom_text_clip(pool_type="eos", eos_id=49407),
        lambda: custom_text_clip(proj_type="none"),
        lambda: custom_text_clip(proj_bias=True),
    ],
    ids=["embedded", "custom", "eos", "no projection", "biased projection"],
)
def test_tokens_that_spell_words_give_the_embeddings_of_these_words(build):
    """Learned tokens set to those of "a photo of a" must read as these words do."""
    model = build()
    names = ["cat", "ankle boot", "a rather long name of a thing"]
    text = model.clip if isinstance(model.clip, open_clip.CLIP) else model.clip.text
    ids = model.tokenizer()(["a photo of a"])[0, 1:5]
    prompted = PromptedText(model, names, count=4)
    found = prompted(text.token_embedding(ids))
    expected = model.clip.encode_text(model.tokenizer()([f"a photo of a {name}." for name in names]), normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (prompted(torch.randn(4, prompted.width)) - expected).abs().max() > 1e-3


def test_coupled_tokens_learn_from_the_classes_too_and_the_model_stays():
    model = embedded()
    before = {key: value.clone() for key, value in model.clip.state_dict().items()}
    prompted = PromptedText(model, ["cat", "dog", "boot"], count=4, template="a photo of a {}.")
    assert not list(filter(lambda parameter: parameter.requires_grad, prompted.parameters()))
    tokens = VisualTokens(TokensConfig(64, count=4, text_width=prompted.width))
    classes = prompted(tokens.text)
    assert classes.shape == (3, 64) and torch.allclose(classes.norm(dim=1), torch.ones(3))
    (classes[0] @ classes[1]).backward()
    assert tokens.text.grad.abs().max() > 0 and tokens.coupling.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.clip.state_dict().items())


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: Model("ViT-B-32", embedded().clip, False, "0", "0", 100.0), "holds the image tower alone"),
        (lambda: custom_text_clip(no_causal_mask=True), "attends in both directions"),
        (lambda: custom_text_clip(pool_type="last"), "is read out by 'last'"),
        (lambda: custom_text_clip(embed_cls=True), "has a class token"),
    ],
    ids=["none", "bidirectional", "last", "class token"],
)
def test_text_towers_that_cannot_take_tokens_are_refused(build, reason):
    with pytest.raises(UserError, match=f"ViT-B-32: its .*{reason}"):
        PromptedText(build(), ["cat"], 4)


def test_too_many_tokens_for_the_context_are_refused():
    with pytest.raises(
        UserError, match=r"--tokens 28: with the class name 'ankle boot' that is 33 text tokens, .* takes 32"
    ):
        PromptedText(embedded(), ["cat", "ankle boot"], 28)
    PromptedText(embedded(), ["cat", "ankle boot"], 27)


def test_saved_tokens_come_back_and_others_are_refused(small_clip, tmp_path):
    folder, tower = str(tmp_path / "tokens"), Tower(small_clip().visual)
    for text_width in (None, 16):
        tokens = make(place="input", text_width=text_width)
        prompts.save(folder, tokens, {"model": {"weights": "0123abcd", "cut": 1}, "keep": 0.6})
        again, record = prompts.load(folder, tower, "0123abcd")
        assert torch.equal(again.extra(), tokens.extra())
        assert again.config == tokens.config and record["keep"] == 0.6
    with pytest.raises(UserError, match="these tokens were made for another model: weights 0123abcd, here f"):
        prompts.load(folder, tower, "f")
    with pytest.raises(UserError, match="another --cut: 1, here 2"):
        prompts.load(folder, Tower(small_clip().visual, cut=2), "0123abcd")
    with pytest.raises(UserError, match="holds no tokens"):
        prompts.load(str(tmp_path), tower, "0123abcd")
