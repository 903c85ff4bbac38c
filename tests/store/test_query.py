"""The named queries give what numpy computes from the same rankings; SQL goes in, tables, CSV and JSON come out."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from here import ROOT
from made_up import CLASSES, KEEP_RATES, images, save, settings

from jobs.query import main
from patchrank.errors import UserError
from patchrank.store import queries, rankings
from patchrank.store.folder import Folder, Reject, file_name

pytest_plugins = ["s3"]

SHARDS = ("/data/a.tar", "/data/b.tar")


def corpus(folder: str | Path, class_embeddings: bool = True, labels: bool = True, **changes):
    """Writes a corpus of two shards with a reject and a failure; returns the images of both."""
    parts = [images(shard, 40, seed=seed, class_embeddings=class_embeddings) for seed, shard in enumerate(SHARDS)]
    for part in parts:
        if not labels:
            part.labels = [None] * 40
        rejects = (Reject("broken", "no image"),) if part.shard == SHARDS[1] else ()
        save(folder, part, rejects, **changes)
    Folder(str(folder)).record_failure("/data/c.tar", "no such file")
    return parts


def stacked(parts, name: str) -> np.ndarray:
    return np.concatenate([part.arrays[name] for part in parts])


def ask(folder: str | Path, capsys, query: str) -> list[dict]:
    """The rows of a query, through JSON."""
    capsys.readouterr()
    assert main([str(folder), query, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def percent(values: np.ndarray) -> float:
    return pytest.approx(100 * values.mean(), abs=0.0051)


def expected_accuracy(parts, rows: np.ndarray) -> list[dict]:
    label = np.concatenate([part.labels for part in parts])[rows]
    prediction = stacked(parts, "prediction")[rows]
    answer = []
    for rate, keep in enumerate(KEEP_RATES):
        pruned = stacked(parts, "pruned_prediction")[rows, rate]
        answer.append(
            {
                "keep": keep,
                "images": int(rows.sum()),
                "unpruned_top1_percent": percent(prediction == label),
                "pruned_top1_percent": percent(pruned == label),
                "unchanged_percent": percent(pruned == prediction),
                "mean_cosine": pytest.approx(stacked(parts, "pruned_cosine")[rows, rate].mean(), abs=5.1e-5),
                "mean_confidence": pytest.approx(stacked(parts, "pruned_confidence")[rows, rate].mean(), abs=5.1e-5),
            }
        )
    return answer


def test_accuracy(tmp_path, capsys):
    parts = corpus(tmp_path)
    assert ask(tmp_path, capsys, "accuracy") == expected_accuracy(parts, np.ones(80, bool))


def test_accuracy_by_class(tmp_path, capsys):
    parts = corpus(tmp_path)
    parts[1].labels[0] = None
    save(tmp_path, parts[1])
    labels = np.concatenate([part.labels for part in parts])
    assert ask(tmp_path, capsys, "accuracy-by-class") == [
        {"label": label, "class": CLASSES[label], **row}
        for label in sorted({label for label in labels if label is not None})
        for row in expected_accuracy(parts, labels == label)
    ]


@pytest.mark.parametrize("query", ["most-useful", "least-useful"])
def test_useful_positions(tmp_path, capsys, query):
    ranking = stacked(corpus(tmp_path), "ranking")  # (80, 20)
    position = np.argsort(ranking, axis=1)  # by token id
    order = np.argsort(position.mean(axis=0), kind="stable")
    if query == "least-useful":
        order = np.argsort(-position.mean(axis=0), kind="stable")
    assert ask(tmp_path, capsys, query) == [
        {
            "token": token,
            "grid_row": token // 5,
            "grid_column": token % 5,
            "mean_position": pytest.approx(position[:, token].mean() / 19, abs=5.1e-4),
            "kept_percent": pytest.approx(100 * (position[:, token] < 10).mean(), abs=0.051),
        }
        for token in order.tolist()
    ]


@pytest.mark.parametrize("names", [True, False])
def test_changed(tmp_path, capsys, names):
    parts = corpus(tmp_path, about={"class_names": CLASSES if names else None})
    answer = []
    for rate, keep in enumerate(KEEP_RATES):  # highest first
        for part in parts:
            for row, (key, label) in enumerate(zip(part.keys, part.labels, strict=True)):
                before, after = part.arrays["prediction"][row], part.arrays["pruned_prediction"][row]
                if after[rate] != before and (after[:rate] == before).all():
                    classes = {"class": label, "unpruned": int(before), "pruned": int(after[rate])}
                    spelled = {role: CLASSES[value] if names else str(value) for role, value in classes.items()}
                    answer.append({"keep": keep, "key": key, "shard": part.shard, **spelled})
    assert 20 < len(answer) < 80
    assert ask(tmp_path, capsys, "changed") == answer


def test_summary_rejects_and_failures(tmp_path, capsys):
    parts = corpus(tmp_path)
    labels = np.concatenate([part.labels for part in parts])
    assert ask(tmp_path, capsys, "summary") == [
        {
            "images": 80,
            "shards": 2,
            "rejects": 1,
            "failed_shards": 1,
            "unpruned_top1_percent": percent(stacked(parts, "prediction") == labels),
        }
    ]
    assert ask(tmp_path, capsys, "rejects") == [{"shard": "/data/b.tar", "key": "broken", "reason": "no image"}]
    assert ask(tmp_path, capsys, "failures") == [{"shard": "/data/c.tar", "error": "no such file"}]


@pytest.mark.parametrize(
    ("corpus_of", "notes"),
    [
        ({"class_embeddings": False}, "note: the search had no class embeddings: predictions, confidence and accuracy"),
        ({"labels": False}, "note: no image has a label: accuracy is empty"),
    ],
)
def test_what_cannot_be_answered_is_said(tmp_path, capsys, corpus_of, notes):
    corpus(tmp_path, **corpus_of)
    assert main([str(tmp_path), "accuracy", "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert notes in printed.err and printed.err.count("note:") == 1
    rows = json.loads(printed.out)
    assert [row["keep"] for row in rows] == list(KEEP_RATES)
    assert all(row["mean_cosine"] > 0.9 for row in rows)
    assert all(row["pruned_top1_percent"] is None for row in rows)
    for query in queries.NAMED:
        main([str(tmp_path), query])
    assert ask(tmp_path, capsys, "failures")


def test_other_gaps_are_said(tmp_path, capsys):
    folder = Folder(str(tmp_path)).prepare(settings(grid=None, keep_rates=[], about={}))
    found = images(SHARDS[0], 3, keep_rates=())
    folder.write(found.shard, found.table().slice(0, 0))
    main([str(tmp_path), "accuracy"])
    assert capsys.readouterr().err == "note: no image has been ranked\n"
    found.labels[0] = None
    folder.write(found.shard, found.table())
    main([str(tmp_path), "accuracy"])
    assert capsys.readouterr().err == (
        "note: the search recorded no keep rates: there is nothing to compare\n"
        "note: 1 of 3 images have no label: accuracy is that of the others\n"
    )
    main([str(tmp_path), "most-useful"])
    assert capsys.readouterr().err.startswith("note: the search did not record the grid")


def test_no_query_prints_a_summary_and_what_can_be_asked(tmp_path, capsys):
    corpus(tmp_path)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "failed_shards" in printed
    assert all(f"  {name} " in printed and query.description in printed for name, query in queries.NAMED.items())


@pytest.mark.parametrize("name", list(queries.NAMED))
def test_shown_sql_is_what_runs(tmp_path, capsys, name):
    corpus(tmp_path)
    assert main([str(tmp_path / "need not exist"), name, "--show"]) == 0
    sql = capsys.readouterr().out
    assert ask(tmp_path, capsys, sql) == ask(tmp_path, capsys, name)


SQL = "SELECT r.key, c.name, ranking, r.label FROM rankings r JOIN classes c USING (label) ORDER BY shard, r.key; "


def test_csv_and_json_hold_all_rows(tmp_path, capsys):
    parts = corpus(tmp_path)
    ranking = stacked(parts, "ranking").tolist()
    labels = [label for part in parts for label in part.labels]
    rows = ask(tmp_path, capsys, SQL)
    assert [row["ranking"] for row in rows] == ranking
    main([str(tmp_path), SQL, "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [json.loads(row["ranking"]) for row in rows] == ranking
    assert [row["name"] for row in rows] == [CLASSES[label] for label in labels]
    main([str(tmp_path), SQL])
    printed = capsys.readouterr().out
    assert "80 rows, the first 40 shown" in printed
    assert printed.count("\n│ 0000") == 40


def test_out_writes_the_whole_file_or_none(tmp_path, capsys):
    folder, out = tmp_path / "it's out", tmp_path / "results"
    corpus(folder)
    out.mkdir()
    main([str(folder), SQL, "--out", str(out / "rows.json")])
    assert len(json.loads((out / "rows.json").read_text())) == 80
    main([str(folder), SQL, "--out", str(out / "rows.csv")])
    assert len(list(csv.DictReader((out / "rows.csv").open()))) == 80
    before = (out / "rows.csv").read_bytes()
    failing = "SELECT key, if(key = '000030', error('in the middle'), 1) FROM rankings"
    with pytest.raises(UserError, match="in the middle"):
        main([str(folder), failing, "--out", str(out / "rows.csv")])
    with pytest.raises(UserError, match=r"nowhere/rows\.csv: cannot be written"):
        main([str(folder), SQL, "--out", str(tmp_path / "nowhere" / "rows.csv")])
    with pytest.raises(UserError, match="--out: takes --format csv or json"):
        main([str(folder), SQL, "--out", str(out / "rows.csv"), "--format", "table"])
    assert (out / "rows.csv").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["rows.csv", "rows.json"]
    assert capsys.readouterr().out == ""


def test_the_folder_is_only_read(tmp_path, monkeypatch):
    corpus(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for query in queries.NAMED:
        main([str(tmp_path / "out"), query])
    target = tmp_path / "out" / file_name(SHARDS[0])
    for sql in (
        f"COPY (SELECT 1) TO '{target}'",
        f"EXPLAIN ANALYZE COPY (SELECT 1) TO '{target}'",
        f"SELECT 1; COPY (SELECT 1) TO '{target}'",
        f"ATTACH '{target}.db'",
        "-- no statement",
    ):
        with pytest.raises(UserError, match="one SELECT statement is wanted"):
            main([str(tmp_path / "out"), sql])
    for sql in ("SELECT 1 AS one; -- and /* no more */", "SELECT '東京' AS ü; -- é"):
        assert main([str(tmp_path / "out"), sql]) == 0
    with pytest.raises(UserError, match="lies in the rankings folder"):
        main([str(tmp_path / "out"), "summary", "--out", str(tmp_path / "out" / "rows.json")])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_does_not_fit_in_memory_is_not_put_in_the_current_folder(tmp_path, capsys):
    corpus(tmp_path)
    (row,) = ask(tmp_path, capsys, "SELECT current_setting('temp_directory') AS folder")
    assert os.path.isabs(row["folder"]) and not row["folder"].startswith(os.getcwd())


def test_a_file_of_another_search_is_refused(tmp_path):
    corpus(tmp_path)
    other = images("/data/x.tar", 3)
    Folder(str(tmp_path), fingerprint="0" * 16).write(other.shard, other.table())
    with pytest.raises(UserError, match=file_name(other.shard)):
        main([str(tmp_path), "summary"])


def test_only_rankings_files_are_rankings(tmp_path, capsys):
    """Neither rejects nor what a killed run left; and a folder's name is no pattern, nor a partition of a table."""
    folder = tmp_path / "k=v" / "run[1]* it's"
    corpus(folder)
    corpus(tmp_path / "k=v" / "run1 it's", labels=False)  # what the pattern would find
    part = next(folder.glob("*.parquet"))
    (folder / f".{part.name}.x.tmp").write_bytes(part.read_bytes()[:100])
    assert ask(folder, capsys, "SELECT count(label) AS labels FROM rankings") == [{"labels": 80}]
    columns = [row["column_name"] for row in ask(folder, capsys, "DESCRIBE rankings")]
    assert columns == rankings.schema(20).names


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEC key FROM rankings", "syntax error"),
        ("SELECT nope FROM rankings", 'column "nope" not found'),
        ("SELECT * FROM nope", "Table with name nope does not exist"),
        ("SELECT key::INT / 0, 'x'::INT FROM rankings", "Could not convert string 'x'"),
        ("acuracy", "acuracy: no such named query; there are summary, accuracy,"),
    ],
)
@pytest.mark.parametrize("form", ["table", "csv"])
def test_mistakes_in_a_query(tmp_path, query, message, form):
    corpus(tmp_path)
    with pytest.raises(UserError) as error:
        main([str(tmp_path), query, "--format", form])
    assert message in str(error.value)


def test_a_mistake_ends_the_job_with_status_2_and_no_trace(tmp_path):
    corpus(tmp_path)
    for folder, query in ((tmp_path, "SELECT nope FROM rankings"), (tmp_path / "nowhere", "summary")):
        job = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "query.py"), str(folder), query],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (job.returncode, job.stdout) == (2, "")
        assert job.stderr.startswith("error: ") and "Traceback" not in job.stderr and len(job.stderr) < 400


def test_a_bucket_gives_the_same_answers(tmp_path, s3_bucket, capsys):
    for folder in (tmp_path, f"{s3_bucket}/run"):
        corpus(folder)
    assert len(ask(f"{s3_bucket}/run", capsys, "rejects")) == 1
    for query in [*queries.NAMED, SQL, "DESCRIBE rankings"]:
        assert ask(f"{s3_bucket}/run", capsys, query) == ask(tmp_path, capsys, query)
