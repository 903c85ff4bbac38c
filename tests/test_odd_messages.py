"""Files that are something else than they are named, kind J of tests/test_odd_inputs.py: the fault is named."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
import zipfile

import pytest
import torch
from PIL import Image
from test_odd_inputs import encoded
from tiny_shards import tar

from patchrank import flags
from patchrank.data import images, shards
from patchrank.errors import UserError
from patchrank.model import checkpoint, classes
from patchrank.pruning.bundle import Bundle
from patchrank.store.folder import Reject


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
    "a web page with a mark": (b"\xef\xbb\xbf" + PAGE.strip(), "a web page, not the file itself"),
    "a web page in a gzip": (gzip.compress(PAGE), "a web page, not the file itself"),
    "a bucket's error": (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code>',
        "an error message",
    ),
    "a hub's error": (
        b'{"error":"Invalid credentials"}',
        """a text that begins '{"error":"Invalid credentials"}', not""",
    ),
    "a server's word": (b"Entry not found", "a text that begins 'Entry not found', not the file itself: download it"),
    "gzip of gzip": (gzip.compress(gzip.compress(bytes(999))), "compressed by gzip twice: decompress it once"),
    "zeros": (bytes(1 << 20), "nothing but zeros, as of a download that was never filled in, after 0 samples"),
    "a gzip of no tar": (gzip.compress(bytes(range(256)) * 9), "not a tar, or "),
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
    for content, words in ((POINTER, "a pointer of Git LFS"), (PAGE, "a web page"), (b"Not Found", "a text that beg")):
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
    content = tar(
        *(("a.v1.jpg", b"i"), ("b.jpg", b"i"), ("c.tiff", b"i"), ("c.txt", b"t"), ("b.json", b"{}"), ("d.cls", b"1")),
    )
    (tmp_path / "a.tar").write_bytes(content)
    none = "no image (jpg, jpeg, png, webp) in the sample, only "
    assert [sample for sample in shards.read(str(tmp_path / "a.tar")) if isinstance(sample, Reject)] == [
        Reject("a", none + "v1.jpg; a key ends at the first dot of the file name"),
        Reject("c", none + "tiff, txt"),
        Reject("b", "only json here, and its image came before: a sample's files must be adjacent"),
        Reject("d", none + "cls; a sample's files must be adjacent"),
    ]


def test_lists_bundles_and_class_embeddings_of_something_else_are_named(tmp_path):
    """Class names in the place of a list of shards, what was not fetched in that of the others."""
    (tmp_path / "names.txt").write_text("t-shirt\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/names.txt: t-shirt: no such folder or shard; a shard's name"):
        shards.expand([str(tmp_path / "names.txt")])
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json: a pointer of Git LFS, not the file itself"):
        Bundle.open(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"Entry not found")
    with pytest.raises(UserError, match=rf"^{tmp_path}/model.safetensors: a text that begins 'Entry not found'"):
        Bundle.open(str(tmp_path))
    (tmp_path / "classes.npz").write_bytes(PAGE)
    with pytest.raises(UserError, match=r"^--class-embeddings .*/classes.npz: a web page, not the file itself"):
        classes.from_file(str(tmp_path / "classes.npz"), 4)


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
