"""A model of transformers is searched and evaluated through the jobs, as a user runs them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers_models
import webdataset as wds
from PIL import Image

from cluster.fit import Fit, FitJob
from jobs import evaluate as evaluate_job
from jobs import search
from patchrank.errors import UserError
from patchrank.model.loading import ModelSource
from patchrank.pruning.predictor import PredictorConfig
from patchrank.report import evaluation, gallery
from patchrank.store import rankings
from patchrank.training.images import ImageSource, open_images
from patchrank.training.tasks import PredictorTask

pytest_plugins = ["shared_ray"]


@pytest.mark.long
def test_from_a_search_to_an_evaluation(address, tmp_path, capsys):
    name = transformers_models.save_clip(tmp_path / "model")
    shard, names = str(tmp_path / "images.tar"), tmp_path / "names.json"
    random = np.random.default_rng(0)
    with wds.TarWriter(shard) as writer:
        for number in range(6):
            pixels = random.integers(0, 256, (30, 40, 3)).astype(np.uint8)
            writer.write({"__key__": str(number), "png": Image.fromarray(pixels), "cls": str(number % 2)})
    names.write_text(json.dumps(["cat", "dog"]))
    actors = ["--address", address, "--cpus-per-actor", "1", "--dtype", "float32"]
    for score in ("label", "patches"):
        found = str(tmp_path / score)
        given = ["--shards", shard, "--model", name, "--classes", str(names), "--score", score, "--out", found]
        assert search.main([*given, *actors]) == 0
        table = rankings.open(found).dataset.to_table()
        assert table.num_rows == 6 and all(sorted(row) == list(range(25)) for row in table["ranking"].to_pylist())
        assert search.main([*given, *actors]) == 0  # nothing is left to do
    out = str(tmp_path / "evaluation")
    more = ["--methods", "class-attention", "golden", "--keep-rates", "0.5", "--batch-sizes", "--out", out]
    assert evaluate_job.main(["--rankings", str(tmp_path / "label"), *more, *actors]) == 0
    assert "class-attention" in capsys.readouterr().out
    assert gallery.cropping(evaluation.read(out))(Image.new("RGB", (30, 40))).shape == (20, 20, 3)
    images, _ = open_images(ImageSource(rankings=str(tmp_path / "label"), shards=[shard], test=[]))
    assert images.tower.grid == (5, 5)
    images, _ = open_images(ImageSource(rankings=str(tmp_path / "patches"), shards=[shard], test=[], held_out=0.5))
    shape = PredictorConfig.of(images.tower)
    task = PredictorTask(images, config=shape)
    assert task.target == "rank" and task.objective == "patches"
    found = task.evaluate(task.start(torch.device("cpu"), 2), 0, 1, lambda sums: sums)
    assert 0 < found["held-out/cosine of patches at keep 0.4"] < found["held-out/cosine of patches at keep 0.8"] < 1
    given = {"rankings": str(tmp_path / "patches"), "held_out": 0.5}
    with pytest.raises(UserError, match="are of patches, and a fit is for embeddings"):
        Fit(FitJob([shard], str(tmp_path / "out"), model=ModelSource(name), **given))
