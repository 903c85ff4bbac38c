"""Train the predictor: golden rankings in, a small network out that predicts them.

    python jobs/train_predictor.py                       on what jobs/search.py left in ./rankings
    python jobs/train_predictor.py --rankings s3://bucket/rankings --out s3://bucket/predictor --workers 8
    tensorboard --logdir predictor                       meanwhile, or afterwards

Stopped at any time, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cluster.training_job import TrainingConfig
from jobs import training
from patchrank import flags
from patchrank.errors import run
from patchrank.pruning.predictor import NAME, PredictorConfig, tower_facts
from patchrank.training.images import ImageSource
from patchrank.training.tasks import EMBEDDING, PredictorTask

DEFAULT = TrainingConfig("predictor", epochs=10, batch=64, learning_rate=3e-3)


def parser(prog: str = "jobs/train_predictor.py") -> argparse.ArgumentParser:
    """The flags."""
    return flags.parser(prog, __doc__, ImageSource, PredictorTask, PredictorConfig, DEFAULT, training.Asked)


def main(argv: Sequence[str] | None = None, prog: str = "jobs/train_predictor.py") -> int:
    """Parse, train, print."""
    args = parser(prog).parse_args(argv)
    config, source = flags.read(TrainingConfig, args), flags.read(ImageSource, args)
    images, _ = training.opened(source, config.seed)
    shape = flags.read(PredictorConfig, args, **tower_facts(images.tower))
    task = flags.read(PredictorTask, args, images=images, config=shape)
    if training.estimated(task, config, args):
        return 0
    training.trained(task, config, NAME)
    if task.objective == EMBEDDING:  # which is what tokens learn to make up for
        following = flags.command(prog, "train_tokens")
        print(f"next          {following} {training.same_images(args)} --predictor {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
