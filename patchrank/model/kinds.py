"""The kinds of image towers that there are; a new one is a file like `open_clip_vit.py` and its place in `KINDS`."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter

# open_clip and timm take seconds to import, so they are where a model is: not for a wrong flag, not for --help.
KINDS = ("open_clip_vit.OpenClipViT", "timm_vit.TimmViT", "timm_eva.TimmEva", "transformers_vit.TransformersViT")


def kinds() -> list[type[Adapter]]:
    """All of them."""
    places = [kind.split(".") for kind in KINDS]
    return [getattr(import_module(f"patchrank.model.{module}"), name) for module, name in places]


def adapt(visual: nn.Module, name: str = "this model") -> Adapter:
    """The adapter of an image tower.

    Raises:
        UserError: there is no kind that takes it; names the model and the reason.
    """
    reason = f"its image tower is a {type(getattr(visual, 'trunk', visual)).__name__}"  # timm's, where it has a trunk
    known = kinds()
    if any(kind.takes(inside) for inside in visual.children() for kind in known):  # DDP, torch.compile
        reason = f"its image tower is inside a {type(visual).__name__}, which is to be put around it once it is pruned"
    takers = [kind for kind in known if kind.takes(visual)]
    for kind in sorted(takers, key=lambda kind: type(visual).__mro__.index(kind.module)):  # that of a subclass first
        refusal = kind.refusal(visual)
        if refusal is None:
            return kind(visual)
        reason = refusal
    raise UserError(f"{name}: {reason}; patchrank takes plain vision transformers")
