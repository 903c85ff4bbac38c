"""SQL over a folder of rankings or embeddings, on an in-memory DuckDB: the views, and named queries for what people ask
first.

    rankings    all columns of `patchrank.store.rankings.schema`
    embeddings  or those of `patchrank.store.embeddings.schema`
    rejects     key, shard, reason
    failures    shard, error
    classes     label, name; empty where the search did not know the names
    tokens      of rankings: token, grid_row, grid_column; the last two null where the search did not know the grid

A keep rate is a row after `unnest(pruned)`; a position in the ranking (0 = most useful) is a row after
`unnest(ranking)` with `generate_subscripts(ranking, 1) - 1`.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.corpus import DONE
from patchrank.store.embeddings import Embeddings
from patchrank.store.rankings import Rankings

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

TABLE_ROWS = 40  # that a printed table shows; CSV and JSON have them all
FORMATS = {"table": "", "csv": "FORMAT csv, HEADER", "json": "FORMAT json, ARRAY true"}  # as options of COPY


@dataclass(frozen=True)
class Query:
    """A named query: what it answers, its SQL, and what its answer is empty without (keys of `_MISSING`)."""

    description: str
    sql: str
    needs: tuple[str, ...] = ()


# Every ranking is unnested beside the same two lists of integers, and summed: positions computed a row, and averages,
# take twice as long.
_POSITIONS = """\
WITH places AS (  -- each position in the ranking, and whether keep 0.5 keeps it
    SELECT list(token ORDER BY token) AS position, list((token < (n + 1) // 2)::INT ORDER BY token) AS kept
    FROM tokens, (SELECT count(*) AS n FROM tokens)
), sums AS (  -- every image ranks every token once
    SELECT token, sum(position) AS position, sum(kept) AS kept
    FROM (SELECT unnest(ranking) AS token, unnest(position) AS position, unnest(kept) AS kept FROM rankings, places)
    GROUP BY token
)
SELECT token, grid_row, grid_column,
       round(position / images / (SELECT max(token) FROM tokens), 3) AS mean_position,
       round(100 * kept / images, 1) AS kept_percent
FROM sums JOIN tokens USING (token), (SELECT count(*) AS images FROM rankings)
ORDER BY position{order}, token
LIMIT 20"""

_ACCURACY = """\
count(*) AS images,
       round(100 * avg((prediction = label)::INT), 2) AS unpruned_top1_percent,
       round(100 * avg((p.prediction = label)::INT), 2) AS pruned_top1_percent,
       round(100 * avg((p.prediction = prediction)::INT), 2) AS unchanged_percent,
       round(avg(p.cosine), 4) AS mean_cosine,
       round(avg(p.confidence), 4) AS mean_confidence"""

NAMED = {
    "summary": Query(
        "images, shards, rejects, failed shards, and top-1 accuracy of the unpruned model",
        """\
SELECT count(*) AS images,
       count(DISTINCT shard) AS shards,
       (SELECT count(*) FROM rejects) AS rejects,
       (SELECT count(*) FROM failures) AS failed_shards,
       round(100 * avg((prediction = label)::INT), 2) AS unpruned_top1_percent
FROM rankings""",
        needs=("label", "prediction"),
    ),
    "accuracy": Query(
        "against keep rate: top-1 accuracy, unchanged predictions, mean cosine to the unpruned embedding, confidence",
        f"""\
SELECT p.keep AS keep,
       {_ACCURACY}
FROM (SELECT label, prediction, unnest(pruned) AS p FROM rankings)
GROUP BY keep
ORDER BY keep DESC""",
        needs=("keep", "label", "prediction"),
    ),
    "accuracy-by-class": Query(
        "the same for each class",
        f"""\
SELECT label,
       name AS class,
       p.keep AS keep,
       {_ACCURACY}
FROM (SELECT label, prediction, unnest(pruned) AS p FROM rankings WHERE label IS NOT NULL)
LEFT JOIN classes USING (label)
GROUP BY label, name, keep
ORDER BY label, keep DESC""",
        needs=("keep", "label", "prediction"),
    ),
    "most-useful": Query(
        "the 20 tokens with the best mean position in the ranking (0 best, 1 worst), and how often keep 0.5 keeps them",
        _POSITIONS.format(order=""),
        needs=("grid",),
    ),
    "least-useful": Query(
        "the 20 tokens with the worst mean position",
        _POSITIONS.format(order=" DESC"),
        needs=("grid",),
    ),
    "changed": Query(
        "images whose prediction changes: the highest keep rate at which it does, from what and to what",
        """\
SELECT p.keep AS keep, key, shard,
       coalesce(truth.name, r.label::VARCHAR) AS class,
       coalesce(before.name, r.prediction::VARCHAR) AS unpruned,
       coalesce(after.name, p.prediction::VARCHAR) AS pruned
FROM (SELECT key, shard, label, prediction,
             list_max(list_filter(pruned, lambda p: p.prediction <> prediction)) AS p  -- structs compare by keep first
      FROM rankings) AS r
LEFT JOIN classes AS truth ON truth.label = r.label
LEFT JOIN classes AS before ON before.label = r.prediction
LEFT JOIN classes AS after ON after.label = p.prediction
WHERE p IS NOT NULL
ORDER BY keep DESC, shard, key""",
        needs=("keep", "prediction"),
    ),
    "rejects": Query(
        "samples that could not be used, and why",
        "SELECT shard, key, reason FROM rejects ORDER BY shard, key",
    ),
    "failures": Query(
        "shards that could not be read, or only in part",
        "SELECT shard, error FROM failures ORDER BY shard",
    ),
}

OF_EMBEDDINGS = {
    "summary": Query(
        "images, shards, rejects, failed shards, numbers of an embedding, and top-1 accuracy",
        """\
SELECT count(*) AS images,
       count(DISTINCT shard) AS shards,
       (SELECT count(*) FROM rejects) AS rejects,
       (SELECT count(*) FROM failures) AS failed_shards,
       max(len(embedding)) AS numbers,
       round(100 * avg((prediction = label)::INT), 2) AS top1_percent
FROM embeddings""",
        needs=("label", "prediction"),
    ),
    "predictions": Query(
        "of each class, how many images are taken for it, and how surely",
        """\
SELECT prediction, name AS class, count(*) AS images, round(avg(confidence), 4) AS mean_confidence
FROM embeddings LEFT JOIN classes ON classes.label = prediction
WHERE prediction IS NOT NULL
GROUP BY prediction, name
ORDER BY images DESC, prediction""",
        needs=("prediction",),
    ),
    "rejects": NAMED["rejects"],
    "failures": NAMED["failures"],
}

_MISSING = {
    "label": "no image has a label: accuracy is empty",
    "prediction": "the {kind} had no class embeddings: predictions, confidence and accuracy are empty",
    "keep": "the {kind} recorded no keep rates: there is nothing to compare",
    "grid": "the {kind} did not record the grid of patches: grid_row and grid_column are empty",
}


@contextmanager
def connect(corpus: Rankings | Embeddings) -> Iterator[DuckDBPyConnection]:
    """An in-memory DuckDB with the views of this module. Nothing that it runs writes to the folder.

    Raises:
        UserError: what DuckDB says, of an error in here or in the body of the `with` statement.
    """
    import duckdb

    dataset = corpus.dataset  # checks all files, before DuckDB meets one that is damaged or foreign
    with tempfile.TemporaryDirectory(prefix="patchrank-") as spill:
        connection = duckdb.connect(
            config={
                "memory_limit": "2GB",  # the named queries take a quarter of that; what needs more is spilled
                "threads": min(4, os.cpu_count() or 1),  # each has its buffers, within that limit
                "temp_directory": spill,  # the default is in the current folder
            }
        )
        try:
            if storage.is_local(corpus.folder):
                paths = [glob.escape(path) for path in dataset.files]
                connection.read_parquet(paths, hive_partitioning=False).create_view(corpus.rows)
            else:  # DuckDB would have to download an extension to read buckets
                connection.register("dataset", dataset)
                lists = {"ranking": "USMALLINT", "score": "FLOAT", "step": "USMALLINT", "embedding": "FLOAT"}
                there = [f"{name}::{lists[name]}[] AS {name}" for name in dataset.schema.names if name in lists]
                connection.execute(f"CREATE VIEW {corpus.rows} AS SELECT * REPLACE ({', '.join(there)}) FROM dataset")
            for name, table in _small_tables(corpus).items():
                connection.register(name, table)
            yield connection
        except duckdb.Error as error:
            raise UserError(str(error).strip()) from None
        finally:
            connection.close()


def _small_tables(corpus: Rankings | Embeddings) -> dict[str, pa.Table]:
    names = corpus.class_names or []
    failures = corpus.home.failures()
    tables = {
        "rejects": corpus.rejects(),
        "failures": pa.Table.from_pylist(failures, pa.schema([("shard", pa.string()), ("error", pa.string())])),
        "classes": pa.table({"label": pa.array(range(len(names)), pa.int32()), "name": pa.array(names, pa.string())}),
    }
    return tables | {"tokens": _tokens(corpus)} if isinstance(corpus, Rankings) else tables


def _tokens(corpus: Rankings) -> pa.Table:
    tokens = range(corpus.num_tokens)
    columns = corpus.grid and corpus.grid[1]
    rows = [(token, columns and token // columns, columns and token % columns) for token in tokens]
    names = ("token", "grid_row", "grid_column")
    return pa.table(
        {name: pa.array(column, pa.int32()) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    )


def select(connection: DuckDBPyConnection, sql: str) -> str:
    """The text of the one SELECT statement in `sql`.

    Raises:
        UserError: it is none, or not the only one.
    """
    import duckdb

    kinds = (duckdb.StatementType.SELECT, duckdb.StatementType.MULTI)  # FROM, WITH, DESCRIBE, SUMMARIZE; and PIVOT
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type not in kinds:
        raise UserError("one SELECT statement is wanted: a query only reads")
    text = statements[0].query
    written = text.encode()  # of which places are counted in bytes
    for place, kind in reversed(duckdb.tokenize(text)):  # from the end: semicolons, and comments behind them
        if written[place : place + 1] != b";" and kind != duckdb.token_type.comment:
            break
        written = written[:place]
    return written.decode().rstrip()


def notes(connection: DuckDBPyConnection, corpus: Rankings | Embeddings, query: Query) -> list[str]:
    """One line for each thing that a named query cannot answer on this corpus."""
    images = len(corpus)
    if not images:
        return [f"no image has been {DONE[corpus.kind]}"]
    have: dict[str, Any] = {}
    if isinstance(corpus, Rankings):
        have = {"keep": corpus.keep_rates, "grid": corpus.grid}
    columns = [need for need in query.needs if need not in have]  # a scan of them takes a second on a large corpus
    if columns:
        counts = connection.execute(f"SELECT {', '.join(f'count({name})' for name in columns)} FROM {corpus.rows}")
        have |= dict(zip(columns, counts.fetchall()[0], strict=True))
    lines = [_MISSING[need].format(kind=corpus.kind) for need in query.needs if not have[need]]
    labels = have.get("label", images)
    if 0 < labels < images:
        lines.append(f"{images - labels} of {images} images have no label: accuracy is that of the others")
    return lines


def answer(connection: DuckDBPyConnection, sql: str, format: str = "table", out: str | None = None) -> None:
    """Print the rows of a SELECT statement, or write them to a local file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    relation = connection.sql(sql)  # a mistake in the statement comes to light here, with its own line numbers
    if format == "table":
        head = relation.limit(TABLE_ROWS + 1).to_arrow_table()
        width = shutil.get_terminal_size((160, 40)).columns
        connection.from_arrow(head.slice(0, TABLE_ROWS)).show(max_rows=TABLE_ROWS, max_width=width)
        if len(head) > TABLE_ROWS:
            total = connection.execute(f"SELECT count(*) FROM (\n{sql}\n)").fetchall()[0][0]
            print(f"{total} rows, the first {TABLE_ROWS} shown; --format csv gives all")
        return
    folder = os.path.dirname(os.path.abspath(out)) if out else None
    try:
        with tempfile.TemporaryDirectory(prefix=".patchrank-", dir=folder) as scratch:
            path = os.path.join(scratch, "rows")
            quoted = path.replace("'", "''")
            connection.execute(f"COPY (FROM (\n{sql}\n)) TO '{quoted}' ({FORMATS[format]})")
            if out:
                os.replace(path, out)
                return
            with open(path, "rb") as rows:
                shutil.copyfileobj(rows, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{out or 'output'}: cannot be written ({storage.one_line(error)})") from None
