"""Reading shards: real tars, real damage."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import tarfile
import tracemalloc

import pytest
import webdataset
from PIL import Image
from tiny_shards import read_all, samples, tar, write

from patchrank.data import shards
from patchrank.data.shards import Sample
from patchrank.errors import UserError
from patchrank.store.folder import Reject

DUPLICATE = "duplicate key in this shard; the first one was kept"


@pytest.fixture
def read_tar(tmp_path):
    """A function that reads a tar given as bytes."""

    def read(content: bytes) -> tuple[list[Sample | Reject], str | None]:
        path = tmp_path / "shard.tar"
        path.write_bytes(content)
        return read_all(path)

    return read


# --- what a sample is


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
    ({"cls": b"3.0"}, 3),
    ({"cls": "\ufeff7".encode()}, 7),
    ({"cls": "7\n".encode("utf-16")}, 7),
    ({"json": b'{"label": 12.0}'}, 12),
    ({"json": '\ufeff{"label": 3}'.encode()}, 3),
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
    ({"json": b'{"caption": "a cat \\ud83d"}'}, ("a cat \ufffd",)),
    ({"json": b'{"captions": ["\\ud83d\\ude3a", "\\udcff"]}'}, ("\U0001f63a", "\ufffd")),
    ({"txt": "a cat".encode("utf-16-be")}, ("\ufffda\ufffd \ufffdc\ufffda\ufffdt",)),
    ({"txt": "a cat\x85it\u2028sleeps\r\n\rhere".encode()}, ("a cat\x85it\u2028sleeps", "here")),
    ({"txt": "\ufeffa cat".encode()}, ("a cat",)),
    ({"txt": "a cat".encode("utf-16")}, ("a cat",)),
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
    ({"cls": b"3.5"}, "the label is not an integer of up to nine digits: '3.5'"),
    ({"cls": b"1_0"}, "the label is not an integer of up to nine digits: '1_0'"),
    ({"cls": "٣".encode()}, "the label is not an integer of up to nine digits: '٣'"),
    ({"cls": b"99999999999"}, "the label is not an integer of up to nine digits: '99999999999'"),
    ({"cls": b"\xff\n\n" * 200}, "the sample's cls is neither UTF-8 nor UTF-16 with its mark: byte 1 of 600 is wrong"),
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
    told = "; a key ends at the first dot of the file name"
    assert reject == Reject("a", f"no image (jpg, jpeg, png, webp) in the sample, only b.jpg, cls{told}")
    assert (good, error) == (Sample("b", b"j", None), None)


@pytest.mark.parametrize("magic, program", [(b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"), (b"BZh9", "bzip2")])
def test_other_compressions_are_named(read_tar, magic, program):
    _, error = read_tar(magic + b"x" * 2000)
    assert error.startswith(f"compressed by {program}, and tars are read plain or by gzip")


def test_labels_after_all_images_are_said_to_be_apart(read_tar):
    samples, error = read_tar(tar(("a.jpg", b"i"), ("b.jpg", b"j"), ("a.cls", b"1"), ("b.cls", b"2")))
    reason = "only cls here, and its image came before: a sample's files must be adjacent"
    assert samples[2:] == [Reject("a", reason), Reject("b", reason)] and error is None


def test_duplicates_next_to_each_other(read_tar):
    content = tar(("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2"), ("a.JPG", b"3"), ("b.jpg", b"4"))
    duplicate = Reject("a", DUPLICATE)
    assert read_tar(content) == ([Sample("a", b"1", 1), duplicate, duplicate, Sample("b", b"4", None)], None)


def test_duplicates_apart(read_tar):
    content = tar(("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.cls", b"3"), ("b.cls", b"2"))
    apart = Reject("b", "only cls here, and its image came before: a sample's files must be adjacent")
    found = [Sample("a", b"1", 1), Sample("b", b"2", None), Reject("a", DUPLICATE), apart]
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


def test_photos_are_what_can_be_decoded(tmp_path):
    stream = io.BytesIO()
    Image.new("L", (3, 2), 7).save(stream, "PNG")
    whole = tar(("a.png", b"no image"), ("b.cls", b"1"), ("c.png", stream.getvalue()), ("d.png", b""))
    (tmp_path / "a.tar").write_bytes(whole)
    ((key, photo),) = shards.photos(str(tmp_path / "a.tar"))
    assert (key, photo.mode, photo.size) == ("c", "RGB", (3, 2))
    (tmp_path / "a.tar").write_bytes(whole[:-9000])
    with pytest.raises(UserError, match=f"^{tmp_path}/a.tar: truncated"):
        list(shards.photos(str(tmp_path / "a.tar")))


# --- damage


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
    assert read_tar(b"<html>404</html>") == ([], "a web page, not the file itself: download it again")
    assert read_tar(b"not found") == ([], "a text that begins 'not found', not the file itself: download it again")
    noise = bytes(range(1, 256)) * 9
    assert read_tar(noise) == ([], "not a tar, or damaged: invalid header, after 0 samples")
    assert read_tar(gzip.compress(noise)) == ([], "not a tar, or damaged: invalid header, after 0 samples")
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
