"""What the trainings learn from, step by step: the same for a run that goes on, and for every number of workers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from small_model import save_model

from patchrank.errors import UserError
from patchrank.pruning.predictor import Predictor, PredictorConfig
from patchrank.pruning.prompts import TokensConfig
from patchrank.training.images import ImageSource, open_images
from patchrank.training.tasks import PredictorTask, TokensTask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Forty images of two brightnesses, without rankings or labels, and a model."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    with wds.TarWriter(str(folder / "images.tar")) as writer:
        for number in range(40):
            pixels = random.integers(0, 128, (24, 24, 3)) + 127 * (number % 2)
            writer.write({"__key__": f"{number:03}", "png": Image.fromarray(pixels.astype(np.uint8))})
    shards = [str(folder / "images.tar")]
    return ImageSource(None, shards, model=save_model(folder / "model"), dtype="float32", held_out=0.2)


def made(source, kind, steps=20, **changes):
    """A task that has begun, and its module."""
    images, _ = open_images(replace(source, **changes))
    torch.manual_seed(0)
    shape = PredictorConfig(images.tower.grid, images.tower.width)
    if kind != "tokens":
        task = PredictorTask(images, config=shape, objective="patches" if kind == "patches" else None)
    else:
        task = TokensTask(images, config=TokensConfig(images.tower.width, 2), predictor=Predictor(shape))
    return task, task.start(CPU, steps)


@pytest.mark.parametrize("kind", ["predictor", "patches", "tokens"])
def test_two_workers_have_the_loss_and_the_gradient_of_one(source, kind):
    task, module = made(source, kind)
    whole = list(itertools.islice(task.batches(0, 1, 8, 1, 0), 3))
    parts = [list(itertools.islice(task.batches(rank, 2, 4, 1, 0), 3)) for rank in range(2)]
    for step, lesson in enumerate(whole):
        shares = [part[step] for part in parts]
        keys = [key for share in shares for key in share.images.keys]
        assert sorted(keys) == sorted(lesson.images.keys) and {share.step for share in shares} == {lesson.step}
        parameters = list(module.parameters())
        one = task.loss(module, lesson)
        two = sum(task.loss(module, share) for share in shares) / 2
        torch.testing.assert_close(one, two)
        for a, b in zip(torch.autograd.grad(one, parameters), torch.autograd.grad(two, parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["predictor", "patches", "tokens"])
def test_a_run_that_goes_on_has_the_steps_of_an_undisturbed_one(source, kind):
    task, module = made(source, kind)
    whole = [task.loss(module, lesson).item() for lesson in itertools.islice(task.batches(0, 1, 8, 2, 0), 12)]
    again, module = made(source, kind)
    rest = [again.loss(module, lesson).item() for lesson in itertools.islice(again.batches(0, 1, 8, 2, 3), 6)]
    assert rest == whole[6:] and len(set(whole)) == 12


def test_tokens_kept_on_disk_teach_the_same(source, tmp_path):
    losses = []
    for folder in (None, str(tmp_path / "features")):
        task, module = made(source, "tokens", cache_features=folder)
        lessons = itertools.islice(task.batches(0, 1, 8, 1, 0), 5)
        losses.append([task.loss(module, lesson).item() for lesson in lessons])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_learning_through_the_model_lowers_what_embeddings_lack(source):
    """On the images that it learns from: those of a model with random weights have little in common."""
    task, module = made(source, "tokens", steps=60)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": 1e-2 * share} for parameters, share in task.parameters(module)]
    )
    losses = []
    for lesson in itertools.islice(task.batches(0, 1, 16, 1, 0), 60):
        loss = task.loss(module, lesson)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-15:]) < 0.7 * sum(losses[:15])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"shards": None}, "--rankings none: needs --shards and --model"),
        ({"rankings": "rankings", "cut": 2}, "--cut 2: is that of the rankings"),
    ],
)
def test_sources_that_make_no_sense_are_refused(source, changes, words):
    with pytest.raises(UserError, match=words):
        replace(source, **changes)


def test_images_that_are_all_held_out_are_refused(source):
    task, _ = made(source, "predictor", held_out=1.0)
    with pytest.raises(UserError, match=r"images\.tar: none of its images is left to train on; lower --held-out"):
        task.steps_per_epoch(1)


def test_test_shards_that_are_learnt_from_are_refused(source, tmp_path):
    (tmp_path / "other.tar").symlink_to(source.shards[0])
    for test in (source.shards, [str(tmp_path / "other.tar")]):
        with pytest.raises(UserError, match=f"^--test {test[0]}: would be learnt from, too"):
            open_images(replace(source, test=test))


def test_labels_of_no_class_teach_nothing(source):
    """Those of shards that were not searched may be any; a search rejects them."""
    task, module = made(source, "tokens")
    lesson = next(task.batches(0, 1, 8, 1, 0))
    plain = task.loss(module, lesson)
    task.images.classes = F.normalize(torch.randn(3, task.images.tower.embed_dim), dim=-1)

    def loss(*labels):
        return task.loss(module, replace(lesson, images=replace(lesson.images, labels=torch.tensor(labels))))

    assert torch.equal(loss(3, 99, -7, -1, 3, 3, 3, 3), plain)
    assert torch.equal(loss(2, 99, -7, -1, 3, 3, 3, 3), loss(2, *[-1] * 7)) and loss(2, *[-1] * 7) > plain
