"""Where actors run: the connection to Ray, how many actors it has room for, and what each of them takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from patchrank.errors import UserError
from patchrank.storage import one_line


@dataclass(frozen=True)
class Places:
    """Where actors can go: how many of them, and what each takes."""

    actors: int
    cpus: int
    gpus: float

    @property
    def gpu(self) -> bool:
        """Whether actors work on GPUs."""
        return self.gpus > 0


@contextlib.contextmanager
def connected(
    address: str | None, actors: int | None, cpus: int | None, gpus: float | None, shards: int
) -> Iterator[Places]:
    """Connect to Ray: the address given, else the cluster that this machine is part of, else a local Ray of our own.

    Args:
        address: as `ray.init` takes it; "local" is a Ray of our own in any case.
        actors: how many are wanted; as many as there is room for where None.
        cpus: cores of an actor; where None 1 beside a GPU, else the cores are shared out among the shards.
        gpus: GPUs of an actor; where None 1 if the cluster has any.
        shards: of the whole job.

    Raises:
        UserError: no Ray at the address.
    """
    _connect(address, (actors or 1) * (cpus or 1))
    try:
        yield _places(actors, cpus, gpus, shards)
    finally:
        ray.shutdown()


def _connect(address: str | None, cores_wanted: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address != "local":
        try:
            ray.init(address=address or "auto", **quiet)
            return
        except ConnectionError as error:
            if address:
                raise UserError(f"--address {address}: no Ray there ({one_line(error)})") from None
    cores = max(os.cpu_count() or 1, cores_wanted)
    ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)


def _places(actors: int | None, cpus: int | None, gpus: float | None, shards: int) -> Places:
    resources = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if resources.get("GPU") else 0.0
    if gpus:
        return Places(actors or max(1, int(resources.get("GPU", 0) / gpus)), cpus or 1, gpus)
    cores = int(resources.get("CPU", 1))
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
    if cpus is None:  # few shards get more cores each; a run that goes on has as many shards, and so as many threads
        cpus = max(1, min(largest, cores // shards))
    return Places(actors or max(1, cores // cpus), cpus, gpus)
