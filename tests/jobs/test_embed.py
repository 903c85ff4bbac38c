"""Embeddings of corpora: what jobs/embed.py writes is what the model gives, however it was interrupted; and asked."""

from __future__ import annotations

import json
import os
import re
import signal
import tarfile

import duckdb
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from here import ROOT, run_here
from PIL import Image
from tiny_search import once_waiting, tables

import patchrank
from cluster import embed as embedding
from jobs import embed, query
from jobs.command import main as patchrank_command
from patchrank.data import shards
from patchrank.data.images import decode
from patchrank.errors import UserError
from patchrank.model import loading
from patchrank.model.tower import Tower
from patchrank.pruning.embedder import Embedder, Pruning
from patchrank.store import embeddings, status
from patchrank.store.folder import file_name

pytest_plugins = ["tiny_results"]


def flags(data, out, *more, shards="images-{0..5}.tar"):
    model = ["--model", f"local-dir:{data / 'model'}", "--dtype", "float32", "--cpus-per-actor", "1"]
    return [*model, "--shards", str(data / shards), "--out", str(out), *map(str, more)]


def embedded_here(data, out, *more, address, **named):
    return run_here("jobs/embed.py", *flags(data, out, *more, **named), "--address", address)


@pytest.fixture(scope="module")
def model(data):
    """The model and what the naive loop makes of each image of the shards, unpruned: (E,) by key."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{data / 'model'}")
    clip.eval()
    return clip, preprocess


def naive(model, data, names="images-{0..5}.tar"):
    clip, preprocess = model
    found = {}
    for uri in shards.expand([str(data / names)]):
        for sample in shards.read(uri):
            with torch.no_grad():
                found[sample.key] = F.normalize(clip.encode_image(preprocess(decode(sample.image))[None]), dim=-1)[0]
    return found


@pytest.fixture(scope="module")
def whole(data, address, tmp_path_factory):
    """The folder of an embedding that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "embeddings"
    done = embedded_here(data, out, "--classes", data / "classes.json", "--precision", "float32", address=address)
    assert done.returncode == 0, done.stderr
    assert "72 embedded, 0 rejected" in done.stdout and "embed " in done.stdout
    return out


def test_rows_are_what_the_model_gives(data, whole, model):
    corpus = embeddings.open(str(whole))
    keys, found = corpus.matrix()
    wanted = naive(model, data)
    assert sorted(keys) == sorted(wanted) and found.dtype == np.float32 and corpus.embed_dim == 24
    np.testing.assert_allclose(found, np.stack([wanted[key].numpy() for key in keys]), atol=1e-5)
    rows = corpus.dataset.to_table().to_pylist()
    assert {row["shard"] for row in rows} == set(shards.expand([str(data / "images-{0..5}.tar")]))
    assert all(row["label"] == int(row["key"].split("-")[1]) % 3 for row in rows)

    clip, _ = model
    tokenizer = open_clip.get_tokenizer(f"local-dir:{data / 'model'}")
    with torch.no_grad():
        texts = F.normalize(clip.encode_text(tokenizer([f"a photo of a {name}." for name in ("ant", "bee", "cat")])))
    likely = (clip.logit_scale.exp().item() * torch.from_numpy(found.copy()) @ texts.T).softmax(dim=-1)
    by_key = {row["key"]: row for row in rows}
    assert [by_key[key]["prediction"] for key in keys] == likely.argmax(dim=1).tolist()
    np.testing.assert_allclose([by_key[key]["confidence"] for key in keys], likely.max(dim=1).values, atol=1e-4)


def test_a_killed_embedding_resumes_to_the_same_rows(data, whole, hold, address, tmp_path):
    out = tmp_path / "out"
    more = ("--classes", data / "classes.json", "--precision", "float32", "--actors", "1", "--images-per-batch", "16")
    hold.at("3-5")

    def interrupt(_):
        os.kill(os.getpid(), signal.SIGINT)

    with once_waiting(hold, "3-5", interrupt):
        stopped = embedded_here(data, out, *more, address=address)
    assert stopped.returncode != 0 and "the same command goes on from there" in stopped.stderr
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 0 < len(before) < 6

    with once_waiting(hold, "4-5", lambda actor: os.kill(actor, signal.SIGKILL)):
        resumed = embedded_here(data, out, *more, address=address)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{len(before)} of 6 were finished before" in resumed.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert tables(out) == tables(whole)
    found = status.read(str(out))
    assert (found.kind, found.state, found.done, found.images) == ("embedding", "finished", 6, 72)
    with pytest.raises(UserError, match=r'precision: "float32" there, "float16" now'):
        embed.main([*flags(data, out, "--classes", data / "classes.json"), "--address", address])


def test_a_folder_of_images_is_embedded_folder_by_folder(data, model, address, tmp_path):
    photos = tmp_path / "photos"
    (photos / "b" / "deep").mkdir(parents=True)
    (photos / "日本").mkdir()
    rng = np.random.default_rng(1)
    for name in ("a.b.png", "b/x.PNG", "b/y.jpg", "b/deep/x.png", "日本/ß.png"):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(photos / name)
    (photos / "b" / "broken.jpg").write_bytes(b"no image")
    (photos / "b" / "notes.txt").write_text("no image either")
    (photos / "b" / ".hidden.png").write_bytes(b"")
    out = tmp_path / "out"
    done = embedded_here(data, out, address=address, shards=photos)
    assert done.returncode == 0 and "5 embedded, 1 rejected" in done.stdout, done.stderr
    corpus = embeddings.open(str(out))
    rows = {(row["shard"], row["key"]): row for row in corpus.dataset.to_table().to_pylist()}
    expected = {("", "a.b.png"), ("/b", "x.PNG"), ("/b", "y.jpg"), ("/b/deep", "x.png"), ("/日本", "ß.png")}
    assert set(rows) == {(f"{photos}{folder}", name) for folder, name in expected}
    (reject,) = corpus.rejects().to_pylist()
    assert (reject["shard"], reject["key"]) == (f"{photos}/b", "broken.jpg")
    assert "a text that begins 'no image'" in reject["reason"]
    clip, preprocess = model
    with torch.no_grad():
        wanted = F.normalize(clip.encode_image(preprocess(Image.open(photos / "b/deep/x.png"))[None]), dim=-1)[0]
    got = np.array(rows[f"{photos}/b/deep", "x.png"]["embedding"], np.float32)
    np.testing.assert_allclose(got, wanted, atol=1e-3)  # float16
    assert rows[f"{photos}/b", "y.jpg"]["prediction"] is None


def test_pruned_embeddings_are_those_of_the_pruned_model(data, model, address, tmp_path):
    out = tmp_path / "out"
    more = ("--bundle", "class-attention", "--keep", "0.5", "--precision", "float32")
    done = embedded_here(data, out, *more, address=address, shards="images-0.tar")
    assert done.returncode == 0, done.stderr
    clip, preprocess = model
    patchrank.prune(clip, "class-attention", keep=0.5)
    try:
        wanted = naive((clip, preprocess), data, "images-0.tar")
    finally:
        patchrank.restore(clip)
    keys, found = embeddings.open(str(out)).matrix()
    np.testing.assert_allclose(found, np.stack([wanted[key].numpy() for key in keys]), atol=1e-5)
    whole = naive((clip, preprocess), data, "images-0.tar")
    assert max(1 - float(whole[key] @ wanted[key]) for key in keys) > 1e-4


@pytest.mark.long
def test_estimate_writes_nothing(data, address, tmp_path, capsys):
    assert embed.main([*flags(data, tmp_path / "out", "--estimate"), "--address", address]) == 0
    printed = capsys.readouterr().out
    assert "72 in 6 shards" in printed and "G multiply-adds" in printed and "candidates" not in printed
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_fails_alone(data, address, tmp_path):
    (tmp_path / "good.tar").write_bytes((data / "images-0.tar").read_bytes())
    (tmp_path / "half.tar").write_bytes((data / "images-1.tar").read_bytes()[:15_000])
    done = embedded_here(data, tmp_path / "out", address=address, shards=tmp_path / "{good,half,absent}.tar")
    assert done.returncode == 1 and "half.tar: truncated" in done.stderr and "absent.tar" in done.stderr
    corpus = embeddings.open(str(tmp_path / "out"))
    assert pq.read_metadata(f"{corpus.folder}/{file_name(str(tmp_path / 'good.tar'))}").num_rows == 12


def asked(capsys, *arguments):
    assert query.main([*map(str, arguments), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_nearest_neighbours(data, whole, model, capsys, tmp_path):
    keys, found = embeddings.open(str(whole)).matrix()
    at = keys.index("2-7")
    cosines = found @ found[at]
    order = [keys[i] for i in np.argsort(-cosines) if i != at]
    assert len(asked(capsys, whole, "--key", "2-7", "--nearest", 10**30)) == len(keys) - 1
    assert len(asked(capsys, whole, "--text", "ein Hund, 日本")) == 10
    rows = asked(capsys, whole, "--key", "2-7", "--nearest", 5)
    assert [row["key"] for row in rows] == order[:5]
    np.testing.assert_allclose([row["cosine"] for row in rows], np.sort(cosines)[::-1][1:6], atol=1e-4)

    with tarfile.open(data / "images-2.tar") as tar:
        tar.extract("2-7.png", tmp_path, filter="data")
    rows = asked(capsys, whole, "--image", tmp_path / "2-7.png", "--nearest", 3)
    assert [row["key"] for row in rows] == ["2-7", *order[:2]] and rows[0]["cosine"] > 0.9999

    clip, _ = model
    tokenizer = open_clip.get_tokenizer(f"local-dir:{data / 'model'}")
    with torch.no_grad():
        text = F.normalize(clip.encode_text(tokenizer(["a dog"])), dim=-1)[0].numpy()
    rows = asked(capsys, whole, "--text", "a dog", "--nearest", 4)
    assert [row["key"] for row in rows] == [keys[i] for i in np.argsort(-(found @ text))[:4]]


def test_neighbours_by_duckdb_alone(whole):
    """The lines of docs/corpus.md."""
    keys, found = embeddings.open(str(whole)).matrix()
    order = [keys[i] for i in np.argsort(-(found @ found[keys.index("2-7")]))]
    (code,) = re.findall(r"```python\n(rows = duckdb.*?)```", (ROOT / "docs" / "corpus.md").read_text(), re.DOTALL)
    lines = code.replace("embeddings/*", f"{whole}/*").replace("512", "24").replace("n01440764_10026", "2-7")
    *before, last = lines.strip().splitlines()
    names = {"duckdb": duckdb}
    exec("\n".join([*before, f"answer = {last}.fetchall()"]), names)
    assert [key for key, _ in names["answer"]] == order[:10]


def test_questions_that_cannot_be_answered(data, whole, undisturbed, capsys, tmp_path):
    for arguments, words in (
        (["--key", "none"], "--key none: no such image"),
        (["--key", "2-7", "--shard", "/other.tar"], "no such image in /other.tar"),
        (["--key", "2-7", "--text", "a dog"], "key and text: one question at a time"),
        (["--image", str(tmp_path / "absent.png")], "absent.png: No such file"),
        (["--key", "2-7", "--nearest", "0"], "--nearest 0: must be at least 1"),
        (["--nearest", "3"], "--nearest: of what"),
        (["summary", "--shard", "/a.tar"], "--shard: tells where a --key is"),
        (["--text", " "], "--text: is empty"),
        (["accuracy"], "accuracy: no such named query; there are summary, predictions"),
    ):
        with pytest.raises(UserError, match=words):
            query.main([str(whole), *arguments])
    with pytest.raises(UserError, match="holds rankings; --key"):
        query.main([str(undisturbed), "--key", "2-7"])


def test_named_queries(whole, capsys):
    (summary,) = asked(capsys, whole, "summary")
    assert (summary["images"], summary["shards"], summary["numbers"]) == (72, 6, 24)
    assert sum(row["images"] for row in asked(capsys, whole, "predictions")) == 72
    assert query.main([str(whole), "summary", "--show"]) == 0 and "FROM embeddings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "0.5"], "--keep 0.5: needs --bundle"),
        (["--precision", "int8"], "--precision int8: must be one of float16, float32"),
        (["--bundle", "/nowhere"], "/nowhere: no such folder"),
        (["--bundle", "class-attention", "--keep", "0.001"], "keep"),
    ],
)
def test_what_makes_no_sense_is_refused(data, address, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        embed.main([*flags(data, tmp_path / "out", *more), "--address", address])
    assert not (tmp_path / "out").exists()


def test_the_command_names_it_and_asks_for_a_model(tmp_path):
    with pytest.raises(UserError, match="--shards and --model are needed"):
        patchrank_command(["embed", "--out", str(tmp_path)])


def test_a_number_that_overflows_is_a_reject(data):
    """In low precision an embedding may not be finite; then the image is no row."""
    found = loading.load(f"local-dir:{data / 'model'}")
    embedder = Embedder(Tower(found.visual, None, torch.float32), Pruning())
    pixels = torch.full((2, 3, 24, 24), 1.0)
    pixels[1] = torch.inf
    assert embedder(pixels).isfinite().all(dim=1).tolist() == [True, False]
    assert embedding.EmbedJob().precision == "float16"
