"""The examples and other small scripts, as they stand, on small data."""

from __future__ import annotations

import subprocess
import sys

import made_up
import pytest
from here import ROOT, run_here
from PIL import Image

from patchrank import assets
from patchrank.store import rankings
from patchrank.store.folder import Folder


def test_prune_my_clip():
    done = run_here("examples/prune_my_clip.py", "--how", "token-merging", "--keep", "0.7")
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "64 images: cosine 0.9" in printed and "times as fast" in printed


def test_ask_the_corpus(tmp_path):
    settings = made_up.settings(keep_rates=[0.5])
    made = made_up.images("shard.tar", 30, keep_rates=(0.5,))
    Folder(str(tmp_path)).prepare(settings).write(made.shard, made.table(), encode=rankings.encode)
    command = [sys.executable, "examples/ask_the_corpus.py", tmp_path]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[0] == "30 images, 4 x 5 patches"
    shares = [int(share) for line in printed[3:7] for share in line.split()]
    assert len(shares) == 20 and abs(sum(shares) - 200) <= 10  # a tenth of 20 tokens is 2; rounded shares


def test_the_picture_of_the_architecture(tmp_path):
    done = run_here("docs/architecture.py", tmp_path / "rooms.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "rooms.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["examples/prune_my_clip.py", "--how", "{tmp}/bundle"], "bundle: no such folder"),
        (
            ["examples/prune_my_clip.py", "--images", "{tmp}", "--classes", "cat"],
            "{tmp}/a.jpg: a text that begins 'no image'",
        ),
        (["examples/prune_my_clip.py", "--images", "{tmp}"], "--images and --classes: give both"),
        (["examples/prune_my_clip.py", "--model", "nope"], "--model nope"),
        (["examples/ask_the_corpus.py", "{tmp}/nope"], "{tmp}/nope: no such folder"),
        (["benchmarks/precision.py", "--model", assets.MODEL, "--shard", "nope.tar"], "nope.tar: No such file"),
        (
            ["benchmarks/bound.py", "--model", "embedded", "--shards", "{tmp}/shard.tar", "--tokens", "{tmp}/nope"],
            "{tmp}/nope: holds no tokens",
        ),
        (["benchmarks/feed.py", "--model", "embedded", "--shards", "{tmp}/shard.tar"], "{tmp}/shard.tar"),
        (["benchmarks/embed.py", "--model", "nope"], "--model nope"),
        (["benchmarks/decoding.py", "--model", "nope"], "--model nope"),
        (["benchmarks/study.py", "{tmp}/study", "--shards", "{tmp}/shard.tar"], "{tmp}/shard.tar"),
        (["docs/picture.py", "{tmp}/nope", "{tmp}/x.png"], "{tmp}/nope: no such folder"),
        (["docs/architecture.py", "{tmp}/nope/x.png"], "{tmp}/nope/x.png: cannot be written"),
        (["docs/picture.py", "{tmp}/rankings", "{tmp}/x.png"], "{tmp}/shard.tar: No such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    uri, folder = str(tmp_path / "shard.tar"), str(tmp_path / "rankings")
    made_up.save(folder, made_up.images(uri, 3))
    done = run_here(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert words.format(tmp=tmp_path) in done.stderr
    assert not (tmp_path / "x.png").exists()


def test_the_feed_of_a_training_is_measured():
    shard = ROOT / "patchrank/assets/shards/train-000000.tar.gz"
    given = ["--model", "embedded", "--shards", shard, "--batch", "4", "--seconds", "0", "--rounds", "1"]
    done = run_here("benchmarks/feed.py", *given)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["reader", "model", "both", "both"]


def test_search_my_shards_says_what_make_shards_says(tmp_path):
    command = [sys.executable, "examples/search_my_shards.py", tmp_path / "nope"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/nope: no such folder") and len(done.stderr.splitlines()) == 1
