"""Golden rankings of many images at a time: the search, and what it has found at the keep rates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.model.tower import Tower
from patchrank.model.zero_shot import predict
from patchrank.search.candidates import Candidates
from patchrank.search.config import SearchConfig
from patchrank.search.objective import SCORES, Objective
from patchrank.search.patch_cosines import PatchCosines
from patchrank.search.strategy import Found
from patchrank.tokens import tokens_kept


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
        classes: (K, E) normalised class embeddings, or None.
        logit_scale: the factor on cosines before the softmax over classes.
        keep_rates: at which the pruned image is predicted.
        chunk: candidates a forward pass, `default_chunk` where None; halved, for good, whenever memory runs out.
        bank: (M, E) normalised embeddings that images are compared with, for the "similarities" score alone.

    Raises:
        UserError: as `SearchConfig.check`.
    """

    def __init__(
        self,
        tower: Tower,
        config: SearchConfig,
        classes: Tensor | None = None,
        logit_scale: float = 100.0,
        keep_rates: Sequence[float] = (),
        chunk: int | None = None,
        bank: Tensor | None = None,
    ) -> None:
        config.check(tower.grid, keep_rates, classes is not None, bank is not None)
        self.tower = tower
        self.config = config
        self.classes = None if classes is None else classes.to(tower.device)
        self.bank = None if bank is None else bank.to(tower.device)
        self.logit_scale = logit_scale
        self.keep_rates = tuple(keep_rates)
        self.candidates = Candidates(tower, config.block, chunk)

    @torch.inference_mode(False)
    @torch.no_grad()
    def search(self, images: Tensor, labels: Tensor | None = None) -> SearchResult:
        """Golden rankings of a batch of images.

        Args:
            images: (B, 3, H, W), preprocessed.
            labels: (B,) int64 ground-truth classes; needed for the "label" score alone.
        """
        tokens = self.tower.prefix(images)  # (B, p + N, D)
        everything = torch.arange(len(tokens), device=tokens.device)
        whole = self.candidates.embed(tokens, everything)  # (B, E)
        found = self.rank(tokens, whole, labels)
        pruned = [
            self.candidates.embed(
                tokens, everything, found.ranking[:, : tokens_kept(self.tower.num_tokens, keep)].sort(dim=1).values
            )
            for keep in self.keep_rates
        ]  # K x (B, E)
        stacked = torch.stack(pruned, dim=1) if pruned else whole.new_empty(len(whole), 0, whole.shape[1])  # (B, K, E)
        cosine = F.cosine_similarity(stacked, whole[:, None], dim=-1)  # (B, K)
        finite = found.score.isfinite().all(dim=1) & cosine.isfinite().all(dim=1)
        prediction = confidence = pruned_prediction = pruned_confidence = None
        if self.classes is not None:
            prediction, confidence = predict(whole, self.classes, self.logit_scale)
            flat = predict(stacked.flatten(0, 1), self.classes, self.logit_scale)
            pruned_prediction, pruned_confidence = (part.unflatten(0, cosine.shape) for part in flat)
        return SearchResult(
            ranking=found.ranking.cpu(),
            score=found.score.float().cpu(),
            step=found.step.cpu(),
            prediction=_cpu(prediction),
            confidence=_cpu(confidence),
            pruned_prediction=_cpu(pruned_prediction),
            pruned_confidence=_cpu(pruned_confidence),
            pruned_cosine=cosine.float().cpu(),
            finite=finite.cpu(),
            candidates=found.candidates,
        )

    @torch.inference_mode(False)  # a strategy may need gradients, which take no tensor of inference mode
    @torch.no_grad()
    def rank(self, tokens: Tensor, whole: Tensor, labels: Tensor | None = None) -> Found:
        """The search alone, of tokens before the cut, (B, p + N, D), and the whole images' embeddings, (B, E)."""
        labels = None if labels is None else labels.to(tokens.device)
        candidates, whole = self.candidates, whole.clone()  # of inference mode, where there may be no gradient
        classes, bank = (None if given is None else given.clone() for given in (self.classes, self.bank))
        if SCORES[self.config.score].patches:
            candidates = copy.copy(candidates)
            candidates.read = PatchCosines(self.tower, tokens, candidates.chunk)
            whole = torch.ones(len(tokens), self.tower.num_tokens, device=tokens.device)  # (B, N)
        objective = Objective(self.config.score, whole, classes, self.logit_scale, labels, bank)
        found = self.config.strategy(self.config, candidates, tokens, objective).run()
        self.candidates.chunk = candidates.chunk  # which may have been too many
        return found


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else (tensor.float() if tensor.is_floating_point() else tensor).cpu()
