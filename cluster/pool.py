"""A pool of Ray actors that works through a list of items, whatever becomes of the actors meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from patchrank.errors import UserError
from patchrank.storage import one_line

POLL_SECONDS = 1.0
ATTEMPTS = 3  # how often an item may cost its actor's life before it is set aside


@dataclass(frozen=True)
class Failed:
    """What became of an item that has no result; `reason` is one line."""

    reason: str


class Pool:
    """Hands items to the actors that are up, one at a time, and takes in actors as the cluster finds room for them.

    Ray restarts an actor that dies and repeats the call it was in. The class of the actors has methods `ready()` and
    `progress()`, the latter in the concurrency group "progress", so that it answers while the actor works.

    Args:
        actor_class: of the actors, as a plain class.
        arguments: of its constructor. Large objects go in as references inside a list, and are kept alive from here.
        cpus, gpus: what an actor takes.
        size: how many actors to ask for; those that find no room wait, and the others work on without them.
        fatal: exceptions of the actors' methods that end `run`; others fail the item alone.
    """

    def __init__(
        self,
        actor_class: type,
        arguments: Sequence[Any],
        size: int,
        cpus: int,
        gpus: float,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        remote = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=ATTEMPTS - 1,
            concurrency_groups={"progress": 1},
        )(actor_class)
        self._arguments = arguments  # Ray needs them again when it restarts an actor
        self._fatal = fatal
        self._starting: dict[Any, Any] = {}  # ready() -> actor
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, str]] = {}  # call -> actor, item
        self._asked: dict[Any, Any] = {}  # actor -> its progress() under way
        self._progress: dict[str, Any] = {}  # item in work -> what its actor last said
        for actor in [remote.remote(*arguments) for _ in range(size)]:
            self._starting[actor.ready.remote()] = actor

    @property
    def actors_up(self) -> int:
        """How many actors work or wait for work."""
        return len(self._idle) + len(self._busy)

    def progress(self) -> list[Any]:
        """What the actors last said of the items they are working on."""
        return list(self._progress.values())

    def run(
        self, method: str, items: Sequence[str], *arguments: Any, tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[str, Any]]:
        """Call `actor.method(item, *arguments)` for every item, in any order.

        Args:
            method: the actors' method.
            items: its first arguments.
            arguments: the others; object references are resolved by Ray.
            tick: called about every `POLL_SECONDS`.

        Yields:
            (item, result) as calls end; the result is a `Failed` where the method raised, or where the item cost the
            actor its life each time that Ray tried it.

        Raises:
            UserError: an actor cannot be started.
            Exception: one of `fatal`, from a method.
        """
        waiting = deque(items)
        next_tick = time.monotonic() + POLL_SECONDS
        while waiting or self._busy:
            while waiting and self._idle:
                actor, item = self._idle.pop(), waiting.popleft()
                self._busy[getattr(actor, method).remote(item, *arguments)] = (actor, item)
            calls = [*self._starting, *self._busy]
            done, _ = ray.wait(calls, timeout=max(0.0, next_tick - time.monotonic()))
            if time.monotonic() >= next_tick:
                self._poll()
                tick()
                next_tick = time.monotonic() + POLL_SECONDS
            for call in done:
                if call in self._starting:
                    actor = self._starting.pop(call)
                    try:
                        ray.get(call)
                    except RayError as error:
                        last = str(error).strip().splitlines()[-1]  # the lines before it are the actor's stack trace
                        raise UserError(f"an actor could not be started: {last}") from None
                    self._idle.append(actor)
                else:
                    actor, item = self._busy.pop(call)
                    self._progress.pop(item, None)
                    self._asked.pop(actor, None)
                    yield item, self._result(call, actor)

    def _result(self, call: Any, actor: Any) -> Any:
        try:
            result = ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, self._fatal):
                raise error.cause from None
            ray.kill(actor, no_restart=False)  # after a CUDA error nothing works in a process: go on in a new one
            result = Failed(f"{type(error.cause).__name__}: {one_line(error.cause)}")
        except RayError:
            result = Failed(f"its worker died {ATTEMPTS} times")
        else:
            self._idle.append(actor)
            return result
        self._starting[actor.ready.remote()] = actor
        return result

    def _poll(self) -> None:
        """Collect the answers that have come and ask again; an actor that does not answer is not waited for."""
        for actor, item in self._busy.values():
            call = self._asked.get(actor)
            if call is None:
                self._asked[actor] = actor.progress.remote()
            elif ray.wait([call], timeout=0)[0]:
                try:
                    self._progress[item] = ray.get(call)
                except RayError:
                    self._progress.pop(item, None)  # the actor was restarted and begins the item anew
                self._asked[actor] = actor.progress.remote()
