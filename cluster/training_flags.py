"""The flags that the training jobs share, and how their outcome is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from cluster.train import TrainingConfig, TrainingSummary
from patchrank import assets
from patchrank.data import shards
from patchrank.errors import UserError
from patchrank.model.loading import Model
from patchrank.store import rankings
from patchrank.training.outcome import Figures
from patchrank.training.tasks import RankedImages, open_images


def add_rankings(parser: argparse.ArgumentParser, default: str = "rankings") -> None:
    """The flags that name rankings and the model that they are of."""
    add = parser.add_argument_group("rankings and model").add_argument
    add("--rankings", default=default, metavar="FOLDER", help="what jobs/search.py left (%(default)s)")
    add("--shards", nargs="+", metavar="SHARDS", help="only these shards of the search (all that it ranked)")
    add("--model", metavar="NAME", help="as for jobs/search.py (the model that the search names)")
    add("--pretrained", metavar="TAG", help="as for jobs/search.py")
    add("--dtype", default="auto", help="of the frozen model: auto, float32, bfloat16 or float16 (%(default)s)")


def add_images(parser: argparse.ArgumentParser) -> None:
    """The flags of `images`."""
    add_rankings(parser)
    add = parser.add_argument_group("images").add_argument
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of the images, never trained on (%(default)s)")
    add("--test", nargs="*", metavar="SHARDS", help="labelled shards to measure, too (the embedded model: its own)")
    add("--measured", type=int, default=1000, metavar="N", help="images of either to measure at most (%(default)s)")
    add("--cache-features", metavar="FOLDER", help="keep the tokens before the cut here: pays where images come again")


def images(args: argparse.Namespace) -> tuple[RankedImages, Model]:
    """The images and the model that the flags name. Raises UserError."""
    if args.pretrained and not args.model:
        raise UserError("--pretrained needs --model, an open_clip name")
    if args.measured < 1:
        raise UserError(f"--measured {args.measured}: must be at least 1")
    model = assets.MODEL if args.model == "embedded" else args.model
    test = args.test
    if test is None:
        about = rankings.open(args.rankings).settings.get("about", {})
        test = assets.TEST_SHARDS if (model or about.get("model")) == assets.MODEL else []
    opened, loaded = open_images(
        args.rankings,
        None if args.shards is None else shards.expand(args.shards),
        model,
        args.pretrained,
        args.dtype,
        args.held_out,
        args.seed,
        shards.expand(test) if test else [],
        args.measured,
        args.cache_features,
    )
    if left_out := opened.pairs.shards_without_rankings:
        print(
            f"warning: {len(left_out)} of the shards have no rankings in {args.rankings}, {left_out[0]} the first; "
            "training goes without them",
            file=sys.stderr,
        )
    return opened, loaded


def add_training(parser: argparse.ArgumentParser, default: TrainingConfig) -> None:
    """The flags of `config`."""
    add = parser.add_argument_group("training").add_argument
    add("--out", default=default.out, metavar="FOLDER", help="local, s3:// or gs:// (%(default)s)")
    add("--epochs", type=float, default=default.epochs, help="times that the images are gone over (%(default)g)")
    add("--batch", type=int, default=default.batch, help="images that a worker takes in at a time (%(default)s)")
    add("--accumulate", type=int, default=default.accumulate, help="batches a worker and step (%(default)s)")
    add("--learning-rate", type=float, default=default.learning_rate, help="the highest (%(default)g)")
    add("--seed", type=int, default=default.seed, help="(%(default)s)")
    add("--deepspeed", metavar="FILE", help="DeepSpeed's configuration (patchrank/training/deepspeed.json)")
    add("--checkpoints", type=int, default=default.checkpoints, help="in the course of it (%(default)s)")
    add("--max-failures", type=int, default=default.max_failures, help="times to replace lost workers (%(default)s)")

    add = parser.add_argument_group("machines").add_argument
    add("--address", help="Ray cluster to join: auto or HOST:PORT (RAY_ADDRESS, else a local Ray)")
    add("--workers", type=int, help="processes that train together (as before; at first one a GPU, else one a machine)")
    add("--cpus-per-worker", type=int, help="cores of a worker")
    add("--gpus-per-worker", type=float, help="1, or 0 for none (1 if the cluster has any)")


def config(args: argparse.Namespace) -> TrainingConfig:
    """How the flags say to train."""
    return TrainingConfig(**{name: getattr(args, name) for name in TrainingConfig.__dataclass_fields__})


def show(summary: TrainingSummary, record: Mapping[str, Any]) -> None:
    """Print what a training did, and the figures before and after; `record` is the json beside its weights."""
    done = summary.steps - summary.resumed
    if summary.resumed:
        print(f"steps         {summary.resumed} of {summary.steps} were done before")
    if done:
        print(f"steps         {done} in {summary.seconds:.0f} s")
    samples = record["samples"]
    print(
        f"samples       {samples['joined']} with a ranking, {samples['without_ranking']} without, "
        f"{samples['without_image']} rankings without an image, {samples['undecodable']} images that cannot be decoded"
    )
    for shard, error in record["errors"].items():
        print(f"warning: {shard}: {error}", file=sys.stderr)
    show_figures(summary.before, summary.after)


def show_figures(before: Figures, after: Figures) -> None:
    """Print figures side by side."""
    if not after:
        return
    width = max(len(name) for name in after)
    print(f"\n{'':<{width}}  {'before':>8}  {'after':>8}")
    for name, value in after.items():
        print(f"{name:<{width}}  {before.get(name, float('nan')):>8.4f}  {value:>8.4f}")
    print()
