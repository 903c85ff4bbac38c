"""Whether patchrank's own pass through an image tower computes what the model computes.

Blocks and their attention are computed from their weights, never by calling them. So what others put in their place
(LoRA on attention, a subclass, a hook, another forward) would be left out without a word: it is refused instead, by
name, and an image, all of whose tokens are kept, must come out as the model's own forward pass has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter

# Of an embedding's length: what rounding leaves between two ways of computing it.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 5e-3}
_COARSE = 0.1  # of bfloat16 and float16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refusal(module: nn.Module, where: str, known: Collection[type] | None = None) -> str | None:
    """Why a module cannot be computed without calling it; None where it can.

    Args:
        where: what people call it.
        known: the classes whose forward pass our code repeats; any where None. A parametrized module counts as what it
            was before: its weights are read as they are then.
    """
    kind = type(module)
    if known is not None and kind not in known and parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    if known is not None and kind not in known:
        merge = "; merge what was tuned into its weights (merge_and_unload)" if "peft" in kind.__module__ else ""
        return f"{where} is a {kind.__module__}.{kind.__qualname__}{merge}"
    if "forward" in vars(module):
        return f"the forward pass of {where} was replaced by another"
    if any(_foreign(hook) for hooks in _HOOKS for hook in getattr(module, hooks).values()):
        return f"{where} has a hook, which would never be called; remove it, or put it on a module inside"
    return None


def _foreign(hook: object) -> bool:
    """Whether a hook is none of those by which transformers keeps hidden states, which we keep ourselves."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


@torch.no_grad()
def check(adapter: Adapter, name: str = "this model") -> None:
    """Compare a pass of our own, all tokens kept, with the module's own, on one image of noise.

    That takes two forward passes. A tower on the device "meta" computes nothing, and is taken as it is.

    Raises:
        UserError: they differ by more than rounding; says from where on.
    """
    if adapter.device.type == "meta":
        return
    visual = adapter.visual
    noise = torch.randn(1, 3, *visual.image_size, generator=torch.Generator().manual_seed(0))
    images = noise.to(adapter.device, adapter.dtype)
    with _evaluating(visual), torch.autocast(adapter.device.type, enabled=False):
        own = adapter.own_embeddings(images)
        x = adapter.embed(images)
        if _same(adapter.readout(adapter.run(x)), own):
            return
        where = "what comes before or after its blocks"
        for number in range(adapter.depth):
            theirs, ours = adapter.own_block(x, number), adapter.run(x, number, number + 1)
            if not _same(ours, theirs[:, : ours.shape[1]]):
                where = f"its block {number}"
                break
            x = theirs
    raise UserError(f"{name}: {where} computes something else than patchrank takes it to compute; nothing was pruned")


def _same(ours: Tensor, theirs: Tensor) -> bool:
    # Weights may be such that the model's own output is not finite: that is for others to say.
    if not theirs.isfinite().all():
        return True
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= _ROUNDING.get(theirs.dtype, _COARSE) * theirs.double().norm())


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode that it was in."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
