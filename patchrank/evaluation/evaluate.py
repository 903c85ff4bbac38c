"""What pruning costs and saves, image by image: every method at every keep rate, a Parquet file a shard.

A row is an image, method and keep rate: see `schema`. The folder is as `patchrank.store.folder` has it, and beside its
settings is figures.json: what it all comes to (`patchrank.evaluation.figures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.data.held_out import is_held_out
from patchrank.data.loader import Batch
from patchrank.data.pair_batches import PairBatch
from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading, ShardJob, ShardResult
from patchrank.data.shards import Sample
from patchrank.model.tower import Tower
from patchrank.model.zero_shot import probabilities
from patchrank.pruning.comparison import Pruned, Pruner
from patchrank.pruning.methods import UNPRUNED, Method
from patchrank.store.folder import Reject
from patchrank.store.partial import Partial
from patchrank.store.rankings import Rankings
from patchrank.tokens import matching_rate

TOP = 5
COLUMNS = {
    "key": "the sample's key in its shard",
    "shard": "URI of the shard",
    "label": "of the sample, where it has one",
    "method": "the way of pruning, or unpruned",
    "keep": "share of the tokens that stay; 1 for the unpruned model",
    "prediction": "class that the image is taken for, where there were class embeddings",
    "top5": "whether the label is among the five most likely classes",
    "confidence": "probability of the prediction",
    "cosine": "of the embedding to the unpruned one",
    "matching": "share of the most useful tokens, by the golden ranking, that stay, where there are rankings",
    "kept": "ids of the tokens that stay, where tokens were chosen",
    "captions": "of the sample, where it has some",
    "embedding": "normalised, of images with captions and of the first ones of a shard",
}


def schema(embed_dim: int) -> pa.Schema:
    """The columns of an evaluation file; one row is one image pruned by one method at one keep rate.

    `keep` is 1 for the unpruned model. `prediction`, `confidence` and `top5` (whether the label is among the five most
    likely classes) are null without class embeddings, `matching` (with the golden ranking) without rankings. `cosine`
    is to the embedding of the unpruned model. `kept` has the ids of the tokens that stay, where tokens were chosen;
    `captions` are null where there are none; `embedding`, normalised, is there for images with captions and for the
    first ones of a shard, whose nearest neighbours are compared.
    """
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.dictionary(pa.int32(), pa.string())),
            ("label", pa.int32()),
            ("method", pa.dictionary(pa.int32(), pa.string())),
            ("keep", pa.float64()),
            ("prediction", pa.int32()),
            ("top5", pa.bool_()),
            ("confidence", pa.float32()),
            ("cosine", pa.float32()),
            ("matching", pa.float32()),
            ("kept", pa.list_(pa.uint16())),
            ("captions", pa.list_(pa.string())),
            ("embedding", pa.list_(pa.float32(), embed_dim)),
        ]
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """How shards are evaluated.

    Attributes:
        keep_rates: at which all methods prune.
        classes: (K, E) normalised class embeddings, or None.
        logit_scale: the factor on cosines before the softmax over classes.
        images_per_batch: images at a time.
        limit: only the first so many samples of a shard.
        held_out: only this share of the images, those that a training with the same share leaves out.
        match: the tokens that the matching rate looks at; as many as stay where None.
        embeddings: of the first so many images of a shard are kept, whether they have captions or not.
    """

    keep_rates: Sequence[float]
    classes: Tensor | None = None
    logit_scale: float = 100.0
    images_per_batch: int = 16
    limit: int | None = None
    held_out: float = 1.0
    match: int | None = None
    embeddings: int = 0


class ShardEvaluator:
    """Evaluates the images of one shard after the other.

    Args:
        tower: the model, on its device.
        methods: by name, on the same device.
        preprocess: PIL image -> (3, H, W).
        config: how.
        corpus: golden rankings; images that have none are rejected then, so that all methods see the same images.
        threads: that decode images.

    Raises:
        UserError: a keep rate that leaves nothing, or is above 1.
    """

    def __init__(
        self,
        tower: Tower,
        methods: Mapping[str, Method],
        preprocess: Callable[..., Tensor],
        config: EvaluationConfig,
        corpus: Rankings | None = None,
        threads: int = 2,
    ) -> None:
        self.tower, self.config, self.corpus = tower, config, corpus
        self.pruner = Pruner(tower, methods, config.keep_rates)
        self.classes = None if config.classes is None else config.classes.to(tower.device)
        num_classes = None if config.classes is None else len(config.classes)
        self.reading = Reading(preprocess, config.images_per_batch, config.limit, threads, num_classes)

    def evaluate(self, shard: str, progress: Progress | None = None, part: Partial | None = None) -> ShardResult:
        """Prune the images of a shard in every way; `progress` is kept up to date, `part` as in `ShardJob.run`."""
        golden = self._golden(shard)
        progress = progress or Progress()

        def wanted(samples: Iterator[Sample | Reject]) -> Iterator[Sample | Reject]:
            for sample in samples:
                if self.config.held_out < 1 and not is_held_out(sample.key, self.config.held_out):
                    continue
                ranked = golden is None or sample.key in golden or isinstance(sample, Reject)
                yield sample if ranked else Reject(sample.key, "has no golden ranking")

        def rows(batch: Batch) -> tuple[pa.Table, Tensor]:
            return self._batch(shard, batch, golden, progress.done)

        nothing = self._rows(shard, [], [], [], [], 0)
        job = ShardJob("evaluate", "a pruned image's embedding", self.tower, nothing, rows, wanted)
        return job.run(shard, self.reading, progress, part=part)

    def _golden(self, shard: str) -> dict[str, Tensor] | None:
        """Rankings, (N,) each, by key."""
        if self.corpus is None:
            return None
        table = self.corpus.tensors(["ranking"], shard)
        return dict(zip(table["key"], table["ranking"], strict=True))

    def _batch(
        self, shard: str, batch: Batch, golden: Mapping[str, Tensor] | None, done: int
    ) -> tuple[pa.Table, Tensor]:
        """The rows of the images all of whose embeddings are finite, and which of the batch those are, (B,) bool.

        `done` is how many images of the shard came before.
        """
        ranking = None if golden is None else torch.stack([golden[key] for key in batch.keys])  # (B, N)
        labels = torch.tensor([-1 if label is None else label for label in batch.labels])  # (B,)
        found = list(self.pruner.prune(PairBatch(batch.keys, batch.pixels, labels, ranking, None)))
        finite = torch.stack([cell.embeddings.isfinite().all(dim=1) for cell in found]).all(dim=0).cpu()  # (B,)
        rows = self._rows(
            shard, batch.keys, batch.labels, found, batch.captions, self.config.embeddings - done, ranking
        )
        return rows.filter(pa.array(finite.repeat(len(found)).numpy())), finite

    def _rows(
        self,
        shard: str,
        keys: Sequence[str],
        labels: Sequence[int | None],
        found: Sequence[Pruned],
        captions: Sequence[tuple[str, ...]],
        embeddings: int,
        ranking: Tensor | None = None,
    ) -> pa.Table:
        """B rows a cell, cell by cell."""
        columns: dict[str, list[Any]] = {name: [] for name in schema(self.tower.embed_dim).names}
        for cell in found:
            size = len(keys)
            columns["key"] += keys
            columns["label"] += labels
            columns["method"] += [cell.method] * size
            columns["keep"] += [cell.keep] * size
            columns["cosine"] += F.cosine_similarity(cell.embeddings, found[0].embeddings).tolist()
            for name, values in self._classified(cell, labels).items():
                columns[name] += values
            matching: list[float | None] = [None] * size
            if ranking is not None and cell.usefulness is not None and cell.kept is not None:
                m = self.config.match or cell.kept.shape[1]
                matching = matching_rate(cell.usefulness.cpu(), ranking, m).tolist()
            columns["matching"] += matching
            columns["kept"] += [None] * size if cell.kept is None else list(cell.kept.cpu().numpy().astype(np.uint16))
            columns["captions"] += [list(texts) or None for texts in captions]
            vectors = F.normalize(cell.embeddings, dim=-1).float().cpu().numpy()
            columns["embedding"] += [
                vector if texts or row < embeddings else None
                for row, (vector, texts) in enumerate(zip(vectors, captions, strict=True))
            ]
        columns["shard"] = [shard] * len(columns["key"])
        return pa.Table.from_pydict(columns, schema=schema(self.tower.embed_dim))

    def _classified(self, cell: Pruned, labels: Sequence[int | None]) -> dict[str, list[Any]]:
        """`prediction`, `confidence` and `top5` of a cell, B each."""
        own = self.pruner.methods[cell.method].classes if cell.method != UNPRUNED else None
        classes = self.classes if own is None else own
        if classes is None:
            return {name: [None] * len(labels) for name in ("prediction", "confidence", "top5")}
        likely = probabilities(cell.embeddings, classes, self.config.logit_scale)  # (B, K)
        confidence, top = likely.topk(min(TOP, len(classes)), dim=-1)  # (B, 5) each
        among = [None if label is None else label in row for label, row in zip(labels, top.tolist(), strict=True)]
        return {"prediction": top[:, 0].tolist(), "confidence": confidence[:, 0].tolist(), "top5": among}
