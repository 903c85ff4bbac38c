"""What has been done of a shard so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

STAGES = ("read", "decode", "search", "write")


@dataclass
class Progress:
    """What has been done of a shard so far.

    Attributes:
        images, rejects, candidates: how many.
        cosine: the sums of the pruned images' cosines, one a keep rate.
        seconds: that each of `STAGES` took; decoding, on threads beside the search, in processor seconds.
    """

    images: int = 0
    rejects: int = 0
    candidates: int = 0
    cosine: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of the `with` statement to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
