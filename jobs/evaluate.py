"""Evaluate ways of pruning side by side: accuracy, cosine, multiply-adds and time against keep rate.

    python jobs/evaluate.py --predictor predictor --tokens tokens --save-bundle bundle       as `make pipeline` does
    python jobs/evaluate.py --shards data/test.tar --model ViT-B-16 --pretrained openai --bundle my-bundle \\
        --classes data/classnames.json --out my-evaluation

The images should be such that nothing was trained on them: rankings of a search of their own, or, with --held-out, the
share that training left out. Stopped at any time, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from cluster.evaluate import EvaluationJob, EvaluationSummary
from cluster.evaluate import run as evaluate
from patchrank import assets, flags
from patchrank.errors import UserError, run, stoppable
from patchrank.evaluation.record import RECALLS
from patchrank.pruning.comparison import render
from patchrank.store import rankings


def parser(prog: str = "jobs/evaluate.py") -> argparse.ArgumentParser:
    """The flags of `EvaluationJob`."""
    return flags.parser(prog, __doc__, EvaluationJob)


def job(args: argparse.Namespace) -> EvaluationJob:
    """The job that the flags describe; the model is that of the rankings where none is named. Raises UserError."""
    found = flags.read(EvaluationJob, args)
    model, classes = found.model, found.classes
    folder = found.rankings or (None if found.shards else "test-rankings")
    if folder is not None and model.name is None:
        about = rankings.open(folder).settings.get("about", {})
        model = replace(model, name=about.get("model"), pretrained=about.get("pretrained"))
    if model.name is None:
        raise UserError("--shards needs --model: an open_clip name, or embedded for the model in this project")
    embedded = assets.EMBEDDED.get(model.name, model.name)
    if embedded in assets.EMBEDDED.values():
        model = replace(model, name=embedded)
        if folder is None and not classes.given:
            classes = replace(classes, class_names=str(assets.CLASSNAMES))
    return replace(found, rankings=folder, model=model, classes=classes)


def show(summary: EvaluationSummary, save_bundle: str | None, prog: str) -> None:
    """Print the figures, what failed, and what to do next."""
    found = summary.record
    assert found is not None  # the evaluation has come to its end
    print(render(found.figures))
    width = max(len(one.method) for one in found.figures)
    print(f"\n{'multiply-adds, G':<{width + 7}}")
    for one in found.figures:
        counted = "" if one.counted == one.multiply_adds else f", but PyTorch counts {(one.counted or 0) / 1e9:.4f}"
        print(f"{one.method:<{width}} {one.keep:>5g} {one.multiply_adds / 1e9:10.4f}{counted}")
    if found.latency:
        print(f"\n{'speed-up':<{width}}  keep  batch      ms  unpruned ms  measured  by multiply-adds")
    for time in found.latency:
        times = f"{1000 * time.seconds:8.1f}{1000 * time.unpruned_seconds:13.1f}{time.speedup:10.2f}"
        print(f"{time.method:<{width}} {time.keep:>5g} {time.batch:>6}{times}{time.predicted or 0:17.2f}")
    if found.retrieval:
        print(f"\n{'retrieval, %':<{width}}  keep  image to text at 1, 5, 10   text to image at 1, 5, 10")
    for way in found.retrieval:
        recalls = (
            "   ".join(f"{100 * (by[k] or 0):5.1f}" for k in RECALLS) for by in (way.image_to_text, way.text_to_image)
        )
        print(f"{way.method:<{width}} {way.keep:>5g}  " + "      ".join(recalls))
    if found.neighbours:
        head = "queries alone   index alone   both   index by half   itself first, %"
        print(f"\n{'neighbours, %':<{width}}  keep  of {found.neighbours[0].nearest} kept, pruned: {head}")
    for near in found.neighbours:
        shares = (near.pruned_queries, near.pruned_index, near.pruned, near.mixed)
        kept = "".join(f"{100 * share:10.1f}" for share in shares)
        firsts = f"{100 * near.first_by_pruned_queries:.1f}, {100 * near.first_in_pruned_index:.1f}"
        print(f"{near.method:<{width}} {near.keep:>5g}{kept}   {firsts}")
    print(f"\n{found.images} images of {len(found.shards)} shards; timed on {found.device}")
    print(f"evaluation    {summary.folder}")
    for shard, reason in sorted(summary.failures.items()):
        print(f"error: {shard}: {reason}", file=sys.stderr)
    if save_bundle:
        print(f'bundle        {save_bundle}: patchrank.prune(model, "{save_bundle}")')
    print(f"next          {flags.command(prog, 'report')} {summary.folder}")


def main(argv: Sequence[str] | None = None, prog: str = "jobs/evaluate.py") -> int:
    """Parse, evaluate, print; 1 where a shard failed."""
    parsed = job(parser(prog).parse_args(argv))
    with stoppable(f"finished shards are in {parsed.out}: the same command goes on from there"):
        summary = evaluate(parsed)
    show(summary, parsed.pruning.save_bundle, prog)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    run(main)
