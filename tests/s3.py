"""A real S3 server on loopback. A test file gets the fixtures with `pytest_plugins = ["s3"]`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

# A process of its own, because pyarrow does some of its requests with the interpreter locked.
SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the tests end, however they end
"""

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The server's URL."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes) as process:
        port = process.stdout.readline().strip()
        assert port, "the S3 server did not start; is moto[server] installed?"
        yield f"http://127.0.0.1:{port}"


class Faults:
    """A proxy before the S3 server that makes it fail: see faulty_proxy.py."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self._folder = folder
        self.endpoint = endpoint

    def set(self, *rules: dict[str, object]) -> None:
        """From now on these, counted anew; and the list of requests begins anew."""
        for name, text in (("faults.json", json.dumps(rules)), ("requests.jsonl", "")):
            (self._folder / f"{name}.new").write_text(text)
            (self._folder / f"{name}.new").replace(self._folder / name)

    def requests(self) -> list[dict[str, object]]:
        """What has been asked since: "method", "path", "fault" and "time" of each."""
        return [json.loads(line) for line in (self._folder / "requests.jsonl").read_text().splitlines()]


@pytest.fixture
def s3_faults(s3_endpoint: str, tmp_path: Path) -> Iterator[Faults]:
    """A faulty proxy before the server; who wants its faults has AWS_ENDPOINT_URL set to its `endpoint`."""
    folder = tmp_path / "faults"
    folder.mkdir()
    script = Path(__file__).with_name("faulty_proxy.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script), s3_endpoint, str(folder)], text=True, **pipes) as process:
        faults = Faults(folder, f"http://127.0.0.1:{process.stdout.readline().strip()}")
        faults.set()
        yield faults
        process.kill()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The s3:// URI of a new, empty bucket. Endpoint and credentials are in the environment, which children inherit."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else pyarrow looks for a cloud machine's credentials
    name = f"bucket-{next(_numbers)}"  # never the same twice: connections are kept by bucket
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
