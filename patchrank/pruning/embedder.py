"""Embeddings of images, by a model as it is or pruned: what an embedding job does to a shard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.data.loader import Batch
from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading, ShardJob, ShardResult
from patchrank.errors import UserError
from patchrank.model.adapter import embedding_of
from patchrank.model.tower import Tower
from patchrank.model.zero_shot import predict
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import METHODS, TOKENS, UNPRUNED, by_name_alone
from patchrank.pruning.pruned import DEFAULT_KEEP, pruned_tower
from patchrank.store import embeddings
from patchrank.store.partial import Partial


@dataclass(frozen=True)
class Pruning:
    """How images are pruned before they are embedded.

    Attributes:
        method: its name, or `UNPRUNED`.
        keep: rate; 1 where unpruned.
        bundle: that the method is of, if any.
    """

    method: str = UNPRUNED
    keep: float = 1.0
    bundle: Bundle | None = None

    @classmethod
    def of(cls, how: str | None, keep: float | None, visual: nn.Module) -> Pruning:
        """What `patchrank.prune` would do.

        Args:
            how: a bundle's folder or id on the hub, or the name of a method that needs none; unpruned where None.
            keep: None for what a bundle was made for, or 0.6.
            visual: the image tower that it is for.

        Raises:
            UserError: a keep rate without anything to prune by, or a bundle that cannot be had or is for another model.
        """
        if how is None:
            if keep is not None:
                raise UserError(f"--keep {keep:g}: needs --bundle, which tells what stays")
            return cls()
        if how in by_name_alone():
            return cls(how, DEFAULT_KEEP if keep is None else keep)
        bundle = Bundle.open(how)
        bundle.check(visual)
        return cls(TOKENS, bundle.keep if keep is None else keep, bundle)

    @property
    def classes(self) -> Tensor | None:
        """(K, E) class embeddings of the bundle's own, which go with its embeddings, if it has any."""
        return None if self.bundle is None else METHODS[self.method].make(self.bundle).classes


class Embedder(nn.Module):
    """Images to embeddings of unit length.

    Args:
        tower: the model, cut where the bundle is, on its device.
        pruning: what of an image stays.

    Raises:
        UserError: a keep rate that leaves nothing.
    """

    def __init__(self, tower: Tower, pruning: Pruning) -> None:
        super().__init__()
        self.tower = tower
        self._forward: nn.Module = tower
        if pruning.method != UNPRUNED:
            how = pruning.method, tower.visual, tower.cut, pruning.keep, pruning.bundle
            made = pruned_tower(*how, matched=False)
            if not made.idle:  # else it is the model's own forward pass, which a tower's mix of dtypes is not for
                self._forward = made.to(tower.device).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), preprocessed -> (B, E) float32; not finite where a low precision overflowed."""
        pixels = images.to(self.tower.device, non_blocking=True).to(self.tower.dtype)
        return F.normalize(embedding_of(self._forward(pixels)).float(), dim=-1)

    def multiply_adds(self) -> int:
        """Of an image; norms and activations not counted."""
        tower = self._forward
        return self.tower.adapter.full_multiply_adds() if isinstance(tower, Tower) else tower.multiply_adds()  # type: ignore[operator]


class ShardEmbedder:
    """Embeds the images of one shard after the other.

    Args:
        embedder: the model.
        reading: how shards are read.
        precision: of the embeddings that are kept, one of `embeddings.PRECISIONS`.
        classes: (K, E) normalised class embeddings, or None.
        logit_scale: the factor on cosines before the softmax over classes.
    """

    def __init__(
        self,
        embedder: Embedder,
        reading: Reading,
        precision: str = "float16",
        classes: Tensor | None = None,
        logit_scale: float = 100.0,
    ) -> None:
        self.embedder, self.reading = embedder, reading
        self._precision, self._logit_scale = np.dtype(precision), logit_scale
        self._classes = None if classes is None else classes.to(embedder.tower.device)

    def embed(
        self,
        shard: str,
        progress: Progress | None = None,
        turn: AbstractContextManager[object] | None = None,
        part: Partial | None = None,
    ) -> ShardResult:
        """Embed the images of a shard; `progress`, `turn` and `part` are as for `ShardJob.run`."""

        def rows(batch: Batch) -> tuple[pa.Table, Tensor]:
            return self._batch(shard, batch)

        tower = self.embedder.tower
        nothing = self._rows(shard, [], [], torch.zeros(0, tower.embed_dim))
        job = ShardJob("embed", "its embedding", tower, nothing, rows)
        return job.run(shard, self.reading, progress or Progress(), turn, part)

    def _batch(self, shard: str, batch: Batch) -> tuple[pa.Table, Tensor]:
        """The rows of the images whose embeddings are finite, and which of the batch those are, (B,) bool."""
        found = self.embedder(batch.pixels)  # (B, E)
        finite = found.isfinite().all(dim=1)  # (B,)
        good = finite.tolist()
        keys = [key for key, there in zip(batch.keys, good, strict=True) if there]
        labels = [label for label, there in zip(batch.labels, good, strict=True) if there]
        return self._rows(shard, keys, labels, found[finite]), finite.cpu()

    def _rows(self, shard: str, keys: Sequence[str], labels: Sequence[int | None], found: Tensor) -> pa.Table:
        """The rows of (B, E) embeddings."""
        predicted = None
        if self._classes is not None:
            prediction, confidence = predict(found.to(self._classes.device), self._classes, self._logit_scale)
            predicted = prediction.cpu().numpy(), confidence.cpu().numpy()
        return embeddings.table(shard, keys, labels, found.cpu().numpy().astype(self._precision), predicted)
