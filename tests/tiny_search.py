"""A search that takes seconds, as a user runs it: jobs/search.py in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent


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


def tables(out):
    """Every table of a folder by file name, as rows."""
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(Path(out).glob("*.parquet"))}


def actors(process):
    """The ranking actors of a search."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ray::RankingActor" in " ".join(child.cmdline())]


def wait_for(condition, process, seconds=300):
    """Wait until something happens while the process runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"did not happen; the search says:\n{process.communicate(timeout=60)}")


class Hold:
    """Images that no actor reads beyond, however fast the machine is; `folder` has a file for each.

    An image goes by its key, SHARD-NUMBER.
    """

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def at(self, *keys):
        """From now on actors that come to these images wait there."""
        for key in keys:
            (self.folder / key).touch()

    def waiting(self, key):
        """The processes that have come to an image and wait there, or have died there."""
        return {int(path.suffix[1:]) for path in self.folder.glob(f"{key}.*")}

    def release(self):
        """Everyone goes on."""
        for path in self.folder.iterdir():
            path.unlink()
