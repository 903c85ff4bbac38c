"""Weights files: what trainers and compilers put around the keys of an open_clip model is taken off."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from patchrank.errors import UserError
from patchrank.store.storage import one_line
from patchrank.store.unfetched import stand_in

# What torch.compile, FSDP and activation checkpointing put into the middle of keys.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# A key that a whole model and an image tower have once, and what is before it.
_FIRST = re.compile(r"(|.*?\.)(?:visual\.)?(?:conv1\.weight|trunk\.patch_embed\..*weight)")
_AVERAGED = re.compile(r"(^|[._])ema[._]")  # over the training
# Names of what is the model, where others are beside it.
_OWN = {"", "state_dict", "model_state_dict", "model", "module", "net", "clip"}


def read(path: str) -> tuple[dict[str, Tensor], bool]:
    """The weights of a file by the keys of an open_clip model or of its image tower alone, and whether it is to be
    stored anew, as open_clip would not find them in it.

    In whatever dicts and under whatever prefix (`state_dict`, `module.`, `model.`, `clip.`) the model is, it is what
    has the first weight of an image tower; what is beside it, a loss or an optimizer, is left out. Weights that are
    averaged over the training are taken where there are no others.

    Raises:
        UserError: the file cannot be read as weights, holds several models, or quantised weights.
    """
    found, in_place = _loaded(path)
    state = {_without(key): value for key, value in _tensors(found)}
    prefix = _prefix(state, path)
    bare = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not bare:
        raise UserError(f"--pretrained {path}: holds no weights, only {', '.join(map(str, found)) or 'an empty dict'}")
    for key, value in bare.items():
        if value.is_quantized or (key.endswith("weight") and not value.is_floating_point()):
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"--pretrained {path}: its weights {key} are quantised ({kind}); save them as floats")
    return bare, not in_place or bare.keys() != set(found)


@contextlib.contextmanager
def stored(state: Mapping[str, Tensor]) -> Iterator[str]:
    """The path of a file of these weights, for the `with` statement: open_clip mends old weights as it loads one."""
    with tempfile.TemporaryDirectory(prefix="patchrank-") as folder:
        path = str(Path(folder, "weights.pt"))
        torch.save(dict(state), path)
        yield path


def _loaded(path: str) -> tuple[Mapping[Any, Any], bool]:
    """What a file holds, and whether it is named as it is written. Raises UserError."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if reason := "the file is empty" if not start else stand_in(start, binary=True):
            raise UserError(f"--pretrained {path}: {reason}")
        named = path.endswith(".safetensors")
        if start[8:9] == b"{":  # after its length
            return safetensors.torch.load_file(path), named
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--pretrained {path}: cannot be read as weights: {_told(error)}") from None
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise UserError(f"--pretrained {path}: holds a {kind}, not weights by their names: save model.state_dict()")
    return found, not named


def _told(error: Exception) -> str:
    """Why a file cannot be read, without PyTorch's advice to run whatever code is in it."""
    message = one_line(error)
    if beside := re.search(r"(?:GLOBAL|Unsupported (?:global|class)) +`?([\w.]+)", message):
        return f"it holds {beside[1]}, and tensors alone are read: save model.state_dict()"
    if "TorchScript" in message:
        return "it is a program of TorchScript: save the state_dict() of what torch.jit.load makes of it"
    if "eights_only" in message or "Weights only" in message:
        return "neither a file of torch.save nor of safetensors"
    return message[:200]


def _tensors(found: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a dict, and of dicts in it, by dotted keys."""
    for key, value in found.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def _prefix(state: Mapping[str, Tensor], path: str) -> str:
    """What is before the keys of the model; nothing where there is none. Raises UserError where there are several."""
    found = {match[1] for key in state if (match := _FIRST.fullmatch(key))}
    outer = [one for one in found if not any(one != other and one.startswith(other) for other in found)]
    trained = [one for one in outer if not _AVERAGED.search(one)] or outer
    own = [one for one in trained if set(one.split(".")) <= _OWN] or trained
    if len(own) > 1:
        names = ", ".join(sorted(own))
        raise UserError(f"--pretrained {path}: holds several models, {names}: save the state_dict() of one")
    return own[0] if own else ""


def _without(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key
