"""What golden rankings of each score keep: the embedding, the answers, the neighbours.

    python benchmarks/scores.py measure scores.parquet --model ViT-B-16 --pretrained openai --bank texts.npz:captions \\
        --images varied-000000.tar --frontier docs/frontier.parquet --shards imagenette/imagenette-000002.tar
    python benchmarks/scores.py show scores.parquet --answers texts.npz:scenes texts.npz:things

`measure` ranks photos through gates by the score "similarities", with a bank of texts and one of images, takes their
rankings by other scores from what benchmarks/frontier.py left, and embeds them, whole and pruned. After each photo the
results are written, so it can be stopped, run again with more photos or shards, and goes on from there. `show` prints
the table: the mean of 1 - cosine; of each file of texts the share of photos whose most similar one stays the same, and
the mean divergence of the softmax over them; and how many of the nearest photos stay the nearest, where the query alone
is pruned.
"""

from __future__ import annotations

import argparse
import os

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.data import shards
from patchrank.data.images import decode
from patchrank.data.progress import Progress
from patchrank.data.prototypes import embedded
from patchrank.data.shard_job import Reading
from patchrank.errors import run
from patchrank.model import classes, loading
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.objective import Objective
from patchrank.search.searcher import Searcher
from patchrank.tokens import tokens_kept

KEEP_RATES = (0.6, 0.5, 0.4)
KNOWN = ("one-shot r=2", "effects k=4", "label effects k=4", "confidence effects k=4", "gates n=16")
TEXTS, IMAGES = "similarities to texts, gates n=16", "similarities to images, gates n=16"
NEAREST = 5


def measure(args: argparse.Namespace) -> int:
    """Add to the results the photos that they do not have."""
    model = loading.load(args.model, args.pretrained)
    tower = Tower(model.visual, dtype=loading.resolve_dtype(args.dtype, False), name=args.model)
    preprocess, config = model.preprocess(), SearchConfig(score="similarities", rank_by="gates")
    banks = {TEXTS: classes.from_file(args.bank, tower.embed_dim, flag="--bank").embeddings}
    rows = pq.read_table(args.results).to_pylist() if os.path.exists(args.results) else []
    done = {(row["shard"], row["key"]) for row in rows}
    known = {
        (row["shard"], row["key"], row["search"]): row["ranking"] for row in pq.read_table(args.frontier).to_pylist()
    }
    with torch.inference_mode():
        if args.images:
            reading = Reading(preprocess, 8, args.bank_images)
            parts = [found for found, _ in embedded(tower, args.images, reading, Progress())]
            banks[IMAGES] = torch.cat(parts).float()  # (M, E)
        for uri in shards.expand(args.shards):
            for sample in shards.read(uri, args.photos):
                shard = os.path.basename(uri)
                if not isinstance(sample, shards.Sample) or (shard, sample.key) in done:
                    continue
                pixels = preprocess(decode(sample.image))[None]  # (1, 3, H, W)
                tokens = tower.prefix(pixels)
                whole = tower.suffix(tokens)  # (1, E)
                found = {name: known[shard, sample.key, name] for name in KNOWN if (shard, sample.key, name) in known}
                for name, bank in banks.items():
                    searcher = Searcher(tower, config, logit_scale=model.logit_scale, bank=bank)
                    found[name] = searcher.rank(tokens, whole).ranking[0].tolist()
                for name, ranking in found.items():
                    pruned = [_pruned(tower, tokens, ranking, keep) for keep in KEEP_RATES]
                    row = {"search": name, "ranking": ranking, "whole": whole[0].tolist(), "pruned": pruned}
                    rows.append({"shard": shard, "key": sample.key, **row})
                pq.write_table(pa.Table.from_pylist(rows), f"{args.results}.new")
                os.replace(f"{args.results}.new", args.results)
                print(f"{shard} {sample.key}: {len(found)} rankings", flush=True)
    return 0


def _pruned(tower: Tower, tokens: Tensor, ranking: list[int], keep: float) -> list[float]:
    kept = torch.tensor([ranking[: tokens_kept(tower.num_tokens, keep)]]).sort(dim=1).values
    return tower.suffix(tokens, kept)[0].tolist()


def show(args: argparse.Namespace) -> int:
    """Print the table, of the photos that all searches have."""
    by_search: dict[str, dict[tuple[str, str], dict]] = {}
    for row in pq.read_table(args.results).to_pylist():
        by_search.setdefault(row["search"], {})[row["shard"], row["key"]] = row
    photos = sorted(set.intersection(*(set(found) for found in by_search.values())))
    first = by_search[next(iter(by_search))]
    whole = F.normalize(torch.tensor([first[photo]["whole"] for photo in photos]), dim=-1)  # (P, E)
    texts = [classes.from_file(spec, whole.shape[1], flag="--answers").embeddings for spec in args.answers]
    names = [spec.rpartition(":")[2] for spec in args.answers]
    print(f"{len(photos)} photos; at keep {', '.join(map(str, KEEP_RATES))}; % of {NEAREST} nearest photos")
    heads = [head for name in names for head in (f"{name}, %", f"divergence of {name}")]
    print("| search | 1 - cosine, thousandths | " + " | ".join(heads) + " | neighbours, % |")
    print("|" + "---|" * (3 + len(heads)))
    for search, found in by_search.items():
        pruned = F.normalize(torch.tensor([found[photo]["pruned"] for photo in photos]), dim=-1)  # (P, K, E)
        lost = 1000 * (1 - (pruned * whole[:, None]).sum(dim=-1))  # (P, K)
        cells = [" ".join(f"{value:.1f}" for value in lost.mean(dim=0).tolist())]
        for text in texts:
            same = (pruned @ text.T).argmax(dim=-1) == (whole @ text.T).argmax(dim=-1)[:, None]  # (P, K)
            cells.append(_percent(same.double().mean(dim=0)))
            kept = Objective("similarities", whole, bank=text, logit_scale=loading.IMAGE_TOWER_LOGIT_SCALE)
            image = torch.arange(len(whole))
            lost = -torch.stack([kept.score_minus_one(each, image) for each in pruned.unbind(dim=1)], dim=1)  # (P, K)
            cells.append(" ".join(f"{value:.2f}" for value in lost.mean(dim=0).tolist()))
        cells.append(_percent(_neighbours(whole, pruned)))
        print(f"| {search} | " + " | ".join(cells) + " |")
    return 0


def _neighbours(whole: Tensor, pruned: Tensor) -> Tensor:
    """Of each whole photo's nearest others the share that are the pruned one's: (P, E), (P, K, E) -> (K,)."""
    itself = torch.eye(len(whole), dtype=torch.bool)
    nearest = (whole @ whole.T).masked_fill(itself, -2).topk(NEAREST).indices  # (P, n)
    again = (pruned @ whole.T).masked_fill(itself[:, None], -2).topk(NEAREST).indices  # (P, K, n)
    return (again[..., None] == nearest[:, None, None]).any(dim=-1).double().mean(dim=(0, 2))


def _percent(shares: Tensor) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares.tolist())


def main() -> int:
    """Parse, then measure or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="rank and embed photos")
    measuring.set_defaults(call=measure)
    measuring.add_argument("results", help="Parquet file to add to")
    measuring.add_argument("--model", required=True, help="open_clip name")
    measuring.add_argument("--pretrained", help="open_clip tag or weights file")
    measuring.add_argument("--dtype", default="auto", help="(%(default)s)")
    measuring.add_argument("--frontier", required=True, help="rankings by other scores")
    measuring.add_argument("--shards", nargs="+", required=True, help="to draw photos from")
    measuring.add_argument("--photos", type=int, default=16, help="of each shard (%(default)s)")
    measuring.add_argument("--bank", required=True, help="embeddings of texts")
    measuring.add_argument("--images", help="a shard of images for the other bank; none without")
    measuring.add_argument("--bank-images", type=int, default=512, help="so many (%(default)s)")
    showing = commands.add_parser("show", help="print the table")
    showing.set_defaults(call=show)
    showing.add_argument("results", help="Parquet file")
    showing.add_argument("--answers", nargs="+", required=True, help="embeddings of texts to choose among")
    args = parser.parse_args()
    return args.call(args)


if __name__ == "__main__":
    run(main)
