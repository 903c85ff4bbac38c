"""Token merging (ToMe; Bolya et al., "Token Merging: Your ViT But Faster", 2023), from the paper, to compare with.

In every block but the last, between attention and MLP, the r pairs of tokens whose keys are most alike become one token
each: their mean, weighted by how many patches each stands for. Attention counts a token as often as it stands for a
patch ("proportional attention").
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.model.kinds import adapt
from patchrank.pruning.methods import MERGING, Method, Need
from patchrank.pruning.stand_in import StandIn, Trace


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
    x, key = adapter.attention(x, number, bias=sizes.log())  # (B, n, D), (B, heads, n, D / heads)
    if merges:
        x, sizes = merge(x, sizes, key.mean(dim=1), merges, adapter.prefix_tokens)
    return adapter.mlp(x, number), sizes


def merge(x: Tensor, sizes: Tensor, metric: Tensor, merges: int, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: every second patch looks for the most similar one of the others; the best `merges` of
    these pairs become one token.

    Args:
        x: (B, n, D), the prefix tokens first, which never merge.
        sizes: (B, n) float32.
        metric: (B, n, d), whose cosine tells how alike two tokens are.
        merges: 1 .. (n - prefix) // 2.
        prefix: the number of prefix tokens.

    Returns:
        (B, n - merges, D) and (B, n - merges): the prefix tokens, those that looked and stay, then all others.
    """
    metric = F.normalize(metric[:, prefix:], dim=-1)
    alike = metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)  # (B, look, others)
    best, partner = alike.max(dim=-1)  # (B, look) each
    order = best.argsort(dim=-1, descending=True)  # (B, look)
    leaving = order[:, :merges]  # (B, merges)
    staying = order[:, merges:].sort(dim=-1).values  # (B, look - merges)
    target = partner.gather(1, leaving)[..., None]  # (B, merges, 1)
    summed = torch.cat([x * sizes[..., None], sizes[..., None]], dim=-1)  # (B, n, D + 1)
    first, look, others = summed[:, :prefix], summed[:, prefix + 1 :: 2], summed[:, prefix::2]
    moved = (look.gather(1, ids[..., None].expand(-1, -1, look.shape[2])) for ids in (staying, leaving))
    stays, goes = moved  # (B, look - merges, D + 1), (B, merges, D + 1)
    others = others.scatter_add(1, target.expand_as(goes), goes)  # (B, others, D + 1)
    total = torch.cat([first, stays, others], dim=1)  # (B, n - merges, D + 1)
    return (total[..., :-1] / total[..., -1:]).to(x.dtype), total[..., -1]


def merging_multiply_adds(adapter: Adapter, merges: list[int]) -> int:
    """Exact multiply-adds of an image; the matching itself is counted, norms and activations are not.

    Args:
        merges: r of each block but the last.
    """
    n, total = adapter.length, adapter.embed_multiply_adds()
    for r in merges:
        patches = n - adapter.prefix_tokens
        matching = (patches // 2) * ((patches + 1) // 2) * adapter.head_width if r else 0
        total += adapter.block_multiply_adds(n) - adapter.mlp_multiply_adds(r) + matching
        n -= r
    return total + adapter.block_multiply_adds(n, last=True) + adapter.output_multiply_adds(n)


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
