"""benchmarks/paired.py against NumPy, and benchmarks/memory.py against a real forward pass."""

from __future__ import annotations

import copy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from here import run_here

from benchmarks.memory import kept_bytes
from patchrank.model.tower import Tower


def test_intervals_are_paired_by_image(tmp_path):
    random = np.random.default_rng(0)
    images, label = 60, random.integers(0, 3, 60)
    whole = np.where(random.random(images) < 0.8, label, 9)
    rows, cosines, predictions = [], {}, {}
    for method, keep in (("unpruned", 1.0), ("mine", 0.5), ("other", 0.5), ("other", 0.4)):
        prediction = whole if method == "unpruned" else np.where(random.random(images) < 0.8, whole, 8)
        cosines[method, keep], predictions[method, keep] = random.random(images), prediction
        for image in range(images):
            row = {"key": str(image), "shard": "a.tar", "method": method, "keep": keep, "label": label[image]}
            rows.append(row | {"prediction": prediction[image], "cosine": cosines[method, keep][image]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    done = run_here("benchmarks/paired.py", tmp_path, "--against", "other")
    (line,) = [line.split() for line in done.stdout.splitlines() if line.startswith("mine")]
    hits = [(predictions[name, 0.5] == label).astype(float) for name in ("mine", "other")]
    more, cosine_more = hits[0] - hits[1], cosines["mine", 0.5] - cosines["other", 0.5]
    expected = [100 * hits[0].mean(), 100 * more.mean(), 196 * more.std(ddof=1) / images**0.5]
    expected += [100 * (predictions["mine", 0.5] == whole).mean(), cosines["mine", 0.5].mean(), cosine_more.mean()]
    found = [float(text) for text in " ".join(line[3:]).replace("+-", " ").split()]
    assert found[:-1] == pytest.approx(expected, abs=0.051)
    assert "no such method" in run_here("benchmarks/paired.py", tmp_path, "--against", "nobody").stderr


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_that_of_a_real_forward_pass(small_clip, recompute):
    visual = small_clip().visual
    real = kept_bytes(Tower(visual), 3, 2, recompute)
    shapes = Tower(copy.deepcopy(visual).to("meta"), device="meta")
    assert kept_bytes(shapes, 3, 2, recompute) == pytest.approx(real, rel=0.02)
    assert kept_bytes(shapes, 6, 2, recompute) == pytest.approx(2 * real, rel=0.05)
