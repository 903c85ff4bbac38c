"""The images of a report: which to show, their pixels as the model sees them, and what was found about each."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from patchrank.data import images, shards
from patchrank.errors import UserError
from patchrank.evaluation import record
from patchrank.pruning.methods import METHODS, UNPRUNED
from patchrank.report.evaluation import Evaluation, at_keep, counted
from patchrank.store import rankings, storage

_SIDE = 224  # pixels of a shown image, at most and, but for a whole factor, at least
# Shards that are looked at for images: more than one, since a shard may hold one class, and few, since their tars are
# read to the last image wanted.
_SHARDS = 4
_POOL = 8  # candidates for each place in a gallery, to spread over the classes
# A perceptually even scale from dark violet over green to yellow (viridis, by its colours at five points).
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
GONE = (120, 170, 230)  # the colour of patches that have left: a grey would pass for part of a black-and-white image
_OPACITY = 222  # of 255: what was there shows through


@dataclass
class Shown:
    """One image.

    Attributes:
        answers: class index by method, of those that have one; `UNPRUNED` among them.
        kept: by method, of those that the report shows, the ids of the tokens that stay.
        matching: by method, the matching rate with the golden ranking.
        ranking: (N,) int, the golden ranking, where it is known.
        picture: the image, encoded, as a data URI.
        size: its width and height in pixels.
    """

    shard: str
    key: str
    label: int | None
    answers: dict[str, int]
    kept: dict[str, list[int]] = field(default_factory=dict)
    matching: dict[str, float] = field(default_factory=dict)
    ranking: np.ndarray | None = None
    picture: str = ""
    size: tuple[int, int] = (1, 1)

    @property
    def changed(self) -> list[str]:
        """The methods that answer otherwise than the unpruned model."""
        whole = self.answers.get(UNPRUNED)
        return [method for method, answer in self.answers.items() if whole is not None and answer != whole]


@dataclass
class Gallery:
    """The images of a report.

    Attributes:
        sample: of all images, spread over the classes.
        changed: where pruning changes the answer; None without answers to compare.
        looked_at: how many images there were to choose from, and
        with_change: how many of them some method answers otherwise.
        notes: what is missing, a line each.
    """

    sample: list[Shown]
    changed: list[Shown] | None
    looked_at: int
    with_change: int
    notes: list[str]


def choose(evaluation: Evaluation, keep: float, count: int, leading: str) -> Gallery:
    """Choose up to `count` images for each gallery, the same ones in every run, and read what is known of them.

    Args:
        leading: the method whose changed answers are shown first.

    Raises:
        UserError: a file of the evaluation is damaged, or its description of the preprocessing is.
    """
    notes: list[str] = []
    pool, there = _candidates(evaluation, keep, count, notes)
    answered = not pool or any(UNPRUNED in one.answers for one in pool)
    losers = [one for one in pool if one.changed]
    sample = _spread(pool, count)
    losers_first = sorted(losers, key=lambda one: leading not in one.changed)  # stable: else in the order of the pool
    changed = _spread(losers_first, count) if answered else []
    wanted = list({(one.shard, one.key): one for one in (*sample, *changed)}.values())
    _read_tokens(evaluation, keep, wanted, there)
    _read_rankings(evaluation, wanted, notes)
    _read_images(evaluation, wanted, notes)
    sample, changed = ([one for one in chosen if one.picture] for chosen in (sample, changed))
    return Gallery(sample, changed if answered else None, len(pool), len(losers), notes)


def _candidates(
    evaluation: Evaluation, keep: float, count: int, notes: list[str]
) -> tuple[list[Shown], dict[str, str]]:
    """The images of a few shards in the order of the hashes of their keys, and each shard's file."""
    pool: list[Shown] = []
    there: dict[str, str] = {}
    gone = []
    if not evaluation.files:
        notes.append(f"{evaluation.folder}: holds no Parquet file, so there are no images to show")
    for file in sorted(evaluation.files, key=_hash):
        enough = len(pool) >= _POOL * count and sum(bool(one.changed) for one in pool) >= _POOL * count
        if not count or (len(there) >= _SHARDS and (enough or len(there) >= 4 * _SHARDS)):
            break
        table = evaluation.rows(file, ["key", "shard", "label", "method", "prediction"], at_keep(keep))
        for shard in pc.unique(table["shard"].cast("string")).to_pylist():
            if not _exists(shard):
                gone.append(shard)
                continue
            there[shard] = file
            found: dict[str, Shown] = {}
            for row in table.filter(pc.equal(table["shard"].cast("string"), shard)).to_pylist():
                one = found.setdefault(row["key"], Shown(shard, row["key"], row["label"], {}))
                if row["prediction"] is not None:
                    one.answers[row["method"]] = row["prediction"]
            pool += found.values()
    if gone:
        notes.append(f"{counted(gone, 'shard')} cannot be found, and the images are of others: {_some(gone)}")
    pool.sort(key=lambda one: _hash(f"{one.shard} {one.key}"))
    return pool, there


def _spread(candidates: Sequence[Shown], count: int) -> list[Shown]:
    """The first of each class before the second of any; unlabelled images by their answer."""
    seen: Counter[int | None] = Counter()
    places = []
    for one in candidates:
        kind = one.answers.get(UNPRUNED) if one.label is None else one.label
        places.append(seen[kind])
        seen[kind] += 1
    order = sorted(range(len(places)), key=lambda index: (places[index], index))
    return [candidates[index] for index in order[:count]]


def _read_tokens(evaluation: Evaluation, keep: float, wanted: Sequence[Shown], there: dict[str, str]) -> None:
    tokens = evaluation.model.grid[0] * evaluation.model.grid[1]
    shown = [name for name, entry in METHODS.items() if entry.shown]
    for shard, mine in _by_shard(wanted).items():
        where = at_keep(keep) & ds.field("key").isin(list(mine)) & ds.field("method").isin(shown)
        for row in evaluation.rows(there[shard], ["key", "shard", "method", "kept", "matching"], where).to_pylist():
            if row["shard"] != shard or row["kept"] is None:
                continue
            if max(row["kept"], default=0) >= tokens:
                path = storage.join(evaluation.folder, there[shard])
                raise UserError(
                    f"{path}: {row['key']} keeps token {max(row['kept'])} of {tokens}; run jobs/evaluate.py again"
                )
            mine[row["key"]].kept[row["method"]] = row["kept"]
            if row["matching"] is not None:
                mine[row["key"]].matching[row["method"]] = row["matching"]


def _read_rankings(evaluation: Evaluation, wanted: Sequence[Shown], notes: list[str]) -> None:
    if evaluation.rankings is None or not wanted:
        return
    tokens = evaluation.model.grid[0] * evaluation.model.grid[1]
    try:
        corpus = rankings.open(evaluation.rankings)
    except UserError as error:
        notes.append(f"no heat maps: {error}")
        return
    for shard, mine in _by_shard(wanted).items():
        try:
            table = corpus.shard(shard, ["key", "ranking"])
        except UserError as error:
            notes.append(f"heat maps are missing: {error}")
            continue
        table = table.filter(pc.is_in(table["key"], pc.cast(list(mine), "string")))
        for row in table.to_pylist():
            ranking = np.array(row["ranking"], dtype=np.int64)
            if np.array_equal(np.sort(ranking), np.arange(tokens)):  # else it is of another grid
                mine[row["key"]].ranking = ranking


def _read_images(evaluation: Evaluation, wanted: Sequence[Shown], notes: list[str]) -> None:
    if not wanted:
        return
    crop = cropping(evaluation)
    for shard, mine in _by_shard(wanted).items():
        missing = dict(mine)
        try:
            for sample in shards.read(shard):
                if isinstance(sample, shards.Sample) and sample.key in missing:
                    one = missing.pop(sample.key)
                    try:
                        one.picture, one.size = _picture(crop(images.decode(sample.image)))
                    except ValueError as error:
                        notes.append(f"{shard}: {sample.key}: {error}")
                if not missing:
                    break
        except shards.ShardError as error:
            notes.append(f"{shard}: cannot be read ({error}); {counted(list(missing), 'image')} not shown")
            continue
        if missing:
            notes.append(
                f"{shard}: {counted(list(missing), 'image')} of the evaluation not in it: {_some(list(missing))}"
            )


def cropping(evaluation: Evaluation) -> Callable[[Image.Image], np.ndarray]:
    """A function from an image to what the model sees of it, (H, W, 3) uint8."""
    from patchrank.model.preprocessing import Preprocess  # open_clip takes seconds to import

    try:
        transform = Preprocess(evaluation.model.preprocess)
        mean, std = (np.array(value, dtype=np.float32).reshape(3, 1, 1) for value in transform.normalised_by)
    except Exception as error:  # torchvision raises what it likes
        path = storage.join(evaluation.folder, record.FILE)
        raise UserError(f"{path}: its preprocess is damaged ({storage.one_line(error)})") from None

    def crop(image: Image.Image) -> np.ndarray:
        pixels = transform(image).numpy() * std + mean  # (3, H, W), as before it was normalised
        return (255 * pixels).clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0)

    return crop


def _picture(pixels: np.ndarray) -> tuple[str, tuple[int, int]]:
    """A data URI of an image at a size that can be seen, (H, W, 3) uint8, and its width and height."""
    image = Image.fromarray(pixels)
    side = max(image.size)
    if side <= _SIDE // 2:  # a small image keeps its pixels
        image = image.resize((image.width * (_SIDE // side), image.height * (_SIDE // side)), Image.Resampling.NEAREST)
        return data_uri(image, "webp", lossless=True), image.size
    if side > _SIDE:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "webp", quality=80, method=6), image.size


def heat(ranking: np.ndarray, grid: tuple[int, int]) -> str:
    """A data URI of `heat_map`."""
    return data_uri(heat_map(ranking, grid), "png")


def heat_map(ranking: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """A picture of the golden ranking, a pixel a patch: dark is of no use, bright most useful."""
    place = np.empty(len(ranking))
    place[ranking] = np.linspace(1, 0, len(ranking))
    colours = np.array(SCALE, dtype=float)
    points = np.linspace(0, 1, len(colours))
    pixels = np.stack([np.interp(place, points, colours[:, channel]) for channel in range(3)], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8).reshape(*grid, 3))


def veil(kept: Sequence[int], grid: tuple[int, int]) -> str:
    """A data URI to lay over an image, a pixel a patch: clear where the patch stays, blue where it has gone."""
    pixels = np.full((grid[0] * grid[1], 4), (*GONE, _OPACITY), dtype=np.uint8)
    pixels[list(kept)] = (*GONE, 0)
    return data_uri(Image.fromarray(pixels.reshape(*grid, 4)), "png")


def data_uri(image: Image.Image, form: str, **options: object) -> str:
    """An encoded image inside a URI."""
    image.save(buffer := io.BytesIO(), form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _by_shard(shown: Sequence[Shown]) -> dict[str, dict[str, Shown]]:
    result: dict[str, dict[str, Shown]] = {}
    for one in shown:
        result.setdefault(one.shard, {})[one.key] = one
    return result


def _exists(shard: str) -> bool:
    try:
        return storage.exists(shard)
    except (OSError, UserError):
        return False


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _some(things: Sequence[str]) -> str:
    return ", ".join(things[:3]) + (", ..." if len(things) > 3 else "")
