"""Three lines make an open_clip model drop the patch tokens that do not matter:

model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-16-quickgelu", pretrained="openai")
patchrank.prune(model, "my-bundle", keep=0.6)
embeddings = model.encode_image(images)

`patchrank.restore(model)` gives the original back. Tokens leave by a real gather, no masks: the blocks after it work on
shorter sequences.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchrank.errors import UserError
from patchrank.model.tower import block_multiply_adds, check_tower, default_cut, embed_multiply_adds, run_block
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import METHODS, RANDOM, TOKENS, Method, Need, by_name_alone
from patchrank.pruning.prompts import VisualTokens
from patchrank.pruning.selector import Selector
from patchrank.pruning.stand_in import Schedule, StandIn
from patchrank.tokens import count_kept

DEFAULT_KEEP = 0.6


class PrunedTower(StandIn):
    """An open_clip image tower that drops patch tokens on the way.

    Args:
        visual: as for `StandIn`.
        schedule: how many patch tokens go on from which block; empty leaves the model as it is.
        selector: tells which; it is asked before the first block of the schedule, and, if it can tell anew, before
            the others, too.
        tokens: learnable tokens that go along and are never pruned.
        cut: the block before which these join the others, where they do not join at the input.
    """

    def __init__(
        self,
        visual: VisionTransformer,
        schedule: Schedule,
        selector: Selector | None = None,
        tokens: VisualTokens | None = None,
        cut: int | None = None,
    ) -> None:
        super().__init__(visual)
        self.schedule = dict(sorted(schedule.items()))
        self.selector = selector
        self.tokens = tokens
        self.cut = cut

    @property
    def idle(self) -> bool:
        """As `StandIn.idle`."""
        return not self.schedule and self.tokens is None

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of pruned images, (B, 3, H, W) -> (B, E), as the original tower gives them: not normalised."""
        visual: Any = self.original
        if self.idle:
            return visual(images)
        x = visual._embeds(images)  # (B, 1 + N, D)
        if x.shape[1] != 1 + _num_tokens(visual):
            raise ValueError("patch dropout is at work; call model.eval() before a pruned model is used")
        first = 1  # the place of the first patch: after the class token and learnable tokens
        if self.tokens is not None and self.tokens.config.place == "input":
            x, first = self._join(x)
        blocks = visual.transformer.resblocks
        before = None
        for number, block in enumerate(blocks):
            kept = self.schedule.get(number)
            if kept is not None:
                x = self._drop(x, first, kept, before, number)
            if self.tokens is not None and self.tokens.config.place == "cut" and number == self.cut:
                x, first = self._join(x)
            before = x
            x = run_block(block, x, class_token_only=number == len(blocks) - 1)
        return visual.ln_post(x[:, 0].to(visual.proj.dtype)) @ visual.proj

    def _join(self, x: Tensor) -> tuple[Tensor, int]:
        """Learnable tokens put behind the class token, (B, 1 + n, D) -> (B, 1 + b + n, D), and the first patch's place.

        Attention does not ask for the order, so those in front cost no second gather when tokens leave.
        """
        assert self.tokens is not None
        # The shape, not len(x), which torch.export would take for a constant.
        extra = self.tokens.extra().to(x.dtype).expand(x.shape[0], -1, -1)  # (B, b, D)
        return torch.cat([x[:, :1], extra, x[:, 1:]], dim=1), 1 + extra.shape[1]

    def _drop(self, x: Tensor, first: int, kept: int, before: Tensor | None, number: int) -> Tensor:
        """The tokens that go on, the most useful patch first: (B, first + n, D) -> (B, first + kept, D)."""
        selector = self.selector
        assert selector is not None
        if number != min(self.schedule) and not selector.tells_anew:
            return x[:, : first + kept]  # they are in order already
        patches = torch.cat([x[:, :1], x[:, first:]], dim=1) if first > 1 else x  # (B, 1 + n, D)
        block = self.original.transformer.resblocks[number - 1] if number else None
        usefulness = selector(patches.detach(), None if before is None else before.detach(), block)  # (B, n)
        places = first + usefulness.topk(kept, dim=1).indices  # (B, kept), best first; ONNX has no stable sort
        chosen = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))  # (B, kept, D)
        return torch.cat([x[:, :first], chosen], dim=1)

    def multiply_adds(self) -> int:
        """As `StandIn.multiply_adds`."""
        if self.idle:
            return full_multiply_adds(self.original)
        chosen = 0 if self.selector is None else self.selector.multiply_adds(self.original, self.schedule)
        place = None if self.tokens is None else self.tokens.config.place
        start = None if place is None else 0 if place == "input" else self.cut
        count = 0 if self.tokens is None else self.tokens.config.count
        return pruned_multiply_adds(self.original, self.schedule, count, start) + chosen


def prune(
    model: nn.Module,
    how: str | os.PathLike[str] | Bundle | Selector,
    keep: float | Mapping[int, float] | None = None,
    *,
    multiply_adds: float | None = None,
    blocks: Sequence[int] | None = None,
) -> nn.Module:
    """Make an open_clip model drop patch tokens whenever it encodes an image; the model is changed in place.

    Args:
        model: from `open_clip.create_model` or the like; one that is pruned already is restored first.
        how: a bundle, the folder of one or its id on the Hugging Face hub: what a training left (`patchrank.Bundle`).
            Or, to compare with: "class-attention", "random", "token-merging" (then tokens are merged, at as many
            multiply-adds), or `patchrank.Golden` for images whose rankings are known.
        keep: the share of patch tokens that stay; or, to drop them in several parts, by the number of the block before
            which the others leave: {3: 0.9, 5: 0.75, 7: 0.6}. What a bundle was made for, or 0.6, where None.
        multiply_adds: instead of `keep`, how much of the unpruned model's multiply-adds may be used, in 0 .. 1.
        blocks: the blocks before which tokens leave, in equal parts, where `keep` is one number; one block, the
            bundle's cut or a quarter of the depth, where None.

    Returns:
        The model.

    Raises:
        UserError: a bundle that cannot be had, or is for another model; a tower of a kind that cannot be pruned; a keep
            rate, block or target that makes no sense.
    """
    clip: Any = model  # open_clip has no types
    visual = getattr(clip, "visual", None)
    if visual is None:
        raise UserError(f"a {type(model).__name__} cannot be pruned: it has no image tower `visual`")
    visual = visual.original if isinstance(visual, StandIn) else visual
    check_tower(visual)
    if visual.output_tokens:
        raise UserError("this model: its image tower gives all tokens away (output_tokens), so none can leave")
    bundle, method = _resolve(how)
    if bundle is not None:
        bundle.check(visual)
    depth = len(visual.transformer.resblocks)
    cut = bundle.cut if bundle is not None else default_cut(depth)
    if keep is not None and multiply_adds is not None:
        raise UserError("keep and multiply_adds exclude each other: give one")
    if isinstance(keep, Mapping) and blocks is not None:
        raise UserError("keep tells the blocks already; leave out blocks")
    places = [cut] if blocks is None else sorted(blocks)
    if not places or (isinstance(keep, Mapping) and not keep):
        raise UserError(f"{'keep' if places else 'blocks'}: names no block before which tokens could leave")
    if multiply_adds is not None:
        schedule = _schedule_for(visual, places, multiply_adds, method, cut)
    elif isinstance(keep, Mapping):
        schedule = _checked(visual, {int(block): _count(visual, rate) for block, rate in keep.items()})
    else:
        rate = keep if keep is not None else bundle.keep if bundle is not None else DEFAULT_KEEP
        schedule = _checked(visual, _spread(visual, places, _count(visual, rate)))
    if schedule and method.selector is not None and method.selector.needs_a_block and min(schedule) == 0:
        raise UserError("block 0: there is no block before it whose attention could tell which tokens stay")
    if schedule and bundle is not None and min(schedule) != cut:
        raise UserError(f"block {min(schedule)}: this bundle's predictor looks at the tokens before block {cut}")
    tower = _tower(method, visual, schedule, cut)
    tower.train(visual.training)
    for part in (method.selector, method.tokens):
        if part is not None:
            part.to(visual.conv1.weight.device)
    clip.visual = tower
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give a pruned model its original image tower back; one that is not pruned stays as it is. Returns the model."""
    clip: Any = model
    if isinstance(clip.visual, StandIn):
        clip.visual = clip.visual.original
    return model


def full_multiply_adds(visual: Any) -> int:
    """Multiply-adds of an image in open_clip's own forward pass; norms and activations are not counted."""
    depth = len(visual.transformer.resblocks)
    blocks = depth * block_multiply_adds(visual, 1 + _num_tokens(visual))
    return embed_multiply_adds(visual) + blocks + visual.proj.numel()


def pruned_multiply_adds(visual: Any, schedule: Schedule, extra: int = 0, join: int | None = None) -> int:
    """Multiply-adds of an image of which tokens leave by a schedule; the selector's are not counted.

    Args:
        extra, join: so many learnable tokens join before block `join`.
    """
    depth, n = len(visual.transformer.resblocks), 1 + _num_tokens(visual)
    total = embed_multiply_adds(visual) + visual.proj.numel()
    for number in range(depth):
        n = 1 + schedule[number] if number in schedule else n
        beside = extra if join is not None and number >= join else 0
        total += block_multiply_adds(visual, n + beside, class_token_only=number == depth - 1)
    return total


def count_multiply_adds(visual: nn.Module) -> int:
    """What PyTorch itself counts of an image that goes through an image tower, pruned or not, to check the formulas."""
    tower: Any = visual
    weight = getattr(tower, "original", tower).conv1.weight
    images = torch.zeros(1, 3, *tower.image_size, dtype=weight.dtype, device=weight.device)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which hides what it does from the counter, as fused attention does
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tower(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def pruned_tower(name: str, visual: Any, cut: int, keep: float, bundle: Bundle | None = None) -> StandIn:
    """The image tower that a method makes of another, as `prune` does, to time it and count what it costs.

    Golden rankings are not known to a tower by itself; what stays is left to chance then, at no cost either.

    Raises:
        UserError: a keep rate that leaves nothing.
    """
    if Need.RANKINGS in METHODS[name].needs:
        name = RANDOM
    count = count_kept(_num_tokens(visual), keep)
    return _tower(METHODS[name].make(bundle), visual, {cut: count} if keep < 1 else {}, cut)


def _tower(method: Method, visual: Any, schedule: Schedule, cut: int) -> StandIn:
    if method.image_tower is not None:
        return method.image_tower(visual, schedule)
    return PrunedTower(visual, schedule, method.selector, method.tokens, cut)


def _resolve(how: Any) -> tuple[Bundle | None, Method]:
    """The bundle, if it is one, and the method."""
    if isinstance(how, Selector):
        return None, Method(how)
    if isinstance(how, str) and how in by_name_alone():
        return None, METHODS[how].make(None)
    if isinstance(how, str | Path | os.PathLike):
        how = Bundle.open(os.fspath(how))
    if not isinstance(how, Bundle):
        names = ", ".join(sorted(by_name_alone()))
        raise UserError(f"a {type(how).__name__} does not tell how to prune: give a bundle or one of {names}")
    return how, METHODS[TOKENS].make(copy.deepcopy(how))  # a bundle may serve several models


def _num_tokens(visual: Any) -> int:
    return visual.grid_size[0] * visual.grid_size[1]


def _count(visual: Any, keep: float) -> int:
    return count_kept(_num_tokens(visual), keep, "keep")


def _spread(visual: Any, blocks: Sequence[int], kept: int) -> Schedule:
    """Tokens leave before each of some blocks, as many before each, until so many are kept."""
    gone = _num_tokens(visual) - kept
    parts = len(blocks)
    return {block: _num_tokens(visual) - gone * (place + 1) // parts for place, block in enumerate(blocks)}


def _checked(visual: Any, schedule: Schedule) -> Schedule:
    """The schedule without blocks before which nothing leaves. Raises UserError where it makes no sense."""
    depth, there, result = len(visual.transformer.resblocks), _num_tokens(visual), {}
    for block, kept in sorted(schedule.items()):
        if not 0 <= block < depth:
            raise UserError(f"block {block}: this model has blocks 0 to {depth - 1}")
        if kept > there:
            raise UserError(f"block {block}: {kept} tokens cannot go on, as only {there} are left before it")
        if kept < there:
            result[block] = kept
        there = kept
    return result


def _schedule_for(
    visual: Any,
    blocks: Sequence[int],
    share: float,
    method: Method,
    cut: int,
) -> Schedule:
    """The schedule that keeps most tokens within a share of the unpruned model's multiply-adds."""
    if not 0 < share <= 1:
        raise UserError(f"multiply_adds {share}: must be above 0 and at most 1, a share of the unpruned model's")
    budget = share * full_multiply_adds(visual)
    for kept in range(_num_tokens(visual), 0, -1):
        schedule = _checked(visual, _spread(visual, blocks, kept))
        if PrunedTower(visual, schedule, method.selector, method.tokens, cut).multiply_adds() <= budget:
            return schedule
    raise UserError(
        f"multiply_adds {share}: cannot be met, even one token takes more; let tokens leave before an earlier block"
    )
