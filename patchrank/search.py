"""The search for golden rankings: one-shot, exact greedy and lazy greedy, of many images at a time.

A candidate is a set T of tokens taken out of the sequence before the cut; its score tells how well the model does
without T (`patchrank.scores`). The candidates of a step are the r x r blocks of the patch grid, less the tokens that
have already left; a token's score is the mean over the blocks that cover it. Each step scores candidates and takes out
the k tokens with the highest scores:

    one-shot        steps=1         scores once; the ranking is the order of those scores
    exact greedy    rescore=None    scores every remaining token again in each step
    lazy greedy     rescore=c       after the first step scores again only the c * k tokens whose last known score is
                                    best, takes out the best k of these, and keeps the other scores as they are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.errors import UserError
from patchrank.scores import SCORES, predict, score
from patchrank.vit import Tower

CACHE_BYTES = 4 << 20  # that the widest activation of a chunk may take on a CPU


@dataclass(frozen=True)
class SearchConfig:
    """What is searched. Raises UserError for a value that makes no sense."""

    score: str = "preservation"  # one of patchrank.scores.SCORES
    keep: float = 0.5  # the search ends when this share of the tokens is left; their last known score ranks them
    steps: int | None = None  # ... or after this many steps; 1 is the one-shot search
    remove_per_step: int = 4  # k, the tokens that leave in a step; the last step takes what is left to take
    block: int = 1  # r, the side of the sliding blocks, in tokens
    rescore: int | None = 2  # c, of the lazy search; None scores all again in every step

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"--score {self.score}: must be one of {', '.join(SCORES)}")
        if not 0 <= self.keep < 1:
            raise UserError(f"--keep {self.keep}: must be at least 0 and below 1")
        for name in ("steps", "remove_per_step", "block", "rescore"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")

    def removals(self, num_tokens: int) -> list[int]:
        """How many tokens leave in each step; the last step may be smaller."""
        total = num_tokens - tokens_kept(num_tokens, self.keep)
        steps = max(1, math.ceil(total / self.remove_per_step))
        if self.steps is not None:
            steps = min(steps, self.steps)
        return [min(self.remove_per_step, total - step * self.remove_per_step) for step in range(steps)]


@dataclass(frozen=True)
class SearchResult:
    """Golden rankings of B images with N tokens each; everything on the CPU.

    Attributes:
        ranking: (B, N) int64, token ids, most useful first.
        score: (B, N) float32, by token id: the last known score of the token.
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


def tokens_kept(num_tokens: int, keep: float) -> int:
    """The number of tokens that stay at a keep rate: keep * num_tokens, rounded half up."""
    return math.floor(keep * num_tokens + 0.5)


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
        self.chunk = chunk or default_chunk(tower)
        self.cover = block_cover(tower.grid, config.block).to(tower.device)  # (P, N)

    @torch.inference_mode()
    def search(self, images: Tensor, labels: Tensor | None = None) -> SearchResult:
        """Golden rankings of a batch of images.

        Args:
            images: (B, 3, H, W), preprocessed.
            labels: (B,) int64 ground-truth classes; needed for the "label" score alone.
        """
        tokens = self.tower.prefix(images)  # (B, 1 + N, D)
        everything = torch.arange(len(tokens), device=tokens.device)
        full = self._embed(tokens, everything)  # (B, E)
        if labels is not None:
            labels = labels.to(tokens.device)
        ranking, scores, step, candidates = self._rank(tokens, full, labels)
        pruned = [
            self._embed(tokens, everything, ranking[:, : tokens_kept(self.tower.num_tokens, keep)].sort(dim=1).values)
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
            score=scores.float().cpu(),
            step=step.cpu(),
            prediction=_cpu(prediction),
            confidence=_cpu(confidence),
            pruned_prediction=_cpu(pruned_prediction),
            pruned_confidence=_cpu(pruned_confidence),
            pruned_cosine=cosine.float().cpu(),
            finite=finite.cpu(),
            candidates=candidates,
        )

    def _rank(self, tokens: Tensor, full: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """Ranking, score and step as in `SearchResult`, on the tower's device, and the number of candidates scored."""
        batch, num_tokens = len(tokens), self.tower.num_tokens
        alive = torch.ones(batch, num_tokens, dtype=torch.bool, device=tokens.device)
        scores = full.new_zeros(batch, num_tokens)
        step = torch.zeros(batch, num_tokens, dtype=torch.int64, device=tokens.device)
        removed: list[Tensor] = []  # each (B, k), in the order in which tokens leave
        candidates = 0
        for number, count in enumerate(self.config.removals(num_tokens), start=1):
            wanted = alive
            if number > 1 and self.config.rescore is not None:
                best = _highest(scores, alive, self.config.rescore * self.config.remove_per_step)
                wanted = torch.zeros_like(alive).scatter_(1, best, True) & alive
            fresh, scored = self._score_tokens(tokens, full, labels, alive, wanted)
            candidates += scored
            scores = torch.where(wanted, fresh, scores)
            leaving = _highest(scores, wanted, count)  # (B, count)
            step.scatter_(1, leaving, number)
            alive = alive.scatter(1, leaving, False)
            removed.append(leaving)
        left = num_tokens - sum(part.shape[1] for part in removed)
        removed.append(_highest(scores, alive, left))
        return torch.cat(removed, dim=1).flip(1), scores, step, candidates

    def _score_tokens(
        self, tokens: Tensor, full: Tensor, labels: Tensor | None, alive: Tensor, wanted: Tensor
    ) -> tuple[Tensor, int]:
        """Scores of the wanted tokens, (B, N), anything elsewhere, and how many candidates that took.

        alive, wanted: (B, N) bool. A candidate is a block that covers a wanted token, less the tokens already gone.
        """
        useful = (wanted[:, None] & self.cover).any(dim=-1)  # (B, P)
        image, block = useful.nonzero(as_tuple=True)  # both (C,)
        stays = alive[image] & ~self.cover[block]  # (C, N)
        sizes = stays.sum(dim=1)  # (C,): blocks lose tokens unevenly, so sequences differ in length
        result = full.new_empty(len(image))  # (C,)

        def score_them(embeddings: Tensor, images: Tensor) -> Tensor:
            mine = None if labels is None else labels[images]
            return score(self.config.score, embeddings, full[images], self.classes, self.logit_scale, mine)

        for size in sizes.unique().tolist():
            same = (sizes == size).nonzero()[:, 0]  # (c,)
            kept = stays[same].nonzero()[:, 1].view(len(same), size)  # (c, size), ascending token ids
            result[same] = self._embed(tokens, image[same], kept, score_them)  # (c,)
        by_block = torch.zeros(useful.shape, dtype=torch.float64, device=result.device)  # (B, P)
        by_block[image, block] = result.double()
        covered = self.cover.double()
        mean = by_block @ covered / (useful.double() @ covered)  # (B, N); blocks off `useful` cover no wanted token
        return mean.to(result.dtype), len(image)

    def _embed(
        self,
        tokens: Tensor,
        image: Tensor,
        kept: Tensor | None = None,
        then: Callable[[Tensor, Tensor], Tensor] = lambda embeddings, image: embeddings,
    ) -> Tensor:
        """Embeddings of candidates, in chunks that fit the memory, or what `then` makes of a chunk's.

        image: (C,), the row of `tokens` of each candidate; kept: (C, n), or None for whole images.
        then: (c, E), (c,) -> (c, ...), for example scores; applied a chunk at a time, as class probabilities are large.
        """
        parts, start = [], 0
        while start < len(image):
            rows = slice(start, start + self.chunk)
            try:
                embeddings = self.tower.suffix(tokens, None if kept is None else kept[rows], image[rows])
                parts.append(then(embeddings, image[rows]))
            except RuntimeError as error:
                if not _out_of_memory(error) or self.chunk == 1:
                    raise
                self.chunk //= 2
                continue
            start += self.chunk
        return torch.cat(parts)


def default_chunk(tower: Tower) -> int:
    """Candidates a forward pass: many on a GPU; on a CPU few enough that a block's activations stay in its cache."""
    if tower.device.type != "cpu":
        return 512
    hidden = tower.visual.transformer.resblocks[0].mlp.c_fc.weight  # (hidden, D); its output is the widest activation
    candidate = tower.num_tokens * hidden.shape[0] * hidden.element_size()  # bytes
    return max(4, min(64, CACHE_BYTES // candidate))


def block_cover(grid: tuple[int, int], block: int) -> Tensor:
    """Which tokens each r x r block covers, sliding over the patch grid with stride 1.

    Returns:
        (P, N) bool, P = (rows - r + 1) * (columns - r + 1). Tokens at the border are covered by fewer blocks.
    """
    rows, columns = grid
    token = torch.arange(rows * columns).view(rows, columns)
    ids = token.unfold(0, block, 1).unfold(1, block, 1).flatten(2).flatten(0, 1)  # (P, r * r)
    return torch.zeros(len(ids), rows * columns, dtype=torch.bool).scatter_(1, ids, True)


def _highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The tokens with the highest scores among the marked ones, best first, (B, count); the lower id where scores tie.

    With fewer marked tokens than `count` the rest of a row is arbitrary.
    """
    masked = scores.masked_fill(~among, -math.inf)
    return masked.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has its own exception; the CPU's allocator raises a plain RuntimeError that only its text tells apart."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else (tensor.float() if tensor.is_floating_point() else tensor).cpu()
