"""Embed whole corpora: shards or a folder of images in, embeddings in Parquet out, by a model as it is or pruned.

    python jobs/embed.py --shards photos --model ViT-B-16 --pretrained openai --out embeddings
    python jobs/embed.py --shards 's3://bucket/train-{000..127}.tar' --model ViT-B-16 --pretrained openai \\
        --bundle my-bundle --keep 0.6 --classes classnames.json --out s3://bucket/embeddings

Stopped at any time, the same command goes on where it was. Every shard, or folder of images, becomes one Parquet file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.embed import EmbedJob, embed, estimate
from cluster.rank import Summary
from jobs.search import show_estimate
from patchrank import assets, flags
from patchrank.errors import UserError, run, stoppable
from patchrank.flags import flag


@dataclass(frozen=True)
class Only:
    """What is done instead of an embedding."""

    estimate: bool = flag(
        False, "tell what it would cost, from some seconds of timing; write nothing", group="input and output"
    )


def parser(prog: str = "jobs/embed.py") -> argparse.ArgumentParser:
    """The flags of `EmbedJob`."""
    return flags.parser(prog, __doc__, EmbedJob, Only)


def job(args: argparse.Namespace) -> EmbedJob:
    """The job that the flags describe. Raises UserError for what does not fit."""
    found = flags.read(EmbedJob, args)
    if not found.shards or not found.model.name:
        raise UserError("--shards and --model are needed: shards or a folder of images, and an open_clip name")
    name = found.model.name
    return replace(found, model=replace(found.model, name=assets.EMBEDDED.get(name, name)))


def show(summary: Summary, prog: str) -> None:
    """Print what was done, what failed, and what to do next."""
    images, rejects, seconds = summary.total("images"), summary.total("rejects"), summary.seconds
    if summary.resumed:
        print(f"shards        {summary.resumed} of {summary.shards} were finished before")
    if seconds:
        print(
            f"images        {images} embedded, {rejects} rejected, in {seconds:.1f} s: {images / seconds:.2f} images/s"
        )
        reports = summary.reports.values()
        stages = dict.fromkeys(stage for report in reports for stage in report.progress.seconds)
        spent = {stage: sum(report.progress.seconds.get(stage, 0.0) for report in reports) for stage in stages}
        print("seconds       " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in spent.items()))
    if images:
        print(f"disk          {sum(report.bytes for report in summary.reports.values()) / images:.0f} bytes an image")
    print(f"embeddings    {summary.folder}")
    for shard, reason in sorted(summary.failures.items()):
        print(f"error: {shard}: {reason}", file=sys.stderr)
    if summary.failures:
        print("error: put these shards right and run the same command again", file=sys.stderr)
    if rejects:
        print(f"next          {flags.command(prog, 'query')} {summary.folder} rejects")
    print(f"next          {flags.command(prog, 'query')} {summary.folder} --key KEY")


def main(argv: Sequence[str] | None = None, prog: str = "jobs/embed.py") -> int:
    """Parse, embed or estimate, print; 1 where a shard failed."""
    args = parser(prog).parse_args(argv)
    parsed = job(args)
    if args.estimate:
        show_estimate(estimate(parsed))
        return 0
    with stoppable(f"finished shards are in {parsed.out}: the same command goes on from there"):
        summary = embed(parsed)
    show(summary, prog)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    run(main)
