"""One Ray for many tests, started and left once: `pytest_plugins = ["shared_ray"]`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from here import ROOT


class Hold:
    """Images that no actor reads beyond, however fast the machine is, so that a test decides how far a search comes.

    An image goes by its key, as in tiny_results.py: SHARD-NUMBER. `folder` is what held/sitecustomize.py looks into.
    """

    def __init__(self, folder):
        self._folder = folder

    def at(self, *keys):
        """From now on actors that come to these images wait there."""
        for key in keys:
            (self._folder / key).touch()

    def waiting(self, key):
        """The processes that have come to an image and wait there, or have died there."""
        return {int(path.suffix[1:]) for path in self._folder.glob(f"{key}.*")}

    def release(self, key="*"):
        """Everyone goes on, or those who wait at one image."""
        for path in (*self._folder.glob(key), *self._folder.glob(f"{key}.*")):
            path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """What processes must have in theirs to be held up, to find the tests' own modules, and to miss a worker soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELD", str(tmp_path_factory.mktemp("held")))
        tests = ROOT / "tests"
        paths = [*map(str, (tests / "held", tests, tests / "cluster", ROOT)), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        yield


@pytest.fixture
def hold(environment):
    """See `Hold`; in effect in the shared Ray and in every process that the test starts."""
    held = Hold(Path(os.environ["HELD"]))
    yield held
    held.release()


# In a process of its own, as a user's cluster is: a process that has joined one Ray, has started another itself and
# comes back to the first can start no actor there any more.
HEAD = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextlib.contextmanager
def head(**options):
    """The address of a Ray that is there for the `with` statement; options as for the head node of a `Cluster`."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HEAD, json.dumps(options)], stdin=pipe, stdout=pipe, text=True) as ray:
        yield next(line.split()[1] for line in ray.stdout if line.startswith("address "))
        ray.stdin.close()


@pytest.fixture(scope="session")
def address(environment):
    """Of a Ray with room for three actors of a core."""
    with head(num_cpus=3) as found:
        yield found
