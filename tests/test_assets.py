"""The embedded default: what stands in the project, and the script that made it."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

from patchrank import assets
from patchrank.assets import make_assets
from patchrank.errors import UserError

FOLDER = Path(assets.__file__).parent


def read(shards: list[str]) -> list[dict]:
    return list(wds.WebDataset(shards, shardshuffle=False).decode("pil"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of IDX files: 256 training and 100 test images of noise; shards of 20 samples to fit."""
    monkeypatch.setattr(make_assets, "SAMPLES_PER_SHARD", 20)
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 256), ("t10k", 100)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["make_assets", *map(str, flags)])
    return make_assets.main()


def test_sizes():
    assert size(FOLDER / "model") <= 8e6
    assert size(FOLDER / "shards") <= 1.5e6


def test_open_clip_reads_the_model():
    model = open_clip.create_model(assets.MODEL)
    assert model.visual.positional_embedding.shape == (1 + 196, 64)
    assert {tensor.dtype for tensor in load_file(FOLDER / "model" / "open_clip_model.safetensors").values()} == {
        torch.float16
    }
    # any prompt can be tokenised, also one longer than the context
    tokens = open_clip.get_tokenizer(assets.MODEL)(["a photo of a zebra.", "a very " * 40 + "long prompt"])
    assert tokens.shape == (2, 32)
    assert model.encode_text(tokens).isfinite().all()


def test_zero_shot_top1_on_the_test_shards():
    samples = read(assets.TEST_SHARDS)
    images = np.stack([np.asarray(sample["png"].convert("L")) for sample in samples])
    accuracies = make_assets.zero_shot(assets.MODEL, images, np.array([sample["cls"] for sample in samples]))
    assert len(accuracies) == 2
    assert min(accuracies) > 0.8


def test_words_without_a_caption_are_zero():
    table = open_clip.create_model(assets.MODEL).token_embedding.weight
    seen = set(make_assets.caption_tokens(open_clip.get_tokenizer(assets.MODEL)).unique().tolist())
    # 0 is the padding: it comes after the end-of-text token, which the causal mask keeps from looking at it
    assert set(table.any(dim=1).nonzero().flatten().tolist()) == seen - {0}


def test_no_caption_is_cut_off():
    lengths, long_lengths = (
        (make_assets.caption_tokens(open_clip.get_tokenizer(assets.MODEL, context_length=n)) != 0).sum(dim=2)
        for n in (None, 77)
    )
    assert (lengths == long_lengths).all()


@pytest.mark.parametrize(("split", "shards"), [("train", assets.TRAIN_SHARDS), ("test", assets.TEST_SHARDS)])
def test_shards_hold_what_they_say(split: str, shards: list[str]):
    names = json.loads(assets.CLASSNAMES.read_text())
    assert names == [names[0] for names in make_assets.NAMES]
    samples = read(shards)
    assert len(samples) == 250 * len(shards)
    assert all(re.fullmatch(rf"{split}-\d{{5}}", sample["__key__"]) for sample in samples)
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert Counter(sample["cls"] for sample in samples) == dict.fromkeys(range(10), len(samples) // 10)
    first = [sample["cls"] for sample in samples[:250]]
    assert len(set(first[:50])) > 5  # shuffled, not class after class


def test_shard_pngs_are_8_bit_greyscale():
    (sample, *_) = wds.WebDataset(assets.TRAIN_SHARDS[:1], shardshuffle=False)
    assert sample["cls"].decode().isdigit()
    assert sample["png"][24:26] == bytes([8, 0])  # IHDR: bit depth, colour type


def test_shards_are_the_images_of_their_keys_and_always_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_assets, "SAMPLES_PER_SHARD", 20)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 28, 28), np.uint8), rng.permutation(90).astype(np.uint8) % 10
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_assets.write_shards(tmp_path / name, "train", images, labels, shards=2, seed=3)
        monkeypatch.setattr(time, "time", lambda: 1e9)  # the second time on another day
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["train-000000.tar.gz", "train-000001.tar.gz"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    samples = read([str(tmp_path / "a" / name) for name in files])
    assert Counter(sample["cls"] for sample in samples) == dict.fromkeys(range(10), 4)
    for sample in samples:
        index = int(sample["__key__"].removeprefix("train-"))
        assert sample["cls"] == labels[index]
        assert (np.asarray(sample["png"])[..., 0] == images[index]).all()


def test_training_sees_what_the_preprocessing_yields():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    model = open_clip.create_model(assets.MODEL)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    expected = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    torch.testing.assert_close(make_assets.normalize(torch.from_numpy(images)), expected)


def test_augment_shifts_and_mirrors():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 10, 5] = 255
    out = make_assets.augment(image.expand(2000, 28, 28))
    assert (out.sum(dim=(1, 2)) == 255).all()
    places = {(int(y), int(x)) for _, y, x in out.nonzero()}
    shifts = range(-2, 3)
    assert places == {(10 + dy, x + dx) for dy in shifts for dx in shifts for x in (5, 27 - 5)}


def test_two_runs_write_the_same_files(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_assets, "MIN_ACCURACY", dict.fromkeys(make_assets.KINDS, 0.0))
    for out in ("a", "b"):
        assert run_main(monkeypatch, "--data", small_data, "--out", tmp_path / out, "--epochs", "1") == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 4 + 2 + 1
    assert {path.relative_to(FOLDER) for sub in ("model", "shards") for path in (FOLDER / sub).iterdir()} == set(files)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_model_below_the_threshold_is_not_written(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert run_main(monkeypatch, "--data", small_data, "--out", out, "--epochs", "1") == 1
    assert "below 85%: nothing written" in capsys.readouterr().out
    assert list(out.iterdir()) == []


def test_missing_and_broken_data_are_named(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="dataset-fashion-mnist or give the folder of its files with --data"):
        run_main(monkeypatch, "--data", tmp_path / "nowhere", "--check")
    labels = small_data / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for content in (b"", b"text", whole[:-20], gzip.compress(b""), gzip.compress(gzip.decompress(whole)[:-1])):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz: not a gzipped IDX file"):
            make_assets.read_split(small_data, "t10k")


def test_the_siglip_type_model_goes_on_from_the_other(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(make_assets, "MIN_ACCURACY", dict.fromkeys(make_assets.KINDS, 0.0))
    assert run_main(monkeypatch, "--kind", "siglip", "--data", small_data, "--out", out) == 0
    assert [path.name for path in out.iterdir()] == ["siglip"]
    model, other = open_clip.create_model(f"local-dir:{out / 'siglip'}"), open_clip.create_model(assets.MODEL)
    pairs = [  # four steps later
        (model.visual.trunk.blocks[2].attn.qkv.weight, other.visual.transformer.resblocks[2].attn.in_proj_weight),
        (model.visual.trunk.pos_embed[0], other.visual.positional_embedding[1:]),
        (model.text_projection, other.text_projection),
    ]
    for ours, theirs in pairs:
        assert 0 < (ours - theirs).abs().max() < 0.01
    assert (FOLDER / "siglip" / "open_clip_config.json").read_bytes() == (
        out / "siglip" / "open_clip_config.json"
    ).read_bytes()
