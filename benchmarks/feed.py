"""Whether images are read as fast as the frozen model takes them in: the reader alone, the model alone, and both.

    python benchmarks/feed.py --model ViT-B-16 --pretrained openai --shards 's3://bucket/train-{000000..000009}.tar'

"reader": batches as a training reads them, for a stub of a model that takes no time. "model": steps of learning through
the frozen model, on a batch that is there. "both": a training. On a GPU "both" should be 0.9 of "model" at least; on a
CPU the cores that decode are those that compute, and it cannot be more than 1 / (1 + model / reader).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from patchrank import clock
from patchrank.errors import UserError, run
from patchrank.pruning.predictor import PredictorConfig
from patchrank.training.images import ImageSource, open_images
from patchrank.training.lessons import Lesson
from patchrank.training.tasks import PredictorTask


def rate(step: Callable[[Lesson], Any], lessons: Iterator[Lesson], seconds: float, device: torch.device) -> float:
    """Images a second; the first batch, which warms up, is not counted."""
    step(next(lessons))
    images, start = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - start < seconds:
        lesson = next(lessons)
        clock.seconds(partial(step, lesson), device)  # waits for the device
        images += len(lesson.images.keys)
    return images / (time.perf_counter() - start)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, metavar="SHARDS", help="as for jobs/search.py")
    parser.add_argument("--model", default="ViT-B-16", help="as for jobs/search.py (%(default)s)")
    parser.add_argument("--pretrained", metavar="TAG", help="as for jobs/search.py")
    parser.add_argument("--dtype", default="auto", help="of the frozen model (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each, in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    for name in ("batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    source = ImageSource(
        rankings=None, shards=args.shards, model=args.model, pretrained=args.pretrained, dtype=args.dtype, held_out=0.0
    )
    images, _ = open_images(source)
    task = PredictorTask(images, config=PredictorConfig.of(images.tower))
    task.steps_per_epoch(args.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = task.start(device, 1000).to(device)

    def learn(lesson: Lesson) -> None:
        task.loss(module, lesson).backward()

    def read() -> Iterator[Lesson]:
        return task.batches(0, 1, args.batch, 1, 0)

    rates: dict[str, list[float]] = {"reader": [], "model": [], "both": []}
    for _ in range(args.rounds):
        rates["reader"].append(rate(lambda lesson: None, read(), args.seconds, device))
        rates["model"].append(rate(learn, itertools.repeat(next(read())), args.seconds, device))
        rates["both"].append(rate(learn, read(), args.seconds, device))
    for name, found in rates.items():
        print(f"{name:<8}{statistics.median(found):10.1f} images/s")
    shares = [both / model for both, model in zip(rates["both"], rates["model"], strict=True)]
    print(f"both / model  {statistics.median(shares):.3f}, {min(shares):.3f} to {max(shares):.3f}")
    return 0


if __name__ == "__main__":
    run(main)
