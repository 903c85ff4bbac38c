"""Image towers that drop patch tokens on the way, by a real gather: the blocks after it work on shorter sequences."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.model.adapter import NOTHING, Adapter, Along
from patchrank.pruning.methods import Method
from patchrank.pruning.prompts import VisualTokens
from patchrank.pruning.schedule import Schedule, multiply_adds
from patchrank.pruning.selector import Attention, Selector
from patchrank.pruning.stand_in import StandIn, Trace


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

    def trace(self, images: Tensor, taken: Collection[int] = (), stop: int | None = None) -> Trace:
        """As `StandIn.trace`."""
        adapter = self.adapter
        stop = adapter.depth if stop is None else stop
        x = adapter.embed(images)  # (B, p + N, D)
        if x.shape[1] != adapter.length:
            raise ValueError(
                f"{x.shape[1]} tokens, not {adapter.length}: images of another size than it was pruned for, or patch "
                "dropout is at work; call model.eval() before a pruned model is used"
            )
        adapter.all_read = adapter.all_read or adapter.depth in taken
        p = first = adapter.prefix_tokens  # the place of the first patch: after these and learnable tokens
        if self.tokens is not None and self.tokens.config.place == "input":
            x, first = self._join(adapter, x)
        ids = torch.arange(adapter.num_tokens, device=x.device).expand(x.shape[0], -1)  # (B, N), that are left
        attention: Attention = None  # in the block before
        sizes: Tensor | None = None  # (B, first + n), the patches that each token stands for, where they merged
        along = NOTHING
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for number in range(stop):
            if number in taken:
                found[number] = torch.cat([x[:, :p], x[:, first:]], dim=1) if first > p else x, ids
            kept = self.schedule.get(number)
            if kept is not None:
                x, ids = self._drop(adapter, x, first, kept, attention, ids)
            if self.tokens is not None and self.tokens.config.place == "cut" and number == self.cut:
                x, first = self._join(adapter, x)
            places = self._places(adapter, first, ids) if adapter.rotary else None
            attention = partial(adapter.class_attention, x.detach(), number, places)
            if kept is not None or number == self.cut:
                along = self._along(adapter, x.shape[1] - first, number)
            along = replace(along, patches=x.shape[1] - first, sizes=sizes)
            x, sizes, stood = adapter.through(x, number, number + 1, None, adapter.recomputes, along, places)
            if stood is not None:  # a token has the id of the patch that others merged into
                ids = ids.gather(1, stood[:, first:] - first)
        if stop in taken:
            found[stop] = torch.cat([x[:, :p], x[:, first:]], dim=1) if first > p else x, ids
        return Trace(x, first - p, ids, sizes, found)

    def _places(self, adapter: Adapter, first: int, ids: Tensor) -> Tensor:
        """As of `Adapter.through`, of (B, first + n, D) tokens: (B or 1, first + n)."""
        ids = ids[:1] if ids.shape[1] == adapter.num_tokens else ids  # the same for all images
        return F.pad(ids, (first, 0), value=adapter.num_tokens)

    def _along(self, adapter: Adapter, patches: int, number: int) -> Along:
        """What is done on the way from a block on, where so many patches are there."""
        if self.tokens is None or number < self.cut:
            return NOTHING
        along = self.tokens.along(adapter, self.cut, patches, behind=False)
        return replace(along, merges=self.tokens.merges(adapter, self.schedule))

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
        ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The tokens that go on, the most useful patch first: (B, first + n, D) -> (B, first + kept, D), and their ids.

        Args:
            attention: as for a selector.
            ids: (B, n) of the patches that are there.
        """
        selector = self.selector
        assert selector is not None
        if x.shape[1] - first < adapter.num_tokens and not selector.tells_anew:
            return x[:, : first + kept], ids[:, :kept]  # they are in order already
        there, p = x.shape[1] - first, adapter.prefix_tokens
        tokens = torch.cat([x[:, :p], x[:, first:]], dim=1) if first > p else x  # (B, p + n, D)
        usefulness = selector(tokens.detach(), there, attention)  # (B, n)
        places = first + usefulness.topk(kept, dim=1).indices  # (B, kept), best first; ONNX has no stable sort
        # Whole rows: a gather goes number by number, and takes ten times as long on a CPU.
        chosen = x[torch.arange(x.shape[0], device=x.device)[:, None], places]  # (B, kept, D)
        return torch.cat([x[:, :first], chosen], dim=1), ids.gather(1, places - first)

    def multiply_adds(self) -> int:
        """As `StandIn.multiply_adds`."""
        if self.idle:
            return self.adapter.full_multiply_adds()
        return multiply_adds(self.adapter, Method(self.selector, self.tokens), self.schedule, self.cut)
