"""Files in a folder of rankings that are no tables of its shards are named and left out; nothing is counted twice."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import images, save

from patchrank.errors import UserError
from patchrank.store import queries, rankings, status
from patchrank.store.folder import file_name


@pytest.fixture
def folder(tmp_path):
    """Rankings of two shards, seven images, and the same shard through a link, a copy, sidecars and hidden files."""
    out, shards = tmp_path / "rankings", tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "link").symlink_to(shards)
    first, second = (str(shards / f"{name}.tar") for name in "ab")
    save(out, images(first, 3))
    save(out, images(second, 4))
    again = images(str(tmp_path / "link" / "b.tar"), 4)
    save(out, again)
    table = out / file_name(first)
    shutil.copy(table, out / f"{table.stem} (1).parquet")
    shutil.copy(table, out / f"._{table.name}")
    pq.write_table(pa.table({"key": ["x"]}), out / "sizes.parquet")
    pq.write_table(pa.table({"key": ["x"]}), out / "_metadata.parquet")
    (out / "a copy.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    shutil.copy(table, out / f"{table.stem}.PARQUET")
    (out / "empty-12345678.parquet").touch()
    beside = out / "__patchrank__"
    for name in ("rejects", "failed"):
        (beside / name).mkdir()
    (beside / "rejects" / "notes.parquet").write_bytes(b"no table" * 9)
    (beside / "failed" / f"{table.stem} (1).json").write_text('{"shard": "a", "error": "mended since"}')
    (beside / "failed" / f".{table.stem}.json").write_bytes(b"\0\5")
    (beside / "shards.txt").write_bytes("a.tar\n".encode("utf-16-le"))
    return out, [first, second], file_name(again.shard)


def test_they_are_left_out_and_named_once(folder, capsys):
    out, shards, again = folder
    corpus = rankings.open(str(out))
    assert len(corpus) == 7 and len(corpus.tensors()["key"]) == 7
    assert len(set(corpus.shards())) == 2
    corpus.dataset.to_table()
    assert len(corpus.rejects()) == 0 and corpus.home.failures() == [] and status.read(str(out)).images == 7
    lines = list(dict.fromkeys(capsys.readouterr().err.splitlines()))  # a status opens the folder anew
    assert len(lines) == 6 and all(line.startswith(f"warning: {out}/") for line in lines)
    for name in ("a copy.parquet", "__patchrank__/rejects/notes.parquet"):
        assert f"warning: {out}/{name}: left out, as it is no table of a shard" in lines
    assert any(".PARQUET: left out, as it has another name" in line for line in lines)
    assert any("sizes.parquet: left out, as it is no table of a shard" in line for line in lines)
    renamed = f"(1).parquet: left out, as it has another name than the table of its shard, {file_name(shards[0])}"
    assert any(renamed in line for line in lines)
    assert any("by another path" in line and file_name(shards[1])[:2] == "b-" and again[:2] == "b-" for line in lines)
    with queries.connect(corpus) as connection:
        assert connection.sql("SELECT count(*), count(DISTINCT shard) FROM rankings").fetchall() == [(7, 2)]


def test_a_folder_of_nothing_else_is_refused(tmp_path):
    save(tmp_path, images("/data/a.tar", 3))
    (tmp_path / file_name("/data/a.tar")).rename(tmp_path / "renamed.parquet")
    with pytest.raises(UserError, match="none of its Parquet files is the table of a shard"):
        len(rankings.open(str(tmp_path)))
