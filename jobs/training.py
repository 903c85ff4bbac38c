"""What the two training jobs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cluster.train import TrainingSummary, train
from cluster.training_estimate import TrainingEstimate, estimate
from cluster.training_job import TrainingConfig
from cluster.training_worker import Task
from patchrank import flags
from patchrank.errors import stoppable
from patchrank.flags import flag
from patchrank.model import artifacts
from patchrank.model.loading import Model
from patchrank.training.images import ImageSource, TrainingImages, open_images
from patchrank.training.outcome import Figures
from patchrank.training.tasks import PredictorTask, TokensTask


@dataclass(frozen=True)
class Asked:
    """What is asked for beside a training."""

    estimate: bool = flag(False, "tell how long it would take, and write nothing", group="training")


def opened(source: ImageSource, seed: int) -> tuple[TrainingImages, Model]:
    """As `open_images`; says which shards have no rankings."""
    images, model = open_images(source, seed)
    if images.ranked is not None and (unranked := images.ranked.shards_without_rankings):
        print(
            f"warning: {len(unranked)} of the shards have no rankings in {source.rankings}, {unranked[0]} the first; "
            "only the model teaches their images",
            file=sys.stderr,
        )
    return images, model


def show_estimate(found: TrainingEstimate) -> None:
    """Print what a training would cost."""
    rate = found.images / found.step_seconds
    print(f"steps         {found.steps} of {found.images} images")
    print(f"a step        {found.step_seconds:.2f} s, {rate:.1f} images/s, {found.places.actors} workers")
    print(f"evaluations   {found.evaluations} of {found.evaluation_seconds:.0f} s")
    memory = f"{found.memory / 1e9:.2f} GB" + (f", {found.gpu_memory / 1e9:.2f} GB of GPU" if found.gpu_memory else "")
    print(f"memory        {memory} a worker, each with {found.places}")
    print(f"time          {tqdm.format_interval(found.seconds)} (h:mm:ss)")
    print(f"device-hours  {found.device_hours:.2f}")


def estimated(task: PredictorTask | TokensTask, config: TrainingConfig, args: argparse.Namespace) -> bool:
    """Whether an estimate was asked for; prints it then."""
    if flags.read(Asked, args).estimate:
        task.images.features = None  # nothing is written, so it tells the time without them
        show_estimate(estimate(task, config))
        return True
    return False


def same_images(args: argparse.Namespace) -> str:
    """The flags that name the rankings, images and model of a training, for the job that goes on with them."""
    wanted = [f"--rankings {args.rankings}"]
    if args.rankings == "none":
        wanted += [f"--shards {' '.join(args.shards)}", f"--model {args.model}"]
        wanted += [f"--pretrained {args.pretrained}"] if args.pretrained else []
    return " ".join(wanted)


def trained(task: Task, config: TrainingConfig, artifact: str) -> TrainingSummary:
    """As `train`; prints what came of it. `artifact` is the name of what the task saves."""
    with stoppable(f"the same command goes on from the last checkpoint in {config.out}"):
        summary = train(task, config)
    _, record = artifacts.load(summary.folder, artifact)
    show(summary, record)
    print(f"{artifact:<14}{summary.folder}")
    return summary


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
