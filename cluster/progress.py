"""How far a search is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from patchrank.ranker import Progress

LOG_SECONDS = 30.0


class Meter:
    """Shows images, rates, shards, rejects and the time left.

    The number of images of a shard is not known before it has been read, so the whole is estimated from the mean of the
    shards that this run has finished; until the first one has, there is no time left to tell.

    Args:
        title: what is being done.
        shards: of the whole job.
        finished: of these, by earlier runs.
    """

    def __init__(self, title: str, shards: int, finished: int = 0) -> None:
        self._title, self._shards, self._resumed = title, shards, finished
        self._done = Progress()
        self._done_shards = 0
        self._start = self._logged = time.monotonic()
        self._bar = tqdm(desc=title, unit=" images", dynamic_ncols=True) if sys.stderr.isatty() else None

    def add(self, progress: Progress) -> None:
        """Count a finished shard."""
        self._done_shards += 1
        self._done = _sum([self._done, progress])

    def show(self, current: Sequence[Progress], actors: int) -> None:
        """Show where things stand; `current` is of the shards in work."""
        now = _sum([self._done, *current])
        seconds = time.monotonic() - self._start
        total = None
        if self._done_shards:
            total = round(self._done.images / self._done_shards * (self._shards - self._resumed))
        shards = f"shards {self._resumed + self._done_shards}/{self._shards}"
        rest = f"{now.candidates / seconds:.0f} candidates/s, " if now.candidates else ""
        rest += f"{now.rejects} rejects, {actors} actors"
        if self._bar is not None:
            self._bar.total = max(total, now.images) if total is not None else None
            self._bar.n = now.images
            self._bar.set_postfix_str(f"{shards}, {rest}")
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            left = "?"
            if total is not None and now.images:
                left = tqdm.format_interval(max(0, total - now.images) * seconds / now.images)
            images = f"{now.images} images, {now.images / seconds:.2f} images/s"
            print(f"{self._title}: {shards}, {images}, {rest}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()


def _sum(parts: Sequence[Progress]) -> Progress:
    return Progress(
        images=sum(part.images for part in parts),
        rejects=sum(part.rejects for part in parts),
        candidates=sum(part.candidates for part in parts),
    )
