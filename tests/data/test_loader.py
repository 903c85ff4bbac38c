"""Images are decoded on threads, ahead of whoever uses them, in their order."""

from __future__ import annotations

import threading

import pytest
import torch

from patchrank.data.decoding import Undecodable, on_threads
from patchrank.data.loader import Batch, ahead


def test_rows_stay_in_order_and_one_that_cannot_be_decoded_costs_itself_alone():
    first_waits = threading.Event()

    def load(row):
        if row == 0:
            assert first_waits.wait(timeout=60)
        first_waits.set()
        if row == 3:
            raise Undecodable("no image")
        return 10 * row

    found = list(on_threads(range(6), load, threads=2, ahead=4))
    assert [row for row, _ in found] == list(range(6))
    assert [loaded for row, loaded in found if row != 3] == [0, 10, 20, 40, 50]
    assert str(found[3][1]) == "no image"


def test_rows_before_the_damage_come_first():
    def rows():
        yield from range(3)
        raise OSError("the shard ends here")

    found = on_threads(rows(), str, threads=2, ahead=10)
    assert [next(found) for _ in range(3)] == [(0, "0"), (1, "1"), (2, "2")]
    with pytest.raises(OSError, match="the shard ends here"):
        next(found)


def test_no_more_rows_are_read_than_told():
    read = []
    found = on_threads((read.append(row) or row for row in range(10)), str, threads=1, ahead=3)
    next(found)
    assert read == [0, 1, 2]


def test_the_next_batch_is_made_while_this_one_is_worked_on():
    begun = [threading.Event() for _ in range(3)]

    def made():
        for number, event in enumerate(begun):
            event.set()
            yield Batch([str(number)], torch.zeros(1, 3, 4, 4), [None], [()], 0.0)
        raise OSError("the shard ends here")

    found = ahead(made(), pin=False)
    assert next(found).keys == ["0"]
    assert begun[1].wait(timeout=60) and not begun[2].is_set()  # one ahead, not more
    assert next(found).keys == ["1"]
    assert next(found).keys == ["2"]
    with pytest.raises(OSError, match="the shard ends here"):
        next(found)
