"""Rankings are written whole, read back as they were, and never mixed."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_up import CLASSES, KEEP_RATES, Images, images, save, settings, written

from patchrank.errors import UserError
from patchrank.store import rankings
from patchrank.store.folder import BESIDE, Folder, Reject, file_name

pytest_plugins = ["s3"]


def expected(found: Images) -> list[dict]:
    """The rows of a table, from the arrays it was made of."""
    arrays = {name: None if array is None else np.asarray(array) for name, array in found.arrays.items()}

    def pick(name, *index):
        return None if arrays[name] is None else arrays[name][index].tolist()

    return [
        {
            "key": key,
            "shard": found.shard,
            "label": label,
            **{name: pick(name, row) for name in ("ranking", "score", "step", "prediction", "confidence")},
            "pruned": [
                {
                    "keep": keep,
                    **{part: pick(f"pruned_{part}", row, rate) for part in ("prediction", "confidence", "cosine")},
                }
                for rate, keep in enumerate(found.arrays["keep_rates"])
            ],
        }
        for row, (key, label) in enumerate(zip(found.keys, found.labels, strict=True))
    ]


@pytest.mark.parametrize("class_embeddings", [True, False])
def test_a_file_holds_what_was_found(tmp_path, class_embeddings):
    found = images("/data/train-000.tar", 30, class_embeddings=class_embeddings)
    found.labels[3] = None
    save(tmp_path, found)
    path = tmp_path / file_name(found.shard)

    assert pq.read_table(path).to_pylist() == expected(found)
    assert pq.read_schema(path).remove_metadata() == rankings.schema(20)
    select = duckdb.connect().execute("SELECT * FROM read_parquet(?)", [str(path)])
    names = [column[0] for column in select.description]
    assert [dict(zip(names, row, strict=True)) for row in select.fetchall()] == expected(found)


def test_duckdb_takes_the_lists_apart(tmp_path):
    found = images("/data/train-000.tar", 30)
    save(tmp_path, found)
    path = str(tmp_path / file_name(found.shard))
    rows = duckdb.connect().execute(
        "SELECT key, unnest(ranking), generate_subscripts(ranking, 1) FROM read_parquet(?)", [path]
    )
    ranking = np.zeros((30, 20), int)
    for key, token, position in rows.fetchall():
        ranking[int(key), position - 1] = token
    assert (ranking == found.arrays["ranking"]).all()
    cosine = duckdb.connect().execute(
        "SELECT p.keep, avg(p.cosine) FROM (SELECT unnest(pruned) AS p FROM read_parquet(?)) GROUP BY ALL ORDER BY 1",
        [path],
    )
    assert cosine.fetchall() == [
        (keep, pytest.approx(found.arrays["pruned_cosine"][:, KEEP_RATES.index(keep)].astype(float).mean()))
        for keep in sorted(KEEP_RATES)
    ]


def test_an_empty_shard_has_an_empty_file(tmp_path):
    save(tmp_path, images("/data/empty.tar", 0))
    save(tmp_path, images("/data/full.tar", 3))
    corpus = rankings.open(str(tmp_path))
    assert len(corpus) == 3
    assert corpus.shard("/data/empty.tar").num_rows == 0
    assert corpus.tensors(["ranking", "label"], "/data/empty.tar")["ranking"].shape == (0, 20)


def test_no_keep_rates(tmp_path):
    save(tmp_path, images("/data/a.tar", 3, keep_rates=()))
    assert rankings.open(str(tmp_path)).dataset.to_table(["pruned"])["pruned"].to_pylist() == [[], [], []]


@pytest.mark.parametrize("count", [1000, 250])
@pytest.mark.parametrize("probabilities", [False, True])
def test_at_most_1536_bytes_an_image(tmp_path, count, probabilities):
    found = images("s3://bucket/train-000000.tar", count, 196, (0.9, 0.8, 0.7, 0.6, 0.5), num_classes=1000)
    if probabilities:  # of the label and confidence scores: floats with random exponents too
        found.arrays["score"] = np.random.default_rng(1).random((count, 196), np.float32) ** 4
    size = Folder(str(tmp_path)).write(found.shard, found.table(), encode=rankings.encode)
    assert size == (tmp_path / file_name(found.shard)).stat().st_size
    assert 196 * count < size <= 1536 * count


def test_the_same_rows_give_the_same_bytes(tmp_path):
    found = images("/data/train-000.tar", 4000, 196)
    Folder(str(tmp_path / "a")).write(found.shard, found.table(), encode=rankings.encode)
    whole = found.table()
    batches = pa.concat_tables([whole.slice(0, 0), *(whole.slice(start, 64) for start in range(0, 4000, 64))])
    Folder(str(tmp_path / "b")).write(found.shard, batches, encode=rankings.encode)
    name = file_name(found.shard)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranking": np.zeros((2, 20), int)}, "000000 of /d/a.tar: ranking is not a permutation"),
        ({"ranking": np.tile(np.arange(1, 21), (2, 1))}, "ranking is not a permutation"),
        ({"ranking": np.arange(20)}, "ranking of /d/a.tar: has shape"),
        ({"score": np.ones((2, 19), np.float32)}, "score of /d/a.tar: has shape"),
        ({"score": np.array([[1.0] * 20, [np.nan] * 20])}, "000001 of /d/a.tar: score is not finite"),
        ({"step": np.full((2, 20), -1)}, "-1"),
        ({"pruned_cosine": np.ones((2, 2), np.float32)}, "pruned_cosine of /d/a.tar: has shape"),
        ({"prediction": np.array([0, 2**40])}, "1099511627776"),
    ],
)
def test_a_wrong_ranking_is_not_written(change, message):
    found = images("/d/a.tar", 2)
    found.arrays |= change
    with pytest.raises(ValueError, match=message):
        found.table()


def test_file_names_follow_from_the_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_name("train-000.tar") == file_name(f"file://{tmp_path}/train-000.tar")
    assert file_name("s3://a/train-000.tar").startswith("train-000-")
    assert file_name("s3://a/train-000.tar.gz").startswith("train-000-")
    assert file_name("s3://a/b.tar?region=x") == file_name("s3://a/b.tar")
    uris = ["s3://a/train.tar", "s3://b/train.tar", "gs://a/train.tar", "/a/train.tar", "/a/train.tgz", "/b/train.tar"]
    assert len({file_name(uri) for uri in uris}) == len(uris)
    odd = file_name("/data/[x]* 'é?'.tar")
    assert odd.endswith(".parquet") and not set(odd) & set("[]*? '")
    assert len(file_name("/data/" + "x" * 250 + ".tar")) < 200
    for passed_over in ("/data/日本.tar", "/data/_a.tar", "/data/.a.tar", "/photos/übung"):
        assert file_name(passed_over)[0].isalnum()


@contextlib.contextmanager
def small_disk():
    """No file may grow beyond 20 kB: the rejects fit, the rankings of 1,000 images do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:  # before pytest writes, whose output may go to a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_no_part_of_a_file(tmp_path):
    few, many = images("/data/a.tar", 5), images("/data/a.tar", 1000)
    name = file_name("/data/a.tar")
    Folder(str(tmp_path / "earlier")).write(few.shard, few.table())
    before = (tmp_path / "earlier" / name).read_bytes()
    for folder in ("new", "earlier"):
        with small_disk(), pytest.raises(OSError, match="File too large"):
            Folder(str(tmp_path / folder)).write(many.shard, many.table(), [Reject("k", "no image")])
    assert written(tmp_path / "new") == [f"{BESIDE}/rejects/{name}"]
    assert written(tmp_path / "earlier") == sorted([name, f"{BESIDE}/rejects/{name}"])
    assert (tmp_path / "earlier" / name).read_bytes() == before


def test_rejects(tmp_path):
    found, other = images("/data/a.tar", 3), images("/data/b.tar", 2)
    save(tmp_path, found, (Reject("x", "no image"), Reject("y", "cannot be read: \N{SNOWMAN}")))
    save(tmp_path, other, (Reject("x", "no image"),))
    corpus = rankings.open(str(tmp_path))
    assert corpus.rejects().to_pylist() == [
        {"key": "x", "shard": "/data/a.tar", "reason": "no image"},
        {"key": "y", "shard": "/data/a.tar", "reason": "cannot be read: \N{SNOWMAN}"},
        {"key": "x", "shard": "/data/b.tar", "reason": "no image"},
    ]
    save(tmp_path, found)  # a later try that could read all
    save(tmp_path, other)
    assert written(tmp_path / BESIDE / "rejects") == []
    assert corpus.rejects().to_pylist() == []
    assert len(corpus) == 5


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        rankings.open(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no search\.json"):
        rankings.open(str(tmp_path))
    Folder(str(tmp_path)).prepare(settings())
    with pytest.raises(UserError, match="holds no rankings yet"):
        rankings.open(str(tmp_path))
    save(tmp_path, images("/data/a.tar", 3))
    with pytest.raises(UserError, match=r"holds no rankings of /data/b\.tar"):
        rankings.open(str(tmp_path)).shard("/data/b.tar")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def exchange(path: Path) -> None:
    other = images("/data/b.tar", 3, seed=1)
    Folder(str(path.parent), fingerprint="0" * 16).write(other.shard, other.table())


def replace(path: Path) -> None:
    pq.write_table(pa.table({"key": ["x"]}), path)


@pytest.mark.parametrize(
    ("change", "message"), [(damage, "damaged"), (exchange, "fingerprint 000000"), (replace, "another search")]
)
@pytest.mark.parametrize("shards", ["ab", "b"])
def test_a_file_that_does_not_belong_here_is_named(tmp_path, change, message, shards):
    for shard in shards:
        save(tmp_path, images(f"/data/{shard}.tar", 3))
    name = file_name("/data/b.tar")
    change(tmp_path / name)
    corpus = rankings.open(str(tmp_path))
    for read in (lambda: corpus.dataset, lambda: corpus.shard("/data/b.tar"), corpus.tensors, lambda: len(corpus)):
        with pytest.raises(UserError) as error:
            read()
        assert message in str(error.value) and f"{tmp_path}/{name}: " in str(error.value)


def test_tensors(tmp_path):
    found, other = images("/data/a.tar", 4), images("/data/b.tar", 3, seed=1)
    found.labels[1] = None
    for part in (found, other):
        save(tmp_path, part)
    corpus = rankings.open(str(tmp_path))
    assert (len(corpus), corpus.num_tokens, corpus.grid) == (7, 20, (4, 5))
    assert (corpus.keep_rates, corpus.class_names, corpus.settings) == (KEEP_RATES, CLASSES, settings())

    names = ("ranking", "score", "step", "label", "prediction", "confidence")
    tensors = corpus.tensors(names, "/data/a.tar")
    assert set(tensors) == {*names, "key"}
    assert tensors["key"] == found.keys
    assert tensors["label"].tolist() == [-1 if label is None else label for label in found.labels]
    for name in ("ranking", "score", "step", "prediction", "confidence"):
        expect = torch.float32 if name in ("score", "confidence") else torch.int64
        assert tensors[name].dtype == expect
        assert np.array_equal(tensors[name].numpy(), found.arrays[name])

    parts = sorted((found, other), key=lambda part: file_name(part.shard))
    whole = corpus.tensors()
    assert set(whole) == {"ranking", "score", "key"}
    assert np.array_equal(whole["ranking"].numpy(), np.concatenate([part.arrays["ranking"] for part in parts]))
    with pytest.raises(ValueError, match="pruned: no tensor"):
        corpus.tensors(["pruned"])


def test_tensors_without_class_embeddings(tmp_path):
    save(tmp_path, images("/data/a.tar", 2, class_embeddings=False), about={}, grid=None)
    corpus = rankings.open(str(tmp_path))
    tensors = corpus.tensors(["prediction", "confidence"])
    assert tensors["prediction"].tolist() == [-1, -1] and tensors["confidence"].isnan().all()
    assert corpus.class_names is None and corpus.grid is None


def test_a_bucket_holds_what_a_disk_holds(tmp_path, s3_bucket):
    found, folder = images("s3://data/a.tar", 4), f"{s3_bucket}/runs/#1"
    for place in (folder, str(tmp_path)):
        save(place, found, (Reject("x", "no image"),))
        Folder(place).record_failure("s3://data/b.tar", "cut short")
        assert Folder(place).finished([found.shard, "s3://data/b.tar"]) == {found.shard}
    corpus = rankings.open(folder)
    assert corpus.shard(found.shard).to_pylist() == expected(found)
    assert corpus.dataset.to_table().equals(rankings.open(str(tmp_path)).dataset.to_table())
    assert corpus.rejects().num_rows == 1
    assert Folder(folder).failures() == Folder(str(tmp_path)).failures()
    with pytest.raises(UserError, match="holds another search"):
        Folder(folder).prepare(settings(limit=1))
    with pytest.raises(UserError, match="no such folder"):
        rankings.open(f"{s3_bucket}/runs/2")
    save(folder, found)
    assert corpus.rejects().num_rows == 0
