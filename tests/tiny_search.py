"""A search that takes seconds: jobs/search.py as a user runs it, in a process of its own, or its main function here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from here import ROOT, run_here


def command(data, out, *flags, shards="images-{0..5}.tar"):
    """jobs/search.py on shards of the data folder; another place is given as an absolute path or a URI."""
    uri = str(shards) if "://" in str(shards) else str(data / shards)
    return [
        sys.executable, str(ROOT / "jobs" / "search.py"), "--address", "local", "--cpus-per-actor", "1",
        "--model", f"local-dir:{data / 'model'}", "--shards", uri, "--classes", str(data / "classes.json"),
        "--out", str(out), "--dtype", "float32", *flags,
    ]  # fmt: skip


def search(data, out, *flags, **named):
    return subprocess.run(command(data, out, *flags, **named), capture_output=True, text=True, timeout=900)


def search_here(data, out, *flags, address, **named):
    """The same without the seconds that a process and a Ray of its own take: what jobs/search.py does, done here."""
    arguments = [*command(data, out, **named)[2:], "--address", address, *flags]
    return run_here("jobs/search.py", *arguments)


def tables(out):
    """Every table of a folder by file name, as rows."""
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(Path(out).glob("*.parquet"))}


def actors(process):
    """The ranking actors of a search."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ray::RankingActor" in " ".join(child.cmdline())]


def wait_for(condition, process=None, seconds=300):
    """Wait until something happens, while the process runs if it depends on one; what the condition found."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (process is None or process.poll() is None):
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"did not happen; the search says:\n{process and process.communicate(timeout=60)}")


@contextlib.contextmanager
def once_waiting(hold, key, act):
    """While a search runs here: once an actor waits at an image, `act(process id)`, and whoever waits goes on."""

    def wait():
        try:
            (waiting,) = wait_for(lambda: hold.waiting(key))
            act(waiting)
        finally:
            hold.release()

    hold.at(key)
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(wait)
        yield
        acting.result()
