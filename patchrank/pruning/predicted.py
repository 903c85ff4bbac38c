"""Pruning by a trained predictor, alone or with the learnable tokens that were trained beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from patchrank.data.pair_batches import PairBatch
from patchrank.model.adapter import Adapter
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import Method
from patchrank.pruning.predictor import Predictor
from patchrank.pruning.selector import Attention, Selector


class Predicted(Selector):
    """Asks a predictor once, of all tokens before the cut."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, tokens: Tensor, count: int, attention: Attention, batch: PairBatch | None = None) -> Tensor:
        """As `Selector.forward`."""
        return self.predictor(tokens)

    def multiply_adds(self, adapter: Adapter, schedule: Mapping[int, int]) -> int:
        """As `Selector.multiply_adds`."""
        return self.predictor.multiply_adds() if schedule else 0


def alone(bundle: Bundle) -> Method:
    """As `Entry.make`, without learnable tokens."""
    return Method(Predicted(bundle.predictor))


def with_tokens(bundle: Bundle) -> Method:
    """As `Entry.make`, with the learnable tokens and class embeddings of the bundle, if it has any."""
    return Method(Predicted(bundle.predictor), bundle.tokens, bundle.classes)
