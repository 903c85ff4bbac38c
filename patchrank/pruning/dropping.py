"""Image towers that drop patch tokens on the way, by a real gather: the blocks after it work on shorter sequences."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from patchrank.model.adapter import Adapter, Before
from patchrank.pruning.methods import Method
from patchrank.pruning.prompts import VisualTokens
from patchrank.pruning.schedule import Schedule, multiply_adds
from patchrank.pruning.selector import Selector
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

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of pruned images, (B, 3, H, W) -> (B, E), as the original tower gives them: not normalised."""
        if self.idle:
            return self.original(images)
        adapter = self.adapter
        x = adapter.embed(images)  # (B, p + N, D)
        if x.shape[1] != adapter.length:
            raise ValueError("patch dropout is at work; call model.eval() before a pruned model is used")
        first = adapter.prefix_tokens  # the place of the first patch: after these and learnable tokens
        if self.tokens is not None and self.tokens.config.place == "input":
            x, first = self._join(adapter, x)
        before = None
        for number in range(adapter.depth):
            kept = self.schedule.get(number)
            if kept is not None:
                x = self._drop(adapter, x, first, kept, before, number)
            if self.tokens is not None and self.tokens.config.place == "cut" and number == self.cut:
                x, first = self._join(adapter, x)
            before = x
            x = adapter.run(x, number, number + 1, before=self._shifting(adapter, x.shape[1] - first, number))
        return adapter.readout(x)

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

    def _drop(self, adapter: Adapter, x: Tensor, first: int, kept: int, before: Tensor | None, number: int) -> Tensor:
        """The tokens that go on, the most useful patch first: (B, first + n, D) -> (B, first + kept, D)."""
        selector = self.selector
        assert selector is not None
        if number != min(self.schedule) and not selector.tells_anew:
            return x[:, : first + kept]  # they are in order already
        there, p = x.shape[1] - first, adapter.prefix_tokens
        tokens = torch.cat([x[:, :p], x[:, first:]], dim=1) if first > p else x  # (B, p + n, D)
        attention = None if before is None else partial(adapter.class_attention, before.detach(), number - 1)
        usefulness = selector(tokens.detach(), there, attention)  # (B, n)
        places = first + usefulness.topk(kept, dim=1).indices  # (B, kept), best first; ONNX has no stable sort
        # Whole rows: a gather goes number by number, and takes ten times as long on a CPU.
        chosen = x[torch.arange(x.shape[0], device=x.device)[:, None], places]  # (B, kept, D)
        return torch.cat([x[:, :first], chosen], dim=1)

    def multiply_adds(self) -> int:
        """As `StandIn.multiply_adds`."""
        if self.idle:
            return self.adapter.full_multiply_adds()
        return multiply_adds(self.adapter, Method(self.selector, self.tokens), self.schedule, self.cut)
