"""The tables of an evaluation, read together; whatever is damaged in them becomes a UserError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from patchrank.errors import UserError
from patchrank.pruning.methods import UNPRUNED
from patchrank.store import storage

Image = tuple[str, str]  # shard and key


class Tables:
    """Some tables of an evaluation.

    Args:
        folder: of the evaluation, local, s3:// or gs://.
        names: of its tables, one at least.

    Raises:
        UserError: here and below: they cannot be read.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.folder = folder
        resolved = [storage.resolve(storage.join(folder, name)) for name in names]
        with self._reading():
            self._data = ds.dataset([path for _, path in resolved], filesystem=resolved[0][0], format="parquet")

    def query(self, sql: str) -> list[dict[str, Any]]:
        """What DuckDB finds in them, as the table `evaluation`."""
        import duckdb

        with duckdb.connect() as connection, self._reading():
            connection.register("evaluation", self._data)
            return connection.sql(sql).to_arrow_table().to_pylist()

    def rows(self, columns: Sequence[str], which: ds.Expression | None = None) -> pa.Table:
        """Some columns of some rows."""
        with self._reading():
            return self._data.to_table(list(columns), filter=which)

    def cells(self) -> list[tuple[str, float]]:
        """Methods and keep rates, the unpruned model first."""
        found = {(row["method"], row["keep"]) for row in self.rows(["method", "keep"]).to_pylist()}
        return sorted(found, key=lambda cell: (cell[0] != UNPRUNED, cell[0], -cell[1]))

    def embeddings(self, method: str, keep: float, row_of: Mapping[Image, int]) -> np.ndarray:
        """(I, E) float32, normalised, of images by one method; `row_of` tells an image's row, all zero where it has no
        embedding."""
        there = ds.field("embedding").is_valid() & (ds.field("method") == method) & (ds.field("keep") == keep)
        table = self.rows(["shard", "key", "embedding"], there)
        places = [row_of.get(image, -1) for image in images(table)]
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        width = table.schema.field("embedding").type.list_size
        vectors = np.zeros((len(row_of) + 1, width), np.float32)  # the last row takes what nobody asked for
        vectors[places] = flat.reshape(-1, width)
        return vectors[:-1]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Damaged tables may be noticed as late as their rows are read."""
        import duckdb

        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder}: cannot be read ({storage.one_line(error)}); evaluate again") from None


def images(rows: pa.Table) -> list[Image]:
    """The image of each row."""
    return list(zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True))
