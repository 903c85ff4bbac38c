"""Tokens before the cut and whole embeddings, kept on disk: training goes over the same images many times, and the
model is frozen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchrank.data.loader import batches
from patchrank.data.shards import ShardError, read
from patchrank.errors import UserError
from patchrank.model.tower import Tower
from patchrank.store import storage
from patchrank.store.folder import Reject, file_name

STALE = 24 * 3600  # seconds after which a file that is still not finished is a killed run's


class Features:
    """The tokens of the images of shards, (p + N, D) each, in the tower's dtype, and their embeddings by the unpruned
    model, (E,) float32 each; one file a shard.

    A shard's file is made when one of its images is first asked for, whole or not at all, so a training that is stopped
    loses one shard's work at most. It takes N * D * 2 bytes an image in bfloat16: 300 KB for ViT-B/16 at 224 px, twice
    that on disk while it is made, and in memory a batch's. The folder can serve several trainings, models and cuts at
    the same time.

    Args:
        folder: a local one, of each machine or shared.
        tower: whose prefix it is.
        weights: digest of the tower's weights, `Model.weights`.
        preprocess: PIL image -> (3, H, W).
        limit: only the first so many samples of each shard, as in the search.
        size: images a batch of the prefix.

    Raises:
        UserError: the folder is remote.
    """

    def __init__(
        self,
        folder: str,
        tower: Tower,
        weights: str,
        preprocess: Callable[..., Tensor],
        limit: int | None = None,
        size: int = 64,
    ) -> None:
        if not storage.is_local(folder):
            raise UserError(f"--cache-features {folder}: must be a local folder")
        made_by = (
            f"embeddings {weights} {tower.cut} {tower.dtype} {limit} {getattr(tower.visual, 'preprocess_cfg', None)}"
        )
        self.folder = storage.join(storage.absolute(folder), hashlib.sha256(made_by.encode()).hexdigest()[:16])
        self.tower, self.preprocess, self.limit, self.size = tower, preprocess, limit, size
        # By shard: rows by key, and the file's two tensors.
        self._open: dict[str, tuple[dict[str, int], Any, Any]] = {}
        self._lock = threading.Lock()

    def of(self, shard: str, key: str) -> tuple[Tensor, Tensor] | None:
        """The tokens of an image, (p + N, D), and its embedding, (E,); None where it cannot be decoded. Can be called
        from several threads.

        Raises:
            UserError: the shard cannot be read to its end, or the folder not be written.
        """
        with self._lock:
            if shard not in self._open:
                self._open[shard] = self._shard(shard)
            rows, *tensors = self._open[shard]
            if key not in rows:
                return None
            tokens, embedding = (tensor[rows[key] : rows[key] + 1][0] for tensor in tensors)
            return tokens, embedding

    def _shard(self, shard: str) -> tuple[dict[str, int], Any, Any]:
        path = os.path.join(self.folder, file_name(shard).replace(".parquet", ".safetensors"))
        try:
            if not os.path.exists(path):
                self._make(shard, path)
            file = safe_open(path, framework="pt")
            keys = json.loads(file.metadata()["keys"])
            rows = {key: row for row, key in enumerate(keys)}
            return rows, file.get_slice("tokens"), file.get_slice("embeddings")
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({storage.one_line(error)}); delete it") from None
        except OSError as error:
            raise UserError(f"--cache-features: {path}: {storage.one_line(error)}") from None

    @torch.no_grad()
    def _make(self, shard: str, path: str) -> None:
        keys: list[str] = []
        embeddings = [torch.empty(0, self.tower.embed_dim)]

        def reject(_: Reject) -> None:
            pass  # whoever asks for its tokens is told

        os.makedirs(self.folder, exist_ok=True)
        self._sweep()
        with tempfile.TemporaryFile(dir=self.folder) as raw:
            try:
                for batch in batches(read(shard, self.limit), self.preprocess, self.size, reject):
                    keys += batch.keys
                    tokens = self.tower.prefix(batch.pixels)  # (B, p + N, D)
                    embeddings.append(self.tower.suffix(tokens).float().cpu())
                    raw.write(tokens.cpu().contiguous().view(torch.uint8).numpy().data)
            except ShardError as error:
                raise UserError(f"{shard}: {error}; --cache-features takes whole shards alone") from None
            raw.flush()
            dtype = self.tower.dtype
            tokens = torch.frombuffer(mmap.mmap(raw.fileno(), 0), dtype=dtype) if keys else torch.empty(0, dtype=dtype)
            tokens = tokens.view(len(keys), self.tower.length, self.tower.width)
            try:
                with storage.replacing(path) as temporary:
                    both = {"tokens": tokens, "embeddings": torch.cat(embeddings)}
                    save_file(both, temporary, {"keys": json.dumps(keys)})
            except SafetensorError as error:
                raise UserError(f"--cache-features: {path}: {storage.one_line(error)}") from None

    def _sweep(self) -> None:
        """Delete what killed runs left; what another process is writing is younger."""
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):  # another process sweeps, too, or it is another user's
                if entry.name.endswith(".tmp") and entry.stat().st_mtime < time.time() - STALE:
                    os.unlink(entry)
