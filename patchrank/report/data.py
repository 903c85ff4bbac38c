"""Reading an evaluation folder for its report: the figures, checked, and the names that people read."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from patchrank.errors import UserError
from patchrank.evaluation import figures
from patchrank.pruning.methods import METHODS, UNPRUNED
from patchrank.store import storage
from patchrank.store.folder import Folder

_TOLERANCE = 1e-6  # between keep rates that are meant to be equal
RECALLS = ("1", "5", "10")


@dataclass(frozen=True)
class Figure:
    """What is left of the model by one method at one keep rate; shares in 0 .. 1, None where they were not measured."""

    method: str
    keep: float
    images: int
    labelled: int
    top1: float | None
    top5: float | None
    cosine: float | None
    matching: float | None
    multiply_adds: float


@dataclass(frozen=True)
class ClassFigure:
    """Top-1 accuracy on the images of one class."""

    label: int
    name: str
    method: str
    keep: float
    images: int
    top1: float | None


@dataclass(frozen=True)
class Latency:
    """The time of one batch, pruned and unpruned, and what multiply-adds alone would lead one to expect."""

    method: str
    keep: float
    batch: int
    seconds: float
    unpruned_seconds: float
    speedup: float
    predicted: float | None


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10 (`RECALLS`), of captions by image and of images by caption."""

    method: str
    keep: float
    images: int
    captions: int
    image_to_text: tuple[float | None, ...]
    text_to_image: tuple[float | None, ...]


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

    @property
    def title(self) -> str:
        """The name without the folders of a `local-dir:` path."""
        kind, _, path = self.name.partition(":")
        return path.rstrip("/").rpartition("/")[2] or path if kind == "local-dir" else self.name


@dataclass(frozen=True)
class Evaluation:
    """An evaluation folder.

    Attributes:
        folder: its URI, absolute.
        rankings: the URI of the golden rankings that it compared with, if any.
        images: how many were evaluated.
    """

    folder: str
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

    @functools.cached_property
    def methods(self) -> list[str]:
        """The ways of pruning, in the order of `METHODS`; unknown ones after them. Without "unpruned"."""
        return in_order({one.method for one in self.figures} - {UNPRUNED})

    @functools.cached_property
    def keep_rates(self) -> list[float]:
        """The keep rates of those, largest first."""
        return sorted({one.keep for one in self.figures if one.method != UNPRUNED}, reverse=True)

    @property
    def unpruned(self) -> Figure | None:
        """The figures of the whole model."""
        return next((one for one in self.figures if one.method == UNPRUNED), None)

    @property
    def labelled(self) -> bool:
        """Whether accuracy is known: there were labels and class embeddings."""
        return any(one.top1 is not None for one in self.figures)

    def figure(self, method: str, keep: float) -> Figure | None:
        """The figures of one method at one keep rate, None where there are none."""
        return next((one for one in self.figures if one.method == method and same(one.keep, keep)), None)

    def leading(self, keep: float) -> str:
        """The method that the page is about."""
        there = [method for method in self.methods if self.figure(method, keep)]
        return min(there, key=lambda method: METHODS[method].leading if method in METHODS else len(METHODS))

    def class_name(self, label: int | None) -> str:
        """What people call a label or prediction."""
        if label is None:
            return "none"
        names = self.class_names or []
        return names[label] if 0 <= label < len(names) else f"class {label}"

    @functools.cached_property
    def files(self) -> list[str]:
        """Base names of the tables of its shards. Raises UserError where the folder cannot be listed."""
        try:
            return Folder(self.folder, "evaluation").tables(self.shards)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({storage.one_line(error)})") from None

    def rows(self, file: str, columns: Sequence[str], where: Any) -> pa.Table:
        """Some rows of one shard's file.

        Args:
            where: a filter expression of pyarrow.dataset.

        Raises:
            UserError: the file is damaged, or lacks a column.
        """
        path = storage.join(self.folder, file)
        system, inner = storage.resolve(path)
        try:
            return ds.dataset(inner, format="parquet", filesystem=system).to_table(list(columns), filter=where)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path}: cannot be read ({storage.one_line(error)}); delete it and run jobs/evaluate.py again"
            ) from None


def read(folder: str) -> Evaluation:
    """The evaluation in a folder, local, s3:// or gs://.

    Raises:
        UserError: no such folder, it is none of an evaluation or of one that has not come to its end, or its figures
            are damaged.
    """
    uri = storage.absolute(folder)
    path = storage.join(uri, figures.FILE)
    try:
        if not storage.exists(uri):
            raise UserError(f"{folder}: no such folder")
        data = storage.read_bytes(path)
    except FileNotFoundError:
        if storage.exists(storage.join(uri, "evaluation.json")):
            raise UserError(f"{folder}: holds no figures.json yet; run jobs/evaluate.py to its end") from None
        raise UserError(
            f"{folder}: holds no figures.json, so it is not a folder of an evaluation; run jobs/evaluate.py to its end"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({storage.one_line(error)})") from None
    try:
        return _parse(uri, json.loads(data))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({storage.one_line(error)}); run jobs/evaluate.py again") from None


def choose_keep(evaluation: Evaluation, keep: float | None) -> float:
    """The keep rate that was asked for, or else 0.6 or the nearest there is.

    Raises:
        UserError: it was not evaluated, or none was.
    """
    there = evaluation.keep_rates
    if not there:
        raise UserError(f"{evaluation.folder}: no image was pruned, so there is nothing to report")
    if keep is None:
        return min(there, key=lambda rate: abs(rate - 0.6))
    for rate in there:
        if same(rate, keep):
            return rate
    raise UserError(f"--keep {keep:g}: was not evaluated; there are {', '.join(f'{rate:g}' for rate in there)}")


def same(one: float, other: float) -> bool:
    """Whether two keep rates are meant to be equal."""
    return abs(one - other) < _TOLERANCE


def at_keep(keep: float) -> Any:
    """The rows of the unpruned images and of those pruned to a keep rate, as a filter of pyarrow.dataset."""
    rate = ds.field("keep")
    return (ds.field("method") == UNPRUNED) | ((rate > keep - _TOLERANCE) & (rate < keep + _TOLERANCE))


def method_name(method: str) -> str:
    """What people call a method."""
    return METHODS[method].label if method in METHODS else method.replace("-", " ").capitalize()


def in_order(methods: set[str]) -> list[str]:
    """Methods in the order of `METHODS`, after the unpruned model; unknown ones after them, by name."""
    known = [UNPRUNED, *METHODS]
    return sorted(methods, key=lambda method: (known.index(method) if method in known else len(known), method))


def unit(evaluation: Evaluation) -> tuple[float, str]:
    """What multiply-adds are counted in, and its letter: 10^9 unless the model is a toy."""
    largest = max(one.multiply_adds for one in evaluation.figures)
    return (1e9, "G") if largest >= 1e8 else (1e6, "M")


def _parse(folder: str, content: dict[str, Any]) -> Evaluation:
    """The content of figures.json. Raises ValueError, TypeError, LookupError or AttributeError where it is damaged."""
    about = content["model"]
    model = Model(
        name=str(about["name"]),
        pretrained=_optional(str)(about.get("pretrained")),
        weights=str(about["weights"]),
        cut=int(about["cut"]),
        grid=(int(about["grid"][0]), int(about["grid"][1])),
        dtype=str(about["dtype"]),
        preprocess=dict(about["preprocess"]),
    )
    if min(model.grid) < 1:
        raise ValueError(f"a grid of {model.grid[0]} by {model.grid[1]}")
    names = content.get("class_names")
    evaluation = Evaluation(
        folder=folder,
        model=model,
        class_names=None if names is None else [str(name) for name in names],
        shards=[str(shard) for shard in content["shards"]],
        rankings=_optional(str)(content.get("rankings")),
        device=str(content.get("device") or "unknown device"),
        images=int(content["images"]),
        figures=[_figure(one) for one in content["figures"]],
        classes=[_class(one) for one in content.get("classes") or []],
        latency=[_latency(one) for one in content.get("latency") or []],
        retrieval=[_retrieval(one) for one in content.get("retrieval") or []],
    )
    if not evaluation.figures:
        raise ValueError("it has no figures")
    return evaluation


def _figure(one: dict[str, Any]) -> Figure:
    return Figure(
        method=str(one["method"]),
        keep=_number(one["keep"]),
        images=int(one["images"]),
        labelled=int(one.get("labelled") or 0),
        top1=_share(one.get("top1")),
        top5=_share(one.get("top5")),
        cosine=_share(one.get("cosine")),
        matching=_share(one.get("matching")),
        multiply_adds=_number(one["multiply_adds"]),
    )


def _class(one: dict[str, Any]) -> ClassFigure:
    label = int(one["label"])
    name = str(one["name"]) if one.get("name") is not None else f"class {label}"
    return ClassFigure(
        label, name, str(one["method"]), _number(one["keep"]), int(one["images"]), _share(one.get("top1"))
    )


def _latency(one: dict[str, Any]) -> Latency:
    return Latency(
        method=str(one["method"]),
        keep=_number(one["keep"]),
        batch=int(one["batch"]),
        seconds=_number(one["seconds"]),
        unpruned_seconds=_number(one["unpruned_seconds"]),
        speedup=_number(one["speedup"]),
        predicted=_share(one.get("predicted")),
    )


def _retrieval(one: dict[str, Any]) -> Retrieval:
    to_text, to_image = (tuple(_share(one[way].get(k)) for k in RECALLS) for way in ("image_to_text", "text_to_image"))
    return Retrieval(
        str(one["method"]), _number(one["keep"]), int(one["images"]), int(one["captions"]), to_text, to_image
    )


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(f"{value!r} where a number belongs")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} where a number belongs")
    return number


def _share(value: Any) -> float | None:
    """A number or None; Python's JSON knows NaN, the mean of nothing, which is None here."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return _number(value)


def _optional(kind: Callable[[Any], str]) -> Callable[[Any], str | None]:
    return lambda value: None if value is None else kind(value)
