"""How far a job over shards is: a bar on a terminal, a log line now and then elsewhere, and a report in its folder."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from patchrank.data.progress import Progress
from patchrank.store import status
from patchrank.store.status import Run

LOG_SECONDS = 30.0
RATE_SECONDS = 600.0  # over which the pace is measured: machines come and go


class Meter:
    """Shows images, rates, shards, rejects and the time left.

    The number of images of a shard is not known before it has been read, so the whole is estimated from the mean of the
    shards that this run has finished; until the first one has, there is no time left to tell, unless there is a limit.

    Args:
        title: what is being done.
        shards: of the whole job.
        folder: where `patchrank.store.status` finds the reports.
        finished: of these, by earlier runs.
        limit: images of a shard at most, which is what a shard is taken to have until one has been read.
    """

    def __init__(self, title: str, shards: int, folder: str, finished: int = 0, limit: int | None = None) -> None:
        self._title, self._shards, self._folder, self._resumed = title, shards, folder, finished
        self._limit = limit
        self._done = Progress()
        self._done_shards = self._failed_shards = 0
        self._start = self._logged = time.monotonic()
        self._paces = deque([(self._start, 0, 0)])  # when, images, candidates
        self._reported = -math.inf
        self._report: threading.Thread | None = None
        self._run = Run(title, started=time.time(), updated=time.time())
        self._bar = tqdm(desc=title, unit=" images", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.show({}, 0)

    def add(self, progress: Progress) -> None:
        """Count a finished shard."""
        self._done_shards += 1
        self._done = _sum([self._done, progress])

    def fail(self) -> None:
        """Count a shard that came to nothing."""
        self._failed_shards += 1

    def show(self, current: Mapping[str, Progress | None], actors: int) -> None:
        """Show where things stand; `current` is of the shards in work, None where nothing has been heard yet."""
        now = _sum([self._done, *(progress for progress in current.values() if progress)])
        images_a_second, candidates_a_second = self._pace(now)
        each = self._done.done / self._done_shards if self._done_shards else self._limit  # images a shard
        total = None if each is None else round(each * (self._shards - self._resumed - self._failed_shards))
        left = None if total is None or not images_a_second else max(0, total - now.done) / images_a_second
        self._run.updated, self._run.actors = time.time(), actors
        self._run.images, self._run.rejects, self._run.candidates = now.images, now.rejects, now.candidates
        self._run.images_per_second, self._run.seconds_left = images_a_second or None, left
        self._run.stages = {stage: round(seconds, 1) for stage, seconds in now.seconds.items()}
        self._run.running = {shard: progress.done if progress else 0 for shard, progress in current.items()}
        self._say()

        shards = f"shards {self._resumed + self._done_shards}/{self._shards}"
        rest = f"{candidates_a_second:.0f} candidates/s, " if now.candidates else ""
        rest += f"{now.rejects} rejects, {actors} actors"
        if self._bar is not None:
            self._bar.total = max(total, now.done) if total is not None else None
            self._bar.n = now.done
            self._bar.set_postfix_str(f"{shards}, {rest}")
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            images = f"{now.images} images, {images_a_second:.2f} images/s"
            ends = "?" if left is None else tqdm.format_interval(left)
            print(f"{self._title}: {shards}, {images}, {rest}, {ends} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line, and say that this run has ended."""
        if self._bar is not None:
            self._bar.close()
        if self._report is not None:
            self._report.join()
        self._run.updated, self._run.ended = time.time(), True
        self._write()

    def _pace(self, now: Progress) -> tuple[float, float]:
        """Images and candidates a second, of late."""
        moment = time.monotonic()
        while len(self._paces) > 1 and moment - self._paces[1][0] >= RATE_SECONDS:
            self._paces.popleft()
        if moment - self._paces[-1][0] >= RATE_SECONDS / 100:
            self._paces.append((moment, now.images, now.candidates))
        then, images, candidates = self._paces[0]
        seconds = max(moment - then, 1e-9)
        # A shard whose actor died begins anew, and its images with it.
        return max(0, now.images - images) / seconds, max(0, now.candidates - candidates) / seconds

    def _say(self) -> None:
        """Write a report, now and then, without waiting for it: a bucket that is slow must not keep actors idle."""
        waited = time.monotonic() - self._reported
        if waited >= status.REPORT_SECONDS and not (self._report and self._report.is_alive()):
            self._reported = time.monotonic()
            self._report = threading.Thread(target=self._write, daemon=True)
            self._report.start()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a report is no reason to end a search; whatever is wrong, its tables meet
            status.write_run(self._folder, self._run)


def _sum(parts: Sequence[Progress]) -> Progress:
    stages = dict.fromkeys(stage for part in parts for stage in part.seconds)  # a set that keeps the order
    return Progress(
        images=sum(part.images for part in parts),
        rejects=sum(part.rejects for part in parts),
        candidates=sum(part.candidates for part in parts),
        kept=sum(part.kept for part in parts),
        seconds={stage: sum(part.seconds.get(stage, 0.0) for part in parts) for stage in stages},
    )
