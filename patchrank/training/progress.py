"""How far a training is: told by its workers to an actor, shown as a bar on a terminal, as a log line elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

from tqdm import tqdm

from patchrank.data.meter import LOG_SECONDS


@dataclass(frozen=True)
class State:
    """What the workers last said.

    Attributes:
        began: the step at which this run began; None until its workers are up.
        step: steps done.
        loss: of the last step; None before the first.
        learning_rate: of the last step.
        failure: why the training cannot go on, or None.
    """

    began: int | None = None
    step: int = 0
    loss: float | None = None
    learning_rate: float = 0.0
    failure: str | None = None


class Board:
    """The actor that rank 0 tells how far it is, and any rank why it fails; the driver asks it."""

    def __init__(self) -> None:
        self._state = State()

    def begin(self, step: int) -> None:
        """Take in where the workers begin. Others may replace them later; the run began with the first."""
        began = self._state.began if self._state.began is not None else step
        self._state = replace(self._state, began=began, step=step)

    def post(self, step: int, loss: float, learning_rate: float) -> None:
        """Take in how far rank 0 is."""
        self._state = replace(self._state, step=step, loss=loss, learning_rate=learning_rate)

    def fail(self, reason: str) -> None:
        """Take in a failure that trying again would not mend; the first one counts, others follow from it."""
        if self._state.failure is None:
            self._state = replace(self._state, failure=reason)

    def read(self) -> State:
        """What the workers last said."""
        return self._state


class StepMeter:
    """Shows steps, loss, learning rate and the time left; `steps` is how many the whole training has."""

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps = title, steps
        self._first: tuple[int, float] | None = None  # the step at which this run was first seen to move, and when
        self._logged = time.monotonic()
        self._bar = tqdm(desc=title, total=steps, unit=" steps", dynamic_ncols=True) if sys.stderr.isatty() else None

    def show(self, state: State) -> None:
        """Show where things stand."""
        now = time.monotonic()
        rest = "starting" if state.began is None else "first figures"
        if state.loss is not None:
            rest = f"loss {state.loss:.4f}, learning rate {state.learning_rate:.2g}"
            if self._first is None:
                self._first = state.step, now
                if self._bar is not None:
                    self._bar.initial = state.step
                    self._bar.unpause()  # the time it took to start says nothing of the time left
        if self._bar is not None:
            self._bar.n = state.step
            self._bar.set_postfix_str(rest)
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            left = "?"
            if self._first and state.step > self._first[0]:
                left = tqdm.format_interval(
                    (self._steps - state.step) * (now - self._first[1]) / (state.step - self._first[0])
                )
            print(f"{self._title}: step {state.step}/{self._steps}, {rest}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()
