"""Every kind of tower computes what its model computes, on all tokens and on some, and is searched and pruned so."""

from __future__ import annotations

import copy
from dataclasses import asdict

import onnxruntime
import pytest
import reference
import torch
import towers

import patchrank
from patchrank.errors import UserError
from patchrank.model import fidelity
from patchrank.model.kinds import adapt
from patchrank.model.loading import tower_digest
from patchrank.model.tower import Tower
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.predictor import PredictorConfig
from patchrank.pruning.prompts import TokensConfig, VisualTokens
from patchrank.pruning.stand_in import count_multiply_adds
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher

KEPT = torch.tensor([[0, 3, 7, 12, 19, 18, 4], [1, 2, 5, 11, 13, 17, 19]])


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def images_of(visual, dtype=torch.float64):
    """Two images of the size that a tower takes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *visual.image_size, dtype=torch.float64, generator=generator).to(dtype)


def embeddings(model, images):
    found = model.visual(images)
    return found[0] if isinstance(found, tuple) else found


def masked(visual, images, kept, cut=1):
    rows = [
        towers.embed(visual, towers.prefix(visual, image, cut), ids)
        for image, ids in zip(images, kept.tolist(), strict=True)
    ]
    return torch.stack(rows)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def bundle_for(model, cut=1):
    """A bundle whose predictor, tokens and shifts were never trained."""
    torch.manual_seed(2)
    tower = Tower(model.visual, cut)
    about = {
        "name": "small",
        "pretrained": None,
        "weights": {"float32": tower_digest(model.visual)},
        "cut": cut,
        "grid": list(tower.grid),
        "blocks": 4,
    }
    bundle = Bundle(about, asdict(PredictorConfig.of(tower)), asdict(TokensConfig(32, count=3, shifted=3, merged=0.3)))
    for parameter in bundle.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return bundle


@pytest.mark.parametrize("name", towers.NAMES)
class TestEveryKind:
    @pytest.mark.parametrize("cut", [0, 1, 3])
    def test_all_tokens_some_and_gates(self, small_clip, name, cut):
        """The model's own pass, and masks in its own modules."""
        model = towers.build(small_clip, name, torch.float64)
        images, patches = images_of(model.visual), adapt(model.visual).num_tokens
        fidelity.check(adapt(model.visual))
        tower = Tower(model.visual, cut, torch.float64)
        tokens = tower.prefix(images)
        close(tower.suffix(tokens), embeddings(model, images))
        close(masked(model.visual, images, torch.arange(patches).expand(2, -1), cut), embeddings(model, images))
        found = tower.suffix(tokens, KEPT)
        close(found, masked(model.visual, images, KEPT, cut))
        gates = torch.zeros(2, patches, dtype=torch.float64).scatter(1, KEPT, 1.0)
        close(tower.suffix(tokens, gates=gates), found)

    def test_it_is_pruned_as_it_is_trained_and_restored(self, small_clip, name):
        model = towers.build(small_clip, name)
        images = images_of(model.visual, torch.float32)
        whole, bundle = embeddings(model, images), bundle_for(model)
        tower = Tower(model.visual, 1)
        tokens = bundle.tokens.prefix(tower, images)
        patchrank.prune(model, bundle, keep=0.6)
        alone = tower.num_tokens * 3 // 5 - 3  # 3 learnable ones
        stay = model.visual.schedule[1]
        along = bundle.tokens.along(tower.adapter, 1, stay)
        # Where patches merge later on, as many as before go past the cut, or more; what has a place does not merge.
        assert stay == alone if tower.adapter.rotary else (stay >= alone and along.merges[2] > 0)
        wanted = tower.suffix(tokens, bundle.predictor(tokens).topk(stay).indices, along=along)
        torch.testing.assert_close(embeddings(model, images), wanted)
        assert count_multiply_adds(model.visual) == model.visual.multiply_adds()
        patchrank.restore(model)
        assert torch.equal(embeddings(model, images), whole)
        assert count_multiply_adds(model.visual) == adapt(model.visual).full_multiply_adds()

    def test_methods_without_training_are_counted(self, small_clip, name):
        model = towers.build(small_clip, name)
        images = images_of(model.visual)
        for how in ("class-attention", "random", "token-merging"):
            if how == "token-merging" and adapt(patchrank.restore(model).visual).rotary:
                with pytest.raises(UserError, match="turns tokens by their places"):
                    patchrank.prune(model, how, keep=0.5)
                continue
            keep = {1: 0.8, 3: 0.4} if how == "class-attention" else 0.5
            patchrank.prune(model, how, keep=keep)
            assert count_multiply_adds(model.visual) == model.visual.multiply_adds()
            assert embeddings(model, images.float()).isfinite().all()

    @pytest.mark.parametrize("score", ["preservation", "confidence", "label"])
    def test_the_search_agrees_with_masks(self, small_clip, monkeypatch, name, score):
        monkeypatch.setattr(reference, "embed", towers.embed)
        monkeypatch.setattr(reference, "prefix", towers.prefix)
        visual = towers.build(small_clip, name, torch.float64).visual
        images, wide = images_of(visual), adapt(visual).embed_dim
        classes = torch.nn.functional.normalize(torch.randn(5, wide, dtype=torch.float64), dim=-1)
        config = SearchConfig(score=score, remove_per_step=4, keep=0.3)
        tower = Tower(visual, 1, torch.float64)
        found = Searcher(tower, config, classes, 3.0, (0.5,), chunk=7).search(images, torch.tensor([0, 1]))
        for row, image in enumerate(images):
            wanted = reference.search(visual, image, config, 1, classes, 3.0, row, (0.5,))
            assert found.ranking[row].tolist() == wanted["ranking"]
            assert found.pruned_cosine[row, 0].item() == pytest.approx(wanted["pruned"][0][0], abs=1e-6)

    def test_low_precision_keeps_the_embedding(self, small_clip, name):
        visual = towers.build(small_clip, name).visual
        images = images_of(visual)
        exact = Tower(visual, 1)
        wanted = exact.suffix(exact.prefix(images), KEPT)
        for dtype, least in ((torch.bfloat16, 0.98), (torch.float16, 0.999)):
            tower = Tower(visual, 1, dtype)
            found = tower.suffix(tower.prefix(images), KEPT)
            assert found.dtype == torch.float32
            assert torch.cosine_similarity(found, wanted).min() > least

    @pytest.mark.long
    def test_compile_export_and_onnx(self, small_clip, name, tmp_path):
        model = towers.build(small_clip, name)
        images = images_of(model.visual, torch.float32)
        patchrank.prune(model, bundle_for(model), keep=0.6)
        whole = embeddings(model, images)
        torch._dynamo.reset()
        compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled[0] if isinstance(compiled, tuple) else compiled, whole)
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model.visual, (images,), dynamic_shapes=(batch,))
        exported = program.module()(images[:1])
        torch.testing.assert_close(exported[0] if isinstance(exported, tuple) else exported, whole[:1])
        path = str(tmp_path / "tower.onnx")
        torch.onnx.export(model.visual, (images,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
        session = onnxruntime.InferenceSession(path)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        torch.testing.assert_close(torch.tensor(found), whole, atol=1e-3, rtol=0)


def test_what_is_given_away_beside_the_embedding_is_of_patches_that_are_left(small_clip, images):
    model, images = towers.build(small_clip, "tokens"), images.float()
    patchrank.prune(model, bundle_for(model), keep=0.6)
    pooled, tokens = model.visual(images)
    assert pooled.shape == (2, 24) and tokens.shape == (2, 8, 32)
    coca = towers.build(small_clip, "coca")
    queries = coca.visual(images)[1]
    patchrank.prune(coca, "random", keep=0.9)
    assert coca.visual(images)[1].shape == queries.shape == (2, 4, 24)


def test_digests_tell_towers_apart_whose_weights_are_the_same(small_clip):
    found = {tower_digest(small_clip(**config).visual) for config in ({}, {"pool_type": "avg"})}
    assert len(found) == 2
    visual = towers.build(small_clip, "pe").visual
    before = tower_digest(visual)
    visual.trunk.rope.update_feat_shape((5, 4))
    assert tower_digest(visual) != before


@pytest.mark.parametrize("name", towers.NAMES)
def test_a_bundle_knows_its_tower_in_every_precision(small_clip, name):
    model = towers.build(small_clip, name)
    wanted = {dtype: tower_digest(model.visual, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    for dtype, digest in wanted.items():
        assert tower_digest(copy.deepcopy(model.visual).to(dtype), dtype) == digest


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda visual: setattr(visual.trunk, "global_pool", "max"), "pools tokens by 'max'"),
        (lambda visual: setattr(visual.trunk, "dynamic_img_size", True), "images of any size"),
        (lambda visual: setattr(visual.trunk.blocks[2], "attn", torch.nn.Identity()), "attention of its block 2 is a"),
        (lambda visual: setattr(visual, "image_size", (32, 40)), "images of 16 x 20, not of 32 x 40"),
        (lambda visual: setattr(visual, "trunk", torch.nn.Linear(1, 1)), "its image tower is a Linear"),
        (
            lambda visual: visual.trunk.blocks[1].attn.qkv.register_forward_hook(print),
            "input projection in the attention of its block 1 has a hook",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(small_clip, change, reason):
    model = towers.build(small_clip, "siglip")
    change(model.visual)
    with pytest.raises(UserError, match=reason):
        patchrank.prune(model, "random")


def test_shifts_are_of_no_prefix_where_there_is_none(small_clip):
    tower = Tower(towers.build(small_clip, "siglip").visual, 1)
    tokens = VisualTokens(TokensConfig(32, count=2, shifted=3))
    tokens.shifts.data.normal_()
    x = torch.zeros(1, 10 + 2, 32)
    found = tokens.along(tower.adapter, 1, 10).before(x, 1)
    torch.testing.assert_close(found[0, :10], (1 - 12 / 20) * tokens.shifts[0, 1].expand(10, -1))
