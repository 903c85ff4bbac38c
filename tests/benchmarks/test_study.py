"""benchmarks/study.py: the figures of its rows are those that jobs left."""

from __future__ import annotations

from pathlib import Path

import made_up
import made_up_evaluation
import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.study import Row
from patchrank import assets
from patchrank.training import outcome


def figures(job, folder, **changes):
    return Row("cuts", "a row", [("train_predictor", [], Path("elsewhere")), (job, [], folder)], **changes).figures()


def test_of_a_search(tmp_path):
    found = made_up.images("/data/a.tar", 30)
    made_up.save(tmp_path, found)
    wanted = found.arrays["pruned_cosine"].astype(float).mean(axis=0)
    assert figures("search", tmp_path, keep_rates=made_up.KEEP_RATES) == pytest.approx(wanted.tolist())


def test_of_an_evaluation(tmp_path):
    made_up_evaluation.write(tmp_path, assets.TRAIN_SHARDS[:1], list("abcdefghij"))
    folder = tmp_path / "evaluation"
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    wanted = [
        np.mean([row["cosine"] for row in rows if (row["method"], row["keep"]) == ("predictor", keep)])
        for keep in made_up_evaluation.KEEP_RATES
    ]
    assert figures("evaluate", folder) == pytest.approx(wanted)


def test_of_a_training(tmp_path):
    after = {f"held-out/cosine at keep {keep:g} with tokens": keep for keep in made_up_evaluation.KEEP_RATES}
    outcome.write(str(tmp_path), {}, after)
    assert figures("train_tokens", tmp_path) == [0.8, 0.7, 0.6, 0.5, 0.4]
