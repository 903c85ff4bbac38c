"""Schedules: before which blocks patch tokens leave, how many stay, and what that costs.

Methods are compared at equal multiply-adds. At keep rate m, m * N tokens go past the cut: a learnable token costs what
a patch costs, so b of them leave m * N - b places for patches. What needs no training is given as many multiply-adds as
that takes together with the predictor.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.pruning.methods import Method
from patchrank.tokens import count_kept

Schedule = dict[int, int]
"""How many patch tokens go on, by the number of the block before which the others leave."""


def spread(num_tokens: int, blocks: Sequence[int], kept: int) -> Schedule:
    """Tokens leave before each of some blocks, as many before each, until so many are kept."""
    gone, parts = num_tokens - kept, len(blocks)
    return {block: num_tokens - gone * (place + 1) // parts for place, block in enumerate(blocks)}


def checked(adapter: Adapter, schedule: Schedule) -> Schedule:
    """The schedule without blocks before which nothing leaves. Raises UserError where it makes no sense."""
    there, result = adapter.num_tokens, {}
    for block, kept in sorted(schedule.items()):
        if not 0 <= block < adapter.depth:
            raise UserError(f"block {block}: this model has blocks 0 to {adapter.depth - 1}")
        if kept > there:
            raise UserError(f"block {block}: {kept} tokens cannot go on, as only {there} are left before it")
        if kept < there:
            result[block] = kept
        there = kept
    return result


def scheduled_multiply_adds(adapter: Adapter, schedule: Schedule, extra: int = 0, join: int | None = None) -> int:
    """Exact multiply-adds of an image of which tokens leave by a schedule; the selector's are not counted.

    Args:
        extra, join: so many learnable tokens join before block `join`.
    """
    n, total = adapter.length, adapter.embed_multiply_adds()
    for number in range(adapter.depth):
        n = adapter.prefix_tokens + schedule[number] if number in schedule else n
        there = n + extra if join is not None and number >= join else n
        total += adapter.block_multiply_adds(there, last=number == adapter.depth - 1)
    return total + adapter.readout_multiply_adds(there)


def multiply_adds(adapter: Adapter, method: Method, schedule: Schedule, cut: int) -> int:
    """Exact multiply-adds of an image that a method prunes by a schedule, what tells the tokens included.

    Args:
        cut: the block before which learnable tokens join, where they do not join at the input.
    """
    count, join = 0, None
    if method.tokens is not None and schedule:
        count, join = method.tokens.config.count, 0 if method.tokens.config.place == "input" else cut
    told = 0 if method.selector is None else method.selector.multiply_adds(adapter, schedule)
    return scheduled_multiply_adds(adapter, schedule, count, join) + told


def budget(adapter: Adapter, method: Method, cut: int, keep: float) -> int:
    """Multiply-adds that a method may take at a keep rate: those of m * N tokens past the cut, and its allowance."""
    count = count_kept(adapter.num_tokens, keep)
    return scheduled_multiply_adds(adapter, {cut: count}) + (method.allowance or 0)


def at_keep_rate(adapter: Adapter, method: Method, cut: int, keep: float, flag: str = "keep") -> Schedule:
    """How many patches go on past the cut; empty at keep 1, where the model stays as it is.

    Raises:
        UserError: a keep rate that leaves no patch, or is above 1.
    """
    count = count_kept(adapter.num_tokens, keep, flag)
    if count == adapter.num_tokens:
        return {}
    extra = 0 if method.tokens is None else method.tokens.config.count
    if count <= extra:
        raise UserError(f"{flag} {keep:g}: leaves {count} tokens, and {extra} are learnable ones; keep more")
    limit = budget(adapter, method, cut, keep)
    patches = count - extra
    if method.allowance is not None:
        patches = adapter.num_tokens - 1
    elif method.selector is not None:
        limit += method.selector.multiply_adds(adapter, {cut: patches})
    # More than the limit are a matched method's, or learnable tokens' that go through the blocks before the cut, too.
    while patches > 1 and multiply_adds(adapter, method, {cut: patches}, cut) > limit:
        patches -= 1
    return {cut: patches}
