"""SQL over a rankings folder.

    python jobs/query.py FOLDER                                           a summary, and the named queries
    python jobs/query.py FOLDER accuracy                                  a named query
    python jobs/query.py FOLDER "SELECT label, count(*) FROM rankings GROUP BY label"
    python jobs/query.py FOLDER accuracy --show                           its SQL, to start from
    python jobs/query.py FOLDER accuracy-by-class --format csv --out by_class.csv

The views are rankings, rejects, failures, classes and tokens; `DESCRIBE rankings` lists the columns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from patchrank import flags
from patchrank.errors import UserError, run
from patchrank.store import queries, rankings


def main(argv: Sequence[str] | None = None, prog: str = "jobs/query.py") -> int:
    parser = flags.parser(prog, __doc__)
    parser.add_argument("folder", help="rankings folder that a search wrote: a path, s3://... or gs://...")
    parser.add_argument("query", nargs="?", help="SQL, or a named query: " + ", ".join(queries.NAMED))
    parser.add_argument("--format", choices=list(queries.FORMATS), help="default: table; with --out: csv")
    parser.add_argument("--out", help="a local file to write, instead of printing")
    parser.add_argument("--show", action="store_true", help="print the SQL of the named query instead of running it")
    args = parser.parse_args(argv)

    named = queries.NAMED.get(args.query or "summary")
    if named is None and (args.show or len(args.query.split()) < 2):  # no SELECT statement is one word
        raise UserError(f"{args.query}: no such named query; there are {', '.join(queries.NAMED)}")
    if args.show and named:
        print(named.sql)
        return 0
    form = args.format or ("json" if str(args.out).endswith(".json") else "csv" if args.out else "table")
    if args.out and form == "table":
        raise UserError("--out: takes --format csv or json")
    corpus = rankings.open(args.folder)
    if args.out and os.path.realpath(args.out).startswith(os.path.realpath(corpus.folder) + os.sep):
        raise UserError(f"--out {args.out}: lies in the rankings folder, which a query does not write")
    with queries.connect(corpus) as connection:
        queries.answer(connection, named.sql if named else queries.select(connection, args.query), form, args.out)
        for note in queries.notes(connection, corpus, named) if named else []:
            print(f"note: {note}", file=sys.stderr)
    if not args.query and form == "table":
        print("Named queries, to give after the folder; so can be any SQL:")
        for name, query in queries.NAMED.items():
            print(f"  {name:<18} {query.description}")
    return 0


if __name__ == "__main__":
    run(main)
