"""What is searched: the settings of a search, what fits them, and what they cost."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.search.objective import SCORES
from patchrank.tokens import tokens_kept

if TYPE_CHECKING:
    from patchrank.search.strategy import Strategy

# What --rank-by calls a strategy, and the class of the file beside this one that it is.
STRATEGIES = {
    "effects": "by_effects.ByEffects",
    "scores": "by_scores.ByScores",
    "gates": "by_gates.ByGates",
    "exchanges": "by_exchanges.ByExchanges",
}


@dataclass(frozen=True)
class Step:
    """What a step of a search costs an image.

    Attributes:
        kept: the patch tokens of its candidates.
        candidates: how many are scored; an upper bound where larger blocks have lost tokens.
        removed: the tokens that leave.
        backward: how many passes go back through one of these candidates.
    """

    kept: int
    candidates: int
    removed: int
    backward: int = 0


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
    steps: int | None = flag(
        None, "search at most so many steps; 1 is the one-shot search; through gates, just so many"
    )
    # k; the last step takes what is left to take.
    remove_per_step: int = flag(4, "tokens that leave a step (%(default)s)")
    block: int = flag(1, "side of the sliding blocks, in tokens (%(default)s)")  # r
    # c, of the lazy search; None scores all again in every step.
    rescore: int | None = flag(
        0, "times remove-per-step tokens scored again, or 'all' (%(default)s)", convert=_rescore, type=str
    )
    rank_by: str = flag("effects", f"how scores become a ranking: {', '.join(STRATEGIES)} (%(default)s)")
    proposals: int = flag(2, "by effects or exchanges: sets that a step tries (%(default)s)")  # m

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"--score {self.score}: must be one of {', '.join(SCORES)}")
        if self.rank_by not in STRATEGIES:
            raise UserError(f"--rank-by {self.rank_by}: must be one of {', '.join(STRATEGIES)}")
        if not 0 <= self.keep < 1:
            raise UserError(f"--keep {self.keep}: must be at least 0 and below 1")
        at_least(self, 1, "steps", "remove_per_step", "block", "proposals")
        at_least(self, 0, "rescore")
        self.strategy.check(self)

    @property
    def strategy(self) -> type[Strategy]:
        """How candidates become a ranking; imported when asked for, as strategies need this file."""
        file, name = STRATEGIES[self.rank_by].split(".")
        return getattr(importlib.import_module(f"patchrank.search.{file}"), name)

    def check(self, grid: tuple[int, int], keep_rates: Sequence[float], classes: bool, bank: bool = False) -> None:
        """Raises UserError where the search does not fit a model.

        Args:
            grid: rows x columns of the tower's tokens.
            keep_rates: at which pruned images are predicted, each above 0 and at most 1.
            classes: whether there are class embeddings.
            bank: whether there are embeddings that images are compared with.
        """
        if SCORES[self.score].classes and not classes:
            raise UserError(
                f"--score {self.score} needs class embeddings: --classes, --class-embeddings or --prototypes"
            )
        if SCORES[self.score].bank and not bank:
            raise UserError(f"--score {self.score} needs a bank of embeddings that images are compared with")
        if self.block > min(grid):
            raise UserError(f"--block {self.block}: larger than the grid of {grid[0]} x {grid[1]} tokens")
        for keep in keep_rates:
            if not 0 < keep <= 1 or tokens_kept(math.prod(grid), keep) == 0:
                raise UserError(f"--keep-rates {keep}: must be at most 1 and leave a token")

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

    def cost(self, grid: tuple[int, int]) -> list[Step]:
        """What the search costs an image of rows x columns tokens, a step after the other."""
        return self.strategy.cost(self, grid)
