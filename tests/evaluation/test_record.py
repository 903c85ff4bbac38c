"""The record of an evaluation: what its file looks like, and what is read from one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from patchrank.errors import UserError
from patchrank.evaluation.record import (
    EQUAL_COST,
    FILE,
    ClassFigure,
    Figure,
    Latency,
    Model,
    Neighbours,
    Record,
    Retrieval,
)
from patchrank.store.folder import BESIDE, Folder

RECALL = {"1": 0.5, "5": 0.75, "10": None}
RECORD = Record(
    model=Model("tiny", None, "0123", 1, (2, 3), "float32", {"size": [28, 28], "mean": [0.5]}),
    class_names=["cat", "dog"],
    shards=["/data/a.tar"],
    rankings=None,
    device="CPU",
    images=4,
    figures=[Figure("unpruned", 1.0, 4, 2, 0.5, 1.0, 1.0, None, 200, 200)],
    classes=[ClassFigure(0, "unpruned", 1.0, 2, 0.5, "cat")],
    latency=[Latency("golden", 0.5, 8, 0.1, 0.2, 2.0, 3, 1.9)],
    retrieval=[Retrieval("unpruned", 1.0, 4, 20, RECALL, RECALL)],
    compared_at=EQUAL_COST,
    neighbours=[Neighbours("golden", 0.5, 4, 3, 0.9, 0.8, 0.7, 0.75, 1.0, 0.9)],
)
KEYS = {
    "figures": "method keep images labelled top1 top5 cosine matching multiply_adds counted",
    "classes": "label method keep images top1 name",
    "latency": "method keep batch seconds unpruned_seconds speedup rounds predicted",
    "retrieval": "method keep images captions image_to_text text_to_image",
}


def test_what_is_written_is_read_again(tmp_path):
    RECORD.write(Folder(str(tmp_path), "evaluation"))
    data = (tmp_path / BESIDE / FILE).read_bytes()
    assert Record.read(str(tmp_path)) == RECORD
    Record.read(str(tmp_path)).write(Folder(str(tmp_path), "evaluation"))
    assert (tmp_path / BESIDE / FILE).read_bytes() == data


def test_the_order_of_the_keys_is_that_of_older_evaluations(tmp_path):
    RECORD.write(Folder(str(tmp_path), "evaluation"))
    content = json.loads((tmp_path / BESIDE / FILE).read_text())
    assert list(content) == [
        "model",
        "class_names",
        "shards",
        "rankings",
        "device",
        "images",
        *KEYS,
        "compared_at",
        "neighbours",
    ]
    assert list(content["model"]) == ["name", "pretrained", "weights", "cut", "grid", "dtype", "preprocess"]
    assert {name: list(content[name][0]) for name in KEYS} == {name: keys.split() for name, keys in KEYS.items()}


def test_an_evaluation_of_before_was_not_at_equal_cost_and_has_no_neighbours(tmp_path):
    RECORD.write(Folder(str(tmp_path), "evaluation"))
    content = json.loads((tmp_path / BESIDE / FILE).read_text())
    del content["compared_at"], content["neighbours"]
    (tmp_path / BESIDE / FILE).write_text(json.dumps(content))
    assert Record.read(str(tmp_path)) == replace(RECORD, compared_at=None, neighbours=[])


def test_the_mean_of_nothing_is_none(tmp_path):
    replace(RECORD, figures=[replace(RECORD.figures[0], top1=float("nan"))]).write(Folder(str(tmp_path), "evaluation"))
    assert "NaN" in (tmp_path / BESIDE / FILE).read_text()
    assert Record.read(str(tmp_path)).figures[0].top1 is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("keep", True, "True where a number belongs"),
        ("images", True, "True where a whole number belongs"),
        ("top1", "0.5", "'0.5' where a number belongs"),
        ("top1", float("inf"), "inf where a number belongs"),
        ("method", 3, "3 where a text belongs"),
    ],
)
def test_other_types_are_refused(name, value, words, tmp_path):
    replace(RECORD, figures=[replace(RECORD.figures[0], **{name: value})]).write(Folder(str(tmp_path), "evaluation"))
    with pytest.raises(UserError, match=rf"figures\.json: damaged \({words}\); run jobs/evaluate\.py again"):
        Record.read(str(tmp_path))
