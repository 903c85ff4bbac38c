"""The search for golden rankings: one-shot, exact greedy and lazy greedy, of many images at a time.

A candidate is a set T of tokens taken out of the sequence before the cut; its score tells how well the model does
without T (`patchrank.search.scores`). The candidates of a step are the r x r blocks of the patch grid, less the tokens
that have already left. Each step scores candidates and takes out k tokens:

    one-shot        steps=1         scores once
    exact greedy    rescore=None    scores every remaining token again in each step
    lazy greedy     rescore=c       after the first step scores again only the c * k tokens that look best to take out

Two ways to read the candidates (`predict`):

    "effects"   A token's effect is the change of the image embedding when it leaves, (E,) numbers instead of one: the
                mean over the blocks that cover it, divided by r * r. Effects add up: what a set of tokens does is
                predicted by the sum of their effects on the embedding of what is left now, which is computed anew
                after each step. So tokens are taken out one after the other, each the best beside those that left
                before it, and the tokens of one step know of each other. A step tries several such sets of k tokens
                (`proposals`), disjoint ones, and the one that turns out best leaves: that costs a candidate each. By
                what the others turned out worse or better than predicted the effects of their tokens are corrected.
    "scores"    A token's score is the mean over the blocks that cover it, and keeps until it is scored again; a step
                takes out the k tokens with the highest scores. With steps=1 this is the paper's search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.model.tower import Tower
from patchrank.search.candidates import Candidates, without
from patchrank.search.scores import SCORES, predict, score
from patchrank.tokens import tokens_kept

RANK_BY = ("effects", "scores")
PREDICTED_NUMBERS = 1 << 24  # that class probabilities of predicted embeddings may take at once


@dataclass(frozen=True)
class Step:
    """What a step of a search costs an image.

    Attributes:
        kept: the patch tokens of its candidates.
        candidates: how many are scored; an upper bound where larger blocks have lost tokens.
        removed: the tokens that leave.
    """

    kept: int
    candidates: int
    removed: int


def _rescore(value: int | str) -> int | None:
    """The field of the flag --rescore."""
    try:
        return None if value == "all" else int(value)
    except ValueError:
        raise UserError(f"--rescore {value}: must be a number or 'all'") from None


@dataclass(frozen=True)
class SearchConfig:
    """What is searched. Raises UserError for a value that makes no sense."""

    score: str = flag("preservation", f"what a ranking keeps: {', '.join(SCORES)} (%(default)s)", group="search")
    # The search ends when this share of the tokens is left; what is known by then ranks them.
    keep: float = flag(0.4, "search until this share of tokens is left (%(default)s)")
    steps: int | None = flag(None, "search at most so many steps; 1 is the one-shot search")
    # k; the last step takes what is left to take.
    remove_per_step: int = flag(4, "tokens that leave a step (%(default)s)")
    block: int = flag(1, "side of the sliding blocks, in tokens (%(default)s)")  # r
    # c, of the lazy search; None scores all again in every step.
    rescore: int | None = flag(
        0, "times remove-per-step tokens scored again, or 'all' (%(default)s)", convert=_rescore, type=str
    )
    rank_by: str = flag("effects", f"how scores become a ranking: {', '.join(RANK_BY)} (%(default)s)")
    proposals: int = flag(2, "by effects: sets that a step tries (%(default)s)")  # m

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"--score {self.score}: must be one of {', '.join(SCORES)}")
        if self.rank_by not in RANK_BY:
            raise UserError(f"--rank-by {self.rank_by}: must be one of {', '.join(RANK_BY)}")
        if not 0 <= self.keep < 1:
            raise UserError(f"--keep {self.keep}: must be at least 0 and below 1")
        at_least(self, 1, "steps", "remove_per_step", "block", "proposals")
        at_least(self, 0, "rescore")
        if self.rank_by == "scores" and self.rescore == 0 and self.steps != 1:
            raise UserError("--rank-by scores needs --rescore 1 or more, --rescore all, or --steps 1")

    def removals(self, num_tokens: int) -> list[int]:
        """How many tokens leave in each step; the last step may be smaller."""
        total = num_tokens - tokens_kept(num_tokens, self.keep)
        steps = max(1, math.ceil(total / self.remove_per_step))
        if self.steps is not None:
            steps = min(steps, self.steps)
        return [min(self.remove_per_step, total - step * self.remove_per_step) for step in range(steps)]

    def wanted(self, alive: int) -> int:
        """How many tokens are scored again, of `alive`, in a step after the first."""
        return alive if self.rescore is None else min(alive, self.rescore * self.remove_per_step)

    def tries(self, alive: int, count: int) -> int:
        """How many disjoint sets of `count` tokens, of those `alive`, a step by effects proposes."""
        return min(self.proposals, alive // count) if count else 1

    def cost(self, grid: tuple[int, int]) -> list[Step]:
        """What the search costs an image of rows x columns tokens, a step after the other."""
        rows, columns = grid
        blocks, alive, result = (rows - self.block + 1) * (columns - self.block + 1), rows * columns, []
        for number, count in enumerate(self.removals(alive)):
            scored = blocks if number == 0 else min(blocks, self.wanted(alive) * self.block**2)
            result.append(Step(alive - self.block**2 if number == 0 else alive - 1, scored, count))
            if self.rank_by == "effects" and self.steps != 1:
                result.append(Step(alive - count, self.tries(alive, count), 0))
            alive -= count
        return result


@dataclass(frozen=True)
class SearchResult:
    """Golden rankings of B images with N tokens each; everything on the CPU.

    Attributes:
        ranking: (B, N) int64, token ids, most useful first.
        score: (B, N) float32, by token id. Ranked by scores: the last known score of the token. Ranked by effects: the
            predicted score without the token and all those that left before it, at the time when it was chosen.
        step: (B, N) int64, by token id: the step, from 1, in which the token left; 0 if it never did.
        prediction, confidence: (B,) int64 and float32 of the whole image; None without class embeddings.
        pruned_prediction, pruned_confidence: (B, K) the same of the image pruned to each of K keep rates.
        pruned_cosine: (B, K) float32, cosine of the pruned image's embedding to the whole image's.
        finite: (B,) bool, False where an embedding or score overflowed: the ranking means nothing then.
        candidates: how many candidates were scored, of all images together.
    """

    ranking: Tensor
    score: Tensor
    step: Tensor
    prediction: Tensor | None
    confidence: Tensor | None
    pruned_prediction: Tensor | None
    pruned_confidence: Tensor | None
    pruned_cosine: Tensor
    finite: Tensor
    candidates: int


class Searcher:
    """Searches batches of images with one tower and one configuration.

    Args:
        tower: the image tower, cut where the tokens leave.
        config: the search.
        classes: (K, E) normalised class embeddings, or None (then "preservation" alone can be searched for).
        logit_scale: the factor on cosines before the softmax over classes.
        keep_rates: at which the pruned image is predicted, each above 0 and at most 1.
        chunk: candidates a forward pass, `default_chunk` where None; halved, for good, whenever memory runs out.

    Raises:
        UserError: a score that needs class embeddings without them, a block larger than the grid, or a bad keep rate.
    """

    def __init__(
        self,
        tower: Tower,
        config: SearchConfig,
        classes: Tensor | None = None,
        logit_scale: float = 100.0,
        keep_rates: Sequence[float] = (),
        chunk: int | None = None,
    ) -> None:
        if config.score != "preservation" and classes is None:
            raise UserError(
                f"--score {config.score} needs class embeddings: --classes, --class-embeddings or --prototypes"
            )
        if config.block > min(tower.grid):
            raise UserError(f"--block {config.block}: larger than the grid of {tower.grid[0]} x {tower.grid[1]} tokens")
        for keep in keep_rates:
            if not 0 < keep <= 1 or tokens_kept(tower.num_tokens, keep) == 0:
                raise UserError(f"--keep-rates {keep}: must be at most 1 and leave a token")
        self.tower = tower
        self.config = config
        self.classes = None if classes is None else classes.to(tower.device)
        self.logit_scale = logit_scale
        self.keep_rates = tuple(keep_rates)
        self.candidates = Candidates(tower, config.block, chunk)

    @torch.inference_mode()
    def search(self, images: Tensor, labels: Tensor | None = None) -> SearchResult:
        """Golden rankings of a batch of images.

        Args:
            images: (B, 3, H, W), preprocessed.
            labels: (B,) int64 ground-truth classes; needed for the "label" score alone.
        """
        tokens = self.tower.prefix(images)  # (B, p + N, D)
        everything = torch.arange(len(tokens), device=tokens.device)
        full = self.candidates.embed(tokens, everything)  # (B, E)
        if labels is not None:
            labels = labels.to(tokens.device)
        rank = self._by_effects if self.config.rank_by == "effects" else self._by_scores
        ranking, scores, step, candidates = rank(tokens, full, labels)
        pruned = [
            self.candidates.embed(
                tokens, everything, ranking[:, : tokens_kept(self.tower.num_tokens, keep)].sort(dim=1).values
            )
            for keep in self.keep_rates
        ]  # K x (B, E)
        stacked = torch.stack(pruned, dim=1) if pruned else full.new_empty(len(full), 0, full.shape[1])  # (B, K, E)
        cosine = F.cosine_similarity(stacked, full[:, None], dim=-1)  # (B, K)
        finite = scores.isfinite().all(dim=1) & cosine.isfinite().all(dim=1)
        prediction = confidence = pruned_prediction = pruned_confidence = None
        if self.classes is not None:
            prediction, confidence = predict(full, self.classes, self.logit_scale)
            flat = predict(stacked.flatten(0, 1), self.classes, self.logit_scale)
            pruned_prediction, pruned_confidence = (part.unflatten(0, cosine.shape) for part in flat)
        return SearchResult(
            ranking=ranking.cpu(),
            score=(scores + 1).float().cpu(),
            step=step.cpu(),
            prediction=_cpu(prediction),
            confidence=_cpu(confidence),
            pruned_prediction=_cpu(pruned_prediction),
            pruned_confidence=_cpu(pruned_confidence),
            pruned_cosine=cosine.float().cpu(),
            finite=finite.cpu(),
            candidates=candidates,
        )

    def _by_scores(self, tokens: Tensor, full: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """Ranking, score less 1 and step as in `SearchResult`, on the tower's device, and the number of candidates."""

        def score_them(embeddings: Tensor, images: Tensor) -> Tensor:
            return self._score(embeddings, full[images], None if labels is None else labels[images])[:, None]

        alive = self._all_tokens(tokens)  # (B, A), ascending token ids
        scores = full.new_zeros(alive.shape, dtype=torch.float64)  # (B, N)
        step = torch.zeros_like(alive)  # (B, N)
        removed, candidates = [], 0  # removed: each (B, k), in the order in which tokens leave
        for number, count in enumerate(self.config.removals(self.tower.num_tokens), start=1):
            wanted = alive
            if number > 1:
                wanted = _highest(scores, alive, self.config.wanted(alive.shape[1]))  # (B, M)
            fresh, scored = self.candidates.measure(tokens, alive, wanted, score_them, shared=False)
            candidates += scored
            scores = scores.scatter(1, wanted, fresh[..., 0])
            leaving = _highest(scores, wanted, count)  # (B, count)
            step.scatter_(1, leaving, number)
            alive = without(alive, leaving)
            removed.append(leaving)
        removed.append(_highest(scores, alive, alive.shape[1]))
        return torch.cat(removed, dim=1).flip(1), scores, step, candidates

    def _by_effects(self, tokens: Tensor, full: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """As `_by_scores`."""
        alive = self._all_tokens(tokens)  # (B, A), ascending token ids
        now = full  # (B, E), the embedding without the tokens that have left
        effects = full.new_zeros(*alive.shape, full.shape[1])  # (B, N, E)
        scores = full.new_zeros(alive.shape, dtype=torch.float64)  # (B, N)
        step = torch.zeros_like(alive)  # (B, N)
        removed, candidates = [], 0
        for number, count in enumerate(self.config.removals(self.tower.num_tokens), start=1):
            again = alive.shape[1] if number == 1 else self.config.wanted(alive.shape[1])
            if again:
                wanted = _highest(self._predicted(now, effects, full, labels), alive, again)  # (B, M)

                def effect(embeddings: Tensor, image: Tensor, since: Tensor = now) -> Tensor:
                    return embeddings - since[image]

                fresh, scored = self.candidates.measure(tokens, alive, wanted, effect, shared=True)
                candidates += scored
                effects = effects.scatter(1, wanted[..., None].expand_as(fresh), fresh)
            if self.config.steps == 1:
                leaving, expected, now = self._take_out(now, effects, alive, count, full, labels)
            else:
                leaving, expected, now, effects = self._best(tokens, now, effects, alive, count, full, labels)
                candidates += self.config.tries(alive.shape[1], count) * len(alive)
            scores.scatter_(1, leaving, expected)
            step.scatter_(1, leaving, number)
            alive = without(alive, leaving)
            removed.append(leaving)
        last, expected, _ = self._take_out(now, effects, alive, alive.shape[1], full, labels)
        scores.scatter_(1, last, expected)
        removed.append(last)
        return torch.cat(removed, dim=1).flip(1), scores, step, candidates

    def _best(
        self,
        tokens: Tensor,
        now: Tensor,
        effects: Tensor,
        alive: Tensor,
        count: int,
        full: Tensor,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Propose disjoint sets of tokens, embed the image without each, and choose the one without which it is best.

        The effects of the other sets' tokens take equal shares of what the prediction of their set was wrong by: the
        last of many tokens that can stand for one another, which looked as dispensable as the first, is known by that.

        Returns:
            The ids chosen and their predicted scores, both (B, count), the embedding without them, (B, E), and
            `effects` corrected, (B, N, E).
        """
        proposals, among = [], alive
        for _ in range(self.config.tries(alive.shape[1], count)):
            proposals.append(self._take_out(now, effects, among, count, full, labels))
            among = without(among, proposals[-1][0])
        # twice (B, m, count), (B, m, E)
        leaving, expected, predicted = (torch.stack(part, dim=1) for part in zip(*proposals, strict=True))
        batch, tries = leaving.shape[:2]
        image = torch.arange(batch, device=alive.device).repeat_interleave(tries)  # (B * m,)
        found = self.candidates.embed(tokens, image, without(alive[image], leaving.flatten(0, 1)))  # (B * m, E)
        score = self._score(found, full[image], None if labels is None else labels[image]).unflatten(0, (batch, tries))
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :1, None]  # (B, 1, 1); the first of equals
        found = found.unflatten(0, (batch, tries))  # (B, m, E)
        wrong = ((found - predicted) / count).scatter(1, best.expand(-1, -1, found.shape[2]), 0.0)  # (B, m, E)
        ids = leaving.flatten(1)[..., None].expand(-1, -1, found.shape[2])  # (B, m * count, E)
        effects = effects.scatter_add(1, ids, wrong.repeat_interleave(count, dim=1))
        leaving, expected, now = (part.take_along_dim(best, dim=1)[:, 0] for part in (leaving, expected, found))
        return leaving, expected, now, effects

    def _take_out(
        self,
        now: Tensor,
        effects: Tensor,
        alive: Tensor,
        count: int,
        full: Tensor,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose tokens to leave, one after the other, each the best beside those before it.

        Returns:
            Their ids in this order and their predicted scores, less 1, both (B, count), and the predicted embedding
            without them, (B, E).
        """
        gone = torch.ones_like(effects[..., 0], dtype=torch.bool).scatter_(1, alive, False)  # (B, N)
        leaving = alive[:, :0]
        expected = now.new_zeros(leaving.shape, dtype=torch.float64)
        for _ in range(count):
            predicted = self._predicted(now, effects, full, labels).masked_fill(gone, -math.inf)  # (B, N)
            token = predicted.sort(dim=1, descending=True, stable=True).indices[:, :1]  # (B, 1); the lower id of equals
            expected = torch.cat([expected, predicted.gather(1, token)], dim=1)
            gone = gone.scatter(1, token, True)
            now = now + effects.gather(1, token[..., None].expand(-1, -1, effects.shape[2]))[:, 0]
            leaving = torch.cat([leaving, token], dim=1)
        return leaving, expected, now

    def _predicted(self, now: Tensor, effects: Tensor, full: Tensor, labels: Tensor | None) -> Tensor:
        """The score, less 1, that each token's leaving is predicted to make: (B, E), (B, N, E) -> (B, N) float64."""
        batch, tokens = effects.shape[:2]
        # Probabilities over many classes are large: a few images at a time then.
        classes = 1 if self.classes is None or self.config.score == "preservation" else len(self.classes)
        size = max(1, PREDICTED_NUMBERS // (tokens * classes))
        parts = []
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            embeddings = (now[rows, None] + effects[rows]).flatten(0, 1)  # (b * N, E)
            whole = full[rows].repeat_interleave(tokens, dim=0)  # (b * N, E)
            mine = None if labels is None else labels[rows].repeat_interleave(tokens)
            parts.append(self._score(embeddings, whole, mine).unflatten(0, (-1, tokens)))  # (b, N)
        return torch.cat(parts)

    def _score(self, embeddings: Tensor, full: Tensor, labels: Tensor | None) -> Tensor:
        """As `patchrank.search.scores.score`."""
        return score(self.config.score, embeddings, full, self.classes, self.logit_scale, labels)

    def _all_tokens(self, tokens: Tensor) -> Tensor:
        """(B, N), the ids of all tokens of each image."""
        return torch.arange(self.tower.num_tokens, device=tokens.device).repeat(len(tokens), 1)


def _highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Of some tokens those with the highest scores, best first: (B, N), (B, M) token ids -> (B, count).

    Of equal scores the lower id is the better.
    """
    among = among.sort(dim=1).values
    order = scores.gather(1, among).sort(dim=1, descending=True, stable=True).indices
    return among.gather(1, order[:, :count])


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else (tensor.float() if tensor.is_floating_point() else tensor).cpu()
