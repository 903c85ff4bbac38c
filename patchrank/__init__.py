"""patchrank: golden rankings of the patch tokens of CLIP image towers, and CLIP models that drop tokens by them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchrank.bundle import Bundle
    from patchrank.pruned import prune, restore
    from patchrank.selectors import Golden

__version__ = "0.1.0"
__all__ = ["Bundle", "Golden", "prune", "restore"]

_HOMES = {"Bundle": "bundle", "Golden": "selectors", "prune": "pruned", "restore": "pruned"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: queries and status do without torch, which takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"patchrank.{_HOMES[name]}"), name)
