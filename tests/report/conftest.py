"""A made-up evaluation and its report."""

from __future__ import annotations

import made_up_evaluation
import pytest
from reading import CLASSES, Page

from jobs import report as job
from patchrank import assets


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A whole evaluation, with the content of its figures.json."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "evaluation", made_up_evaluation.write(folder, assets.TEST_SHARDS, CLASSES)


@pytest.fixture(scope="module")
def out(evaluation, tmp_path_factory):
    """Its report, made by the job."""
    folder = tmp_path_factory.mktemp("report of all") / "report"
    assert job.main([str(evaluation[0]), "--out", str(folder), "--images", "5"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(out):
    return Page((out / "index.html").read_text())
