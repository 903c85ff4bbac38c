"""Ranked through gates: a usefulness for every token is improved step by step, by the gradient of what is lost.

In each step the m most useful tokens stay. They have gate 1 and those that follow have gate 0 as keys (`through`),
and a pass forward and one back tell how much would be lost, or gained, by a little less or more of each of them. A
gate's gradient becomes the usefulness's as if gates were a sigmoid around the threshold, so that the tokens near it
change places. m is another in every step, so the ranking that is left is good at all these keep rates, and a token that
can stand for another is known by that: when the one has left, the other's gradient grows.

What counts is the gradient of log(1 - s), s the score: 1 - s doubles with every tenth of the tokens that leaves.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchrank.errors import UserError
from patchrank.search.candidates import Candidates
from patchrank.search.config import SearchConfig, Step
from patchrank.search.objective import SCORES, Objective
from patchrank.search.strategy import Found, Strategy
from patchrank.tokens import tokens_kept

if TYPE_CHECKING:
    from patchrank.model.tower import Tower

STEPS = 16  # where no number is given
RATES = 5  # keep rates that take turns, from the search's own up
LARGEST = 0.8  # of them
NEXT = 0.15  # share of all tokens, the next in usefulness, that are there with gate 0
TEMPERATURE = 0.5  # of the sigmoid, in standard deviations of the usefulness
RATE, LAST_RATE = 0.3, 0.03  # the step's length at first and in the end, likewise
MOMENTUM, SQUARES = 0.8, 0.95  # of running means, of the gradient and of its square
LONGEST = 3.0  # of a token's step, in usual gradients


class ByGates(Strategy):
    """As the file says.

    Attributes:
        usefulness: (B, N) float64, standardized.
    """

    def __init__(self, config: SearchConfig, candidates: Candidates, tokens: Tensor, objective: Objective) -> None:
        super().__init__(config, candidates, tokens, objective)
        tower = candidates.tower
        attention = tower.adapter.class_attention(tokens, tower.cut).double()  # (B, N)
        # Ranks, as a few tokens have most of the attention; of equals the lower id is the more useful.
        order = attention.sort(dim=1, descending=True, stable=True).indices
        ranks = torch.arange(attention.shape[1] - 1, -1, -1, device=tokens.device).expand_as(order)
        self.usefulness = _standardized(torch.zeros_like(attention).scatter(1, order, ranks.double()))
        self.mean, self.square = torch.zeros_like(attention), attention.new_zeros(len(attention), 1)

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """As `Strategy.check`."""
        if config.block != 1:
            raise UserError(f"--rank-by {config.rank_by} is of single tokens: it needs --block 1")
        if SCORES[config.score].patches:
            raise UserError(
                f"--rank-by {config.rank_by}: goes through the embedding, which --score {config.score} is not of"
            )

    @classmethod
    def start_multiply_adds(cls, tower: Tower) -> int:
        """As `Strategy.start_multiply_adds`: of the class token's attention."""
        return tower.adapter.class_attention_multiply_adds(tower.length)

    @classmethod
    def cost(cls, config: SearchConfig, grid: tuple[int, int]) -> list[Step]:
        """As `Strategy.cost`: a pass forward and one back a step; all tokens leave in the end."""
        total = math.prod(grid)
        steps = [Step(_there(count, total), 1, 0, backward=1) for count in counts(config, total)]
        return [*steps, Step(0, 0, total - tokens_kept(total, config.keep))]

    def run(self) -> Found:
        """Search."""
        total = self.alive.shape[1]
        kept = counts(self.config, total)
        found: dict[int, Tensor] = {}
        for number, count in enumerate(kept):
            found[count] = self._improve(count, number, len(kept))  # (B,), as last measured
        ranking = self._ranking()
        step, score = torch.zeros_like(self.alive), self.score_minus_one
        # Tokens leave in as many steps as keep rates were tried, those first that no rate keeps.
        ends = [total, *sorted(found, reverse=True)]
        for number, (start, end) in enumerate(itertools.pairwise(ends), start=1):
            step.scatter_(1, ranking[:, end:start], number)
            score.scatter_(1, ranking[:, end:start], found[end][:, None].expand(-1, start - end))
        score.scatter_(1, ranking[:, : ends[-1]], found[ends[-1]][:, None].expand(-1, ends[-1]))
        return Found(ranking, score + 1, step, self.scored)

    def _improve(self, count: int, number: int, steps: int) -> Tensor:
        """One step, of so many, at which `count` tokens stay -> the score of these, less 1, (B,) float64."""
        ids = self._ranking()[:, : _there(count, self.alive.shape[1])]  # (B, n)
        useful = self.usefulness.gather(1, ids)
        hard = (torch.arange(ids.shape[1], device=ids.device) < count).double().expand(ids.shape)  # (B, n)
        embeddings, slopes = self.candidates.derive(self.tokens, ids, hard, self.objective.log_missing)
        self.scored += len(ids)
        threshold = useful[:, count - 1 : count + 1].mean(dim=1, keepdim=True)  # (B, 1)
        soft = ((useful - threshold) / TEMPERATURE).sigmoid()
        gradient = torch.zeros_like(self.usefulness).scatter(1, ids, slopes.double() * soft * (1 - soft))
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradient
        self.square = SQUARES * self.square + (1 - SQUARES) * gradient.square().mean(dim=1, keepdim=True)
        usual = (self.square / (1 - SQUARES ** (number + 1))).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        step = (self.mean / (1 - MOMENTUM ** (number + 1)) / usual).clamp(-LONGEST, LONGEST)
        rate = RATE + (LAST_RATE - RATE) * number / steps
        self.usefulness = _standardized(self.usefulness - rate * step)
        return self.objective.score_minus_one(embeddings, torch.arange(len(ids), device=ids.device))

    def _ranking(self) -> Tensor:
        return self.usefulness.sort(dim=1, descending=True, stable=True).indices  # (B, N)


def counts(config: SearchConfig, total: int) -> list[int]:
    """How many of all tokens stay in each step: all rates once in every few steps, in an order drawn for these."""
    largest = max(LARGEST, config.keep)
    rates = [config.keep + (largest - config.keep) * number / (RATES - 1) for number in range(RATES)]
    sizes = sorted({min(total - 1, max(1, tokens_kept(total, rate))) for rate in rates})
    steps, chance = STEPS if config.steps is None else config.steps, random.Random(0)
    result: list[int] = []
    while len(result) < steps:
        result += chance.sample(sizes, len(sizes))
    return result[:steps]


def _there(count: int, total: int) -> int:
    """How many tokens are there when `count` of all stay."""
    return min(total, count + round(NEXT * total))


def _standardized(usefulness: Tensor) -> Tensor:
    """With mean 0 and deviation 1 in every image: (B, N) likewise."""
    centred = usefulness - usefulness.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt()
