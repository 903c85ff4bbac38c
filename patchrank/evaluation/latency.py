"""How long image towers take, pruned and not, side by side."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchrank import clock
from patchrank.errors import UserError
from patchrank.flags import flag


@dataclass(frozen=True)
class Timing:
    """What is timed, and for how long. Raises UserError for what makes no sense."""

    batch_sizes: Sequence[int] = flag((1, 8, 64), "to time (%(default)s)", nargs="*")  # none skips it
    keep_rates: Sequence[float] = flag((0.6, 0.5), "(%(default)s)", name="timed-keep-rates")
    seconds: float = flag(5.0, "a batch size, at least (%(default)s)", name="timed-seconds")

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.batch_sizes):
            raise UserError(f"--batch-sizes {min(self.batch_sizes)}: must be at least 1")


@dataclass(frozen=True)
class Timed:
    """How long one tower takes for one batch size.

    Attributes:
        name: of the tower.
        batch: images.
        seconds: a batch, the median of the rounds.
        speedup: unpruned seconds / its own, the median of the ratios of the rounds.
        rounds: how many.
    """

    name: str
    batch: int
    seconds: float
    speedup: float
    rounds: int


@torch.no_grad()
def measure(
    towers: Mapping[str, nn.Module],
    images: Tensor,
    seconds: float = 5.0,
    least: int = 3,
    most: int = 50,
    timed: Callable[[Callable[[], object], torch.device], float] = clock.seconds,
) -> list[Timed]:
    """Time towers in turn, again and again, so that what else the machine does meets all of them alike.

    Args:
        towers: by name; the first is what the others are compared with. All on the device of the images.
        images: (B, 3, H, W), in the towers' dtype.
        seconds: about how long to go on for.
        least, most: rounds.
        timed: tells how long a function takes on a device.
    """
    taken: dict[str, list[float]] = {name: [] for name in towers}
    for tower in towers.values():
        tower(images)  # to warm up
    start = time.perf_counter()
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
        for name, tower in towers.items():
            taken[name].append(timed(functools.partial(tower, images), images.device))
        rounds += 1
    whole = next(iter(taken.values()))
    result = []
    for name, times in taken.items():
        speedup = statistics.median(full / own for full, own in zip(whole, times, strict=True))
        result.append(Timed(name, len(images), statistics.median(times), speedup, rounds))
    return result


def device_name(device: torch.device, threads: int) -> str:
    """What a latency was measured on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {threads} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
