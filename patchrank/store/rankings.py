"""Golden rankings: the table of a shard, a row an image, and the reader of a folder of them.

`patchrank.store.folder` says how a folder keeps them; `open` is the way in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from patchrank.store.corpus import Corpus
from patchrank.store.folder import serialise

_INTEGERS = ("ranking", "step", "label", "prediction")
_TENSORS = (*_INTEGERS, "score", "confidence")

# Measured on random rankings of 196 tokens, 1,000 images a file: 820 bytes an image, 1,251 with pyarrow's defaults.
# Floats are noise in their low bytes: a dictionary of them is useless, and their high bytes compress once they lie
# together. Token ids and steps take few values, so a dictionary packs them to bytes; uint8 would gain nothing.
_FLOATS = ("score.list.element", "confidence", "pruned.list.element.confidence", "pruned.list.element.cosine")
_REPEATED = (
    *("shard", "label", "prediction", "pruned.list.element.keep", "pruned.list.element.prediction"),
    *("ranking.list.element", "step.list.element"),
)

_PRUNED = pa.struct(
    [("keep", pa.float64()), ("prediction", pa.int32()), ("confidence", pa.float32()), ("cosine", pa.float32())]
)


COLUMNS = {
    "key": "the sample's key in its shard",
    "shard": "URI of the shard",
    "label": "of the sample, where it has one",
    "ranking": "ids of the patch tokens, most useful first; ids are row-major positions of patches from 0",
    "score": "by token id: the score without the token and those that left before it",
    "step": "by token id: the step in which the token left, from 1; 0 if it never did",
    "prediction": "class that the whole image is taken for, where the search had class embeddings",
    "confidence": "its probability",
    "pruned": "at each of several keep rates: prediction, confidence, and cosine to the embedding of the whole image",
}


def open(path: str) -> Rankings:
    """The rankings of a folder.

    Raises:
        UserError: no such folder, no search.json in it, or no rankings yet.
    """
    return Rankings(path)


def schema(num_tokens: int) -> pa.Schema:
    """The columns of a rankings file; one row is one image with N = `num_tokens` tokens.

    `ranking`, `score` and `step` are as in `Ranked`, and so are the members of `pruned`, which has one entry a keep
    rate. `label` is null where the sample has none; predictions and confidences are null where the search had no class
    embeddings.
    """
    ids = pa.list_(pa.uint16(), num_tokens)
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.dictionary(pa.int32(), pa.string())),
            ("label", pa.int32()),
            ("ranking", ids),
            ("score", pa.list_(pa.float32(), num_tokens)),
            ("step", ids),
            ("prediction", pa.int32()),
            ("confidence", pa.float32()),
            ("pruned", pa.list_(_PRUNED)),
        ]
    )


@dataclass(frozen=True)
class Ranked:
    """What a search found of B images with N tokens, pruned to K keep rates; arrays of NumPy.

    Attributes:
        keys, labels: B each; None is an image without a label.
        ranking: (B, N) int, token ids, most useful first.
        score: (B, N) float, by token id.
        step: (B, N) int, by token id: the step, from 1, in which a token left; 0 if it never did.
        prediction, confidence: (B,) int and float; None without class embeddings.
        keep_rates: K rates.
        pruned_prediction, pruned_confidence, pruned_cosine: (B, K); the first two may be None.
    """

    keys: Sequence[str]
    labels: Sequence[int | None]
    ranking: np.ndarray
    score: np.ndarray
    step: np.ndarray
    prediction: np.ndarray | None
    confidence: np.ndarray | None
    keep_rates: Sequence[float]
    pruned_prediction: np.ndarray | None
    pruned_confidence: np.ndarray | None
    pruned_cosine: np.ndarray


def table(shard: str, images: Ranked) -> pa.Table:
    """The rows of B images of one shard, of which it is the absolute URI.

    Tables of one shard can be joined with `pa.concat_tables`.

    Raises:
        ValueError: shapes that do not fit, a ranking that is no permutation of 0 .. N - 1, a score that is not finite,
            or a number that its column cannot hold.
    """
    batch, num_tokens, rates = len(images.keys), images.ranking.shape[-1], len(images.keep_rates)
    for name, shape in (
        *((name, (batch, num_tokens)) for name in ("ranking", "score", "step")),
        *((name, (batch,)) for name in ("prediction", "confidence")),
        *((f"pruned_{name}", (batch, rates)) for name in ("prediction", "confidence", "cosine")),
    ):
        array = getattr(images, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} of {shard}: has shape {array.shape}, must have {shape}")
    for name, wrong in (
        ("ranking is not a permutation", (np.sort(images.ranking, axis=1) != np.arange(num_tokens)).any(axis=1)),
        ("score is not finite", ~np.isfinite(images.score).all(axis=1)),
    ):
        if wrong.any():
            raise ValueError(f"{images.keys[int(wrong.argmax())]} of {shard}: {name}")

    def fixed(array: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1), kind), num_tokens)

    def optional(array: np.ndarray | None, length: int, kind: pa.DataType) -> pa.Array:
        return pa.nulls(length, kind) if array is None else pa.array(array.reshape(-1), kind)

    pruned = pa.StructArray.from_arrays(
        [
            pa.array(np.tile(np.asarray(images.keep_rates, np.float64), batch)),
            optional(images.pruned_prediction, batch * rates, pa.int32()),
            optional(images.pruned_confidence, batch * rates, pa.float32()),
            pa.array(images.pruned_cosine.reshape(-1), pa.float32()),
        ],
        fields=list(_PRUNED),
    )  # (B * K,)
    arrays = [
        pa.array(images.keys, pa.string()),
        pa.DictionaryArray.from_arrays(np.zeros(batch, np.int32), [shard]),
        pa.array(images.labels, pa.int32()),
        fixed(images.ranking, pa.uint16()),
        fixed(images.score, pa.float32()),
        fixed(images.step, pa.uint16()),
        optional(images.prediction, batch, pa.int32()),
        optional(images.confidence, batch, pa.float32()),
        pa.ListArray.from_arrays(np.arange(batch + 1, dtype=np.int32) * rates, pruned),
    ]
    return pa.Table.from_arrays(arrays, schema=schema(num_tokens))


def encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A table of rankings as the bytes of a Parquet file."""
    return serialise(
        table.combine_chunks(),  # batches would show in the pages of the file
        metadata,
        use_dictionary=list(_REPEATED),
        column_encoding=dict.fromkeys(_FLOATS, "BYTE_STREAM_SPLIT"),
    )


class Rankings(Corpus):
    """The rankings of one search; the columns are those of `schema`."""

    kind = "search"
    rows = "rankings"

    @property
    def num_tokens(self) -> int:
        """N, the patch tokens of an image."""
        return self.dataset.schema.field("ranking").type.list_size

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The rates at which the pruned images were predicted."""
        return tuple(self.settings["keep_rates"])

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches, where the search knew them; a token's id is row * columns + column."""
        grid = self.settings.get("grid")
        return grid and (grid[0], grid[1])

    def tensors(self, columns: Sequence[str] = ("ranking", "score"), shard: str | None = None) -> dict[str, Any]:
        """Columns as torch tensors, of one shard or of all.

        Args:
            columns: any of ranking, score, step, label, prediction, confidence.

        Returns:
            `ranking`, `step`: (B, N) int64; `score`: (B, N) float32; `label`, `prediction`: (B,) int64, -1 where there
            is none; `confidence`: (B,) float32, NaN where there is none; and always `key`, a list of B strings.

        Raises:
            ValueError: another column.
        """
        import torch  # here, because queries do without it and it takes seconds to import

        for name in columns:
            if name not in _TENSORS:
                raise ValueError(f"{name}: no tensor of that name; there are {', '.join(_TENSORS)}")
        wanted = list(dict.fromkeys([*columns, "key"]))
        table = self.dataset.to_table(wanted) if shard is None else self.shard(shard, wanted)
        result: dict[str, Any] = {"key": table["key"].to_pylist()}
        for name in columns:
            column = table[name].combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                flat = column.flatten().to_numpy().reshape(len(table), column.type.list_size)  # (B, N)
            else:
                flat = column.fill_null(-1 if name in _INTEGERS else np.nan).to_numpy()  # (B,)
            result[name] = torch.from_numpy(flat.astype(np.int64 if name in _INTEGERS else np.float32))
        return result
