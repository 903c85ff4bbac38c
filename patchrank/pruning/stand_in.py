"""What takes the place of a model's image tower: the base of all pruned towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.model.kinds import adapt

_PREPROCESSING = ("image_size", "image_mean", "image_std", "preprocess_cfg")  # open_clip sets them on finished models


class StandIn(nn.Module):
    """A pruned image tower, which stands in for `model.visual`.

    Args:
        visual: the tower; its modules are used as they are, none is copied or changed.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.original = visual
        self._kind = type(adapt(visual))
        # What open_clip and its users ask an image tower for: image_size, preprocess_cfg, output_dim and the like.
        for name, value in vars(visual).items():
            if not name.startswith("_") and name != "training":
                self.__dict__[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """As everywhere, but what the original tower has is its own: to set it here would change nothing.

        Raises:
            UserError: such an attribute that is not about preprocessing.
        """
        original, free = self.__dict__.get("_modules", {}).get("original"), (*_PREPROCESSING, "training")
        if original is not None and name in vars(original) and name not in free and not name.startswith("_"):
            raise UserError(f"{name}: is set on the unpruned tower, before `patchrank.prune` or after `restore`")
        super().__setattr__(name, value)

    @property
    def adapter(self) -> Adapter:
        """What is known of the tower. Made anew, as a replica (DataParallel's) is given a tower of its own.

        Raises:
            UserError: something was put in the place of its modules after it was pruned, and would be left out.
        """
        replaced = None if torch.compiler.is_compiling() else self._kind.replaced(self.original)
        if replaced is not None:
            raise UserError(f"this pruned model: {replaced}")
        return self._kind(self.original)

    @property
    def idle(self) -> bool:
        """Whether it does as the original tower does."""
        raise NotImplementedError

    def multiply_adds(self) -> int:
        """Exact multiply-adds of an image, what tells or matches tokens included; norms and activations are not."""
        raise NotImplementedError


def count_multiply_adds(visual: nn.Module) -> int:
    """What PyTorch itself counts of an image that goes through an image tower, pruned or not, to check the formulas."""
    tower: Any = visual
    adapter = adapt(getattr(tower, "original", tower))
    images = torch.zeros(1, 3, *tower.image_size, dtype=adapter.dtype, device=adapter.device)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which hides what it does from the counter, as fused attention does
    try:
        # The counter asks for the origin of every tensor that a gradient would flow to, so there must be one.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tower(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
