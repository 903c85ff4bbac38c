"""Models of transformers are pruned where they are: what they give, and that nothing else of them changes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
import towers
import transformers
import transformers_models
from PIL import Image

import patchrank
from patchrank.errors import UserError
from patchrank.model.loading import tower_digest
from patchrank.model.transformers_tower import ImageTower
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.predictor import PredictorConfig
from patchrank.pruning.prompts import TokensConfig
from patchrank.pruning.stand_in import count_multiply_adds

N = 25  # patches of these models


def tower_of(vision, projection=None):
    return ImageTower(vision, projection, (20, 20))


def bundle_for(visual, shape=(5, 5), tokens=True, merged=0.0):
    torch.manual_seed(2)
    about = {
        "name": "small",
        "pretrained": None,
        "weights": {name: tower_digest(visual, getattr(torch, name)) for name in ("float32", "float16")},
        "cut": 1,
        "grid": list(shape),
        "blocks": 4,
    }
    prefix = patchrank.model.kinds.adapt(visual).prefix_tokens
    learnt = asdict(PredictorConfig(shape, 32, width=8, prefix_tokens=prefix))
    bundle = Bundle(about, learnt, asdict(TokensConfig(32, count=3, shifted=3, merged=merged)) if tokens else None)
    for parameter in bundle.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return bundle


@pytest.fixture
def images():
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def given(vision, images):
    """What a vision model is called with: of SigLIP2, what its processor makes of images of one size."""
    if vision.config.model_type != "siglip2_vision_model":
        return {"pixel_values": images}
    patches = torch.stack([towers.convert_image_to_patches(image, 4) for image in images])
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(len(images), N, dtype=torch.long),
        "spatial_shapes": torch.tensor([[5, 5]]).expand(len(images), -1),
    }


@pytest.mark.parametrize("name", towers.TRANSFORMERS)
def test_half_of_the_tokens_are_those_of_a_masked_forward_pass(images, name):
    """By the vision model's own modules, in float64; the tokens that are left, and what is pooled."""
    vision, images = towers.vision_model(name).double(), images.double()
    visual, original = tower_of(vision), type(vision)
    inputs = given(vision, images)
    if vision.config.model_type.startswith("dinov2") and vision.config.image_size == 28:
        inputs = {"pixel_values": images}  # another size than that of its configuration
    whole = vision(**inputs)
    patchrank.prune(vision, "class-attention", keep=0.5, image_size=(20, 20))
    assert isinstance(vision, original)
    found = vision(**inputs, output_hidden_states=True)
    ids = found.patch_ids
    assert torch.equal(ids, vision.patch_ids) and ids.shape == (2, 13)
    assert [len(state[0]) for state in found.hidden_states] == [len(whole.last_hidden_state[0])] * 2 + [
        found.last_hidden_state.shape[1]
    ] * 3
    assert vision.multiply_adds() == count_multiply_adds(vision.pruned_tower)
    patchrank.restore(vision)
    assert type(vision) is original
    for row, image in enumerate(images):
        tokens, states = towers.masked_tokens(visual, towers.prefix(visual, image, 1), ids[row].tolist())
        torch.testing.assert_close(found.last_hidden_state[row], tokens, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.hidden_states[2][row], states, rtol=0, atol=1e-10)
        wanted = towers.embed(visual, towers.prefix(visual, image, 1), ids[row].tolist())
        if found.pooler_output is not None and name != "hf-vit":
            torch.testing.assert_close(found.pooler_output[row], wanted, rtol=0, atol=1e-10)
        else:  # a pooler of its own after the class token, or none
            pooled = tokens[0] if name == "hf-vit" else tokens.mean(dim=0)
            torch.testing.assert_close(pooled, wanted, rtol=0, atol=1e-10)
    if name == "hf-vit":
        torch.testing.assert_close(found.pooler_output, vision.pooler(found.last_hidden_state))
    again = vision(**inputs)
    assert torch.equal(again.last_hidden_state, whole.last_hidden_state)
    assert (again.pooler_output is None) == (whole.pooler_output is None)


@pytest.mark.parametrize("name", towers.TRANSFORMERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bundle_and_merging(images, name, attention):
    """Learnable tokens are in no last hidden state; eager attention is the same function."""
    vision = towers.vision_model(name, attention)
    inputs = given(vision, images)
    bundle = bundle_for(tower_of(vision), merged=0.3)
    patchrank.prune(vision, bundle, keep=0.6)
    found = vision(**inputs)
    stay = vision.pruned_tower.schedule[1]
    merged = sum(bundle.tokens.merges(vision.pruned_tower.unchecked, {1: stay}).values())
    p = found.last_hidden_state.shape[1] - (stay - merged)
    assert merged and p == {"hf-clip": 1, "hf-dinov2": 1, "hf-vit": 1, "hf-dinov2-registers": 3}.get(name, 0)
    assert found.patch_ids.shape == (2, stay - merged)
    wanted = patchrank.restore(vision)
    tower = patchrank.model.tower.Tower(tower_of(wanted), 1)
    tokens = bundle.tokens.prefix(tower, images)
    order = bundle.predictor(tokens).topk(stay).indices
    pooled = tower.suffix(tokens, order, along=bundle.tokens.along(tower.adapter, 1, stay))
    for ids, there in zip(found.patch_ids.tolist(), order.tolist(), strict=True):
        assert len(set(ids)) == stay - merged and set(ids) < set(there)
    if name not in ("hf-vit", "hf-siglip-mean"):
        torch.testing.assert_close(found.pooler_output, pooled)
    patchrank.prune(vision, "token-merging", keep=0.6, image_size=(20, 20))
    merged = vision(**inputs)
    assert merged.last_hidden_state.shape[1] < N and merged.patch_ids is None


def test_two_towers_and_heads(images):
    """What a model makes of its vision model's output it makes of a pruned one's."""
    model = transformers_models.clip()
    texts = torch.randint(2, 60, (3, 6))
    whole = model.get_image_features(images).pooler_output
    patchrank.prune(model, "class-attention", keep=1 - 1 / N)
    close = model.get_image_features(images)
    assert torch.cosine_similarity(close.pooler_output, whole).min() > 0.9 and close.patch_ids.shape == (2, 24)
    out = model(input_ids=texts, pixel_values=images, output_hidden_states=True)
    assert out.logits_per_image.shape == (2, 3) and len(out.vision_model_output.hidden_states) == 5
    torch.testing.assert_close(out.image_embeds, torch.nn.functional.normalize(close.pooler_output, dim=-1))
    assert model.get_image_features(images, return_dict=False)[1].shape == (2, 24)

    siglip = transformers_models.siglip()
    patchrank.prune(siglip, "random", keep=0.5)
    assert siglip.get_image_features(images).pooler_output.shape == (2, 32)
    assert siglip(input_ids=texts, pixel_values=images).logits_per_image.shape == (2, 3)

    projecting = transformers_models.moved(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**towers.VISION, projection_dim=24))
    )
    patchrank.prune(projecting, "random", keep=0.5)
    assert projecting(images).image_embeds.shape == (2, 24) and projecting.vision_model.patch_ids.shape == (2, 13)

    classifier = transformers_models.moved(
        transformers.ViTForImageClassification(transformers.ViTConfig(**towers.VISION, num_labels=7))
    )
    logits = classifier(images).logits
    patchrank.prune(classifier, "class-attention", keep=0.5)
    found = classifier(pixel_values=images).logits
    assert found.shape == (2, 7) and not torch.allclose(found, logits)
    assert torch.equal(patchrank.restore(classifier)(images).logits, logits)


def test_the_same_weights_are_the_same_model_in_both_libraries(small_clip, images):
    """A bundle of one prunes the other, to rounding; of other weights or another activation it does not."""
    model = small_clip(quick_gelu=True, image_size=20)
    other = transformers_models.from_open_clip(model.visual)
    bundle = bundle_for(model.visual)
    for dtype in (torch.float32, torch.float16):
        ours = tower_of(other.vision_model, other.visual_projection)
        assert tower_digest(model.visual, dtype) == tower_digest(ours, dtype)
    torch.testing.assert_close(other(images).image_embeds, model.encode_image(images))
    patchrank.prune(model, bundle, keep=0.5)
    patchrank.prune(other, bundle, keep=0.5)
    torch.testing.assert_close(other(images).image_embeds, model.encode_image(images))
    assert torch.equal(other.vision_model.patch_ids, model.visual.patch_ids)
    with pytest.raises(UserError, match="this bundle is for small"):
        patchrank.prune(transformers_models.clip(), bundle)
    patchrank.prune(other.half(), bundle)  # in another precision it is the same model
    gelu = transformers_models.from_open_clip(small_clip(image_size=20).visual)
    with pytest.raises(UserError, match="this bundle is for small"):
        patchrank.prune(gelu, bundle_for(small_clip(image_size=20).visual))


def test_siglip_of_open_clip_is_that_of_transformers(small_clip, images):
    """Which has timm's weights by other names, and GELU by its approximation, as they were trained."""
    for act_layer, rounding in (("gelu_tanh", 1e-5), (None, 1e-3)):
        visual, vision = transformers_models.siglip_twins(act_layer)
        model = small_clip(image_size=20)
        model.visual = visual
        for dtype in (torch.float32, torch.float16):
            assert tower_digest(visual, dtype) == tower_digest(tower_of(vision), dtype)
        bundle = bundle_for(visual)
        patchrank.prune(model, bundle, keep=0.5)
        patchrank.prune(vision, bundle, keep=0.5)
        found = vision(images).pooler_output
        torch.testing.assert_close(found, model.encode_image(images), rtol=rounding, atol=rounding)
        assert torch.equal(vision.patch_ids, model.visual.patch_ids)
    patchrank.restore(vision).encoder.layers[0].mlp.fc1 = Tuned(vision.encoder.layers[0].mlp.fc1)
    with pytest.raises(UserError, match="this bundle is for small"):  # another model, though its weights are there
        patchrank.prune(vision, bundle)


def test_it_is_the_same_object_with_the_same_weights(images, tmp_path):
    model = transformers_models.clip()
    count, keys, kind = model.num_parameters(), list(model.state_dict()), type(model.vision_model)
    bundle = bundle_for(tower_of(model.vision_model, model.visual_projection))
    patchrank.prune(model, bundle, keep=0.6)
    assert model.num_parameters() == count and list(model.state_dict()) == keys
    assert model.load_state_dict(model.state_dict()).missing_keys == []
    wanted = model.get_image_features(images).pooler_output
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.get_image_features(images).pooler_output, wanted)
        other.vision_model.embeddings.class_embedding.data.zero_()
        assert torch.equal(model.get_image_features(images).pooler_output, wanted)
        assert not torch.equal(other.get_image_features(images).pooler_output, wanted)
        patchrank.restore(other)
        assert type(other.vision_model) is kind
    low = copy.deepcopy(model).to(torch.bfloat16)
    found = low.get_image_features(images.bfloat16()).pooler_output
    assert found.dtype == torch.bfloat16 and torch.cosine_similarity(found.float(), wanted).min() > 0.95
    assert {part.dtype for part in low.vision_model.pruned_tower.parameters()} == {torch.bfloat16}
    for each in (model, model.vision_model):
        for save in (each.save_pretrained, each.push_to_hub):
            with pytest.raises(UserError, match="save the bundle") as error:
                save(str(tmp_path / "nothing"))
            assert "\n" not in str(error.value)
    assert not (tmp_path / "nothing").exists()
    patchrank.restore(model).save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    patchrank.prune(loaded, bundle, keep=0.6)
    torch.testing.assert_close(loaded.get_image_features(images).pooler_output, wanted)
    compiled = torch.compile(loaded.vision_model, fullgraph=True, backend="aot_eager")(images).pooler_output
    torch.testing.assert_close(compiled @ loaded.visual_projection.weight.T, wanted)


def test_what_is_asked_while_planning_does_not_change_a_model(images):
    model = transformers_models.clip()
    model(input_ids=torch.ones(1, 3).long(), pixel_values=images, output_hidden_states=True)  # leaves hooks of its own
    patchrank.prune(model, "class-attention", keep=0.5)
    pruned = model.vision_model.pruned_tower
    with pytest.raises(UserError, match="block 0"):
        patchrank.prune(model, "class-attention", blocks=[0])
    assert model.vision_model.pruned_tower is pruned
    patchrank.prune(model, "class-attention", keep=1.0)
    assert not hasattr(model.vision_model, "pruned_tower")


def test_gradient_checkpointing_and_training(images):
    """Activations are kept for less, and gradients stay."""
    model = transformers_models.clip().requires_grad_(True)
    patchrank.prune(model, bundle_for(tower_of(model.vision_model, model.visual_projection)), keep=0.6)

    def gradient():
        model.zero_grad()
        model.get_image_features(images).pooler_output.sum().backward()
        return model.vision_model.encoder.layers[0].mlp.fc1.weight.grad.clone()

    model.train()
    assert model.vision_model.pruned_tower.selector.training
    wanted = gradient()
    model.activation_checkpointing_enable()
    assert model.vision_model.pruned_tower.adapter.recomputes
    torch.testing.assert_close(gradient(), wanted)


class Tuned(torch.nn.Module):
    """What peft puts in the place of a projection: its weights are not all that it computes."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.out_features = linear, linear.out_features

    def forward(self, x):
        return 1.5 * self.linear(x)


def test_tuned_projections_are_computed_as_they_are(images):
    vision, image = towers.vision_model("hf-clip").double(), images[:1].double()
    for block in vision.encoder.layers:
        block.self_attn.q_proj, block.mlp.fc1 = Tuned(block.self_attn.q_proj), Tuned(block.mlp.fc1)
    patchrank.prune(vision, "class-attention", keep=0.5)
    found = vision(image)
    visual = tower_of(patchrank.restore(vision))
    tokens, _ = towers.masked_tokens(visual, towers.prefix(visual, image[0], 1), found.patch_ids[0].tolist())
    torch.testing.assert_close(found.last_hidden_state[0], tokens, rtol=0, atol=1e-10)


def own_class(model):
    class Layer(type(model.vision_model.encoder.layers[2])):
        pass

    model.vision_model.encoder.layers[2].__class__ = Layer


@pytest.mark.parametrize(
    "change, words",
    [
        (own_class, "its block 2 is a test_in_transformers.own_class.<locals>.Layer"),
        (lambda model: model.vision_model.encoder.register_forward_hook(print), "its encoder has a hook"),
        (lambda model: delattr(model.vision_model, "encoder"), "is not built as transformers 5.24 builds it"),
        (
            lambda model: setattr(model.vision_model.config, "_attn_implementation", "flash_attention_2"),
            "its attention is computed by 'flash_attention_2'; load it with attn_implementation='sdpa'",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, words):
    model = transformers_models.clip()
    change(model)
    with pytest.raises(UserError) as error:
        patchrank.prune(model, "random")
    assert words in str(error.value)


def test_what_a_pruned_model_cannot_do_is_refused(images):
    model = transformers_models.clip()
    patchrank.prune(model, "random", keep=0.5)
    for name in ("output_attentions", "interpolate_pos_encoding"):
        with pytest.raises(UserError, match=f"{name}: .*restore"):
            model.vision_model(images, **{name: True})
    vision = towers.vision_model("hf-siglip2")
    patchrank.prune(vision, "random", keep=0.5)
    for name, value in (("pixel_attention_mask", torch.zeros(2, N)), ("spatial_shapes", torch.tensor([[4, 6]] * 2))):
        with pytest.raises(UserError, match="pruned for images of 5 x 5 patches without padding"):
            vision(**{**given(vision, images), name: value})
    dino = towers.vision_model("hf-dinov2")
    patchrank.prune(dino, "random", keep=0.5)
    with pytest.raises(ValueError, match="images of another size"):
        dino(torch.randn(1, 3, 28, 28))
    with pytest.raises(UserError, match="image_size: this CLIPVisionModel takes images of"):
        patchrank.prune(model, "random", image_size=(40, 40))
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(UserError, match=r"a BertModel cannot be pruned: .* vision model of transformers"):
        patchrank.prune(bert, "random")
    drawing = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**towers.VISION))
    with pytest.raises(UserError, match="a ViTForMaskedImageModeling cannot be pruned: it takes its tokens for all"):
        patchrank.prune(drawing, "random", keep=16 / N)  # a grid again


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_zero_shot_pipeline(seed):
    """At keep 1 - 1 / N the answer is that of the unpruned model; at 0.6 there is one."""
    model, processor = transformers_models.clip(seed), transformers_models.processor()
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3))
    photo = Image.fromarray(noise.astype(np.uint8))
    labels = ["cat", "dog", "bus"]

    def answer(model):
        pipeline = transformers.pipeline(
            "zero-shot-image-classification",
            model=model,
            tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
        )
        return pipeline(photo, candidate_labels=labels)

    whole = answer(model)
    almost = answer(patchrank.prune(model, "class-attention", keep=1 - 1 / N))
    assert almost != whole and [each["label"] for each in almost] == [each["label"] for each in whole]
    pruned = answer(patchrank.prune(model, "class-attention", keep=0.6))
    assert sum(each["score"] for each in pruned) == pytest.approx(1)
