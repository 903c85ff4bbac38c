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
from cluster.pool import Pool

FAST = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


class Sleeper:
    """Works for as long as the item says; notes where and in which process."""

    def ready(self, folder):
        pass

    @ray.method(concurrency_group="progress")
    def progress(self):
        return 0

    def work(self, folder, item):
        node = ray.get_runtime_context().get_node_id()
        (folder / f"{item}-{time.time_ns()}").write_text(f"{node} {os.getpid()}")
        time.sleep(float(item))
        return item


@pytest.fixture
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": FAST})
    try:
        here = {"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}}  # actors import this file
        ray.init(address=cluster.address, runtime_env=here, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def places(folder, item):
    """Node and process of every start of an item that is two seconds old, in order."""
    paths = sorted(folder.glob(f"{item}-*"))
    return [path.read_text().split() for path in paths if time.time_ns() - int(path.name.split("-")[1]) > 2e9]


def test_the_items_of_a_lost_node_go_to_the_others(cluster, tmp_path):
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))}
    pool = Pool(Sleeper, tmp_path, size=2, cpus=1, gpus=0)
    lost = []

    def lose_a_node() -> None:
        if (found := places(tmp_path, "15")) and not lost:
            lost.append(found[0][0])
            cluster.remove_node(nodes[lost[0]], allow_graceful=False)

    assert dict(pool.run("work", ["15", "1"], tick=lose_a_node)) == {"15": "15", "1": "1"}
    assert lost
    time.sleep(2)
    assert {node for node, _ in places(tmp_path, "15")} == set(nodes)  # begun on one, done on the other


def test_an_actor_that_hangs_is_killed_and_its_item_goes_on(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool_module, "SILENT_SECONDS", 3.0)
    cluster.add_node(num_cpus=1)
    pool = Pool(Sleeper, tmp_path, size=1, cpus=1, gpus=0)
    stopped = []

    def stop_it() -> None:
        if (found := places(tmp_path, "5")) and not stopped:
            stopped.append(psutil.Process(int(found[0][1])))
            stopped[0].send_signal(signal.SIGSTOP)

    try:
        assert dict(pool.run("work", ["5"], tick=stop_it)) == {"5": "5"}
        assert len(list(tmp_path.glob("5-*"))) == 2
        assert "5: its worker has not answered for 3 s" in capsys.readouterr().err
    finally:
        for process in stopped:
            if process.is_running():
                process.kill()


def test_a_node_that_joins_is_used_if_there_is_work_for_it(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "ROOM_SECONDS", 0.5)
    cluster.add_node(num_cpus=1)
    pool = Pool(Sleeper, tmp_path, size=1, cpus=1, gpus=0, room=lambda: int(ray.cluster_resources()["CPU"]))
    joined = []

    def join() -> None:
        if not joined and places(tmp_path, "4"):
            joined.append(cluster.add_node(num_cpus=1).node_id)

    items = ["4", *(f"{number / 100 + 3:.2f}" for number in range(8))]
    assert dict(pool.run("work", items, tick=join)) == dict(zip(items, items, strict=True))
    assert joined and any(joined[0] in path.read_text() for path in tmp_path.iterdir())
    assert pool.actors_up == 2
