"""Other people's readers open a folder of results as it stands, and see every row once: finished or still at work."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import ray
import ray.data
import yaml
from made_up import KEEP_RATES, images, settings

from jobs import query
from patchrank.evaluation import evaluate
from patchrank.store import card, embeddings, rankings, status, storage
from patchrank.store.folder import BESIDE, Folder, Reject, find
from patchrank.store.status import Run

pytest_plugins = ["shared_ray"]

SHARDS = ["/data/a.tar", "/data/日本.tar"]
IMAGES = 5  # a shard


def searched(folder: str, class_embeddings: bool = True) -> Folder:
    home = Folder(folder).prepare(settings(), rankings.COLUMNS)
    for shard in SHARDS:
        found = images(shard, IMAGES, class_embeddings=class_embeddings)
        home.write(shard, found.table(), [Reject("bad", "no image")], encode=rankings.encode)
    return home


def searched_without_classes(folder: str) -> Folder:
    return searched(folder, class_embeddings=False)


def evaluated(folder: str) -> Folder:
    """Of which some images have embeddings, captions and labels, and others none."""
    home = Folder(folder, "evaluation").prepare(settings(), evaluate.COLUMNS)
    for shard in SHARDS:
        rows = [
            {
                "key": f"{image}",
                "shard": shard,
                "label": None if image else 3,
                "method": "unpruned" if keep == 1 else "golden",
                "keep": keep,
                "cosine": keep,
                "kept": None if keep == 1 else [0, 2],
                "captions": None if image else ["a dog"],
                "embedding": None if image else np.eye(8, dtype=np.float32)[0],
            }
            for image in range(IMAGES)
            for keep in (1.0, *KEEP_RATES)
        ]
        home.write(shard, pa.Table.from_pylist(rows, evaluate.schema(8)), [Reject("bad", "no image")])
    return home


def embedded(folder: str, precision: str = "float16") -> Folder:
    home = Folder(folder, "embedding").prepare(settings(), embeddings.COLUMNS)
    for number, shard in enumerate(SHARDS):
        vectors = np.random.default_rng(number).normal(size=(IMAGES, 8)).astype(precision)
        rows = embeddings.table(shard, [f"{image}" for image in range(IMAGES)], [3, None, 1, 0, 2], vectors)
        home.write(shard, rows, [Reject("bad", "no image")], encode=embeddings.encode)
    return home


def embedded_in_float32(folder: str) -> Folder:
    return embedded(folder, "float32")


KINDS = [searched, searched_without_classes, evaluated, embedded, embedded_in_float32]


def at_work(home: Folder) -> None:
    """What else a folder holds whose job still runs, and what earlier ones left in it."""
    home.record_failure("/data/c.tar", "truncated")
    status.write_shards(home.uri, [*SHARDS, "/data/c.tar"])
    status.write_run(home.uri, Run("search", 1.0, 2.0))
    Path(home.beside("classes.safetensors")).write_bytes(b"classes")
    for name in (".a-01234567.parquet.x1y2z3.tmp", f"{BESIDE}/rejects/.a-01234567.parquet.x1y2z3.tmp"):
        (Path(home.uri) / name).write_bytes(b"PAR1 half")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def home(request, tmp_path):
    """Below a folder that readers could take for a partition."""
    found = request.param(str(tmp_path / "label=3" / "out"))
    at_work(found)
    return found


def expected(home: Folder) -> pa.Table:
    """The rows, read file by file."""
    return pa.concat_tables(pa.parquet.read_table(storage.join(home.uri, name)) for name in home.tables(SHARDS))


def same(found: pa.Table, home: Folder) -> None:
    """Every row once, with its own label, and lists of the lengths that they have."""
    wanted, by = expected(home), ["shard", "key", *(["keep"] if home.kind == "evaluation" else [])]
    for name in wanted.column_names:
        column = wanted[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(pa.string())
            wanted = wanted.set_column(wanted.schema.get_field_index(name), name, column)
        found = found.set_column(found.schema.get_field_index(name), name, found[name].cast(column.type))
    assert (
        found.sort_by([(name, "ascending") for name in by])
        .select(wanted.column_names)
        .equals(wanted.sort_by([(name, "ascending") for name in by]))
    )


def lists(home: Folder) -> dict[str, int]:
    return {"embedding": 8} if home.kind != "search" else dict.fromkeys(("ranking", "score", "step"), 20)


def test_pyarrow(home):
    dataset = ds.dataset(home.uri)
    same(dataset.to_table(), home)
    assert {name: dataset.schema.field(name).type.list_size for name in lists(home)} == lists(home)


def test_pandas(home):
    frame = pandas.read_parquet(home.uri)
    assert len(frame) == len(expected(home)) and list(frame.columns) == expected(home).column_names
    assert frame["label"].dropna().tolist() == expected(home)["label"].drop_null().to_pylist()
    for name, length in lists(home).items():
        assert set(frame[name].dropna().map(len)) == {length}
        assert [row.tolist() for row in frame[name].dropna()] == expected(home)[name].drop_null().to_pylist()


def test_polars(home):
    frame = polars.scan_parquet(f"{home.uri}/*.parquet").collect()
    same(frame.to_arrow(), home)
    assert {name: frame.schema[name].shape for name in lists(home)} == {n: (size,) for n, size in lists(home).items()}


def test_duckdb(home):
    found = duckdb.sql(f"FROM read_parquet('{home.uri}/*.parquet', hive_partitioning = false)")
    same(found.to_arrow_table(), home)
    assert duckdb.sql(f"SELECT count(*) FROM '{home.uri}/*.parquet'").fetchall() == [(len(expected(home)),)]


@pytest.mark.parametrize("how", ["folder", "begun before it told datasets what to read", "data_dir", "streaming"])
def test_datasets(home, how, tmp_path):
    if how.startswith("begun"):
        Path(home.uri, card.CONFIGS_FILE).unlink()
    if how == "streaming":
        found = datasets.load_dataset(home.uri, streaming=True)
        rows = list(found["train"])
        same(pa.Table.from_pylist(rows, expected(home).schema), home)
        return
    cache = str(tmp_path / "cache")
    if how == "data_dir":
        found = datasets.load_dataset("parquet", data_dir=home.uri, cache_dir=cache)
    else:
        found = datasets.load_dataset(home.uri, cache_dir=cache)
    assert set(found) == {"train"}
    same(found["train"].data.table, home)
    assert {name: found["train"].features[name].length for name in lists(home)} == lists(home)


def test_ray_data(address, tmp_path):
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        for kind in KINDS:
            home = kind(str(tmp_path / "label=3" / kind.__name__))
            at_work(home)
            found = ray.data.read_parquet(home.uri, partitioning=None)
            assert {name: found.schema().base_schema.field(name).type.list_size for name in lists(home)} == lists(home)
            same(pa.concat_tables(ray.get(found.to_arrow_refs())), home)
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def spark():
    """Spark is in no extra: it wants Java, and 450 MB. `pip install pyspark` has these tests run."""
    sql = pytest.importorskip("pyspark.sql", reason="Spark is not installed")
    settings = {"spark.ui.enabled": False, "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    settings["spark.sql.parquet.enableVectorizedReader"] = False  # Spark 3.5's does not know how floats are packed
    session = sql.SparkSession.builder.master("local[1]").config(map=settings).getOrCreate()
    yield session
    session.stop()


def test_spark(spark, home):
    if home.kind == "embedding" and pa.types.is_float16(ds.dataset(home.uri).schema.field("embedding").type.value_type):
        with pytest.raises(Exception, match=r"FLOAT16|FOOTER"):
            spark.read.parquet(home.uri).collect()
        return
    rows = [row.asDict(recursive=True) for row in spark.read.parquet(home.uri).collect()]
    same(pa.Table.from_pylist(rows, expected(home).schema), home)


def test_our_own_queries_below_a_label(tmp_path, capsys):
    home = searched(str(tmp_path / "label=3" / "out"))
    assert query.main([home.uri, "SELECT DISTINCT label FROM rankings ORDER BY label", "--format", "csv"]) == 0
    labels = sorted(set(expected(home)["label"].to_pylist()))
    assert capsys.readouterr().out.split() == ["label", *map(str, labels)] and labels != [3]


def test_the_card_is_written_once_and_names_every_column(tmp_path):
    about = settings()["about"] | {"model": "ViT-B-16", "pretrained": "openai", "shards": ["s3://b/{0..9}.tar"]}
    home = Folder(str(tmp_path)).prepare(settings(about=about), rankings.COLUMNS)
    path = tmp_path / BESIDE / card.FILE
    _, head, text = path.read_text().split("---\n", 2)
    assert yaml.safe_load(head)["configs"] == [{"config_name": "default", "data_files": "*.parquet"}]
    assert "license" not in yaml.safe_load(head) and "# license" in head
    assert all(f"| `{name}` |" in text for name in rankings.schema(20).names)
    assert all(word in text for word in ("`ViT-B-16`", "`openai`", "`s3://b/{0..9}.tar`", '"remove_per_step": 4'))
    beside = tmp_path / card.CONFIGS_FILE
    assert yaml.safe_load(beside.read_text())["configs"] == yaml.safe_load(head)["configs"]
    path.write_text("edited")
    Folder(home.uri).prepare(settings(), rankings.COLUMNS)
    assert path.read_text() == "edited"


def test_every_column_has_a_meaning():
    assert list(rankings.COLUMNS) == rankings.schema(2).names
    assert list(evaluate.COLUMNS) == evaluate.schema(2).names
    assert list(embeddings.COLUMNS) == embeddings.schema(2, "float16").names


def test_a_folder_of_before_is_gone_on_with_as_it_is(tmp_path, capsys):
    home = searched(str(tmp_path / "out"))
    at_work(home)
    beside = tmp_path / "out" / BESIDE
    (beside / card.FILE).unlink()  # there were none
    for path in beside.iterdir():
        shutil.move(path, tmp_path / "out" / path.name)
    beside.rmdir()

    old = find(home.uri)
    assert old is not None and old.kind == "search" and old.beside("rejects") == storage.join(home.uri, "rejects")
    resumed = Folder(home.uri).prepare(settings(), rankings.COLUMNS)
    assert not list(tmp_path.rglob("*.tmp")) and resumed.finished([*SHARDS, "/data/c.tar"]) == set(SHARDS)
    resumed.write("/data/c.tar", images("/data/c.tar", 2).table(), [Reject("worse", "no image")])
    status.write_run(home.uri, Run("search", 3.0, 4.0))
    assert resumed.failures() == [] and not beside.exists()
    assert sorted(rankings.open(home.uri).rejects()["key"].to_pylist()) == ["bad", "bad", "worse"]
    found = status.read(home.uri, now=5.0)
    assert (found.done, found.shards, found.rejects, found.run.started) == (3, 3, 3, 3.0)
    assert query.main([home.uri, "summary", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("12,3,3,0,")


def test_a_folder_that_somebody_begins_meanwhile(tmp_path):
    waiting = Folder(str(tmp_path))
    assert waiting.read() is None and find(str(tmp_path)) is None
    Folder(str(tmp_path)).prepare(settings())
    assert waiting.read() is not None and find(str(tmp_path)) is not None
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / BESIDE)
    assert waiting.read() is None
