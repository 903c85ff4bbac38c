"""Weights files: what trainers and compilers put around the keys of an open_clip model is taken off."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import load_state_dict
from torch import Tensor

from patchrank.errors import UserError
from patchrank.store.storage import one_line, stand_in

# Of the weights in a dict of other things; those that are averaged over the training where there are no others.
_HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "state_dict_ema", "model_ema", "ema")
# What torch.compile, FSDP and activation checkpointing put into the middle of keys.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_FIRST = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")  # a key of a whole model
_FIRST_ALONE = ("conv1.weight", "trunk.patch_embed.proj.weight")  # and of an image tower


def read(path: str) -> tuple[dict[str, Tensor], bool]:
    """The weights of a file by the keys of an open_clip model or of its image tower alone, and whether it had others.

    The prefix that comes off (`module.`, `model.`, `clip.`) is what stands before the first weight of the image tower;
    what has another one, a loss beside the model, is left out.

    Raises:
        UserError: the file cannot be read as weights.
    """
    try:
        found: Any = load_state_dict(path)
        given = set(found)
        while holder := next((name for name in _HOLDERS if isinstance(found.get(name), Mapping)), None):
            found = found[holder]
        state = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    except Exception as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if reason := stand_in(file.read(64)):
                raise UserError(f"--pretrained {path}: {reason}") from None
        raise UserError(f"--pretrained {path}: cannot be read as weights: {one_line(error)[:200]}") from None
    bare = {_without(key): value for key, value in state.items()}
    prefixes = [key.removesuffix(first) for first in (*_FIRST, *_FIRST_ALONE) for key in bare if key.endswith(first)]
    prefix = min(prefixes, key=len, default="").removesuffix("visual.")
    bare = {key.removeprefix(prefix): value for key, value in bare.items() if key.startswith(prefix)}
    return bare, bare.keys() != given


@contextlib.contextmanager
def stored(state: Mapping[str, Tensor]) -> Iterator[str]:
    """The path of a file of these weights, for the `with` statement: open_clip mends old weights as it loads one."""
    with tempfile.TemporaryDirectory(prefix="patchrank-") as folder:
        path = str(Path(folder, "weights.pt"))
        torch.save(dict(state), path)
        yield path


def _without(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key
