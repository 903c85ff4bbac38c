"""Where actors run: the connection to Ray, how many actors it has room for, and what each of them takes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import torch
from ray._private import ray_constants

from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.store.storage import one_line


@dataclass(frozen=True)
class Machines:
    """Which Ray to work on and with how many actors, as far as users say. Raises UserError for what makes no sense.

    Attributes:
        address: "auto", HOST:PORT or ray://HOST:PORT; where None that in RAY_ADDRESS, which `ray job submit` sets.
            Without either, or with "local", a Ray is started here, and ends with us.
        actors: how many are wanted; as many as there is room for where None.
        cpus_per_actor: where None 1 beside a GPU, else the cores are shared out.
        gpus_per_actor: where None 1 if the cluster has any, which nobody knows before a machine of it is up.
    """

    address: str | None = flag(None, "Ray cluster to join: auto or HOST:PORT (RAY_ADDRESS, else a local Ray)")
    actors: int | None = flag(None, "actors to start (one a GPU, or as many as the cores allow)")
    cpus_per_actor: int | None = flag(None, "cores of an actor")
    gpus_per_actor: float | None = flag(None, "GPUs of an actor, 0 for none (1 if the cluster has any)")

    def __post_init__(self) -> None:
        at_least(self, 1, "actors", "cpus_per_actor")
        gpus = self.gpus_per_actor
        if gpus and not 0.0001 <= gpus <= 1:  # Ray knows no smaller part
            raise UserError(f"--gpus-per-actor {gpus}: must be 0, or 0.0001 to 1: an actor works on one GPU")


@dataclass(frozen=True)
class Places:
    """Where actors can go: how many of them, what each takes, and whether so many were asked for."""

    actors: int
    cpus: int
    gpus: float
    fixed: bool = False

    def __str__(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus:g} GPUs"

    @property
    def gpu(self) -> bool:
        """Whether actors work on GPUs."""
        return self.gpus > 0

    @property
    def threads(self) -> int:
        """That decode images for an actor. Beside a GPU, which is busier than they are, more than it has cores."""
        return max(self.cpus, 4 if self.gpu else 2)

    def peak_bytes(self) -> tuple[int, int]:
        """The most memory that this process, which works in such a place, has taken, and of its GPU."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return memory, torch.cuda.max_memory_allocated() if self.gpu else 0

    def room(self) -> int:
        """How many actors there is room for by now, with the nodes that have joined; as many as were asked for."""
        return self.actors if self.fixed else sum(_fit(node, self.cpus, self.gpus) for node in alive())


@contextlib.contextmanager
def connected(machines: Machines, shards: int = 1, *, together: bool = False) -> Iterator[Places]:
    """Connect to Ray: a local Ray of our own, or the cluster at an address.

    Args:
        shards: of the whole job, among which the cores are shared out.
        together: all actors work on one thing, and none begins without the others. Then the cores are shared out among
            the machines where neither actors nor their cores are given.

    Raises:
        UserError: no Ray at the address, none that can be started, no machine up that tells whether there are GPUs, or
            no room in our own for such an actor, or for all of them where they work together.
    """
    address = machines.address or os.environ.get("RAY_ADDRESS") or "local"
    actors, cpus = machines.actors, machines.cpus_per_actor
    connect(address, (actors or 1) * (cpus or 1) if actors or cpus else None)
    try:
        places, room = share_out(machines, shards, together)
        needed = places.actors if together else 1
        wanted = f"{needed} actors, each of {places}" if needed > 1 else f"an actor of {places}"
        found = f", only for {room}" if room else ""
        if room < needed and address == "local":
            raise UserError(f"no room on this machine for {wanted}{found}")
        if room < needed:
            print(f"warning: the cluster has no room for {wanted}{found}; waiting until it has", file=sys.stderr)
        yield places
    finally:
        ray.shutdown()


def connect(address: str, cores_wanted: int | None) -> None:
    """Connect to Ray, to a local one with so many cores at least. Raises UserError where that cannot be."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray counts the cores that this process may use; a wish for more actors than cores is granted.
        cores = None if cores_wanted is None else max(os.cpu_count() or 1, cores_wanted)
        # Ray would listen on all interfaces; where it is never a cluster, as on macOS, it uses the loopback one alone.
        several, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
        try:
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        except Exception as error:  # a bare one where the machine is too busy for Ray to start in time
            raise UserError(f"no Ray could be started on this machine: {one_line(error)}") from None
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = several
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, SystemExit) as error:  # Ray exits where a cluster has died
        reason = one_line(error) if isinstance(error, Exception) else "it does not answer"
        raise UserError(f"--address {address}: no Ray to join there ({reason})") from None


def share_out(machines: Machines, shards: int, together: bool) -> tuple[Places, int]:
    """What actors take, and how many of them the cluster has room for now; arguments and errors as of `connected`."""
    actors, cpus, gpus = machines.actors, machines.cpus_per_actor, machines.gpus_per_actor
    nodes = alive()
    if gpus is None:
        if not any(node.get("CPU", 0) for node in nodes):
            raise UserError(
                "no machine of the cluster is up yet that could tell whether it has GPUs: say how many an actor or a "
                "worker takes, --gpus-per-actor or --gpus-per-worker, 1 or 0"
            )
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    if cpus is None:
        cpus = 1
        if not gpus:  # few shards get more cores each, the same in a run that goes on: it has as many shards
            cores = [int(node["CPU"]) for node in nodes if node.get("CPU")]
            shares = (actors or len(cores)) if together else max(shards, actors or 1)
            cpus = max(1, min(max(cores, default=1), sum(cores) // max(1, shares)))
            while cpus > 1 and sum(_fit(node, cpus, gpus) for node in nodes) < (actors or shares):
                cpus -= 1  # what is left over on one node is of no use to an actor on another
    room = sum(_fit(node, cpus, gpus) for node in nodes)
    return Places(actors or max(1, room), cpus, gpus, fixed=actors is not None), room


def alive() -> list[dict[str, float]]:
    """What each node has that is up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fit(node: dict[str, float], cpus: int, gpus: float) -> int:
    """How many actors a node can hold."""
    cores = int(node.get("CPU", 0) / cpus)
    return min(cores, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else cores  # ten of 0.1 are one
