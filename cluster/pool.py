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
from patchrank.store.storage import one_line

POLL_SECONDS = 1.0
ROOM_SECONDS = 5.0  # between two looks for new nodes
SILENT_SECONDS = 300.0  # an actor that does not answer for so long hangs: it is killed, and its item goes to another
ATTEMPTS = 3  # how often an item may fail or cost its actor's life, and get no further; or an actor fail to start
PATIENCE = 600.0  # without any actor


@dataclass(frozen=True)
class Failed:
    """What became of an item that has no result; `reason` is one line."""

    reason: str


class Pool:
    """Hands items to the actors that are up, and takes in actors as the cluster finds room for them.

    Ray restarts an actor that dies, where and when there is room; its item goes to whichever actor is free first (Ray's
    own retry would wait for the restarted one, for ever if its node is gone). The class of the actors has methods
    `ready(shared)`, which returns the id of its process (`process_id`), and `progress(item)`, in the concurrency group
    "progress", so that it answers while the actor works. A restarted actor knows nothing of earlier calls, so every
    call brings along what it needs.

    Args:
        actor_class: of the actors, as a plain class.
        shared: first argument of every call but `progress`, and small: large objects are in it as references.
        size: how many actors to ask for; those that find no room wait, and the others work on without them.
        cpus, gpus: what an actor takes.
        room: how many actors the cluster has room for by now. Where it grows beyond `size` while items wait, more are
            asked for.
        fatal: exceptions of the actors' methods that end `run`; others fail the item alone.
        at_once: items that an actor has at a time, each on a thread of its own, while there are enough for all actors.
            An item that has failed has its next actor to itself: it may be the item's fault.

    Attributes:
        patience: seconds without any actor, after there were some, before `run` gives up.
    """

    patience = PATIENCE

    def __init__(
        self,
        actor_class: type,
        shared: Any,
        size: int,
        cpus: int,
        gpus: float,
        fatal: tuple[type[Exception], ...] = (),
        room: Callable[[], int] = lambda: 0,
        at_once: int = 1,
    ) -> None:
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_concurrency": at_once}
        self._remote = ray.remote(**options, concurrency_groups={"progress": 1})(actor_class)
        self._at_once = at_once
        self._shared = shared
        self._size = 0
        self._room = room
        self._next_look = time.monotonic() + ROOM_SECONDS
        self._fatal = fatal
        self._starting: dict[Any, Any] = {}  # ready call -> actor
        self._up: dict[Any, str] = {}  # actors that take items, and their processes
        self._seen: float | None = None  # when there last was such an actor
        self._condemned: dict[Any, str] = {}  # actor -> its process that was killed: that takes a moment
        self._busy: dict[Any, tuple[Any, str]] = {}  # call -> actor, item
        self._killed: set[Any] = set()  # calls that end because another item of their actor failed
        self._failures: dict[str, int] = {}  # by item that has failed, since it last got further
        self._asked: dict[Any, tuple[Any, float]] = {}  # call -> the progress() of its item, and since when
        self._progress: dict[str, Any] = {}  # item in work -> what its actor last said
        self._failed_starts: Counter[Any] = Counter()  # by actor
        self._grow(size)

    @property
    def actors_up(self) -> int:
        """How many actors work or wait for work."""
        return len(self._up)

    def running(self) -> dict[str, Any]:
        """The items in work, and what their actors last said of them; None where nothing has been heard yet."""
        return {item: self._progress.get(item) for _, item in self._busy.values()}

    def run(
        self,
        method: str,
        items: Sequence[str],
        *arguments: Any,
        tick: Callable[[], None] = lambda: None,
        further: Callable[[str], bool] = lambda item: False,
    ) -> Iterator[tuple[str, Any]]:
        """Call `actor.method(shared, item, *arguments)` for every item, in any order.

        Args:
            method: the actors' method.
            items: what to work through.
            arguments: the same for every item; Ray resolves object references among them.
            tick: called about every `POLL_SECONDS`.
            further: asked of an item that has failed, whether it has got further since this was last asked, so that
                the next actor goes on from there. Then it is not the item's fault.

        Yields:
            (item, result) as calls end; the result is a `Failed` where the method raised or the actor died `ATTEMPTS`
            times and the item got no further: before that it may be the actor's device or machine. A `Failed` that the
            method returns is final.

        Raises:
            UserError: no actor can be started, or none came back.
            Exception: one of `fatal`, from a method.
        """
        waiting = deque(items)
        self._failures.clear()
        next_tick = time.monotonic() + POLL_SECONDS
        while waiting or self._busy:
            while waiting and (actor := self._free(waiting)) is not None:
                item = waiting.popleft()
                self._busy[getattr(actor, method).remote(self._shared, item, *arguments)] = (actor, item)
            calls = [*self._starting, *self._busy]
            done, _ = ray.wait(calls, timeout=max(0.0, next_tick - time.monotonic()))
            if time.monotonic() >= self._next_look:
                self._grow(min(self._room(), len(waiting) + len({actor for actor, _ in self._busy.values()})))
                self._next_look = time.monotonic() + ROOM_SECONDS
            if time.monotonic() >= next_tick:
                self._poll()
                tick()
                self._give_up(len(waiting))
                next_tick = time.monotonic() + POLL_SECONDS
            for call in done:
                if call in self._starting:
                    self._started(call, self._starting.pop(call))
                    continue
                actor, item = self._busy.pop(call)
                self._progress.pop(item, None)
                self._asked.pop(call, None)
                blameless = call in self._killed
                self._killed.discard(call)
                failure = None
                try:
                    result = ray.get(call)
                except RayTaskError as error:
                    if isinstance(error.cause, self._fatal):
                        raise error.cause from None
                    self._restart(actor)  # after a CUDA error nothing works in a process: take a new one
                    failure = f"{type(error.cause).__name__}: {one_line(error.cause)}"
                except RayError as error:
                    self._down(actor)
                    if blameless:
                        waiting.appendleft(item)
                        continue
                    for idle in self._up.keys() - {its for its, _ in self._busy.values()}:
                        self._down(idle)  # lost with it, perhaps: without a call at work nobody would notice
                    failure = f"its worker died {ATTEMPTS} times: {_last_line(error)}"
                if failure is not None:
                    self._failures[item] = 0 if further(item) else self._failures.get(item, 0) + 1
                    if self._failures[item] < ATTEMPTS:
                        waiting.append(item)  # last: if it is the item's fault, the others are done first
                        continue
                    result = Failed(failure)
                yield item, result

    def _give_up(self, waiting: int) -> None:
        """Raise UserError where all machines were taken away for so long that nobody seems to bring them back."""
        if self._up:
            self._seen = time.monotonic()
        elif self._seen is not None and time.monotonic() - self._seen > self.patience:
            raise UserError(
                f"no worker has been up for {self.patience:g} s, and {waiting + len(self._busy)} of the shards are "
                "left; the same command goes on from here once there are machines; --patience gives them longer"
            )

    def _free(self, waiting: Sequence[str]) -> Any | None:
        """The actor that is to have the next of the items that wait, one with the fewest; None while all are busy."""
        held: Counter[Any] = Counter()
        for actor, item in self._busy.values():
            held[actor] += self._at_once if item in self._failures else 1
        # A second item is for when there are enough: nobody shall wait for an item that another could have done.
        enough = len(waiting) >= len(self._up) + len(self._starting)
        most = self._at_once if enough and waiting[0] not in self._failures else 1
        actor = min(self._up, key=lambda actor: held[actor], default=None)
        return actor if actor is not None and held[actor] < most else None

    def _restart(self, actor: Any) -> None:
        """Take a new process for an actor; what else the old one has in work is no item's fault."""
        if actor in self._up:
            self._killed.update(call for call, (its, _) in self._busy.items() if its == actor)
            self._kill(actor)
            self._down(actor)

    def _kill(self, actor: Any) -> None:
        """End the process of an actor that is up; should it answer once more, it is not taken for the next one."""
        self._condemned[actor] = self._up[actor]
        ray.kill(actor, no_restart=False)

    def _down(self, actor: Any) -> None:
        """Ask an actor whose process has ended for a sign of life, once."""
        if actor in self._up:
            del self._up[actor]
            self._start(actor)

    def _grow(self, size: int) -> None:
        for actor in [self._remote.remote() for _ in range(size - self._size)]:
            self._size += 1
            self._start(actor)

    def _start(self, actor: Any) -> None:
        # Ray repeats this call, which is harmless, until the actor that it starts in place of a dead one is there.
        self._starting[actor.ready.options(max_task_retries=-1).remote(self._shared)] = actor

    def _started(self, call: Any, actor: Any) -> None:
        try:
            process = ray.get(call)
        except RayError as error:
            self._failed_starts[actor] += 1
            if self._failed_starts[actor] < ATTEMPTS:  # the process before it may still hold the GPU's memory
                ray.kill(actor, no_restart=False)
                self._start(actor)
            elif self._starting or self._up:
                ray.kill(actor)  # nobody would use what it holds
                tqdm.write(f"warning: an actor could not be started: {_last_line(error)}", file=sys.stderr)
            else:
                raise UserError(f"no actor could be started: {_last_line(error)}") from None
        else:
            if process == self._condemned.get(actor):
                self._start(actor)
                return
            self._condemned.pop(actor, None)
            del self._failed_starts[actor]
            self._up[actor], self._seen = process, time.monotonic()

    def _poll(self) -> None:
        """Collect the answers that have come and ask again; an actor that does not answer is not waited for long."""
        silent = set()
        for call, (actor, item) in self._busy.items():
            answer, since = self._asked.get(call, (None, 0.0))
            if answer is not None and ray.wait([answer], timeout=0)[0]:
                try:
                    self._progress[item] = ray.get(answer)
                except RayError:
                    self._progress.pop(item, None)  # the actor has died: whoever takes the item begins it anew
            elif answer is not None:
                if time.monotonic() - since < SILENT_SECONDS:
                    continue
                tqdm.write(f"warning: {item}: its worker has not answered for {SILENT_SECONDS:.0f} s", file=sys.stderr)
                silent.add(actor)
            self._asked[call] = (actor.progress.remote(item), time.monotonic())
        for actor in silent & self._up.keys():
            self._kill(actor)


def process_id() -> str:
    """Tells the process of an actor from the one that Ray starts in its place."""
    return ray.get_runtime_context().get_worker_id()


def _last_line(error: RayError) -> str:
    """What went wrong, without the stack trace of another process."""
    return str(error).strip().splitlines()[-1].strip()
