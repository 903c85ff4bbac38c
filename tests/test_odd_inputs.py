"""Inputs that people really have, kind by kind, and the right value or message of each; nothing is wrong in silence.

Others of these kinds: images in tests/data/test_images.py and tests/model/test_preprocessing.py, labels and captions in
tests/data/test_shards.py, CSV files and links in tests/jobs/test_make_shards.py, files in a folder of rankings in
tests/store/test_strange_files.py, checkpoints in tests/model/test_checkpoint.py.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from here import ROOT
from PIL import Image
from tiny_shards import tar

from patchrank import flags
from patchrank.data import images, shard_writer, shards
from patchrank.errors import UserError
from patchrank.model import checkpoint, classes
from patchrank.store import text
from patchrank.store.folder import Reject


def encoded(image, form="PNG", **options):
    image.save(stream := io.BytesIO(), form, **options)
    return stream.getvalue()


# --- D: images of any shape cost themselves alone

# Peak memory is of a process, so they get one of their own.
SHAPES = """
import io, resource, sys
from PIL import Image
from patchrank.data import decoding
from patchrank.model.preprocessing import Preprocess

transform = Preprocess({"size": (224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for given in sys.argv[1:]:
    form, mode, width, height = given.split()
    colour = {"RGB": (9, 120, 250), "L": 99, "I;16": 99 * 256}[mode]
    Image.new(mode, (int(width), int(height)), colour).save(stream := io.BytesIO(), form)
    found = decoding.pixels(stream.getvalue(), transform)
    low, high = (((found.amin((1, 2)), found.amax((1, 2)))[i] + 1) * 127.5 for i in (0, 1))
    print(given, tuple(found.shape), low.round().int().tolist(), high.round().int().tolist())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
COLOUR, GRAY = [9, 120, 250], [99, 99, 99]
SHAPED = {
    "PNG RGB 65000 1": COLOUR,
    "PNG RGB 1 3000000": COLOUR,
    "PNG I;16 1 500000": GRAY,
    "GIF L 1 60000": GRAY,
    "BMP L 40000 3": GRAY,
    "TIFF RGB 2 700000": COLOUR,
    "WEBP L 16383 1": GRAY,
}


def test_images_of_any_shape_have_their_pixels_in_bounded_memory():
    command = [sys.executable, "-c", SHAPES, *SHAPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, megabytes = done.stdout.splitlines()
    assert lines == [f"{given} (3, 224, 224) {colour} {colour}" for given, colour in SHAPED.items()]
    assert int(megabytes) < 300


def test_tiles_larger_than_any_image_are_refused():
    """Ten by ten pixels, in one tile of a gigabyte."""
    header = struct.Struct("<HHII")
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32000, 323: 32000, 324: 200, 325: 9}
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(header.pack(tag, 4, 1, tags[tag]) for tag in tags)
    with pytest.raises(ValueError, match=r"1024000000 pixels exceed the limit of 89478485 \(--max-pixels\)"):
        images.decode(data.ljust(200, b"\0") + bytes(9))


# --- E: labels


def from_csv(tmp_path, content, **options):
    """Labels of the images of a CSV file, and its class names."""
    (tmp_path / "list.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    files, names = shard_writer.from_csv(str(tmp_path / "list.csv"), **options)
    return [file.label for file in files], names


ROWS = {
    "pandas": ("path,label\na,0.0\nb,2.0\nc,10.0\nd,\n", [0, 2, 10, None]),
    "numpy": ("path,label\na,0.000000000000000000e+00\nb,1.100000000000000000e+01\n", [0, 11]),
    "zeros before": ("path,label\na,01\nb,1\nc,+2\n", [1, 1, 2]),
    "spaces": ("path, label \na, 3\nb,4 \n", [3, 4]),
    "UTF-16": ("path,label\na,3\n".encode("utf-16"), [3]),
    "a mark": ("path,label\na,3\n".encode("utf-8-sig"), [3]),
    "Excel": ("path,label,,\r\na,3,,\r\n", [3]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_labels_of_a_csv(tmp_path, kind, capsys):
    content, labels = ROWS[kind]
    assert from_csv(tmp_path, content) == (labels, None)
    assert not capsys.readouterr().err


REFUSED = {
    "floats": ("path,label\na,0.5\nb,1.5\n", "label 0.5 is a number, but not an integer of up to nine digits"),
    "large": ("path,label\na,12345678901\nb,1\n", "label 12345678901 is a number, but not an integer of up to"),
    "both": ("path,label\na,1\nb,nan\n", "labels are either integers or names, but there are '1' and 'nan'"),
    "two columns": ("path,label,label\na,1,2\n", "two columns are named 'label': take one out"),
    "commas": ("path,label\na,b.jpg,2\n", "line 2: more fields than the 2 columns; commas in a field need quotes"),
    "semicolons": ("path;label\na;1\n", "no column 'path', only path;label"),
    "capitals": ("Path,Label\na,1\n", "no column 'path', only Path, Label"),
    "UTF-16 without its mark": ("path,label\na,1\n".encode("utf-16-le"), "neither UTF-8 nor UTF-16 with its mark"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_csv_that_would_give_other_labels_is_refused(tmp_path, kind):
    content, words = REFUSED[kind]
    with pytest.raises(UserError) as error:
        from_csv(tmp_path, content)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_labels_in_a_column_of_another_name_are_told(tmp_path, capsys):
    assert from_csv(tmp_path, "path,Label\na,1\n") == ([None], None)
    assert "warning: " in (told := capsys.readouterr().err) and "no column 'label', only Label: no image" in told
    assert from_csv(tmp_path, "path,Label\na,1\n", label_column="Label") == ([1], None)


def test_a_class_folder_by_two_names_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "kitty").symlink_to("cat")
    with pytest.raises(UserError, match="kitty and cat are one folder by two names; an image has one class"):
        shard_writer.from_folders(str(tmp_path))


def test_a_shard_by_two_paths_is_read_once(tmp_path, capsys):
    (tmp_path / "a.tar").touch()
    (tmp_path / "latest.tar").symlink_to("a.tar")
    (tmp_path / "link").symlink_to(tmp_path)
    assert shards.expand([str(tmp_path), str(tmp_path / "link")]) == [f"{tmp_path}/a.tar"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0] == f"warning: {tmp_path}/latest.tar: left out, as it is {tmp_path}/a.tar by another path"


def test_prototypes_of_images_without_labels_are_refused():
    with pytest.raises(UserError, match="--prototypes: no image in these shards has a label"):
        classes.from_sums(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "x")


NUMBERS = {
    **{"7": 7, " 42\r\n": 42, "-1": -1, "3.0": 3, "04": 4, "+3": 3, "-0.0": 0, "1.10e+01": 11, "1e+09": None},
    **{"999999999": 999_999_999, "1000000000": None, "3.5": None, "1_0": None, "٣": None, "": None, "1e5": None},
}


@pytest.mark.parametrize("written", NUMBERS)
def test_labels(written):
    assert text.label(written) == NUMBERS[written]


# --- F: text


NAMES = {
    "utf-8": "ant\nbée\n",
    "utf-8-sig": "ant\nbée\n",
    "utf-16": "ant\r\nbée\r\n",
}
NOT_TEXT = ("utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1", "cp437")


@pytest.mark.parametrize("encoding", [*NAMES, *NOT_TEXT])
def test_class_names_and_list_files(tmp_path, encoding):
    names, listed = tmp_path / "names.txt", tmp_path / "shards.txt"
    names.write_bytes(NAMES.get(encoding, "ant\nbée\n").encode(encoding))
    listed.write_bytes(f"{tmp_path}/bée.tar\n".encode(encoding))
    if encoding in NAMES:
        assert classes.read_names(str(names)) == ["ant", "bée"]
        assert shards.expand([str(listed)]) == [f"{tmp_path}/bée.tar"]
        return
    with pytest.raises(UserError, match="neither UTF-8 nor UTF-16 with its mark: byte"):
        classes.read_names(str(names))
    with pytest.raises(UserError, match="neither UTF-8 nor UTF-16 with its mark: byte"):
        shards.expand([str(listed)])


def test_class_names_keep_their_places(tmp_path):
    """Unicode breaks lines where editors do not; and what is left out gives all that follow another's name."""
    (tmp_path / "names.txt").write_bytes("a\u2028b\rc\x85d\r\ne\n\n".encode())
    assert classes.read_names(str(tmp_path / "names.txt")) == ["a\u2028b", "c\x85d", "e"]
    for content in ("a\n\nc\n", "\na\nb\n", "a\n  \nb"):
        (tmp_path / "names.txt").write_text(content)
        with pytest.raises(UserError, match=r"line [12] is blank; a line is a class, so take it out"):
            classes.read_names(str(tmp_path / "names.txt"))


# --- I: integer images of more than 8 bits


WIDE = {
    "values of 8 bits": (np.arange(252, dtype=np.int32), np.arange(252)),
    "0 and 1": (np.tile(np.array([0, 1], np.int32), 126), np.tile([0, 1], 126)),
    "all 255": (np.full(252, 255, np.int32), np.full(252, 255)),
    "values of 16 bits": (np.arange(252, dtype=np.int32) * 257, np.arange(252)),
    "one above 8 bits": (np.full(252, 256, np.int32), np.ones(252)),
    "16 bits wide": (np.arange(252, dtype=np.uint16) * 257, np.arange(252)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_integers_of_32_bits(kind):
    pixels, expected = WIDE[kind]
    found = np.asarray(images.decode(encoded(Image.fromarray(pixels.reshape(14, 18)), "TIFF")))
    np.testing.assert_array_equal(found, np.repeat(expected.reshape(14, 18, 1), 3, axis=2))


@pytest.mark.parametrize(
    "pixels", [np.float32([[0.5]]), np.int32([[-1]]), np.int32([[1 << 16]]), np.int32([[1 << 30]])]
)
def test_pixels_of_no_known_range_are_refused(pixels):
    with pytest.raises(ValueError, match="pixels have no known range"):
        images.decode(encoded(Image.fromarray(pixels), "TIFF"))


# --- J: messages


def zipped():
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("a.jpg", b"i")
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
NO_TARS = {
    "zip": (zipped(), "a zip file, and shards are tars: unpack it"),
    "Parquet": (b"PAR1" + bytes(900), "a Parquet file, and shards are tars"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(900), "a 7z file, and shards are tars"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(900), "compressed by lz4, and tars are read plain or by gzip: decompress it"),
    "Git LFS": (POINTER, "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"),
    "a web page": (PAGE, "a web page, not the file itself: download it again"),
    "a photo": (encoded(Image.new("RGB", (30, 30))), "not a tar, or "),
    "empty": (b"", "the file is empty"),
    "a gzip of no tar": (gzip.compress(b"words" * 500), "not a tar, or "),
}


@pytest.mark.parametrize("kind", NO_TARS)
def test_what_is_no_tar_is_named(tmp_path, kind):
    content, words = NO_TARS[kind]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(shards.ShardError) as error:
        list(shards.read(str(tmp_path / "a.tar")))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["BZh1.jpg", "PK.jpg", "PAR1.jpg", "<html>.jpg", "Rar!.jpg"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_may_begin_with_any_name(tmp_path, name, form):
    (tmp_path / "a.tar").write_bytes(tar((name, b"i"), format=form))
    ((sample),) = shards.read(str(tmp_path / "a.tar"))
    assert sample.key == name.removesuffix(".jpg")


def test_images_and_weights_that_were_not_fetched_are_named(tmp_path):
    for content, words in ((POINTER, "a pointer of Git LFS"), (PAGE, "a web page")):
        with pytest.raises(ValueError, match=f"^{words}"):
            images.decode(content)
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(UserError, match=f"^--pretrained {tmp_path}/weights.pt: {words}"):
            checkpoint.read(str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("holder", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_found(tmp_path, holder):
    state = {"visual.conv1.weight": torch.ones(2), "logit_scale": torch.ones(1)}
    torch.save({"epoch": 1, holder: {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pt")
    found, wrapped = checkpoint.read(str(tmp_path / "w.pt"))
    assert wrapped and found.keys() == state.keys()


def test_samples_whose_files_or_names_are_not_as_wanted(tmp_path):
    content = tar(("a.v1.jpg", b"i"), ("b.jpg", b"i"), ("c.tiff", b"i"), ("c.txt", b"t"), ("b.json", b"{}"))
    (tmp_path / "a.tar").write_bytes(content)
    none = "no image (jpg, jpeg, png, webp) in the sample, only "
    assert [sample for sample in shards.read(str(tmp_path / "a.tar")) if isinstance(sample, Reject)] == [
        Reject("a", none + "v1.jpg; a key ends at the first dot of the file name"),
        Reject("c", none + "tiff, txt"),
        Reject("b", "only json here, and its image came before: a sample's files must be adjacent"),
    ]


@pytest.mark.parametrize("given", ["~/x", "--out=~/x", "--out ~/x"])
def test_the_home_folder_may_be_written_short(monkeypatch, given):
    monkeypatch.setenv("HOME", "/home/me")
    parser = flags.parser("test", None)
    assert isinstance(parser, argparse.ArgumentParser)
    parser.add_argument("--out")
    parser.add_argument("folder", nargs="?")
    found = vars(parser.parse_args(given.split()))
    assert {value for value in found.values() if value} == {"/home/me/x"}
    assert parser.parse_args(["a~/b", "--out=b/~"]).folder == "a~/b"


def test_json_with_class_names_of_another_kind(tmp_path):
    for content, words in ((json.dumps({"0": "ant"}), "must be a JSON list of names"), ("ant\nbee", "not JSON")):
        (tmp_path / "names.json").write_text(content)
        with pytest.raises(UserError, match=words):
            classes.read_names(str(tmp_path / "names.json"))
