"""benchmarks/corpus.py on a small corpus: its tables are those of a search, and it says what it measures."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from here import ROOT

from benchmarks import corpus as benchmark
from patchrank.store import queries, rankings

JOB = ROOT / "benchmarks" / "corpus.py"


@pytest.mark.long
def test_a_small_corpus_is_written_once_and_measured(tmp_path, capsys):
    flags = ["--folder", str(tmp_path), "--shards", "3", "--rows", "40", "--listed", "30", "--model", "ViT-S-32-alt"]
    first = subprocess.run([sys.executable, str(JOB), *flags], capture_output=True, text=True, timeout=300)
    titles = ["write", *(f"query {name}" for name in queries.NAMED), "training reader", "small files"]
    titles += ["first row streamed", "resume"]
    assert [line[:26].strip() for line in first.stdout.splitlines()] == titles, first.stderr
    assert first.returncode == (1 if "BEYOND THE LIMIT" in first.stdout else 0)
    corpus = rankings.open(str(tmp_path))
    assert len(corpus) == 120
    before = {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    benchmark.write(str(tmp_path), 3, 40, benchmark.Report())
    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in tmp_path.glob("*.parquet")} == before


def test_a_table_is_like_that_of_a_search():
    table = benchmark.drawn(7, 200)
    assert table.schema == rankings.schema(196)
    ranking, step = (np.stack(table[name].to_numpy()) for name in ("ranking", "step"))
    by_place = np.take_along_axis(step, ranking.astype(int), axis=1)  # (B, N), most useful first
    assert (by_place[:, :78] == 0).all()  # never left
    assert (np.diff(by_place[:, 78:].astype(int)) <= 0).all()  # the last to leave is the more useful
    assert by_place.max() == 30
    assert not benchmark.drawn(8, 200).equals(table)
    assert benchmark.drawn(7, 200).equals(table)


def test_what_is_beyond_its_limit_is_told(capsys):
    report = benchmark.Report()
    report.line("query x", "4.0 s (limit 5 s)")
    assert report.good
    report.line("query y", "6.0 s (limit 5 s)", within=False)
    report.line("query z", "4.0 s (limit 5 s)")
    assert not report.good
    lines = capsys.readouterr().out.splitlines()
    assert ["BEYOND" in line for line in lines] == [False, True, False]
