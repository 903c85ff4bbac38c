"""The Ray actor that embeds shards on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cluster.actor import ShardCost, Shared, TowerActor, keeper
from cluster.pool import Failed
from patchrank import clock
from patchrank.data.progress import Progress, ShardReport
from patchrank.data.shard_job import Reading, ShardResult
from patchrank.pruning.embedder import Embedder, Pruning, ShardEmbedder
from patchrank.store import embeddings
from patchrank.store.folder import Folder
from patchrank.store.partial import Partial


@dataclass(frozen=True)
class EmbeddingPlan:
    """What an actor must know to embed a shard; `classes` is (K, E) or None."""

    folder: Folder
    pruning: Pruning
    precision: str
    classes: Tensor | None
    logit_scale: float
    images_per_batch: int
    limit: int | None
    keep_work: float


class EmbeddingActor(TowerActor):
    """Holds the tower on one device and embeds the shards it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._embedder: ShardEmbedder | None = None  # of the one plan that an actor is given

    def _embedding(self, shared: Shared, plan: EmbeddingPlan) -> ShardEmbedder:
        tower, preprocess = self._load(shared)
        with self._loading:
            if self._embedder is None:
                # A label decides nothing here, so one outside of the classes is no reason to leave the image out.
                reading = Reading(preprocess, plan.images_per_batch, plan.limit, shared.places.threads)
                embedder = Embedder(tower, plan.pruning)
                self._embedder = ShardEmbedder(embedder, reading, plan.precision, plan.classes, plan.logit_scale)
            return self._embedder

    def embed(self, shared: Shared, shard: str, plan: EmbeddingPlan) -> ShardReport:
        """Embed a shard and write its table and its rejects. Raises OutputError where they cannot be written."""

        def work(progress: Progress, part: Partial) -> ShardResult:
            return self._embedding(shared, plan).embed(shard, progress, self._device, part)

        part = Partial(plan.folder, shard, plan.keep_work, write=keeper(plan.folder))
        return self._made(shard, plan.folder, work, part, embeddings.encode)

    def estimate(self, shared: Shared, shard: str, plan: EmbeddingPlan, seconds: float) -> ShardCost | Failed:
        """How long an image of a shard takes, from about so many seconds of timing; nothing is written."""
        counted = self._counted(shared, shard, plan.limit)
        if isinstance(counted, Failed):
            return counted
        samples, first, decoding = counted
        embedder = self._embedding(shared, plan).embedder
        pixels = first.expand(min(plan.images_per_batch, samples), -1, -1, -1)  # (B, 3, H, W)
        embedder(pixels)  # to warm up
        device = embedder.tower.device
        once = clock.seconds(lambda: embedder(pixels), device)
        rounds = max(1, math.floor(seconds / once))
        took = sum(clock.seconds(lambda: embedder(pixels), device) for _ in range(rounds)) / rounds / len(pixels)
        # A CPU decodes with the very cores that embed; beside a GPU threads do, and the slower of the two decides.
        decoding /= shared.places.cpus
        both = max(took, decoding) if shared.places.gpu else took + decoding
        return ShardCost(samples, both, *shared.places.peak_bytes())
