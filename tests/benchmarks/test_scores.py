"""benchmarks/scores.py on tiny images: it takes rankings that are there, adds those by similarities, and resumes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from here import run_here

pytest_plugins = ["tiny_results"]
PHOTOS = 7


def test_it_measures_resumes_and_shows(data, tmp_path):
    np.savez(tmp_path / "texts.npz", bank=np.eye(9, 24), answers=np.eye(24)[::-1])
    known = {"shard": "images-0.tar", "search": "one-shot r=2", "ranking": list(range(36))}
    frontier, results = tmp_path / "frontier.parquet", tmp_path / "scores.parquet"
    pq.write_table(pa.Table.from_pylist([{**known, "key": f"0-{number}"} for number in range(PHOTOS)]), frontier)

    def measured(photos):
        done = run_here(
            "benchmarks/scores.py", "measure", results, "--model", f"local-dir:{data / 'model'}", "--dtype", "float32",
            "--frontier", frontier, "--shards", data / "images-0.tar", "--photos", photos,
            "--bank", f"{tmp_path}/texts.npz:bank", "--images", data / "images-1.tar", "--bank-images", "6",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [line.split(":")[0] for line in done.stdout.splitlines()]

    assert measured(2) == ["images-0.tar 0-0", "images-0.tar 0-1"]
    assert measured(PHOTOS) == [f"images-0.tar 0-{number}" for number in range(2, PHOTOS)]
    assert measured(PHOTOS) == []
    rows = pq.read_table(results).to_pylist()
    assert len(rows) == 3 * PHOTOS and all(sorted(row["ranking"]) == list(range(36)) for row in rows)
    done = run_here("benchmarks/scores.py", "show", results, "--answers", f"{tmp_path}/texts.npz:answers")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("7 photos; at keep 0.6, 0.5, 0.4") and "answers, %" in lines[1]
    found = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[1:] for line in lines[3:]}
    assert list(found) == ["one-shot r=2", "similarities to texts, gates n=16", "similarities to images, gates n=16"]
    assert all(len(cells) == 4 and 0 <= float(cells[1].split()[0]) <= 100 for cells in found.values())
