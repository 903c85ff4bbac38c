"""The examples, as they stand, on small data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import made_up

from patchrank import rankings

ROOT = Path(__file__).parent.parent


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    return done.stdout


def test_prune_my_clip():
    printed = run("examples/prune_my_clip.py", "--how", "token-merging", "--keep", "0.7")
    assert "64 images: cosine 0.9" in printed and "times as fast" in printed


def test_ask_the_corpus(tmp_path):
    settings = made_up.settings(keep_rates=[0.5])
    made = made_up.images("shard.tar", 30, keep_rates=(0.5,))
    rankings.write(str(tmp_path), "shard.tar", made.table(), [], rankings.prepare(str(tmp_path), settings))
    printed = run("examples/ask_the_corpus.py", tmp_path).splitlines()
    assert printed[0] == "30 images, 4 x 5 patches"
    shares = [int(share) for line in printed[3:7] for share in line.split()]
    assert len(shares) == 20 and abs(sum(shares) - 200) <= 10  # a tenth of 20 tokens is 2; rounded shares
