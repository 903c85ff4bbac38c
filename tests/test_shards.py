"""Finding and reading shards, and decoding their images: real tars, real damage, a real S3 server."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import random
import struct
import subprocess
import tarfile
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from patchrank import images, shards, storage
from patchrank.errors import UserError
from patchrank.shards import Reject, Sample, ShardError

pytest_plugins = ["s3"]

DUPLICATE = "duplicate key in this shard; the first one was kept"


def tar(*files: tuple[str, bytes], **options) -> bytes:
    """A tar with these files, in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def samples(count: int, size: int = 700) -> list[Sample]:
    """Samples of random bytes, of sizes that do and do not fill the last block of a tar."""
    source = random.Random(0)
    return [Sample(f"{i:04d}", source.randbytes(size + 300 * (i % 3)), i % 10) for i in range(count)]


def write(path: Path, content: list[Sample]) -> bytes:
    """Write a shard with WebDataset's own writer. Its bytes."""
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for sample in content:
            writer.write({"__key__": sample.key, "jpg": sample.image, "cls": sample.label})
    return path.read_bytes()


def read_all(path: Path | str) -> tuple[list[Sample | Reject], str | None]:
    """What is read of a shard, and the error at its end."""
    found = []
    try:
        for sample in shards.read(str(path)):
            found.append(sample)
    except ShardError as error:
        assert "\n" not in str(error)
        return found, str(error)
    return found, None


@pytest.fixture
def read_tar(tmp_path):
    """A function that reads a tar given as bytes."""

    def read(content: bytes) -> tuple[list[Sample | Reject], str | None]:
        path = tmp_path / "shard.tar"
        path.write_bytes(content)
        return read_all(path)

    return read


# --- read: what a sample is


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "no-suffix"])
def test_reads_what_webdataset_writes(tmp_path, name):
    content = samples(20)
    write(tmp_path / name, content)
    assert read_all(tmp_path / name) == (content, None)
    assert list(shards.read(f"file://{tmp_path}/{name}", limit=7)) == content[:7]
    assert list(shards.read(str(tmp_path / name), limit=0)) == []


def test_gzip_is_told_by_content(read_tar):
    assert read_tar(gzip.compress(tar(("a.png", b"x")))) == ([Sample("a", b"x", None)], None)


def test_reads_what_gnu_tar_writes(tmp_path):
    """With a folder as a member, ./ in front of names, and a name over 100 characters."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    (folder / "0123456789.webp").write_bytes(b"image")
    (folder / "0123456789.cls").write_text("3")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "a.tar", "-C", tmp_path, f"./{folder.name}"], check=True)
    assert read_all(tmp_path / "a.tar") == ([Sample(f"./{folder.name}/0123456789", b"image", 3)], None)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG", "Png"])
def test_image_extensions(read_tar, extension):
    assert read_tar(tar((f"a.{extension}", b"image"), ("a.CLS", b"1"))) == ([Sample("a", b"image", 1)], None)


def test_other_files_are_ignored(read_tar):
    content = tar(
        ("a.md", b"?"), ("a.png", b"1"), ("a.seg.png", b"?"), ("._a.png", b"?"), ("d/._a.png", b"?"), ("a.cls", b"1")
    )
    assert read_tar(content) == ([Sample("a", b"1", 1)], None)


def test_several_images_in_a_sample(read_tar):
    """The photo, not the mask, wherever it stands."""
    content = tar(("a.png", b"mask"), ("a.jpg", b"photo"), ("b.jpeg", b"photo"), ("b.webp", b"?"), ("b.png", b"mask"))
    assert read_tar(content) == ([Sample("a", b"photo", None), Sample("b", b"photo", None)], None)


def test_keys_have_the_path_up_to_the_first_dot_of_the_name(read_tar):
    names = ["v1.0/x/a.jpg", "/etc/passwd.jpg", "../../up.jpg", "a b\nc.jpg", "ü.jpg"]
    found, error = read_tar(tar(*((name, b"i") for name in names)))
    assert error is None
    assert [sample.key for sample in found] == ["v1.0/x/a", "/etc/passwd", "../../up", "a b\nc", "ü"]


def test_a_key_that_is_not_utf8_can_be_stored(read_tar):
    content = tar(("caf\udce9.jpg", b"i"), format=tarfile.GNU_FORMAT, errors="surrogateescape")
    assert b"caf\xe9.jpg" in content
    assert read_tar(content) == ([Sample("caf\\xe9", b"i", None)], None)


def test_links_and_folders_are_not_images(read_tar):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert read_tar(stream.getvalue()) == ([], None)


LABELS = [
    ({"cls": b"7"}, 7),
    ({"cls": b" 42\r\n"}, 42),
    ({"cls": b"-1"}, -1),
    ({"json": b'{"label": 3, "x": 1.5}'}, 3),
    ({"json": b'{"label": "04"}'}, 4),
    ({"json": b'{"label": null}'}, None),
    ({"json": b'{"width": 224}'}, None),
    ({"json": b"[1, 2]"}, None),
    ({"json": b'{"label": 3}', "cls": b"5"}, 5),
    ({"json": b"{broken", "cls": b"5"}, 5),
    ({}, None),
]


@pytest.mark.parametrize(("files", "label"), LABELS)
def test_labels(read_tar, files, label):
    content = tar(("a.jpg", b"i"), *((f"a.{extension}", text) for extension, text in files.items()))
    assert read_tar(content) == ([Sample("a", b"i", label)], None)


CAPTIONS = [
    ({"txt": b" a cat \n\nit sleeps\n"}, ("a cat", "it sleeps")),
    ({"json": b'{"caption": "a cat"}'}, ("a cat",)),
    ({"json": b'{"captions": ["a cat", 3, " "]}'}, ("a cat",)),
    ({"json": b'{"captions": ["a cat"]}', "txt": b"a dog"}, ("a dog",)),
    ({"json": b"{broken", "cls": b"5"}, ()),
    ({"txt": b"\xff"}, ("\ufffd",)),
    ({"txt": b"x" * (1 << 20) + b"x"}, ()),  # no caption, but no reason to lose the image
]


@pytest.mark.parametrize(("files", "captions"), CAPTIONS)
def test_captions(read_tar, files, captions):
    content = tar(("a.jpg", b"i"), *((f"a.{extension}", text) for extension, text in files.items()))
    (sample,), error = read_tar(content)
    assert error is None and (sample.image, sample.captions) == (b"i", captions)


UNREADABLE = [
    ({"cls": b"cat"}, "the label is not an integer of up to nine digits: 'cat'"),
    ({"cls": b""}, "the label is not an integer of up to nine digits: ''"),
    ({"cls": b"3.0"}, "the label is not an integer of up to nine digits: '3.0'"),
    ({"cls": b"1_0"}, "the label is not an integer of up to nine digits: '1_0'"),
    ({"cls": "٣".encode()}, "the label is not an integer of up to nine digits: '٣'"),
    ({"cls": b"99999999999"}, "the label is not an integer of up to nine digits: '99999999999'"),
    ({"cls": b"\xff\n\n" * 200}, "the label is not an integer of up to nine digits: "),
    ({"cls": b"cat", "json": b'{"label": 3}'}, "the label is not an integer of up to nine digits: 'cat'"),
    ({"json": b'{"label": 3.5}'}, "the label is not an integer of up to nine digits: '3.5'"),
    ({"json": b'{"label": true}'}, "the label is not an integer of up to nine digits: 'true'"),
    ({"json": b'{"label": [3]}'}, "the label is not an integer of up to nine digits: '[3]'"),
    ({"json": b'{"label": 3'}, "the sample's json cannot be read: "),
    ({"json": b"\xff\xfe{"}, "the sample's json cannot be read: "),
    ({"json": b"[" * 100_000}, "the sample's json cannot be read: "),
]


@pytest.mark.parametrize(("files", "reason"), UNREADABLE)
def test_unreadable_labels_are_rejected(read_tar, files, reason):
    bad = [(f"a.{extension}", text) for extension, text in files.items()]
    (reject, good), error = read_tar(tar(("a.jpg", b"i"), *bad, ("b.jpg", b"j"), ("b.cls", b"1")))
    assert (reject.key, good, error) == ("a", Sample("b", b"j", 1), None)
    assert reject.reason.startswith(reason)
    assert "\n" not in reject.reason
    assert len(reject.reason) < 200


def test_a_sample_without_an_image_is_rejected(read_tar):
    (reject, good), error = read_tar(tar(("a.b.jpg", b"i"), ("a.cls", b"1"), ("b.jpg", b"j")))
    assert reject == Reject("a", "no image (jpg, jpeg, png, webp) in the sample, only b.jpg, cls")
    assert (good, error) == (Sample("b", b"j", None), None)


def test_duplicates_next_to_each_other(read_tar):
    content = tar(("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2"), ("a.JPG", b"3"), ("b.jpg", b"4"))
    duplicate = Reject("a", DUPLICATE)
    assert read_tar(content) == ([Sample("a", b"1", 1), duplicate, duplicate, Sample("b", b"4", None)], None)


def test_duplicates_apart(read_tar):
    content = tar(("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.cls", b"3"), ("b.cls", b"2"))
    found = [Sample("a", b"1", 1), Sample("b", b"2", None), Reject("a", DUPLICATE), Reject("b", DUPLICATE)]
    assert read_tar(content) == (found, None)


def test_a_good_sample_after_a_rejected_one_of_its_key_is_kept(read_tar):
    (reject, sample), error = read_tar(tar(("a.jpg", b"1"), ("a.cls", b"?"), ("a.jpg", b"2"), ("a.cls", b"2")))
    assert (type(reject), sample, error) == (Reject, Sample("a", b"2", 2), None)


def test_the_limit_counts_rejects(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(("a.cls", b"1"), ("b.jpg", b"1"), ("c.jpg", b"1")))
    found = list(shards.read(str(tmp_path / "a.tar"), limit=2))
    assert [(type(sample), sample.key) for sample in found] == [(Reject, "a"), (Sample, "b")]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_memory_does_not_grow_with_the_shard(tmp_path, suffix):
    image = bytes(1 << 20)
    path = tmp_path / f"a{suffix}"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(64):
            writer.write({"__key__": str(i), "jpg": image, "mp4": image * (32 if i == 5 else 0)})
    tracemalloc.start()
    try:
        assert sum(isinstance(sample, Sample) for sample in shards.read(str(path))) == 64
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# --- read: damage


def test_every_cut_of_a_plain_tar_is_noticed(tmp_path, read_tar):
    content = samples(5)
    whole = write(tmp_path / "whole.tar", content)
    with tarfile.open(tmp_path / "whole.tar") as archive:
        members = archive.getmembers()  # jpg and cls of each sample in turn, cls first
        end = archive.offset  # of the first of the two zero blocks
    starts = [member.offset for member in members]
    cuts = {
        0,
        1,
        end + 1023,
        *range(7, end + 1024, 211),
        *(b + d for b in range(512, end + 1024, 512) for d in (-1, 0, 1)),
    }
    for cut in sorted(cuts - {end + 1024, end + 1025}):
        found, error = read_tar(whole[:cut])
        assert error, cut
        # A sample is complete for sure when the next one, or the end of the archive, has begun.
        complete = sum(cut >= start + 512 for start in [*starts[2::2], end])
        assert found == content[:complete], cut
        if cut:
            plural = "s" * (complete != 1)
            assert "truncated" in error, cut
            assert error.endswith(f"after {complete} sample{plural}"), cut
    for cut in (end + 1024, end + 1025, len(whole)):  # a complete end-of-archive marker: nothing is missing
        assert read_tar(whole[:cut]) == (content, None)


def test_every_cut_of_a_gzipped_tar_is_noticed(tmp_path, read_tar):
    content = samples(5)
    whole = write(tmp_path / "whole.tar.gz", content)
    for cut in [*range(0, len(whole), 97), *range(len(whole) - 9, len(whole))]:
        found, error = read_tar(whole[:cut])
        assert error, cut
        assert found == content[: len(found)]
    assert found == content  # only the checksum at the very end is missing
    assert error == "Compressed file ended before the end-of-stream marker was reached, after 5 samples"


def test_damaged_gzip(tmp_path, read_tar):
    content = samples(5)
    whole = bytearray(write(tmp_path / "whole.tar.gz", content))
    whole[len(whole) // 2] ^= 0xFF
    found, error = read_tar(bytes(whole))
    assert "after" in error
    assert found[0] == content[0]
    checksum = bytearray(write(tmp_path / "whole.tar.gz", content))
    checksum[-6] ^= 0xFF
    found, error = read_tar(bytes(checksum))
    assert found == content
    assert error.startswith("CRC check failed")


def test_a_damaged_header_is_not_the_end(tmp_path, read_tar):
    content = samples(5)
    whole = bytearray(write(tmp_path / "whole.tar", content))
    with tarfile.open(tmp_path / "whole.tar") as archive:
        whole[archive.getmembers()[6].offset] ^= 1  # the first file of the fourth sample
    assert read_tar(bytes(whole)) == (content[:2], "damaged: bad checksum, after 2 samples")


def test_joined_tars_are_not_half_read(read_tar):
    found, error = read_tar(tar(("a.jpg", b"1")) + tar(("b.jpg", b"2")))
    assert found == [Sample("a", b"1", None)]
    assert error == "data after the end-of-archive marker, as if several tars had been joined, after 1 sample"


def test_damage_after_the_limit_does_not_matter(tmp_path):
    content = samples(5)
    (tmp_path / "cut.tar").write_bytes(write(tmp_path / "whole.tar", content)[:9000])
    assert list(shards.read(str(tmp_path / "cut.tar"), limit=2)) == content[:2]


def test_an_empty_tar_is_an_empty_shard(read_tar):
    assert read_tar(tar()) == ([], None)
    assert read_tar(gzip.compress(tar())) == ([], None)


def test_what_is_not_a_shard(tmp_path, read_tar):
    assert read_tar(b"") == ([], "the file is empty")
    assert read_tar(b"<html>404</html>") == (
        [],
        "not a tar, or truncated: no end-of-archive marker, after 0 samples",
    )
    assert read_tar(b"text " * 1000) == ([], "not a tar, or damaged: invalid header, after 0 samples")
    assert read_tar(gzip.compress(b"text " * 1000)) == ([], "not a tar, or damaged: invalid header, after 0 samples")
    assert read_all(tmp_path / "missing.tar") == ([], "No such file or directory")
    assert "is a directory" in read_all(tmp_path)[1]
    assert "ftp" in read_all("ftp://host/a.tar")[1]


def test_nonsense_in_a_tar_never_escapes_as_another_error(read_tar):
    """Random damage, with the headers' checksums put right so that it gets past them."""
    source = random.Random(0)
    files = [(f"{'long/' * 30 * (i % 2)}{i}.{extension}", b"123") for i in range(4) for extension in ("jpg", "cls")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = tar(*files, format=form)
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(3):
                content[source.randrange(len(files) * 1024)] = source.choice((0, 0x20, 0x39, 0x80, 0xFF))
            for start in range(0, len(content), 512):
                block = content[start : start + 512]
                if block[257:262] == b"ustar":
                    content[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
            read_tar(bytes(content))  # fails on any exception but a one-line ShardError


# --- expand


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


# --- images


def encode(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png(pixels: np.ndarray, color_type: int, bits: int = 16, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of (H, W, C) pixels, for what Pillow does not write; `size`: what the header says instead."""
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)
    width, height = size or (pixels.shape[1], pixels.shape[0])
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PIXELS = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, 4), dtype=np.uint16)
GRAY, GRAY_ALPHA, RGB, RGBA = PIXELS[..., :1], PIXELS[..., :2], PIXELS[..., :3], PIXELS


def three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray.reshape(5, 7, 1), 3, axis=2)


DEEP = {
    "png gray": (png(GRAY, 0), three(GRAY >> 8)),
    "png gray alpha": (png(GRAY_ALPHA, 4), three(GRAY >> 8)),
    "png rgb": (png(RGB, 2), RGB >> 8),
    "png rgba": (png(RGBA, 6), RGB >> 8),
    "tiff I;16": (encode(Image.fromarray(GRAY[..., 0]), "TIFF"), three(GRAY >> 8)),
    "tiff I;16B": (
        encode(Image.frombytes("I;16B", (7, 5), GRAY.astype(">u2").tobytes()), "TIFF"),
        three(GRAY >> 8),
    ),
    "tiff I": (encode(Image.fromarray(GRAY[..., 0].astype(np.int32)), "TIFF"), three(GRAY >> 8)),
}


@pytest.mark.parametrize("name", DEEP)
def test_sixteen_bits_become_eight(name):
    data, expected = DEEP[name]
    image = images.decode(data)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_cmyk_jpeg():
    """Cyan, and a dark orange: inverted or ignored inks would be far off."""
    for cmyk, rgb in (((255, 0, 0, 0), (0, 255, 255)), ((0, 128, 255, 128), (127, 63, 0))):
        image = images.decode(encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100))
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[8, 8], rgb, atol=4)


@pytest.mark.filterwarnings("error")
def test_modes_of_eight_bits_and_less():
    rgb = (RGB >> 8).astype(np.uint8)
    photo = Image.fromarray(rgb)
    gray = Image.fromarray(rgb[..., 0])
    with_alpha = photo.copy()
    with_alpha.putalpha(77)
    palette = photo.quantize(256)
    two = gray.point(lambda value: 255 * (value > 99)).convert("1")
    lossless = {
        "png": (encode(photo, "PNG"), rgb),
        "webp": (encode(photo, "WEBP", lossless=True), rgb),
        "bmp": (encode(photo, "BMP"), rgb),
        "gray": (encode(gray, "PNG"), three(rgb[..., 0])),
        "gray alpha": (encode(gray.convert("LA"), "PNG"), three(rgb[..., 0])),
        "alpha": (encode(with_alpha, "PNG"), rgb),
        "palette": (encode(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "transparent palette": (encode(palette, "PNG", transparency=bytes(256)), np.asarray(palette.convert("RGB"))),
        "gif": (encode(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        "one bit": (encode(two, "PNG"), three(np.asarray(two) * 255)),
    }
    for name, (data, expected) in lossless.items():
        image = images.decode(data)
        assert image.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)


def test_truncated_images_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(noise, form)
        images.decode(data)
        # The last bytes of a PNG are checksums and its end chunk: without them the pixels are still all there.
        for cut in [*range(0, len(data) - 25, len(data) // 40), len(data) - 25]:
            with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
                images.decode(data[:cut])


HUGE = {"over the limit": (10_000, 10_000), "over twice the limit": (20_000, 10_000)}


@pytest.mark.parametrize("size", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bombs_are_refused(size, action, recwarn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [(action, None, Warning, None, 0)])
        with pytest.raises(ValueError, match=rf"({size[0] * size[1]} pixels|{size[0] * size[1]}).* limit"):
            images.decode(png(RGB, 2, 8, size))


def test_what_is_not_an_image():
    for data in (b"", b"a text named .jpg\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", tar()):
        with pytest.raises(ValueError, match=r"^not an image"):
            images.decode(data)
    unknown_range = (np.full((2, 2), 70_000, np.int32), np.full((2, 2), -1, np.int32), np.zeros((2, 2), np.float32))
    for pixels in unknown_range:
        with pytest.raises(ValueError, match="no known range"):
            images.decode(encode(Image.fromarray(pixels), "TIFF"))
