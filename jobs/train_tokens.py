"""Train learnable tokens with pruning on: they make up for what the pruned tokens would have told the model.

    python jobs/train_tokens.py                          with what jobs/train_predictor.py left in ./predictor
    python jobs/train_tokens.py --predictor predictor --keep 0.5 --text

Stopped at any time, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.training_job import TrainingConfig
from jobs import training
from patchrank import flags
from patchrank.errors import UserError, run
from patchrank.flags import flag
from patchrank.pruning import predictor, prompts
from patchrank.pruning.prompts import MERGED, NAME, PromptedText, TokensConfig
from patchrank.training.images import ImageSource
from patchrank.training.tasks import TokensTask

DEFAULT = TrainingConfig("tokens", epochs=5, batch=64, learning_rate=1e-2)


@dataclass(frozen=True)
class Beside:
    """What the tokens are trained with."""

    predictor: str = flag(
        "predictor", "what jobs/train_predictor.py left (%(default)s)", group="tokens", metavar="FOLDER"
    )
    shifts: bool = flag(True, "learn no shifts: vectors added to tokens before every block after the cut, at no cost")
    scales: bool = flag(True, "learn no scales of tokens before these blocks, only shifts")
    merged: float = flag(MERGED, "share of all patches that merge with others like them after the cut (%(default)s)")
    text: bool = flag(False, "learn text tokens, too, with the visual ones as their linear map")


def parser(prog: str = "jobs/train_tokens.py") -> argparse.ArgumentParser:
    """The flags."""
    return flags.parser(prog, __doc__, ImageSource, Beside, TokensTask, TokensConfig, DEFAULT, training.Asked)


def main(argv: Sequence[str] | None = None, prog: str = "jobs/train_tokens.py") -> int:
    """Parse, train, print."""
    args = parser(prog).parse_args(argv)
    config, source = flags.read(TrainingConfig, args), flags.read(ImageSource, args)
    images, model = training.opened(source, config.seed)
    found, _ = predictor.load(args.predictor, images.tower, model.weights)
    prompted = None
    if args.text:
        names = images.class_names
        if names is None:
            raise UserError(f"--text: {args.rankings} does not know the names of its classes; search with --classes")
        prompted = PromptedText(model, names, args.tokens)
    text_width = None if prompted is None else prompted.width
    shifted = images.tower.adapter.depth - images.tower.cut if args.shifts else 0
    beside = {"text_width": text_width, "shifted": shifted, "scaled": args.scales, "merged": args.merged}
    shape = flags.read(TokensConfig, args, width=images.tower.width, **beside)
    task = flags.read(TokensTask, args, images=images, config=shape, predictor=found, prompted=prompted)
    if training.estimated(task, config, args):
        return 0
    summary = training.trained(task, config, NAME)
    _, record = prompts.load(summary.folder)
    if record["helps"] is False:
        print(f"tokens        none: held-out images lose more with them; {args.out} has a predictor alone")
    compared = "--rankings TEST-RANKINGS"
    if args.held_out:  # an evaluation without rankings has no flag that says so
        compared = f"{training.same_images(args).removeprefix('--rankings none ')} --held-out {args.held_out}"
    following = flags.command(prog, "evaluate")
    print(f"next          {following} {compared} --predictor {args.predictor} --tokens {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
