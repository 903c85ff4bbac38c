"""Pruned vision models of transformers: the same objects, of a class with another forward pass.

The vision model keeps its modules, weights, configuration and place, so whatever else is asked of it is answered as
before: its state dict, the number of its parameters, copies, devices. What tells tokens goes with it, and is no weight
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.pruning.stand_in import StandIn

_OTHER_IMAGES = ("interpolate_pos_encoding", "bool_masked_pos", "attention_mask")
_SAVING = ("save_pretrained", "push_to_hub")
_RESTORE = "patchrank.restore(model) gives the unpruned one back"


class Pruned(nn.Module):
    """What a pruned vision model is, beside the class that it was.

    Attributes:
        pruned_tower: the tower whose blocks images go through; it holds the vision model, and no module holds it.
    """

    pruned_tower: StandIn
    base: type

    @property
    def patch_ids(self) -> Tensor | None:
        """As of `StandIn`."""
        return self.pruned_tower.patch_ids

    def multiply_adds(self) -> int:
        """As `StandIn.multiply_adds`, of this vision model alone."""
        return self.pruned_tower.multiply_adds()

    def forward(self, pixel_values: Tensor | None = None, **given: Any) -> Any:
        """As of the unpruned vision model, of the tokens that are left: prefix tokens, then patches.

        `last_hidden_state` is (B, p + n, D); of `hidden_states` every one has as many as went into its block, best
        first after they have left, until they merge. `patch_ids` of what is returned, (B, n), tells which patches are
        left, and `hidden_patch_ids` which those of each of `hidden_states` are.

        Raises:
            UserError: what a pruned vision model cannot give, or cannot do with these images.
        """
        tower = self.pruned_tower
        self._refuse(pixel_values, given)
        if pixel_values is None:
            raise ValueError("pixel_values are needed")
        adapter = tower.unchecked  # as `trace` asks
        wanted = self._setting("output_hidden_states", given)
        numbers = _selected(wanted, adapter.depth)
        trace = tower.trace(pixel_values.to(adapter.dtype), numbers)
        tower.note(trace.ids)
        found = adapter.output(trace.tokens, trace.weights, trace.learnable)
        taken = [trace.taken.get(number, (None, None)) for number in range(adapter.depth + 1)] if numbers else []
        if taken:
            found.hidden_states = tuple(tokens for tokens, _ in taken)
        if self._setting("return_dict", given, True) is False:
            return found.to_tuple()
        if not torch.compiler.is_compiling():
            found.patch_ids, found.hidden_patch_ids = trace.ids, tuple(ids for _, ids in taken) or None
        return found

    def _setting(self, name: str, given: dict[str, Any], default: Any = False) -> Any:
        found = given.get(name)
        return getattr(self.config, name, default) if found is None else found

    def _refuse(self, pixel_values: Tensor | None, given: dict[str, Any]) -> None:
        """Raises UserError for what makes other tokens, or asks for what is never computed."""
        if getattr(self, "_is_replica", False):
            raise UserError("DataParallel cannot split a pruned model of transformers; use DistributedDataParallel")
        if self._setting("output_attentions", given):
            raise UserError(f"output_attentions: a pruned model keeps no attention maps; {_RESTORE}")
        for name in _OTHER_IMAGES:
            value = given.get(name)
            if value is not None and value is not False:
                raise UserError(f"{name}: a pruned model takes whole images of one size alone; {_RESTORE}")
        grid, mask = self.pruned_tower.unchecked.grid, given.get("pixel_attention_mask")
        shapes = given.get("spatial_shapes")
        whole = mask is None or bool((mask != 0).all())
        if not whole or (shapes is not None and not bool((shapes == torch.tensor(grid).to(shapes)).all())):
            raise UserError(
                f"spatial_shapes: this model was pruned for images of {grid[0]} x {grid[1]} patches without padding; "
                f"resize them so, or {_RESTORE}"
            )

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: see `_refuse_to_save`."""
        _refuse_to_save(self, "save_pretrained")

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refused likewise, before there is anything on the hub."""
        _refuse_to_save(self, "push_to_hub")

    def train(self, mode: bool = True) -> Any:
        """As everywhere."""
        super().train(mode)
        self.pruned_tower.training = mode
        for part in _parts(self.pruned_tower):
            part.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As everywhere: what tells tokens goes to other devices and dtypes, too."""
        super()._apply(fn, recurse)
        for part in _parts(self.pruned_tower):
            part._apply(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made here is made again where this is unpickled or copied."""
        return _empty, (self.base,), self.__dict__


def prune(model: nn.Module, vision: Any, tower: StandIn) -> None:
    """Have a vision model encode images by a pruned tower that holds it, and let nobody save it as the unpruned one.

    Args:
        model: that is or holds the vision model.
    """
    kind: Any = type(vision)
    vision.__dict__["pruned_tower"] = tower
    vision.__class__ = _pruned_class(kind)
    for each in _savers(model, vision):
        for name in _SAVING:
            each.__dict__[name] = partial(_refuse_to_save, each, name)


def tower_of(vision: nn.Module) -> StandIn | None:
    """The pruned tower of a vision model; None where it is not pruned."""
    return vision.pruned_tower if isinstance(vision, Pruned) else None


def restore(model: nn.Module, vision: Any) -> None:
    """Have it encode images as before; one that is not pruned stays as it is."""
    if isinstance(vision, Pruned):
        vision.__class__ = vision.base
        del vision.__dict__["pruned_tower"]
    for each in _savers(model, vision):
        for name in _SAVING:
            each.__dict__.pop(name, None)


def _savers(model: nn.Module, vision: nn.Module) -> list[nn.Module]:
    """The modules around a vision model that transformers can save."""
    return [
        each
        for each in model.modules()
        if each is not vision and hasattr(each, "save_pretrained") and any(part is vision for part in each.modules())
    ]


def _refuse_to_save(model: nn.Module, name: str, *given: Any, **named: Any) -> None:
    """Raises UserError: a folder that transformers loads could only hold the unpruned model, without a word.

    Where the vision model was restored by itself, it is saved.
    """
    if not any(isinstance(each, Pruned) for each in model.modules()):
        getattr(type(model), name)(model, *given, **named)
        return
    raise UserError(
        f"{name}: this model is pruned, and transformers would load it unpruned; save the bundle, and prune "
        "after loading; or call patchrank.restore(model) to save the unpruned one"
    )


def _parts(tower: StandIn) -> list[nn.Module]:
    """What a pruned tower has beside the original's modules."""
    return [part for name, part in tower.named_children() if name != "original"]


@cache
def _pruned_class(base: Any) -> Any:
    return type(f"Pruned{base.__name__}", (Pruned, base), {"base": base, "__module__": base.__module__})


def _empty(base: type) -> Any:
    """A pruned vision model without anything, for pickle."""
    made = _pruned_class(base)
    return made.__new__(made)


def _selected(wanted: bool | int | Sequence[int] | None, depth: int) -> list[int]:
    """The numbers of hidden states that `output_hidden_states` asks for: all, those of a number or a list, or none."""
    if wanted is None or isinstance(wanted, bool):
        return list(range(depth + 1)) if wanted else []
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    return [number % (depth + 1) for number in numbers if -depth - 1 <= number <= depth]
