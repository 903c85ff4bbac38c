"""The pool when a whole node is lost."""

from __future__ import annotations

import os
import time

import ray
from ray.cluster_utils import Cluster

from cluster.pool import Pool


class Sleeper:
    """Works for as long as the item says."""

    def ready(self, folder):
        pass

    @ray.method(concurrency_group="progress")
    def progress(self):
        return 0

    def work(self, folder, item):
        (folder / f"{item}-{time.time_ns()}").write_text(ray.get_runtime_context().get_node_id())
        time.sleep(float(item))
        return item


def test_the_items_of_a_lost_node_go_to_the_others(tmp_path):
    fast = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": fast})
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))}
        here = {"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}}  # actors import this file
        ray.init(address=cluster.address, runtime_env=here, log_to_driver=False, logging_level="ERROR")
        pool = Pool(Sleeper, tmp_path, size=2, cpus=1, gpus=0)
        lost = []

        def lose_a_node() -> None:
            started = list(tmp_path.glob("15-*"))
            if started and not lost and time.time_ns() - int(started[0].name.split("-")[1]) > 2e9:
                lost.append(started[0].read_text())
                cluster.remove_node(nodes[lost[0]], allow_graceful=False)

        assert dict(pool.run("work", ["15", "1"], tick=lose_a_node)) == {"15": "15", "1": "1"}
        assert lost
        assert {path.read_text() for path in tmp_path.glob("15-*")} == set(nodes)  # begun on one, done on the other
    finally:
        ray.shutdown()
        cluster.shutdown()
