"""Embeddings of whole corpora on Ray, by a model as it is or pruned, on the actors of the search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.actor import OutputError, Shared
from cluster.embedding_actor import EmbeddingActor, EmbeddingPlan
from cluster.estimate import Estimate, measured, summed
from cluster.places import Machines, Places, connected
from cluster.pool import PATIENCE, Pool
from cluster.prototypes import settle
from cluster.rank import KEEP_WORK, Summary, about, model_settings, work_through
from patchrank.data import shards
from patchrank.data.images import MAX_PIXELS
from patchrank.errors import UserError
from patchrank.flags import at_least, flag, group
from patchrank.model import class_source, loading
from patchrank.model.class_source import ClassSource, FoundClasses
from patchrank.model.classes import Classes
from patchrank.model.loading import Model, ModelSource
from patchrank.model.tower import Tower
from patchrank.pruning.embedder import Embedder, Pruning
from patchrank.pruning.methods import by_name_alone
from patchrank.store import embeddings, partial, status, storage
from patchrank.store.embeddings import PRECISIONS
from patchrank.store.folder import Folder


@dataclass(frozen=True)
class EmbedJob:
    """Everything that `embed` is told; the flags of jobs/embed.py. Raises UserError for what makes no sense."""

    shards: Sequence[str] = flag(
        (),
        "WebDataset tars, as for jobs/search.py, or a local folder of images",
        group="input and output",
        metavar="SHARDS",
    )
    out: str = flag("embeddings", "folder of embeddings, local, s3:// or gs:// (%(default)s)", metavar="FOLDER")
    precision: str = flag("float16", f"of the embeddings: {' or '.join(PRECISIONS)} (%(default)s)")
    limit: int | None = flag(None, "embed only the first N samples of each shard", metavar="N")
    max_pixels: int = flag(MAX_PIXELS, "reject larger images (%(default)s)", metavar="N")
    model: ModelSource = group("model", ModelSource)
    bundle: str | None = flag(
        None,
        f"prune by it: a bundle's folder or id on the Hugging Face hub, or {', '.join(by_name_alone())}",
        group="pruning (none)",
        metavar="NAME",
    )
    keep: float | None = flag(None, "share of the tokens that stays (what the bundle is for, or 0.6)", metavar="RATE")
    classes: ClassSource = group("classes, to predict (the bundle's own, if it has any)", ClassSource)
    machines: Machines = group("machines", Machines)
    patience: float = flag(PATIENCE, "stop once all actors are lost and none is back for so many seconds (%(default)g)")
    keep_work: float = flag(partial.SECONDS, KEEP_WORK, metavar="SECONDS")
    images_per_batch: int | None = flag(None, "images an actor embeds at a time")

    def __post_init__(self) -> None:
        at_least(self, 1, "limit", "max_pixels", "patience", "images_per_batch")
        at_least(self, 0, "keep_work")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision {self.precision}: must be one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class _Setting:
    """What the job's flags come to."""

    uris: list[str]
    prototypes: list[str]
    model: Model
    pruning: Pruning
    folder: Folder
    classes: FoundClasses


def embed(job: EmbedJob) -> Summary:
    """Embed every image of the shards that have no table yet.

    Finished shards stay finished: stopped in whatever way, the same call goes on from there.

    Raises:
        UserError: bad input; a folder of another job; a disk that is full.
        KeyboardInterrupt: Ctrl-C; every file in the folder is whole.
    """
    found = _setting(job)
    folder, uris = found.folder, found.uris
    with connected(job.machines, len(uris)) as places, storage.one_line_errors(folder.uri):
        tower = _tower(job, found, places)
        folder.prepare(_settings(job, found, tower), embeddings.COLUMNS)
        done = folder.finished(uris)
        partial.remove(folder, done)
        status.write_shards(folder.uri, uris)
        todo = [uri for uri in uris if uri not in done]
        summary = Summary(folder.uri, len(uris), len(done))
        if not todo:
            return summary
        start = time.monotonic()
        pool = _pool(job, found, tower, places, max(len(todo), len(found.prototypes)))
        pool.patience = job.patience
        known = settle(pool, found.classes, folder, _batch(job, places))
        work_through(pool, "embed", folder, ray.put(_plan(job, found, places, known)), todo, summary, job.limit)
        summary.seconds = time.monotonic() - start
    return summary


def estimate(job: EmbedJob) -> Estimate:
    """Time the embedding, decoding included, on the actors that will do it; nothing is written. Raises UserError."""
    found = _setting(job)
    folder, uris = found.folder, found.uris
    with storage.one_line_errors(folder.uri):
        there = folder.read()
        done = folder.finished(uris) if there else set()
    todo = [uri for uri in uris if uri not in done]
    with connected(job.machines, len(uris)) as places:
        tower = _tower(job, found, places)
        if there:
            folder.check_same(there["settings"], _settings(job, found, tower))
        pool = _pool(job, found, tower, places, len(todo)) if todo else None
        timings = measured(pool, todo, _plan(job, found, places, None)) if pool else []
        size = 2 if job.precision == "float16" else 4
        image = 0, Embedder(tower, found.pruning).multiply_adds(), tower.embed_dim * size + 40.0
        return summed(timings, places, len(uris), len(todo), image)


def _setting(job: EmbedJob) -> _Setting:
    """Open what the job names. Raises UserError for what does not fit together, before anything is written."""
    uris = shards.expand(job.shards)
    prototypes = shards.expand(job.classes.prototypes) if job.classes.prototypes else []
    names = job.classes.names()
    model = job.model.load()
    pruning = Pruning.of(job.bundle, job.keep, model.visual)
    cut = job.model.cut
    if pruning.bundle is not None and cut not in (None, pruning.bundle.cut):
        raise UserError(f"--cut {cut}: the bundle was trained for --cut {pruning.bundle.cut}")
    folder = Folder(job.out, "embedding")
    classes = class_source.find(job.classes, names, model, folder, prototypes)
    own = pruning.classes
    if own is not None and pruning.bundle is not None and not job.classes.given:
        identity, names = f"bundle {loading.digest({'classes': own})}", pruning.bundle.class_names
        classes = FoundClasses(identity, names, Classes(own, identity, names))
    return _Setting(uris, prototypes, model, pruning, folder, classes)


def _tower(job: EmbedJob, found: _Setting, places: Places) -> Tower:
    cut = job.model.cut if found.pruning.bundle is None else found.pruning.bundle.cut
    model, dtype = found.model, loading.resolve_dtype(job.model.dtype, places.gpu)
    tower = Tower(model.visual, cut, dtype, name=model.name)
    Embedder(tower, found.pruning)  # refuses a keep rate that leaves nothing
    return tower


def _pool(job: EmbedJob, found: _Setting, tower: Tower, places: Places, items: int) -> Pool:
    shared = Shared(ray.put(tower), ray.put(found.model.preprocess()), places, job.max_pixels)
    at_once = 2 if places.gpu else 1  # a CPU decodes with the very cores that embed
    size = min(places.actors, items)
    return Pool(
        EmbeddingActor, shared, size, places.cpus, places.gpus, (OutputError,), places.room, at_once=at_once
    )  # fmt: skip


def _plan(job: EmbedJob, found: _Setting, places: Places, known: Classes | None) -> EmbeddingPlan:
    return EmbeddingPlan(
        folder=found.folder,
        pruning=found.pruning,
        precision=job.precision,
        classes=known.embeddings if known else None,
        logit_scale=found.model.logit_scale,
        images_per_batch=_batch(job, places),
        limit=job.limit,
        keep_work=job.keep_work,
    )


def _batch(job: EmbedJob, places: Places) -> int:
    return job.images_per_batch or (256 if places.gpu else 16)


def _settings(job: EmbedJob, found: _Setting, tower: Tower) -> dict[str, Any]:
    """What decides the tables, and under "about" what does not."""
    model, pruning = found.model, found.pruning
    told = about(model, job.model.pretrained, found.classes, job.shards)
    return {
        "model": model_settings(model, tower),
        "method": pruning.method,
        "keep": pruning.keep,
        "bundle": None if pruning.bundle is None else loading.digest(pruning.bundle.state_dict()),
        "precision": job.precision,
        "classes": found.classes.identity,
        "limit": job.limit,
        "max_pixels": job.max_pixels,
        "about": told | {"bundle": job.bundle},
    }
