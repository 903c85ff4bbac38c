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
        UserError: a tower that is not a plain vision transformer read out at its class token; names the model and the
            reason.
    """
    found = next((kind for kind in KINDS if isinstance(visual, kind.kind)), None)
    reason = f"its image tower is a {type(visual).__name__}" if found is None else found.refusal(visual)
    if found is None or reason:
        raise UserError(f"{name}: {reason}; patchrank takes plain vision transformers that are read at the class token")
    return found(visual)
