"""What the actors do, as Ray metrics: Prometheus collects them from every node, Ray's dashboard shows them by Grafana.

ray_patchrank_images_total           images ranked or evaluated; twice where an actor died half-way
ray_patchrank_candidates_total       candidates scored
ray_patchrank_rejects_total          samples that could not be used
ray_patchrank_seconds_total          seconds by stage, the label `Stage`: read, decode, search or evaluate, write
"""

from __future__ import annotations

import functools
import threading

from ray.util.metrics import Counter

from patchrank.data.progress import Progress

_COUNTS = {
    "images": "Images ranked or evaluated.",
    "candidates": "Candidates scored.",
    "rejects": "Samples that could not be used.",
}


class Metrics:
    """Adds the progress of one shard to the counters of this process. Can be called from several threads."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()

    def tell(self) -> None:
        """Count what has been done since the last call."""
        with self._lock:
            for name in _COUNTS:
                self._add(name, getattr(self._progress, name), {})
            for stage, seconds in self._progress.seconds.items():
                self._add("seconds", seconds, {"Stage": stage})

    def _add(self, name: str, now: float, tags: dict[str, str]) -> None:
        place = " ".join([name, *tags.values()])
        if now > self._told.get(place, 0):  # Ray's counters take nothing but more
            _counter(name).inc(now - self._told.get(place, 0), tags)
            self._told[place] = now


@functools.cache
def _counter(name: str) -> Counter:
    if name in _COUNTS:
        return Counter(f"patchrank_{name}", description=_COUNTS[name])
    return Counter("patchrank_seconds", description="Seconds by stage.", tag_keys=("Stage",))
