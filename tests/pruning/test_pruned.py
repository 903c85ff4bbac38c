"""Pruned open_clip models: what they give, what they cost, and that they are ordinary PyTorch models."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import asdict

import made_up
import onnxruntime
import open_clip
import pytest
import torch
import towers
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

import patchrank
from patchrank.errors import UserError
from patchrank.model.kinds import adapt
from patchrank.model.loading import tower_digest
from patchrank.model.tower import Tower
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.class_attention import ClassAttention
from patchrank.pruning.comparison import before_cut
from patchrank.pruning.predictor import PredictorConfig
from patchrank.pruning.prompts import TokensConfig
from patchrank.pruning.stand_in import count_multiply_adds
from patchrank.tokens import select

N = 20  # patch tokens of `small_clip`


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 20, generator=torch.Generator().manual_seed(1))


def bundle_for(model, place=None, cut=1, merged=0.0):
    """A bundle whose predictor and tokens were never trained."""
    torch.manual_seed(2)
    visual = model.visual
    about = {
        "name": "small",
        "pretrained": None,
        "weights": {"float32": tower_digest(visual)},
        "cut": cut,
        "grid": [4, 5],
        "blocks": 4,
    }
    tokens = None if place is None else asdict(TokensConfig(32, count=3, place=place, merged=merged))
    bundle = Bundle(about, asdict(PredictorConfig((4, 5), 32, width=8)), tokens)
    for parameter in bundle.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return bundle


def expected(model, bundle, images, count):
    """What the tower of the search and of the training makes of the same."""
    tower = Tower(model.visual, bundle.cut)
    tokens = tower.prefix(images) if bundle.tokens is None else bundle.tokens.prefix(tower, images)
    return tower.suffix(tokens, select(bundle.predictor(tokens), count))


@pytest.mark.parametrize("place", [None, "cut", "input"])
@pytest.mark.parametrize("keep, count", [(0.8, 16), (0.5, 10), (0.35, 7)])
def test_a_bundle_prunes_as_in_training(small_clip, images, place, keep, count):
    """Learnable tokens take places of patches; those that go through the blocks before the cut, too, take more."""
    model = small_clip()
    bundle = bundle_for(model, place)
    assert patchrank.prune(model, bundle, keep=keep) is model
    stay = model.visual.schedule[1]
    assert stay == count - {None: 0, "cut": 3}[place] if place != "input" else stay < count - 3
    found = model.encode_image(images)
    wanted = expected(patchrank.restore(model), bundle, images, stay)
    patchrank.prune(model, bundle, keep=keep)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model.encode_image(images), wanted)
    torch.testing.assert_close(
        model.encode_image(images, normalize=True), torch.nn.functional.normalize(wanted, dim=-1)
    )


@pytest.mark.parametrize(
    "vision", [{}, {"ls_init_value": 0.5}, {"qk_norm": True}, {"scale_heads": True}, {"mlp_ratio": 2}]
)
def test_both_of_open_clips_attention_classes(small_clip, images, vision):
    model = small_clip(**vision)
    bundle = bundle_for(model)
    wanted = expected(model, bundle, images, 10)
    patchrank.prune(model, bundle, keep=0.5)
    torch.testing.assert_close(model.encode_image(images), wanted)


def test_all_tokens_make_the_original_and_so_does_restore(small_clip, images):
    model = small_clip()
    state = copy.deepcopy(model.state_dict())
    original, whole = model.visual, model.encode_image(images)
    for how in (bundle_for(model), "class-attention", "random", "token-merging"):
        patchrank.prune(model, how, keep=1.0)
        assert torch.equal(model.encode_image(images), whole)
        patchrank.prune(model, how, keep=0.5)
        assert not torch.allclose(model.encode_image(images), whole, atol=1e-3)
    assert patchrank.restore(model) is model and model.visual is original
    assert torch.equal(model.encode_image(images), whole)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert patchrank.restore(model).visual is original  # and once more


def test_class_attention_and_random_and_golden(small_clip, images, tmp_path):
    model = small_clip()
    tower = Tower(model.visual)
    tokens = tower.prefix(images)
    usefulness = ClassAttention()(*before_cut(tower, images))
    patchrank.prune(model, "class-attention", keep=0.5)
    torch.testing.assert_close(model.encode_image(images), tower.suffix(tokens, select(usefulness, 10)))

    patchrank.prune(model, "random", keep=0.5)
    assert not torch.equal(model.encode_image(images), model.encode_image(images))

    made = made_up.images("shard.tar", 8)
    made_up.save(tmp_path, made)
    golden = patchrank.Golden(str(tmp_path))
    patchrank.prune(model, golden, keep=0.5)
    keys, rows = ["000003", "000001", "000007", "000000", "000003"], [3, 1, 7, 0, 3]
    with golden.of(keys):
        found = model.encode_image(images)
    kept = torch.tensor(made.arrays["ranking"][rows, :10]).sort(dim=1).values
    torch.testing.assert_close(found, tower.suffix(tokens, kept))
    with pytest.raises(UserError, match="inside `with golden"):
        model.encode_image(images)
    with golden.of(keys[:2]), pytest.raises(UserError, match="inside `with golden"):
        model.encode_image(images)
    with pytest.raises(UserError, match="no ranking of 'nobody'"), golden.of(["nobody"]):
        pass


def test_tokens_can_leave_in_parts(small_clip, images):
    model = small_clip()
    bundle = bundle_for(model)
    tower = Tower(model.visual, 1)
    order = bundle.predictor(tower.prefix(images)).argsort(dim=1, descending=True)
    patchrank.prune(model, bundle, keep={1: 0.8, 3: 0.4})
    assert model.visual.schedule == {1: 16, 3: 8}
    x = tower.prefix(images)
    rows = torch.arange(5)[:, None]
    blocks = model.visual.original.transformer.resblocks
    x = x[rows, torch.cat([torch.zeros(5, 1, dtype=torch.long), order[:, :16] + 1], dim=1)]
    x = blocks[2](blocks[1](x))[:, :9]
    wanted = model.visual.original.ln_post(blocks[3](x)[:, 0]) @ model.visual.original.proj
    torch.testing.assert_close(model.encode_image(images), wanted)

    patchrank.prune(model, bundle, keep=0.4, blocks=[3, 1, 2])
    assert model.visual.schedule == {1: 16, 2: 12, 3: 8}
    patchrank.prune(model, "class-attention", keep=0.4, blocks=[1, 3])
    assert model.encode_image(images).shape == (5, 24)


@pytest.mark.parametrize("place", [None, "cut", "input"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_a_target_in_multiply_adds_is_met_and_no_token_wasted(small_clip, images, place, share):
    model = small_clip()
    bundle = bundle_for(model, place)
    full = adapt(model.visual).full_multiply_adds()
    patchrank.prune(model, bundle, multiply_adds=share)
    assert model.visual.multiply_adds() <= share * full
    kept = model.visual.schedule.get(1, N)
    if kept < N:
        model.visual.schedule = {1: kept + 1} if kept + 1 < N else {}
        assert model.visual.multiply_adds() > share * full


@pytest.mark.parametrize("place", [None, "cut", "input"])
@pytest.mark.parametrize("keep", [1.0, 0.5, {1: 0.8, 3: 0.4}])
def test_the_formula_counts_what_pytorch_counts(small_clip, place, keep):
    model = small_clip()
    patchrank.prune(model, bundle_for(model, place), keep=keep)
    assert count_multiply_adds(model.visual) == model.visual.multiply_adds()


@pytest.mark.parametrize(
    "how", ["bundle", *(pytest.param(how, marks=pytest.mark.long) for how in ("class-attention", "token-merging"))]
)
def test_compile_export_and_onnx(small_clip, images, how, tmp_path):
    model = small_clip()
    how = bundle_for(model, "input", merged=0.3) if how == "bundle" else how
    patchrank.prune(model, how, keep={1: 0.7, 2: 0.5} if how != "token-merging" else 0.5)
    whole = model.encode_image(images)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model.visual, fullgraph=True, backend="aot_eager")(images), whole)

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model.visual, (images,), dynamic_shapes=(batch,))
    torch.testing.assert_close(program.module()(images[:2]), whole[:2])

    path = str(tmp_path / "tower.onnx")
    torch.onnx.export(model.visual, (images,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for rows in (slice(None), slice(0, 1)):
        (found,) = session.run(None, {session.get_inputs()[0].name: images[rows].numpy()})
        torch.testing.assert_close(torch.tensor(found), whole[rows], atol=1e-3, rtol=0)


def test_the_whole_model_autocast_and_lower_precision(small_clip, images):
    model = small_clip()
    bundle = bundle_for(model, "cut", merged=0.3)
    patchrank.prune(model, bundle, keep=0.5)
    whole = model.encode_image(images, normalize=True)
    texts = torch.randint(0, 100, (2, 8))
    embeddings, _, scale = model(images, texts)
    torch.testing.assert_close(embeddings, whole)
    assert scale > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.cosine_similarity(model.encode_image(images).float(), whole).min() > 0.95
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.cosine_similarity(low.encode_image(images.bfloat16()).float(), whole).min() > 0.95
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)  # an ordinary module


@pytest.mark.parametrize("how", ["class-attention", "token-merging"])
def test_replicas_run_a_tower_of_their_own(small_clip, images, how):
    first, second = (patchrank.prune(small_clip(seed=seed), how, keep=0.5).visual for seed in (0, 1))
    replica = first._replicate_for_data_parallel()  # whose modules DataParallel then sets
    replica.original = second.original
    assert torch.equal(replica(images), second(images)) and not torch.equal(replica(images), first(images))


def test_gradients_reach_the_pixels_and_what_is_kept_alone(small_clip, images):
    model = small_clip()
    patchrank.prune(model, bundle_for(model), keep=0.3)
    pixels = images.clone().requires_grad_()
    model.encode_image(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_it_stands_in_for_the_tower(small_clip):
    model = small_clip()
    image_size, grid = model.visual.image_size, model.visual.grid_size
    patchrank.prune(model, "class-attention")
    assert (model.visual.image_size, model.visual.grid_size) == (image_size, grid)
    assert model.visual.schedule == {1: 12}  # keep 0.6
    assert not model.visual.training
    model.train()
    assert model.visual.training and model.visual.original.training


def test_a_model_with_a_text_tower_of_its_own_class():
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=4, image_size=16)
    model = CustomTextCLIP(8, vision, CLIPTextCfg(context_length=8, width=16, heads=2, layers=1)).eval()
    images = torch.randn(2, 3, 16, 16)
    patchrank.prune(model, "token-merging", keep=0.5)
    assert model.encode_image(images).shape == (2, 8)


@pytest.mark.parametrize(
    "how, flags, words",
    [
        ("nowhere/to/be/found", {}, "no such folder"),
        ("./nowhere", {}, "no such folder"),
        ("class-atention", {}, "class-atention: no such folder"),
        (3, {}, "a int does not tell how to prune"),
        ("random", {"keep": 0}, "keep 0: must be"),
        ("random", {"multiply_adds": 50}, "multiply_adds 50: must be above 0 and at most 1"),
        ("random", {"keep": 1.1}, "keep 1.1: must be"),
        ("random", {"keep": 0.01}, "keep 0.01: must be at most 1 and leave at least one of 20 tokens"),
        ("random", {"keep": {9: 0.5}}, "block 9: this model has blocks 0 to 3"),
        ("random", {"keep": {1: 0.5, 2: 0.6}}, "block 2: 12 tokens cannot go on, as only 10"),
        ("random", {"keep": 0.5, "multiply_adds": 0.5}, "exclude each other"),
        ("random", {"keep": {1: 0.5}, "blocks": [1]}, "leave out blocks"),
        ("random", {"keep": {}}, "keep: names no block"),
        ("random", {"blocks": []}, "blocks: names no block"),
        ("token-merging", {"multiply_adds": 0.5, "blocks": []}, "blocks: names no block"),
        ("random", {"multiply_adds": 0.01}, "multiply_adds 0.01: cannot be met"),
        ("class-attention", {"blocks": [0]}, "block 0: there is no block before it"),
        ("bundle", {"blocks": [2]}, "predictor looks at the tokens before block 1"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(small_clip, how, flags, words):
    model = small_clip()
    visual = model.visual
    how = bundle_for(model) if how == "bundle" else how
    with pytest.raises(UserError, match=words) as error:
        patchrank.prune(model, how, **flags)
    assert "\n" not in str(error.value)
    assert model.visual is visual


def test_what_cannot_be_pruned_is_refused(small_clip):
    with pytest.raises(UserError, match="has no image tower"):
        patchrank.prune(torch.nn.Linear(2, 2), "random")
    model = small_clip(pool_type="none")
    with pytest.raises(UserError, match="pools tokens by 'none'"):
        patchrank.prune(model, "random")
    model = small_clip(patch_dropout=0.5)
    patchrank.prune(model, "random", keep=0.5)
    assert model.encode_image(torch.randn(1, 3, 16, 20)).shape == (1, 24)
    model.train()
    with pytest.raises(ValueError, match="patch dropout"):
        model.encode_image(torch.randn(1, 3, 16, 20))
    resnet = open_clip.CLIP(
        8, CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32), CLIPTextCfg(8, 100, heads=2, layers=1, width=16)
    )
    with pytest.raises(UserError, match="ModifiedResNet"):
        patchrank.prune(resnet, "random")


@pytest.mark.parametrize("place", ["cut", "input"])
def test_learnable_tokens_leave_a_model_alone_that_loses_nothing(small_clip, images, place):
    model = small_clip()
    whole = model.encode_image(images)
    patchrank.prune(model, bundle_for(model, place), keep=1.0)
    assert torch.equal(model.encode_image(images), whole)


def test_it_trains_and_saves_as_the_unpruned_model(small_clip, images):
    """One state dict for both, whichever it is loaded into; what tells tokens is in none."""
    model, other = small_clip(), small_clip(seed=3)
    state = copy.deepcopy(model.state_dict())
    patchrank.prune(model, bundle_for(model, "cut"), keep=0.6)
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in found.items())
    assert found._metadata.keys() == state._metadata.keys()
    wanted = model.encode_image(images)
    earlier = {key.replace("visual.", "visual.original."): value for key, value in state.items()}
    earlier |= {f"visual.selector.{key}": value + 1 for key, value in model.visual.selector.state_dict().items()}
    for each in (found, earlier):  # as 0.1.0 stored it
        pruned = patchrank.prune(copy.deepcopy(other), "random", keep=0.6)
        pruned.visual.selector = copy.deepcopy(model.visual.selector)
        assert pruned.load_state_dict(each) is not None
        pruned.visual.tokens, pruned.visual.schedule = copy.deepcopy(model.visual.tokens), model.visual.schedule
        torch.testing.assert_close(pruned.encode_image(images), wanted)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**found, "visual.nothing": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: value for key, value in found.items() if key != "visual.proj"})
    assert other.load_state_dict(found).missing_keys == []
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.state_dict().keys() == state.keys()
        assert torch.equal(copied.encode_image(images), wanted)


@pytest.mark.parametrize("name", ["plain", "siglip"])
def test_gradient_checkpointing_and_locking(small_clip, images, name):
    model = (small_clip() if name == "plain" else towers.build(small_clip, name)).requires_grad_(True)
    patchrank.prune(model, "class-attention", keep=0.5)

    def gradients():
        model.zero_grad()
        model.encode_image(images).sum().backward()
        found = (parameter.grad for parameter in model.visual.original.parameters())
        return [gradient.clone() for gradient in found if gradient is not None]

    wanted = gradients()
    assert not model.visual.adapter.recomputes
    model.set_grad_checkpointing()
    assert model.visual.adapter.recomputes
    for found, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    model.lock_image_tower()
    locked = copy.deepcopy(model.visual.original).requires_grad_(True)
    locked.lock()
    found, wanted = ([each.requires_grad for each in tower.parameters()] for tower in (model.visual.original, locked))
    assert found == wanted and not all(found)
    assert model.no_weight_decay() <= {"logit_scale", *dict(model.named_parameters())}
