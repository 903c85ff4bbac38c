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

from cluster import job_flags
from cluster.evaluate import EvaluationJob, EvaluationSummary
from cluster.evaluate import run as evaluate
from patchrank import assets
from patchrank.errors import UserError, run
from patchrank.pruning.comparison import Row, render
from patchrank.pruning.methods import METHODS
from patchrank.store import rankings


def parser() -> argparse.ArgumentParser:
    """The flags, with the defaults of `EvaluationJob`."""
    default = EvaluationJob
    result = argparse.ArgumentParser(
        prog="jobs/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument_group("images, model and output").add_argument
    add("--rankings", metavar="FOLDER", help="golden rankings of the images (test-rankings, unless --shards is given)")
    add("--shards", nargs="+", metavar="SHARDS", help="as for jobs/search.py (all that the rankings name)")
    add("--out", default="evaluation", metavar="FOLDER", help="local, s3:// or gs:// (%(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N samples of each shard (those of --rankings, or all)")
    add("--held-out", type=float, default=1.0, metavar="SHARE", help="only images that such a training left out (all)")
    add("--max-pixels", type=int, default=default.max_pixels, metavar="N", help="reject larger images (%(default)s)")
    add("--model", metavar="NAME", help="open_clip name, hf-hub:ORG/REPO, local-dir:FOLDER or embedded")
    add("--pretrained", metavar="TAG", help="open_clip tag or weights file, which may hold the image tower alone")
    add("--cut", type=int, metavar="L", help="tokens leave before this block (that of the predictor or the rankings)")
    add("--dtype", default=default.dtype, help="auto, float32, bfloat16 or float16 (%(default)s)")

    add = result.add_argument_group("ways of pruning").add_argument
    add("--predictor", metavar="FOLDER", help="what jobs/train_predictor.py left")
    add("--tokens", metavar="FOLDER", help="what jobs/train_tokens.py left")
    add("--bundle", metavar="NAME", help="instead of both: a bundle's folder or id on the Hugging Face hub")
    add("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)} (all that there is all for)")
    add("--keep-rates", type=float, nargs="+", default=list(default.keep_rates), help="shares that stay (%(default)s)")
    add("--match", type=int, metavar="M", help="tokens that the matching rate looks at (as many as stay)")
    add("--save-bundle", metavar="FOLDER", help="write what patchrank.prune needs here, with these figures")

    job_flags.add_classes(result, "classes (those of the rankings)")

    add = result.add_argument_group("time").add_argument
    add("--batch-sizes", type=int, nargs="*", default=list(default.batch_sizes), help="to time (%(default)s)")
    add("--timed-keep-rates", type=float, nargs="+", default=list(default.timed_keep_rates), help="(%(default)s)")
    add("--timed-seconds", type=float, default=default.timed_seconds, help="a batch size, at least (%(default)s)")

    job_flags.add_machines(result, "evaluates")
    return result


def job(args: argparse.Namespace) -> EvaluationJob:
    """The job that the flags describe. Raises UserError for flags that do not go together."""
    job_flags.check_machines(args, ("limit", "max_pixels"))
    if any(size < 1 for size in args.batch_sizes):
        raise UserError(f"--batch-sizes {min(args.batch_sizes)}: must be at least 1")
    if not 0 < args.held_out <= 1:
        raise UserError(f"--held-out {args.held_out}: must be above 0 and at most 1")
    if args.tokens and not args.predictor:
        raise UserError("--tokens needs --predictor, which tells the tokens that stay")
    if args.bundle and args.predictor:
        raise UserError("--bundle and --predictor exclude each other: choose one")
    if args.save_bundle and not (args.predictor or args.bundle):
        raise UserError("--save-bundle needs --predictor: a bundle is what training left")
    if args.save_bundle and "://" in args.save_bundle:
        raise UserError(f"--save-bundle {args.save_bundle}: must be a folder of this machine")
    folder = args.rankings or (None if args.shards else "test-rankings")
    model, pretrained = args.model, args.pretrained
    if folder is not None and model is None:
        about = rankings.open(folder).settings.get("about", {})
        model, pretrained = about.get("model"), about.get("pretrained")
    if model is None:
        raise UserError("--shards needs --model: an open_clip name, or embedded for the model in this project")
    embedded = model in ("embedded", assets.MODEL)
    if args.pretrained and (embedded or not args.model):
        raise UserError("--pretrained needs --model, an open_clip name")
    own_classes = args.classes or args.class_embeddings or args.prototypes or folder or not embedded
    return EvaluationJob(
        shards=args.shards,
        out=args.out,
        model=assets.MODEL if embedded else model,
        pretrained=pretrained,
        cut=args.cut,
        dtype=args.dtype,
        rankings=folder,
        predictor=args.predictor,
        tokens=args.tokens,
        bundle=args.bundle,
        methods=args.methods,
        keep_rates=args.keep_rates,
        match=args.match,
        held_out=args.held_out,
        class_names=args.classes if own_classes else str(assets.CLASSNAMES),
        templates=args.templates,
        class_embeddings=args.class_embeddings,
        prototypes=args.prototypes,
        limit=args.limit,
        max_pixels=args.max_pixels,
        batch_sizes=args.batch_sizes,
        timed_keep_rates=args.timed_keep_rates,
        timed_seconds=args.timed_seconds,
        save_bundle=args.save_bundle,
        address=args.address,
        actors=args.actors,
        cpus_per_actor=args.cpus_per_actor,
        gpus_per_actor=args.gpus_per_actor,
        images_per_batch=args.images_per_batch,
    )


def show(summary: EvaluationSummary, save_bundle: str | None) -> None:
    """Print the figures, what failed, and what to do next."""
    content = summary.content
    names = ("method", "keep", "images", "top1", "cosine", "matching")
    print(render([Row(**{name: row[name] for name in names}) for row in content["figures"]]))
    width = max(len(row["method"]) for row in content["figures"])
    print(f"\n{'multiply-adds, G':<{width + 7}}")
    for row in content["figures"]:
        counted = "" if row["counted"] == row["multiply_adds"] else f", but PyTorch counts {row['counted'] / 1e9:.4f}"
        print(f"{row['method']:<{width}} {row['keep']:>5g} {row['multiply_adds'] / 1e9:10.4f}{counted}")
    if content["latency"]:
        print(f"\n{'speed-up':<{width}}  keep  batch      ms  unpruned ms  measured  by multiply-adds")
    for row in content["latency"]:
        times = f"{1000 * row['seconds']:8.1f}{1000 * row['unpruned_seconds']:13.1f}"
        print(
            f"{row['method']:<{width}} {row['keep']:>5g} {row['batch']:>6}{times}"
            f"{row['speedup']:10.2f}{row['predicted']:17.2f}"
        )
    if content["retrieval"]:
        print(f"\n{'retrieval, %':<{width}}  keep  image to text at 1, 5, 10   text to image at 1, 5, 10")
    for row in content["retrieval"]:
        recalls = ("   ".join(f"{100 * row[way][k]:5.1f}" for k in ["1", "5", "10"]) for way in _WAYS)
        print(f"{row['method']:<{width}} {row['keep']:>5g}  " + "      ".join(recalls))
    print(f"\n{content['images']} images of {len(content['shards'])} shards; timed on {content['device']}")
    print(f"evaluation    {summary.folder}")
    for shard, reason in sorted(summary.failures.items()):
        print(f"error: {shard}: {reason}", file=sys.stderr)
    if save_bundle:
        print(f'bundle        {save_bundle}: patchrank.prune(model, "{save_bundle}")')
    print(f"next          python jobs/report.py {summary.folder}")


_WAYS = ("image_to_text", "text_to_image")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print; 1 where a shard failed."""
    args = parser().parse_args(argv)
    parsed = job(args)
    try:
        summary = evaluate(parsed)
    except KeyboardInterrupt:
        print(f"stopped; finished shards are in {parsed.out}: the same command goes on from there", file=sys.stderr)
        raise
    show(summary, args.save_bundle)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    run(main)
