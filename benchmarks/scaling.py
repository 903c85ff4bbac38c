"""How busy one driver keeps many actors, and what Ray costs the search.

    python benchmarks/scaling.py                                    64 simulated actors, 256 of them, and the search
    python benchmarks/scaling.py --actors 256 --seconds 20          only those simulated actors, at 20 s a shard
    python benchmarks/scaling.py --search --images 16 --rounds 3    only the search, through Ray and in-process

A simulated actor sleeps for as long as a real shard takes, give or take a fifth, tells its progress, and writes a real
table of 1,000 images; driver, pool, meter, reports and files are those of jobs/search.py. Several actors share a
process, which is all the same to the driver: it sees as many calls. Busy is the mean share of actors that have a shard,
from the moment when all of them have one until there is none left to hand out.

The search runs on the same cores by turns: in this process, and by an actor of a local Ray. Its first shard warms up
and does not count. The exit status is 1 where a figure misses the goal printed beside it.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is no installed package
from benchmarks.corpus import GRID, KEEP_RATES, drawn, uri
from cluster.actor import Shared
from cluster.places import Machines, connected
from cluster.pool import Pool
from cluster.rank import SearchSummary, work_through
from cluster.ranking_actor import Plan, RankingActor
from patchrank import assets
from patchrank.data.images import MAX_PIXELS
from patchrank.data.progress import Progress, ShardReport
from patchrank.data.shard_job import Reading
from patchrank.errors import run
from patchrank.model import loading
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import Searcher
from patchrank.store import rankings
from patchrank.store.folder import Folder

BUSY, THROUGHPUT = 0.97, 0.95  # the goals
SHARDS_AN_ACTOR = 4
IMAGES = 1000  # a shard


@dataclass(frozen=True)
class Sleep:
    """What a simulated actor must know, in the place of a `Plan`."""

    folder: Folder
    seconds: float
    table: Any


class Sleeper:
    """Simulated actors: as many as its process has threads. Imports no torch, as there are many of them."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}

    def ready(self, shared: None) -> str:
        """Returns once the process is up."""
        from cluster.pool import process_id

        return process_id()

    @ray.method(concurrency_group="progress")
    def progress(self, shard: str) -> Any:
        """How far a shard in work is."""
        return self._progress.get(shard, Progress())

    def rank(self, shared: None, shard: str, plan: Sleep) -> Any:
        """Sleep for a shard, and write its table."""
        from patchrank.store import rankings

        start = time.monotonic()
        progress = self._progress[shard] = Progress(cosine=[0.0] * len(plan.table["pruned"][0]))
        spread = 0.8 + 0.4 * (zlib.crc32(shard.encode()) % 101 / 100)
        while (left := start + plan.seconds * spread - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            progress.images = min(len(plan.table), int(len(plan.table) * (time.monotonic() - start) / plan.seconds))
        progress.images = len(plan.table)
        size = plan.folder.write(shard, plan.table, encode=rankings.encode)
        del self._progress[shard]
        # Start and end, from which the driver tells how many were at work when, in place of the peak memory.
        return ShardReport(progress, None, size, 0, f"{start} {time.monotonic()}")


class Lane:
    """One of the simulated actors of a process, with the methods that a `Pool` calls."""

    def __init__(self, host: Any) -> None:
        self.ready, self.progress, self.rank = host.ready, host.progress, host.rank


class Simulation(Pool):
    """A pool of simulated actors, several a process."""

    def __init__(self, actors: int, processes: int) -> None:
        lanes = -(-actors // processes)
        remote = ray.remote(num_cpus=0, max_concurrency=lanes, concurrency_groups={"progress": 1})(Sleeper)
        self._hosts = [remote.remote() for _ in range(processes)]
        super().__init__(Sleeper, None, actors, cpus=0, gpus=0)

    def _grow(self, size: int) -> None:
        for number in range(self._size, size):
            self._size += 1
            self._start(Lane(self._hosts[number % len(self._hosts)]))


@dataclass
class Driver:
    """Samples of what the driver takes: when, its processor seconds and its memory in bytes."""

    samples: list[tuple[float, float, int]] = field(default_factory=list)

    def sample(self) -> None:
        """Take one."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        with open("/proc/self/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.samples.append((time.monotonic(), usage.ru_utime + usage.ru_stime, memory))

    def share(self, start: float, end: float) -> float:
        """Of one core, between two moments."""
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    def memory(self, moment: float) -> int:
        """At a moment, or soon before."""
        return [memory for when, _, memory in self.samples if when <= moment][-1]


def simulate(actors: int, seconds: float, processes: int) -> bool:
    """Print how busy the driver keeps simulated actors; whether that is busy enough."""
    driver, done = Driver(), threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            driver.sample()

    uris = [uri(shard) for shard in range(actors * SHARDS_AN_ACTOR)]
    with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
        folder = Folder(scratch).prepare({"grid": list(GRID), "keep_rates": list(KEEP_RATES)})
        with connected(Machines("local", gpus_per_actor=0), len(uris)):
            summary = SearchSummary(folder.uri, len(uris), 0)
            pool = Simulation(actors, processes)
            plan: Any = Sleep(folder, seconds, drawn(0, IMAGES))
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                work_through(pool, "rank", folder, ray.put(plan), uris, summary)
            finally:
                done.set()
                watcher.join()
        written = len(folder.finished(uris))
    times = [tuple(map(float, report.process.split())) for report in summary.reports.values()]
    full, empty = sorted(start for start, _ in times)[actors - 1], max(start for start, _ in times)
    at_work = sum(max(0.0, min(end, empty) - max(start, full)) for start, end in times)
    busy = at_work / (actors * (empty - full))
    middle = (full + empty) / 2
    halves = [driver.share(full, middle), driver.share(middle, empty)]
    memory = [driver.memory(moment) / 1e6 for moment in (full, middle, empty)]
    print(f"{actors} actors, {len(uris)} shards of {seconds:.0f} s, {written} tables written")
    print(f"busy                  {busy:.2%} in {empty - full:.0f} s (goal {BUSY:.0%})")
    print(f"driver, first half    {halves[0]:.1%} of a core, from {memory[0]:.0f} to {memory[1]:.0f} MB")
    print(f"driver, second half   {halves[1]:.1%} of a core, from {memory[1]:.0f} to {memory[2]:.0f} MB", flush=True)
    return busy >= BUSY and written == len(uris)


def compare(images: int, rounds: int) -> bool:
    """Print the search's pace through Ray and in-process on the same cores; whether Ray keeps enough of it."""
    cores, gpu = len(os.sched_getaffinity(0)), torch.cuda.is_available()
    torch.set_num_threads(cores)
    model = loading.load(assets.MODEL)
    tower = Tower(model.visual, dtype=loading.resolve_dtype("auto", gpu), device="cuda" if gpu else "cpu")
    config, batch = SearchConfig(), 64 if gpu else 4
    settings = {"grid": list(tower.grid), "keep_rates": list(KEEP_RATES)}
    uris = assets.TRAIN_SHARDS

    def in_process(scratch: str) -> float:
        folder = Folder(scratch).prepare(settings)
        ranker = ShardRanker(Searcher(tower, config, keep_rates=KEEP_RATES), Reading(model.preprocess(), batch, images))
        ends = []
        for shard in uris:
            ranked = ranker.rank(shard)
            folder.write(shard, ranked.table, ranked.rejects, encode=rankings.encode)
            ends.append(time.perf_counter())
        return images * (len(uris) - 1) / (ends[-1] - ends[0])

    def through_ray(scratch: str) -> float:
        folder = Folder(scratch).prepare(settings)
        plan = Plan(folder, config, KEEP_RATES, None, 100.0, batch, None, images)
        with connected(Machines("local", 1, cores, 1 if gpu else 0), len(uris)) as places:
            shared = Shared(ray.put(copy.deepcopy(tower).to("cpu")), ray.put(model.preprocess()), places, MAX_PIXELS)
            pool = Pool(RankingActor, shared, 1, places.cpus, places.gpus)
            ends = []
            for _, report in pool.run("rank", uris, ray.put(plan)):
                assert isinstance(report, ShardReport) and report.progress.images == images, report
                ends.append(time.perf_counter())
        return images * (len(uris) - 1) / (ends[-1] - ends[0])

    paces: dict[str, list[float]] = {"in-process": [], "through Ray": []}
    for _ in range(rounds):
        for name, measure in (("in-process", in_process), ("through Ray", through_ray)):
            with tempfile.TemporaryDirectory(prefix="patchrank-") as folder:
                paces[name].append(measure(folder))
    ratio = statistics.median(b / a for a, b in zip(*paces.values(), strict=True))
    where = torch.cuda.get_device_name() if gpu else f"{cores} cores"
    print(f"search of the embedded model on {where}, {rounds} rounds of {images * (len(uris) - 1)} images")
    for name, values in paces.items():
        print(f"{name:<22}{statistics.median(values):.3f} images/s")
    print(f"share kept            {ratio:.1%} (goal {THROUGHPUT:.0%})")
    return ratio >= THROUGHPUT


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", help="simulated actors, one run each (64 256)")
    parser.add_argument("--seconds", type=float, default=20.0, help="a shard takes (%(default)s)")
    parser.add_argument("--processes", type=int, default=16, help="that simulated actors share (%(default)s)")
    parser.add_argument("--search", action="store_true", help="compare the search through Ray and in-process")
    parser.add_argument("--images", type=int, default=16, help="of each shard of that search (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of that search (%(default)s)")
    args = parser.parse_args()
    both = not args.actors and not args.search
    good = [simulate(actors, args.seconds, args.processes) for actors in args.actors or ([64, 256] if both else [])]
    if args.search or both:
        good.append(compare(args.images, args.rounds))
    return 0 if all(good) else 1


if __name__ == "__main__":
    run(main)
