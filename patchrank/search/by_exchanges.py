"""Ranked by exchanges: the ranking through gates, mended by effects where it is decided what stays.

At the threshold, the middle one of the keep rates that `by_gates` tries, the effects of the least useful tokens that
stay and of those that come next are measured: the change of the embedding when the one leaves, and when the other comes
back. Tokens of the two kinds change places in pairs, each the pair by which the prediction gains most, as long as one
gains; the set that comes out is tried, which costs a candidate, and stays where it is better. Else the effects of its
tokens are corrected by what it was worse than predicted. So for a few times. From there on tokens whose effects are
known leave as in `by_effects`. All else is ranked as through gates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchrank.errors import UserError
from patchrank.search.by_effects import PREDICTED_NUMBERS, ByEffects
from patchrank.search.by_gates import LARGEST, ByGates
from patchrank.search.candidates import without
from patchrank.search.config import SearchConfig, Step
from patchrank.search.strategy import Found
from patchrank.tokens import tokens_kept

if TYPE_CHECKING:
    from patchrank.model.tower import Tower

INNER = 0.205  # share of all tokens whose effects are measured: the least useful ones that stay, 40 of 196
OUTER = 0.13  # and the most useful ones that do not, 25 of 196
TRIES = 5  # sets that are tried
LEAST = 1e-5  # share of what is missing to a score of 1 that a pair has to gain


@dataclass(frozen=True)
class Plan:
    """How many of so many tokens stay at the threshold, have known effects on either side of it, and leave later."""

    stay: int
    inner: int
    outer: int
    leave: list[int]

    @classmethod
    def of(cls, config: SearchConfig, total: int) -> Plan:
        """Of a search of images of `total` tokens."""
        stay = min(total - 1, max(1, tokens_kept(total, (config.keep + max(LARGEST, config.keep)) / 2)))
        inner, outer = (max(1, round(share * total)) for share in (INNER, OUTER))
        inner, outer, k = min(inner, stay), min(outer, total - stay), config.remove_per_step
        leave = min(inner, max(0, stay - tokens_kept(total, config.keep)))
        return cls(stay, inner, outer, [min(k, leave - start) for start in range(0, leave, k)])


class ByExchanges(ByEffects):
    """As the file says. `effects` are of leaving for tokens that stay, and of coming back for the others."""

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """As `Strategy.check`."""
        ByGates.check(config)
        if config.rescore != 0:
            raise UserError("--rank-by exchanges measures effects once: it needs --rescore 0")

    @classmethod
    def start_multiply_adds(cls, tower: Tower) -> int:
        """As `Strategy.start_multiply_adds`."""
        return ByGates.start_multiply_adds(tower)

    @classmethod
    def tries(cls, config: SearchConfig, alive: int, count: int) -> int:
        """As `Strategy.tries`, of the tokens whose effects are known."""
        return min(config.proposals, alive // count)

    @classmethod
    def cost(cls, config: SearchConfig, grid: tuple[int, int]) -> list[Step]:
        """As `Strategy.cost`: the passes through gates, the set at the threshold, effects, tries, and steps."""
        total = math.prod(grid)
        plan, (*gates, _) = Plan.of(config, total), ByGates.cost(config, grid)
        stay, known = plan.stay, plan.inner
        steps = [Step(stay, 1, total - stay), Step(stay - 1, plan.inner, 0), Step(stay + 1, plan.outer, 0)]
        steps.append(Step(stay, TRIES, 0))
        for count in plan.leave:
            stay -= count
            steps.append(Step(stay, cls.tries(config, known, count), count))
            known -= count
        return [*gates, *steps]

    def run(self) -> Found:
        """Search."""
        gates = ByGates(self.config, self.candidates, self.tokens, self.objective).run()
        total = self.alive.shape[1]
        plan = Plan.of(self.config, total)
        sizes = [plan.stay - plan.inner, plan.inner + plan.outer, total - plan.stay - plan.outer]
        core, near, tail = gates.ranking.split(sizes, dim=1)
        self.scored = gates.candidates
        stays = torch.zeros_like(self.alive, dtype=torch.bool).scatter(1, gates.ranking[:, : plan.stay], True)  # (B, N)
        everything, self.alive = self.alive, gates.ranking[:, : plan.stay].sort(dim=1).values
        self.now = self._try(self.alive)
        self._learn_both(*near.split([plan.inner, plan.outer], dim=1))
        for _ in range(TRIES):
            moved, predicted = self._pairs(*_sorted_out(near, stays).split([plan.inner, plan.outer], dim=1))
            kept = _sorted_out(everything, stays ^ moved)[:, : plan.stay]
            found = self._try(kept)
            better = moved.any(dim=1, keepdim=True) & (self._score(found) > self._score(self.now))  # (B, 1)
            wrong = (found - predicted) / moved.sum(dim=1, keepdim=True).clamp_min(1)  # (B, E)
            effects = torch.where(better[..., None], -self.effects, self.effects + wrong[:, None])
            self.effects = torch.where(moved[..., None], effects, self.effects)
            self.now, self.alive = torch.where(better, found, self.now), torch.where(better, kept, self.alive)
            stays = stays ^ (moved & better)
        known, out = _sorted_out(near, stays).split([plan.inner, plan.outer], dim=1)
        return self._leave(plan, core, known, torch.cat([out, tail], dim=1))

    def _leave(self, plan: Plan, core: Tensor, known: Tensor, out: Tensor) -> Found:
        """The steps from the threshold on.

        Args:
            core: (B, c), what stays to the end.
            known: (B, i), what stays at the threshold and has known effects, most useful first.
            out: (B, o), what does not stay, likewise.
        """
        step = torch.zeros_like(self.score_minus_one, dtype=torch.int64).scatter(1, out, 1)
        self.score_minus_one.scatter_(1, out, self._score(self.now).expand_as(out))
        for number, count in enumerate(plan.leave, start=2):
            left = self._take(self._best(known, self.tries(self.config, known.shape[1], count), count))  # (B, k)
            step.scatter_(1, left, number)
            self.alive, known, out = without(self.alive, left), without(known, left), torch.cat([left.flip(1), out], 1)
        self.score_minus_one.scatter_(1, self.alive, self._score(self.now).expand_as(self.alive))
        return Found(torch.cat([core, known, out], dim=1), self.score_minus_one + 1, step, self.scored)

    def _score(self, embeddings: Tensor) -> Tensor:
        """Of an embedding an image, less 1: (B, E) -> (B, 1)."""
        image = torch.arange(len(embeddings), device=embeddings.device)
        return self.objective.score_minus_one(embeddings, image)[:, None]

    def _try(self, kept: Tensor) -> Tensor:
        """A candidate an image, (B, n) token ids -> (B, E)."""
        self.scored += len(kept)
        return self.candidates.embed(self.tokens, torch.arange(len(kept), device=kept.device), kept)

    def _learn_both(self, inner: Tensor, outer: Tensor) -> None:
        """Measure the effects of tokens that are alive, (B, I) ids, and of others, (B, O)."""
        self._learn(inner)
        alive = self.alive[:, None].expand(-1, outer.shape[1], -1)  # (B, O, m)
        kept = torch.cat([alive, outer[..., None]], dim=2).sort(dim=2).values
        fresh = self.candidates.embed_each(self.tokens, kept, lambda embeddings, image: embeddings - self.now[image])
        self.scored += outer.numel()
        self.effects = self.effects.scatter(1, outer[..., None].expand_as(fresh), fresh)

    def _pairs(self, inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens change places in pairs, as long as one gains by the prediction; each token once.

        Args:
            inside: (B, I) ids, those that stay.
            outside: (B, O) ids, those that do not.

        Returns:
            (B, N) bool, which change places, and the predicted embedding, (B, E).
        """
        moved = torch.zeros_like(self.score_minus_one, dtype=torch.bool)
        now, score = self.now, self._score(self.now)  # (B, E), (B, 1)
        for _ in range(min(inside.shape[1], outside.shape[1])):
            used = moved.gather(1, inside)[:, :, None] | moved.gather(1, outside)[:, None]  # (B, I, O)
            scores = self._predicted_pairs(now, inside, outside).masked_fill(used, -math.inf).flatten(1)  # (B, I * O)
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, :1]  # (B, 1); the first of equals
            gains = scores.gather(1, best) > score * (1 - LEAST)  # (B, 1)
            if not gains.any():
                break
            one, other = inside.gather(1, best // outside.shape[1]), outside.gather(1, best % outside.shape[1])
            pair = torch.cat([one, other], dim=1)  # (B, 2)
            moved = moved | torch.zeros_like(moved).scatter(1, pair, gains.expand_as(pair))
            change = self.effects.gather(1, pair[..., None].expand(-1, -1, now.shape[1])).sum(dim=1)  # (B, E)
            now = torch.where(gains, now + change, now)
            score = torch.where(gains, scores.gather(1, best), score)
        return moved, now

    def _predicted_pairs(self, now: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        """The predicted scores less 1 when two tokens change places: (B, E), (B, I), (B, O) -> (B, I, O)."""
        leaving, coming = (
            self.effects.gather(1, ids[..., None].expand(-1, -1, now.shape[1])) for ids in (inside, outside)
        )
        without_one = (now[:, None] + leaving).flatten(0, 1)  # (B * I, E)
        image = torch.arange(len(now), device=now.device).repeat_interleave(inside.shape[1])  # (B * I,)
        size = max(1, PREDICTED_NUMBERS // (outside.shape[1] * max(now.shape[1], self.objective.width)))
        parts = []
        for rows, mine in zip(without_one.split(size), image.split(size), strict=True):
            embeddings = (rows[:, None] + coming[mine]).flatten(0, 1)  # (c * O, E)
            parts.append(self.objective.score_minus_one(embeddings, mine.repeat_interleave(outside.shape[1])))
        return torch.cat(parts).view(*inside.shape, -1)


def _sorted_out(ids: Tensor, stays: Tensor) -> Tensor:
    """Some tokens, (B, M) ids: those that stay, by (B, N) bool, before the others, and otherwise in their order."""
    return ids.gather(1, (~stays.gather(1, ids)).to(torch.uint8).sort(dim=1, stable=True).indices)
