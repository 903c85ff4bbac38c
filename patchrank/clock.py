"""How long work on a device takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, to the end of what it starts on the device; what was started before does not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def processor_seconds(call: Callable[[], object], device: torch.device) -> float:
    """As `seconds`, but of the processor, whose threads are summed: without the time that others have it."""
    start = time.process_time()
    call()
    return time.process_time() - start
