"""Train the predictor: golden rankings in, a small network out that predicts them.

    python jobs/train_predictor.py                       on what jobs/search.py left in ./rankings
    python jobs/train_predictor.py --rankings s3://bucket/rankings --out s3://bucket/predictor --workers 8
    tensorboard --logdir predictor                       meanwhile, or afterwards

Stopped at any time, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cluster import training_flags
from cluster.train import TrainingConfig, train
from patchrank.errors import run
from patchrank.model import artifacts
from patchrank.pruning.predictor import LOSSES, NAME, TARGETS, PredictorConfig
from patchrank.training.tasks import PredictorTask


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = argparse.ArgumentParser(
        prog="jobs/train_predictor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training_flags.add_images(result)
    add = result.add_argument_group("predictor").add_argument
    add("--loss", default="bce", help=f"{', '.join(LOSSES)} (%(default)s)")
    add("--target", help=f"what it learns, {' or '.join(TARGETS)} (score after the paper's search, else rank)")
    add("--width", type=int, default=64, help="channels are projected to this first; 0 mixes all (%(default)s)")
    add("--expansion", type=float, default=2.0, help="hidden width as a multiple of the input (%(default)g)")
    add("--no-class-token", action="store_true", help="leave the class token out of its input")
    add("--keep", type=float, default=0.5, help="keep rate at which it is measured (%(default)s)")
    training_flags.add_training(result, TrainingConfig("predictor", epochs=10, batch=64, learning_rate=3e-3))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print."""
    args = parser().parse_args(argv)
    images, _ = training_flags.images(args)
    tower = images.tower
    shape = PredictorConfig(tower.grid, tower.width, args.width or None, args.expansion, not args.no_class_token)
    search = images.pairs.corpus.settings["search"]
    # The scores of other searches are of different steps, and cannot be compared with each other; probabilities are 1,
    # as the tables keep them, where the model is sure.
    comparable = search["steps"] == 1 and search["rank_by"] == "scores" and search["score"] == "preservation"
    task = PredictorTask(images, shape, args.loss, args.target or ("score" if comparable else "rank"), args.keep)
    try:
        summary = train(task, training_flags.config(args))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last checkpoint in {args.out}", file=sys.stderr)
        raise
    _, record = artifacts.load(summary.folder, NAME)
    training_flags.show(summary, record)
    print(f"predictor     {summary.folder}")
    print(f"next          python jobs/train_tokens.py --rankings {args.rankings} --predictor {args.out} --keep 0.6")
    return 0


if __name__ == "__main__":
    run(main)
