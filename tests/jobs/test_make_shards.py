"""jobs/make_shards.py: from image files to shards and back."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from here import ROOT
from PIL import Image

from jobs.make_shards import main
from patchrank.data import shard_writer, shards
from patchrank.data.shards import Sample
from patchrank.errors import UserError

JOB = ROOT / "jobs" / "make_shards.py"


def save(path: Path, seed: int = 0, size: int = 8) -> bytes:
    """Write a small image file. Its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, path.suffix[1:].upper().replace("JPG", "JPEG"))
    return path.read_bytes()


def read(out: Path) -> list[Sample]:
    """All samples of a folder of shards."""
    found = [sample for uri in shards.expand([str(out)]) for sample in shards.read(uri)]
    assert all(isinstance(sample, Sample) for sample in found)
    return found


def origins(out: Path) -> dict[str, str]:
    """The path that each sample came from, by key."""
    result = {}
    for uri in shards.expand([str(out)]):
        with tarfile.open(uri) as archive:
            for member in archive.getmembers():
                if member.name.endswith(".json"):
                    result[member.name.removesuffix(".json")] = json.load(archive.extractfile(member))["path"]
    return result


@pytest.fixture
def photos(tmp_path) -> dict[str, tuple[bytes, int]]:
    """An ImageFolder tree in PHOTOS: bytes and label by path."""
    names = [
        "cat/0.jpg",
        "cat/deep/er/1.JPEG",
        "bird/2.png",
        "bird/3.webp",
        "dog.v2/4.jpg",
        "dog.v2/a.b.jpg",
        "cat/6.png",
    ]
    labels = {"bird": 0, "cat": 1, "dog.v2": 2}
    tree = {
        name: (save(tmp_path / "photos" / name, seed), labels[name.split("/")[0]]) for seed, name in enumerate(names)
    }
    for name in ("cat/notes.txt", ".hidden/7.jpg", "cat/.8.jpg", "stray.jpg"):
        save(tmp_path / "x.jpg")
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x.jpg").rename(tmp_path / "photos" / name)
    return tree


def test_image_folder(tmp_path, photos, capsys):
    out = tmp_path / "100% out"
    assert (
        main(["--images", f"{tmp_path}/photos", "--out", str(out), "--samples-per-shard", "3", "--prefix", "p.1"]) == 0
    )
    assert sorted(os.listdir(out)) == ["classnames.json", *(f"p.1-{i:06d}.tar" for i in range(3)), "sizes.json"]
    told = json.loads((out / "sizes.json").read_text())
    assert told == {f"p.1-{i:06d}.tar": len(list(shards.read(str(out / f"p.1-{i:06d}.tar")))) for i in range(3)}
    assert json.loads((out / "classnames.json").read_bytes()) == ["bird", "cat", "dog.v2"]
    found, path_of = read(out), origins(out)
    assert [sample.key for sample in found] == [f"{i:09d}" for i in range(7)]
    assert {path_of[sample.key]: (sample.image, sample.label) for sample in found} == photos
    assert [len(list(shards.read(uri))) for uri in shards.expand([str(out)])] == [3, 3, 1]
    assert list(path_of.values()) != sorted(photos)  # shuffled

    summary, following = capsys.readouterr().out.splitlines()
    assert summary == f"images: 7, skipped: 0, shards: 3, folder: {out}"
    command = shlex.split(following.removeprefix("next: "))
    assert command[:2] == ["python", "jobs/search.py"]
    assert command[-4:] == ["--shards", str(out), "--classes", f"{out}/classnames.json"]


def test_order(tmp_path, photos):
    def run(name: str, *options: str) -> list[str]:
        assert main(["--images", f"{tmp_path}/photos", "--out", f"{tmp_path}/{name}", *options]) == 0
        return list(origins(tmp_path / name).values())

    assert run("a", "--no-shuffle") == sorted(photos)
    assert sorted(run("b")) == sorted(run("c", "--shuffle", "1")) == sorted(photos)
    assert run("d", "--shuffle", "0") == run("e")
    assert run("f", "--shuffle", "1") != run("g", "--shuffle", "2")
    # The same input gives the same bytes.
    assert (tmp_path / "b/shard-000000.tar").read_bytes() == (tmp_path / "d/shard-000000.tar").read_bytes()


def csv_shards(tmp_path: Path, text: str, *options: str, encoding: str = "utf-8") -> list[tuple[str, int | None]]:
    """Path and label of the samples that a CSV file gives."""
    (tmp_path / "list.csv").write_text(text, encoding=encoding)
    out = tmp_path / "out"
    assert main(["--csv", str(tmp_path / "list.csv"), "--out", str(out), "--no-shuffle", *options]) == 0
    path_of = origins(out)
    return [(path_of[sample.key], sample.label) for sample in read(out)]


def test_csv_with_integers(tmp_path, photos, capsys):
    text = "id,path,label\n1,photos/cat/0.jpg,12\n2,photos/bird/2.png, 3\n3,photos/cat/6.png,\n"
    expected = [("photos/cat/0.jpg", 12), ("photos/bird/2.png", 3), ("photos/cat/6.png", None)]
    assert csv_shards(tmp_path, text) == expected
    assert not (tmp_path / "out/classnames.json").exists()
    assert capsys.readouterr().out.endswith(f"--shards {tmp_path}/out --prototypes {tmp_path}/out\n")


def test_integers_written_as_floats_are_those_integers(tmp_path, photos):
    rows = [(path, float(2 * number)) for number, path in enumerate(photos)]
    text = "path, label\n" + "".join(f"photos/{path}, {label}\n" for path, label in rows)
    assert csv_shards(tmp_path, text, encoding="utf-16") == [(f"photos/{path}", int(label)) for path, label in rows]
    assert not (tmp_path / "out/classnames.json").exists()


def test_a_folder_is_visited_once_however_links_lead_to_it(tmp_path, photos):
    for number, target in enumerate((tmp_path / "photos", tmp_path / "photos/cat", tmp_path / "photos/bird")):
        (tmp_path / "photos/bird" / f"link-{number}").symlink_to(target)
    save(tmp_path / "elsewhere/9.png")
    for name in ("a", "b"):
        (tmp_path / "photos/cat" / name).symlink_to(tmp_path / "elsewhere")
    assert main(["--images", f"{tmp_path}/photos", "--out", f"{tmp_path}/out"]) == 0
    path_of = origins(tmp_path / "out")
    found = {path_of[sample.key]: sample.label for sample in read(tmp_path / "out")}
    cat = photos["cat/0.jpg"][1]
    assert found == {path: label for path, (_, label) in photos.items()} | {"cat/a/9.png": cat}


def test_csv_with_names_and_other_columns(tmp_path, photos):
    text = 'file,class\r\ncat/0.jpg,"cat, small"\r\nbird/2.png,älg\r\ncat/6.png,"cat, small"\r\n'
    options = ["--path-column", "file", "--label-column", "class", "--root", f"{tmp_path}/photos"]
    expected = [("cat/0.jpg", 0), ("bird/2.png", 1), ("cat/6.png", 0)]
    assert csv_shards(tmp_path, text, *options, encoding="utf-8-sig") == expected
    assert json.loads((tmp_path / "out/classnames.json").read_bytes()) == ["cat, small", "älg"]


def test_csv_without_labels(tmp_path, photos, capsys):
    absolute = f"{tmp_path}/photos/cat/6.png"
    assert csv_shards(tmp_path, f"path\n{absolute}\nphotos/cat/0.jpg\n") == [
        (absolute, None),
        ("photos/cat/0.jpg", None),
    ]
    assert capsys.readouterr().out.endswith(f"--shards {tmp_path}/out\n")


def test_images_that_cannot_be_read_are_skipped(tmp_path, photos, capsys):
    (tmp_path / "photos/cat/text.jpg").write_text("not a photo")
    (tmp_path / "photos/bird/cut.png").write_bytes(photos["bird/2.png"][0][:60])
    (tmp_path / "photos/bird/gone.png").symlink_to("nowhere")
    assert main(["--images", f"{tmp_path}/photos", "--out", f"{tmp_path}/out"]) == 1
    assert sorted(origins(tmp_path / "out").values()) == sorted(photos)
    assert [sample.key for sample in read(tmp_path / "out")] == [f"{i:09d}" for i in range(7)]
    out, err = capsys.readouterr()
    assert out.startswith(f"images: 7, skipped: 3, shards: 1, folder: {tmp_path}/out\n")
    lines = sorted(err.splitlines())
    assert lines[0].startswith("skipped bird/cut.png: cannot be decoded: ")
    assert lines[1] == "skipped bird/gone.png: No such file or directory"
    assert lines[2].startswith("skipped cat/text.jpg: a text that begins 'not a photo', not the file itself")
    assert len(lines) == 3


def test_a_csv_with_another_kind_of_file(tmp_path, photos, capsys):
    (tmp_path / "list.csv").write_text("path\nphotos/cat/0.jpg\nlist.csv\n")
    assert main(["--csv", f"{tmp_path}/list.csv", "--out", f"{tmp_path}/out"]) == 1
    assert "skipped list.csv: the name does not end in one of jpg, jpeg, png, webp" in capsys.readouterr().err


def test_nothing_of_an_earlier_run_is_overwritten(tmp_path, photos):
    base = ["--images", f"{tmp_path}/photos", "--out", f"{tmp_path}/out"]
    assert main([*base, "--prefix", "train"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"out: already has shards train-\*\.tar"):
        main([*base, "--prefix", "train", "--shuffle", "5"])
    assert main([*base, "--prefix", "test"]) == 0  # the same classes
    save(tmp_path / "photos/ant/1.jpg")
    with pytest.raises(UserError, match=r"classnames\.json: has other class names"):
        main([*base, "--prefix", "val"])
    after = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    sizes = after.pop(tmp_path / "out/sizes.json")
    assert json.loads(sizes) == json.loads(before.pop(tmp_path / "out/sizes.json")) | {"test-000000.tar": 7}
    assert after == {**before, tmp_path / "out/test-000000.tar": before[tmp_path / "out/train-000000.tar"]}


TABLES = {
    "latin": b"path\ncaf\xe9.jpg\n",
    "norows": b"path\n",
    "nopath": b"path,label\na.jpg,1\n,2\n",
    "both": b"path,label\na.jpg,1\nb.jpg,cat\n",
    "negative": b"path,label\na.jpg,1\nb.jpg,-1\n",
}
REFUSED = [
    ("--images missing --out out", "missing: no such folder of images"),
    ("--images empty --out out", "empty: no image there; expected CLASS/IMAGE"),
    ("--images photos --out latin.csv", "latin.csv: cannot be written (File exists)"),
    ("--images photos --out s3://bucket/x", "--out s3://bucket/x: must be a local folder"),
    ("--images photos --out out --prefix a/b", "--prefix a/b: takes letters"),
    ("--images photos --out out --samples-per-shard 0", "--samples-per-shard 0: must be at least 1"),
    ("--images photos --out out --root photos", "--root, --path-column and --label-column: go with --csv"),
    ("--csv missing.csv --out out", "missing.csv: cannot be read (No such file or directory)"),
    ("--csv latin.csv --out out", "latin.csv: cannot be read ("),
    ("--csv norows.csv --out out", "norows.csv: no rows"),
    ("--csv nopath.csv --out out", "nopath.csv, line 3: no path"),
    ("--csv both.csv --out out", "both.csv: labels are either integers or names, but there are '1' and 'cat'"),
    ("--csv negative.csv --out out", "negative.csv: label -1 is negative; leave it empty where an image has none"),
    ("--csv both.csv --out out --path-column file", "both.csv: no column 'file', only path, label"),
    ("--csv norows.csv --out out --label-column class", "norows.csv: no column 'class', only path"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_what_is_refused(tmp_path, photos, monkeypatch, command, message):
    """With one line, and without writing anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in TABLES.items():
        (tmp_path / f"{name}.csv").write_bytes(text)
    with pytest.raises(UserError) as error:
        main(command.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_image_can_be_read(tmp_path):
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "photos/cat/1.jpg").touch()
    with pytest.raises(UserError, match=r"^none of the 1 images could be read"):
        main(["--images", f"{tmp_path}/photos", "--out", f"{tmp_path}/out"])
    assert os.listdir(tmp_path / "out") == []


def test_a_stopped_run_leaves_whole_shards(tmp_path, photos):
    files, names = shard_writer.from_folders(f"{tmp_path}/photos")
    written = shard_writer.write(files, f"{tmp_path}/out", names, "shard", 2)
    for _ in range(5):
        next(written)
    assert sorted(os.listdir(tmp_path / "out")) == [".shard-000002.tar.tmp", "shard-000000.tar", "shard-000001.tar"]
    written.close()
    assert sorted(os.listdir(tmp_path / "out")) == ["shard-000000.tar", "shard-000001.tar"]
    assert len(read(tmp_path / "out")) == 4


def start(*argv: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(JOB), *argv], env=environment, text=True, **pipes, **options)


def test_ctrl_c(tmp_path):
    save(tmp_path / "x.png", size=400)
    rows = "".join("x.png\n" for _ in range(20_000))  # some minutes of work
    (tmp_path / "list.csv").write_text(f"path\n{rows}")
    process = start("--csv", f"{tmp_path}/list.csv", "--out", f"{tmp_path}/out", "--samples-per-shard", "5")
    while not (tmp_path / "out/shard-000002.tar").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert re.fullmatch(r"(\d+ of 20000 images\n)*", err)  # what it says every half minute
    assert all(name.endswith(".tar") for name in os.listdir(tmp_path / "out"))
    for uri in shards.expand([f"{tmp_path}/out"]):
        assert len(list(shards.read(uri))) == 5


def test_a_full_disk(tmp_path):
    """A limit on the size of files, which fails the same way, in the middle of the second shard."""
    save(tmp_path / "small.png")
    save(tmp_path / "big.png", size=100)  # 30 KB
    (tmp_path / "list.csv").write_text("path\n" + "small.png\n" * 10 + "big.png\n" * 10)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    options = ["--samples-per-shard", "10", "--no-shuffle"]
    process = start("--csv", f"{tmp_path}/list.csv", "--out", f"{tmp_path}/out", *options, preexec_fn=full)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (2, f"error: {tmp_path}/out: cannot be written (File too large)\n")
    assert os.listdir(tmp_path / "out") == ["shard-000000.tar"]
    assert len(read(tmp_path / "out")) == 10
