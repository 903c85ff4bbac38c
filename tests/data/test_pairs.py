"""Shards and rankings read side by side: joined by key, shared out among ranks, whatever is missing or damaged."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset as wds
from made_up import images, save, settings
from PIL import Image
from torchvision.transforms.functional import to_tensor

from patchrank.data import pairs
from patchrank.data.held_out import is_held_out
from patchrank.data.pair_batches import PairBatch, unranked
from patchrank.data.pairs import Pairs
from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.store import rankings
from patchrank.store.folder import Folder


def write_shard(path, keys, broken=()):
    """A shard whose images hold a colour that follows from the key, so that a swap would be seen."""
    with wds.TarWriter(str(path)) as writer:
        for number, key in enumerate(keys):
            if key in broken:
                writer.write({"__key__": key, "jpg": b"no image", "cls": number % 5})
            else:
                image = Image.fromarray(np.full((4, 5, 3), colour(key), np.uint8))
                writer.write({"__key__": key, "png": image, "cls": number % 5})


def colour(key):
    return int(key[-3:]) % 256


def make_corpus(folder, sizes, tar_sizes=None, broken=()):
    """Rankings and shards; a shard of size n has keys SHARD-000 to SHARD-(n - 1). A made-up search has no images."""
    uris = []
    for number, size in enumerate(sizes):
        uri = str(folder / f"images-{number:03d}.tar")
        made = images(uri, size, seed=number)
        made.keys[:] = [f"{number}-{row:03d}" for row in range(size)]
        save(folder / "rankings", made)
        write_shard(uri, [f"{number}-{row:03d}" for row in range((tar_sizes or sizes)[number])], broken)
        uris.append(uri)
    return rankings.open(str(folder / "rankings")), uris


def take(batches, count):
    return list(itertools.islice(batches, count))


def keys_of(batches):
    return [key for batch in batches for key in batch.keys]


def steps(reader, world, size, count, accumulation=1, start=0):
    """The keys of each of `count` steps, of all ranks together, sorted."""
    streams = [reader.batches(rank, world, size, accumulation, start) for rank in range(world)]
    return [sorted(key for stream in streams for key in keys_of(take(stream, accumulation))) for _ in range(count)]


def test_every_image_comes_with_its_own_ranking_score_and_label(tmp_path):
    corpus, uris = make_corpus(tmp_path, [12, 7])
    by_key = {row["key"]: row for row in corpus.dataset.to_table().to_pylist()}
    reader = Pairs(corpus, to_tensor, held_out=0.3)
    seen = take(reader.batches(0, 1, size=5), 6) + list(reader.held_out(size=4))
    for batch in seen:
        for row, key in enumerate(batch.keys):
            assert batch.ranking[row].tolist() == by_key[key]["ranking"]
            assert batch.score[row].tolist() == pytest.approx(by_key[key]["score"])
            assert batch.labels[row] == int(key[-3:]) % 5
            assert (batch.pixels[row] * 255).round().int().unique().tolist() == [colour(key)]
    batch = seen[0]
    assert batch.pixels.shape == (5, 3, 4, 5) and batch.ranking.shape == (5, 20)
    assert [batch.labels.dtype, batch.ranking.dtype, batch.score.dtype] == [torch.int64, torch.int64, torch.float32]
    assert reader.shards == uris


def test_the_held_out_part_is_never_trained_on_and_the_same_for_everybody(tmp_path):
    corpus, _ = make_corpus(tmp_path, [20, 20, 20])
    reader = Pairs(corpus, to_tensor, held_out=0.25)
    held_out = keys_of(reader.held_out(size=8))
    everything = {f"{shard}-{row:03d}" for shard in range(3) for row in range(20)}
    assert held_out == sorted(key for key in everything if is_held_out(key, 0.25))
    assert reader.rows == (60 - len(held_out), len(held_out)) and 5 < len(held_out) < 25
    trained_on = keys_of(take(reader.batches(0, 1, size=8), 24))
    assert set(trained_on) == everything - set(held_out)
    other = Pairs(corpus, to_tensor, reader.shards[1:], held_out=0.25, seed=5)
    assert keys_of(other.held_out(size=3)) == [key for key in held_out if key[0] != "0"]
    assert sorted(keys_of(Pairs(corpus, to_tensor, held_out=1.0).held_out(size=50))) == sorted(everything)
    assert keys_of(Pairs(corpus, to_tensor, held_out=0).held_out(size=50)) == []


def test_ranks_share_the_held_out_part_out(tmp_path):
    reader = Pairs(make_corpus(tmp_path, [30, 30])[0], to_tensor, held_out=0.5)
    alone = keys_of(reader.held_out(size=4))
    assert keys_of(reader.held_out(size=4, limit=9)) == alone[:9]
    shared = [keys_of(reader.held_out(4, rank, 3, limit=20)) for rank in range(3)]
    assert sorted(itertools.chain(*shared)) == sorted(alone[:20])


def test_an_epoch_holds_every_image_once_and_each_has_its_own_order(tmp_path):
    corpus, _ = make_corpus(tmp_path, [16] * 8)
    reader = Pairs(corpus, to_tensor, held_out=0, seed=3)
    assert reader.steps_per_epoch(16) == 8
    batches = take(reader.batches(0, 1, size=16), 16)
    first, second = keys_of(batches[:8]), keys_of(batches[8:])
    assert set(Counter(first).values()) == set(Counter(second).values()) == {1}
    assert len(first) == len(second) == 128 and first != second
    assert len({key[0] for key in batches[0].keys}) >= 4  # shards are mixed within a batch
    again = keys_of(take(Pairs(corpus, to_tensor, held_out=0, seed=3).batches(0, 1, size=16), 16))
    assert again == first + second
    assert keys_of(take(Pairs(corpus, to_tensor, held_out=0, seed=4).batches(0, 1, size=16), 8)) != first


@pytest.mark.parametrize("sizes", [[30, 30], [3, 30, 10, 1, 7, 22]])
def test_a_step_holds_the_same_images_for_every_number_of_ranks(tmp_path, sizes):
    reader = Pairs(make_corpus(tmp_path, sizes)[0], to_tensor)
    count = 2 * reader.steps_per_epoch(16) + 1
    alone = steps(reader, world=1, size=16, count=count)
    assert steps(reader, world=2, size=8, count=count) == alone
    assert steps(reader, world=1, size=4, accumulation=4, count=count) == alone
    assert steps(reader, world=4, size=2, accumulation=2, count=count) == alone


def test_a_run_goes_on_where_it_stopped(tmp_path):
    reader = Pairs(make_corpus(tmp_path, [10, 15, 20])[0], to_tensor)
    assert reader.steps_per_epoch(12) == 3
    whole = steps(reader, world=2, size=3, accumulation=2, count=8)
    for start in (1, 3, 4, 7):
        assert steps(reader, world=2, size=3, accumulation=2, count=8 - start, start=start) == whole[start:]


@pytest.mark.parametrize("world", [3, 7])
def test_more_ranks_than_shards_of_unequal_size_have_as_many_batches_each(tmp_path, world):
    reader = Pairs(make_corpus(tmp_path, [30, 2])[0], to_tensor, held_out=0.2)
    count = 3 * reader.steps_per_epoch(world * 2)
    seen = steps(reader, world, size=2, count=count)
    assert [len(step) for step in seen] == [world * 2] * count
    expected = {key for key in (f"0-{row:03d}" for row in range(30)) if not is_held_out(key, 0.2)}
    often = Counter(key for key in itertools.chain(*seen) if key[0] == "0")
    assert often.keys() <= expected and sum(often.values()) >= 0.8 * world * 2 * count


def test_a_corpus_of_fewer_images_than_lanes_is_enough(tmp_path):
    reader = Pairs(make_corpus(tmp_path, [2])[0], to_tensor, held_out=0)
    assert reader.steps_per_epoch(64) == 1
    assert Counter(keys_of(take(reader.batches(1, 2, size=6), 1))).keys() <= {"0-000", "0-001"}


def test_rows_and_samples_without_a_partner_are_counted_and_cost_nothing_else(tmp_path):
    corpus, uris = make_corpus(tmp_path, [10, 10], tar_sizes=[13, 6])
    reader = Pairs(corpus, to_tensor, held_out=1.0)
    keys = keys_of(reader.held_out(size=4))
    assert keys == [f"0-{row:03d}" for row in range(10)] + [f"1-{row:03d}" for row in range(6)]
    more, fewer = (reader.reports[uri] for uri in uris)
    assert (more.joined, more.without_ranking, more.without_image) == (10, 3, 0)
    assert (fewer.joined, fewer.without_ranking, fewer.without_image) == (6, 0, 4)
    assert set(keys_of(take(Pairs(corpus, to_tensor, held_out=0).batches(0, 1, size=4), 12))) == set(keys)


def test_the_samples_past_the_limit_of_the_search_are_not_read(tmp_path):
    corpus, uris = make_corpus(tmp_path, [4], tar_sizes=[9])
    corpus.settings["limit"] = 4
    reader = Pairs(corpus, to_tensor, held_out=1.0)
    assert len(keys_of(reader.held_out(size=4))) == 4 and reader.reports[uris[0]].without_ranking == 0


def test_an_image_that_cannot_be_decoded_leaves_its_place_empty(tmp_path):
    whole = Pairs(make_corpus(tmp_path, [40])[0], to_tensor, held_out=0)
    (tmp_path / "b").mkdir()
    corpus, uris = make_corpus(tmp_path / "b", [40], broken={"0-007", "0-021"})
    reader = Pairs(corpus, to_tensor, held_out=0)
    good = steps(whole, 1, 8, 10)
    assert steps(reader, 1, 8, 10) == [[key for key in step if key not in ("0-007", "0-021")] for step in good]
    assert reader.reports[uris[0]].undecodable == {"0-007", "0-021"}


def test_a_batch_without_one_image_that_can_be_decoded_is_an_error(tmp_path):
    corpus, uris = make_corpus(tmp_path, [9], broken={f"0-{row:03d}" for row in range(9)})
    with pytest.raises(UserError, match=f"{uris[0]}: its images cannot be decoded any more, 4 in a row"):
        next(Pairs(corpus, to_tensor, held_out=0).batches(0, 1, size=4))


def test_a_damaged_shard_costs_itself_alone(tmp_path):
    corpus, uris = make_corpus(tmp_path, [20, 20, 20])
    (tmp_path / "images-001.tar").unlink()
    data = (tmp_path / "images-002.tar").read_bytes()
    (tmp_path / "images-002.tar").write_bytes(data[: len(data) // 2])
    reader = Pairs(corpus, to_tensor, held_out=0)
    seen = Counter(keys_of(take(reader.batches(0, 1, size=10), 30)))
    assert {f"0-{row:03d}" for row in range(20)} <= seen.keys()
    assert {key[0] for key in seen} == {"0", "2"}
    assert reader.reports[uris[1]].error and "truncated" in reader.reports[uris[2]].error
    assert reader.reports[uris[1]].without_image == 20


def test_a_corpus_of_which_nothing_can_be_read_is_an_error_with_the_reason(tmp_path):
    corpus, uris = make_corpus(tmp_path, [5])
    (tmp_path / "images-000.tar").unlink()
    with pytest.raises(UserError, match=f"no image of its shards can be read \\({uris[0]}: No such file"):
        next(Pairs(corpus, to_tensor, held_out=0).batches(0, 2, size=4))
    write_shard(uris[0], ["9-001", "9-002"])
    with pytest.raises(UserError, match="no sample of its shards has a ranking"):
        next(Pairs(corpus, to_tensor, held_out=0).batches(0, 2, size=4))
    with pytest.raises(UserError, match="none of its images is left to train on; lower --held-out"):
        next(Pairs(corpus, to_tensor, held_out=1.0).batches(0, 1, size=4))


def test_shards_without_rankings_are_told_and_all_of_them_an_error(tmp_path):
    corpus, uris = make_corpus(tmp_path, [4, 4])
    stranger = str(tmp_path / "elsewhere.tar")
    reader = Pairs(corpus, to_tensor, [stranger, uris[1]])
    assert (reader.shards, reader.shards_without_rankings) == ([uris[1]], [stranger])
    with pytest.raises(UserError, match=r"images-000.tar.* but of none of the 1 shards given, .*elsewhere.tar"):
        Pairs(corpus, to_tensor, [stranger])
    with pytest.raises(UserError, match=r"--held-out 1.5: must be 0 to 1"):
        Pairs(corpus, to_tensor, held_out=1.5)


def test_tables_are_read_when_their_lane_gets_there(tmp_path, monkeypatch):
    corpus, _ = make_corpus(tmp_path, [16] * 24)
    reader, read = Pairs(corpus, to_tensor, held_out=0, buffer=8), []
    tensors = corpus.tensors
    monkeypatch.setattr(corpus, "tensors", lambda columns, shard: read.append(shard) or tensors(columns, shard))
    next(reader.batches(0, 1, size=4))
    assert len(read) == pairs.LANES
    next(reader.batches(1, 4, size=2))
    assert len(read) == pairs.LANES + 1


def test_rankings_of_another_model_cut_or_grid_are_refused(tmp_path, small_clip):
    tower = Tower(small_clip().visual, cut=3)
    corpus, _ = make_corpus(tmp_path, [4])
    pairs.check(corpus, tower, "0123abcd")
    with pytest.raises(UserError, match="rankings: this search was made for another model: weights 0123abcd, here f"):
        pairs.check(corpus, tower, "f")
    with pytest.raises(UserError, match="another --cut: 3, here 1"):
        pairs.check(corpus, Tower(small_clip().visual, cut=1), "0123abcd")
    with pytest.raises(UserError, match="a grid of tokens of 4 x 5, here 4 x 4"):
        pairs.check(corpus, Tower(small_clip(image_size=16).visual, cut=3), "0123abcd")


def test_a_folder_without_rankings_is_refused(tmp_path):
    Folder(str(tmp_path / "rankings")).prepare(settings())
    with pytest.raises(UserError, match="holds no rankings yet"):
        rankings.open(str(tmp_path / "rankings"))


def test_images_that_were_never_ranked_can_be_read_too(tmp_path):
    write_shard(tmp_path / "a.tar", ["0-001", "0-002", "0-003"], broken={"0-002"})
    lost = []
    batches = list(unranked([str(tmp_path / "a.tar")], to_tensor, 2, undecodable=lost.append))
    assert keys_of(batches) == ["0-001", "0-003"] and lost == ["0-002"]
    assert isinstance(batches[0], PairBatch) and batches[0].ranking is None and batches[0].labels.tolist() == [0]
    assert keys_of(unranked([str(tmp_path / "a.tar")], to_tensor, 2, limit=1)) == ["0-001"]
    assert keys_of(unranked([str(tmp_path / "a.tar")], to_tensor, 1)) == ["0-001", "0-003"]  # a batch is lost
    write_shard(tmp_path / "c.tar", ["1-001", "1-002", "1-003"])
    both = [str(tmp_path / "a.tar"), str(tmp_path / "c.tar")]
    parts = [keys_of(unranked(both, to_tensor, 2, limit=5, rank=rank, world=2)) for rank in range(2)]
    assert parts == [["0-001", "0-003", "1-002"], ["1-001"]]  # "0-002" is one of the five
    with pytest.raises(UserError, match=r"b.tar: No such file"):
        list(unranked([str(tmp_path / "b.tar")], to_tensor, 2))


def test_the_hash_holds_out_the_share_asked_for():
    share = np.mean([is_held_out(f"n{number:08d}", 0.1) for number in range(10_000)])
    assert abs(share - 0.1) < 0.01
    assert is_held_out("anything", 1.0) and not is_held_out("anything", 0.0)
