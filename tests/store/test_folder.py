"""A results folder goes on with its own search only, and knows what is finished and what failed."""

from __future__ import annotations

import json

import pytest
from made_up import images, save, settings, written

from patchrank.errors import UserError
from patchrank.store import rankings
from patchrank.store.folder import BESIDE, Folder, Reject, file_name


def test_the_same_search_goes_on_in_its_folder(tmp_path):
    folder = str(tmp_path / "out")
    first = Folder(folder).prepare(settings()).fingerprint
    before = (tmp_path / "out" / BESIDE / "search.json").read_bytes()
    assert len(first) == 16
    assert Folder(folder).prepare(settings(about={"patchrank": "9"}, grid=(4, 5))).fingerprint == first
    assert (tmp_path / "out" / BESIDE / "search.json").read_bytes() == before
    assert Folder(str(tmp_path / "other")).prepare(settings(limit=3)).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 7}, "limit: null there, 7 now"),
        ({"search": {"score": "preservation", "block": 2, "remove_per_step": 4}}, "search.block: 1 there, 2 now"),
        ({"classes": None, "limit": 1}, 'classes: "4567" there, null now, limit: null there, 1 now'),
        ({"classes": None, "limit": 1, "grid": [1, 20], "keep_rates": []}, ", and 2 more"),
        ({"search": {"score": "preservation"}}, "search.block: 1 there, not set now"),
        ({"new": True}, "new: not set there, true now"),
    ],
)
def test_another_search_is_refused(tmp_path, changes, message):
    Folder(str(tmp_path)).prepare(settings())
    with pytest.raises(UserError) as error:
        Folder(str(tmp_path)).prepare(settings(**changes))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) and "--out" in str(error.value)
    assert str(error.value).count(" there") <= 2
    assert json.loads((tmp_path / BESIDE / "search.json").read_bytes())["settings"] == settings()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "1"}', b'{"format": 1, "settings": 3}', b"\xff"])
def test_a_damaged_search_json_is_refused(tmp_path, content):
    (tmp_path / "search.json").write_bytes(content)
    with pytest.raises(UserError, match=r"search\.json: damaged"):
        Folder(str(tmp_path)).prepare(settings())
    with pytest.raises(UserError, match=r"search\.json: damaged"):
        rankings.open(str(tmp_path))


def test_an_edited_search_json_is_refused(tmp_path):
    Folder(str(tmp_path)).prepare(settings())
    path = tmp_path / BESIDE / "search.json"
    path.write_text(path.read_text().replace('"block": 1', '"block": 2'))
    with pytest.raises(UserError, match="was edited"):
        Folder(str(tmp_path)).prepare(settings())


def test_a_folder_of_another_version_is_refused(tmp_path):
    Folder(str(tmp_path)).prepare(settings())
    path = tmp_path / BESIDE / "search.json"
    path.write_text(path.read_text().replace('"format": "1"', '"format": "99"'))
    with pytest.raises(UserError, match="has format 99"):
        rankings.open(str(tmp_path))


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"loose: holds Parquet files, but no search\.json"):
        Folder(str(tmp_path / "loose")).prepare(settings())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be used"):
        Folder(str(tmp_path / "file")).prepare(settings())


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    found = images("/data/a.tar", 3)
    save(tmp_path, found, (Reject("x", "no image"),))
    Folder(str(tmp_path)).record_failure(found.shard, "cut short")
    keep = written(tmp_path)
    for place in ("", BESIDE, f"{BESIDE}/rejects", f"{BESIDE}/failed"):
        (tmp_path / place / ".a-1234.parquet.xyz.tmp").write_bytes(b"half")
    Folder(str(tmp_path)).prepare(settings())
    assert written(tmp_path) == keep


def test_finished_shards_are_listed_and_not_opened(tmp_path):
    folder = Folder(str(tmp_path))
    shards = [f"s3://bucket/{split}/{number}.tar" for split in "ab" for number in range(500)]
    assert folder.finished(shards) == set()
    assert Folder(str(tmp_path / "nowhere")).finished(shards) == set()
    for shard in shards[:700]:
        (tmp_path / file_name(shard)).write_bytes(b"no Parquet file")
    (tmp_path / file_name(shards[800])).touch()
    (tmp_path / f".{file_name(shards[801])}.x.tmp").write_bytes(b"half")
    for shard in shards[:3]:
        folder.record_failure(shard, "cut short")
    assert folder.finished(shards) == set(shards[3:700])
    folder.clear_failure(shards[0])
    folder.clear_failure(shards[0])
    assert folder.finished(shards[:5]) == {shards[0], shards[3], shards[4]}
    assert folder.failures() == [{"shard": shard, "error": "cut short"} for shard in shards[1:3]]


def test_a_damaged_failure_record_still_tells_of_a_failure(tmp_path):
    Folder(str(tmp_path)).record_failure("/data/a.tar", "cut short")
    (tmp_path / BESIDE / "failed" / "b-01234567.json").touch()
    (tmp_path / BESIDE / "failed" / "c-01234567.json").write_text('{"shard": 1}')
    first, second, third = Folder(str(tmp_path)).failures()
    assert first == {"shard": "/data/a.tar", "error": "cut short"}
    for record, name in ((second, "b-01234567"), (third, "c-01234567")):
        assert record["shard"] == name and f"failed/{name}.json is damaged" in record["error"]


def test_an_evaluation_keeps_its_folder_as_a_search_does(tmp_path):
    folder = Folder(str(tmp_path), "evaluation").prepare(settings())
    assert json.loads((tmp_path / BESIDE / "evaluation.json").read_bytes())["format"] == "1"
    folder.write("/data/a.tar", images("/data/a.tar", 2).table())
    folder.write("/data/b.tar", images("/data/b.tar", 0).table(), error="cut short")
    assert folder.tables(["/data/b.tar", "/data/a.tar"]) == [file_name("/data/a.tar")]
    assert Folder(str(tmp_path), "evaluation").finished(["/data/a.tar", "/data/b.tar"]) == {"/data/a.tar"}
    with pytest.raises(UserError, match="holds another evaluation"):
        Folder(str(tmp_path), "evaluation").prepare(settings(limit=1))


def test_a_part_of_a_shard_does_not_pass_for_the_whole(tmp_path):
    folder, found = Folder(str(tmp_path)), images("/data/a.tar", 3)
    folder.write(found.shard, found.table(), [Reject("x", "no image")], error="cut short")
    assert folder.tables([found.shard]) and folder.finished([found.shard]) == set()
    folder.write(found.shard, found.table())
    assert folder.finished([found.shard]) == {found.shard} and folder.failures() == []


def test_a_training_has_neither_tables_nor_a_format(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    folder = Folder(str(tmp_path), "training").prepare({"steps": 3, "test": ("a",)})
    assert folder.holds() and not Folder(str(tmp_path), "training", "0" * 16).holds()
    assert json.loads((tmp_path / "training.json").read_bytes()).keys() == {"fingerprint", "settings"}
    assert Folder(str(tmp_path), "training").prepare({"steps": 3, "test": ["a"]}).fingerprint == folder.fingerprint
    with pytest.raises(UserError, match=r"holds another training \(steps: 3 there, 4 now, test: "):
        Folder(str(tmp_path), "training").prepare({"steps": 4})
    (tmp_path / "training.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"training\.json: damaged; delete the folder and train again"):
        folder.holds()
