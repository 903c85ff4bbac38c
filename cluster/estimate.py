"""What a search, or another job over shards, will cost, told before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import ray

from cluster.actor import ShardCost, Shared
from cluster.places import Places, connected
from cluster.pool import Failed, Pool
from cluster.rank import SearchJob, bank_of, plan_of, settings
from cluster.ranking_actor import RankingActor
from patchrank.data import shards
from patchrank.errors import UserError
from patchrank.model import loading
from patchrank.model.class_source import FoundClasses
from patchrank.model.tower import Tower
from patchrank.search.estimate import bytes_per_image, multiply_adds
from patchrank.search.objective import SCORES
from patchrank.search.searcher import Searcher
from patchrank.store import storage
from patchrank.store.folder import Folder

SECONDS = 5.0  # of timing an actor
SAMPLED_SHARDS = 8


@dataclass(frozen=True)
class Estimate:
    """The cost of a job.

    Attributes:
        shards, finished: of the job, and of these those that have their rankings.
        images: that are left to do, from the mean of `sampled` shards.
        sampled: how many shards were counted.
        candidates, multiply_adds: an image; no candidates where nothing is searched.
        image_seconds: of one actor.
        places: the actors that there is room for.
        seconds: until the last shard is done.
        device_hours: of all actors together.
        bytes: of Parquet.
        memory, gpu_memory: peak of an actor, in bytes.
    """

    shards: int
    finished: int
    images: int
    sampled: int
    candidates: int
    multiply_adds: int
    image_seconds: float
    places: Places
    seconds: float
    device_hours: float
    bytes: int
    memory: int
    gpu_memory: int


def estimate(job: SearchJob) -> Estimate:
    """Time the search on the actors that will run it, on images of the job, all at once; nothing is written.

    The timing leaves out class probabilities, and reading and decoding, which go on beside a GPU's work.

    Raises:
        UserError: bad input, a folder of another search, or a sampled shard that cannot be read.
    """
    uris = shards.expand(job.shards)
    model = job.model.load()
    folder = Folder(job.out)
    compared = bank_of(job, model, folder, uris)
    with storage.one_line_errors(folder.uri):
        found = folder.read()
        done = folder.finished(uris) if found else set()
    todo = [uri for uri in uris if uri not in done]
    with connected(job.machines, len(uris)) as places:
        tower = Tower(model.visual, job.model.cut, loading.resolve_dtype(job.model.dtype, places.gpu), name=model.name)
        if found:  # classes apart, which would take time to make
            there = found["settings"] | {"classes": None}
            folder.check_same(there, settings(job, model, tower, FoundClasses(), compared))
        # Class embeddings and banks would take time to make.
        config = job.config if SCORES[job.config.score].patches else replace(job.config, score="preservation")
        searcher = Searcher(tower, config, keep_rates=job.keep_rates)
        actors = min(places.actors, len(todo))
        shared = Shared(ray.put(tower), ray.put(model.preprocess()), places, job.max_pixels)
        plan = replace(plan_of(job, folder, model, places), config=config)
        timings = []
        if todo:
            pool = Pool(RankingActor, shared, actors, places.cpus, places.gpus, (), places.room)
            timings = measured(pool, todo, plan)
    candidates = sum(step.candidates for step in config.cost(tower.grid))
    size = bytes_per_image(tower.num_tokens, job.keep_rates)
    return summed(timings, places, len(uris), len(todo), (candidates, multiply_adds(searcher), size))


def measured(pool: Pool, todo: list[str], plan: Any) -> list[ShardCost]:
    """What the pool's actors find out of some of the shards. Raises UserError for one that cannot be read."""
    timings = []
    sample = todo[:: math.ceil(len(todo) / SAMPLED_SHARDS)]
    for uri, timing in pool.run("estimate", sample, ray.put(plan), SECONDS):
        if isinstance(timing, Failed):
            raise UserError(f"{uri}: {timing.reason}")
        timings.append(timing)
    return timings


def summed(
    timings: list[ShardCost], places: Places, all_shards: int, todo: int, image: tuple[int, int, float]
) -> Estimate:
    """The cost of a job from that of some of its shards; `image`: candidates, multiply-adds and bytes of one."""
    samples = sum(timing.samples for timing in timings) / max(1, len(timings))  # of a shard
    seconds = sum(timing.seconds for timing in timings) / max(1, len(timings))  # of an image
    images = round(samples * todo)
    candidates, multiply_adds, size = image
    return Estimate(
        shards=all_shards,
        finished=all_shards - todo,
        images=images,
        sampled=len(timings),
        candidates=candidates,
        multiply_adds=multiply_adds,
        image_seconds=seconds,
        places=places,
        # Shards are not split: the last actors to finish have as many as anyone.
        seconds=math.ceil(todo / max(1, min(places.actors, todo))) * samples * seconds,
        device_hours=images * seconds / 3600,
        bytes=round(images * size),
        memory=max((timing.memory for timing in timings), default=0),
        gpu_memory=max((timing.gpu_memory for timing in timings), default=0),
    )
