"""What actors take and how many there are, on machines that are made up; tests of searches use real ones."""

from __future__ import annotations

import pytest

from cluster import places
from cluster.places import Machines, connected
from patchrank.errors import UserError

GPU = {"CPU": 8.0, "GPU": 4.0}


@pytest.mark.parametrize(
    "cores, actors, shards, expected",
    [
        ([8], None, 1000, (8, 1)),
        ([8], None, 2, (2, 4)),
        ([8], 3, 2, (3, 2)),
        ([8, 8], 3, None, (3, 4)),  # a third of 16 cores would leave no room for the third
        ([8, 8, 8], 4, None, (4, 4)),
        ([8, 8], None, 3, (4, 4)),
        ([0, 8, 8], None, None, (2, 8)),  # together, one a machine
        ([16, 8, 8, 8], None, None, (5, 8)),
    ],
)
def test_cores_are_shared_out_so_that_all_find_room(monkeypatch, cores, actors, shards, expected):
    monkeypatch.setattr(places, "alive", lambda: [{"CPU": float(count)} for count in cores])
    found, room = places.share_out(Machines(actors=actors), shards or 1, together=shards is None)
    assert (found.actors, found.cpus) == expected and found.gpus == 0
    assert room >= found.actors


@pytest.mark.parametrize("nodes", [[], [{"memory": 8e9}]])  # no machine yet, or a head without cores
def test_before_a_machine_is_up_its_gpus_are_not_guessed(monkeypatch, nodes):
    monkeypatch.setattr(places, "alive", lambda: nodes)
    with pytest.raises(UserError, match="no machine of the cluster is up yet"):
        places.share_out(Machines(), 1000, together=False)
    for gpus in (0, 1):
        found, room = places.share_out(Machines(actors=8, gpus_per_actor=gpus), 1000, together=False)
        assert (found.actors, found.cpus, found.gpus, room) == (8, 1, gpus, 0)


@pytest.mark.parametrize("together", [False, True])
def test_who_works_together_is_not_begun_with_less_room(monkeypatch, capsys, together):
    monkeypatch.setattr(places, "connect", lambda *_: None)
    monkeypatch.setattr(places, "alive", lambda: [GPU])
    with connected(Machines("cluster:6379", 5), 1000, together=together) as found:
        assert (found.actors, found.cpus, found.gpus) == (5, 1, 1)
    warning = "the cluster has no room for 5 actors, each of 1 CPUs and 1 GPUs, only for 4; waiting until it has"
    assert (warning in capsys.readouterr().err) == together
    if together:
        with pytest.raises(UserError, match=r"no room on this machine for 5 actors, .*, only for 4"):
            connected(Machines("local", 5), together=True).__enter__()
