"""Ways of pruning side by side: golden rankings, class-token attention, random, a predictor, a predictor with tokens.

    python jobs/compare.py --rankings test-rankings --predictor predictor --tokens tokens
    python jobs/compare.py --rankings rankings --held-out 0.1 --keep-rates 0.6 0.5

Prints top-1, cosine to the embedding of the whole image and matching rate against keep rate. The rankings are to be of
images that nothing was trained on: of a search of their own, or, with --held-out, the share that training left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from cluster import training_flags
from cluster.rank import CLASSES_FILE
from cluster.training_tasks import EVALUATION_BATCH, open_images
from patchrank import assets, baselines, classes, predictor, prompts, shards, storage
from patchrank.comparison import Comparison, Method, render
from patchrank.errors import UserError, run


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = argparse.ArgumentParser(
        prog="jobs/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training_flags.add_rankings(result, "test-rankings")
    add = result.add_argument
    add("--held-out", type=float, default=1.0, metavar="SHARE", help="of the images, as in training (all)")
    add("--limit", type=int, metavar="N", help="compare on the first N images")
    add("--predictor", metavar="FOLDER", help="what jobs/train_predictor.py left")
    add("--tokens", metavar="FOLDER", help="what jobs/train_tokens.py left")
    add("--keep-rates", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.4], help="shares that stay (%(default)s)")
    add("--match", type=int, metavar="M", help="tokens that the matching rate looks at (as many as stay)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, print."""
    args = parser().parse_args(argv)
    if args.tokens and not args.predictor:
        raise UserError("--tokens needs --predictor, which tells the tokens that stay")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    images, model = open_images(
        args.rankings,
        None if args.shards is None else shards.expand(args.shards),
        assets.MODEL if args.model == "embedded" else args.model,
        args.pretrained,
        args.dtype,
        args.held_out,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images.start(device)
    tower = images.tower
    if args.match is not None and not 0 < args.match <= tower.num_tokens:
        raise UserError(f"--match {args.match}: must be 1 to {tower.num_tokens}")
    methods = {"golden": Method(baselines.golden)}
    if tower.cut:
        methods["class attention"] = Method(baselines.ClassAttention(tower))
    methods["random"] = Method(baselines.random)
    if args.predictor:
        usefulness = baselines.predicted(predictor.load(args.predictor, tower, model.weights)[0].to(device))
        methods["predictor"] = Method(usefulness)
        if args.tokens:
            tokens, record = prompts.load(args.tokens, tower, model.weights)
            own = None
            if record.get("classes"):
                own = classes.load(storage.join(args.tokens, CLASSES_FILE), record["classes"], record["class_names"])
                if own is None:
                    raise UserError(f"{args.tokens}: its {CLASSES_FILE} is missing or of other tokens; train again")
            embeddings = None if own is None else own.embeddings.to(device)
            methods["predictor, tokens"] = Method(usefulness, tokens.to(device), embeddings)
    comparison = Comparison(tower, methods, args.keep_rates, images.classes, args.match)
    batches = images.pairs.held_out(EVALUATION_BATCH, limit=args.limit)
    total = min(images.pairs.rows[1], args.limit or sys.maxsize)
    with tqdm(desc="compare", total=total, unit=" images", disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            comparison.add(batch)
            bar.update(len(batch.keys))
    rows = comparison.rows()
    if not rows[0].images:
        raise UserError(f"{args.rankings}: none of its images is held out; raise --held-out")
    print(render(rows))
    print(f"\n{rows[0].images} images of {images.pairs.corpus.folder}")
    return 0


if __name__ == "__main__":
    run(main)
