"""Images as a model takes them: open_clip's pixels, in bounded memory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from patchrank.model import preprocessing
from patchrank.model.preprocessing import Preprocess

FIELDS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
SHAPES = [(300, 200), (201, 1999), (1999, 201), (3, 500), (500, 7), (1, 400), (400, 1), (32, 32), (31, 900)]


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "more",
    [
        {"size": (32, 32)},
        {"size": 32, "interpolation": "bilinear"},
        {"size": (32, 48)},
        {"size": (48, 24), "interpolation": "bilinear"},
        {"size": (32, 32), "resize_mode": "squash"},
    ],
)
def test_the_pixels_are_those_of_open_clip(shape, more):
    transform = Preprocess(FIELDS | more)
    expected = image_transform_v2(PreprocessCfg(**FIELDS, **more), is_train=False)(picture(*shape))
    found = pickle.loads(pickle.dumps(transform))(picture(*shape))
    assert found.shape == expected.shape
    levels = (found - expected) * torch.tensor(FIELDS["std"])[:, None, None] * 255
    assert levels.abs().max() <= 1.01 and levels.abs().mean() < 0.1  # rounding
    if max(shape) / min(shape) < 4:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(8000, 1), (1, 60000), (30000, 20)])
def test_a_thin_image_takes_no_more_memory_than_another(shape, monkeypatch):
    made, resize = [], Image.Image.resize

    def counted(self, size, *given, **more):
        made.append(size)
        return resize(self, size, *given, **more)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert Preprocess(FIELDS | {"size": (224, 224)})(picture(*shape)).shape == (3, 224, 224)
    assert made and all(width * height <= preprocessing.THIN * 224 * 224 for width, height in made)
