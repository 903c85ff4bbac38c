"""From photos to a pruned model in one command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import transformers_models
from PIL import Image
from small_model import save_model
from towers import VISION, vision_model

from cluster.fit import Fit, FitJob
from jobs import fit as job
from patchrank.data import shards
from patchrank.data.held_out import is_held_out
from patchrank.errors import UserError
from patchrank.evaluation.record import Record
from patchrank.model.class_source import ClassSource
from patchrank.model.loading import ModelSource, load
from patchrank.model.tower import Tower
from patchrank.pruning import predictor, prompts
from patchrank.pruning.bundle import Bundle
from patchrank.store import rankings

pytest_plugins = ["shared_ray"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A model, and forty photos in two folders, below each other in one; one of them is broken."""
    folder = tmp_path_factory.mktemp("photos")
    save_model(folder / "model")
    random = np.random.default_rng(0)
    for number in range(40):
        place = folder / "photos" / ("dark/deep" if number % 2 else "bright")
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 128, (30, 24, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    (folder / "photos" / "bright" / "0.png").write_bytes(b"broken")
    return folder


def flags(photos, out, address, *more):
    model = ["--model", f"local-dir:{photos / 'model'}", "--dtype", "float32"]
    machines = ["--address", address, "--workers", "1", "--cpus-per-worker", "1"]
    few = ["--samples-seen", "64", "--batch", "8", "--held-out", "0.25", "--tokens", "2"]
    return [str(photos / "photos"), *model, *machines, *few, "--out", str(out), *more]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_from_photos_to_three_lines_that_run_as_they_stand(photos, address, tmp_path, capsys):
    out = tmp_path / "my bundle"
    assert job.main(flags(photos, out, address, "--keep", "0.55", "--class-folders")) == 0
    printed, errors = capsys.readouterr()
    assert re.search(r"skipped bright/0\.png: ", errors)
    keys = [sample.key for uri in shards.expand([f"{out}-work/shards"]) for sample in shards.read(uri)]
    held_out = [key for key in keys if is_held_out(key, 0.25)]
    assert len(keys) == 39
    assert f"images        {39 - len(held_out)} to learn from, {len(held_out)} held out" in printed
    assert re.search(r"time          about \d\d:\d\d ", printed)

    record = Record.read(f"{out}-work/evaluation")
    assert record.images == len(held_out) and record.class_names == ["bright", "dark"]
    methods = {figure.method for figure in record.figures}
    assert methods >= {"unpruned", "predictor", "class-attention", "token-merging"}
    assert {figure.keep for figure in record.figures} == {1.0, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4}
    assert all(figure.top1 is not None for figure in record.figures)
    assert re.search(r"^top-1, % .*^token-merging", printed, re.DOTALL | re.MULTILINE)
    assert "At keep rate 0.55, pruned and unpruned embeddings" in printed
    assert Path(f"{out}-work/report/index.html").exists()

    _, lines = printed.split("these lines use it\n\n")
    namespace = {}
    exec(lines, namespace)
    pruned = namespace["model"].encode_image(torch.rand(2, 3, 24, 24))
    assert pruned.shape == (2, 24) and pruned.isfinite().all()
    bundle = Bundle.open(str(out))
    assert bundle.keep == 0.55 and {row["method"] for row in bundle.figures} <= methods
    _, trained = prompts.load(f"{out}-work/tokens")
    assert trained["helps"] == (bundle.tokens is not None)

    before = files(f"{out}-work")
    assert job.main(flags(photos, out, address, "--keep", "0.55", "--class-folders")) == 0
    after, again = files(f"{out}-work"), capsys.readouterr().out
    changed = {path.name for path, time in after.items() if before.get(path) != time}
    assert "time          about" not in again and again.endswith(lines)
    assert not changed & {"shard-000000.tar", "predictor.safetensors", "tokens.safetensors"}
    assert not any(name.endswith(".parquet") for name in changed)


def saved(model, folder, size=20):
    """A folder of transformers with a model and what prepares its images; returns its name for --model."""
    model.save_pretrained(folder)
    if hasattr(model, "text_model"):
        transformers_models.tokenizer().save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.long
def test_a_model_of_transformers_without_a_text_tower(photos, address, tmp_path, capsys):
    """And with images of another size than its configuration's. The lines load what was fitted, as the card's do."""
    model, out, size = vision_model("hf-dinov2"), tmp_path / "bundle", 28
    given = ["--model", saved(model, tmp_path / "model", size), "--class-folders", "--samples-seen", "32"]
    assert job.main(flags(photos, out, address, *given)) == 0
    record = Record.read(f"{out}-work/evaluation")
    assert record.class_names == ["bright", "dark"] and all(figure.top1 is not None for figure in record.figures)
    printed = capsys.readouterr().out.split("these lines use it\n\n")[1]
    assert len(printed.splitlines()) == 3
    exec(printed, namespace := {})
    loaded = namespace["model"]
    found = loaded(pixel_values=torch.rand(2, 3, size, size))
    assert found.patch_ids.shape == (2, round(0.6 * (size // 4) ** 2)) and isinstance(loaded, type(model))
    card = (out / "README.md").read_text().split("```")[1].removeprefix("python\n")
    for written, here in {'"hf:': '"', '"model"': f'"{tmp_path / "model"}"', "path/to/this/folder": str(out)}.items():
        card = card.replace(written, here)
    exec(card, namespace := {"image": Image.open(photos / "photos/bright/2.png").convert("RGB")})
    assert namespace["outputs"].patch_ids.shape == found.patch_ids[:1].shape


def test_the_lines_load_a_projection_that_automodel_leaves_out(photos, tmp_path):
    """Of a CLIPVisionModelWithProjection; without its projection it is another model."""
    model = transformers_models.moved(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24))
    )
    name = saved(model, tmp_path / "model")
    loaded, out = load(name), str(tmp_path / "bundle")
    tower = Tower(loaded.visual)
    about = {"name": name, "pretrained": None, "weights": loaded.weights, "cut": tower.cut}
    untrained = predictor.Predictor(predictor.PredictorConfig.of(tower))
    predictor.save(str(tmp_path / "predictor"), untrained, {"model": about, "keep": 0.6})
    Bundle.from_training(loaded, str(tmp_path / "predictor")).save_pretrained(out)
    exec(job.lines(FitJob([], out, model=ModelSource(name))), namespace := {})
    assert namespace["model"](torch.rand(2, 3, 20, 20)).image_embeds.shape == (2, 24)
    assert namespace["model"].vision_model.patch_ids.shape == (2, 15)
    assert "transformers.CLIPVisionModelWithProjection.from_pretrained" in (Path(out) / "README.md").read_text()


def test_a_model_without_a_text_tower_is_refused_before_it_is_trained_for(photos, tmp_path):
    name = saved(vision_model("hf-vit"), tmp_path / "model")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["bright", "dark"]))
    given = {"model": ModelSource(name), "held_out": 0.25}
    with pytest.raises(
        UserError, match=r"text tower is missing, .* so --classes cannot be turned into class embeddings"
    ):
        Fit(FitJob([str(photos / "photos")], str(tmp_path / "out"), **given, classes=ClassSource(str(names))))


@pytest.mark.long
def test_images_are_searched_first_where_that_is_wanted(photos, address, tmp_path, capsys):
    assert job.main(flags(photos, tmp_path / "out", address, "--search", "10", "--samples-seen", "32")) == 0
    ranked = rankings.open(str(tmp_path / "out-work/rankings"))
    assert sum(len(ranked.shard(uri, ["key"])["key"]) for uri in ranked.shards()) == 10
    _, record = predictor.load(str(tmp_path / "out-work/predictor"))
    assert record["golden"] == 0.5 and record["search"] == ranked.fingerprint
    assert "top-1" not in capsys.readouterr().out  # no classes


@pytest.mark.long
def test_an_estimate_trains_nothing(photos, address, tmp_path, capsys):
    assert job.main(flags(photos, tmp_path / "out", address, "--estimate", "--search", "4")) == 0
    assert "time          about" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out-work").iterdir()) == ["shards"]


def fitted(photos, folder, **changes):
    model = job.parser().parse_args(["x", "--model", f"local-dir:{photos / 'model'}"])
    images = changes.pop("images", [str(photos / "photos")])
    return Fit(FitJob(images, str(folder / "out"), **changes, model=job.flags.read(FitJob, model, images=()).model))


def test_shards_are_made_once_and_of_the_same_images_alone(photos, tmp_path):
    fitted(photos, tmp_path, held_out=0.25)
    made = tmp_path / "out-work" / "shards"
    before = files(made)
    assert fitted(photos, tmp_path, held_out=0.25).skipped == [] and files(made) == before
    (made / "images.json").unlink()  # as where a run was stopped
    (made / "shard-000007.tar").write_bytes(b"of then")
    assert len(fitted(photos, tmp_path, held_out=0.25).skipped) == 1
    assert sorted(path.name for path in made.iterdir()) == ["images.json", "shard-000000.tar"]
    about = json.loads((made / "images.json").read_text())
    (made / "images.json").write_text(json.dumps(about | {"digest": "of other images"}))
    with pytest.raises(UserError, match=r"shards: was made of other images than are in .*photos now; give another"):
        fitted(photos, tmp_path, held_out=0.25)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"held_out": 1e-9}, "none of its 39 images would be held out to evaluate on; give more of them"),
        ({"held_out": 0.0}, "--held-out 0: must be between 0 and 1"),
        ({"keep": 1.0}, "--keep 1: must be between 0 and 1"),
        ({"samples_seen": 0}, "--samples-seen 0: must be at least 1"),
        ({"search": 3, "rankings": "r"}, "--rankings and --search exclude each other"),
        ({"work": "s3://bucket/work"}, "--work s3://bucket/work: images become shards in a folder of this machine"),
        ({"images": ["a.tar"], "class_folders": True}, "--class-folders: goes with a folder of images"),
        ({"images": ["nowhere"]}, "nowhere: no such folder or shard"),
    ],
)
def test_what_makes_no_sense_is_refused(photos, tmp_path, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        fitted(photos, tmp_path, **changes)


def test_folders_without_images_and_more_than_one(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image there with a name in jpg, .*, and no shard"):
        fitted(photos, tmp_path, images=[str(tmp_path / "empty")])
    with pytest.raises(UserError, match="photos: one folder of images at a time, or shards"):
        fitted(photos, tmp_path, images=[str(photos / "photos"), "a.tar"])
