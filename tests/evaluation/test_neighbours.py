"""What pruning does to nearest neighbours: against a loop, and of which images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from PIL import Image

from patchrank.evaluation import neighbours
from patchrank.evaluation.evaluate import EvaluationConfig, ShardEvaluator, schema
from patchrank.evaluation.record import Neighbours
from patchrank.model.tower import Tower
from patchrank.pruning import methods

IMAGES, WIDTH = 30, 6
CELLS = {("unpruned", 1.0): 0.0, ("random", 0.5): 0.4, ("random", 0.8): 0.1, ("predictor", 0.5): 0.2}


@pytest.fixture
def vectors(tmp_path):
    """The embeddings in two tables of an evaluation, whose rows are in no order; some images have none."""
    random = np.random.default_rng(0)
    whole = random.normal(size=(IMAGES, WIDTH))
    found = {cell: whole + noise * random.normal(size=whole.shape) for cell, noise in CELLS.items()}
    found = {cell: rows / np.linalg.norm(rows, axis=1, keepdims=True) for cell, rows in found.items()}
    for shard in range(2):
        rows = [
            {"key": f"{number:02}", "shard": f"{number % 2}.tar", "method": method, "keep": keep}
            | {"embedding": embeddings[number].tolist() if number < IMAGES - 4 else None}
            for (method, keep), embeddings in found.items()
            for number in range(shard, IMAGES, 2)
        ]
        first, *others = rows[:15], rows[15:30], rows[30:45], rows[45:]
        rows = [*first, *(row for part in others for row in random.permutation(np.array(part, dtype=object)))]
        pq.write_table(pa.Table.from_pylist(rows, schema(WIDTH)), tmp_path / f"{shard}.parquet")
    order = [*range(0, IMAGES - 4, 2), *range(1, IMAGES - 4, 2)]  # of the tables
    return {cell: rows[order].astype(np.float32) for cell, rows in found.items()}


def nearest(queries, index, count):
    """Without the images themselves, query by query."""
    found = []
    for number, query in enumerate(queries):
        order = [other for other in np.argsort(-(index @ query), kind="stable") if other != number]
        found.append(set(order[:count]))
    return found


def first(queries, index):
    """The share of queries that nothing in the index is nearer to than their own image."""
    similar = queries @ index.T
    return np.mean(np.diag(similar) >= similar.max(axis=1) - 1e-6)


@pytest.mark.parametrize("most, count", [(100, 10), (20, 10), (5, 4)])
def test_neighbours_against_a_loop(vectors, tmp_path, monkeypatch, most, count):
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    there = neighbours.neighbours(str(tmp_path), ["0.parquet", "1.parquet"], most)
    vectors = {cell: rows[:most] for cell, rows in vectors.items()}
    whole = vectors.pop(("unpruned", 1.0))
    wanted = nearest(whole, whole, count)
    assert [(one.method, one.keep) for one in there] == [("predictor", 0.5), ("random", 0.8), ("random", 0.5)]
    for one in there:
        pruned = vectors[one.method, one.keep]
        mixed = np.where(np.arange(len(pruned))[:, None] % 2 == 0, pruned, whole)

        def kept(*pairs):
            found = [near for queries, index in pairs for near in nearest(queries, index, count)]
            return np.mean([len(mine & near) / count for mine, near in zip(wanted * len(pairs), found, strict=True)])

        assert (one.images, one.nearest) == (min(most, IMAGES - 4), count)
        assert one.pruned_queries == pytest.approx(kept((pruned, whole)))
        assert one.pruned_index == pytest.approx(kept((whole, pruned)))
        assert one.pruned == pytest.approx(kept((pruned, pruned)))
        assert one.mixed == pytest.approx(kept((pruned, mixed), (whole, mixed)))
        assert one.first_by_pruned_queries == pytest.approx(first(pruned, whole))
        assert one.first_in_pruned_index == pytest.approx(first(whole, pruned))


def test_a_copy_of_an_image_is_as_near_as_itself(tmp_path):
    rows = [
        {"key": key, "shard": "a.tar", "method": method, "keep": keep, "embedding": [1.0, 0.0]}
        for method, keep in (("unpruned", 1.0), ("random", 0.5))
        for key in "abc"
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema(2)), tmp_path / "0.parquet")
    (one,) = neighbours.neighbours(str(tmp_path), ["0.parquet"])
    assert (one.first_by_pruned_queries, one.first_in_pruned_index, one.nearest, one.pruned) == (1.0, 1.0, 2, 1.0)


def test_one_image_has_no_neighbours(vectors, tmp_path):
    assert neighbours.neighbours(str(tmp_path), ["0.parquet"], 1) == []


def test_the_sentence_on_a_shared_index_follows_from_the_figures():
    one = Neighbours("random", 0.5, 2000, 10, 0.9, 0.9, 0.8, 0.85, 1.0, 1.0)
    assert neighbours.sentence(one) == (
        "At keep rate 0.5, pruned and unpruned embeddings can share an index: of the 10 nearest neighbours among 2,000 "
        "images, 85.0 % stay where every other image is pruned, 80.0 % where all are, and 90.0 % where queries alone "
        "are."
    )
    assert "should not share an index" in neighbours.sentence(replace(one, mixed=0.7))


@pytest.mark.parametrize("kept, there", [(0, [False] * 5 + [True]), (3, [True] * 3 + [False] * 2 + [True])])
def test_embeddings_of_the_first_images_of_a_shard_are_kept_and_those_with_captions(small_clip, tmp_path, kept, there):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(6):
            sample = {"__key__": str(number), "png": Image.new("RGB", (20, 16), (40 * number, 0, 0))}
            writer.write(sample | ({"txt": "the last"} if number == 5 else {}))
    tower = Tower(small_clip().visual)

    def pixels(image):
        return torch.tensor(np.array(image)).permute(2, 0, 1) / 255

    config = EvaluationConfig([0.5], images_per_batch=4, embeddings=kept)
    evaluator = ShardEvaluator(tower, methods.make(["random"], tower.device), pixels, config)
    for _ in range(2):  # the count begins anew in every shard
        rows = evaluator.evaluate(str(tmp_path / "a.tar")).table.to_pylist()
        found = {(row["key"], row["method"]): row["embedding"] is not None for row in rows}
        assert found == {(str(n), name): there[n] for name in ("unpruned", "random") for n in range(6)}
