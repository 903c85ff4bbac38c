"""What an evaluation comes to: the record in figures.json, written when all shards are through."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, Self, get_args, get_origin, get_type_hints

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.folder import Folder

FILE = "figures.json"
RECALLS = ("1", "5", "10")
EQUAL_COST = "equal multiply-adds"  # what methods are compared at since 0.2
_WORDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}  # in errors


@dataclass(frozen=True)
class Figure:
    """What is left of the model by one method at one keep rate; shares in 0 .. 1, None where they were not measured.

    Attributes:
        matching: with golden rankings, at as many tokens as this method keeps, unless others were asked for.
        multiply_adds, counted: of an image, by the formula and as PyTorch counts them.
    """

    method: str
    keep: float
    images: int
    labelled: int
    top1: float | None
    top5: float | None
    cosine: float | None
    matching: float | None
    multiply_adds: float
    counted: float | None = None


@dataclass(frozen=True)
class ClassFigure:
    """Top-1 accuracy on the images of one class."""

    label: int
    method: str
    keep: float
    images: int
    top1: float | None
    name: str


@dataclass(frozen=True)
class Latency:
    """The time of one batch, pruned and unpruned, and what multiply-adds alone would lead one to expect."""

    method: str
    keep: float
    batch: int
    seconds: float
    unpruned_seconds: float
    speedup: float
    rounds: int | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10 (`RECALLS`), of captions by image and of images by caption."""

    method: str
    keep: float
    images: int
    captions: int
    image_to_text: dict[str, float | None]
    text_to_image: dict[str, float | None]


@dataclass(frozen=True)
class Neighbours:
    """How many of an image's nearest neighbours, as unpruned embeddings have them, stay its nearest ones.

    Attributes:
        images: in the index; each of them asks for its `nearest` nearest others.
        pruned_queries: the share that stays where queries alone are pruned.
        pruned_index: where the index alone is.
        pruned: where both are.
        mixed: where every other image of the index is, by queries of either kind.
        first_by_pruned_queries: recall at 1: the share of pruned queries whose own image is the nearest of an unpruned
            index.
        first_in_pruned_index: the share of unpruned queries whose own image is the nearest of a pruned index.
    """

    method: str
    keep: float
    images: int
    nearest: int
    pruned_queries: float
    pruned_index: float
    pruned: float
    mixed: float
    first_by_pruned_queries: float
    first_in_pruned_index: float


@dataclass(frozen=True)
class Model:
    """What was evaluated. `grid`: rows and columns of patches; `preprocess`: fields of open_clip's PreprocessCfg."""

    name: str
    pretrained: str | None
    weights: str
    cut: int
    grid: tuple[int, int]
    dtype: str
    preprocess: dict[str, Any]

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"a grid of {self.grid[0]} by {self.grid[1]}")

    @property
    def title(self) -> str:
        """The name without the folders of a `local-dir:` or `hf:` path."""
        kind, _, path = self.name.partition(":")
        local = kind == "local-dir" or (kind == "hf" and path.count("/") != 1)
        return path.rstrip("/").rpartition("/")[2] or path if local else self.name


@dataclass(frozen=True)
class Record:
    """All of it.

    Attributes:
        shards: their URIs.
        rankings: the URI of the golden rankings that it compared with, if any.
        device: what was timed.
        images: how many were evaluated.
        compared_at: `EQUAL_COST`; None in an evaluation of before, where token merging and the like were matched to
            dropping alone, and learnable tokens came on top.
    """

    model: Model
    class_names: list[str] | None
    shards: list[str]
    rankings: str | None
    device: str
    images: int
    figures: list[Figure]
    classes: list[ClassFigure]
    latency: list[Latency]
    retrieval: list[Retrieval]
    compared_at: str | None = None
    neighbours: list[Neighbours] = field(default_factory=list)  # none in an evaluation of before 0.2

    def __post_init__(self) -> None:
        if not self.figures:
            raise ValueError("it has no figures")

    def write(self, folder: Folder) -> None:
        """Write figures.json, where `Folder.beside` says. Raises OSError."""
        storage.write_atomic(folder.beside(FILE), json.dumps(asdict(self), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, folder: str) -> Self:
        """The record of an evaluation folder, local, s3:// or gs://.

        Raises:
            UserError: no such folder, it is none of an evaluation or of one that has not come to its end, or its
                figures are damaged.
        """
        home = Folder(folder, "evaluation")
        try:
            path = home.beside(FILE)
            if not storage.exists(home.uri):
                raise UserError(f"{folder}: no such folder")
            data = storage.read_bytes(path)
        except FileNotFoundError:
            begun = storage.exists(home.beside("evaluation.json"))
            lacks = f"{FILE} yet" if begun else f"{FILE}, so it is not a folder of an evaluation"
            raise UserError(f"{folder}: holds no {lacks}; run jobs/evaluate.py to its end") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({storage.one_line(error)})") from None
        try:
            return _checked(cls, json.loads(data))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({storage.one_line(error)}); run jobs/evaluate.py again") from None


def _checked(kind: Any, value: Any) -> Any:
    """A JSON value as what an annotation says. Raises ValueError, TypeError or LookupError where it is none."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = [
            each.name
            for each in fields(kind)
            if each.name in value or (each.default is MISSING and each.default_factory is MISSING)
        ]
        return kind(**{name: _checked(hints[name], value[name]) for name in names})  # type: ignore[operator]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if NoneType in inner:  # Python's JSON knows NaN, the mean of nothing
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return None if missing else _checked(inner[0], value)
    if origin is tuple:
        return tuple(_checked(each, one) for each, one in zip(inner, value, strict=True))
    allowed: Any = (int, float) if origin is float else origin
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise TypeError(f"{value!r} where {_WORDS[origin]} belongs")
    if origin is float and not math.isfinite(value):
        raise ValueError(f"{value} where a number belongs")
    if origin is list:
        return [_checked(inner[0], one) for one in value]
    if origin is dict and inner[1] is not Any:
        return {name: _checked(inner[1], one) for name, one in value.items()}
    return value
