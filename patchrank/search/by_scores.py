"""Ranked by scores: those of the tokens leave first that have the highest scores.

A token's score is the mean over the blocks that cover it, and keeps until it is scored again. With steps=1 this is the
paper's search.
"""

from __future__ import annotations

from torch import Tensor

from patchrank.errors import UserError
from patchrank.search.config import SearchConfig
from patchrank.search.strategy import Strategy, highest


class ByScores(Strategy):
    """As the file says."""

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """As `Strategy.check`."""
        if config.rescore == 0 and config.steps != 1:
            raise UserError("--rank-by scores needs --rescore 1 or more, --rescore all, or --steps 1")

    def leave(self, count: int, first: bool) -> Tensor:
        """As `Strategy.leave`."""
        again = self.config.wanted(self.alive.shape[1])
        wanted = self.alive if first else highest(self.score_minus_one, self.alive, again)  # (B, M)
        fresh = self.measure(wanted, self._score)  # (B, M, 1)
        self.score_minus_one = self.score_minus_one.scatter(1, wanted, fresh[..., 0])
        return highest(self.score_minus_one, wanted, count)

    def rest(self) -> Tensor:
        """As `Strategy.rest`."""
        return highest(self.score_minus_one, self.alive, self.alive.shape[1])

    def _score(self, embeddings: Tensor, image: Tensor) -> Tensor:
        """(c, E), (c,) -> (c, 1)."""
        return self.objective.score_minus_one(embeddings, image)[:, None]
