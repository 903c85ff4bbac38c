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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from patchrank.errors import UserError
from patchrank.model import fidelity
from patchrank.model.adapter import Adapter
from patchrank.model.kinds import adapt
from patchrank.model.tower import default_cut
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.dropping import PrunedTower
from patchrank.pruning.methods import METHODS, RANDOM, TOKENS, Method, Need, by_name_alone
from patchrank.pruning.owner import owner_of
from patchrank.pruning.schedule import (
    Schedule,
    at_keep_rate,
    beside_learnable,
    budget,
    checked,
    scheduled_multiply_adds,
    spread,
)
from patchrank.pruning.selector import Selector
from patchrank.pruning.stand_in import StandIn
from patchrank.tokens import count_kept

DEFAULT_KEEP = 0.6


def prune(
    model: nn.Module,
    how: str | os.PathLike[str] | Bundle | Selector,
    keep: float | Mapping[int, float] | None = None,
    *,
    multiply_adds: float | None = None,
    blocks: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Make a CLIP drop patch tokens whenever it encodes an image; the model is changed in place.

    Args:
        model: from `open_clip.create_model` or the like, a CLIP, SigLIP, SigLIP2, DINOv2 or ViT of transformers, or
            what holds one (DDP, `torch.compile`, peft where attention is not tuned); one that is pruned already is
            restored first.
        how: a bundle, the folder of one or its id on the Hugging Face hub: what a training left (`patchrank.Bundle`).
            Or, to compare with: "class-attention", "random", "token-merging" (then tokens are merged, at as many
            multiply-adds), or `patchrank.Golden` for images whose rankings are known.
        keep: the share of patch tokens that stay, a bundle's learnable tokens counted among them; or, to drop them in
            several parts, by the number of the block before which the others leave: {3: 0.9, 5: 0.75, 7: 0.6}. What a
            bundle was made for, or 0.6, where None. At 1 the model stays as it is.
        multiply_adds: instead of `keep`, how much of the unpruned model's multiply-adds may be used, in 0 .. 1.
        blocks: the blocks before which tokens leave, in equal parts, where `keep` is one number; one block, the
            bundle's cut or a quarter of the depth, where None.
        image_size: H and W of the images, for a model of transformers that takes any (DINOv2, SigLIP2); those that a
            bundle was made for, or those of its configuration, where None.

    One image goes through both towers, all its tokens kept, and must come out the same: patchrank computes blocks from
    their weights, and does not know what else was put in their place.

    Returns:
        The model.

    Raises:
        UserError: a bundle that cannot be had, or is for another model; a tower of a kind that cannot be pruned, or
            with other modules or hooks in the place of those that it was built of; a keep rate, block or target that
            makes no sense.
    """
    bundle, method = _resolve(how)
    with owner_of(model, None if bundle is None else bundle.grid, image_size) as owner:
        tower = _planned(owner.visual, bundle, method, keep, multiply_adds, blocks)
        if not tower.idle:
            fidelity.check(tower.adapter)
        # And not `train`: some of its modules may be in another mode, as frozen ones are.
        tower.training = owner.visual.training
        for part in (method.selector, method.tokens):
            if part is not None:
                part.to(tower.adapter.device).train(owner.visual.training)
        owner.put(tower)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give a pruned model its original image tower back; one that is not pruned stays as it is. Returns the model."""
    owner_of(model).restore()
    return model


def pruned_tower(
    name: str, visual: Any, cut: int, keep: float, bundle: Bundle | None = None, matched: bool = True
) -> StandIn:
    """The image tower that a method makes of another, to time it, to count what it costs, or to use it.

    Golden rankings are not known to a tower by itself; what stays is left to chance then, at no cost either.

    Args:
        matched: what is compared with a predictor gets as many multiply-adds; else it keeps as many tokens as `prune`
            has it keep.

    Raises:
        UserError: a keep rate that leaves nothing.
    """
    if Need.RANKINGS in METHODS[name].needs:
        name, bundle = RANDOM, None
    method, adapter = METHODS[name].make(bundle), adapt(visual)
    method = method if matched else replace(method, allowance=None)
    if method.image_tower is not None:
        return method.image_tower(visual, budget(adapter, method, cut, keep))
    return PrunedTower(visual, at_keep_rate(adapter, method, cut, keep), method.selector, method.tokens, cut)


def _planned(
    visual: Any,
    bundle: Bundle | None,
    method: Method,
    keep: float | Mapping[int, float] | None,
    multiply_adds: float | None,
    blocks: Sequence[int] | None,
) -> StandIn:
    """The tower that `prune` puts in the place of `visual`, for the same arguments."""
    adapter = adapt(visual)
    if bundle is not None:
        bundle.check(visual)
    cut = bundle.cut if bundle is not None else default_cut(adapter.depth)
    if keep is not None and multiply_adds is not None:
        raise UserError("keep and multiply_adds exclude each other: give one")
    if isinstance(keep, Mapping) and blocks is not None:
        raise UserError("keep tells the blocks already; leave out blocks")
    places = [cut] if blocks is None else sorted(blocks)
    if not places or (isinstance(keep, Mapping) and not keep):
        raise UserError(f"{'keep' if places else 'blocks'}: names no block before which tokens could leave")
    count = partial(count_kept, adapter.num_tokens, flag="keep")
    if multiply_adds is not None:
        schedule = _schedule_for(adapter, places, multiply_adds, method, cut)
    else:
        if isinstance(keep, Mapping):
            last, totals = min(keep.values()), {int(block): count(rate) for block, rate in keep.items()}
        else:
            last = keep if keep is not None else bundle.keep if bundle is not None else DEFAULT_KEEP
            totals = spread(adapter.num_tokens, places, count(last))
        schedule = beside_learnable(adapter, method, checked(adapter, totals), cut, f"keep {last:g}")
    if schedule and method.selector is not None and method.selector.needs_a_block and min(schedule) == 0:
        raise UserError("block 0: there is no block before it whose attention could tell which tokens stay")
    if schedule and bundle is not None and min(schedule) != cut:
        raise UserError(f"block {min(schedule)}: this bundle's predictor looks at the tokens before block {cut}")
    return _tower(method, visual, schedule, cut)


def _tower(method: Method, visual: Any, schedule: Schedule, cut: int) -> StandIn:
    if method.image_tower is not None:
        return method.image_tower(visual, scheduled_multiply_adds(adapt(visual), schedule))
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


def _schedule_for(adapter: Adapter, blocks: Sequence[int], share: float, method: Method, cut: int) -> Schedule:
    """The schedule that keeps most tokens within a share of the unpruned model's multiply-adds."""
    if not 0 < share <= 1:
        raise UserError(f"multiply_adds {share}: must be above 0 and at most 1, a share of the unpruned model's")
    budget = share * adapter.full_multiply_adds()
    for kept in range(adapter.num_tokens, 0, -1):
        schedule = checked(adapter, spread(adapter.num_tokens, blocks, kept))
        if PrunedTower(adapter.visual, schedule, method.selector, method.tokens, cut).multiply_adds() <= budget:
            return schedule
    raise UserError(
        f"multiply_adds {share}: cannot be met, even one token takes more; let tokens leave before an earlier block"
    )
