"""Schedules: before which blocks patch tokens leave, how many stay, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.errors import UserError
from patchrank.model.adapter import Adapter

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
