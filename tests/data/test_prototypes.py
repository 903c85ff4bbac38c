"""Sums of embeddings by class, of which prototypes are made."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_shards import write_labelled
from torchvision.transforms.functional import to_tensor

from patchrank.data.progress import Progress
from patchrank.data.prototypes import class_sums
from patchrank.data.shard_job import Reading
from patchrank.model.tower import Tower


@pytest.fixture
def shard(tmp_path):
    pixels = write_labelled(tmp_path / "a.tar")
    return str(tmp_path / "a.tar"), pixels


@pytest.mark.parametrize("num_classes", [None, 3, 5])
def test_class_sums_are_those_of_the_models_own_embeddings(small_clip, shard, num_classes):
    model, (uri, pixels) = small_clip(), shard
    progress = Progress()
    sums, counts = class_sums(Tower(model.visual), uri, Reading(to_tensor, 2, num_classes=num_classes), progress)
    embeddings = F.normalize(model.encode_image(pixels), dim=-1).double()
    expected = torch.stack([embeddings[[0, 5]].sum(dim=0), embeddings[6], embeddings[[1, 2]].sum(dim=0)])
    torch.testing.assert_close(sums[:3], expected, atol=1e-6, rtol=0)
    assert counts.tolist() == [2, 1, 2] + [0] * ((num_classes or 3) - 3)
    assert (progress.images, progress.rejects) == (5, 2)


def test_an_image_that_overflows_is_left_out_of_its_class(small_clip, shard):
    uri, pixels = shard
    tower = Tower(small_clip().visual)
    usual, progress = tower.forward, Progress()
    tower.forward = lambda images: usual(images).masked_fill(
        (images == pixels[5]).all(dim=(1, 2, 3))[:, None], math.inf
    )
    sums, counts = class_sums(tower, uri, Reading(to_tensor, 1, num_classes=3), progress)
    torch.testing.assert_close(sums[0], F.normalize(usual(pixels[:1]), dim=-1)[0].double())
    assert counts.tolist() == [1, 1, 2] and (progress.images, progress.rejects) == (4, 3)
