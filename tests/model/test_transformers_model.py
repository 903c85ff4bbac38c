"""Models of transformers by name: what is loaded, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import towers
import transformers
import transformers_models
from PIL import Image

from patchrank.errors import UserError
from patchrank.model import classes, loading
from patchrank.model.preprocessing import Preprocess
from patchrank.model.tower import Tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP with its processor."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def name(folder):
    return transformers_models.save_clip(folder)


def photo(width=50, height=30):
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_a_clip_gives_what_transformers_gives(folder, name):
    """Its processor, image tower, text tower and logit scale; and a tower cut in two."""
    loaded = loading.load(name)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    texts = ["a cat", "dogs."]
    given = processor(text=texts, images=photo(), padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**given)
        image = loaded.preprocess()(photo())
        torch.testing.assert_close(image, given["pixel_values"][0])
        embedding = loaded.clip.encode_image(image[None], normalize=True)
        torch.testing.assert_close(embedding, wanted.image_embeds)
        torch.testing.assert_close(Tower(loaded.visual)(image[None]), loaded.clip.encode_image(image[None]))
        tokens = loaded.tokenizer()(texts)
        torch.testing.assert_close(loaded.clip.encode_text(tokens, normalize=True), wanted.text_embeds)
        assert loaded.logit_scale == pytest.approx(model.logit_scale.exp().item())
        assert loaded.has_text and not any("vision" in key for key in loaded.clip.text.state_dict())
        found = classes.from_text(loaded, ["cat", "dog"], classes.templates(["photo"]))
    assert found.embeddings.shape == (2, 24)
    assert loading.load(name).weights == loaded.weights and loading.load(name).text_weights == loaded.text_weights


def test_thin_images_take_bounded_memory(name):
    preprocess = loading.load(name).preprocess()
    assert preprocess(photo(20000, 2)).shape == (3, 20, 20)
    torch.testing.assert_close(preprocess(photo(100, 7)), Preprocess(preprocess.fields)(photo(100, 7)))


@pytest.mark.parametrize(
    "kind, processor, size",
    [
        ("hf-dinov2", lambda: transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size=28), (28, 28)),
        ("hf-siglip2", lambda: transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=25), (20, 20)),
        ("hf-siglip", lambda: transformers.SiglipImageProcessor(size={"height": 20, "width": 20}), (20, 20)),
        ("hf-vit", lambda: transformers.ViTImageProcessor(size={"height": 20, "width": 20}), (20, 20)),
    ],
)
def test_the_processor_tells_the_size_where_any_will_do(tmp_path, kind, processor, size):
    towers.vision_model(kind).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded = loading.load(f"hf:{tmp_path}")
    assert loaded.visual.image_size == size and not loaded.has_text and loaded.logit_scale == 100
    image = loaded.preprocess()(photo())
    assert image.shape == (3, *size) and Tower(loaded.visual)(image[None]).shape == (1, 32)
    if kind != "hf-siglip2":
        made = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo(), return_tensors="pt")
        torch.testing.assert_close(image, made["pixel_values"][0])


def test_what_cannot_be_loaded_is_one_line(tmp_path, name, monkeypatch):
    def refused(given, words, pretrained=None):
        with pytest.raises(UserError) as error:
            loading.load(given, pretrained)
        assert words in str(error.value) and "\n" not in str(error.value)

    refused(name, "leave it out", "openai")
    refused(f"hf:{tmp_path}/nowhere", f"--model hf:{tmp_path}/nowhere: ")
    bert = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    transformers_models.processor().image_processor.save_pretrained(tmp_path / "bert")
    refused(f"hf:{tmp_path}/bert", "a BertModel has no image tower of transformers' CLIP, SigLIP")
    towers.vision_model("hf-siglip").save_pretrained(tmp_path / "other")
    transformers_models.processor(24).image_processor.save_pretrained(tmp_path / "other")
    refused(f"hf:{tmp_path}/other", "its processor makes images of 24 x 24, and its image tower takes 20 x 20")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(name, "transformers cannot be imported")
