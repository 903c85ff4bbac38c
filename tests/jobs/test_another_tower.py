"""From a search to a pruned model with a tower of timm's, pooled by attention, through the jobs as a user runs them."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from PIL import Image
from small_model import save_model

import patchrank
from jobs import evaluate as evaluate_job
from jobs import search, train_predictor, train_tokens
from patchrank.pruning import predictor
from patchrank.store import rankings

pytest_plugins = ["shared_ray"]


@pytest.mark.long
def test_from_a_search_to_a_pruned_model(address, tmp_path, capsys):
    vision = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear", "image_size": 160}
    name, shard = save_model(tmp_path / "model", **vision), str(tmp_path / "images.tar")
    random = np.random.default_rng(0)
    with wds.TarWriter(shard) as writer:
        for number in range(12):
            pixels = random.integers(0, 256, (160, 160, 3)).astype(np.uint8)
            writer.write({"__key__": str(number), "png": Image.fromarray(pixels)})
    found, learnt, tokens = (str(tmp_path / folder) for folder in ("rankings", "predictor", "tokens"))
    actors = ["--address", address, "--cpus-per-actor", "1", "--dtype", "float32"]
    workers = ["--address", address, "--workers", "1", "--cpus-per-worker", "1", "--dtype", "float32", "--test"]
    assert search.main(["--shards", shard, "--model", name, "--out", found, "--steps", "2", *actors]) == 0
    table = rankings.open(found).dataset.to_table()
    assert table.num_rows == 12 and all(sorted(row) == list(range(100)) for row in table["ranking"].to_pylist())

    trained = ["--rankings", found, "--batch", "4", "--epochs", "1", "--held-out", "0.2"]
    assert train_predictor.main([*trained, "--out", learnt, *workers]) == 0
    assert train_tokens.main([*trained, "--predictor", learnt, "--out", tokens, *workers]) == 0
    assert predictor.load(learnt)[0].config.prefix_tokens == 1
    bundle = str(tmp_path / "bundle")
    evaluated = ["--rankings", found, "--predictor", learnt, "--tokens", tokens, "--save-bundle", bundle]
    more = ["--keep-rates", "0.5", "--timed-seconds", "0", "--out", str(tmp_path / "evaluation")]
    assert evaluate_job.main([*evaluated, *more, *actors]) == 0
    cosine = {row.split()[0]: row.split()[1] for row in capsys.readouterr().out.split("cosine")[-1].splitlines()[1:7]}
    assert float(cosine["golden"]) > float(cosine["random"])

    model = open_clip.create_model(name).eval()
    images = torch.randn(2, 3, 160, 160)
    whole = model.encode_image(images)
    patchrank.prune(model, bundle)
    assert torch.nn.functional.cosine_similarity(model.encode_image(images), whole).min() > 0.5
