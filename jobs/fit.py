"""From a folder of photos to a faster CLIP: train through the model, evaluate, write the bundle.

    python jobs/fit.py photos --model ViT-B-16 --pretrained openai --out my-bundle
    python jobs/fit.py 's3://bucket/train-{000..127}.tar' --model ViT-B-16 --pretrained openai --work s3://bucket/fit

Photos need neither labels nor rankings. A share of them is held out, and the pruned model is compared on it with the
unpruned one, class attention and token merging, at equal multiply-adds. Stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from cluster.fit import Fit, FitJob
from patchrank import assets, flags
from patchrank.errors import run, stoppable
from patchrank.evaluation.neighbours import sentence
from patchrank.evaluation.record import Record
from patchrank.flags import flag
from patchrank.model.transformers_model import PREFIX as HF
from patchrank.model.transformers_model import loader_of, path_of
from patchrank.pruning.comparison import render


@dataclass(frozen=True)
class Only:
    """What is done instead of a fit."""

    estimate: bool = flag(False, "tell how long it takes, and train nothing", group="training")


def parser(prog: str = "jobs/fit.py") -> argparse.ArgumentParser:
    """The flags of `FitJob`."""
    found = flags.parser(prog, __doc__, FitJob, Only)
    found.add_argument("images", nargs="+", help="folder of images, or shards as for jobs/search.py")
    return found


def main(argv: Sequence[str] | None = None, prog: str = "jobs/fit.py") -> int:
    """Parse, fit, print."""
    args = parser(prog).parse_args(argv)
    job = flags.read(FitJob, args, images=tuple(args.images))
    fit = Fit(job)
    for skipped in fit.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    learnt_from, held_out = fit.images.everything.rows
    print(f"images        {learnt_from} to learn from, {held_out} held out")
    if args.estimate or not fit.begun:
        print(f"time          about {tqdm.format_interval(fit.seconds())} (h:mm:ss)", flush=True)
    if args.estimate:
        return 0
    work = job.place("").rstrip("/")
    reporting = shlex.join([job.place("evaluation"), "--out", job.place("report"), "--keep", f"{job.keep:g}"])
    with stoppable(f"what is done is in {work}: the same command goes on from there"):
        record = fit.run(f"{flags.command(prog, 'report')} {reporting}")
    show(record, job)
    print(f"report        {job.place('report')}/index.html")
    print(f"work          {work}: can be deleted")
    print(f"bundle        {job.out}: these lines use it\n\n{lines(job)}")
    return 0


def show(record: Record, job: FitJob) -> None:
    """Print what held-out images say."""
    print(f"\n{render(record.figures)}\n")
    for time in record.latency:
        print(f"{time.method}: {time.speedup:.2f} times as fast at keep {time.keep:g} in batches of {time.batch}")
    near = [one for one in record.neighbours if one.keep == job.keep and one.method.startswith("predictor")]
    print(f"\n{sentence(near[-1])}\n" if near else "")


def lines(job: FitJob) -> str:
    """How to use the bundle, in Python."""
    name, file = assets.EMBEDDED.get(str(job.model.name), job.model.name), job.model.pretrained
    if file and os.path.isfile(
        file
    ):  # which open_clip itself may not read: an image tower alone, a trainer's checkpoint
        return (
            "import patchrank\n"
            f'loaded = patchrank.models.load("{name}", "{file}")\n'
            f'model, preprocess = patchrank.prune(loaded.clip, "{job.out}", keep={job.keep:g}), loaded.preprocess()'
        )
    if name is not None and name.startswith(HF):
        return (
            "import patchrank, transformers\n"
            f'model = transformers.{loader_of(name)}.from_pretrained("{path_of(name)}").eval()\n'
            f'patchrank.prune(model, "{job.out}", keep={job.keep:g})'
        )
    model = f'"{name}"' + (f', pretrained="{job.model.pretrained}"' if job.model.pretrained else "")
    return (
        "import open_clip, patchrank\n"
        f"model, _, preprocess = open_clip.create_model_and_transforms({model})\n"
        f'patchrank.prune(model, "{job.out}", keep={job.keep:g})'
    )


if __name__ == "__main__":
    run(main)
