"""CLIP's zero-shot classification: of class embeddings, which an image's embedding is nearest to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(embeddings: Tensor, classes: Tensor, logit_scale: float) -> Tensor:
    """(C, E), (K, E) as for `probabilities` -> (C, K) in the dtype of the embeddings."""
    return logit_scale * F.normalize(embeddings, dim=-1) @ classes.to(embeddings.dtype).T


def probabilities(embeddings: Tensor, classes: Tensor, logit_scale: float) -> Tensor:
    """Class probabilities.

    Args:
        embeddings: (C, E), normalised or not.
        classes: (K, E), normalised class embeddings.
        logit_scale: the factor on the cosines.

    Returns:
        (C, K) in the dtype of the embeddings (float32, or float64 from a float64 tower).
    """
    return logits(embeddings, classes, logit_scale).softmax(dim=-1)


def predict(embeddings: Tensor, classes: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """The most likely class, (C,) int64, and its probability, (C,)."""
    confidence, prediction = torch.max(probabilities(embeddings, classes, logit_scale), dim=-1)
    return prediction, confidence
