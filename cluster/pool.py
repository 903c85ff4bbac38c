"""A pool of Ray actors that works through a list of items, whatever becomes of the actors meanwhile."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from patchrank.errors import UserError
from patchrank.storage import one_line

POLL_SECONDS = 1.0
ROOM_SECONDS = 5.0  # between two looks for new nodes
SILENT_SECONDS = 300.0  # an actor that does not answer for so long hangs: it is killed, and its item goes to another
ATTEMPTS = 3  # how often an item may cost its actor's life before it is set aside, and how often an actor may not start


@dataclass(frozen=True)
class Failed:
    """What became of an item that has no result; `reason` is one line."""

    reason: str


class Pool:
    """Hands items to the actors that are up, one at a time, and takes in actors as the cluster finds room for them.

    Ray restarts an actor that dies, where and when there is room; its item goes to whichever actor is free first (Ray's
    own retry would wait for the restarted one, for ever if its node is gone). The class of the actors has methods
    `ready(shared)` and `progress()`, the latter in the concurrency group "progress", so that it answers while the actor
    works. A restarted actor knows nothing of earlier calls, so every call brings along what it needs.

    Args:
        actor_class: of the actors, as a plain class.
        shared: first argument of every call but `progress`, and small: large objects are in it as references.
        size: how many actors to ask for; those that find no room wait, and the others work on without them.
        cpus, gpus: what an actor takes.
        room: how many actors the cluster has room for by now. Where it grows beyond `size` while items wait, more are
            asked for.
        fatal: exceptions of the actors' methods that end `run`; others fail the item alone.
    """

    def __init__(
        self,
        actor_class: type,
        shared: Any,
        size: int,
        cpus: int,
        gpus: float,
        fatal: tuple[type[Exception], ...] = (),
        room: Callable[[], int] = lambda: 0,
    ) -> None:
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, concurrency_groups={"progress": 1})(
            actor_class
        )
        self._shared = shared
        self._size = 0
        self._room = room
        self._next_look = time.monotonic() + ROOM_SECONDS
        self._fatal = fatal
        self._starting: dict[Any, Any] = {}  # ready call -> actor
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, str]] = {}  # call -> actor, item
        self._asked: dict[Any, tuple[Any, float]] = {}  # actor -> its progress() under way, and since when
        self._progress: dict[str, Any] = {}  # item in work -> what its actor last said
        self._failed_starts: Counter[Any] = Counter()  # by actor
        self._grow(size)

    @property
    def actors_up(self) -> int:
        """How many actors work or wait for work."""
        return len(self._idle) + len(self._busy)

    def running(self) -> dict[str, Any]:
        """The items in work, and what their actors last said of them; None where nothing has been heard yet."""
        return {item: self._progress.get(item) for _, item in self._busy.values()}

    def run(
        self, method: str, items: Sequence[str], *arguments: Any, tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[str, Any]]:
        """Call `actor.method(shared, item, *arguments)` for every item, in any order.

        Args:
            method: the actors' method.
            items: what to work through.
            arguments: the same for every item; Ray resolves object references among them.
            tick: called about every `POLL_SECONDS`.

        Yields:
            (item, result) as calls end; the result is a `Failed` where the method raised, or where the item cost
            `ATTEMPTS` actors their lives.

        Raises:
            UserError: no actor can be started.
            Exception: one of `fatal`, from a method.
        """
        waiting = deque(items)
        deaths: Counter[str] = Counter()
        next_tick = time.monotonic() + POLL_SECONDS
        while waiting or self._busy:
            while waiting and self._idle:
                actor, item = self._idle.pop(), waiting.popleft()
                self._busy[getattr(actor, method).remote(self._shared, item, *arguments)] = (actor, item)
            calls = [*self._starting, *self._busy]
            done, _ = ray.wait(calls, timeout=max(0.0, next_tick - time.monotonic()))
            if time.monotonic() >= self._next_look:
                self._grow(min(self._room(), len(waiting) + len(self._busy)))
                self._next_look = time.monotonic() + ROOM_SECONDS
            if time.monotonic() >= next_tick:
                self._poll()
                tick()
                next_tick = time.monotonic() + POLL_SECONDS
            for call in done:
                if call in self._starting:
                    self._started(call, self._starting.pop(call))
                    continue
                actor, item = self._busy.pop(call)
                self._progress.pop(item, None)
                self._asked.pop(actor, None)
                try:
                    result = ray.get(call)
                    self._idle.append(actor)
                except RayTaskError as error:
                    if isinstance(error.cause, self._fatal):
                        raise error.cause from None
                    ray.kill(actor, no_restart=False)  # after a CUDA error nothing works in a process: take a new one
                    self._start(actor)
                    result = Failed(f"{type(error.cause).__name__}: {one_line(error.cause)}")
                except RayError as error:
                    self._start(actor)
                    deaths[item] += 1
                    if deaths[item] < ATTEMPTS:
                        waiting.append(item)  # last: if it is the item's fault, the others are done first
                        continue
                    result = Failed(f"its worker died {ATTEMPTS} times: {_last_line(error)}")
                yield item, result

    def _grow(self, size: int) -> None:
        for actor in [self._remote.remote() for _ in range(size - self._size)]:
            self._size += 1
            self._start(actor)

    def _start(self, actor: Any) -> None:
        # Ray repeats this call, which is harmless, until the actor that it starts in place of a dead one is there.
        self._starting[actor.ready.options(max_task_retries=-1).remote(self._shared)] = actor

    def _started(self, call: Any, actor: Any) -> None:
        try:
            ray.get(call)
        except RayError as error:
            self._failed_starts[actor] += 1
            if self._failed_starts[actor] < ATTEMPTS:  # the process before it may still hold the GPU's memory
                ray.kill(actor, no_restart=False)
                self._start(actor)
            elif self._starting or self._idle or self._busy:
                ray.kill(actor)  # nobody would use what it holds
                tqdm.write(f"warning: an actor could not be started: {_last_line(error)}", file=sys.stderr)
            else:
                raise UserError(f"no actor could be started: {_last_line(error)}") from None
        else:
            del self._failed_starts[actor]
            self._idle.append(actor)

    def _poll(self) -> None:
        """Collect the answers that have come and ask again; an actor that does not answer is not waited for long."""
        for actor, item in self._busy.values():
            call, since = self._asked.get(actor, (None, 0.0))
            if call is not None and ray.wait([call], timeout=0)[0]:
                try:
                    self._progress[item] = ray.get(call)
                except RayError:
                    self._progress.pop(item, None)  # the actor has died: whoever takes the item begins it anew
            elif call is not None:
                if time.monotonic() - since < SILENT_SECONDS:
                    continue
                tqdm.write(f"warning: {item}: its worker has not answered for {SILENT_SECONDS:.0f} s", file=sys.stderr)
                ray.kill(actor, no_restart=False)
            self._asked[actor] = (actor.progress.remote(), time.monotonic())


def _last_line(error: RayError) -> str:
    """What went wrong, without the stack trace of another process."""
    return str(error).strip().splitlines()[-1].strip()
