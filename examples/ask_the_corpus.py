"""Ask a corpus of rankings questions in SQL: where the useful patches are, which images cannot bear to lose any.

python examples/ask_the_corpus.py rankings         # what `make search` has left, or a folder in a bucket
"""

from __future__ import annotations

import sys

import duckdb

from patchrank.errors import run
from patchrank.store import rankings


def main() -> int:
    """Ask two questions."""
    corpus = rankings.open(sys.argv[1] if len(sys.argv) > 1 else "rankings")
    rows, columns = corpus.grid
    connection = duckdb.connect()
    connection.register("rankings", corpus.dataset)  # nothing is copied; DuckDB reads the columns that a query names

    print(f"{len(corpus)} images, {rows} x {columns} patches")

    print("\nHow often a patch is among the most useful tenth of its image's, in %:")
    best = rows * columns // 10
    often = connection.sql(f"""
        WITH best AS (SELECT unnest(ranking[1:{best}]) AS token FROM rankings)
        SELECT token, 100.0 * count(*) / (SELECT count(*) FROM rankings) AS share FROM best GROUP BY token
    """).fetchall()
    share = dict(often)
    for row in range(rows):
        print(" ".join(f"{share.get(row * columns + column, 0):4.0f}" for column in range(columns)))

    print("\nThe images that suffer most when they keep half of their patches:")
    print(
        connection.sql("""
            SELECT key, label, p.cosine::DECIMAL(6, 4) AS cosine, p.prediction <> prediction AS answer_changed
            FROM (SELECT key, label, prediction, unnest(pruned) AS p FROM rankings)
            WHERE p.keep = 0.5 ORDER BY p.cosine LIMIT 5
        """)
    )
    return 0


if __name__ == "__main__":
    run(main)
