"""What has been done of a shard, so far and in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Progress:
    """What has been done of a shard so far.

    Attributes:
        images, rejects, candidates: how many.
        kept: images that an earlier try has done, which are not among `images`.
        cosine: the sums of the pruned images' cosines, one a keep rate.
        seconds: that each stage took; none before `begin`. Decoding, on threads beside the work, in processor seconds.
    """

    images: int = 0
    rejects: int = 0
    candidates: int = 0
    kept: int = 0
    cosine: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Images that are done, whoever did them."""
        return self.images + self.kept

    def begin(self, work: str) -> None:
        """Name the work between decoding and writing: "search", "evaluate" or "embed"."""
        # All stages at once, for other threads that read the progress: a dict must not grow meanwhile.
        self.seconds = dict.fromkeys(("read", "decode", work, "write"), 0.0)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of the `with` statement to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True)
class ShardReport:
    """What an actor says of a shard that it has finished.

    Attributes:
        progress: images, rejects, candidates.
        error: why the shard could not be read to its end, or None.
        bytes: of the table on disk.
        memory: peak memory of the actor's process so far, in bytes.
        process: which process that was, on which machine.
    """

    progress: Progress
    error: str | None
    bytes: int
    memory: int
    process: str
