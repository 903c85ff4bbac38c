"""What the output folder tells of a search: while it runs, after it has died, and without a word from its driver."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import ray
from here import ROOT
from made_up import images, save, settings
from shared_ray import head
from tiny_search import command, wait_for

import cluster.metrics
from jobs.status import main
from patchrank.errors import UserError
from patchrank.store import status
from patchrank.store.folder import BESIDE, Folder, Reject
from patchrank.store.status import SILENT_SECONDS, Run

pytest_plugins = ["s3", "tiny_results"]

SHARDS = [f"/data/{name}.tar" for name in "abcdef"]


def write(folder: str, shard: str, rejects: int = 0) -> None:
    """The files of a finished shard with five images."""
    save(folder, images(shard, 5), tuple(Reject(f"bad {number}", "not an image") for number in range(rejects)))


def half_way(folder: str) -> Run:
    """A folder whose driver has finished a and b, lost c to a damaged tar, and has d and e in work."""
    Folder(folder).prepare(settings())
    status.write_shards(folder, SHARDS)
    for shard in SHARDS[:2]:
        write(folder, shard, rejects=2)
    Folder(folder).record_failure(SHARDS[2], "truncated, after 7 samples")
    run = Run("search", started=1000.0, updated=1100.0, actors=2, images=13, images_per_second=0.5, seconds_left=40.0)
    run.running = {SHARDS[3]: 3, SHARDS[4]: 0}
    status.write_run(folder, run)
    return run


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue("s3_bucket") + "/out"


def test_a_running_search(folder):
    run = half_way(folder)
    found = status.read(folder, now=1105.0)
    assert (found.state, found.shards, found.done, found.waiting) == ("running", 6, 2, 1)
    assert found.running == {SHARDS[3]: 3, SHARDS[4]: 0}
    assert found.failed == {SHARDS[2]: "truncated, after 7 samples"}
    assert (found.images, found.rejects, found.reasons) == (10, 4, {"not an image": 4})
    assert found.run == run
    assert found.ends == 1140.0


def test_a_driver_that_says_nothing_more_has_died(tmp_path):
    folder = str(tmp_path)
    half_way(folder)
    write(folder, SHARDS[3])  # its actor outlived it
    found = status.read(folder, now=1100.0 + SILENT_SECONDS)
    assert (found.state, found.done, found.waiting, found.ends) == ("died", 3, 1, None)
    assert found.running == {SHARDS[4]: 0}


def test_a_damaged_failure_record_is_a_failure_of_its_shard(tmp_path):
    half_way(str(tmp_path))
    folder = Folder(str(tmp_path)).prepare(settings())
    folder.write(SHARDS[2], images(SHARDS[2], 5).table(), error="truncated, after 5 samples")
    (record,) = (tmp_path / BESIDE / "failed").iterdir()
    record.write_bytes(b"")
    found = status.read(str(tmp_path), now=1105.0)
    assert found.done == 2 and list(found.failed) == [SHARDS[2]] and "is damaged" in found.failed[SHARDS[2]]


def test_a_run_that_ended_and_one_that_is_through(tmp_path):
    folder = str(tmp_path)
    run = half_way(folder)
    run.ended = True
    status.write_run(folder, run)
    found = status.read(folder, now=1101.0)
    assert (found.state, found.running, found.waiting) == ("stopped", {}, 3)
    for shard in SHARDS[2:]:
        write(folder, shard)
    found = status.read(folder, now=1101.0)
    assert (found.state, found.done, found.failed, found.waiting) == ("finished", 6, {}, 0)


def test_a_failed_shard_that_is_tried_again_is_running(tmp_path):
    run = half_way(str(tmp_path))
    run.running = {SHARDS[2]: 1}
    status.write_run(str(tmp_path), run)
    found = status.read(str(tmp_path), now=1101.0)
    assert (found.running, found.failed, found.waiting) == ({SHARDS[2]: 1}, {}, 3)


def test_shards_of_other_runs_do_not_count(tmp_path):
    half_way(str(tmp_path))
    status.write_shards(str(tmp_path), SHARDS[1:3])
    found = status.read(str(tmp_path), now=1101.0)
    assert (found.shards, found.done, found.running, found.waiting) == (2, 1, {}, 0)


@pytest.mark.parametrize("damaged", ["{", '{"title": "search"}', '{"of": "another version"}'])
def test_without_a_word_from_the_driver_the_tables_still_tell(tmp_path, damaged):
    folder = str(tmp_path)
    half_way(folder)
    (tmp_path / BESIDE / status.RUN_FILE).write_text(damaged)
    (tmp_path / BESIDE / status.SHARDS_FILE).unlink()
    found = status.read(folder)
    assert (found.state, found.shards, found.done, found.images) == ("unknown", None, 2, 10)
    assert list(found.failed) == [SHARDS[2]]


def test_a_folder_without_a_table_and_one_that_is_none(tmp_path):
    Folder(str(tmp_path)).prepare(settings())
    found = status.read(str(tmp_path))
    assert (found.state, found.done, found.images, found.rejects) == ("unknown", 0, 0, 0)
    for absent in (tmp_path / "absent", tmp_path / BESIDE / "rejects"):
        with pytest.raises(UserError, match=r"no search.json"):
            status.read(str(absent))


def test_a_report_does_not_bring_back_a_removed_folder(tmp_path):
    run = half_way(str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    status.write_run(str(tmp_path / "out"), run)
    assert not (tmp_path / "out").exists()


def test_the_job_prints_all_of_it(tmp_path, capsys):
    run = half_way(str(tmp_path))
    run.updated = time.time()
    status.write_run(str(tmp_path), run)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in (
        "state         running",
        "2 of 6 done, 2 running, 1 failed, 1 waiting",
        "10 ranked, 4 rejected",
        "0.50 images/s on 2 actors",
        "in 00:",
        f"{SHARDS[3]}: 3 images so far",
        f"{SHARDS[2]}: truncated",
        "4 x not an image",
    ):
        assert words in out
    assert main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], told["waiting"], told["run"]["images"]) == (2, 1, 13)


# Every report is one that a test can wait for.
DRIVER = "from patchrank.store import status; status.REPORT_SECONDS = 0.2; import jobs.search as job; job.main()"


@pytest.fixture
def metered(hold):
    """A Ray that tells its metrics twice a second."""
    with head(num_cpus=2, include_dashboard=False, _system_config={"metrics_report_interval_ms": 500}) as address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        yield address
        ray.shutdown()


def metrics() -> dict[str, float]:
    """The metrics of this project that Prometheus would collect from this node, summed over processes."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as page:
        lines = page.read().decode().splitlines()
    sums: dict[str, float] = {}
    for line in lines:
        if line.startswith("ray_patchrank_"):
            name, value = line.split("{")[0].removeprefix("ray_patchrank_"), float(line.split()[-1])
            stage = line.partition('Stage="')[2].partition('"')[0]
            name += f" {stage}" if stage else ""
            sums[name] = sums.get(name, 0.0) + value
    return sums


def test_a_real_search_is_seen_while_it_runs_and_after_it_was_killed(data, hold, metered, tmp_path):
    out = tmp_path / "out"
    hold.at("1-9")  # in the middle of the second shard
    arguments = command(data, out, "--images-per-batch", "1", "--actors", "1", "--address", metered)[2:]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def seen() -> bool:
            if not (out / BESIDE / status.RUN_FILE).exists():
                return False
            found = status.read(str(out))
            assert found.state == "running"
            return bool(found.done and any(found.running.values()) and found.run and found.run.images_per_second)

        wait_for(seen, process)
        wait_for(lambda: {"images_total", "candidates_total", "seconds_total search"} <= metrics().keys(), process)
        told = metrics()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    found = status.read(str(out), now=time.time() + SILENT_SECONDS)
    assert (found.state, found.shards) == ("died", 6)
    assert (found.done, len(found.running), found.waiting) == (1, 1, 4)
    assert found.images == 12
    assert found.run.stages["search"] > 0
    assert 0 < told["images_total"] <= 21
    assert told["candidates_total"] > told["images_total"]
    assert told["seconds_total search"] > 0


def test_the_panels_of_grafana_ask_for_metrics_that_there_are():
    panels = json.loads((ROOT / "cluster" / "grafana.json").read_text())["panels"]
    asked = {re.search(r"ray_patchrank_\w+", panel["targets"][0]["expr"])[0] for panel in panels}
    assert asked == set(re.findall(r"^ray_patchrank_\w+", cluster.metrics.__doc__, re.MULTILINE))
