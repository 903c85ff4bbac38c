"""What both trainings work on: images, with golden rankings or without, and the frozen model that they are for."""

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
from patchrank.model.classes import classes_of
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.store import rankings, storage
from patchrank.store.rankings import Rankings
from patchrank.training.outcome import Figures

EVALUATION_BATCH = 64


@dataclass
class TrainingImages:
    """What both trainings work on: images, golden rankings of some or all of them, and the model.

    Attributes:
        tower: in float32 on the CPU, until `start`.
        model: for the record of what is trained: the digest of the image tower, its cut and how it was named.
        everything: all images, without rankings: the frozen model teaches them.
        ranked: those with golden rankings; None where there are none.
        classes: (K, E) class embeddings of the search, or None.
        test: shards without rankings whose images are measured, too.
        measured: at most so many held-out images, and as many of the test shards together.
        features: folder where tokens before the cut are kept, or None.
        recompute: as of `Tower`.
    """

    tower: Tower
    model: dict[str, Any]
    logit_scale: float
    everything: Pairs
    ranked: Pairs | None
    classes: Tensor | None
    dtype: str
    test: Sequence[str]
    measured: int
    features: str | None
    recompute: bool

    @property
    def corpus(self) -> Rankings | None:
        """The golden rankings."""
        return None if self.ranked is None else self.ranked.corpus

    @property
    def search(self) -> str | None:
        """Fingerprint of the search."""
        return None if self.corpus is None else self.corpus.fingerprint

    @property
    def class_names(self) -> list[str] | None:
        """Of the search."""
        return None if self.corpus is None else self.corpus.class_names

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.everything.seed

    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        digest = hashlib.sha256("\n".join(self.everything.shards).encode()).hexdigest()[:16]
        return {
            "model": self.model["weights"],
            "cut": self.model["cut"],
            "search": self.search,
            "shards": f"{len(self.everything.shards)}: {digest}",
            "images": list(self.everything.rows),
            "ranked": [0, 0] if self.ranked is None else list(self.ranked.rows),
            "held_out": self.everything.share,
            "dtype": self.dtype,
            "test": list(self.test),
            "measured": self.measured,
        }

    def start(self, device: torch.device) -> None:
        """Bring the tower to its device and dtype."""
        dtype = loading.resolve_dtype(self.dtype, gpu=device.type == "cuda")
        self.tower = Tower(self.tower.visual, self.tower.cut, dtype, device)
        self.tower.recompute = self.recompute
        self.classes = None if self.classes is None else self.classes.to(device)
        features = None
        if self.features:
            features = Features(self.features, self.tower, self.model["weights"], self.everything.preprocess)
        for each in self._readers():
            each.threads = max(each.threads, torch.get_num_threads())
            each.features = features

    def whole(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """What the unpruned model makes of a batch: (B, p + N, D) before the cut, and its embeddings, (B, E)."""
        tokens = self.tokens(batch)
        if batch.embeddings is not None:
            return tokens, batch.embeddings.to(self.tower.device)
        with torch.no_grad():
            return tokens, self.tower.suffix(tokens)

    def tokens(self, batch: PairBatch) -> Tensor:
        """(B, p + N, D) before the cut, of a batch to train on."""
        with torch.no_grad():
            return self.tower.prefix(batch.pixels) if batch.tokens is None else batch.tokens.to(self.tower.device)

    def parts(self, rank: int, world: int) -> Iterator[tuple[str, Iterator[PairBatch]]]:
        """What is measured, by name, and the rank's part of it: the held-out images, with their rankings where all of
        them have one, and those of the test shards."""
        reader = self.everything
        if self.ranked is not None and self.ranked.rows[1] == reader.rows[1]:
            reader = self.ranked
        yield "held-out", reader.held_out(EVALUATION_BATCH, rank, world, self.measured)
        if self.test:
            preprocess = self.everything.preprocess
            yield "test", unranked(self.test, preprocess, EVALUATION_BATCH, self.measured, rank=rank, world=world)

    def reports(self) -> dict[str, JoinReport]:
        """How samples and rankings found each other, by shard that was read."""
        found = dict(self.everything.reports)
        return found if self.ranked is None else found | self.ranked.reports

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

    def _readers(self) -> list[Pairs]:
        return [self.everything] if self.ranked is None else [self.everything, self.ranked]


@dataclass(frozen=True)
class ImageSource:
    """What `open_images` opens; the flags of both trainings. Raises UserError for what does not go together."""

    rankings: str | None = flag(
        "rankings",
        "what jobs/search.py left (%(default)s); none: learn through the model alone",
        group="rankings and model",
        metavar="FOLDER",
        convert=lambda folder: None if folder == "none" else folder,
    )
    shards: Sequence[str] | None = flag(
        None, "images to learn from, ranked or not (all shards of the search)", metavar="SHARDS"
    )
    model: str | None = flag(None, "as for jobs/search.py (the model that the search names)", metavar="NAME")
    pretrained: str | None = flag(None, "as for jobs/search.py", metavar="TAG")
    cut: int | None = flag(
        None, "without rankings: tokens leave before this block (a quarter of the depth)", metavar="L"
    )
    dtype: str = flag("auto", "of the frozen model: auto, float32, bfloat16 or float16 (%(default)s)")
    recompute: bool = flag(False, "run blocks a second time backwards instead of keeping what they computed")
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
        if self.rankings is None and not (self.shards and self.model):
            raise UserError("--rankings none: needs --shards and --model, which rankings would name")
        if self.rankings is not None and self.cut is not None:
            raise UserError(f"--cut {self.cut}: is that of the rankings; leave it out, or learn with --rankings none")
        at_least(self, 1, "measured")


def open_images(source: ImageSource, seed: int = 0) -> tuple[TrainingImages, Model]:
    """Open images, their rankings if there are any, and the model; `seed` shuffles the images.

    Raises:
        UserError: whatever does not fit together.
    """
    corpus = None if source.rankings is None else rankings.open(source.rankings)
    about = {} if corpus is None else corpus.settings.get("about", {})
    model = None if source.model is None else assets.EMBEDDED.get(source.model, source.model)
    pretrained = source.pretrained
    if model is None and about.get("model") is None:
        raise UserError(f"{source.rankings}: does not tell its model's name; give --model")
    if model is None:
        model, pretrained = about["model"], about.get("pretrained")
    test = source.test
    if test is None:
        test = assets.TEST_SHARDS if model in assets.EMBEDDED.values() else []
    wanted = None if source.shards is None else shards.expand(source.shards)
    tested = shards.expand(test) if test else []
    loaded = loading.load(model, pretrained)
    cut = source.cut if corpus is None else corpus.settings["model"]["cut"]
    tower = Tower(loaded.visual, cut, name=model)
    if corpus is not None:
        pairs.check(corpus, tower, loaded.weights)
    loading.resolve_dtype(source.dtype, gpu=False)  # refuses other names
    known = None if corpus is None else classes_of(corpus)[1]

    def reader(ranked: bool) -> Pairs:
        return Pairs(corpus, loaded.preprocess(), wanted, source.held_out, seed, ranked=ranked)

    images = TrainingImages(
        tower=tower,
        model={"name": model, "pretrained": pretrained, "weights": loaded.weights, "cut": tower.cut},
        logit_scale=loaded.logit_scale,
        everything=reader(ranked=False),
        ranked=None if corpus is None else reader(ranked=True),
        classes=None if known is None else known.embeddings,
        dtype=source.dtype,
        test=tested,
        measured=source.measured,
        features=source.cache_features,
        recompute=source.recompute,
    )
    learnt = {storage.place(uri) for uri in images.everything.shards}
    if both := next((uri for uri in tested if storage.place(uri) in learnt), None):
        raise UserError(f"--test {both}: would be learnt from, too; name shards that are not among those to learn from")
    return images, loaded
