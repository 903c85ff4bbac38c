"""Token merging (ToMe; Bolya et al., "Token Merging: Your ViT But Faster", 2023), from the paper, to compare with.

In every block but the last, between attention and MLP, the r pairs of tokens whose keys are most alike become one token
each: their mean, weighted by how many patches each stands for. Attention counts a token as often as it stands for a
patch ("proportional attention").

The same in later blocks alone, beside dropping, is a part of what a bundle does (`beside_dropping`): what a predictor
drops early and what is alike later on are different patches, so that both together lose less than either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter, Along
from patchrank.model.kinds import adapt
from patchrank.pruning.methods import MERGING, Method, Need
from patchrank.pruning.stand_in import StandIn, Trace

FIRST = 0.4  # of the depth: where patches that a predictor left begin to merge


class MergedTower(StandIn):
    """An image tower that merges tokens.

    Args:
        visual: as for `StandIn`.
        merges: how many pairs become one in each block but the last.
    """

    def __init__(self, visual: nn.Module, merges: list[int]) -> None:
        super().__init__(visual)
        self.merges = merges

    @property
    def idle(self) -> bool:
        """As `StandIn.idle`."""
        return not any(self.merges)

    def trace(self, images: Tensor, taken: Collection[int] = (), stop: int | None = None) -> Trace:
        """As `StandIn.trace`; merged tokens have no ids."""
        adapter = self.adapter
        adapter.all_read = adapter.all_read or adapter.depth in taken
        x = adapter.embed(images)  # (B, p + N, D)
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32)  # (B, p + N)
        found: dict[int, tuple[Tensor, Tensor | None]] = {0: (x, None)} if 0 in taken else {}
        for number, merges in enumerate([*self.merges, 0][:stop]):
            x, sizes = merge_block(adapter, number, x, sizes, merges)
            if number + 1 in taken:
                found[number + 1] = x, None
        return Trace(x, 0, None, sizes, found)

    def multiply_adds(self) -> int:
        """As `StandIn.multiply_adds`."""
        return self.adapter.full_multiply_adds() if self.idle else merging_multiply_adds(self.adapter, self.merges)


def image_tower(visual: nn.Module, multiply_adds: int) -> MergedTower:
    """A tower that merges, at about so many multiply-adds an image.

    Raises:
        UserError: its blocks ask for the place of a token, and a merged one has none.
    """
    adapter = adapt(visual)
    if adapter.rotary:
        raise UserError(Need.MERGEABLE.value.format(method=MERGING).removeprefix("--methods "))
    return MergedTower(visual, merges_for(adapter, multiply_adds))


def by_merging(_: object) -> Method:
    """As `Entry.make`."""
    return Method(image_tower=image_tower)


def merge_block(adapter: Adapter, number: int, x: Tensor, sizes: Tensor, merges: int) -> tuple[Tensor, Tensor]:
    """One block that merges; the last one need not, as the class token alone is read after it.

    Args:
        adapter, number: the tower and the block.
        x: (B, n, D), the prefix tokens first.
        sizes: (B, n) float32, the patches that each token stands for; 1 for a prefix token.
        merges: r, at most half of the tokens beside the prefix tokens.

    Returns:
        (B, n - r, D) and (B, n - r); the prefix tokens are first.
    """
    p = adapter.prefix_tokens
    along = Along(merges={number: merges}, first=p, patches=x.shape[1] - p, sizes=sizes)
    x, merged, _ = adapter.through(x, number, number + 1, along=along)
    return x, sizes if merged is None else merged


def block_multiply_adds(adapter: Adapter, n: int, patches: int, merges: int) -> int:
    """Exact multiply-adds of a block that merges; the matching itself is counted, norms and activations are not.

    Args:
        n: the tokens that go into it.
        patches: those of them that may merge.
        merges: r.
    """
    matching = (patches // 2) * ((patches + 1) // 2) * adapter.head_width if merges else 0
    return adapter.block_multiply_adds(n) - adapter.mlp_multiply_adds(merges) + matching


def merging_multiply_adds(adapter: Adapter, merges: list[int]) -> int:
    """Exact multiply-adds of an image, as of `block_multiply_adds`.

    Args:
        merges: r of each block but the last.
    """
    n, total = adapter.length, adapter.embed_multiply_adds()
    for r in merges:
        total += block_multiply_adds(adapter, n, n - adapter.prefix_tokens, r)
        n -= r
    return total + adapter.block_multiply_adds(n, last=True) + adapter.output_multiply_adds(n)


def beside_dropping(adapter: Adapter, schedule: Mapping[int, int], share: float) -> dict[int, int]:
    """The r of blocks, by their number, where patches leave by a schedule and others merge after it.

    As many in each block from `FIRST` of the depth on, but no more than have left, so that a model that hardly prunes
    hardly merges, and no more than a quarter of the patches that are there. None where blocks ask for the place of a
    token (RoPE), as a merged one has none.

    Args:
        schedule: how many patches go on, by the number of the block before which the others leave.
        share: of all patches, that merge in all.
    """
    if not schedule or not share or adapter.rotary:
        return {}
    blocks = range(max(*schedule, round(FIRST * adapter.depth)), adapter.depth - 1)
    left, merges = min(schedule.values()), {}
    most = min(round(share * adapter.num_tokens / max(1, len(blocks))), adapter.num_tokens - left)
    for number in blocks:
        merges[number] = min(most, left // 4)
        left -= merges[number]
    return merges


def merges_for(adapter: Adapter, multiply_adds: int) -> list[int]:
    """The r of each block but the last with which an image takes about so many multiply-adds: the same r in all blocks,
    or one more in the first of them; the closest there is.
    """
    blocks, tokens = adapter.depth - 1, adapter.num_tokens

    def spread(total: int) -> list[int]:
        left, merges = tokens, []
        for number in range(blocks):
            wanted = total // blocks + (number < total % blocks)
            merges.append(min(wanted, left // 2))  # half of the tokens can find a partner
            left -= merges[-1]
        return merges

    candidates = [spread(total) for total in range(tokens * 4)]
    return min(candidates, key=lambda merges: abs(merging_multiply_adds(adapter, merges) - multiply_adds))
