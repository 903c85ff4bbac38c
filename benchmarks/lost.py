"""How many images of a shard are searched again when its actor, and then its driver, is killed.

    python benchmarks/lost.py                          # 500 images, 6 seconds of work at stake, folder and bucket
    python benchmarks/lost.py --keep-work 20 --where disk

The embedded model searches a shard of 500 of its images through gates on a Ray cluster of this machine, by one actor:
undisturbed first, and then, with results on disk and in a bucket (moto's S3 server on loopback), killed by SIGKILL, the
actor at a third of the shard and the driver at two thirds, after which the same command goes on. A line a kill: the
images that were done, those of them that were kept, and the time of the work that was lost. The exit status is 1 where
that is more than --keep-work and a batch, or the table in the end is not the undisturbed one, row for row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is no installed package
from cluster import pool, rank
from cluster.places import Machines
from patchrank import assets
from patchrank.data import shards
from patchrank.data.meter import Meter
from patchrank.errors import run
from patchrank.model.class_source import ClassSource
from patchrank.model.loading import ModelSource
from patchrank.search.config import SearchConfig
from patchrank.store import rankings, storage

BATCH = 4  # images an actor searches at a time
POLL_SECONDS = 0.1  # between two looks at what an actor has done
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Told(Meter):
    """Writes what an actor has done, and how much of it an earlier one, into a file that the benchmark looks into."""

    def show(self, current: Any, actors: int) -> None:
        """As of a meter."""
        super().show(current, actors)
        for progress in filter(None, current.values()):
            storage.write_atomic(os.environ["TOLD"], json.dumps([progress.done, progress.kept]).encode())


def drive(shard: str, out: str, address: str, keep_work: float) -> None:
    """The search, in a process of its own."""
    pool.POLL_SECONDS = POLL_SECONDS
    rank.Meter = Told  # type: ignore[misc]
    rank.search(
        rank.SearchJob(
            [shard],
            out,
            model=ModelSource(assets.MODEL, dtype="float32"),
            classes=ClassSource(str(assets.CLASSNAMES)),
            machines=Machines(address, 1, cpus_per_actor=1),
            config=SearchConfig(rank_by="gates", steps=16),  # a tenth of the default's work
            keep_work=keep_work,
            images_per_batch=BATCH,
        )
    )


class Driver:
    """A search under way, of which one can tell how far it is."""

    def __init__(self, shard: str, out: str, address: str, keep_work: float, scratch: Path) -> None:
        self._told = scratch / "told"
        self._told.unlink(missing_ok=True)
        flags = ["--drive", shard, out, address, str(keep_work)]
        environment = {**os.environ, "TOLD": str(self._told)}
        self.process = subprocess.Popen([sys.executable, __file__, *flags], env=environment, stderr=subprocess.DEVNULL)

    def done(self) -> tuple[int, int]:
        """Images that are done, and those of them that an earlier actor had done and kept."""
        with contextlib.suppress(FileNotFoundError):
            done, kept = json.loads(self._told.read_bytes())
            return done, kept
        return 0, 0

    def wait(self, images: int, more_than: int = -1) -> tuple[int, int]:
        """What is done once that is so many images, by an actor that found more kept than another had."""
        while self.process.poll() is None:
            done, kept = self.done()
            if done >= images and kept > more_than:
                return done, kept
            time.sleep(POLL_SECONDS / 4)
        raise AssertionError(f"the search has ended, with status {self.process.returncode}")


def actors() -> list[psutil.Process]:
    """The ranking actors of the cluster, which is a child of this process."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "ray::RankingActor" in " ".join(process.cmdline())]


def rows(out: str) -> pa.Table:
    """The table of the shard."""
    corpus = rankings.open(out)
    table = corpus.dataset.to_table()
    return table.set_column(table.column_names.index("shard"), "shard", pa.array(["the shard"] * len(table)))


def disturbed(shard: str, out: str, address: str, keep_work: float, images: int, scratch: Path) -> bool:
    """Kill the actor and the driver of a search, and let it come to its end; whether no more was lost than is told."""
    good, driver = True, Driver(shard, out, address, keep_work, scratch)
    lost = []
    for what, share in (("actor", 1 / 3), ("driver", 2 / 3)):
        begun, start = driver.wait(driver.done()[0] + BATCH)[0], time.monotonic()
        done, before = driver.wait(round(share * images))
        pace = (done - begun) / (time.monotonic() - start)
        (actor,) = actors()
        actor.kill() if what == "actor" else driver.process.send_signal(signal.SIGKILL)
        if what == "driver":
            driver.process.wait()
            psutil.wait_procs([actor], timeout=60)
            driver = Driver(shard, out, address, keep_work, scratch)
        _, kept = driver.wait(1, before)
        lost.append((what, done, kept, (done - kept) / pace))
    assert driver.process.wait() == 0
    for what, done, kept, seconds in lost:
        good &= seconds <= keep_work + (BATCH + 1) / pace + 2 * POLL_SECONDS
        print(f"  {what:<8}{done:>5} images done, {kept:>4} kept, {done - kept:>3} searched again: {seconds:.1f} s")
    return good


@contextlib.contextmanager
def bucket(shard: str) -> Iterator[tuple[str, str]]:
    """The shard, and a folder, in a bucket of a server on loopback."""
    import boto3

    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout and server.stdin
        settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
        settings |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(settings)
        boto3.client("s3").create_bucket(Bucket="bucket")
        boto3.client("s3").upload_file(shard, "bucket", "shard.tar")
        yield "s3://bucket/shard.tar", "s3://bucket/out"
        server.stdin.close()


@contextlib.contextmanager
def room_for_one() -> Iterator[str]:
    """The address of a Ray cluster for one actor, which has the environment as it is by now."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made.address
    made.shutdown()


def write_shard(path: str, images: int) -> None:
    """So many images of the embedded shards, as often as it takes."""
    with tarfile.open(path, "w") as tar:
        number = 0
        while number < images:
            for uri in assets.TRAIN_SHARDS:
                for sample in shards.read(uri, images - number):
                    assert isinstance(sample, shards.Sample)
                    member = tarfile.TarInfo(f"{number:06d}.png")
                    member.size = len(sample.image)
                    with tempfile.SpooledTemporaryFile() as file:
                        file.write(sample.image)
                        file.seek(0)
                        tar.addfile(member, file)
                    number += 1


def main() -> int:
    """Search, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="of the shard (%(default)s)")
    parser.add_argument("--keep-work", type=float, default=6.0, help="seconds, as of jobs/search.py (%(default)s)")
    parser.add_argument("--where", nargs="+", choices=["disk", "bucket"], default=["disk", "bucket"])
    parser.add_argument("--drive", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        shard, out, address, keep_work = args.drive
        drive(shard, out, address, float(keep_work))
        return 0
    good = True
    with tempfile.TemporaryDirectory(prefix="patchrank-") as folder:
        shard, scratch = f"{folder}/shard.tar", Path(folder)
        write_shard(shard, args.images)
        with room_for_one() as address:
            driver = Driver(shard, f"{folder}/undisturbed", address, args.keep_work, scratch)
            assert driver.process.wait() == 0
        whole = rows(f"{folder}/undisturbed")
        assert len(whole) == args.images
        for where in args.where:
            with contextlib.ExitStack() as stack:
                there, out = stack.enter_context(bucket(shard)) if where == "bucket" else (shard, f"{folder}/out")
                address = stack.enter_context(room_for_one())
                print(f"{args.images} images, --keep-work {args.keep_work:g}, {where}", flush=True)
                good &= disturbed(there, out, address, args.keep_work, args.images, scratch)
                same = rows(out).equals(whole)
                print(f"  the table is {'the undisturbed one' if same else 'ANOTHER'}", flush=True)
                good &= same
    return 0 if good else 1


if __name__ == "__main__":
    run(main)
