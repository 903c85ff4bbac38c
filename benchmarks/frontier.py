"""How good a ranking so many multiply-adds buy: searches side by side on real photos and a real model.

    python benchmarks/frontier.py measure docs/frontier.parquet --model ViT-B-16 --pretrained openai \\
        --shards imagenette/imagenette-000002.tar --prototypes 'imagenette/imagenette-00000{0,1}.tar' \\
        --classes imagenette/classnames.json --photos 32
    python benchmarks/frontier.py show docs/frontier.parquet --plot docs/frontier.png

`measure` adds a row for every photo and search that the file does not have yet, after each photo: it can be stopped,
run again with more photos, other shards or --searches, and goes on from there. The photos are the first of a shard, as
those of `jobs/search.py --limit`, or those after the first --skip; rankings that a search left are taken from it
(--rankings). Searches of one photo share the candidates they have in common. `show` prints the table and draws the
picture, each search against the paper's on the photos that both have.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patchrank.data import shards
from patchrank.data.images import decode
from patchrank.data.pair_batches import PairBatch
from patchrank.data.progress import Progress
from patchrank.data.prototypes import class_sums
from patchrank.data.shard_job import Reading
from patchrank.errors import UserError, run
from patchrank.model import classes, loading
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.model.zero_shot import predict
from patchrank.pruning.chance import Chance
from patchrank.pruning.class_attention import ClassAttention
from patchrank.pruning.comparison import before_cut
from patchrank.search.candidates import Candidates, Value
from patchrank.search.config import SearchConfig
from patchrank.search.estimate import search_multiply_adds
from patchrank.search.searcher import Searcher
from patchrank.store import rankings
from patchrank.store.folder import file_name
from patchrank.tokens import matching_rate, tokens_kept

KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
PAPER, DEFAULT = "one-shot r=2", "effects k=4 m=2"
RANDOM, ATTENTION = "random", "class-token attention"
ONE_SHOT = {"steps": 1, "rank_by": "scores"}
LAZY = {"rank_by": "scores"}
SINGLE = {"proposals": 1}
SEARCHES: dict[str, dict[str, Any]] = {
    PAPER: {**ONE_SHOT, "block": 2},
    "one-shot r=1": ONE_SHOT,
    "one-shot r=3": {**ONE_SHOT, "block": 3},
    "effects one-shot": {"steps": 1},
    "effects one-shot r=2": {"steps": 1, "block": 2},
    **{f"effects k={k}": {**SINGLE, "remove_per_step": k} for k in (16, 8, 4, 2, 1)},
    **{
        f"effects k={k} m={m}": {"remove_per_step": k, "proposals": m}
        for k, m in ((16, 4), (8, 2), (8, 4), (4, 2), (4, 3))
    },
    "effects r=2 k=4": {**SINGLE, "block": 2},
    "effects k=4 c=1": {**SINGLE, "rescore": 1},
    "effects k=8 c=1": {**SINGLE, "rescore": 1, "remove_per_step": 8},
    "effects k=4 c=2": {**SINGLE, "rescore": 2},
    "effects exact k=59": {**SINGLE, "rescore": None, "remove_per_step": 59},
    "effects exact k=30": {**SINGLE, "rescore": None, "remove_per_step": 30},
    "lazy k=4 c=1": {**LAZY, "rescore": 1},
    "lazy k=4 c=2": {**LAZY, "rescore": 2},
    "lazy k=1 c=2": {**LAZY, "rescore": 2, "remove_per_step": 1},
    "lazy k=8 c=2": {**LAZY, "rescore": 2, "remove_per_step": 8},
    "lazy k=4 c=4": {**LAZY, "rescore": 4},
    **{f"exact k={k}": {**LAZY, "rescore": None, "remove_per_step": k} for k in (59, 30, 20, 10)},
    "gates n=16": {"rank_by": "gates"},
    "exchanges": {"rank_by": "exchanges"},
    **{f"gates n={steps}": {"rank_by": "gates", "steps": steps} for steps in (8, 30, 45)},
    **{
        f"{score} {name}": {**config, "score": score}
        for score in ("label", "confidence")
        for name, config in (
            (PAPER, {**ONE_SHOT, "block": 2}),
            ("effects k=4", SINGLE),
            (DEFAULT, {}),
            ("lazy k=4 c=2", {**LAZY, "rescore": 2}),
        )
    },
}
NAMES = [RANDOM, ATTENTION, *SEARCHES]


class Remembering(Candidates):
    """Candidates of one photo, each embedded once whatever search asks for it."""

    def __init__(self, candidates: Candidates, known: dict[bytes, Tensor]) -> None:
        vars(self).update(vars(candidates))
        self.known = known

    def embed(
        self,
        tokens: Tensor,
        image: Tensor,
        kept: Tensor | None = None,
        value: Value = lambda embeddings, image: embeddings,
    ) -> Tensor:
        """As `Candidates.embed`."""
        if kept is None:
            kept = torch.arange(self.tower.num_tokens, device=tokens.device).expand(len(image), -1)
        names = [row.tobytes() for row in kept.cpu().numpy()]
        missing = [row for row, name in enumerate(names) if name not in self.known]
        if missing:
            found = super().embed(tokens, image[missing], kept[missing])
            self.known.update(zip((names[row] for row in missing), found, strict=True))
        return value(torch.stack([self.known[name] for name in names]), image)


def photos(uri: str, skipped: int, count: int) -> Iterator[shards.Sample]:
    """The labelled ones among so many samples of a shard, after those that are skipped."""
    with shards.readable(uri):
        for sample in itertools.islice(shards.read(uri, skipped + count), skipped, None):
            if isinstance(sample, shards.Sample) and sample.label is not None:
                yield sample


def searched(folders: list[str], uris: list[str], tower: Tower, model: Model) -> dict[tuple[str, str, str], Tensor]:
    """Rankings that `jobs/search.py` left, (N,) by shard, key and search.

    Raises:
        UserError: a folder of another model or precision, or of a search that is not one of these.
    """
    found = {}
    for folder in folders:
        corpus = rankings.open(folder)
        about = corpus.settings["model"]
        if (about["weights"], about["cut"], about["dtype"]) != (
            model.weights,
            tower.cut,
            loading.dtype_name(tower.dtype),
        ):
            raise UserError(f"--rankings {folder}: of other weights, another cut ({about['cut']}) or {about['dtype']}")
        config = SearchConfig(**corpus.settings["search"])
        name = next((name for name, flags in SEARCHES.items() if SearchConfig(**flags) == config), None)
        if name is None or config.score != "preservation":
            raise UserError(f"--rankings {folder}: its search is none of those by preservation that are compared here")
        for uri in uris:
            if file_name(uri) in corpus.files:
                table = corpus.tensors(["ranking"], uri)
                shard = os.path.basename(uri)
                found.update({(shard, key, name): row for key, row in zip(table["key"], table["ranking"], strict=True)})
    return found


def prototypes(args: argparse.Namespace, tower: Tower, model: Model) -> Tensor:
    """(K, E) mean embeddings by class, kept beside the results: they cost a forward pass an image."""
    uris = shards.expand(args.prototypes)
    names = classes.read_names(args.classes)
    identity = hashlib.sha256(f"{model.weights} {tower.dtype} {uris}".encode()).hexdigest()[:16]
    kept = f"{args.results}.{identity}.classes.safetensors"
    known = classes.load(kept, identity, names)
    if known is None:
        parts = []
        for uri in tqdm(uris, desc="prototypes", disable=not sys.stderr.isatty()):
            with shards.readable(uri):
                parts.append(class_sums(tower, uri, Reading(model.preprocess(), num_classes=len(names)), Progress()))
        sums, counts = (torch.stack(column).sum(dim=0) for column in zip(*parts, strict=True))  # (K, E), (K,)
        known = classes.from_sums(sums, counts, identity, names)
        classes.save(kept, known)
    return known.embeddings


def row(
    name: str, searcher: Searcher, sample: shards.Sample, pixels: Tensor, classes_: Tensor, known: Tensor | None
) -> dict[str, Any]:
    """What one search makes of one photo, whose ranking, (N,), may be known."""
    tower, labels = searcher.tower, torch.tensor([sample.label])
    tokens = tower.prefix(pixels)
    everything = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    full = searcher.candidates.embed(tokens, everything)  # (1, E)
    if name in (RANDOM, ATTENTION):
        batch = PairBatch([sample.key], pixels, labels, None, None)
        selector = Chance() if name == RANDOM else ClassAttention()
        usefulness = selector(*before_cut(tower, pixels), batch)  # (1, N)
        ranking, cost, work = usefulness.argsort(dim=1, descending=True).cpu(), [], 0
    else:
        cost, work = searcher.config.cost(tower.grid), search_multiply_adds(searcher.config, tower)
        ranking = searcher.search(pixels, labels).ranking if known is None else known[None]  # (1, N)
    cosine, predicted = [], []
    for keep in KEEP_RATES:
        kept = ranking[:, : tokens_kept(tower.num_tokens, keep)].sort(dim=1).values.to(tokens.device)
        embedding = searcher.candidates.embed(tokens, everything, kept)
        cosine.append(F.cosine_similarity(embedding, full).item())
        predicted.append(int(predict(embedding, classes_, 1.0)[0]))
    return {
        "search": name,
        "candidates": sum(step.candidates for step in cost),
        "multiply_adds": work,
        "label": sample.label,
        "prediction": int(predict(full, classes_, 1.0)[0]),
        "pruned_prediction": predicted,
        "cosine": cosine,
        "ranking": ranking[0].tolist(),
    }


def measure(args: argparse.Namespace) -> int:
    """Add to the results what they do not have."""
    wanted = [name for name in NAMES if any(fnmatch.fnmatch(name, pattern) for pattern in args.searches)]
    if not wanted:
        raise UserError(f"--searches {' '.join(args.searches)}: none of them; there are {', '.join(NAMES)}")
    rows = pq.read_table(args.results).to_pylist() if os.path.exists(args.results) else []
    done = {(one["shard"], one["key"], one["search"]) for one in rows}
    model = loading.load(args.model, args.pretrained)
    gpu = torch.cuda.is_available()
    dtype = loading.resolve_dtype(args.dtype, gpu)
    tower = Tower(model.visual, args.cut, dtype, "cuda" if gpu else "cpu", args.model)
    uris = shards.expand(args.shards)
    rankings_ = searched(args.rankings, uris, tower, model)
    about = {"weights": model.weights, "cut": tower.cut, "dtype": loading.dtype_name(tower.dtype)}
    if any(one.get(name) != value for one in rows for name, value in about.items()):
        raise UserError(f"{args.results}: of other weights, another cut or another precision; name another file")
    embeddings = prototypes(args, tower, model).to(tower.device)
    preprocess = model.preprocess()
    todo = [(uri, sample) for uri in uris for sample in photos(uri, args.skip, args.photos)]
    with torch.inference_mode():
        for uri, sample in tqdm(todo, unit=" photos", disable=not sys.stderr.isatty()):
            shard = os.path.basename(uri)
            missing = [name for name in wanted if (shard, sample.key, name) not in done]
            if not missing:
                continue
            try:
                pixels = preprocess(decode(sample.image))[None]
            except ValueError as error:
                tqdm.write(f"{shard} {sample.key}: {error}", file=sys.stderr)
                continue
            known: dict[bytes, Tensor] = {}
            for name in missing:
                searcher = Searcher(tower, SearchConfig(**SEARCHES.get(name, {})), embeddings, model.logit_scale)
                searcher.candidates = Remembering(searcher.candidates, known)
                ranking = rankings_.get((shard, sample.key, name))
                found = row(name, searcher, sample, pixels, embeddings, ranking)
                rows.append({"shard": shard, "key": sample.key, **found, "model": args.model, **about})
            pq.write_table(pa.Table.from_pylist(rows), f"{args.results}.new")
            os.replace(f"{args.results}.new", args.results)
            print(f"{shard} {sample.key}: {len(missing)} searches, {len(known)} candidates", flush=True)
    return 0


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a search: 1 - cosine, (5,) mean and 90th percentile, ratio to the paper's, top-1, and how many photos.

    And which share of the tokens that the default search keeps this one keeps, too.
    """
    by_search: dict[str, dict[tuple[str, str], dict]] = {}
    for one in rows:
        by_search.setdefault(one["search"], {})[one["shard"], one["key"]] = one
    lines = []
    for name in NAMES:
        found = by_search.get(name)
        if not found:
            continue
        both = sorted(found.keys() & by_search.get(PAPER, {}).keys())
        mine = 1 - np.array([one["cosine"] for one in found.values()])  # (photos, keep rates)
        line = {
            "search": name,
            "photos": len(found),
            "candidates": next(iter(found.values()))["candidates"],
            "multiply_adds": next(iter(found.values()))["multiply_adds"],
            "mean": mine.mean(axis=0),
            "p90": np.quantile(mine, 0.9, axis=0),
            "right": np.mean([[p == one["label"] for p in one["pruned_prediction"]] for one in found.values()], axis=0),
            "whole": np.mean([one["prediction"] == one["label"] for one in found.values()]),
        }
        if both:
            ours, theirs = (
                np.mean([1 - np.array(by_search[which][photo]["cosine"]) for photo in both], axis=0)
                for which in (name, PAPER)
            )
            line["ratio"] = ours / theirs
        both = sorted(found.keys() & by_search.get(DEFAULT, {}).keys())
        if both:
            ranking, default = (
                torch.tensor([by_search[which][photo]["ranking"] for photo in both]) for which in (name, DEFAULT)
            )  # both (photos, N)
            counts = [tokens_kept(ranking.shape[1], keep) for keep in KEEP_RATES]
            line["shared"] = [matching_rate(-ranking.argsort(dim=1), default, m).mean().item() for m in counts]
        lines.append(line)
    return lines


def show(args: argparse.Namespace) -> int:
    """Print the tables; draw the picture if one is asked for."""
    try:
        table = pq.read_table(args.results)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{args.results}: cannot be read: {error}") from None
    lines = compare(table.to_pylist())
    rates = " ".join(f"{keep:.0%}" for keep in KEEP_RATES)
    models_ = pc.unique(pc.binary_join_element_wise(table["model"], table["dtype"], " ")).to_pylist()
    print(f"{', '.join(models_)}; 1 - cosine in thousandths, at keep {rates}\n")
    print(
        "| search | candidates | G multiply-adds | photos | mean | 90th percentile "
        "| / paper's at 60, 50 % | top-1 % | shared with the default at 60, 50 % |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        mean, high = (" ".join(f"{1000 * value:.1f}" for value in line[which]) for which in ("mean", "p90"))
        ratio = "{:.2f} {:.2f}".format(*line["ratio"][2:4]) if "ratio" in line else ""
        top = " ".join(f"{100 * value:.0f}" for value in line["right"])
        same = "{:.0%} {:.0%}".format(*line["shared"][2:4]) if "shared" in line else ""
        cost = f"{line['candidates']} | {line['multiply_adds'] / 1e9:.0f}"
        print(f"| {line['search']} | {cost} | {line['photos']} | {mean} | {high} | {ratio} | {top} | {same} |")
    if args.plot:
        draw([line for line in lines if "ratio" in line and line["candidates"]], args.plot)
        print(f"\n{args.plot}")
    return 0


def draw(lines: list[dict[str, Any]], path: str) -> None:
    """Distortion against multiply-adds, both logarithmic, at keep 60 and 50 %; hollow where it is of fewer photos."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(line["photos"] for line in lines)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, layout="constrained")
    families = {  # the Okabe-Ito colours, which colour-blind people can tell apart
        "one-shot": ("#D55E00", "o"),
        "lazy": ("#56B4E9", "s"),
        "exact": ("#000000", "^"),
        "effects": ("#009E73", "D"),
        "gates": ("#CC79A7", "P"),
        "exchanges": ("#E69F00", "X"),
    }
    for axis, column in zip(axes, (2, 3), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="G multiply-adds an image", title=f"keep {KEEP_RATES[column]:.0%}")
        for family, (colour, marker) in families.items():
            mine = [line for line in lines if line["search"].startswith(family)]
            if not mine:
                continue
            x, y = [line["multiply_adds"] / 1e9 for line in mine], [line["ratio"][column] for line in mine]
            filled = [colour if line["photos"] == most else "none" for line in mine]
            axis.scatter(x, y, facecolors=filled, edgecolors=colour, marker=marker, zorder=2)
            axis.plot([], [], color=colour, marker=marker, linestyle="none", label=family)
            for line, at in zip(mine, zip(x, y, strict=True), strict=True):
                name = line["search"].removeprefix(family).strip()
                axis.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.grid(True, which="both", alpha=0.25)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            line.set_major_formatter("{x:g}")
            line.set_minor_formatter("")
    fewest = min(line["photos"] for line in lines)
    figure.suptitle(f"mean over {most} photos" + (f"; hollow: {fewest} or more" if fewest < most else ""))
    axes[0].set_ylabel("mean 1 - cosine, as a share of the paper's (one-shot r=2)")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Parse, then measure or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    add = functools.partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring = add("measure", help="search photos")
    measuring.set_defaults(call=measure)
    measuring.add_argument("results", help="Parquet file to add to")
    measuring.add_argument("--model", required=True, help="open_clip name")
    measuring.add_argument("--pretrained", help="open_clip tag or weights file")
    measuring.add_argument("--cut", type=int, help="tokens leave before this block (a quarter of the depth)")
    measuring.add_argument("--dtype", default="auto", help="(%(default)s)")
    measuring.add_argument("--shards", nargs="+", required=True, help="labelled shards to draw photos from")
    measuring.add_argument("--prototypes", nargs="+", required=True, help="labelled shards for class embeddings")
    measuring.add_argument("--classes", required=True, help="class names by label")
    measuring.add_argument("--rankings", nargs="+", default=[], help="folders that jobs/search.py left, to be used")
    measuring.add_argument("--photos", type=int, default=32, help="of each shard (%(default)s)")
    measuring.add_argument("--skip", type=int, default=0, help="so many first (%(default)s)")
    measuring.add_argument("--searches", nargs="+", default=["*"], help="names or patterns (all)")
    showing = add("show", help="print the table and draw the picture")
    showing.set_defaults(call=show)
    showing.add_argument("results", help="Parquet file")
    showing.add_argument("--plot", help="PNG file to write")
    args = parser.parse_args()
    return args.call(args)


if __name__ == "__main__":
    run(main)
