"""What the tiny search ranks, and undisturbed results to compare with: `pytest_plugins = ["tiny_results"]`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from small_model import save_model
from tiny_search import search

pytest_plugins = ["shared_ray"]

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small CLIP with random weights, class names, and six shards of twelve random images."""
    folder = tmp_path_factory.mktemp("data")
    save_model(folder / "model", context_length=8)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    random = np.random.default_rng(0)
    for shard in range(6):
        with wds.TarWriter(str(folder / f"images-{shard}.tar")) as writer:
            for number in range(12):
                pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                writer.write({"__key__": f"{shard}-{number}", "png": Image.fromarray(pixels), "cls": number % 3})
    return folder


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """The folder of a search by one actor that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "rankings"
    done = search(data, out, "--actors", "1")
    assert done.returncode == 0, done.stderr
    assert "72 ranked, 0 rejected" in done.stdout
    assert "jobs/query.py" in done.stdout
    return out
