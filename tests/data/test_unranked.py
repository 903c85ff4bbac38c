"""Images that teach without rankings: of shards with a table, with part of one, and with none."""

from __future__ import annotations

import pytest
from test_pairs import colour, keys_of, make_corpus, steps, take, write_shard
from torchvision.transforms.functional import to_tensor

from patchrank.data import sizes
from patchrank.data.held_out import is_held_out
from patchrank.data.pairs import Pairs
from patchrank.errors import UserError
from patchrank.store import rankings
from patchrank.store.folder import Folder


def test_all_images_come_once_without_rankings(tmp_path):
    """Of ranked shards those in their tables, of others all; nothing that is held out."""
    corpus, uris = make_corpus(tmp_path, [12, 9], tar_sizes=[15, 9])
    write_shard(tmp_path / "other.tar", [f"x-{row:03d}" for row in range(11)])
    shards = [*uris, str(tmp_path / "other.tar")]
    keys = [f"0-{row:03d}" for row in range(12)] + [f"1-{row:03d}" for row in range(9)]
    keys += [f"x-{row:03d}" for row in range(11)]
    reader = Pairs(corpus, to_tensor, shards, held_out=0, ranked=False)
    assert reader.rows == (32, 0) and not reader.shards_without_rankings
    batches = take(reader.batches(0, 1, 4), 8)
    assert sorted(keys_of(batches)) == sorted(keys)
    for batch in batches:
        assert batch.ranking is None and batch.score is None
        colours = (batch.pixels[:, 0, 0, 0] * 255).round().int().tolist()
        assert colours == [colour(key) for key in batch.keys]
    part = Pairs(corpus, to_tensor, shards, held_out=0.2, ranked=False)
    held_out = [key for key in keys if is_held_out(key, 0.2)]
    assert part.rows == (32 - len(held_out), len(held_out)) and held_out
    assert sorted(keys_of(part.held_out(4))) == sorted(held_out)
    assert not set(keys_of(take(part.batches(0, 1, 4), 20))) & set(held_out)


def test_a_file_beside_shards_tells_their_sizes_and_they_are_not_read_to_be_counted(tmp_path):
    keys = {name: [f"{name}-{row:03d}" for row in range(size)] for name, size in (("a", 40), ("b", 24), ("c", 8))}
    for name, rows in keys.items():
        write_shard(tmp_path / f"{name}.tar", rows)
    sizes.write(str(tmp_path), {"a.tar": 40})
    sizes.write(str(tmp_path), {"b.tar": 24})  # beside those that are there
    uris = [str(tmp_path / f"{name}.tar") for name in keys]
    counted = Pairs(None, to_tensor, uris, held_out=0.1, ranked=False)
    held_out = sum(is_held_out(key, 0.1) for key in keys["c"])
    assert counted.rows == (36 + 22 + 8 - held_out, 4 + 2 + held_out)
    training = {key for rows in keys.values() for key in rows if not is_held_out(key, 0.1)}
    assert set(keys_of(take(counted.batches(0, 1, 4), 200))) == training  # whatever the hash makes of them
    (tmp_path / "a.tar").unlink()
    assert Pairs(None, to_tensor, uris, held_out=0.1, ranked=False).rows == counted.rows
    for damaged in ("[1]", "{", '{"a.tar": -1}', '{"a.tar": "40"}'):
        (tmp_path / "sizes.json").write_text(damaged)
        with pytest.raises(UserError, match=r"sizes\.json: damaged \(.*\); without it shards are counted by reading"):
            Pairs(None, to_tensor, uris, ranked=False).steps_per_epoch(4)


def test_a_search_with_a_limit_leaves_the_others_to_the_model(tmp_path):
    corpus, uris = make_corpus(tmp_path, [10])
    limited = Folder(str(tmp_path / "limited")).prepare(corpus.settings | {"limit": 4})
    limited.write(uris[0], corpus.shard(uris[0])[:4], encode=rankings.encode)
    few = rankings.open(str(tmp_path / "limited"))
    assert sum(Pairs(few, to_tensor).rows) == 4
    assert sum(Pairs(few, to_tensor, ranked=False).rows) == 10


def test_steps_are_the_same_for_every_number_of_ranks_and_for_a_run_that_goes_on(tmp_path):
    write_shard(tmp_path / "a.tar", [f"a-{row:03d}" for row in range(40)])
    write_shard(tmp_path / "b.tar", [f"b-{row:03d}" for row in range(24)])
    shards = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    reader = Pairs(None, to_tensor, shards, held_out=0, ranked=False)
    alone = steps(reader, 1, 16, 6)
    assert steps(reader, 2, 8, 6) == steps(reader, 4, 4, 6) == alone
    assert steps(reader, 2, 8, 3, start=3) == alone[3:]


def test_shards_that_cannot_be_read_cost_themselves_alone(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    write_shard(tmp_path / "good.tar", [f"g-{row:03d}" for row in range(8)])
    bad, good = str(tmp_path / "bad.tar"), str(tmp_path / "good.tar")
    reader = Pairs(None, to_tensor, [bad, good], held_out=0, ranked=False)
    assert reader.rows == (8, 0) and len(set(keys_of(take(reader.batches(0, 1, 4), 2)))) == 8
    assert reader.reports[bad].error
    with pytest.raises(UserError, match=r"bad\.tar: no image of its shards can be read \(.*bad\.tar: "):
        Pairs(None, to_tensor, [bad], ranked=False).steps_per_epoch(1)
    with pytest.raises(UserError, match=r"good\.tar: none of its images is left to train on; lower --held-out"):
        Pairs(None, to_tensor, [good], held_out=1.0, ranked=False).steps_per_epoch(1)
