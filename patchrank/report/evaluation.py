"""What a report asks of an evaluation: figures by method and keep rate, rows of its tables, names for people."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from patchrank.errors import UserError
from patchrank.evaluation.record import Figure, Record
from patchrank.pruning.methods import METHODS, UNPRUNED
from patchrank.store import storage
from patchrank.store.folder import Folder

_TOLERANCE = 1e-6  # between keep rates that are meant to be equal


@dataclass(frozen=True)
class Evaluation(Record):
    """An evaluation folder and its record.

    Attributes:
        folder: its URI, absolute.
    """

    folder: str = ""

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
    """The evaluation in a folder; raises UserError as `Record.read` does."""
    return Evaluation(**vars(Record.read(folder)), folder=storage.absolute(folder))


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


def counted(things: int | Sequence[object], name: str) -> str:
    """How many, with the noun: "1 image", "1,000 images"."""
    count = things if isinstance(things, int) else len(things)
    return f"{count:,} {name}{'s' * (count != 1)}"
