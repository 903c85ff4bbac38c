"""The kinds of image towers that there are; a new one is a file like `open_clip_vit.py` and its place in `KINDS`."""

from __future__ import annotations

from torch import nn

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.model.open_clip_vit import OpenClipViT

KINDS: tuple[type[Adapter], ...] = (OpenClipViT,)


def adapt(visual: nn.Module, name: str = "this model") -> Adapter:
    """The adapter of an image tower.

    Raises:
        UserError: there is no kind that takes it; names the model and the reason.
    """
    reason = f"its image tower is a {type(visual).__name__}"
    kinds = [kind for kind in KINDS if isinstance(visual, kind.module)]
    for kind in sorted(kinds, key=lambda kind: type(visual).__mro__.index(kind.module)):  # that of a subclass first
        refusal = kind.refusal(visual)
        if refusal is None:
            return kind(visual)
        reason = refusal
    raise UserError(f"{name}: {reason}; patchrank takes plain vision transformers that are read at the class token")
