"""Ranked by effects: tokens leave one after the other, each the best beside those that left before it.

A token's effect is the change of the image embedding when it leaves, (E,) numbers instead of one: the mean over the
blocks that cover it, divided by r * r. Effects add up: what a set of tokens does is predicted by the sum of their
effects on the embedding of what is left now, which is computed anew after each step. So the tokens of one step know of
each other. A step tries several such sets of k tokens (`proposals`), disjoint ones, and the one that turns out best
leaves: that costs a candidate each. By what the others turned out worse or better than predicted the effects of their
tokens are corrected.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from patchrank.search.candidates import Candidates, without
from patchrank.search.config import SearchConfig
from patchrank.search.objective import Objective
from patchrank.search.strategy import Strategy, highest

PREDICTED_NUMBERS = 1 << 24  # that class probabilities of predicted embeddings may take at once


class Proposal(NamedTuple):
    """Tokens that may leave.

    Attributes:
        ids: (B, k), in the order in which they were chosen.
        score_minus_one: (B, k), the predicted score without each and those before it, less 1.
        embedding: (B, E), without all of them.
    """

    ids: Tensor
    score_minus_one: Tensor
    embedding: Tensor


class ByEffects(Strategy):
    """As the file says.

    Attributes:
        now: (B, E), the embedding without the tokens that have left.
        effects: (B, N, E), by token id.
    """

    def __init__(self, config: SearchConfig, candidates: Candidates, tokens: Tensor, objective: Objective) -> None:
        super().__init__(config, candidates, tokens, objective)
        self.now = objective.whole
        self.effects = self.now.new_zeros(*self.alive.shape, self.now.shape[1])

    @classmethod
    def tries(cls, config: SearchConfig, alive: int, count: int) -> int:
        """As `Strategy.tries`: how many disjoint sets a step proposes. The one-shot search has one and trusts it."""
        if config.steps == 1:
            return 0
        return min(config.proposals, alive // count) if count else 1

    def leave(self, count: int, first: bool) -> Tensor:
        """As `Strategy.leave`."""
        again = self.alive.shape[1] if first else self.config.wanted(self.alive.shape[1])
        if again:
            self._learn(highest(self._predicted(self.now), self.alive, again))
        tries = self.tries(self.config, self.alive.shape[1], count)
        return self._take(self._best(self.alive, tries, count) if tries else self._propose(self.alive, count))

    def rest(self) -> Tensor:
        """As `Strategy.rest`."""
        return self._take(self._propose(self.alive, self.alive.shape[1]))

    def _learn(self, wanted: Tensor) -> None:
        """Measure the effects of tokens, (B, M) ids, anew."""
        fresh = self.measure(wanted, lambda embeddings, image: embeddings - self.now[image], shared=True)  # (B, M, E)
        self.effects = self.effects.scatter(1, wanted[..., None].expand_as(fresh), fresh)

    def _take(self, proposal: Proposal) -> Tensor:
        """The tokens of a proposal, (B, k), now known as gone."""
        self.now = proposal.embedding
        self.score_minus_one.scatter_(1, proposal.ids, proposal.score_minus_one)
        return proposal.ids

    def _best(self, among: Tensor, tries: int, count: int) -> Proposal:
        """Propose disjoint sets of some tokens, (B, A) ids, embed the image without each, and choose the best to leave.

        The effects of the other sets' tokens take equal shares of what the prediction of their set was wrong by: the
        last of many tokens that can stand for one another, which looked as dispensable as the first, is known by that.
        """
        proposals = []
        for _ in range(tries):
            proposals.append(self._propose(among, count))
            among = without(among, proposals[-1].ids)
        # twice (B, m, count), (B, m, E)
        ids, expected, predicted = (torch.stack(part, dim=1) for part in zip(*proposals, strict=True))
        image = torch.arange(len(ids), device=ids.device).repeat_interleave(tries)  # (B * m,)
        kept = without(self.alive[image], ids.flatten(0, 1))  # (B * m, A - count)
        found = self.candidates.embed(self.tokens, image, kept)  # (B * m, E)
        self.scored += len(image)
        score = self.objective.score_minus_one(found, image).unflatten(0, (-1, tries))  # (B, m)
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :1, None]  # (B, 1, 1); the first of equals
        found = found.unflatten(0, (-1, tries))  # (B, m, E)
        wrong = ((found - predicted) / count).scatter(1, best.expand(-1, -1, found.shape[2]), 0.0)  # (B, m, E)
        index = ids.flatten(1)[..., None].expand(-1, -1, found.shape[2])  # (B, m * count, E)
        self.effects = self.effects.scatter_add(1, index, wrong.repeat_interleave(count, dim=1))
        return Proposal(*(part.take_along_dim(best, dim=1)[:, 0] for part in (ids, expected, found)))

    def _propose(self, among: Tensor, count: int) -> Proposal:
        """Choose tokens among some, (B, A) ids, one after the other, each the best beside those before it.

        The embedding without them is the predicted one.
        """
        gone = torch.ones_like(self.effects[..., 0], dtype=torch.bool).scatter_(1, among, False)  # (B, N)
        now, ids = self.now, among[:, :0]
        expected = now.new_zeros(ids.shape, dtype=torch.float64)
        for _ in range(count):
            predicted = self._predicted(now).masked_fill(gone, -math.inf)  # (B, N)
            token = predicted.sort(dim=1, descending=True, stable=True).indices[:, :1]  # (B, 1); the lower id of equals
            expected = torch.cat([expected, predicted.gather(1, token)], dim=1)
            gone = gone.scatter(1, token, True)
            now = now + self.effects.gather(1, token[..., None].expand(-1, -1, now.shape[1]))[:, 0]
            ids = torch.cat([ids, token], dim=1)
        return Proposal(ids, expected, now)

    def _predicted(self, now: Tensor) -> Tensor:
        """The score, less 1, that each token's leaving is predicted to make of an embedding: (B, E) -> (B, N)."""
        batch, tokens = self.effects.shape[:2]
        # Probabilities over many classes are large: a few images at a time then.
        size = max(1, PREDICTED_NUMBERS // (tokens * self.objective.width))
        parts = []
        image = torch.arange(batch, device=now.device).repeat_interleave(tokens)  # (B * N,)
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            embeddings = (now[rows, None] + self.effects[rows]).flatten(0, 1)  # (b * N, E)
            scores = self.objective.score_minus_one(embeddings, image[start * tokens : (start + size) * tokens])
            parts.append(scores.unflatten(0, (-1, tokens)))  # (b, N)
        return torch.cat(parts)
