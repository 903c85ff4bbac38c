"""Tokens before the cut on disk: the same as those computed, and computed once."""

from __future__ import annotations

import os
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from patchrank.data.features import Features
from patchrank.data.images import decode
from patchrank.errors import UserError
from patchrank.model.tower import Tower


def preprocess(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255  # (3, H, W)


@pytest.fixture
def tower(small_clip):
    return Tower(small_clip().visual, 2, torch.bfloat16)


@pytest.fixture
def shard(tmp_path):
    random = np.random.default_rng(0)
    with wds.TarWriter(str(tmp_path / "images.tar"), encoder=True) as writer:
        for number in range(5):
            data = BytesIO()
            Image.fromarray(random.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(data, "png")
            writer.write({"__key__": f"{number}", "png": data.getvalue()})
        writer.write({"__key__": "bad", "png": b"no image"})
    return str(tmp_path / "images.tar")


def images(shard):
    return {sample["__key__"]: sample["png"] for sample in wds.WebDataset(shard, shardshuffle=False)}


def test_they_are_the_towers_own(tower, shard, tmp_path):
    features = Features(str(tmp_path / "cache"), tower, "weights", preprocess, size=2)
    for key, data in images(shard).items():
        found = features.of(shard, key)
        if key == "bad":
            assert found is None
        else:
            tokens, embedding = found
            assert (tokens.dtype, embedding.dtype) == (torch.bfloat16, torch.float32)
            expected = tower.prefix(preprocess(decode(data))[None])  # alone, so bfloat16 rounds otherwise
            torch.testing.assert_close(tokens, expected[0], rtol=0.05, atol=0.05)
            torch.testing.assert_close(embedding, tower.suffix(tokens[None])[0], rtol=0.05, atol=0.05)
    assert features.of(shard, "absent") is None


def test_they_are_computed_once_for_a_model_cut_and_limit(tower, shard, tmp_path, small_clip, monkeypatch):
    passes = []
    prefix = Tower.prefix
    monkeypatch.setattr(Tower, "prefix", lambda self, pixels: passes.append(len(pixels)) or prefix(self, pixels))

    def ask(tower, weights="weights", limit=None):
        passes.clear()
        Features(str(tmp_path / "cache"), tower, weights, preprocess, limit).of(shard, "1")
        return sum(passes)

    assert ask(tower) == 5
    assert ask(tower) == 0
    assert ask(tower, weights="others") == 5
    assert ask(tower, limit=2) == 2
    assert ask(Tower(small_clip().visual, 3, torch.bfloat16)) == 5
    assert ask(tower) == 0
    tower.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5)}
    assert ask(tower) == 5
    assert not list((tmp_path / "cache").rglob(".*"))


def test_files_can_be_shared_and_what_killed_runs_left_is_deleted(tower, shard, tmp_path):
    features = Features(str(tmp_path / "cache"), tower, "weights", preprocess)
    folder = Path(features.folder)
    folder.mkdir(parents=True)
    for name, age in (("old", 2), ("young", 0)):
        (folder / f".{name}.tmp").touch()
        os.utime(folder / f".{name}.tmp", (time.time() - age * 24 * 3600,) * 2)
    features.of(shard, "0")
    assert [path.name for path in folder.glob(".*")] == [".young.tmp"]
    (path,) = folder.glob("*.safetensors")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_shard_without_an_image_has_no_tokens(tower, tmp_path):
    with wds.TarWriter(str(tmp_path / "bad.tar")) as writer:
        writer.write({"__key__": "bad", "png": b"no image"})
    features = Features(str(tmp_path / "cache"), tower, "weights", preprocess)
    assert features.of(str(tmp_path / "bad.tar"), "bad") is None


def test_a_shard_that_ends_early_is_not_kept(tower, shard, tmp_path):
    whole = Path(shard).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    features = Features(str(tmp_path / "cache"), tower, "weights", preprocess)
    with pytest.raises(UserError, match=r"cut\.tar: .*whole shards"):
        features.of(str(tmp_path / "cut.tar"), "0")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_file_and_a_remote_folder_are_refused(tower, shard, tmp_path):
    Features(str(tmp_path / "cache"), tower, "weights", preprocess).of(shard, "0")
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        Features(str(tmp_path / "cache"), tower, "weights", preprocess).of(shard, "0")
    with pytest.raises(UserError, match="--cache-features s3://bucket/cache: must be a local folder"):
        Features("s3://bucket/cache", tower, "weights", preprocess)
