"""How far a search or an embedding is, from its folder alone: while it runs, from any machine, and after it has died.

python jobs/status.py FOLDER
python jobs/status.py s3://bucket/rankings --json
watch -n 30 python jobs/status.py FOLDER
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from tqdm import tqdm

from patchrank import flags
from patchrank.errors import run
from patchrank.store import status
from patchrank.store.corpus import DONE
from patchrank.store.status import Status

LISTED = 20  # shards in work, failures and reasons that are printed


def show(found: Status) -> None:
    """Print where a search stands, for people."""
    run, now = found.run, time.time()
    print(f"{found.kind:<14}{found.folder}")
    heard = f", last heard of {tqdm.format_interval(max(0, now - run.updated))} ago" if run else ""
    what = f" ({run.title})" if run and run.title != found.kind and found.state in ("running", "died") else ""
    print(f"state         {found.state}{what}{heard}")
    if found.shards is None:
        print(f"shards        {found.done} done, {len(found.failed)} failed; of how many is not known")
    else:
        rest = f"{len(found.running)} running, {len(found.failed)} failed, {found.waiting} waiting"
        print(f"shards        {found.done} of {found.shards} done, {rest}")
    print(f"images        {found.images} {DONE[found.kind]}, {found.rejects} rejected")
    if run and run.images_per_second:
        actors = f" on {run.actors} actors" if found.state == "running" else " when last heard of"
        print(f"rate          {run.images_per_second:.2f} images/s{actors}")
    if found.ends is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.ends))
        print(f"ends          {end}, in {tqdm.format_interval(max(0, found.ends - now))}")
    if run and any(run.stages.values()):
        print("seconds       " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in run.stages.items()))
    _list("running", [f"{shard}: {images} images so far" for shard, images in found.running.items()])
    _list("kept", [f"{shard}: what was done of it" for shard in found.kept if shard not in found.running])
    _list("failed", [f"{shard}: {error}" for shard, error in found.failed.items()])
    _list("rejected", [f"{count} x {reason}" for reason, count in found.reasons.items()])
    if found.state in ("died", "stopped"):
        print(f"next          the command of the {found.kind} again: it goes on where this one ended")


def _list(title: str, lines: Sequence[str]) -> None:
    for line in lines[:LISTED]:
        print(f"{title:<14}{line}")
    if len(lines) > LISTED:
        print(f"{title:<14}and {len(lines) - LISTED} more; --json has all")


def main(argv: Sequence[str] | None = None, prog: str = "jobs/status.py") -> int:
    """Parse, read, print."""
    parser = flags.parser(prog, __doc__)
    parser.add_argument("folder", help="output folder of a search or an embedding: a path, s3://... or gs://...")
    parser.add_argument("--json", action="store_true", help="everything, for programs; times in seconds since 1970")
    args = parser.parse_args(argv)
    found = status.read(args.folder)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    run(main)
