"""A bucket that throttles, fails, is slow and cuts connections: what storage makes of it, and what a search does."""

from __future__ import annotations

import re
import subprocess
import sys

import boto3
import pytest
from here import ROOT
from tiny_search import search, tables

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.folder import BESIDE

pytest_plugins = ["s3", "tiny_results"]

KEY_ID = "AKIAVERYSECRETKEYID"
SECRET = "vErYsEcReT/kEy+0123456789"
# A process of its own, as pyarrow keeps connections and settings; fewer attempts, for errors that stay.
PROGRAM = """
import sys
from patchrank.store import storage
from patchrank.store.folder import BESIDE

storage.ATTEMPTS = int(sys.argv[1])
storage._S3_OPTIONS["request_timeout"] = 2
try:
    print({})
except OSError as error:
    print(f"OSError: {{storage.one_line(error)}}")
"""


@pytest.fixture
def bucket(s3_bucket, s3_faults, monkeypatch):
    """A bucket with one object, reached through the faulty proxy; its name."""
    name = s3_bucket.removeprefix("s3://")
    boto3.client("s3").put_object(Bucket=name, Key="object", Body=bytes(range(256)) * 4000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_faults.endpoint)
    return name


def run(code, attempts=10, check=True):
    command = [sys.executable, "-c", PROGRAM.format(code), str(attempts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout.strip() if check else done.stderr.strip()


def read(bucket, attempts=10):
    return run(f"storage.read_bytes('s3://{bucket}/object') == bytes(range(256)) * 4000", attempts)


def write(bucket, size, attempts=10):
    return run(f"storage.write_atomic('s3://{bucket}/made', b'x' * {size})", attempts)


def left(faults, bucket):
    """What is in the bucket beside the object, and begun but unfinished uploads."""
    faults.set()
    client = boto3.client("s3")
    keys = {entry["Key"]: entry["Size"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]}
    del keys["object"]
    return keys, client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])


FAULTS = ["throttled", "broken", "cut", "stalled", "unanswered"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_not_noticed(bucket, s3_faults, fault):
    s3_faults.set({"fault": fault, "method": "GET", "times": 2}, {"fault": fault, "method": "PUT", "times": 2})
    assert read(bucket) == "True"
    assert write(bucket, 100_000) == "None"
    asked = [request for request in s3_faults.requests() if request["fault"]]
    assert [request["method"] for request in asked] == ["GET", "GET", "PUT", "PUT"]
    assert left(s3_faults, bucket) == ({"made": 100_000}, [])


def test_a_slow_bucket_is_waited_for(bucket, s3_faults):
    s3_faults.set({"fault": "slow", "method": "GET"})
    assert read(bucket, attempts=1) == "True"


@pytest.mark.parametrize("fault", ["throttled", "broken", "cut"])
def test_a_fault_that_stays_is_reported_after_ever_longer_pauses_and_leaves_nothing(bucket, s3_faults, fault):
    s3_faults.set({"fault": fault, "method": "GET"}, {"fault": fault, "method": "PUT"})
    words = {"throttled": "SLOW_DOWN", "broken": "INTERNAL_FAILURE", "cut": "NETWORK_CONNECTION"}
    for said in (read(bucket, attempts=5), write(bucket, 100_000, attempts=5)):
        assert said.startswith("OSError: ") and words[fault] in said and "\n" not in said
    asked = [request for request in s3_faults.requests() if request["fault"]]
    assert [request["method"] for request in asked] == ["GET"] * 5 + ["PUT"] * 5
    # Drawn at random below 1, 2, 4 and 8 s: once in 4,000 runs all are below 1 s.
    assert max(asked[n + 1]["time"] - asked[n]["time"] for n in range(9)) > 1
    assert left(s3_faults, bucket) == ({}, [])


def test_a_forbidden_bucket_is_reported_at_once(bucket, s3_faults):
    s3_faults.set({"fault": "denied", "method": "GET"})
    assert "ACCESS_DENIED" in read(bucket)
    assert len([request for request in s3_faults.requests() if request["fault"]]) == 1


def test_what_is_denied_for_a_moment_is_asked_for_again(bucket, s3_faults):
    """As while a role that was just made is not known everywhere."""
    s3_faults.set({"fault": "denied", "method": "HEAD", "times": 2}, {"fault": "denied", "method": "PUT", "times": 1})
    read_it = f"list(__import__('patchrank.data.shards').data.shards.read('s3://{bucket}/object'))"
    assert "after 0 samples" in run(read_it, check=False)  # it was opened, and is no tar
    made = f"s3://{bucket}/made"
    assert run(f"storage.patiently('{made}', lambda: storage.write_atomic('{made}', b'x'))") == "None"
    assert [request["method"] for request in s3_faults.requests() if request["fault"]] == ["HEAD", "HEAD", "PUT"]
    assert left(s3_faults, bucket) == ({"made": 1}, [])


def test_what_stays_denied_is_waited_for_once(bucket, s3_faults, monkeypatch):
    monkeypatch.setattr(storage, "DENIED_PAUSES", (0.01, 0.01))
    monkeypatch.setattr(storage, "_in_vain", set())
    asked = []

    def denied():
        asked.append(0)
        raise PermissionError("When reading: AWS Error ACCESS_DENIED during HeadObject")

    for count in (3, 4):
        with pytest.raises(OSError, match="ACCESS_DENIED"):
            storage.patiently(f"s3://{bucket}/object", denied)
        assert len(asked) == count
    with pytest.raises(OSError):
        storage.patiently("/here", denied)
    assert len(asked) == 5


def test_a_large_object_appears_whole_or_not_at_all(bucket, s3_faults):
    size = 25_000_000  # three parts
    s3_faults.set({"fault": "broken", "path": "partNumber=2"})
    assert write(bucket, size, attempts=2).startswith("OSError: ")
    assert left(s3_faults, bucket)[0] == {}
    s3_faults.set({"fault": "cut", "path": "partNumber=2", "times": 1})
    assert write(bucket, size) == "None"
    assert left(s3_faults, bucket)[0] == {"made": size}


@pytest.mark.parametrize("uri", ["s3://AKIAKEY:hush@bucket/a.tar", "s3://AKIAKEY@bucket/a.tar", "gs://key:hush@bucket"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    for call in (storage.absolute, storage.resolve):
        with pytest.raises(UserError, match="credentials in a URI") as refused:
            call(uri)
        assert "hush" not in str(refused.value) and "AKIAKEY" not in str(refused.value)
    assert storage.absolute("gs://anonymous@bucket/a.tar") == "gs://anonymous@bucket/a.tar"


@pytest.mark.long
def test_a_search_through_a_bad_bucket_makes_the_same_tables_and_tells_no_secret(
    bucket, s3_faults, data, undisturbed, monkeypatch, tmp_path
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    client = boto3.client("s3")
    for number in range(3):
        client.upload_file(str(data / f"images-{number}.tar"), bucket, f"shards/images-{number}.tar")
    s3_faults.set(
        {"fault": "denied", "method": "GET", "path": "/shards/images-1"},
        {"fault": "cut", "method": "GET", "path": "/shards/images-0", "times": 2},
        {"fault": "throttled", "method": "PUT", "path": "/out/images", "times": 3},
        {"fault": "unanswered", "method": "PUT", "path": f"/out/{BESIDE}/search.json", "times": 1},
        {"fault": "broken", "method": "GET", "path": "list-type", "times": 2},
    )
    out = f"s3://{bucket}/out"
    done = search(data, out, "--actors", "1", shards=f"s3://{bucket}/shards")
    assert len([request for request in s3_faults.requests() if request["fault"]]) >= 9
    s3_faults.set()
    assert done.returncode == 1
    assert re.search(rf"^error: s3://{bucket}/shards/images-1.tar: .*ACCESS_DENIED", done.stderr, re.MULTILINE)
    assert "images-0" not in done.stderr and "images-2" not in done.stderr and "Traceback" not in done.stderr

    for entry in client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]:
        path = tmp_path / entry["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, entry["Key"], str(path))
    assert rows(tmp_path / "out") == {key: row for key, row in rows(undisturbed).items() if key[0] in "02"}

    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in (SECRET, KEY_ID):
        assert secret.encode() not in written + (done.stdout + done.stderr).encode()


def rows(folder):
    """The rows by key, but for the URI of their shard."""
    return {row["key"]: row | {"shard": ""} for table in tables(folder).values() for row in table}
