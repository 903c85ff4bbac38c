"""The pool on a cluster whose nodes and actors come, hang and are lost."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import pool as pool_module
from cluster.pool import Pool, process_id

pytest_plugins = ["shared_ray"]
pytestmark = pytest.mark.long

FAST = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


class Worker:
    """Works at an item for as long as there is a file HELD-ITEM; notes where and in which process."""

    def ready(self, folder):
        return process_id()

    @ray.method(concurrency_group="progress")
    def progress(self, item):
        return 0

    def work(self, folder, item):
        node, process = ray.get_runtime_context().get_node_id(), os.getpid()
        (folder / f"{item}.{node}.{process}").touch()
        while (folder / f"held-{item}").exists():
            time.sleep(0.02)
        return item


def begun(folder, item):
    """Node and process of every start of an item."""
    return [(node, int(process)) for _, node, process in (path.name.split(".") for path in folder.glob(f"{item}.*"))]


@pytest.fixture(scope="module")
def cluster(environment):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": FAST})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def add(cluster):
    """A function that adds a node with room for one actor; they are gone after the test."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    added = []

    def add():
        added.append(cluster.add_node(num_cpus=1))
        return added[-1]

    yield add
    ray.shutdown()
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


def test_the_items_of_a_lost_node_go_to_the_others(cluster, add, tmp_path):
    nodes = {node.node_id: node for node in (add(), add())}
    pool = Pool(Worker, tmp_path, size=2, cpus=1, gpus=0)
    (tmp_path / "held-a").touch()

    def lose_its_node() -> None:
        starts = begun(tmp_path, "a")
        if starts and len(cluster.worker_nodes) == 2:
            cluster.remove_node(nodes[starts[0][0]], allow_graceful=False)
        if len(starts) == 2:
            (tmp_path / "held-a").unlink(missing_ok=True)

    assert dict(pool.run("work", ["a", "b"], tick=lose_its_node)) == {"a": "a", "b": "b"}
    assert {node for node, _ in begun(tmp_path, "a")} == set(nodes)  # begun on one, done on the other


def test_idle_actors_that_are_lost_with_a_busy_one_cost_its_item_nothing(cluster, add, tmp_path):
    nodes = {node.node_id: node for node in (add(), add(), add(), add())}
    pool = Pool(Worker, tmp_path, size=4, cpus=1, gpus=0)
    (tmp_path / "held-a").touch()
    left = []

    def lose_all_but_one() -> None:
        starts = begun(tmp_path, "a")
        if starts and not left and pool.actors_up == 4:
            first = starts[0][0]
            left.append(next(node for node in nodes if node != first))
            for node in sorted(nodes.keys() - {*left}, key=lambda node: node == first):  # the idle ones first
                cluster.remove_node(nodes[node], allow_graceful=False)
        if len(starts) == 2:
            (tmp_path / "held-a").unlink(missing_ok=True)

    assert dict(pool.run("work", ["a"], tick=lose_all_but_one)) == {"a": "a"}
    assert [node for node, _ in begun(tmp_path, "a") if node in left] == left


def test_an_actor_that_hangs_is_killed_and_its_item_goes_on(add, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool_module, "SILENT_SECONDS", 3.0)
    add()
    pool = Pool(Worker, tmp_path, size=1, cpus=1, gpus=0)
    (tmp_path / "held-a").touch()
    stopped = []

    def stop_it() -> None:
        if (starts := begun(tmp_path, "a")) and not stopped:
            stopped.append(psutil.Process(starts[0][1]))
            stopped[0].send_signal(signal.SIGSTOP)
            (tmp_path / "held-a").unlink()

    try:
        assert dict(pool.run("work", ["a"], tick=stop_it)) == {"a": "a"}
        assert len(begun(tmp_path, "a")) == 2
        assert "a: its worker has not answered for 3 s" in capsys.readouterr().err
    finally:
        for process in stopped:
            if process.is_running():
                process.kill()


def test_a_node_that_joins_is_used_if_there_is_work_for_it(add, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "ROOM_SECONDS", 0.5)
    add()
    pool = Pool(Worker, tmp_path, size=1, cpus=1, gpus=0, room=lambda: int(ray.cluster_resources().get("CPU", 0)))
    (tmp_path / "held-a").touch()
    joined = []

    def join() -> None:
        if begun(tmp_path, "a") and not joined:
            joined.append(add().node_id)
        if begun(tmp_path, "b"):  # while the only actor that there was is at the first item
            (tmp_path / "held-a").unlink(missing_ok=True)

    assert dict(pool.run("work", ["a", "b"], tick=join)) == {"a": "a", "b": "b"}
    assert [node for node, _ in begun(tmp_path, "b")] == joined
    assert pool.actors_up == 2
