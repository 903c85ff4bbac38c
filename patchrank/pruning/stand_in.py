"""What takes the place of a model's image tower: the base of all pruned towers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.model.kinds import adapt
from patchrank.pruning.patches import on_grid

_PREPROCESSING = ("image_size", "image_mean", "image_std", "preprocess_cfg")  # open_clip sets them on finished models


@dataclass
class Trace:
    """What is left of images after the blocks of a pruned tower.

    Attributes:
        tokens: (B, p + b + n, D): prefix tokens, learnable ones, patches; the prefix tokens alone where no others are
            read.
        learnable: b.
        ids: (B, n) of the patches; None where a tower only merges.
        weights: as of `Adapter.output`.
        taken: by how many blocks they have gone through, (B, p + n, D) tokens and (B, n) ids of their patches.
    """

    tokens: Tensor
    learnable: int
    ids: Tensor | None
    weights: Tensor | None
    taken: dict[int, tuple[Tensor, Tensor | None]]


class StandIn(nn.Module):
    """A pruned image tower, which stands in for `model.visual`.

    Its state dict is that of the tower: what tells tokens is a bundle's, and is kept there.

    Args:
        visual: the tower; its modules are used as they are, none is copied or changed.

    Attributes:
        patch_ids: (B, n), the patches that were left of the last images, in the order of their tokens; where some
            became one, that which the others joined. None before there were any, where a tower only merges, and of what
            `torch.compile` and exports made of the tower.
    """

    patch_ids: Tensor | None
    original: Any

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.original = visual
        self._kind = type(adapt(visual))
        self.__dict__["patch_ids"] = None
        self.register_state_dict_post_hook(_as_the_original)
        self.register_load_state_dict_pre_hook(_to_the_original)
        # What open_clip and its users ask an image tower for: image_size, preprocess_cfg, output_dim and the like.
        for name, value in vars(visual).items():
            if not name.startswith("_") and name != "training":
                self.__dict__[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """As everywhere, but what the original tower has is its own: to set it here would change nothing.

        Raises:
            UserError: such an attribute that is not about preprocessing.
        """
        original, free = self.__dict__.get("_modules", {}).get("original"), (*_PREPROCESSING, "training")
        if original is not None and name in vars(original) and name not in free and not name.startswith("_"):
            raise UserError(f"{name}: is set on the unpruned tower, before `patchrank.prune` or after `restore`")
        super().__setattr__(name, value)

    @property
    def adapter(self) -> Adapter:
        """What is known of the tower. Made anew, as a replica (DataParallel's) is given a tower of its own.

        Raises:
            UserError: something was put in the place of its modules after it was pruned, and would be left out.
        """
        replaced = None if torch.compiler.is_compiling() else self._kind.replaced(self.original)
        if replaced is not None:
            raise UserError(f"this pruned model: {replaced}")
        return self.unchecked

    @property
    def unchecked(self) -> Adapter:
        """The same where nothing can have been put there since it was asked for: that takes a millisecond."""
        return self._kind(self.original)

    @property
    def idle(self) -> bool:
        """Whether it does as the original tower does."""
        raise NotImplementedError

    def trace(self, images: Tensor, taken: Collection[int] = (), stop: int | None = None) -> Trace:
        """What goes through the blocks: (B, 3, H, W) images.

        Args:
            taken: after how many blocks tokens are kept, 0 .. depth.
            stop: so many blocks; all where None.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Any:
        """Embeddings of pruned images, (B, 3, H, W) -> (B, E), as the original tower gives them: not normalised.

        A tower with `output_tokens` gives the tokens that are left beside them.
        """
        if self.idle:
            return self.original(images)
        trace = self.trace(images)
        self.note(trace.ids)
        return self.unchecked.output(trace.tokens, trace.weights, trace.learnable)

    def note(self, ids: Tensor | None) -> None:
        """Keep the ids of the patches that are left, for who asks for `patch_ids`."""
        if not torch.compiler.is_compiling():  # which would have it that a tower changes nothing
            self.__dict__["patch_ids"] = ids

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """As of open_clip's towers, of the tokens that are left.

        As "NCHW", intermediates are maps of the whole grid, where what has left has the features of the nearest patch
        that is there; as "NLC", they are the tokens alone, and "image_patch_ids" beside them tells which, (B, n) each.

        Raises:
            UserError: tokens were merged, and have no place.
        """
        if self.idle:
            return self.original.forward_intermediates(
                x, indices, stop_early, normalize_intermediates, intermediates_only, output_fmt, output_extra_tokens
            )
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt {output_fmt}: must be NCHW or NLC")
        from open_clip.utils import feature_take_indices

        adapter = self.adapter
        numbers, last = feature_take_indices(adapter.depth, indices)
        trace = self.trace(x, [number + 1 for number in numbers], last + 1 if stop_early else None)
        maps, ids, prefix = [], [], []
        for tokens, there in trace.taken.values():
            if there is None:
                raise UserError("merged tokens have no place in the image: there are no intermediates of its patches")
            tokens = adapter.final_norm(tokens) if normalize_intermediates else tokens
            prefix.append(tokens[:, : adapter.prefix_tokens])
            patches = tokens[:, adapter.prefix_tokens :]
            maps.append(on_grid(patches, there, adapter.grid, "nearest") if output_fmt == "NCHW" else patches)
            ids.append(there)
        self.note(trace.ids)
        found: dict[str, Any] = {"image_intermediates": maps, "image_patch_ids": ids}
        if output_extra_tokens and adapter.prefix_tokens:
            found["image_intermediates_prefix"] = prefix
        if not intermediates_only:
            found["image_features"] = adapter.readout(trace.tokens, trace.weights)
        return found

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the original tower."""
        self.original.set_grad_checkpointing(enable)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """As of the original tower."""
        self.original.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)

    def no_weight_decay(self) -> set[str]:
        """As of the original tower, by the names of the parameters here."""
        names: set[str] = getattr(self.original, "no_weight_decay", set)()
        return {f"original.{name}" for name in names}

    def multiply_adds(self) -> int:
        """Exact multiply-adds of an image, what tells or matches tokens included; norms and activations are not."""
        raise NotImplementedError


def _as_the_original(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A state dict without what tells tokens, and with the original's keys as they were before it was pruned."""
    metadatas = getattr(state, "_metadata", {})
    for entries, start in ((state, prefix), (metadatas, prefix.removesuffix("."))):
        for key in [key for key in entries if key.startswith(prefix) and key != start]:
            kept = key.removeprefix(prefix)
            value = entries.pop(key)
            if kept == "original":
                entries[start] = value
            elif kept.startswith("original."):
                entries[prefix + kept.removeprefix("original.")] = value


def _to_the_original(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The other way round; also takes state dicts of earlier versions, which had everything by its place."""
    own = _own_state(module)
    parts = {name.split(".")[0] for name in own}
    for key in [key for key in state if key.startswith(prefix)]:
        kept = key.removeprefix(prefix)
        if kept.split(".")[0] in parts:
            del state[key]
        elif not kept.startswith("original."):
            state[f"{prefix}original.{kept}"] = state.pop(key)
    state.update({prefix + name: value for name, value in own.items()})


def _own_state(module: nn.Module) -> dict[str, Any]:
    """The state of a stand-in's parts beside the original."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_children()
        if name != "original"
        for key, value in part.state_dict().items()
    }


def count_multiply_adds(visual: nn.Module) -> int:
    """What PyTorch itself counts of an image that goes through an image tower, pruned or not, to check the formulas."""
    tower: Any = visual
    adapter = tower.adapter if isinstance(tower, StandIn) else adapt(tower)
    images = torch.zeros(1, 3, *tower.image_size, dtype=adapter.dtype, device=adapter.device)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which hides what it does from the counter, as fused attention does
    try:
        # The counter asks for the origin of every tensor that a gradient would flow to, so there must be one.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tower(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
