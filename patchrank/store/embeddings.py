"""Embeddings of images: the table of a shard, a row an image, and the reader of a folder of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from patchrank.store.corpus import Corpus
from patchrank.store.folder import serialise

PRECISIONS = ("float16", "float32")
COLUMNS = {
    "key": "the sample's key in its shard, or the file's name in its folder",
    "shard": "URI of the shard, or path of the folder",
    "label": "of the sample, where it has one",
    "embedding": "of unit length, so the sum of products of two of them is their cosine",
    "prediction": "class that the image is taken for, where there were class embeddings",
    "confidence": "its probability",
}


def open(path: str) -> Embeddings:
    """The embeddings of a folder.

    Raises:
        UserError: no such folder, no embedding.json in it, or no embeddings yet.
    """
    return Embeddings(path)


def schema(embed_dim: int, precision: str) -> pa.Schema:
    """The columns of a file of embeddings of E = `embed_dim` numbers; `precision` is one of `PRECISIONS`."""
    number = pa.float16() if precision == "float16" else pa.float32()
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.dictionary(pa.int32(), pa.string())),
            ("label", pa.int32()),
            ("embedding", pa.list_(number, embed_dim)),
            ("prediction", pa.int32()),
            ("confidence", pa.float32()),
        ]
    )


def table(
    shard: str,
    keys: Sequence[str],
    labels: Sequence[int | None],
    embedding: np.ndarray,
    predicted: tuple[np.ndarray, np.ndarray] | None = None,
) -> pa.Table:
    """The rows of B images of a shard, of which it is the absolute URI.

    Args:
        embedding: (B, E) float16 or float32, of unit length.
        predicted: classes (B,) int and their probabilities (B,) float; None without class embeddings.
    """
    rows, embed_dim = embedding.shape
    made = schema(embed_dim, embedding.dtype.name)
    prediction, confidence = predicted or (None, None)
    arrays = [
        pa.array(keys, pa.string()),
        pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [shard]),
        pa.array(labels, pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), type=made.field("embedding").type),
        pa.nulls(rows, pa.int32()) if prediction is None else pa.array(prediction, pa.int32()),
        pa.nulls(rows, pa.float32()) if confidence is None else pa.array(confidence, pa.float32()),
    ]
    return pa.Table.from_arrays(arrays, schema=made)


def encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A table of embeddings as the bytes of a Parquet file. Their numbers are noise, which no dictionary makes less."""
    return serialise(table.combine_chunks(), metadata, use_dictionary=["shard", "label", "prediction"])


class Embeddings(Corpus):
    """The embeddings of one job; the columns are those of `schema`."""

    kind = "embedding"
    rows = "embeddings"

    @property
    def embed_dim(self) -> int:
        """E, the numbers of an embedding."""
        return self.dataset.schema.field("embedding").type.list_size

    def matrix(self) -> tuple[list[str], np.ndarray]:
        """All keys, and (B, E) embeddings in the precision that they are kept in, for an index of your choice."""
        table = self.dataset.to_table(["key", "embedding"])
        column = table["embedding"].combine_chunks()
        return table["key"].to_pylist(), column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.embed_dim)
