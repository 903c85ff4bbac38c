"""Decoding on threads, ahead of whoever uses the images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from patchrank.data.images import decode
from patchrank.store.storage import one_line

Row = TypeVar("Row")
Loaded = TypeVar("Loaded")


class Undecodable(Exception):
    """An image cannot be decoded or preprocessed. The message is one line."""


def pixels(image: bytes, preprocess: Callable[..., Tensor]) -> Tensor:
    """An encoded image as the model takes it, (3, H, W). Can be called from several threads.

    Raises:
        Undecodable: whatever the image does to its decoder; it must not cost the others.
    """
    try:
        return preprocess(decode(image))
    except MemoryError:  # the machine's trouble, not the image's
        raise
    except Exception as error:
        raise Undecodable(one_line(error)) from None


def on_threads(
    rows: Iterable[Row], load: Callable[[Row], Loaded], threads: int, ahead: int
) -> Iterator[tuple[Row, Loaded | Undecodable]]:
    """Each row with what `load` makes of it, in their order.

    Args:
        rows: what they raise is raised here, after the rows that came before.
        load: called on the threads. `Undecodable` is handed on in the place of its result, all else it raises is
            raised here.
        ahead: rows under way at most, so memory does not grow with the number of rows.
    """
    source = iter(rows)
    waiting: deque[tuple[Row, Future[Loaded]]] = deque()
    exhausted, damage = False, None
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while not exhausted and len(waiting) < ahead:
                try:
                    row = next(source)
                except StopIteration:
                    exhausted = True
                except Exception as error:
                    exhausted, damage = True, error
                else:
                    waiting.append((row, pool.submit(load, row)))
            if not waiting:
                break
            row, future = waiting.popleft()
            loaded: Loaded | Undecodable
            try:
                loaded = future.result()
            except Undecodable as error:
                loaded = error
            yield row, loaded
    if damage is not None:
        raise damage
