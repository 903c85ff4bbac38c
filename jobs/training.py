"""What the two training jobs share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cluster.train import TrainingSummary, train
from cluster.training_job import TrainingConfig
from cluster.training_worker import Task
from patchrank.errors import stoppable
from patchrank.model import artifacts
from patchrank.model.loading import Model
from patchrank.training.images import ImageSource, TrainingImages, open_images
from patchrank.training.outcome import Figures


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
