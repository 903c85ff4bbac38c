"""Train learnable tokens with pruning on: they make up for what the pruned tokens would have told the model.

    python jobs/train_tokens.py                          with what jobs/train_predictor.py left in ./predictor
    python jobs/train_tokens.py --predictor predictor --keep 0.5 --text

Stopped at any time, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cluster import training_flags
from cluster.train import TrainingConfig, train
from patchrank.errors import UserError, run
from patchrank.model import artifacts
from patchrank.pruning import predictor
from patchrank.pruning.prompts import NAME, PLACES, PromptedText, TokensConfig
from patchrank.training.tasks import TokensTask


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = argparse.ArgumentParser(
        prog="jobs/train_tokens.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training_flags.add_images(result)
    add = result.add_argument_group("tokens").add_argument
    add("--predictor", default="predictor", metavar="FOLDER", help="what jobs/train_predictor.py left (%(default)s)")
    add("--keep", type=float, default=0.6, help="share of the patch tokens that stay (%(default)s)")
    add("--tokens", type=int, default=16, help="learnable tokens (%(default)s)")
    add("--place", default="cut", help=f"where they join the patches: {' or '.join(PLACES)} (%(default)s)")
    add("--text", action="store_true", help="learn text tokens, too, with the visual ones as their linear map")
    training_flags.add_training(result, TrainingConfig("tokens", epochs=5, batch=64, learning_rate=2e-2))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print."""
    args = parser().parse_args(argv)
    images, model = training_flags.images(args)
    found, _ = predictor.load(args.predictor, images.tower, model.weights)
    prompted = None
    if args.text:
        names = images.pairs.corpus.class_names
        if names is None:
            raise UserError(f"--text: {args.rankings} does not know the names of its classes; search with --classes")
        prompted = PromptedText(model, names, args.tokens)
    shape = TokensConfig(images.tower.width, args.tokens, args.place, None if prompted is None else prompted.width)
    task = TokensTask(images, shape, found, args.keep, prompted)
    try:
        summary = train(task, training_flags.config(args))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last checkpoint in {args.out}", file=sys.stderr)
        raise
    _, record = artifacts.load(summary.folder, NAME)
    training_flags.show(summary, record)
    print(f"tokens        {summary.folder}")
    compared = f"--rankings {args.rankings} --held-out {args.held_out}" if args.held_out else "--rankings TEST-RANKINGS"
    print(f"next          python jobs/evaluate.py {compared} --predictor {args.predictor} --tokens {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
