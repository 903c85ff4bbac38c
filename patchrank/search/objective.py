"""What a search keeps of an image: the scores of its candidates. High means that the tokens left out can go.

A score is a function of this file and a line in `SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.model import zero_shot

ITSELF = 0.999  # the cosine from which on an image of the bank is this one, or a copy


@dataclass(frozen=True)
class Objective:
    """The score of a search, bound to the images of a batch.

    Attributes:
        score: its name in `SCORES`.
        whole: (B, E), embeddings of the whole images, or what is read in their place.
        classes: (K, E), normalised class embeddings, or None where the score needs none.
        logit_scale: the factor on cosines before the softmax over classes.
        labels: (B,) int64 in 0 .. K-1, or None where the score needs none.
        bank: (M, E), normalised embeddings that images are compared with, or None where the score needs none.

    Raises:
        ValueError: the score needs labels, and there are none.
    """

    score: str
    whole: Tensor
    classes: Tensor | None = None
    logit_scale: float = 100.0
    labels: Tensor | None = None
    bank: Tensor | None = None

    def __post_init__(self) -> None:
        if SCORES[self.score].labels and self.labels is None:
            raise ValueError(f"the score {self.score!r} needs labels")

    @property
    def width(self) -> int:
        """The largest count of numbers that the score of one candidate is made of: class probabilities, or one."""
        score = SCORES[self.score]
        against = self.classes if score.classes else self.bank if score.bank else None
        return 1 if against is None else len(against)

    def score_minus_one(self, embeddings: Tensor, image: Tensor) -> Tensor:
        """s - 1, for scores s: minus what is missing to 1.

        Where a model is sure, a probability s is 1 to its last digit for one candidate as for another. What is missing
        to 1, the probability of all other classes, still tells them apart.

        Args:
            embeddings: (C, E), of candidates.
            image: (C,) int64, the row of the batch that each belongs to.

        Returns:
            (C,) float64, at most 0 but for rounding.
        """
        return SCORES[self.score].minus_one(self, embeddings, image)

    def log_missing(self, embeddings: Tensor, image: Tensor) -> Tensor:
        """log(1 - s), with a gradient where something is missing: (C, E), (C,) as above -> (C,) float64."""
        return (-self.score_minus_one(embeddings, image)).clamp_min(torch.finfo(torch.float64).tiny).log()

    def likely(self, embeddings: Tensor) -> Tensor:
        """Class probabilities, (C, E) -> (C, K) float64."""
        assert self.classes is not None  # `SearchConfig.check` has seen to it
        return zero_shot.logits(embeddings, self.classes, self.logit_scale).double().softmax(dim=-1)

    def log_similarities(self, embeddings: Tensor, image: Tensor) -> Tensor:
        """Log-softmax over the bank, without the images themselves: (C, E), (C,) as above -> (C, M) float64."""
        assert self.bank is not None  # `SearchConfig.check` has seen to it
        similarities = zero_shot.logits(embeddings, self.bank, self.logit_scale).double()
        return similarities.masked_fill(self._itself[image], -1e9).log_softmax(
            dim=-1
        )  # no -inf, whose difference is nan

    @cached_property
    def _itself(self) -> Tensor:
        """Which embeddings of the bank are of the same image, (B, M) bool: others would count for nothing beside it."""
        assert self.bank is not None
        return zero_shot.logits(self.whole, self.bank, 1.0) > ITSELF

    @cached_property
    def whole_log_similarities(self) -> Tensor:
        """`log_similarities` of the whole images, (B, M) float64."""
        return self.log_similarities(self.whole, torch.arange(len(self.whole), device=self.whole.device))


def _preservation(batch: Objective, embeddings: Tensor, image: Tensor) -> Tensor:
    """Of the cosine to the whole image's embedding."""
    # A token of no use costs 2e-5 of cosine, float32 rounds at 6e-8: near ties would hang on the batch's size.
    return F.cosine_similarity(embeddings.double(), batch.whole[image].double(), dim=-1) - 1


def _patches(batch: Objective, embeddings: Tensor, image: Tensor) -> Tensor:
    """Of the mean over all patches of the cosines that `PatchCosines` gives in the place of embeddings."""
    return embeddings.double().mean(dim=-1) - 1


def _similarities(batch: Objective, embeddings: Tensor, image: Tensor) -> Tensor:
    """Of 1 less the divergence, KL(whole || candidate), of the softmax of the similarities to the bank."""
    whole = batch.whole_log_similarities[image]  # (C, M)
    return (whole.exp() * (batch.log_similarities(embeddings, image) - whole)).sum(dim=-1)


def _confidence(batch: Objective, embeddings: Tensor, image: Tensor) -> Tensor:
    """Of the largest class probability."""
    likely = batch.likely(embeddings)  # (C, K)
    return _minus_others(likely, likely.argmax(dim=-1))


def _label(batch: Objective, embeddings: Tensor, image: Tensor) -> Tensor:
    """Of the probability of the ground-truth class."""
    assert batch.labels is not None
    return _minus_others(batch.likely(embeddings), batch.labels[image])


def _minus_others(likely: Tensor, label: Tensor) -> Tensor:
    """A probability less 1, without rounding it to 1: minus that of all other classes, (C, K), (C,) -> (C,)."""
    return -likely.scatter(1, label[:, None], 0).sum(dim=-1)


@dataclass(frozen=True)
class Score:
    """A score: the function behind `Objective.score_minus_one`, whether it needs classes, labels or a bank, and whether
    it is of the patches' features instead of the image's embedding."""

    minus_one: Callable[[Objective, Tensor, Tensor], Tensor]
    classes: bool = False
    labels: bool = False
    patches: bool = False
    bank: bool = False


SCORES = {
    "preservation": Score(_preservation),
    "similarities": Score(_similarities, bank=True),
    "patches": Score(_patches, patches=True),
    "confidence": Score(_confidence, classes=True),
    "label": Score(_label, classes=True, labels=True),
}
