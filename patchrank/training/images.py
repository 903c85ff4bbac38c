"""What both trainings work on: images with golden rankings, and the model that the rankings are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchrank import assets
from patchrank.data import pairs, shards
from patchrank.data.features import Features
from patchrank.data.join import JoinReport
from patchrank.data.pair_batches import PairBatch, unranked
from patchrank.data.pairs import Pairs
from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.model import loading
from patchrank.model.adapter import class_token_alone
from patchrank.model.classes import classes_of
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.store import rankings
from patchrank.training.outcome import Figures

EVALUATION_BATCH = 64


@dataclass
class RankedImages:
    """What both trainings work on: golden rankings, the images they are of, and the model that they were made with.

    Attributes:
        tower: in float32 on the CPU, until `start`.
        model: for the record of what is trained: the digest of the image tower, its cut and how it was named.
        classes: (K, E) class embeddings of the search, or None.
        test: shards without rankings whose images are measured, too.
        measured: at most so many held-out images, and as many of the test shards together.
        features: folder where tokens before the cut are kept, or None.
    """

    tower: Tower
    model: dict[str, Any]
    logit_scale: float
    pairs: Pairs
    classes: Tensor | None
    dtype: str
    test: Sequence[str]
    measured: int
    features: str | None

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        digest = hashlib.sha256("\n".join(self.pairs.shards).encode()).hexdigest()[:16]
        return {
            "search": self.search,
            "shards": f"{len(self.pairs.shards)}: {digest}",
            "images": list(self.pairs.rows),
            "held_out": self.pairs.share,
            "dtype": self.dtype,
            "test": list(self.test),
            "measured": self.measured,
        }

    @property
    def search(self) -> str:
        """Fingerprint of the search."""
        return self.pairs.corpus.fingerprint

    def start(self, device: torch.device) -> None:
        """Bring the tower to its device and dtype."""
        dtype = loading.resolve_dtype(self.dtype, gpu=device.type == "cuda")
        self.tower = Tower(self.tower.visual, self.tower.cut, dtype, device)
        self.classes = None if self.classes is None else self.classes.to(device)
        self.pairs.threads = max(self.pairs.threads, torch.get_num_threads())
        if self.features:
            limit = self.pairs.corpus.settings.get("limit")
            self.pairs.features = Features(
                self.features, self.tower, self.model["weights"], self.pairs.preprocess, limit
            )

    def tokens(self, batch: PairBatch) -> Tensor:
        """(B, p + N, D) before the cut, of a batch to train on."""
        with torch.no_grad():
            return self.tower.prefix(batch.pixels) if batch.tokens is None else batch.tokens.to(self.tower.device)

    def parts(self, rank: int, world: int) -> Iterator[tuple[str, Iterator[PairBatch]]]:
        """What is measured, by name, and the rank's part of it."""
        held_out = self.pairs.held_out(EVALUATION_BATCH, rank, world, self.measured)
        yield "held-out", held_out
        if self.test:
            preprocess = self.pairs.preprocess
            test = unranked(self.test, preprocess, EVALUATION_BATCH, self.measured, rank=rank, world=world)
            yield "test", test

    def record(self, before: Figures, after: Figures, reports: Sequence[dict[str, JoinReport]]) -> dict[str, Any]:
        """What both trainings keep beside the weights."""
        found = {shard: one for report in reports for shard, one in report.items()}
        undecodable = {(shard, key) for report in reports for shard in report for key in report[shard].undecodable}
        samples = {
            name: sum(getattr(one, name) for one in found.values())
            for name in ("joined", "without_ranking", "without_image")
        }
        return {
            "model": self.model,
            "search": self.search,
            "figures": {"before": dict(before), "after": dict(after)},
            "samples": samples | {"undecodable": len(undecodable)},
            "errors": {shard: one.error for shard, one in sorted(found.items()) if one.error},
        }


@dataclass(frozen=True)
class ImageSource:
    """What `open_images` opens; the flags of both trainings. Raises UserError for what does not go together."""

    rankings: str = flag(
        "rankings", "what jobs/search.py left (%(default)s)", group="rankings and model", metavar="FOLDER"
    )
    shards: Sequence[str] | None = flag(None, "only these shards of the search (all that it ranked)", metavar="SHARDS")
    model: str | None = flag(None, "as for jobs/search.py (the model that the search names)", metavar="NAME")
    pretrained: str | None = flag(None, "as for jobs/search.py", metavar="TAG")
    dtype: str = flag("auto", "of the frozen model: auto, float32, bfloat16 or float16 (%(default)s)")
    held_out: float = flag(0.1, "of the images, never trained on (%(default)s)", group="images", metavar="SHARE")
    test: Sequence[str] | None = flag(
        None, "labelled shards to measure, too (the embedded model: its own)", metavar="SHARDS", nargs="*"
    )
    measured: int = flag(1000, "images of either to measure at most (%(default)s)", metavar="N")
    cache_features: str | None = flag(
        None, "keep the tokens before the cut here: pays where images come again", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        if self.pretrained and not self.model:
            raise UserError("--pretrained needs --model, an open_clip name")
        at_least(self, 1, "measured")


def open_images(source: ImageSource, seed: int = 0) -> tuple[RankedImages, Model]:
    """Open rankings and the model that they were made with; `seed` shuffles the images.

    Raises:
        UserError: whatever does not fit together.
    """
    corpus = rankings.open(source.rankings)
    about = corpus.settings.get("about", {})
    model, pretrained = assets.MODEL if source.model == "embedded" else source.model, source.pretrained
    if model is None and about.get("model") is None:
        raise UserError(f"{source.rankings}: does not tell its model's name; give --model")
    if model is None:
        model, pretrained = about["model"], about.get("pretrained")
    test = source.test
    if test is None:
        test = assets.TEST_SHARDS if model == assets.MODEL else []
    wanted = None if source.shards is None else shards.expand(source.shards)
    loaded = loading.load(model, pretrained)
    tower = Tower(loaded.visual, corpus.settings["model"]["cut"], name=model)
    pairs.check(corpus, tower, loaded.weights)
    class_token_alone(tower.adapter.prefix_tokens, "predictors take")
    loading.resolve_dtype(source.dtype, gpu=False)  # refuses other names
    _, known = classes_of(corpus)
    images = RankedImages(
        tower=tower,
        model={"name": model, "pretrained": pretrained, "weights": loaded.weights, "cut": tower.cut},
        logit_scale=loaded.logit_scale,
        pairs=Pairs(corpus, loaded.preprocess(), wanted, source.held_out, seed),
        classes=None if known is None else known.embeddings,
        dtype=source.dtype,
        test=shards.expand(test) if test else [],
        measured=source.measured,
        features=source.cache_features,
    )
    return images, loaded
