"""Images for training, with their golden rankings: shard k and its table k are read together and joined by key.

pairs = Pairs(rankings.open("rankings"), model.preprocess())
for batch in pairs.batches(rank, world, size=32):    # endless
    ...
for batch in pairs.held_out(size=64):                # once over the part that is never trained on
    ...
everything = Pairs(None, model.preprocess(), ["images.tar"], ranked=False)    # images alone
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from patchrank.data.features import Features
from patchrank.data.held_out import is_held_out
from patchrank.data.join import JoinReport, Pair, alone, join
from patchrank.data.pair_batches import PairBatch, batches
from patchrank.data.sizes import Sizes
from patchrank.errors import UserError
from patchrank.model import artifacts
from patchrank.model.tower import Tower
from patchrank.store.folder import file_name
from patchrank.store.rankings import Rankings

LANES = 4  # streams that a global batch is put together from; see `Pairs.batches`

_Part = tuple[str, int, int | None]  # a shard, the first of its training rows, and the one after the last; None for all


def check(corpus: Rankings, tower: Tower, weights: str | None) -> None:
    """Refuse rankings of another model, cut or grid. `weights` is `Model.weights`.

    Raises:
        UserError: names what differs.
    """
    model = {**corpus.settings["model"], "grid": corpus.settings.get("grid")}
    artifacts.check(f"{corpus.folder}: this search was", model, tower, weights)
    if corpus.num_tokens != tower.num_tokens:
        raise UserError(f"{corpus.folder}: ranks {corpus.num_tokens} tokens, and the model has {tower.num_tokens}")


class Pairs:
    """Reads shards, together with a corpus of rankings. A shard at a time and lane, never the whole corpus.

    Args:
        corpus: the rankings; None where there are none.
        preprocess: PIL image -> (3, H, W), the transform of the search.
        shards: URIs as `patchrank.data.shards.expand` gives them; all that the rankings name where None.
        ranked: whether images come with their rankings, those that have one; else all images come, without. Shards that
            a search ranked without a limit are counted by their tables, others by a sizes.json beside them, or else by
            reading them once.
        held_out: share of the images, told by a hash of their keys, that `batches` leaves to `held_out`.
        seed: of all shuffling.
        buffer: so many samples, still encoded, are shuffled among each other; each lane has its share of them.
        threads: that decode images.

    Attributes:
        shards: those that are read, which have rankings where `ranked`, in the order given, or sorted.
        shards_without_rankings: those given that have none.
        reports: by shard read so far, how its samples and rows found each other.
        features: where set, `batches` takes the images' tokens and embeddings from there instead of decoding them.

    Raises:
        UserError: none of the shards has rankings, or a share that is not in 0 .. 1.
    """

    def __init__(
        self,
        corpus: Rankings | None,
        preprocess: Callable[..., Tensor],
        shards: Sequence[str] | None = None,
        held_out: float = 0.1,
        seed: int = 0,
        buffer: int = 2000,
        threads: int = 2,
        *,
        ranked: bool = True,
    ) -> None:
        if not 0 <= held_out <= 1:
            raise UserError(f"--held-out {held_out}: must be 0 to 1")
        self.corpus = corpus
        self.preprocess = preprocess
        self.seed = seed
        self.buffer = buffer
        self.threads = threads
        self.share = held_out
        self.ranked = ranked
        self._tables: Collection[str] = () if corpus is None else set(corpus.files)
        wanted = list(shards or () if corpus is None or shards is not None else corpus.shards())
        self.shards_without_rankings = [uri for uri in wanted if ranked and file_name(uri) not in self._tables]
        self.shards = [uri for uri in wanted if not ranked or file_name(uri) in self._tables]
        if not self.shards:
            assert corpus is not None, "images without rankings need shards"
            raise UserError(
                f"{corpus.folder}: holds rankings of {corpus.shards()[0]} and its like, but of none of the "
                f"{len(self.shards_without_rankings)} shards given, {self.shards_without_rankings[0]} the first; "
                "name the shards as the search did"
            )
        self.reports: dict[str, JoinReport] = {}
        self.features: Features | None = None
        self._sizes = Sizes()

    @property
    def rows(self) -> tuple[int, int]:
        """Images to train on, and held out; about so many, where a sizes.json tells how many there are in all."""
        return sum(train for train, _ in self._counted), sum(held_out for _, held_out in self._counted)

    @functools.cached_property
    def _counted(self) -> list[tuple[int, int]]:
        """The same by shard."""
        with ThreadPoolExecutor(16) as pool:  # for buckets
            return list(pool.map(self._count, self.shards))

    def steps_per_epoch(self, global_batch: int) -> int:
        """Optimiser steps in which as many images are seen as there are to train on, at least 1.

        Raises:
            UserError: there is nothing to train on.
        """
        if not self.ranked and not any(self.rows):
            raise UserError(f"{self._name}: {self._trouble()}")
        if not self.rows[0]:
            raise UserError(f"{self._name}: none of its images is left to train on; lower --held-out")
        return max(1, self.rows[0] // global_batch)

    def batches(self, rank: int, world: int, size: int, accumulation: int = 1, start: int = 0) -> Iterator[PairBatch]:
        """The batches that one rank trains on, without end.

        In every epoch the shards, in a shuffled order, are cut into lanes of as many images each, and a global batch
        takes from the lanes in turn; a rank has every world-th lane and reads the shards of these alone. So an epoch
        has every image once, but for what is left of the last step, every rank has as many batches whatever its shards
        hold, and the images of a step are the same for all numbers of ranks that divide `LANES`. A lane whose images
        are not all there begins again with those that are.

        An image that cannot be decoded leaves its batch one image short.

        Args:
            rank, world: this process and how many there are.
            size: B, images a batch.
            accumulation: batches a rank has in a step; a step has world * accumulation * size images.
            start: the first step, for a run that goes on.

        Raises:
            UserError: nothing can be read, or not one image of a batch.
        """
        lanes = world if LANES % world else LANES
        per_step = accumulation * size
        steps = self.steps_per_epoch(world * per_step)
        for epoch in itertools.count(start // steps):
            streams = [self._lane(epoch, lane, lanes) for lane in range(rank, lanes, world)]
            rows = (next(stream) for stream in itertools.cycle(streams))
            done = start - epoch * steps if epoch == start // steps else 0
            mine = itertools.islice(rows, done * per_step, steps * per_step)
            yield from self._batches(mine, size, training=True)

    def held_out(self, size: int, rank: int = 0, world: int = 1, limit: int | None = None) -> Iterator[PairBatch]:
        """The held-out images once, in the order of the shards; every world-th where several ranks share the work.

        Args:
            size: B, images a batch; the last one may be smaller.
            limit: the first so many, of all ranks together.
        """
        rows = (row for uri in self.shards for row in self._pairs(uri) if is_held_out(row.key, self.share))
        yield from self._batches(itertools.islice(rows, rank, limit, world), size, training=False)

    @property
    def _name(self) -> str:
        """For error messages."""
        return self.shards[0] if self.corpus is None else self.corpus.folder

    def _corpus_of(self, shard: str) -> Rankings | None:
        """The rankings, where the images of a shard are those of its table."""
        if self.corpus is None or file_name(shard) not in self._tables:
            return None
        return self.corpus if self.ranked or self.corpus.settings.get("limit") is None else None

    def _count(self, shard: str) -> tuple[int, int]:
        if corpus := self._corpus_of(shard):
            keys = corpus.shard(shard, ["key"])["key"].to_pylist()
        elif (told := self._sizes.of(shard)) is not None:
            held_out = round(self.share * told)  # about: how the hash divides them is seen when they are read
            return told - held_out, held_out
        else:
            found = JoinReport()
            keys = [pair.key for pair in alone(shard, found)]
            if found.error:
                self.reports[shard] = found
        held_out = sum(is_held_out(key, self.share) for key in keys)
        return len(keys) - held_out, held_out

    def _lane(self, epoch: int, lane: int, lanes: int) -> Iterator[Pair]:
        """The training rows of one lane, shuffled, again and again."""
        order = list(zip(self.shards, self._counted, strict=True))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        rows = sum(train for _, (train, _) in order)
        begin, end = lane * rows // lanes, (lane + 1) * rows // lanes
        mine: list[_Part] = []
        for uri, (train, _) in order:
            if max(begin, 0) < min(end, train):
                mine.append((uri, max(begin, 0), end if end < train else None))
            begin, end = begin - train, end - train
        for turn in itertools.count():
            found = (row for uri, first, last in mine for row in self._training_rows(uri, first, last))
            empty = True
            for row in _shuffled(found, self.buffer // lanes, random.Random(f"{self.seed} {epoch} {lane} {turn}")):
                empty = False
                yield row
            if empty:  # too few images for all lanes, or damaged shards: this lane helps itself from the others
                everything: list[_Part] = [(uri, 0, None) for uri, _ in order]
                if mine == everything:
                    raise UserError(f"{self._name}: {self._trouble()}")
                mine = everything

    def _training_rows(self, shard: str, first: int, last: int | None) -> Iterator[Pair]:
        """The training rows of a shard from number `first` to the one before `last`."""
        rows = (row for row in self._pairs(shard) if not is_held_out(row.key, self.share))
        return itertools.islice(rows, first, last)

    def _pairs(self, shard: str) -> Iterator[Pair]:
        """The samples of a shard, those that have a ranking where it counts; its report is kept once it is whole."""
        found = JoinReport()
        if corpus := self._corpus_of(shard):
            for pair in join(corpus, shard, found):
                yield pair if self.ranked else replace(pair, ranking=None, score=None)
        else:
            yield from alone(shard, found)
        found.undecodable = self.reports.get(shard, found).undecodable
        self.reports[shard] = found

    def _batches(self, rows: Iterable[Pair], size: int, training: bool) -> Iterator[PairBatch]:
        def undecodable(pair: Pair) -> None:
            self.reports.setdefault(pair.shard, JoinReport()).undecodable.add(pair.key)

        features = self.features if training else None
        return batches(rows, self.preprocess, size, self.threads, undecodable, features, in_step=training)

    def _trouble(self) -> str:
        errors = [f"{uri}: {found.error}" for uri, found in self.reports.items() if found.error]
        if errors:
            return f"no image of its shards can be read ({errors[0]})"
        if not self.ranked:
            return "there is no image in its shards that can be read"
        return "no sample of its shards has a ranking; name the shards that were searched"


def _shuffled(rows: Iterable[Pair], size: int, rng: random.Random) -> Iterator[Pair]:
    """The rows in another order: each leaves a buffer of `size` rows at random."""
    buffer: list[Pair] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        elif buffer:
            place = rng.randrange(size)
            buffer[place], row = row, buffer[place]
            yield row
        else:
            yield row
    rng.shuffle(buffer)
    yield from buffer
