"""The two trainings: the predictor learns golden rankings, the learnable tokens make up for what pruning takes away."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank import assets
from patchrank.data import pairs, shards
from patchrank.data.features import Features
from patchrank.data.join import JoinReport
from patchrank.data.pair_batches import PairBatch, unranked
from patchrank.data.pairs import Pairs
from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.model import classes, loading
from patchrank.model.classes import CLASSES_FILE, Classes, classes_of
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.pruning import predictor, prompts
from patchrank.pruning.comparison import Comparison
from patchrank.pruning.methods import UNPRUNED, Method
from patchrank.pruning.predicted import Predicted
from patchrank.pruning.predictor import LOSSES, TARGETS, Predictor, PredictorConfig
from patchrank.pruning.prompts import PromptedText, TokensConfig, VisualTokens
from patchrank.store import rankings, storage
from patchrank.tokens import count_kept, kendall_tau, select
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


def _figures(part: str, comparison: Comparison, suffix: dict[str, str]) -> dict[str, float]:
    """Figures by name: those of a comparison at one keep rate; `suffix` ends the names, by method."""
    figures: dict[str, float] = {}
    for row in comparison.rows():
        names = {"top-1": row.top1, "cosine": None if row.method == UNPRUNED else row.cosine}
        figures |= {f"{part}/{name} {suffix[row.method]}": value for name, value in names.items() if value is not None}
    return figures


@dataclass
class PredictorTask:
    """The predictor learns golden rankings."""

    images: RankedImages
    config: PredictorConfig
    loss_name: str = flag("bce", f"{', '.join(LOSSES)} (%(default)s)", group="predictor", name="loss")
    target: str | None = flag(
        None, f"what it learns, {' or '.join(TARGETS)} (score after the paper's search, else rank)"
    )
    keep: float = flag(0.5, "keep rate at which it is measured (%(default)s)")
    name: str = "predictor"

    def __post_init__(self) -> None:
        if self.loss_name not in LOSSES:
            raise UserError(f"--loss {self.loss_name}: must be one of {', '.join(LOSSES)}")
        if self.target is None:
            search = self.images.pairs.corpus.settings["search"]
            # The scores of other searches are of different steps, and cannot be compared with each other;
            # probabilities are 1, as the tables keep them, where the model is sure.
            steps, rank_by, score = search["steps"], search["rank_by"], search["score"]
            self.target = "score" if (steps, rank_by, score) == (1, "scores", "preservation") else "rank"
        if self.target not in TARGETS:
            raise UserError(f"--target {self.target}: must be one of {', '.join(TARGETS)}")
        self.count = count_kept(self.config.num_tokens, self.keep)

    def settings(self) -> dict[str, Any]:
        return {
            **self.images.settings(),
            "predictor": asdict(self.config),
            "loss": self.loss_name,
            "target": self.target,
            "keep": self.keep,
        }

    def steps_per_epoch(self, global_batch: int) -> int:
        return self.images.pairs.steps_per_epoch(global_batch)

    def start(self, device: torch.device) -> nn.Module:
        self.images.start(device)
        return Predictor(self.config)

    def batches(self, rank: int, world: int, size: int, accumulation: int, start: int) -> Iterator[PairBatch]:
        return self.images.pairs.batches(rank, world, size, accumulation, start)

    def loss(self, module: nn.Module, batch: PairBatch) -> Tensor:
        assert batch.ranking is not None and batch.score is not None and self.target is not None
        prediction = module(self.images.tokens(batch))  # (B, N)
        target = predictor.targets(batch.ranking, batch.score, self.target).to(prediction.device)
        return LOSSES[self.loss_name](prediction, target)

    def evaluate(self, module: nn.Module, rank: int, world: int, add: Callable[[Tensor], Tensor]) -> Figures:
        assert isinstance(module, Predictor)
        figures: dict[str, float] = {}
        for part, batches in self.images.parts(rank, world):
            taus = torch.zeros(2, dtype=torch.float64)  # sum and count
            methods = {self.name: Method(Predicted(module))}
            comparison = Comparison(self.images.tower, methods, [self.keep], self.images.classes)
            for batch in batches:
                usefulness = comparison.add(batch)[-1].usefulness  # (B, N)
                if batch.ranking is not None and usefulness is not None:
                    tau = kendall_tau(usefulness, batch.ranking.to(usefulness.device))  # (B,)
                    taus += torch.tensor([tau.double().sum().item(), len(tau)])
            comparison.sums, (tau, count) = add(comparison.sums), add(taus).tolist()
            if count:
                matching = comparison.rows()[-1].matching
                figures |= {
                    f"{part}/matching rate at {self.count}": matching or 0.0,
                    f"{part}/Kendall tau": tau / count,
                }
            figures |= _figures(part, comparison, {UNPRUNED: "unpruned", self.name: f"at keep {self.keep:g}"})
        return figures

    def report(self) -> dict[str, JoinReport]:
        return self.images.pairs.reports

    def save(
        self, module: nn.Module, folder: str, before: Figures, after: Figures, reports: Sequence[dict[str, JoinReport]]
    ) -> None:
        assert isinstance(module, Predictor)
        settings = {"loss": self.loss_name, "target": self.target, "keep": self.keep}
        predictor.save(folder, module, {**self.images.record(before, after, reports), **settings})


@dataclass
class TokensTask:
    """Learnable tokens, trained with pruning on: cross-entropy over the class embeddings."""

    images: RankedImages
    config: TokensConfig
    predictor: Predictor
    keep: float = flag(0.6, "share of the patch tokens that stay (%(default)s)", group="tokens")
    prompted: PromptedText | None = None  # where there are learnable text tokens
    name: str = "tokens"

    def __post_init__(self) -> None:
        self.count = count_kept(self.images.tower.num_tokens, self.keep)
        corpus = self.images.pairs.corpus
        if self.images.classes is None:
            raise UserError(f"{corpus.folder}: has no class embeddings to train for; search with --classes")
        if not any(label >= 0 for label in corpus.tensors(["label"], self.images.pairs.shards[0])["label"].tolist()):
            raise UserError(f"{self.images.pairs.shards[0]}: its images have no labels to train with")
        if self.images.features and self.config.place == "input":
            raise UserError(
                "--cache-features: goes with --place cut alone, where the tokens before the cut stay the same"
            )

    def settings(self) -> dict[str, Any]:
        return {
            **self.images.settings(),
            "tokens": asdict(self.config),
            "predictor": loading.digest(self.predictor.state_dict()),
            "keep": self.keep,
        }

    def steps_per_epoch(self, global_batch: int) -> int:
        return self.images.pairs.steps_per_epoch(global_batch)

    def start(self, device: torch.device) -> nn.Module:
        self.images.start(device)
        self.predictor.to(device)
        if self.prompted is not None:
            self.prompted.to(device)
        return VisualTokens(self.config)

    def batches(self, rank: int, world: int, size: int, accumulation: int, start: int) -> Iterator[PairBatch]:
        return self.images.pairs.batches(rank, world, size, accumulation, start)

    def loss(self, module: nn.Module, batch: PairBatch) -> Tensor:
        assert isinstance(module, VisualTokens)
        tower = self.images.tower
        if self.config.place == "input":
            tokens = module.prefix(tower, batch.pixels)  # (B, p + N + b, D)
        else:
            tokens = module.append(self.images.tokens(batch))
        with torch.no_grad():
            kept = select(self.predictor(tokens), self.count)
        embeddings = F.normalize(tower.suffix(tokens, kept), dim=-1)  # (B, E)
        logits = self.images.logit_scale * embeddings @ self._classes(module).T  # (B, K)
        labels = batch.labels.to(logits.device)
        total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        return total / (labels >= 0).sum().clamp(min=1)

    def evaluate(self, module: nn.Module, rank: int, world: int, add: Callable[[Tensor], Tensor]) -> Figures:
        assert isinstance(module, VisualTokens)
        figures: dict[str, float] = {}
        for part, batches in self.images.parts(rank, world):
            selector = Predicted(self.predictor)
            methods = {"pruned": Method(selector), self.name: Method(selector, module, self._classes(module))}
            comparison = Comparison(self.images.tower, methods, [self.keep], self.images.classes)
            for batch in batches:
                comparison.add(batch)
            comparison.sums = add(comparison.sums)
            pruned = f"at keep {self.keep:g}"
            names = {UNPRUNED: "unpruned", "pruned": f"{pruned} without tokens", self.name: f"{pruned} with tokens"}
            figures |= _figures(part, comparison, names)
        return figures

    def _classes(self, module: VisualTokens) -> Tensor:
        """(K, E), normalised."""
        if self.prompted is not None and module.text is not None:
            return self.prompted(module.text)
        assert self.images.classes is not None
        return self.images.classes

    def report(self) -> dict[str, JoinReport]:
        return self.images.pairs.reports

    def save(
        self, module: nn.Module, folder: str, before: Figures, after: Figures, reports: Sequence[dict[str, JoinReport]]
    ) -> None:
        assert isinstance(module, VisualTokens)
        names = self.images.pairs.corpus.class_names
        record = {
            **self.images.record(before, after, reports),
            "keep": self.keep,
            "class_names": names,
            "classes": None,
        }
        if self.prompted is not None:  # the class embeddings that these text tokens make
            embeddings = self._classes(module).detach().cpu()
            digest = hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()[:16]
            record["classes"] = f"text tokens {digest}"
            classes.save(storage.join(folder, CLASSES_FILE), Classes(embeddings, record["classes"], names))
        prompts.save(folder, module, record)
