"""How sure is an evaluation? Ways of pruning against the unpruned model and against each other, image by image.

    python benchmarks/paired.py evaluation
    python benchmarks/paired.py caltech-evaluation --against token-merging

A line a method and keep rate: top-1, and how much higher or lower it is than that of --against (its own keep rate's),
with the 95 % interval of that difference, paired by image (normal approximation); the share of the unpruned model's
answers that are kept; the mean cosine, and its difference likewise.
"""

from __future__ import annotations

import argparse

import duckdb

from patchrank.errors import UserError, run
from patchrank.pruning.methods import UNPRUNED

_PAIRS = """
    SELECT one.method, one.keep, one.cosine, one.cosine::DOUBLE - other.cosine AS cosine_more,
        (one.prediction = one.label)::INT AS hit, (one.prediction = whole.prediction)::INT AS answer_kept,
        hit - (other.prediction = other.label)::INT AS hit_more
    FROM read_parquet($files) AS one
    JOIN read_parquet($files) AS whole ON (whole.shard, whole.key) = (one.shard, one.key) AND whole.method = $unpruned
    JOIN read_parquet($files) AS other ON (other.shard, other.key) = (one.shard, one.key) AND other.method = $against
        AND (other.keep = one.keep OR $against = $unpruned)
    WHERE one.method NOT IN ($unpruned, $against)
"""
_SUMS = f"""
    SELECT method, keep, count(*), 100 * avg(hit), 100 * avg(hit_more),
        196 * stddev_samp(hit_more) / sqrt(count(hit_more)), 100 * avg(answer_kept), avg(cosine), avg(cosine_more),
        1.96 * stddev_samp(cosine_more) / sqrt(count(*))
    FROM ({_PAIRS}) GROUP BY method, keep ORDER BY method, keep DESC
"""


def main() -> int:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", help="what jobs/evaluate.py left, on this machine")
    parser.add_argument("--against", default=UNPRUNED, help="a method (%(default)s)")
    args = parser.parse_args()
    named = {"files": f"{args.evaluation}/*.parquet", "unpruned": UNPRUNED, "against": args.against}
    try:
        found = duckdb.execute(_SUMS, named).fetchall()
    except duckdb.Error as error:
        raise UserError(f"{args.evaluation}: holds no evaluation ({str(error).splitlines()[0]})") from None
    if not found:
        raise UserError(f"--against {args.against}: there is no such method in {args.evaluation}")
    print(f"against {args.against}")
    print(f"{'method':<18}keep  images  top-1, %       more, %  answers kept, %  cosine              more")
    for method, keep, images, hit, more, half, kept, cosine, cosine_more, cosine_half in found:
        top1 = " " * 42 if hit is None else f"{hit:8.1f}  {more:+6.1f} +-{half or 0:4.1f}  {kept:15.1f}"
        print(
            f"{method:<18}{keep:>4g}{images:>8}  {top1}  {cosine:6.4f}  {cosine_more:+7.4f} +- {cosine_half or 0:.4f}"
        )
    return 0


if __name__ == "__main__":
    run(main)
