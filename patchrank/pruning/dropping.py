"""Image towers that drop patch tokens on the way, by a real gather: the blocks after it work on shorter sequences."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.model.adapter import Adapter, Before
from patchrank.pruning.methods import Method
from patchrank.pruning.prompts import VisualTokens
from patchrank.pruning.schedule import Schedule, multiply_adds
from patchrank.pruning.selector import Attention, Selector
from patchrank.pruning.stand_in import StandIn


class PrunedTower(StandIn):
    """An image tower that drops patch tokens on the way.

    Args:
        visual: as for `StandIn`.
        schedule: how many patch tokens go on from which block; empty leaves the model as it is.
        selector: tells which; it is asked before the first block of the schedule, and, if it can tell anew, before
            the others, too.
        tokens: learnable tokens that go along and are never pruned.
        cut: the block before which these join the others, where they do not join at the input.

    Without a schedule nothing leaves, no learnable tokens join, and the model is as it was.
    """

    def __init__(
        self,
        visual: nn.Module,
        schedule: Schedule,
        selector: Selector | None = None,
        tokens: VisualTokens | None = None,
        cut: int = 0,
    ) -> None:
        super().__init__(visual)
        self.schedule = dict(sorted(schedule.items()))
        self.selector = selector
        self.tokens = tokens
        self.cut = cut

    @property
    def idle(self) -> bool:
        """As `StandIn.idle`."""
        return not self.schedule

    def forward(self, images: Tensor) -> Any:
        """Embeddings of pruned images, (B, 3, H, W) -> (B, E), as the original tower gives them: not normalised.

        A tower with `output_tokens` gives the tokens that are left beside them.
        """
        if self.idle:
            return self.original(images)
        adapter = self.adapter
        x = adapter.embed(images)  # (B, p + N, D)
        if x.shape[1] != adapter.length:
            raise ValueError("patch dropout is at work; call model.eval() before a pruned model is used")
        first = adapter.prefix_tokens  # the place of the first patch: after these and learnable tokens
        if self.tokens is not None and self.tokens.config.place == "input":
            x, first = self._join(adapter, x)
        ids = None  # of the patches that are left, (B, n), in their order, where blocks ask for places
        attention: Attention = None  # in the block before
        for number in range(adapter.depth):
            kept = self.schedule.get(number)
            if kept is not None:
                x, ids = self._drop(adapter, x, first, kept, attention, ids)
            if self.tokens is not None and self.tokens.config.place == "cut" and number == self.cut:
                x, first = self._join(adapter, x)
            places = self._places(adapter, x, first, ids)
            attention = partial(adapter.class_attention, x.detach(), number, places)
            shifting = self._shifting(adapter, x.shape[1] - first, number)
            x = adapter.run(x, number, number + 1, before=shifting, places=places)
        return adapter.output(x, learnable=first - adapter.prefix_tokens)

    def _places(self, adapter: Adapter, x: Tensor, first: int, ids: Tensor | None) -> Tensor | None:
        """As of `Adapter.run`, of (B, first + n, D) tokens: (B or 1, first + n)."""
        if not adapter.rotary:
            return None
        if ids is None:
            ids = torch.arange(adapter.num_tokens, device=x.device)[None]  # (1, N)
        return F.pad(ids, (first, 0), value=adapter.num_tokens)

    def _shifting(self, adapter: Adapter, patches: int, number: int) -> Before | None:
        """What learnable shifts do before a block, where so many patches are left."""
        if self.tokens is None or number < self.cut:
            return None
        return self.tokens.before(adapter, self.cut, patches, behind=False)

    def _join(self, adapter: Adapter, x: Tensor) -> tuple[Tensor, int]:
        """Learnable tokens put behind the prefix tokens, (B, p + n, D) -> (B, p + b + n, D); the first patch's place.

        Attention does not ask for the order, so those in front cost no second gather when tokens leave.
        """
        assert self.tokens is not None
        # The shape, not len(x), which torch.export would take for a constant.
        extra = self.tokens.extra().to(x.dtype).expand(x.shape[0], -1, -1)  # (B, b, D)
        p = adapter.prefix_tokens
        return torch.cat([x[:, :p], extra, x[:, p:]], dim=1), p + extra.shape[1]

    def _drop(
        self,
        adapter: Adapter,
        x: Tensor,
        first: int,
        kept: int,
        attention: Attention,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens that go on, the most useful patch first: (B, first + n, D) -> (B, first + kept, D), and their ids.

        Args:
            attention: as for a selector.
            ids: (B, n) of the patches that are there; all of them, in order, where None.
        """
        selector = self.selector
        assert selector is not None
        if x.shape[1] - first < adapter.num_tokens and not selector.tells_anew:
            return x[:, : first + kept], None if ids is None else ids[:, :kept]  # they are in order already
        there, p = x.shape[1] - first, adapter.prefix_tokens
        tokens = torch.cat([x[:, :p], x[:, first:]], dim=1) if first > p else x  # (B, p + n, D)
        usefulness = selector(tokens.detach(), there, attention)  # (B, n)
        places = first + usefulness.topk(kept, dim=1).indices  # (B, kept), best first; ONNX has no stable sort
        # Whole rows: a gather goes number by number, and takes ten times as long on a CPU.
        chosen = x[torch.arange(x.shape[0], device=x.device)[:, None], places]  # (B, kept, D)
        if adapter.rotary:
            ids = places - first if ids is None else ids.gather(1, places - first)  # (B, kept)
        return torch.cat([x[:, :first], chosen], dim=1), ids

    def multiply_adds(self) -> int:
        """As `StandIn.multiply_adds`."""
        if self.idle:
            return self.adapter.full_multiply_adds()
        return multiply_adds(self.adapter, Method(self.selector, self.tokens), self.schedule, self.cut)
