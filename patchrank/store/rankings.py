"""The rankings folder: one Parquet file a shard, written whole or not at all, and what one search needs beside them.

    OUT/search.json             the settings of the search and their fingerprint, which every Parquet file repeats
    OUT/STEM-HASH.parquet       one row an image of one shard
    OUT/rejects/....parquet     the samples of that shard that could not be ranked, and why
    OUT/failed/....json         a shard that could not be read, or only in part: the next run tries it again

`patchrank.store.corpus` reads it; `open` here is the way in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.corpus import (
    FINGERPRINT,
    FORMAT,
    REJECTS_SCHEMA,
    SHARD,
    VERSION,
    Rankings,
    file_name,
    fingerprint,
    parquet_files,
    read_search,
)

if TYPE_CHECKING:
    from patchrank.data.shards import Reject

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
_ADVICE = "give another --out, or delete the folder"


def open(path: str) -> Rankings:
    """The rankings of a folder.

    Raises:
        UserError: no such folder, no search.json in it, or no rankings yet.
    """
    return Rankings(path)


def schema(num_tokens: int) -> pa.Schema:
    """The columns of a rankings file; one row is one image with N = `num_tokens` tokens.

    `ranking`, `score` and `step` are as in `patchrank.search.searcher.SearchResult`, and so are the members of
    `pruned`, which has one entry a keep rate. `label` is null where the sample has none; predictions and confidences
    are null where the search had no class embeddings.
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


def table(
    shard: str,
    keys: Sequence[str],
    labels: Sequence[int | None],
    ranking: np.ndarray,
    score: np.ndarray,
    step: np.ndarray,
    prediction: np.ndarray | None,
    confidence: np.ndarray | None,
    keep_rates: Sequence[float],
    pruned_prediction: np.ndarray | None,
    pruned_confidence: np.ndarray | None,
    pruned_cosine: np.ndarray,
) -> pa.Table:
    """The rows of B images of one shard. Tables of one shard can be joined with `pa.concat_tables`.

    Args:
        shard: URI of the shard.
        keys, labels: B each; None is an image without a label.
        ranking: (B, N) int, token ids, most useful first.
        score: (B, N) float, by token id.
        step: (B, N) int, by token id: the step, from 1, in which a token left; 0 if it never did.
        prediction, confidence: (B,) int and float; None without class embeddings.
        keep_rates: K rates.
        pruned_prediction, pruned_confidence, pruned_cosine: (B, K); the first two may be None.

    Raises:
        ValueError: shapes that do not fit, a ranking that is no permutation of 0 .. N - 1, a score that is not finite,
            or a number that its column cannot hold.
    """
    batch, num_tokens, rates = len(keys), ranking.shape[-1], len(keep_rates)
    for name, array, shape in (
        ("ranking", ranking, (batch, num_tokens)),
        ("score", score, (batch, num_tokens)),
        ("step", step, (batch, num_tokens)),
        ("prediction", prediction, (batch,)),
        ("confidence", confidence, (batch,)),
        ("pruned_prediction", pruned_prediction, (batch, rates)),
        ("pruned_confidence", pruned_confidence, (batch, rates)),
        ("pruned_cosine", pruned_cosine, (batch, rates)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} of {shard}: has shape {array.shape}, must have {shape}")
    for name, wrong in (
        ("ranking is not a permutation", (np.sort(ranking, axis=1) != np.arange(num_tokens)).any(axis=1)),
        ("score is not finite", ~np.isfinite(score).all(axis=1)),
    ):
        if wrong.any():
            raise ValueError(f"{keys[int(wrong.argmax())]} of {shard}: {name}")

    def fixed(array: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1), kind), num_tokens)

    def optional(array: np.ndarray | None, length: int, kind: pa.DataType) -> pa.Array:
        return pa.nulls(length, kind) if array is None else pa.array(array.reshape(-1), kind)

    pruned = pa.StructArray.from_arrays(
        [
            pa.array(np.tile(np.asarray(keep_rates, np.float64), batch)),
            optional(pruned_prediction, batch * rates, pa.int32()),
            optional(pruned_confidence, batch * rates, pa.float32()),
            pa.array(pruned_cosine.reshape(-1), pa.float32()),
        ],
        fields=list(_PRUNED),
    )  # (B * K,)
    arrays = [
        pa.array(keys, pa.string()),
        pa.DictionaryArray.from_arrays(np.zeros(batch, np.int32), [storage.absolute(shard)]),
        pa.array(labels, pa.int32()),
        fixed(ranking, pa.uint16()),
        fixed(score, pa.float32()),
        fixed(step, pa.uint16()),
        optional(prediction, batch, pa.int32()),
        optional(confidence, batch, pa.float32()),
        pa.ListArray.from_arrays(np.arange(batch + 1, dtype=np.int32) * rates, pruned),
    ]
    return pa.Table.from_arrays(arrays, schema=schema(num_tokens))


def write(
    folder: str,
    shard: str,
    table: pa.Table,
    rejects: Sequence[Reject],
    fingerprint: str,
    encoded: Callable[[pa.Table, Mapping[str, str]], bytes] | None = None,
) -> int:
    """Write what came of a shard, its rejects first, so that a shard with a rankings file is finished.

    The same rows give the same bytes, however they were batched.

    Args:
        encoded: table, metadata -> the bytes of a file, for tables that are not of rankings.

    Returns:
        The number of bytes written.

    Raises:
        OSError: the disk is full, or the folder cannot be written; no part of a file is left behind.
    """
    metadata = {FINGERPRINT: fingerprint, FORMAT: VERSION, SHARD: storage.absolute(shard)}
    name = file_name(shard)
    written = 0
    rejects_file = storage.join(folder, "rejects", name)
    if rejects:
        rows = [{"key": reject.key, "shard": storage.absolute(shard), "reason": reject.reason} for reject in rejects]
        data = serialise(pa.Table.from_pylist(rows, REJECTS_SCHEMA), metadata)
        storage.write_atomic(rejects_file, data)
        written += len(data)
    else:
        storage.delete(rejects_file)  # of an earlier try that could read less of the shard
    data = (encoded or encode)(table, metadata)
    storage.write_atomic(storage.join(folder, name), data)
    return written + len(data)


def encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A table of rankings as the bytes of a Parquet file."""
    return serialise(
        table.combine_chunks(),  # batches would show in the pages of the file
        metadata,
        use_dictionary=list(_REPEATED),
        column_encoding=dict.fromkeys(_FLOATS, "BYTE_STREAM_SPLIT"),
    )


def serialise(table: pa.Table, metadata: Mapping[str, str], **options: Any) -> bytes:
    """A table as the bytes of a Parquet file; options as for `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", **options)
    return sink.getvalue().to_pybytes()


def prepare(folder: str, settings: Mapping[str, Any], kind: str = "search") -> str:
    """Open a folder for a search: a new one, or one that holds a part of the same search.

    Removes temporary files that killed runs left, so a folder belongs to one run at a time.

    Args:
        settings: what decides the result, JSON values, nested as you like; `settings["about"]` is stored for readers,
            but does not decide anything and is not compared.
        kind: "search", or "evaluation" for `patchrank.evaluation.evaluate`, which keeps its folder in the same way.

    Returns:
        The fingerprint of the settings: 16 hexadecimal digits of their SHA-256.

    Raises:
        UserError: the folder holds another search, or rankings without a search.json, or cannot be written.
    """
    digest = fingerprint(settings)
    try:
        found = read_search(folder, kind)
        if found is not None:
            check_same(folder, found["settings"], settings, kind)
        elif parquet_files(folder):
            raise UserError(f"{folder}: holds Parquet files, but no {kind}.json that says of what {kind}; {_ADVICE}")
        else:
            content = {"format": VERSION, "fingerprint": digest, "settings": settings}
            storage.write_atomic(storage.join(folder, f"{kind}.json"), json.dumps(content, indent=2).encode() + b"\n")
        for place in (folder, storage.join(folder, "rejects"), storage.join(folder, "failed")):
            for info in storage.files(place):
                if info.base_name.startswith(".") and info.base_name.endswith(".tmp"):
                    storage.delete(storage.join(place, info.base_name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({storage.one_line(error)}); give another --out") from None
    return digest


def check_same(folder: str, there: Mapping[str, Any], settings: Mapping[str, Any], kind: str = "search") -> None:
    """Raises UserError where the settings of the search that a folder holds are others."""
    different = differences(there, settings)
    if different:
        more = f", and {len(different) - 2} more" if len(different) > 2 else ""
        raise UserError(f"{folder}: holds another {kind} ({', '.join(different[:2])}{more}); {_ADVICE}")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, without `about`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return {name: value for name, value in flat.items() if name.partition(".")[0] != "about"}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What tells two nested settings apart, one "NAME: VALUE there, VALUE now" a setting; `about` is not compared."""
    there, now = _flat(there), _flat(now)

    def spelled(settings: Mapping[str, Any], name: str) -> str:
        return json.dumps(settings[name]) if name in settings else "not set"

    names = [*now, *(name for name in there if name not in now)]
    pairs = [(name, spelled(there, name), spelled(now, name)) for name in names]
    return [f"{name}: {before} there, {after} now" for name, before, after in pairs if before != after]


def holds(folder: str, fingerprint: str, kind: str = "search") -> bool:
    """Whether the folder is that of the search with this fingerprint, as seen from this machine."""
    found = read_search(folder, kind)
    return found is not None and found["fingerprint"] == fingerprint


def finished(folder: str, shards: Sequence[str]) -> set[str]:
    """The shards that have their rankings file and no failure record: two listings, no file is opened."""
    done = set(parquet_files(folder))
    failed = {info.base_name for info in storage.files(storage.join(folder, "failed"))}
    return {shard for shard in shards if file_name(shard) in done and _failure_name(shard) not in failed}


def record_failure(folder: str, shard: str, error: str) -> None:
    """Note that a shard could not be read, or only in part: it counts as not finished until `clear_failure`."""
    content = json.dumps({"shard": storage.absolute(shard), "error": error}).encode() + b"\n"
    storage.write_atomic(storage.join(folder, "failed", _failure_name(shard)), content)


def clear_failure(folder: str, shard: str) -> None:
    """Take back what `record_failure` noted, if anything."""
    storage.delete(storage.join(folder, "failed", _failure_name(shard)))


def failures(folder: str) -> list[dict[str, str]]:
    """The recorded failures, as {"shard", "error"}, sorted by shard."""
    place = storage.join(folder, "failed")
    names = [info.base_name for info in storage.files(place) if info.base_name.endswith(".json")]
    return sorted((_failure(place, name) for name in names), key=lambda record: record["shard"])


def _failure(place: str, name: str) -> dict[str, str]:
    """One record; one that is damaged, such as the empty object that a dying upload can leave, still is a failure."""
    try:
        record = json.loads(storage.read_bytes(storage.join(place, name)))
        return {"shard": str(record["shard"]), "error": str(record["error"])}
    except (ValueError, LookupError, TypeError):
        return {"shard": name.removesuffix(".json"), "error": f"failed, and its record failed/{name} is damaged"}


def _failure_name(shard: str) -> str:
    return file_name(shard).removesuffix(".parquet") + ".json"
