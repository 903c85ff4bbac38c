"""The kinds of image towers that there are; a new one is a file like `open_clip_vit.py` and its place in `KINDS`."""

from __future__ import annotations

from torch import nn

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.model.open_clip_vit import OpenClipViT
from patchrank.model.timm_eva import TimmEva
from patchrank.model.timm_vit import TimmViT
from patchrank.model.transformers_vit import TransformersViT

KINDS: tuple[type[Adapter], ...] = (OpenClipViT, TimmViT, TimmEva, TransformersViT)


def adapt(visual: nn.Module, name: str = "this model") -> Adapter:
    """The adapter of an image tower.

    Raises:
        UserError: there is no kind that takes it; names the model and the reason.
    """
    reason = f"its image tower is a {type(getattr(visual, 'trunk', visual)).__name__}"  # timm's, where it has a trunk
    if any(kind.takes(inside) for inside in visual.children() for kind in KINDS):  # DDP, torch.compile
        reason = f"its image tower is inside a {type(visual).__name__}, which is to be put around it once it is pruned"
    kinds = [kind for kind in KINDS if kind.takes(visual)]
    for kind in sorted(kinds, key=lambda kind: type(visual).__mro__.index(kind.module)):  # that of a subclass first
        refusal = kind.refusal(visual)
        if refusal is None:
            return kind(visual)
        reason = refusal
    raise UserError(f"{name}: {reason}; patchrank takes plain vision transformers")
