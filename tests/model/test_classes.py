"""Class embeddings from text, from files, and as prototypes."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from patchrank import assets
from patchrank.errors import UserError
from patchrank.model import classes, loading


@pytest.fixture(scope="module")
def model():
    return loading.load(assets.MODEL)


def test_one_template_is_the_text_towers_own_embedding(model):
    found = classes.from_text(model, ["bag", "coat"], classes.templates(["a photo of a {}."]))
    tokens = open_clip.get_tokenizer(assets.MODEL)(["a photo of a bag.", "a photo of a coat."])
    torch.testing.assert_close(found.embeddings, model.clip.encode_text(tokens, normalize=True))
    assert found.names == ["bag", "coat"]


def test_an_ensemble_is_the_normalised_mean(model):
    prompts = ["a {}.", "one {} here"]
    found = classes.from_text(model, ["bag"], classes.templates(prompts))
    tokens = open_clip.get_tokenizer(assets.MODEL)([prompt.format("bag") for prompt in prompts])
    expected = F.normalize(model.clip.encode_text(tokens, normalize=True).mean(dim=0), dim=-1)
    torch.testing.assert_close(found.embeddings[0], expected)


def test_templates_by_name_and_by_text_together(model):
    prompts = classes.templates(["photo", "one {} here"])
    found = classes.from_text(model, ["bag"], prompts)
    same = classes.from_text(model, ["bag"], classes.templates(["one {} here", "a photo of a {}."]))
    torch.testing.assert_close(found.embeddings, same.embeddings)


def test_templates_by_name_and_by_text():
    assert len(classes.templates(["imagenet"])) == 80
    assert len(classes.templates(["imagenet-simple", "a {}."])) == 8
    for wrong in ("a photo", "{} and {}", "{0}", "{name}", "a {}}", "imagenett"):
        with pytest.raises(UserError, match="--templates"):
            classes.templates([wrong])


def test_identity_tells_names_templates_and_models_apart(model):
    photo = classes.templates(["photo"])
    identities = {
        classes.from_text(model, names, prompts).identity
        for names, prompts in [
            (["bag"], photo),
            (["bags"], photo),
            (["bag", "coat"], photo),
            (["bag"], classes.templates(["{}"])),
        ]
    }
    assert len(identities) == 4
    assert classes.from_text(model, ["bag"], photo).identity in identities


def test_a_file_with_the_image_tower_alone_has_no_text(tmp_path, model):
    path = str(tmp_path / "tower.safetensors")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16},
        "text_cfg": {"layers": 1, "width": 16, "heads": 2},
    }
    (tmp_path / "tiny-tower.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    whole = open_clip.create_model("tiny-tower")
    plain = dict(whole.visual.state_dict())
    for prefix in ("", "visual."):
        save_file({prefix + key: value for key, value in plain.items()}, path)
        loaded = loading.load("tiny-tower", path)
        assert not loaded.has_text
        assert all(torch.equal(value, plain[key]) for key, value in loaded.visual.state_dict().items())
        with pytest.raises(UserError, match="image tower alone"):
            classes.from_text(loaded, ["bag"], classes.templates(["photo"]))
    save_file(dict(whole.state_dict()), path)
    loaded = loading.load("tiny-tower", path)
    assert loaded.has_text
    assert torch.equal(loaded.clip.text_projection, whole.text_projection)


@pytest.mark.parametrize(
    "name, pretrained, words",
    [
        ("ViT-B-99", None, "ViT-B-99: open_clip does not know it"),
        ("ViT-B-16", None, "needs --pretrained"),
        ("ViT-B-16", "no-such-tag", "no-such-tag"),
        ("ViT-B-16", __file__, "a text that begins .*, not the file itself"),
        ("local-dir:/no/such/folder", None, "/no/such/folder"),
    ],
)
def test_bad_models_are_named(name, pretrained, words):
    with pytest.raises(UserError, match=words):
        loading.load(name, pretrained)


def test_tags_trained_with_quick_gelu_get_it():
    assert loading.open_clip_name("ViT-B/16", "openai") == "ViT-B-16-quickgelu"
    for name, pretrained in (
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16", "laion2b_s34b_b88k"),
        ("ViT-B-16", "some/file.safetensors"),
        ("local-dir:some/folder", None),
    ):
        assert loading.open_clip_name(name, pretrained) == name


def test_weights_of_another_model_are_refused(tmp_path):
    path = str(tmp_path / "other.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not the image tower of ViT-B-32"):
        loading.load("ViT-B-32", path)


def test_files(tmp_path):
    table = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    names = np.array(["cat", "dog", "eel"])
    np.savez(tmp_path / "one.npz", pets=table, pets_names=names)
    np.savez(tmp_path / "two.npz", pets=table, wild=2 * table[:2])
    save_file({"anything": torch.from_numpy(table)}, str(tmp_path / "one.safetensors"))
    expected = F.normalize(torch.from_numpy(table), dim=-1)

    for spec, given in [("one.npz", None), ("one.npz:pets", None), ("one.safetensors", ["cat", "dog", "eel"])]:
        found = classes.from_file(str(tmp_path / spec), 8, given)
        torch.testing.assert_close(found.embeddings, expected)
        assert found.names == ["cat", "dog", "eel"]
    assert classes.from_file(str(tmp_path / "two.npz:wild"), 8).names is None

    for spec, width, given, words in [
        ("two.npz", 8, None, "holds pets, wild; name one"),
        ("two.npz:tame", 8, None, "no array 'tame'"),
        ("one.npz", 512, None, "is 3 x 8, but the model's embeddings have width 512"),
        ("one.npz", 8, ["cat"], "3 embeddings, but 1 class names"),
        ("none.npz", 8, None, "No such file"),
        ("one.json", 8, None, "must be a .safetensors or .npz file"),
    ]:
        with pytest.raises(UserError, match=words):
            classes.from_file(str(tmp_path / spec), width, given)


def test_files_that_are_damaged_or_hold_objects(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no tensors")
    np.savez(tmp_path / "objects.npz", table=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "zero.npz", table=np.zeros((2, 8)))
    for name in ("text.npz", "text.safetensors", "objects.npz", "zero.npz"):
        with pytest.raises(UserError, match=f"--class-embeddings .*{name}"):
            classes.from_file(str(tmp_path / name), 8)


def test_names(tmp_path):
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    assert classes.read_names(str(tmp_path / "names.json")) == ["cat", "dog"]
    assert classes.read_names(str(tmp_path / "names.txt")) == ["cat", "dog"]
    for name, content, words in [
        ("map.json", '{"cat": 0}', "must be a JSON list"),
        ("bad.json", "[", "not JSON"),
        ("empty.txt", "\n", "holds no names"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words):
            classes.read_names(str(tmp_path / name))
    with pytest.raises(UserError, match="No such file"):
        classes.read_names(str(tmp_path / "absent.json"))


def test_prototypes_are_normalised_means():
    embeddings = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=-1)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    sums = torch.zeros(3, 4, dtype=torch.float64).index_add_(0, labels, embeddings)
    found = classes.from_sums(sums, labels.bincount(), "x", ["a", "b", "c"])
    expected = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(3)])
    torch.testing.assert_close(found.embeddings, F.normalize(expected, dim=-1).float())


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_prototypes_of_a_class_without_images_are_refused(names):
    with pytest.raises(UserError, match="no image of class 1"):
        classes.from_sums(torch.ones(3, 4), torch.tensor([2, 0, 1]), "x", names)


def test_kept_embeddings_are_used_again_only_for_the_same_classes(tmp_path):
    uri = str(tmp_path / "classes.safetensors")
    assert classes.load(uri, "prototypes 1", None) is None
    made = classes.Classes(F.normalize(torch.randn(3, 4), dim=-1), "prototypes 1", None)
    classes.save(uri, made)
    found = classes.load(uri, "prototypes 1", ["a", "b", "c"])
    assert found is not None and torch.equal(found.embeddings, made.embeddings) and found.names == ["a", "b", "c"]
    assert classes.load(uri, "prototypes 2", None) is None
    (tmp_path / "classes.safetensors").write_text("damaged")
    with pytest.raises(UserError, match="delete it"):
        classes.load(uri, "prototypes 1", None)
