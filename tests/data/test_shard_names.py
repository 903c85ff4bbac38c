"""Finding shards by name, on disk and in buckets: a real S3 server."""

from __future__ import annotations

import http.server
import json
import os
import threading
from pathlib import Path

import pytest
from PIL import Image
from tiny_shards import read_all, samples, write

from patchrank.data import shards
from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.folder import Reject

pytest_plugins = ["s3"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The current folder, with empty files: `expand` does not open shards."""
    monkeypatch.chdir(tmp_path)
    names = [
        "a/x-000.tar",
        "a/x-001.tar",
        "a/x-010.tgz",
        "a/y.tar.gz",
        "a/classnames.json",
        "a/.hidden.tar",
        "a/sub/z.tar",
    ]
    for name in [*names, "b/x-000.tar", "b/part-0", "c/notes.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


A = ["a/x-000.tar", "a/x-001.tar", "a/x-010.tgz", "a/y.tar.gz"]
EXPANSIONS = [
    (["a/x-{000..001}.tar"], A[:2]),
    (["a/x-{009..010}.tgz"], ["a/x-009.tgz", "a/x-010.tgz"]),  # need not exist
    (["{b,a}/x-000.tar"], ["b/x-000.tar", "a/x-000.tar"]),
    (["{b,a}/x-*.tar"], ["b/x-000.tar", "a/x-000.tar", "a/x-001.tar"]),
    (["a/*"], A),
    (["a/x-0?0.t*"], ["a/x-000.tar", "a/x-010.tgz"]),
    (["a/x-00[1-9].tar"], ["a/x-001.tar"]),
    (["*/x-000.tar"], ["a/x-000.tar", "b/x-000.tar"]),
    (["*/*/z.tar"], ["a/sub/z.tar"]),
    (["a/.h*"], ["a/.hidden.tar"]),
    (["a"], A),
    (["./a/"], A),
    (["{a,b}"], [*A, "b/x-000.tar"]),
    (["missing.tar", "missing.tar.gz"], ["missing.tar", "missing.tar.gz"]),
    (["b/part-0"], ["b/part-0"]),
    (["a/x-001.tar", "a", "./a/x-000.tar"], ["a/x-001.tar", "a/x-000.tar", *A[2:]]),
]


@pytest.mark.parametrize(("specs", "expected"), EXPANSIONS)
def test_expand(tree, specs, expected):
    absolute = [f"{tree}/{name}" for name in expected]
    assert shards.expand(specs) == absolute
    assert shards.expand([f"{tree}/{spec}" for spec in specs]) == absolute
    assert shards.expand([f"file://{tree}/{spec}" for spec in specs]) == absolute


def test_expand_in_a_folder_with_wildcards_in_its_name(tree, monkeypatch):
    (tree / "a").rename(tree / "[a]{1}")
    monkeypatch.chdir(tree / "[a]{1}")
    assert shards.expand(["x-000.tar", "x-*.tar", "."]) == [f"{tree}/[a]{{1}}/{Path(name).name}" for name in A]


def test_expand_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert shards.expand(["~/b", "~/a/x-*1.tar"]) == [f"{tree}/b/x-000.tar", f"{tree}/a/x-001.tar"]


def test_expand_a_list_file(tree, monkeypatch):
    (tree / "c/more.list").write_text("../b\n")
    (tree / "c/shards.txt").write_text(
        f"\ufeff# training\n\n  ../a/x-{{000..001}}.tar \r\n{tree}/a/y.tar.gz\nmore.list\n"
    )
    monkeypatch.chdir("/")
    expected = [f"{tree}/{name}" for name in [*A[:2], A[3], "b/x-000.tar"]]
    assert shards.expand([f"{tree}/c/shards.txt"]) == expected
    assert shards.expand([f"{tree}/c/shards.txt", f"{tree}/c/more.list"]) == expected


def test_expand_a_list_file_in_a_folder_with_wildcards_in_its_name(tree, monkeypatch):
    (tree / "a").rename(tree / "[a]{1}")
    (tree / "[a]{1}" / "shards.txt").write_text("x-{000..001}.tar\nsub/*.tar\n*.tgz\n")
    expected = [f"{tree}/[a]{{1}}/{name}" for name in ("x-000.tar", "x-001.tar", "sub/z.tar", "x-010.tgz")]
    monkeypatch.chdir(tree / "[a]{1}")
    assert shards.expand(["shards.txt"]) == expected


def test_what_expand_refuses(tree):
    (tree / "empty.txt").write_text("# nothing\n")
    (tree / "loop.txt").write_text("loop.txt\n")
    (tree / "image.txt").write_bytes(b"\xff\xd8\xff")
    expected = {
        (): "no shards given",
        ("",): "no shards given",
        ("empty.txt",): "no shards given",
        ("c",): "c: no shard there",
        ("c/*",): "c/*: no shard there",
        ("a", "q/*.tar"): "q/*.tar: no shard there",
        ("a/x-{0..1.tar",): "a/x-{0..1.tar: ",
        ("missing",): "missing: no such folder or shard",
        ("missing.txt",): f"{tree}/missing.txt: the list file cannot be read (No such file or directory)",
        ("image.txt",): f"{tree}/image.txt: the list file cannot be read",
        ("loop.txt",): f"{tree}/loop.txt: this list file names itself",
        ("ftp://host/a.tar",): "ftp://host: cannot be opened",
    }
    for specs, message in expected.items():
        with pytest.raises(UserError) as error:
            shards.expand(specs)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


# --- object stores


def test_s3(s3_bucket, s3_endpoint, tmp_path):
    content = samples(6)
    plain, packed = write(tmp_path / "a.tar", content), write(tmp_path / "a.tar.gz", content)
    names = ["train/x-000.tar", "train/x-001.tar", "train/x-002.tgz", "val/x-000.tar"]
    uris = [f"{s3_bucket}/data/{name}" for name in names]
    for uri in uris:
        storage.write_atomic(uri, packed if uri.endswith("gz") else plain)
    storage.write_atomic(f"{s3_bucket}/data/train/classnames.json", json.dumps(["cat"]).encode())
    storage.write_atomic(f"{s3_bucket}/data/list.txt", b"val\ntrain/x-{000..001}.tar\n")

    assert shards.expand([f"{s3_bucket}/data/train/x-{{000..001}}.tar"]) == uris[:2]
    assert shards.expand([f"{s3_bucket}/data/train/*.tar"]) == uris[:2]
    assert shards.expand([f"{s3_bucket}/data/*/x-000.tar"]) == [uris[0], uris[3]]
    assert shards.expand([f"{s3_bucket}/d*/val/x-?[0-9]0.tar"]) == [uris[3]]
    assert shards.expand([f"{s3_bucket}/data/train", f"{s3_bucket}/data/{{train,val}}/"]) == uris
    assert shards.expand([f"{s3_bucket}/data/list.txt"]) == [uris[3], *uris[:2]]
    (tmp_path / "local.txt").write_text(f"{uris[3]}\na.tar\n")
    assert shards.expand([str(tmp_path / "local.txt")]) == [uris[3], str(tmp_path / "a.tar")]
    assert shards.expand([f"{s3_bucket}/missing.tar"]) == [f"{s3_bucket}/missing.tar"]

    # The endpoint can also stand in the URI, where the last question mark is then no wildcard.
    options = f"?scheme=http&endpoint_override={s3_endpoint.removeprefix('http://')}"
    assert shards.expand([f"{s3_bucket}/data/train/x-00?.tar{options}"]) == [uri + options for uri in uris[:2]]
    assert shards.expand([f"{s3_bucket}/data/list.txt{options}"]) == [uri + options for uri in (uris[3], *uris[:2])]

    for uri in (uris[0], uris[2], uris[0] + options):
        assert read_all(uri) == (content, None)
    assert list(shards.read(uris[0], limit=2)) == content[:2]
    storage.write_atomic(f"{s3_bucket}/cut.tar", plain[:4000])
    found, error = read_all(f"{s3_bucket}/cut.tar")
    assert found == content[:1]
    assert error == "truncated: no end-of-archive marker, after 1 sample"
    assert read_all(f"{s3_bucket}/missing.tar") == ([], "No such file or directory")

    for spec in (f"{s3_bucket}/none/*.tar", f"{s3_bucket}/none", f"{s3_bucket}/none.txt", f"{s3_bucket}-none/x-*.tar"):
        with pytest.raises(UserError, match=f"^{spec.replace('*', '.')}: "):
            shards.expand([spec])


class Forbidden(http.server.BaseHTTPRequestHandler):
    """What a bucket answers to wrong credentials."""

    def do_HEAD(self) -> None:
        self.send_error(403)

    do_GET = do_HEAD

    def log_message(self, *args) -> None:
        pass


def test_a_bucket_out_of_reach(s3_bucket, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(
            UserError, match=r"^s3://forbidden/a\.tar: cannot be reached \([^\n]*ACCESS_DENIED[^\n]*\)$"
        ):
            shards.expand(["s3://forbidden/{a,b}.tar"])
        with pytest.raises(UserError, match=r"^s3://forbidden/x: cannot be listed \([^\n]*ACCESS_DENIED[^\n]*\)$"):
            shards.expand(["s3://forbidden/x/*.tar"])
        found, error = read_all("s3://forbidden/a.tar")
        assert found == []
        assert "ACCESS_DENIED" in error
        server.shutdown()


def test_odd_files_in_a_folder_of_images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "lost.png").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.png")  # which never ends
    (tmp_path / "notes.txt").touch()
    found = {sample.key: sample for sample in shards.read(str(tmp_path))}
    assert list(found) == ["a.png", "link.png", "lost.png"]
    assert found["lost.png"] == Reject("lost.png", "cannot be read: No such file or directory")


def test_a_name_that_is_no_utf_8_is_refused_by_name(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.tar"
    with open(path, "wb"):
        pass
    with pytest.raises(UserError, match=r"the name of 'caf\\udce9.tar' in it is no UTF-8; rename it"):
        shards.expand([str(tmp_path)])
    with pytest.raises(UnicodeEncodeError):  # of which jobs make one line (`patchrank.errors.run`)
        shards.expand([os.fsdecode(path)])
