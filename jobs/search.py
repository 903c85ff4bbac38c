"""Search golden rankings: shards in, Parquet out.

    python jobs/search.py                                     the embedded model on the embedded shards
    python jobs/search.py --model ViT-B-16 --pretrained openai --shards 'data/train-{000000..001280}.tar' --out rankings
    ray job submit --working-dir . -- python jobs/search.py --shards s3://bucket/train --out s3://bucket/rankings ...

Stopped at any time, the same command goes on where it was. Every shard becomes one Parquet file in the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from cluster.estimate import Estimate, estimate
from cluster.rank import SearchJob, SearchSummary, search
from patchrank import assets, flags
from patchrank.errors import UserError, run, stoppable
from patchrank.flags import flag


@dataclass(frozen=True)
class Only:
    """What is done instead of a search."""

    estimate: bool = flag(
        False, "tell what it would cost, from some seconds of timing; write nothing", group="input and output"
    )


def parser(prog: str = "jobs/search.py") -> argparse.ArgumentParser:
    """The flags of `SearchJob`."""
    return flags.parser(prog, __doc__, SearchJob, Only)


def job(args: argparse.Namespace) -> SearchJob:
    """The job that the flags describe, by default on what is embedded. Raises UserError for what does not fit."""
    found = flags.read(SearchJob, args)
    model, classes = found.model, found.classes
    if found.shards and not model.name:
        raise UserError("--shards needs --model: an open_clip name, or embedded for the model in this project")
    if model.name and not found.shards:
        raise UserError("--model needs --shards: which images should it rank?")
    embedded = assets.EMBEDDED.get(model.name or "embedded")
    if embedded is None:
        return found
    return replace(
        found,
        shards=found.shards or assets.TRAIN_SHARDS,
        model=replace(model, name=embedded),
        classes=classes if classes.given else replace(classes, class_names=str(assets.CLASSNAMES)),
    )


def show(summary: SearchSummary, keep_rates: Sequence[float], prog: str) -> None:
    """Print what was done, what failed, and what to do next."""
    images, rejects, candidates = (summary.total(name) for name in ("images", "rejects", "candidates"))
    kept, seconds = summary.total("kept"), summary.seconds
    if summary.resumed:
        print(f"shards        {summary.resumed} of {summary.shards} were finished before")
    if seconds:
        ranked = f"{images} ranked" + (f", {kept} kept from tries that were cut off" if kept else "")
        print(f"images        {ranked}, {rejects} rejected, in {seconds:.1f} s: {images / seconds:.2f} images/s")
        print(f"candidates    {candidates}: {candidates / seconds:.0f} candidates/s")
    if images:
        cosines = zip(keep_rates, summary.mean_cosine(), strict=True)
        print("cosine        " + ", ".join(f"{mean:.4f} at keep {keep}" for keep, mean in cosines))
        first, last = (f"{size / 1e9:.2f} GB" for size in summary.memory())
        print(f"memory        peak of an actor: {first} after its first shard, {last} after its last")
        size = sum(report.bytes for report in summary.reports.values())
        print(f"disk          {size / (images + kept):.0f} bytes an image")
    print(f"rankings      {summary.folder}")
    for shard, reason in sorted(summary.failures.items()):
        print(f"error: {shard}: {reason}", file=sys.stderr)
    if summary.failures:
        print("error: put these shards right and run the same command again", file=sys.stderr)
    if rejects:
        print(f"next          {flags.command(prog, 'query')} {summary.folder} rejects")
    print(f"next          {flags.command(prog, 'query')} {summary.folder} accuracy")


def show_estimate(found: Estimate) -> None:
    """Print what a job would cost."""
    images = f"{found.images} in {found.shards - found.finished} shards"
    if found.sampled < found.shards - found.finished:
        images += f", from the {found.sampled} that were counted"
    print(f"images        {images}" + (f"; {found.finished} shards are finished" if found.finished else ""))
    candidates = f"{found.candidates} candidates, " if found.candidates else ""
    print(f"an image      {candidates}{found.multiply_adds / 1e9:.1f} G multiply-adds")
    rate = found.multiply_adds / found.image_seconds / 1e9 if found.image_seconds else 0
    print(f"an actor      {found.image_seconds:.3f} s an image, {rate:.0f} G multiply-adds/s, with {found.places}")
    memory = f"{found.memory / 1e9:.2f} GB" + (f", {found.gpu_memory / 1e9:.2f} GB of GPU" if found.gpu_memory else "")
    print(f"memory        {memory} an actor")
    print(f"time          {tqdm.format_interval(found.seconds)} (h:mm:ss) on {found.places.actors} actors")
    print(f"device-hours  {found.device_hours:.2f}")
    print(f"disk          {found.bytes / 1e6:.1f} MB of Parquet at most")


def main(argv: Sequence[str] | None = None, prog: str = "jobs/search.py") -> int:
    """Parse, search or estimate, print; 1 where a shard failed."""
    args = parser(prog).parse_args(argv)
    parsed = job(args)
    if args.estimate:
        show_estimate(estimate(parsed))
        return 0
    with stoppable(f"finished shards are in {parsed.out}: the same command goes on from there"):
        summary = search(parsed)
    show(summary, parsed.keep_rates, prog)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    run(main)
