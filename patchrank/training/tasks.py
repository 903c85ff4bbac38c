"""The two trainings: the predictor learns which tokens stay, learnable tokens make up for what pruning takes away.

Both learn through the frozen model (see `gating`): the loss is what a pruned image's embedding lacks, so images need
neither labels nor rankings. Golden rankings, where there are some, are the predictor's first teacher.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.data.join import JoinReport
from patchrank.errors import UserError
from patchrank.flags import flag
from patchrank.model import classes, loading
from patchrank.model.adapter import NOTHING
from patchrank.model.classes import CLASSES_FILE, Classes
from patchrank.pruning import predictor, prompts
from patchrank.pruning.comparison import Comparison
from patchrank.pruning.methods import Method
from patchrank.pruning.predicted import Predicted
from patchrank.pruning.predictor import LOSSES, TARGETS, Predictor, PredictorConfig
from patchrank.pruning.prompts import SHIFTS, PromptedText, TokensConfig, VisualTokens
from patchrank.pruning.schedule import at_keep_rate
from patchrank.store import storage
from patchrank.tokens import count_kept, kendall_tau
from patchrank.training import gating, patch_gating
from patchrank.training.images import TrainingImages
from patchrank.training.lessons import Lesson, lessons
from patchrank.training.outcome import Figures

EMBEDDING, PATCHES = OBJECTIVES = ("embedding", "patches")  # what is kept of an image


@dataclass
class _ImagesTask:
    """What both tasks are about, how they read it, and how they learn through the model."""

    images: TrainingImages
    keep_rates: Sequence[float] = flag(
        (0.8, 0.7, 0.6, 0.5, 0.4), "drawn from, a step each (%(default)s)", group="learning through the model"
    )
    steps: int = field(default=0, init=False)  # of the whole training, once it has begun
    patches: dict[float, int] = field(default_factory=dict, init=False)  # that stay, by keep rate, likewise

    def steps_per_epoch(self, global_batch: int) -> int:
        return self.images.everything.steps_per_epoch(global_batch)

    def report(self) -> dict[str, JoinReport]:
        return self.images.reports()

    def evaluated(self) -> int:
        held_out, most = self.images.everything.rows[1], self.images.measured
        return min(held_out, most) + (most if self.images.test else 0)

    def phases(self) -> list[tuple[int, int]]:
        return [(0, self.steps)]

    def _begin(self, device: torch.device, steps: int, tokens: VisualTokens | None = None) -> None:
        self.steps = steps
        self.patches = {keep: self._count(keep, tokens) for keep in self.keep_rates}
        self.images.start(device)

    def _count(self, keep: float, tokens: VisualTokens | None = None, name: str = "--keep-rates") -> int:
        """The patches that stay beside learnable tokens, as in an evaluation. Raises UserError where there are none."""
        tower = self.images.tower
        return at_keep_rate(tower.adapter, Method(None, tokens), tower.cut, keep, name).get(tower.cut, tower.num_tokens)

    def _lacking(
        self,
        lesson: Lesson,
        tokens: Tensor,
        usefulness: Tensor,
        wanted: Tensor,
        first: int = 0,
        learnable: VisualTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the pruned embeddings of a lesson lack, a scalar, and these, (B, E).

        Args:
            first: the first such step.
            learnable: whose tokens are among `tokens`.
        """
        tower = self.images.tower
        keep, noise = self._drawn(lesson, first)
        stay, along = self.patches[keep], NOTHING
        if learnable is not None:
            along = learnable.along(tower.adapter, tower.cut, stay)
        found = gating.embeddings(tower, tokens, usefulness, stay, noise, along)  # (B, E)
        return gating.lacking(found, wanted, keep).mean(), found

    def _drawn(self, lesson: Lesson, first: int) -> tuple[float, Tensor]:
        """The keep rate of a lesson, and its noise, (B, N), which fades away from the first such step on."""
        tower, seed, step = self.images.tower, self.images.seed, lesson.step
        noise = gating.draw_noise(seed, step, lesson.images.keys, tower.num_tokens).to(tower.device)
        fading = gating.NOISE * (1 - (step - first) / max(1, self.steps - first))
        return gating.draw_keep(seed, step, self.keep_rates), fading * noise


@dataclass
class PredictorTask(_ImagesTask):
    """The predictor learns golden rankings first, where there are some, then through the model."""

    config: PredictorConfig = field(kw_only=True)
    golden: float = flag(0.5, "share of the steps that golden rankings teach (%(default)s)", group="predictor")
    loss_name: str = flag("bce", f"for golden rankings: {', '.join(LOSSES)} (%(default)s)", name="loss")
    target: str | None = flag(
        None, f"what it learns of them, {' or '.join(TARGETS)} (score after the paper's search, else rank)"
    )
    keep: float = flag(0.5, "keep rate at which it is matched with golden rankings (%(default)s)")
    objective: str | None = flag(
        None, f"what the model teaches to keep, {' or '.join(OBJECTIVES)} (patches where rankings are, else embedding)"
    )
    name: str = "predictor"

    def __post_init__(self) -> None:
        if self.loss_name not in LOSSES:
            raise UserError(f"--loss {self.loss_name}: must be one of {', '.join(LOSSES)}")
        corpus = self.images.corpus
        if corpus is None:
            self.golden = 0.0
        if not 0 <= self.golden <= 1:
            raise UserError(f"--golden {self.golden:g}: must be 0 to 1, a share of the steps")
        search = {} if corpus is None else corpus.settings["search"]
        if self.objective is None:
            self.objective = PATCHES if search.get("score") == PATCHES else EMBEDDING
        if self.objective not in OBJECTIVES:
            raise UserError(f"--objective {self.objective}: must be one of {', '.join(OBJECTIVES)}")
        if self.target is None:
            # The scores of other searches are of different steps, and cannot be compared with each other;
            # probabilities are 1, as the tables keep them, where the model is sure.
            kind = search.get("steps"), search.get("rank_by"), search.get("score")
            self.target = "score" if kind == (1, "scores", "preservation") else "rank"
        if self.target not in TARGETS:
            raise UserError(f"--target {self.target}: must be one of {', '.join(TARGETS)}")
        self.count = count_kept(self.config.num_tokens, self.keep)
        for keep in self.keep_rates:
            self._count(keep)

    @property
    def golden_steps(self) -> int:
        """The steps that golden rankings teach; the model teaches those after them."""
        return round(self.golden * self.steps)

    def steps_per_epoch(self, global_batch: int) -> int:
        if self.golden and self.images.ranked is not None:
            self.images.ranked.steps_per_epoch(1)  # refuses rankings none of which is left to train on
        return super().steps_per_epoch(global_batch)

    def settings(self) -> dict[str, Any]:
        return {
            **self.images.settings(),
            "predictor": _told(self.config, {**predictor.BEFORE, "mixing": ...}),  # which was always told
            "golden": self.golden,
            "loss": self.loss_name,
            "target": self.target,
            "keep": self.keep,
            "keep_rates": list(self.keep_rates),
            **({} if self.objective == EMBEDDING else {"objective": self.objective}),
        }

    def start(self, device: torch.device, steps: int) -> nn.Module:
        self._begin(device, steps)
        return Predictor(self.config)

    def phases(self) -> list[tuple[int, int]]:
        there = [(0, self.golden_steps), (self.golden_steps, self.steps - self.golden_steps)]
        return [(first, count) for first, count in there if count]

    def parameters(self, module: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(module.parameters()), 1.0)]

    def batches(self, rank: int, world: int, size: int, accumulation: int, start: int) -> Iterator[Lesson]:
        golden, ranked = self.golden_steps, self.images.ranked
        if start < golden and ranked is not None:
            found = ranked.batches(rank, world, size, accumulation, start)
            yield from lessons(itertools.islice(found, (golden - start) * accumulation), accumulation, start)
        start = max(start, golden)
        found = self.images.everything.batches(rank, world, size, accumulation, start - golden)
        yield from lessons(found, accumulation, start)

    def loss(self, module: nn.Module, batch: Lesson) -> Tensor:
        images = batch.images
        if batch.step >= self.golden_steps:
            if self.objective == PATCHES:
                tokens = self.images.tokens(images)
                keep, noise = self._drawn(batch, self.golden_steps)
                stay = self.patches[keep]
                found = patch_gating.cosines(self.images.tower, tokens, module(tokens), stay, noise)  # (B, N)
                return patch_gating.lacking(found, keep).mean()
            tokens, wanted = self.images.whole(images)
            return self._lacking(batch, tokens, module(tokens), wanted, self.golden_steps)[0]
        assert images.ranking is not None and images.score is not None and self.target is not None
        prediction = module(self.images.tokens(images))  # (B, N)
        target = predictor.targets(images.ranking, images.score, self.target).to(prediction.device)
        return LOSSES[self.loss_name](prediction, target)

    def evaluate(self, module: nn.Module, rank: int, world: int, add: Callable[[Tensor], Tensor]) -> Figures:
        assert isinstance(module, Predictor)
        figures: dict[str, float] = {}
        keep_rates = list(dict.fromkeys([*self.keep_rates, self.keep]))
        for part, batches in self.images.parts(rank, world):
            taus = torch.zeros(2, dtype=torch.float64)  # sum and count
            methods = {self.name: Method(Predicted(module))}
            comparison = Comparison(self.images.tower, methods, keep_rates, self.images.classes)
            for batch in batches:
                usefulness = comparison.add(batch)[-1].usefulness  # (B, N)
                if batch.ranking is not None and usefulness is not None:
                    tau = kendall_tau(usefulness, batch.ranking.to(usefulness.device))  # (B,)
                    taus += torch.tensor([tau.double().sum().item(), len(tau)])
            comparison.sums, (tau, count) = add(comparison.sums), add(taus).tolist()
            if count:
                matching = next(row.matching for row in comparison.rows()[1:] if row.keep == self.keep)
                figures |= {
                    f"{part}/matching rate at {self.count}": matching or 0.0,
                    f"{part}/Kendall tau": tau / count,
                }
            figures |= comparison.figures(part, {self.name: ""})
        for part, batches in self.images.parts(rank, world) if self.objective == PATCHES else ():
            found = patch_gating.figures(self.images.tower, module, self.patches, batches, add)
            figures |= {f"{part}/cosine of patches at keep {keep:g}": mean for keep, mean in found.items()}
        return figures

    def save(
        self, module: nn.Module, folder: str, before: Figures, after: Figures, reports: Sequence[dict[str, JoinReport]]
    ) -> None:
        assert isinstance(module, Predictor)
        settings = {"loss": self.loss_name, "target": self.target, "golden": self.golden, "keep": self.keep}
        settings["objective"] = self.objective
        predictor.save(folder, module, {**self.images.record(before, after, reports), **settings})


class Together(nn.Module):
    """A predictor and the learnable tokens that it is trained beside."""

    def __init__(self, predictor: Predictor, tokens: VisualTokens) -> None:
        super().__init__()
        self.predictor, self.tokens = predictor, tokens


@dataclass
class TokensTask(_ImagesTask):
    """Learnable tokens, and with them a predictor that is trained already, learn through the model.

    Where images have labels and there are class embeddings, cross-entropy over the classes comes on top.
    """

    config: TokensConfig = field(kw_only=True)
    predictor: Predictor = field(kw_only=True)
    keep: float = flag(0.6, "keep rate that the bundle is for (%(default)s)", group="tokens")
    label_weight: float = flag(0.1, "of the cross-entropy over the classes, where there are labels (%(default)g)")
    predictor_rate: float = flag(0.2, "the predictor's learning rate as a share of the tokens' (%(default)g)")
    shift_rate: float = flag(0.1, "the learning rate of shifts and scales, likewise (%(default)g)")
    prompted: PromptedText | None = None  # where there are learnable text tokens
    name: str = "tokens"

    def __post_init__(self) -> None:
        tokens = VisualTokens(self.config)
        self._count(self.keep, tokens, "--keep")
        for keep in self.keep_rates:
            self._count(keep, tokens)
        if self.prompted is not None and self.images.classes is None:
            raise UserError("--text: needs rankings of a search with --classes, whose labels it learns")
        if self.images.features and self.config.place == "input":
            raise UserError(
                "--cache-features: goes with --place cut alone, where the tokens before the cut stay the same"
            )

    def settings(self) -> dict[str, Any]:
        return {
            **self.images.settings(),
            "tokens": _told(self.config, prompts.BEFORE),
            "predictor": loading.digest(self.predictor.state_dict()),
            "predictor_rate": self.predictor_rate,
            "shift_rate": self.shift_rate,
            "label_weight": self.label_weight,
            "keep": self.keep,
            "keep_rates": list(self.keep_rates),
        }

    def start(self, device: torch.device, steps: int) -> nn.Module:
        tokens = VisualTokens(self.config)
        self._begin(device, steps, tokens)
        self.predictor.to(device)
        if self.prompted is not None:
            self.prompted.to(device)
        return Together(copy.deepcopy(self.predictor).train().requires_grad_(True), tokens)

    def parameters(self, module: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
        assert isinstance(module, Together)
        shifts = [parameter for name, parameter in module.tokens.named_parameters() if name in SHIFTS]
        tokens = [parameter for name, parameter in module.tokens.named_parameters() if name not in SHIFTS]
        groups = [
            (tokens if self.config.count else [], 1.0),
            (shifts, self.shift_rate),
            (list(module.predictor.parameters()), self.predictor_rate),
        ]
        return [group for group in groups if group[0]]

    def batches(self, rank: int, world: int, size: int, accumulation: int, start: int) -> Iterator[Lesson]:
        yield from lessons(self.images.everything.batches(rank, world, size, accumulation, start), accumulation, start)

    def loss(self, module: nn.Module, batch: Lesson) -> Tensor:
        assert isinstance(module, Together)
        images, tower = batch.images, self.images.tower
        tokens, wanted = self.images.whole(images)
        usefulness = module.predictor(tokens)  # (B, N)
        if self.config.place == "input":
            tokens = module.tokens.prefix(tower, images.pixels)  # (B, p + N + b, D)
        else:
            tokens = module.tokens.append(tokens)
        loss, found = self._lacking(batch, tokens, usefulness, wanted, learnable=module.tokens)
        if self.images.classes is None or not self.label_weight:
            return loss
        labels = images.labels.to(found.device)  # (B,); of shards that were not searched, they may be of no class
        labels = labels.where((labels >= 0) & (labels < len(self.images.classes)), -1)
        if not (labels >= 0).any():
            return loss
        known = self._classes(module.tokens)
        assert known is not None
        logits = self.images.logit_scale * F.normalize(found, dim=-1) @ known.T  # (B, K)
        return loss + self.label_weight * F.cross_entropy(logits, labels, ignore_index=-1)

    def evaluate(self, module: nn.Module, rank: int, world: int, add: Callable[[Tensor], Tensor]) -> Figures:
        assert isinstance(module, Together)
        figures: dict[str, float] = {}
        keep_rates = list(dict.fromkeys([*self.keep_rates, self.keep]))
        for part, batches in self.images.parts(rank, world):
            methods = {
                "pruned": Method(Predicted(module.predictor)),
                self.name: Method(Predicted(module.predictor), module.tokens, self._classes(module.tokens)),
            }
            comparison = Comparison(self.images.tower, methods, keep_rates, self.images.classes)
            for batch in batches:
                comparison.add(batch)
            comparison.sums = add(comparison.sums)
            figures |= comparison.figures(part, {"pruned": " without tokens", self.name: " with tokens"})
        return figures

    def _classes(self, tokens: VisualTokens) -> Tensor | None:
        """(K, E), normalised."""
        if self.prompted is not None and tokens.text is not None:
            return self.prompted(tokens.text)
        return self.images.classes

    def _held_out(self, figures: Figures, how: str) -> float | None:
        """What held-out images lose, with or without tokens, at equal cost; None where there are none."""
        names = {keep: f"held-out/cosine at keep {keep:g} {how} tokens" for keep in self.keep_rates}
        if not set(names.values()) <= set(figures):
            return None
        return sum(gating.weight(keep) * (1 - figures[name]) for keep, name in names.items())

    def save(
        self, module: nn.Module, folder: str, before: Figures, after: Figures, reports: Sequence[dict[str, JoinReport]]
    ) -> None:
        """Of what held-out images lose least with: tokens and predictor, this predictor alone, or that of before."""
        assert isinstance(module, Together)
        tokens, learnt, helps = module.tokens, module.predictor, None
        found, alone, began = (
            self._held_out(after, "with"),
            self._held_out(after, "without"),
            self._held_out(before, "without"),
        )
        if found is not None and alone is not None and began is not None:
            helps = found <= min(alone, began)
            if not helps:
                tokens = VisualTokens(TokensConfig(self.config.width, 0, self.config.place))
                learnt = module.predictor if alone <= began else self.predictor
        names = self.images.class_names
        record = {
            **self.images.record(before, after, reports),
            "keep": self.keep,
            "helps": helps,
            "class_names": names,
            "classes": None,
        }
        if self.prompted is not None and tokens.text is not None:  # the class embeddings that these text tokens make
            made = self._classes(tokens)
            assert made is not None
            embeddings = made.detach().cpu()
            digest = hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()[:16]
            record["classes"] = f"text tokens {digest}"
            classes.save(storage.join(folder, CLASSES_FILE), Classes(embeddings, record["classes"], names))
        predictor.save(folder, learnt, record)
        prompts.save(folder, tokens, record)


def _told(config: PredictorConfig | TokensConfig, old: Mapping[str, Any]) -> dict[str, Any]:
    """Its fields, without those that were not there before where they are as they were: such trainings go on."""
    return {name: value for name, value in asdict(config).items() if name not in old or old[name] != value}
