"""Where actors run: the connection to Ray, how many actors it has room for, and what each of them takes."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
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

    def __str__(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus:g} GPUs"

    @property
    def gpu(self) -> bool:
        """Whether actors work on GPUs."""
        return self.gpus > 0


@contextlib.contextmanager
def connected(
    address: str | None, actors: int | None, cpus: int | None, gpus: float | None, shards: int
) -> Iterator[Places]:
    """Connect to Ray: a local Ray of our own, or the cluster at an address.

    Args:
        address: "auto", HOST:PORT or ray://HOST:PORT; where None that in RAY_ADDRESS, which `ray job submit` sets.
            Without either, or with "local", a Ray is started here, and ends with us.
        actors: how many are wanted; as many as there is room for where None.
        cpus: cores of an actor; where None 1 beside a GPU, else the cores are shared out among the shards.
        gpus: GPUs of an actor; where None 1 if the cluster has any.
        shards: of the whole job.

    Raises:
        UserError: no Ray at the address, or no node on which such an actor could run.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _connect(address, (actors or 1) * (cpus or 1) if actors or cpus else None)
    try:
        places, room = _places(actors, cpus, gpus, shards)
        if not room and address == "local":
            raise UserError(f"no room on this machine for an actor of {places}")
        if not room:
            print(f"warning: no node has room for an actor of {places}; waiting until one joins", file=sys.stderr)
        yield places
    finally:
        ray.shutdown()


def _connect(address: str, cores_wanted: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray counts the cores that this process may use; a wish for more actors than cores is granted.
        cores = None if cores_wanted is None else max(os.cpu_count() or 1, cores_wanted)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, SystemExit) as error:  # Ray exits where a cluster has died
        reason = one_line(error) if isinstance(error, Exception) else "it does not answer"
        raise UserError(f"--address {address}: no Ray to join there ({reason})") from None


def _places(actors: int | None, cpus: int | None, gpus: float | None, shards: int) -> tuple[Places, bool]:
    """What the cluster has room for now, and whether there is any node for such an actor at all."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = int(sum(node.get("CPU", 0) for node in nodes))
    devices = sum(node.get("GPU", 0) for node in nodes)
    if gpus is None:
        gpus = 1.0 if devices else 0.0
    if gpus:
        places = Places(actors or max(1, int(devices / gpus)), cpus or 1, gpus)
    else:
        if cpus is None:  # few shards get more cores each, the same in a run that goes on: it has as many shards
            largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
            cpus = max(1, min(largest, cores // max(shards, actors or 1)))
        places = Places(actors or max(1, cores // cpus), cpus, gpus)
    room = any(node.get("CPU", 0) >= places.cpus and node.get("GPU", 0) >= places.gpus for node in nodes)
    return places, room
