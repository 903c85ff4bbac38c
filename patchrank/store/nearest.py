"""The nearest neighbours of an image among embeddings, by their cosine: all are looked at, so none is missed.

An index finds them faster among many millions: docs/corpus.md has one in three lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from patchrank.errors import UserError
from patchrank.store.embeddings import Embeddings

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def vector_of(connection: DuckDBPyConnection, key: str, shard: str | None = None) -> tuple[str, np.ndarray]:
    """The shard and the embedding, (E,) float32, of an image.

    Args:
        connection: of `patchrank.store.queries.connect`.
        shard: its URI, where several have an image of this key.

    Raises:
        UserError: there is no such image, or more than one.
    """
    where, values = ("AND shard = ?", [key, shard]) if shard else ("", [key])
    sql = f"SELECT shard::VARCHAR, embedding FROM embeddings WHERE key = ? {where} ORDER BY ALL LIMIT 3"
    rows = connection.execute(sql, values).fetchall()
    if not rows:
        raise UserError(f"--key {key}: no such image" + (f" in {shard}" if shard else ""))
    if len(rows) > 1:
        raise UserError(
            f"--key {key}: is in several shards, such as {rows[0][0]} and {rows[1][0]}; --shard tells which"
        )
    return rows[0][0], np.asarray(rows[0][1], np.float32)


def query(
    connection: DuckDBPyConnection,
    corpus: Embeddings,
    vector: np.ndarray,
    count: int,
    but: tuple[str, str] | None = None,
) -> str:
    """SQL for the nearest neighbours, nearest first: key, shard, label and cosine.

    Args:
        connection: which has the vector as the table `asked` from now on.
        vector: (E,) float32.
        count: of neighbours.
        but: shard and key of the image that asks, which is not its own neighbour.

    Raises:
        UserError: the vector has another length than the embeddings.
    """
    kind = f"FLOAT[{corpus.embed_dim}]"
    if len(vector) != corpus.embed_dim:
        raise UserError(
            f"{corpus.folder}: has embeddings of {corpus.embed_dim} numbers, and this one has {len(vector)}"
        )
    shard, key = but or (None, None)
    asked = {"own_shard": [shard], "own_key": [key], "asked_embedding": [vector]}
    types = pa.schema(
        [("own_shard", pa.string()), ("own_key", pa.string()), ("asked_embedding", pa.list_(pa.float32()))]
    )
    connection.register("asked", pa.Table.from_pydict(asked, types))
    return f"""\
SELECT key, shard, label, round(cosine, 4) AS cosine
FROM (SELECT key, shard, label, array_cosine_similarity(embedding::{kind}, asked_embedding::{kind}) AS cosine
      FROM embeddings, asked
      WHERE own_key IS NULL OR key <> own_key OR shard::VARCHAR <> own_shard) AS pairs
ORDER BY pairs.cosine DESC
LIMIT {count}"""
