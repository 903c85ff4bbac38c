"""patchrank: golden rankings of the patch tokens of CLIP image towers, and CLIP models that drop tokens by them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchrank.model import loading as models
    from patchrank.pruning.bundle import Bundle
    from patchrank.pruning.golden import Golden
    from patchrank.pruning.patches import on_grid
    from patchrank.pruning.pruned import prune, restore
    from patchrank.store import rankings

__version__ = "0.2.0.dev0"
__all__ = ["Bundle", "Golden", "models", "on_grid", "prune", "rankings", "restore"]

_HOMES = {  # MODULE:NAME, or the module that a name stands for
    "Bundle": "patchrank.pruning.bundle:Bundle",
    "Golden": "patchrank.pruning.golden:Golden",
    "models": "patchrank.model.loading",
    "on_grid": "patchrank.pruning.patches:on_grid",
    "prune": "patchrank.pruning.pruned:prune",
    "rankings": "patchrank.store.rankings",
    "restore": "patchrank.pruning.pruned:restore",
}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: queries and status do without torch, which takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, inner = _HOMES[name].partition(":")
    module = importlib.import_module(home)
    return getattr(module, inner) if inner else module
