"""Turn images into WebDataset shards, which every other job reads.

    python jobs/make_shards.py --images photos --out shards            photos/CLASS/**/x.jpg
    python jobs/make_shards.py --csv photos.csv --out shards           columns path and, if there are labels, label

The files go in as they are. A sample's key is a running number; its json has the path of its file. Images that cannot
be decoded are left out and listed, and the exit status is then 1.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from patchrank import flags
from patchrank.data import shard_writer, sizes
from patchrank.data.shard_writer import Skipped
from patchrank.errors import UserError, run


def main(argv: Sequence[str] | None = None, prog: str = "jobs/make_shards.py") -> int:
    parser = flags.parser(prog, __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="ImageFolder tree: DIR/CLASS/**/x.jpg, jpeg, png or webp")
    source.add_argument("--csv", metavar="FILE", help="CSV with a path and optionally a label (integer or name) a line")
    parser.add_argument("--root", metavar="DIR", help="folder of the CSV's relative paths (the CSV's own)")
    parser.add_argument("--path-column", default="path", metavar="NAME", help="column of the CSV (%(default)s)")
    parser.add_argument("--label-column", metavar="NAME", help="column of the CSV (label, if there is one)")
    parser.add_argument("--out", required=True, metavar="DIR", help="local folder of the shards")
    parser.add_argument("--prefix", default="shard", help="shards are named PREFIX-000000.tar and so on (%(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--shuffle", type=int, default=0, metavar="SEED", help="so that any shard is a random sample (%(default)s)"
    )
    parser.add_argument("--no-shuffle", action="store_const", dest="shuffle", const=None, help="keep the order")
    args = parser.parse_args(argv)

    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {args.samples_per_shard}: must be at least 1")
    if "://" in args.out:
        raise UserError(f"--out {args.out}: must be a local folder; copy the finished shards to the bucket from there")
    if args.images and (args.root or args.label_column or args.path_column != "path"):
        raise UserError("--root, --path-column and --label-column: go with --csv")
    class_names: list[str] | None
    if args.images:
        files, class_names = shard_writer.from_folders(args.images)
    else:
        files, class_names = shard_writer.from_csv(args.csv, args.root, args.path_column, args.label_column)
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(files)

    skipped = 0
    results = shard_writer.write(files, args.out, class_names, args.prefix, args.samples_per_shard)
    with contextlib.closing(results):  # removes the half-written shard when stopped
        for result in progress(results, len(files)):
            if result is not None:
                skipped += 1
                tqdm.write(f"skipped {result.path}: {result.reason}", file=sys.stderr)

    written, size = len(files) - skipped, args.samples_per_shard
    shards = -(-written // size)
    known = {f"{args.prefix}-{number:06d}.tar": min(size, written - number * size) for number in range(shards)}
    sizes.write(args.out, known)
    print(f"images: {written}, skipped: {skipped}, shards: {shards}, folder: {args.out}")
    out = shlex.quote(args.out)
    if class_names:
        classes = f" --classes {shlex.quote(os.path.join(args.out, 'classnames.json'))}"
    else:
        classes = f" --prototypes {out}" if any(file.label is not None for file in files) else ""
    print(f"next: {flags.command(prog, 'search')} --model ViT-B-16 --pretrained openai --shards {out}{classes}")
    return 1 if skipped else 0


def progress(results: Iterable[Skipped | None], total: int) -> Iterator[Skipped | None]:
    """A progress bar on a terminal, a line every half minute elsewhere."""
    due = time.monotonic() + 30
    for done, result in enumerate(tqdm(results, total=total, unit=" images", disable=not sys.stderr.isatty()), 1):
        yield result
        if not sys.stderr.isatty() and time.monotonic() >= due:
            print(f"{done} of {total} images", file=sys.stderr, flush=True)
            due = time.monotonic() + 30


if __name__ == "__main__":
    run(main)
