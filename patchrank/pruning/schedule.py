"""Schedules: before which blocks patch tokens leave, how many stay, and what that costs.

Methods are compared at equal multiply-adds. At keep rate m, m * N tokens go past the cut: a learnable token costs what
a patch costs, so b of them leave m * N - b places for patches, or fewer where they go through the blocks before the
cut, too; where patches merge past the cut, more of them go past it. What needs no training is given as many
multiply-adds as that takes together with the predictor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter
from patchrank.pruning.merging import block_multiply_adds
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


def scheduled_multiply_adds(
    adapter: Adapter,
    schedule: Schedule,
    extra: int = 0,
    join: int | None = None,
    merges: Mapping[int, int] | None = None,
) -> int:
    """Exact multiply-adds of an image of which tokens leave by a schedule; the selector's are not counted.

    Args:
        extra, join: so many learnable tokens join before block `join`.
        merges: how many pairs of patches become one, by block.
    """
    n, total = adapter.length, adapter.embed_multiply_adds()
    for number in range(adapter.depth):
        n = adapter.prefix_tokens + schedule[number] if number in schedule else n
        there = n + extra if join is not None and number >= join else n
        if merged := 0 if merges is None else merges.get(number, 0):
            total += block_multiply_adds(adapter, there, n - adapter.prefix_tokens, merged)
            n -= merged
        else:
            total += adapter.block_multiply_adds(there, last=number == adapter.depth - 1)
    return total + adapter.output_multiply_adds(there)


def multiply_adds(adapter: Adapter, method: Method, schedule: Schedule, cut: int) -> int:
    """Exact multiply-adds of an image that a method prunes by a schedule, what tells the tokens included.

    Args:
        cut: the block before which learnable tokens join, where they do not join at the input.
    """
    told = 0 if method.selector is None else method.selector.multiply_adds(adapter, schedule)
    return _unselected(adapter, method, schedule, cut) + told


def budget(adapter: Adapter, method: Method, cut: int, keep: float) -> int:
    """Multiply-adds that a method may take at a keep rate: those of m * N tokens past the cut, and its allowance."""
    count = count_kept(adapter.num_tokens, keep)
    return scheduled_multiply_adds(adapter, {cut: count}) + (method.allowance or 0)


def beside_learnable(adapter: Adapter, method: Method, totals: Schedule, cut: int, asked: str) -> Schedule:
    """How many patches go on where a method's learnable tokens take places, or patches merge later: as many fewer or
    more before every block, and no more than what takes the multiply-adds of `totals` alone.

    Args:
        totals: how many tokens go on, learnable ones among them.
        cut: as for `multiply_adds`.
        asked: the flag and keep rate that the error names.

    Raises:
        UserError: no patch is left.
    """
    if method.tokens is None or not totals:
        return totals
    limit, count = scheduled_multiply_adds(adapter, totals), method.tokens.config.count
    # Where patches merge later on, more of them go past the cut, but never all: then nothing would be pruned.
    least = max(totals.values()) - adapter.num_tokens + 1 if method.tokens.config.merged else count
    for taken in range(least, min(totals.values())):
        schedule = {block: total - taken for block, total in totals.items()}
        if _unselected(adapter, method, schedule, cut) <= limit:
            return schedule
    raise UserError(f"{asked}: leaves no place for patches beside {count} learnable tokens; keep more")


def at_keep_rate(adapter: Adapter, method: Method, cut: int, keep: float, flag: str = "keep") -> Schedule:
    """How many patches go on past the cut; empty at keep 1, where the model stays as it is.

    What is matched to a predictor keeps one patch at least, even if that takes more.

    Raises:
        UserError: a keep rate that leaves no patch, or is above 1.
    """
    count = count_kept(adapter.num_tokens, keep, flag)
    if count == adapter.num_tokens:
        return {}
    if method.allowance is None:
        return beside_learnable(adapter, method, {cut: count}, cut, f"{flag} {keep:g}")
    limit, patches = budget(adapter, method, cut, keep), adapter.num_tokens - 1
    while patches > 1 and multiply_adds(adapter, method, {cut: patches}, cut) > limit:
        patches -= 1
    return {cut: patches}


def _unselected(adapter: Adapter, method: Method, schedule: Schedule, cut: int) -> int:
    """`multiply_adds` without what tells the tokens."""
    if method.tokens is None:
        return scheduled_multiply_adds(adapter, schedule)
    join = 0 if method.tokens.config.place == "input" else cut
    merges = method.tokens.merges(adapter, schedule)
    return scheduled_multiply_adds(adapter, schedule, method.tokens.config.count, join, merges)
