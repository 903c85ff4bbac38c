"""cluster/local.yaml for real: a head and a worker reached by ssh, set up, given two searches, and taken down.

The machines are namespaces of this one (see machines.py), so the test is skipped where those, or sshd, cannot be had.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from here import ROOT
from machines import Machine, missing, switch, wait_until

SHARDS = [str(ROOT / "patchrank" / "assets" / "shards" / f"train-00000{number}.tar.gz") for number in range(4)]
LIMIT = 40  # images of a shard: enough for the slower of two machines to have its actor up while there are shards left
SEARCH = ["--model", "embedded", "--limit", str(LIMIT), "--shards", *SHARDS]
RANKED = f"{4 * LIMIT} ranked, 0 rejected"
# The environment that docs/cluster.md tells users to set.
API = ["env", "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"]

WHY_NOT = missing()
pytestmark = [pytest.mark.ray, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Head, worker and a laptop with the project, its token, and a cluster file for these machines."""
    folder = tmp_path_factory.mktemp("network")
    room = switch(folder / "switch.log")
    machines: list[Machine] = []
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        key = (folder / "key.pub").read_text()
        for number, name in enumerate(("head", "worker", "laptop"), start=1):
            machines.append(Machine(folder, room.pid, number, name, None if name == "laptop" else key))
        head, worker, laptop = machines
        for machine in (head, worker):
            _preinstall(machine.home / "patchrank" / "venv")
        config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
        (folder / "local.yaml").write_text(yaml.safe_dump(config))
        yield head, worker, laptop, str(folder / "local.yaml")
    finally:
        for machine in machines:
            machine.stop()
        room.kill()
        room.wait()


def _preinstall(venv: Path) -> None:
    """What the project needs, but not the project: these machines cannot reach a package index."""
    packages = venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (venv / "bin").mkdir()
    script = venv / "bin" / "ray"
    script.write_text("#!/usr/bin/env python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    script.chmod(0o755)


def succeeds(machine: Machine, *command: str) -> str:
    """Run a command that must succeed; what it says."""
    done = machine.run(list(command))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def rows(folder: Path) -> dict[str, list]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}


def test_a_cluster_comes_up_takes_searches_and_goes_down(network, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    head, worker, laptop, cluster = network
    succeeds(laptop, "ray", "get-auth-token", "--generate")
    succeeds(laptop, "ray", "up", "--yes", cluster)
    for machine in (head, worker):  # the head brings the worker up
        wait_until(lambda machine=machine: any("raylet" in line for line in machine.processes()), "a raylet")
        token = machine.home / ".ray" / "auth_token"
        assert token.read_text() == (laptop.home / ".ray" / "auth_token").read_text()
        assert token.stat().st_mode & 0o077 == 0
    wait_until(lambda: " 2 local.cluster.node" in succeeds(laptop, "ray", "exec", cluster, "ray status"), "two nodes")

    submit = laptop.command(["ray", "submit", cluster, "jobs/search.py", "--", *SEARCH, "--out", str(tmp_path / "a")])
    with open(tmp_path / "said", "w+") as output:
        with subprocess.Popen(submit, stdout=output, stderr=subprocess.STDOUT) as process:
            busy = set()
            while process.poll() is None:
                busy |= {one for one in (head, worker) if any("RankingActor" in line for line in one.processes())}
                time.sleep(0.1)
        said = (tmp_path / "said").read_text()
    assert process.returncode == 0, said
    assert busy == {head, worker}, said  # each had an actor
    assert RANKED in said
    assert not (head.home / "jobs").exists()  # what ran was the installed project, and this one file

    assert laptop.run(["curl", "-s", "-m", "5", f"http://{head.address}:8265"]).returncode == 7  # nobody listens there
    forward = laptop.command(["ray", "dashboard", cluster])
    with subprocess.Popen(forward, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as dashboard:
        try:
            token = [*API, "RAY_AUTH_MODE=token", "ray", "job"]
            wait_until(lambda: laptop.run([*token, "list"]).returncode == 0, "the forwarded dashboard")
            refused = laptop.run([*API, "RAY_AUTH_MODE=disabled", "ray", "job", "list"])
            assert refused.returncode != 0 and "token" in refused.stderr.lower()
            job = ["--working-dir", ".", "--", "python", "jobs/search.py", *SEARCH, "--out", str(tmp_path / "b")]
            assert RANKED in succeeds(laptop, *token, "submit", *job)
        finally:
            dashboard.kill()
    found = rows(tmp_path / "a")
    assert [len(table) for table in found.values()] == [LIMIT] * 4
    assert rows(tmp_path / "b") == found

    succeeds(laptop, "ray", "down", "--yes", cluster)
    wait_until(lambda: not any("raylet" in line or "gcs_server" in line for line in head.processes()), "the head down")
    assert os.listdir(worker.home / "patchrank")  # the installation stays for the next time
