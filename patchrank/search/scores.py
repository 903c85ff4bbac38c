"""Scores of candidates: how well the model still does without the tokens T. High means that T can go."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = ("preservation", "confidence", "label")


def probabilities(embeddings: Tensor, classes: Tensor, logit_scale: float) -> Tensor:
    """CLIP's zero-shot class probabilities.

    Args:
        embeddings: (C, E), normalised or not.
        classes: (K, E), normalised class embeddings.
        logit_scale: the factor on the cosines.

    Returns:
        (C, K) in the dtype of the embeddings (float32, or float64 from a float64 tower).
    """
    return _logits(embeddings, classes, logit_scale).softmax(dim=-1)


def score(
    name: str,
    embeddings: Tensor,
    full: Tensor,
    classes: Tensor | None = None,
    logit_scale: float = 100.0,
    labels: Tensor | None = None,
) -> Tensor:
    """s(T) - 1 of each candidate, where row c of every argument belongs to candidate c.

    Where a model is sure, a probability s(T) is 1 to its last digit for one candidate as for another. What is missing
    to 1, the probability of all other classes, still tells them apart.

    Args:
        name: "preservation": cosine to the embedding of the full sequence; "confidence": the largest class probability;
            "label": the probability of the ground-truth class.
        embeddings: (C, E), of the pruned sequences.
        full: (C, E), of the full sequences.
        classes: (K, E), normalised class embeddings; not needed for "preservation".
        logit_scale: the factor on the cosines in the softmax.
        labels: (C,) int64 in 0 .. K-1; needed for "label" alone.

    Returns:
        (C,) float64, at most 0 but for rounding.

    Raises:
        ValueError: an unknown name, or an argument that the score needs is missing.
    """
    if name == "preservation":
        # A token of no use costs 2e-5 of cosine, float32 rounds at 6e-8: near ties would hang on the batch's size.
        return F.cosine_similarity(embeddings.double(), full.double(), dim=-1) - 1
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}; the scores are {', '.join(SCORES)}")
    if classes is None:
        raise ValueError(f"the score {name!r} needs class embeddings")
    likely = _logits(embeddings, classes, logit_scale).double().softmax(dim=-1)  # (C, K)
    if name == "confidence":
        labels = likely.argmax(dim=-1)  # (C,)
    if labels is None:
        raise ValueError("the score 'label' needs labels")
    return -likely.scatter(1, labels[:, None], 0).sum(dim=-1)


def predict(embeddings: Tensor, classes: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """The most likely class, (C,) int64, and its probability, (C,)."""
    confidence, prediction = torch.max(probabilities(embeddings, classes, logit_scale), dim=-1)
    return prediction, confidence


def _logits(embeddings: Tensor, classes: Tensor, logit_scale: float) -> Tensor:
    """(C, E), (K, E) -> (C, K) in the dtype of the embeddings."""
    return logit_scale * F.normalize(embeddings, dim=-1) @ classes.to(embeddings.dtype).T
