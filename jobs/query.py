"""SQL over a folder of rankings or embeddings, and nearest neighbours.

    python jobs/query.py FOLDER                                           a summary, and the named queries
    python jobs/query.py FOLDER accuracy                                  a named query
    python jobs/query.py FOLDER "SELECT label, count(*) FROM rankings GROUP BY label"
    python jobs/query.py FOLDER accuracy --show                           its SQL, to start from
    python jobs/query.py FOLDER accuracy-by-class --format csv --out by_class.csv
    python jobs/query.py FOLDER --key n01440764_10026                     nearest neighbours among embeddings: of a key,
    python jobs/query.py FOLDER --image photo.jpg --nearest 20            of an image, embedded as they were,
    python jobs/query.py FOLDER --text "a dog on a beach"                 of a text, where the model has a text tower

The views are rankings or embeddings, rejects, failures, classes and tokens; `DESCRIBE rankings` lists the columns.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchrank import flags
from patchrank.errors import UserError, run
from patchrank.store import kinds, nearest, queries
from patchrank.store.embeddings import Embeddings
from patchrank.store.rankings import Rankings

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def main(argv: Sequence[str] | None = None, prog: str = "jobs/query.py") -> int:
    parser = flags.parser(prog, __doc__)
    names = ", ".join(queries.NAMED | queries.OF_EMBEDDINGS)
    parser.add_argument("folder", help="folder that a search or an embedding wrote: a path, s3://... or gs://...")
    parser.add_argument("query", nargs="?", help=f"SQL, or a named query: {names}")
    parser.add_argument("--format", choices=list(queries.FORMATS), help="default: table; with --out: csv")
    parser.add_argument("--out", help="a local file to write, instead of printing")
    parser.add_argument("--show", action="store_true", help="print the SQL of the named query instead of running it")
    near = parser.add_argument_group("nearest neighbours, among embeddings")
    near.add_argument("--key", help="of this image")
    near.add_argument("--shard", metavar="URI", help="that it is in, where several have an image of this key")
    near.add_argument("--image", metavar="FILE", help="of this image file")
    near.add_argument("--text", help="of this text")
    near.add_argument("--nearest", type=int, metavar="N", help="how many (10)")
    args = parser.parse_args(argv)

    asked = [name for name in ("query", "key", "image", "text") if getattr(args, name) is not None]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: one question at a time")
    if args.shard is not None and args.key is None:
        raise UserError("--shard: tells where a --key is, and there is none")
    if args.nearest is not None and asked in ([], ["query"]):
        raise UserError("--nearest: of what? --key, --image or --text tells")
    known = queries.OF_EMBEDDINGS if kinds.holds_embeddings(args.folder) else queries.NAMED
    named = known.get(args.query or "summary") if asked in ([], ["query"]) else None
    if named is None and asked == ["query"] and (args.show or len(args.query.split()) < 2):  # no SELECT is one word
        raise UserError(f"{args.query}: no such named query; there are {', '.join(known)}")
    if args.show and named:
        print(named.sql)
        return 0
    form = args.format or ("json" if str(args.out).endswith(".json") else "csv" if args.out else "table")
    if args.out and form == "table":
        raise UserError("--out: takes --format csv or json")
    corpus = kinds.open(args.folder)
    if args.out and os.path.realpath(args.out).startswith(os.path.realpath(corpus.folder) + os.sep):
        raise UserError(f"--out {args.out}: lies in the {corpus.rows} folder, which a query does not write")
    with queries.connect(corpus) as connection:
        if named:
            sql = named.sql
        elif args.query:
            sql = queries.select(connection, args.query)
        else:
            sql = neighbours(connection, corpus, args)
        queries.answer(connection, sql, form, args.out)
        for note in queries.notes(connection, corpus, named) if named else []:
            print(f"note: {note}", file=sys.stderr)
    if not asked and form == "table":
        print("Named queries, to give after the folder; so can be any SQL:")
        for name, query in known.items():
            print(f"  {name:<18} {query.description}")
    return 0


def neighbours(connection: DuckDBPyConnection, corpus: Rankings | Embeddings, args: argparse.Namespace) -> str:
    """SQL for the nearest neighbours that are asked for. Raises UserError."""
    if not isinstance(corpus, Embeddings):
        raise UserError(f"{args.folder}: holds rankings; --key, --image and --text ask embeddings, of jobs/embed.py")
    count = 10 if args.nearest is None else min(args.nearest, len(corpus))
    if count < 1:
        raise UserError(f"--nearest {args.nearest}: must be at least 1")
    if args.text is not None and not args.text.strip():
        raise UserError("--text: is empty")
    if args.key is not None:
        shard, vector = nearest.vector_of(connection, args.key, args.shard)
        return nearest.query(connection, corpus, vector, count, (shard, args.key))
    from patchrank.pruning import questions  # torch takes seconds to import

    of_image = args.image is not None
    vector = questions.image_vector(corpus, args.image) if of_image else questions.text_vector(corpus, args.text)
    return nearest.query(connection, corpus, vector, count)


if __name__ == "__main__":
    run(main)
