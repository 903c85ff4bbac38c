"""What all strategies of the search for golden rankings have in common: steps, in each of which some tokens leave.

A candidate is a set T of tokens taken out of the sequence before the cut; its score tells how well the model does
without T (`patchrank.search.objective`). The candidates of a step are the r x r blocks of the patch grid, less the
tokens that have already left. Each step scores candidates and takes out k tokens:

    one-shot        steps=1         scores once
    exact greedy    rescore=None    scores every remaining token again in each step
    lazy greedy     rescore=c       after the first step scores again only the c * k tokens that look best to take out

A strategy tells what is made of the candidates. A new one is a file beside this one, with a `Strategy`, and a line in
`patchrank.search.config.STRATEGIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchrank.search.candidates import Candidates, Value, without
from patchrank.search.config import SearchConfig, Step
from patchrank.search.objective import Objective

if TYPE_CHECKING:
    from patchrank.model.tower import Tower


@dataclass(frozen=True)
class Found:
    """`ranking`, `step` and `candidates` as in `SearchResult`, on the tower's device; `score`, too, in float64."""

    ranking: Tensor
    score: Tensor
    step: Tensor
    candidates: int


class Strategy:
    """The search of one batch, and what is known of its images meanwhile.

    Args:
        config: the search.
        candidates: embed what is left of the images.
        tokens: (B, p + N, D) from `Tower.prefix`.
        objective: the score, bound to the same B images.

    Attributes:
        alive: (B, A) int64, ids of the tokens that have not left, ascending.
        score_minus_one: (B, N) float64, by token id, what `Found.score` will be, less 1.
        scored: how many candidates were embedded.
    """

    def __init__(self, config: SearchConfig, candidates: Candidates, tokens: Tensor, objective: Objective) -> None:
        self.config, self.candidates, self.tokens, self.objective = config, candidates, tokens, objective
        self.alive = torch.arange(candidates.tower.num_tokens, device=tokens.device).repeat(len(tokens), 1)
        self.score_minus_one = objective.whole.new_zeros(self.alive.shape, dtype=torch.float64)
        self.scored = 0

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """Raises UserError for settings that this strategy makes no sense of."""

    @classmethod
    def tries(cls, config: SearchConfig, alive: int, count: int) -> int:
        """How many more candidates a step embeds to choose `count` tokens, of those `alive`, that leave."""
        return 0

    @classmethod
    def cost(cls, config: SearchConfig, grid: tuple[int, int]) -> list[Step]:
        """As `SearchConfig.cost`: in each step blocks are measured, then `tries`."""
        rows, columns = grid
        blocks, alive, result = (rows - config.block + 1) * (columns - config.block + 1), rows * columns, []
        for number, count in enumerate(config.removals(alive)):
            measured = blocks if number == 0 else min(blocks, config.wanted(alive) * config.block**2)
            result.append(Step(alive - config.block**2 if number == 0 else alive - 1, measured, count))
            if tries := cls.tries(config, alive, count):
                result.append(Step(alive - count, tries, 0))
            alive -= count
        return result

    @classmethod
    def start_multiply_adds(cls, tower: Tower) -> int:
        """Exact multiply-adds an image of what a search computes beside candidates."""
        return 0

    def leave(self, count: int, first: bool) -> Tensor:
        """Ids of the tokens that leave next, (B, count), in this order; fills in their scores.

        Args:
            first: whether this is the first step: nothing is known of any token then.
        """
        raise NotImplementedError  # a strategy whose tokens do not leave step by step has a `run` of its own

    def rest(self) -> Tensor:
        """The tokens still alive as far as they are known, (B, A), most dispensable first; fills in their scores."""
        raise NotImplementedError

    def run(self) -> Found:
        """Search."""
        step = torch.zeros_like(self.alive)  # (B, N)
        removed = []  # each (B, k), in the order in which tokens leave
        for number, count in enumerate(self.config.removals(self.alive.shape[1]), start=1):
            removed.append(self.leave(count, number == 1))
            step.scatter_(1, removed[-1], number)
            self.alive = without(self.alive, removed[-1])
        removed.append(self.rest())
        return Found(torch.cat(removed, dim=1).flip(1), self.score_minus_one + 1, step, self.scored)

    def measure(self, wanted: Tensor, value: Value, shared: bool = False) -> Tensor:
        """As `Candidates.measure`, of the tokens that are alive -> (B, M, q)."""
        values, candidates = self.candidates.measure(self.tokens, self.alive, wanted, value, shared)
        self.scored += candidates
        return values


def highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Of some tokens those with the highest scores, best first: (B, N), (B, M) token ids -> (B, count).

    Of equal scores the lower id is the better.
    """
    among = among.sort(dim=1).values
    order = scores.gather(1, among).sort(dim=1, descending=True, stable=True).indices
    return among.gather(1, order[:, :count])
