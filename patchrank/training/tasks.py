"""The two trainings: the predictor learns golden rankings, the learnable tokens make up for what pruning takes away."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.data.join import JoinReport
from patchrank.data.pair_batches import PairBatch
from patchrank.errors import UserError
from patchrank.flags import flag
from patchrank.model import classes, loading
from patchrank.model.classes import CLASSES_FILE, Classes
from patchrank.pruning import predictor, prompts
from patchrank.pruning.comparison import Comparison
from patchrank.pruning.methods import UNPRUNED, Method
from patchrank.pruning.predicted import Predicted
from patchrank.pruning.predictor import LOSSES, TARGETS, Predictor, PredictorConfig
from patchrank.pruning.prompts import PromptedText, TokensConfig, VisualTokens
from patchrank.store import storage
from patchrank.tokens import count_kept, kendall_tau, select
from patchrank.training.images import RankedImages
from patchrank.training.outcome import Figures


def _figures(part: str, comparison: Comparison, suffix: dict[str, str]) -> dict[str, float]:
    """Figures by name: those of a comparison at one keep rate; `suffix` ends the names, by method."""
    figures: dict[str, float] = {}
    for row in comparison.rows():
        names = {"top-1": row.top1, "cosine": None if row.method == UNPRUNED else row.cosine}
        figures |= {f"{part}/{name} {suffix[row.method]}": value for name, value in names.items() if value is not None}
    return figures


@dataclass
class _ImagesTask:
    """What both tasks are about, and how they read it."""

    images: RankedImages

    def steps_per_epoch(self, global_batch: int) -> int:
        return self.images.pairs.steps_per_epoch(global_batch)

    def batches(self, rank: int, world: int, size: int, accumulation: int, start: int) -> Iterator[PairBatch]:
        return self.images.pairs.batches(rank, world, size, accumulation, start)

    def report(self) -> dict[str, JoinReport]:
        return self.images.pairs.reports


@dataclass
class PredictorTask(_ImagesTask):
    """The predictor learns golden rankings."""

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

    def start(self, device: torch.device) -> nn.Module:
        self.images.start(device)
        return Predictor(self.config)

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

    def save(
        self, module: nn.Module, folder: str, before: Figures, after: Figures, reports: Sequence[dict[str, JoinReport]]
    ) -> None:
        assert isinstance(module, Predictor)
        settings = {"loss": self.loss_name, "target": self.target, "keep": self.keep}
        predictor.save(folder, module, {**self.images.record(before, after, reports), **settings})


@dataclass
class TokensTask(_ImagesTask):
    """Learnable tokens, trained with pruning on: cross-entropy over the class embeddings."""

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

    def start(self, device: torch.device) -> nn.Module:
        self.images.start(device)
        self.predictor.to(device)
        if self.prompted is not None:
            self.prompted.to(device)
        return VisualTokens(self.config)

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
