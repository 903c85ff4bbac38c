"""hf:// and https://: shards and folders of results, against a stand-in on loopback."""

from __future__ import annotations

import pytest
from made_up import images, save, settings
from tiny_shards import samples, tar, write

from patchrank.data import shards
from patchrank.data.shards import ShardError
from patchrank.errors import UserError
from patchrank.store import card, rankings, storage
from patchrank.store.folder import BESIDE, Folder, Reject

pytest_plugins = ["hub"]


@pytest.fixture
def shard(tmp_path):
    """The bytes of a shard, and its samples."""
    content = samples(20)
    return write(tmp_path / "a.tar", content), content


def test_shards_of_a_dataset(hub, shard):
    data, content = shard
    hub.repos["datasets/me/photos"] = {f"train/a-{number}.tar": data for number in range(3)} | {"README.md": b"#"}
    root = "hf://datasets/me/photos/train"
    uris = [f"{root}/a-{number}.tar" for number in range(3)]
    for spec in (root, f"{root}/*.tar", f"{root}/a-{{0..2}}.tar"):
        assert shards.expand([spec]) == uris
    assert list(shards.read(uris[1])) == content
    with pytest.raises(UserError, match="no such folder or shard"):
        shards.expand(["hf://datasets/me/photos/absent"])
    with pytest.raises(ShardError):
        list(shards.read(f"{root}/absent.tar"))
    with pytest.raises(ShardError):
        list(shards.read("hf://datasets/me/nothing/a.tar"))


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_by_http(hub, shard, ranges):
    data, content = shard
    hub.plain = {"a.tar": data, "b.tar": data, "list.txt": b"a.tar\nb.tar\n"}
    hub.ranges = ranges
    root = f"{hub.endpoint}/plain"
    assert shards.expand([f"{root}/{{a,b}}.tar"]) == [f"{root}/a.tar", f"{root}/b.tar"]
    assert shards.expand([f"{root}/list.txt"]) == [f"{root}/a.tar", f"{root}/b.tar"]
    signed = f"{root}/a.tar?signature=x"
    assert shards.expand([signed]) == [signed] and list(shards.read(signed)) == content
    with pytest.raises(UserError, match="https:// cannot be listed"):
        shards.expand([f"{root}/*.tar"])
    with pytest.raises(ShardError):
        list(shards.read(f"{root}/absent.tar"))
    with pytest.raises(UserError, match="can only be read"):
        Folder(f"{root}/out").prepare(settings())


def test_a_read_that_fails_is_tried_again(hub, shard):
    data, content = shard
    hub.plain["a.tar"] = data
    hub.failures = 2
    assert list(shards.read(f"{hub.endpoint}/plain/a.tar")) == content
    assert hub.failures == 0
    hub.failures = 1000
    with pytest.raises(ShardError, match=r"503|Service Unavailable"):
        list(shards.read(f"{hub.endpoint}/plain/a.tar"))


def test_a_shard_that_is_cut_short_is_damaged(hub):
    hub.plain["a.tar"] = tar(("1.jpg", b"1"), ("2.jpg", b"2"))[:-9000]
    with pytest.raises(ShardError, match="truncated"):
        list(shards.read(f"{hub.endpoint}/plain/a.tar"))


def test_a_corpus_is_pushed_and_opened_there(hub, tmp_path):
    found = images("/data/a.tar", 5)
    save(tmp_path / "out", found, (Reject("bad", "no image"),))
    Folder(str(tmp_path / "out")).prepare(settings(), rankings.COLUMNS)
    (tmp_path / "out" / ".a.parquet.x.tmp").write_bytes(b"half")
    corpus = rankings.open(str(tmp_path / "out"))
    assert corpus.push_to_hub("me/rankings") == "hf://datasets/me/rankings"
    files = hub.repos["datasets/me/rankings"]
    table, *_ = corpus.files
    beside = {f"{BESIDE}/{name}" for name in ("search.json", card.FILE, f"rejects/{table}")}
    assert set(files) == {card.FILE, table} | beside
    assert b'data_files: "*.parquet"' in files[card.FILE]

    there = rankings.open("hf://datasets/me/rankings")
    assert there.dataset.to_table().equals(corpus.dataset.to_table())
    assert there.rejects()["key"].to_pylist() == ["bad"] and there.shards() == ["/data/a.tar"]

    files[card.FILE] = b"edited"
    corpus.push_to_hub("me/rankings")
    assert files[card.FILE] == b"edited"


def test_a_folder_of_results_on_the_hub(hub):
    hub.repos["datasets/me/out"] = {"README.md": b"#"}
    home = Folder("hf://datasets/me/out").prepare(settings(), rankings.COLUMNS)
    found = images("/data/a.tar", 3)
    home.write(found.shard, found.table(), [Reject("bad", "no image")], encode=rankings.encode)
    home.record_failure("/data/b.tar", "truncated")
    again = Folder(home.uri).prepare(settings())
    assert again.finished([found.shard, "/data/b.tar"]) == {found.shard} and len(again.failures()) == 1
    again.clear_failure("/data/b.tar")
    assert again.failures() == [] and len(rankings.open(home.uri)) == 3
    assert storage.exists(f"{home.uri}/{BESIDE}/search.json") and not storage.exists(f"{home.uri}/search.json")
