"""Search golden rankings: shards in, Parquet out.

    python jobs/search.py                                     the embedded model on the embedded shards
    python jobs/search.py --model ViT-B-16 --pretrained openai --shards 'data/train-{000000..001280}.tar' --out rankings
    ray job submit --working-dir . -- python jobs/search.py --shards s3://bucket/train --out s3://bucket/rankings ...

Stopped at any time, the same command goes on where it was. Every shard becomes one Parquet file in the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from cluster import job_flags
from cluster.estimate import Estimate, estimate
from cluster.rank import SearchJob, SearchSummary, search
from patchrank import assets
from patchrank.errors import UserError, run
from patchrank.search.config import STRATEGIES, SearchConfig
from patchrank.search.objective import SCORES


def parser() -> argparse.ArgumentParser:
    """The flags, with the defaults of `SearchJob` and `SearchConfig`."""
    result = argparse.ArgumentParser(
        prog="jobs/search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument_group("input and output").add_argument
    add("--shards", nargs="+", metavar="SHARDS", help="WebDataset tars: path, {000..123}, glob, folder or list file")
    add("--out", default="rankings", metavar="FOLDER", help="folder of rankings, local, s3:// or gs:// (%(default)s)")
    add("--limit", type=int, metavar="N", help="rank only the first N samples of each shard")
    add("--max-pixels", type=int, default=SearchJob.max_pixels, metavar="N", help="reject larger images (%(default)s)")
    add("--estimate", action="store_true", help="tell what it would cost, from some seconds of timing; write nothing")

    add = result.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="open_clip name, hf-hub:ORG/REPO, local-dir:FOLDER or embedded")
    add("--pretrained", metavar="TAG", help="open_clip tag or weights file, which may hold the image tower alone")
    add("--cut", type=int, metavar="L", help="tokens leave before this block, counted from 0 (a quarter of the depth)")
    add("--dtype", default=SearchJob.dtype, help="auto, float32, bfloat16 or float16 (%(default)s)")

    job_flags.add_classes(result, "classes, for predictions and for the scores 'label' and 'confidence'")

    default = SearchConfig()
    add = result.add_argument_group("search").add_argument
    add("--score", default=default.score, help=f"what a ranking keeps: {', '.join(SCORES)} (%(default)s)")
    add("--keep", type=float, default=default.keep, help="search until this share of tokens is left (%(default)s)")
    add("--steps", type=int, help="search at most so many steps; 1 is the one-shot search")
    add("--remove-per-step", type=int, default=default.remove_per_step, help="tokens that leave a step (%(default)s)")
    add("--block", type=int, default=default.block, help="side of the sliding blocks, in tokens (%(default)s)")
    add("--rescore", default=default.rescore, help="times remove-per-step tokens scored again, or 'all' (%(default)s)")
    rank_by = ", ".join(STRATEGIES)
    add("--rank-by", default=default.rank_by, help=f"how scores become a ranking: {rank_by} (%(default)s)")
    add("--proposals", type=int, default=default.proposals, help="by effects: sets that a step tries (%(default)s)")
    add("--keep-rates", type=float, nargs="*", default=list(SearchJob.keep_rates), help="to predict at (%(default)s)")

    add = job_flags.add_machines(result, "searches").add_argument
    add("--candidates-per-batch", type=int, help="candidates in a forward pass; halved when memory runs out")
    return result


def job(args: argparse.Namespace) -> SearchJob:
    """The job that the flags describe. Raises UserError for flags that do not go together."""
    embedded = args.model == "embedded"
    if args.shards and not args.model:
        raise UserError("--shards needs --model: an open_clip name, or embedded for the model in this project")
    if args.model and not args.shards:
        raise UserError("--model needs --shards: which images should it rank?")
    if args.pretrained and (embedded or not args.model):
        raise UserError("--pretrained needs --model, an open_clip name")
    job_flags.check_machines(args, ("limit", "max_pixels", "candidates_per_batch"))
    try:
        rescore = None if args.rescore == "all" else int(args.rescore)
    except ValueError:
        raise UserError(f"--rescore {args.rescore}: must be a number or 'all'") from None
    own_classes = args.classes or args.class_embeddings or args.prototypes or (args.model and not embedded)
    return SearchJob(
        shards=args.shards or assets.TRAIN_SHARDS,
        out=args.out,
        model=assets.MODEL if embedded or not args.model else args.model,
        pretrained=args.pretrained,
        cut=args.cut,
        dtype=args.dtype,
        config=SearchConfig(
            args.score,
            args.keep,
            args.steps,
            args.remove_per_step,
            args.block,
            rescore,
            args.rank_by,
            args.proposals,
        ),
        keep_rates=args.keep_rates,
        class_names=args.classes if own_classes else str(assets.CLASSNAMES),
        templates=args.templates,
        class_embeddings=args.class_embeddings,
        prototypes=args.prototypes,
        limit=args.limit,
        max_pixels=args.max_pixels,
        address=args.address,
        actors=args.actors,
        cpus_per_actor=args.cpus_per_actor,
        gpus_per_actor=args.gpus_per_actor,
        images_per_batch=args.images_per_batch,
        candidates_per_batch=args.candidates_per_batch,
    )


def show(summary: SearchSummary, keep_rates: Sequence[float]) -> None:
    """Print what was done, what failed, and what to do next."""
    images, rejects, candidates = (summary.total(name) for name in ("images", "rejects", "candidates"))
    seconds = summary.seconds
    if summary.resumed:
        print(f"shards        {summary.resumed} of {summary.shards} were finished before")
    if seconds:
        print(f"images        {images} ranked, {rejects} rejected, in {seconds:.1f} s: {images / seconds:.2f} images/s")
        print(f"candidates    {candidates}: {candidates / seconds:.0f} candidates/s")
    if images:
        cosines = zip(keep_rates, summary.mean_cosine(), strict=True)
        print("cosine        " + ", ".join(f"{mean:.4f} at keep {keep}" for keep, mean in cosines))
        first, last = (f"{size / 1e9:.2f} GB" for size in summary.memory())
        print(f"memory        peak of an actor: {first} after its first shard, {last} after its last")
        print(f"disk          {sum(report.bytes for report in summary.reports.values()) / images:.0f} bytes an image")
    print(f"rankings      {summary.folder}")
    for shard, reason in sorted(summary.failures.items()):
        print(f"error: {shard}: {reason}", file=sys.stderr)
    if summary.failures:
        print("error: put these shards right and run the same command again", file=sys.stderr)
    if rejects:
        print(f"next          python jobs/query.py {summary.folder} rejects")
    print(f"next          python jobs/query.py {summary.folder} accuracy")


def show_estimate(found: Estimate) -> None:
    """Print what the search would cost."""
    images = f"{found.images} in {found.shards - found.finished} shards"
    if found.sampled < found.shards - found.finished:
        images += f", from the {found.sampled} that were counted"
    print(f"images        {images}" + (f"; {found.finished} shards are finished" if found.finished else ""))
    print(f"an image      {found.candidates} candidates, {found.multiply_adds / 1e9:.1f} G multiply-adds")
    rate = found.multiply_adds / found.image_seconds / 1e9 if found.image_seconds else 0
    print(f"an actor      {found.image_seconds:.3f} s an image, {rate:.0f} G multiply-adds/s, with {found.places}")
    memory = f"{found.memory / 1e9:.2f} GB" + (f", {found.gpu_memory / 1e9:.2f} GB of GPU" if found.gpu_memory else "")
    print(f"memory        {memory} an actor")
    print(f"time          {tqdm.format_interval(found.seconds)} (h:mm:ss) on {found.places.actors} actors")
    print(f"device-hours  {found.device_hours:.2f}")
    print(f"disk          {found.bytes / 1e6:.1f} MB of Parquet at most")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, search or estimate, print; 1 where a shard failed."""
    args = parser().parse_args(argv)
    parsed = job(args)
    if args.estimate:
        show_estimate(estimate(parsed))
        return 0
    try:
        summary = search(parsed)
    except KeyboardInterrupt:
        print(f"stopped; finished shards are in {parsed.out}: the same command goes on from there", file=sys.stderr)
        raise
    show(summary, parsed.keep_rates)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    run(main)
