"""What a search survives, and that it tells the truth where it does not: as a user runs it, on real Ray processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from ray.cluster_utils import Cluster
from tiny_search import command, once_waiting, search_here, tables, wait_for

from patchrank.store.folder import BESIDE

pytest_plugins = ["tiny_results"]

# A node is given up when it does not answer five times in a row for two seconds; Ray's own settings make it a minute.
CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}


@pytest.fixture(scope="module")
def cluster(environment):
    """A Ray cluster whose head has no room for actors; tests bring their own nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": CHECKS})
    yield cluster
    cluster.shutdown()


@contextlib.contextmanager
def node(cluster):
    """A node with room for one actor: its raylet's process."""
    added = cluster.add_node(num_cpus=1)
    raylet = psutil.Process(added.all_processes["raylet"][0].process.pid)
    try:
        yield raylet
    finally:
        kill(raylet)  # those that are stopped, too
        cluster.remove_node(added, allow_graceful=False)


def family(raylet):
    """The processes of a node."""
    with contextlib.suppress(psutil.Error):
        return [raylet, *raylet.children(recursive=True)]
    return [raylet]


def kill(raylet):
    """End a node as if it were switched off."""
    for process in family(raylet):
        with contextlib.suppress(psutil.Error):
            process.kill()


def actors_on(raylet):
    """The process ids of the ranking actors of a node."""
    found = set()
    for process in family(raylet):
        with contextlib.suppress(psutil.Error):
            if "ray::RankingActor" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


@contextlib.contextmanager
def started(*arguments):
    """A search under way."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ends_well(process):
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return stdout


@pytest.mark.long
def test_a_node_that_joins_takes_over_from_one_that_is_lost(cluster, data, undisturbed, hold, tmp_path):
    out = tmp_path / "out"
    hold.at("1-5")
    with node(cluster) as first, started(data, out, "--address", cluster.address) as process:
        lost = wait_for(lambda: hold.waiting("1-5"), process)
        assert lost == actors_on(first) and len(tables(out)) == 1
        with node(cluster) as second:
            wait_for(lambda: actors_on(second), process)
            kill(first)
            wait_for(lambda: hold.waiting("1-5") - lost, process)
            hold.release()
            ends_well(process)
    assert tables(out) == tables(undisturbed)


@pytest.mark.long
def test_a_node_that_hangs_does_not_hold_up_the_search(cluster, data, undisturbed, hold, tmp_path):
    out = tmp_path / "out"
    flags = ("--address", cluster.address, "--actors", "2")
    hold.at("0-5", "1-5")
    with node(cluster) as first, node(cluster) as second, started(data, out, *flags) as process:
        wait_for(lambda: hold.waiting("0-5") and hold.waiting("1-5"), process)
        assert hold.waiting("0-5") | hold.waiting("1-5") == actors_on(first) | actors_on(second)
        for part in family(first):
            part.send_signal(signal.SIGSTOP)
        hold.release()
        ends_well(process)
        assert first.status() == psutil.STATUS_STOPPED
    assert tables(out) == tables(undisturbed)


@pytest.mark.long
def test_a_killed_driver_frees_the_cluster_and_the_next_goes_on(cluster, data, undisturbed, hold, tmp_path):
    out = tmp_path / "out"
    hold.at("1-5")
    with node(cluster) as place:
        with started(data, out, "--address", cluster.address) as process:
            wait_for(lambda: hold.waiting("1-5"), process)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        end = time.monotonic() + 120
        while actors_on(place):
            assert time.monotonic() < end, "the driver's actors outlive it"
            time.sleep(0.2)
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        assert len(kept) == 1
        hold.release()
        done = search_here(data, out, address=cluster.address)
    assert done.returncode == 0, done.stderr
    assert "1 of 6 were finished before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tables(out) == tables(undisturbed)


def test_a_shard_that_kills_its_actor_is_set_aside_and_the_others_are_done(data, undisturbed, address, hold, tmp_path):
    out, killed, ended = tmp_path / "out", set(), threading.Event()
    hold.at("2-5")

    def kill_whoever_reads_it():
        while not ended.wait(0.02):
            for actor in hold.waiting("2-5") - killed:
                os.kill(actor, signal.SIGKILL)
                killed.add(actor)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_whoever_reads_it)
        try:
            done = search_here(data, out, "--actors", "2", address=address)
        finally:
            ended.set()
        killer.result()
    assert done.returncode == 1
    shard = re.escape(str(data / "images-2.tar"))
    assert re.search(rf"^error: {shard}: its worker died 3 times: ", done.stderr, re.MULTILINE)
    assert len(killed) == 3
    expected = {name: table for name, table in tables(undisturbed).items() if not name.startswith("images-2-")}
    assert len(expected) == 5 and tables(out) == expected
    assert [path.name.rsplit("-", 1)[0] for path in (out / BESIDE / "failed").iterdir()] == ["images-2"]


@pytest.mark.long
def test_a_disk_that_fills_up_stops_the_search_which_goes_on_when_there_is_room(data, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # A disk of our own with room for some of the tables, and then for all.
    script = f"""
        mount -t tmpfs -o size=56k none {disk}
        "$@"; echo status $?
        find {disk} -type f | sort
        mount -o remount,size=8m {disk}
        "$@"; echo status $?
        cp -r {disk}/out {tmp_path}/
    """
    room = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*room, f"mount -t tmpfs none {disk}"], capture_output=True).returncode:
        pytest.skip("this system lets nobody but root mount a disk")
    full = [*room, script, "search", *command(data, disk / "out", "--actors", "1")]
    done = subprocess.run(full, capture_output=True, text=True, timeout=900)
    assert re.findall(r"^status (\d+)$", done.stdout, re.MULTILINE) == ["2", "0"], done.stdout + done.stderr
    files = [line for line in done.stdout.splitlines() if line.startswith(str(disk))]
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert 0 < sum("/out/images-" in name for name in files) < 6
    assert not any(name.endswith(".tmp") for name in files)
    assert tables(tmp_path / "out") == tables(undisturbed)


@pytest.mark.long
def test_a_folder_that_is_removed_stops_the_search_and_is_not_made_anew(data, undisturbed, address, hold, tmp_path):
    out = tmp_path / "out"

    def remove(_):
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)  # the search may be writing

    with once_waiting(hold, "1-5", remove):
        done = search_here(data, out, "--actors", "1", address=address)
    assert done.returncode == 2
    assert f"error: {out}: " in done.stderr
    assert not tables(out)
    done = search_here(data, out, "--actors", "1", address=address)
    assert done.returncode == 0, done.stderr
    assert tables(out) == tables(undisturbed)


def test_a_table_that_is_taken_away_meanwhile_is_missed_in_the_end(data, undisturbed, address, hold, tmp_path):
    out, taken = tmp_path / "out", []

    def take(_):
        taken.extend(out.glob("*.parquet"))
        taken[0].unlink()

    with once_waiting(hold, "1-5", take):
        done = search_here(data, out, "--actors", "1", address=address)
    assert done.returncode == 1 and len(taken) == 1
    shard = data / "images-0.tar"
    assert f"error: {shard}: was finished, but its table has since been taken out of the folder" in done.stderr
    assert tables(out) == {name: table for name, table in tables(undisturbed).items() if name != taken[0].name}
