"""Inputs that people really have, kind by kind, and the right value or message of each; nothing is wrong in silence.

Others of these kinds: images in tests/data/test_images.py and tests/model/test_preprocessing.py, labels and captions in
tests/data/test_shards.py, CSV files and links in tests/jobs/test_make_shards.py, files in a folder of rankings in
tests/store/test_strange_files.py, checkpoints in tests/model/test_checkpoint.py, messages in tests/test_odd_messages.py
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from here import ROOT
from PIL import Image

from patchrank.data import images, shard_writer, shards
from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.store import storage, text


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
    "Excel's floats": ("path,label\na,1.00E+01\nb,2.00E+00\n", [10, 2]),
    "joined files": ("\ufeffpath,label\na,\ufeff3\n", [3]),
    "quotes": ('"path","label"\n"a, b","3"\n', [3]),
    "lines of CR": ("path,label\ra,3\r", [3]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_labels_of_a_csv(tmp_path, kind, capsys):
    content, labels = ROWS[kind]
    assert from_csv(tmp_path, content) == (labels, None)
    assert not capsys.readouterr().err


REFUSED = {
    "floats": ("path,label\na,0.5\nb,1.5\n", "label 0.5 is a number, but not an integer of up to nine digits"),
    "large": ("path,label\na,12345678901\nb,1\n", "label 12345678901 is a number, but not an integer of up to"),
    "both": ("path,label\na,1\nb,ant\n", "labels are either integers or names, but there are '1' and 'ant'"),
    "nan": ("path,label\na,1\nb,nan\n", "label nan is none; leave it empty where an image has none"),
    "NaN among names": ("path,label\na,ant\nb,NaN\n", "label NaN is none"),
    "a quote not closed": ('path,label\na,"ant\nb,bee\n', "cannot be read (a quote is not closed)"),
    "a quote closed late": ('path,label\na,"ant\nb,bee"\nc,cat\n', "line 3: a line break in 'ant\\nb,bee': a quote"),
    "tabs": ("path\tlabel\na\t1\n", "separate columns by commas, not by '\\t'"),
    "nothing": ("", "its first line is blank, and names the columns: path and others"),
    "a blank line": ("\npath,label\na,1\n", "its first line is blank"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a pointer of Git LFS, not the file"),
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


@pytest.mark.parametrize("label", ["3,0", "1_0", "1 000", "٣", "1.0e1"])
def test_names_that_look_like_numbers_are_told(tmp_path, capsys, label):
    assert from_csv(tmp_path, f'path,label\na,"{label}"\n') == ([0], [label])
    assert f"label {label} is taken for the name of a class, not for a number" in capsys.readouterr().err


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
    assert shards.expand([f"{tmp_path}//a.tar/", f"file://{tmp_path}/./a.tar"]) == [f"{tmp_path}/a.tar"]


@pytest.mark.parametrize("uri", ["s3://b//d/a.tar", "s3://b/d/a.tar/", "s3://b/d/x/../a.tar", "s3://b/./d//a.tar"])
def test_a_bucket_s_shard_has_one_name(uri):
    assert (
        storage.absolute(uri) == "s3://b/d/a.tar" and storage.absolute(f"{uri}?region=x") == "s3://b/d/a.tar?region=x"
    )
    assert storage.absolute("https://h//a/../b") == "https://h//a/../b"  # a server may mean something by it


def test_prototypes_of_images_without_labels_are_refused():
    with pytest.raises(UserError, match="--prototypes: no image in these shards has a label"):
        classes.from_sums(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "x")


NUMBERS = {
    **{"7": 7, " 42\r\n": 42, "-1": -1, "3.0": 3, "04": 4, "+3": 3, "-0.0": 0, "1.10e+01": 11, "1e+09": None},
    **{
        "1.10E+01": 11,
        "999999999": 999_999_999,
        "1000000000": None,
        "3.5": None,
        "1_0": None,
        "٣": None,
        "": None,
        "1e5": None,
    },
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


NAMES_FILES = {
    "marks inside": ("ant\n\ufeffbee\n", ["ant", "bee"]),
    "JSON named .txt": ('["ant", "bee"]', ["ant", "bee"]),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a pointer of Git LFS, not the file"),
    "a web page": ("<!-- 1 --><!doctype html>", "a web page, not the file itself"),
    "deep JSON": ('["' + "[" * 100_000, "not JSON: "),
}


@pytest.mark.parametrize("kind", NAMES_FILES)
def test_files_of_class_names(tmp_path, kind):
    content, expected = NAMES_FILES[kind]
    (tmp_path / "names.txt").write_text(content)
    if isinstance(expected, list):
        assert classes.read_names(str(tmp_path / "names.txt")) == expected
        return
    with pytest.raises(UserError, match=f"names.txt: {expected}"):
        classes.read_names(str(tmp_path / "names.txt"))


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
def test_integers_of_more_than_8_bits(kind):
    pixels, expected = WIDE[kind]
    found = np.asarray(images.decode(encoded(Image.fromarray(pixels.reshape(14, 18)), "TIFF")))
    np.testing.assert_array_equal(found, np.repeat(expected.reshape(14, 18, 1), 3, axis=2))


def test_white_may_be_zero_in_16_bits():
    """Pillow minds that in fewer bits alone."""
    gray = np.arange(252, dtype=np.uint16).reshape(14, 18)
    data = encoded(Image.fromarray(0xFFFF - gray * 257), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(np.asarray(images.decode(data))[..., 0], gray)


@pytest.mark.parametrize(
    "pixels", [np.float32([[0.5]]), np.int32([[-1]]), np.int32([[1 << 16]]), np.int32([[1 << 30]])]
)
def test_pixels_of_no_known_range_are_refused(pixels):
    with pytest.raises(ValueError, match="pixels have no known range"):
        images.decode(encoded(Image.fromarray(pixels), "TIFF"))
