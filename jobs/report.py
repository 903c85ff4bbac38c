"""The report of an evaluation: one HTML page of charts, tables and images, and the charts as PNG files.

    python jobs/report.py evaluation --out report
    python jobs/report.py s3://bucket/evaluation --out report --keep 0.5 --images 24

report/index.html needs nothing beside it: open it, mail it, or put it on a web server.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from patchrank import flags
from patchrank.errors import run
from patchrank.report.folder import PAGE, write
from patchrank.store import storage


def main(argv: Sequence[str] | None = None, prog: str = "jobs/report.py") -> int:
    """Parse, write, print."""
    parser = flags.parser(prog, __doc__)
    add = parser.add_argument
    add("evaluation", help="folder that jobs/evaluate.py wrote: a path, s3://... or gs://...")
    add("--out", default="report", metavar="FOLDER", help="folder of the report (%(default)s)")
    add("--keep", type=float, metavar="RATE", help="keep rate of the class table and images (0.6 or the nearest)")
    add("--images", type=int, default=12, metavar="N", help="at most so many in each gallery (%(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    command = f"{flags.command(prog, 'report')} {shlex.join(argv)}"
    notes = write(args.evaluation, args.out, command, args.keep, args.images)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(storage.join(args.out, PAGE))
    return 0


if __name__ == "__main__":
    run(main)
