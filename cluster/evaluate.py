"""Evaluation on Ray: what every way of pruning costs and saves, on the actors of the search."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F

from cluster.actor import OutputError, Shared
from cluster.class_source import class_source, settle, usable
from cluster.evaluation_actor import EvaluationActor, EvaluationPlan, LatencyPlan
from cluster.places import connected
from cluster.pool import Failed, Pool
from cluster.rank import Summary, model_settings, work_through
from patchrank import __version__
from patchrank.data import pairs, shards
from patchrank.data.images import MAX_PIXELS
from patchrank.errors import UserError
from patchrank.evaluation import figures
from patchrank.evaluation.evaluate import EvaluationConfig
from patchrank.model import classes, loading
from patchrank.model.classes import classes_of
from patchrank.model.kinds import adapt
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.pruning import methods
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import METHODS, UNPRUNED, Need
from patchrank.pruning.pruned import pruned_tower
from patchrank.pruning.stand_in import count_multiply_adds
from patchrank.store import rankings, storage
from patchrank.store.folder import Folder
from patchrank.store.rankings import Rankings
from patchrank.tokens import count_kept


@dataclass(frozen=True)
class EvaluationJob:
    """Everything that `run` is told; the flags of jobs/evaluate.py."""

    shards: Sequence[str] | None  # those of the rankings where None
    out: str
    model: str
    pretrained: str | None = None
    cut: int | None = None
    dtype: str = "auto"
    rankings: str | None = None
    predictor: str | None = None
    tokens: str | None = None
    bundle: str | None = None
    methods: Sequence[str] | None = None
    keep_rates: Sequence[float] = (0.8, 0.7, 0.6, 0.5, 0.4)
    match: int | None = None
    held_out: float = 1.0
    class_names: str | None = None
    templates: Sequence[str] = ("photo",)
    class_embeddings: str | None = None
    prototypes: Sequence[str] = ()
    limit: int | None = None
    max_pixels: int = MAX_PIXELS
    batch_sizes: Sequence[int] = (1, 8, 64)  # at which latency is measured; none skips it
    timed_keep_rates: Sequence[float] = (0.6, 0.5)
    timed_seconds: float = 5.0  # a batch size
    save_bundle: str | None = None
    address: str | None = None
    actors: int | None = None
    cpus_per_actor: int | None = None
    gpus_per_actor: float | None = None
    images_per_batch: int | None = None


@dataclass
class EvaluationSummary(Summary):
    """The outcome of `run`; `content` is that of figures.json, empty where no image was evaluated."""

    content: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Setting:
    """What the job's flags come to."""

    tower: Tower
    model: Model
    corpus: Rankings | None
    bundle: Bundle | None
    methods: list[str]


def run(job: EvaluationJob) -> EvaluationSummary:
    """Evaluate every image of the shards that have no table yet, then time the towers and sum up.

    Finished shards stay finished: stopped in whatever way, the same call goes on from there.

    Raises:
        UserError: bad input; a folder of another evaluation; a disk that is full.
        KeyboardInterrupt: Ctrl-C; every file in the folder is whole.
    """
    corpus = rankings.open(job.rankings) if job.rankings else None
    if job.shards is not None:
        uris = shards.expand(job.shards)
    elif corpus is not None:
        uris = corpus.shards()
    else:
        raise UserError("neither shards nor rankings, which name shards, are given")
    prototypes = shards.expand(job.prototypes) if job.prototypes else []
    names = classes.read_names(job.class_names) if job.class_names else None
    model = loading.load(job.model, job.pretrained)
    folder = Folder(job.out, "evaluation")
    if corpus is not None and job.limit is None:
        job = replace(job, limit=corpus.settings.get("limit"))
    asks = bool(names or prototypes or job.class_embeddings)
    if corpus is not None and not asks:
        identity, known = classes_of(corpus)
        names = corpus.class_names
    else:
        identity, known = class_source(job, model, folder.uri, names, prototypes)
        names = known.names if known else names if identity else None
    flags = (job.address, job.actors, job.cpus_per_actor, job.gpus_per_actor)
    with connected(*flags, shards=len(uris)) as places, usable(folder.uri):
        found = _setting(job, model, corpus, loading.resolve_dtype(job.dtype, places.gpu))
        folder.prepare(_settings(job, found, identity, names))
        done = folder.finished(uris)
        todo = [uri for uri in uris if uri not in done]
        summary = EvaluationSummary(folder.uri, len(uris), len(done))
        start = time.monotonic()
        shared = Shared(ray.put(found.tower), ray.put(model.preprocess()), places, job.max_pixels)
        size = min(places.actors, max(1, len(todo), len(prototypes)))
        pool = Pool(EvaluationActor, shared, size, places.cpus, places.gpus, (OutputError,), places.room)
        batch = job.images_per_batch or (64 if places.gpu else 8)
        known = settle(pool, prototypes, folder.uri, identity, known, names, batch)
        plan = EvaluationPlan(
            folder=folder,
            methods=tuple(found.methods),
            bundle=found.bundle,
            rankings=None if corpus is None else corpus.folder,
            config=EvaluationConfig(
                keep_rates=tuple(job.keep_rates),
                classes=known.embeddings if known else None,
                logit_scale=model.logit_scale,
                images_per_batch=batch,
                limit=job.limit,
                held_out=job.held_out,
                match=job.match,
            ),
        )
        work_through(pool, "evaluate", folder, ray.put(plan), todo, summary, job.limit)
        summary.seconds = time.monotonic() - start
        there = folder.tables(uris)
        if not there:
            shard, reason = min(summary.failures.items())
            raise UserError(f"{shard}: {reason}" + ("; no other shard has a table either" if len(uris) > 1 else ""))
        summary.content = _sum_up(job, found, names, uris, there, folder.uri, pool)
        figures.write(folder.uri, summary.content)
    if job.save_bundle and found.bundle is not None:
        own = [UNPRUNED, *(name for name, entry in METHODS.items() if Need.PREDICTOR in entry.needs)]
        rows = [row for row in summary.content["figures"] if row["method"] in own]
        try:
            found.bundle.with_figures(rows).save_pretrained(job.save_bundle)
        except OSError as error:
            raise UserError(f"--save-bundle {job.save_bundle}: {storage.one_line(error)}") from None
    return summary


def _setting(job: EvaluationJob, model: Model, corpus: Rankings | None, dtype: torch.dtype) -> _Setting:
    """Open what the job names. Raises UserError for what does not fit together, before anything is written."""
    bundle = None
    if job.bundle is not None:
        bundle = Bundle.open(job.bundle)
        bundle.check(model.visual)
    elif job.predictor is not None:
        bundle = Bundle.from_training(model, job.predictor, job.tokens)
    cut = job.cut
    if cut is None and bundle is not None:
        cut = bundle.cut
    elif cut is None and corpus is not None:
        cut = corpus.settings["model"]["cut"]
    tower = Tower(model.visual, cut, dtype, name=model.name)
    if bundle is not None and bundle.cut != tower.cut:
        raise UserError(f"--cut {tower.cut}: the predictor was trained for --cut {bundle.cut}")
    if corpus is not None:
        pairs.check(corpus, tower, model.weights)
    if job.match is not None and not 0 < job.match <= tower.num_tokens:
        raise UserError(f"--match {job.match}: must be 1 to {tower.num_tokens}")
    for flag, rates in (("--keep-rates", job.keep_rates), ("--timed-keep-rates", job.timed_keep_rates)):
        for keep in rates:
            count_kept(tower.num_tokens, keep, flag)
    chosen = methods.choose(job.methods, methods.there_is(tower.cut, bundle, corpus is not None))
    return _Setting(tower, model, corpus, bundle, chosen)


def _settings(job: EvaluationJob, found: _Setting, identity: str | None, names: list[str] | None) -> dict[str, Any]:
    """What decides the tables, and under "about" what does not."""
    model, tower, corpus = found.model, found.tower, found.corpus
    return {
        "model": model_settings(model, tower),
        "grid": list(tower.grid),
        "methods": found.methods,
        "keep_rates": list(job.keep_rates),
        "classes": identity,
        "rankings": None if corpus is None else corpus.fingerprint,
        "bundle": None if found.bundle is None else loading.digest(found.bundle.state_dict()),
        "limit": job.limit,
        "held_out": job.held_out,
        "match": job.match,
        "max_pixels": job.max_pixels,
        "about": {"model": job.model, "pretrained": job.pretrained, "class_names": names, "patchrank": __version__},
    }


def _sum_up(
    job: EvaluationJob,
    found: _Setting,
    names: list[str] | None,
    uris: list[str],
    there: list[str],
    folder: str,
    pool: Pool,
) -> dict[str, Any]:
    """The content of figures.json: of the job's shards alone, whatever others have tables in the folder."""
    tower, model = found.tower, found.model
    rows = figures.figures(folder, there, found.methods)
    cost = _costs(found)
    for row in rows:
        row["multiply_adds"], row["counted"] = cost(row["method"], row["keep"])
    latency, device = _latency(job, found, pool, cost)

    def encode(captions: list[str]) -> np.ndarray:
        parts, tokenize = [], model.tokenizer()
        with torch.inference_mode():
            for start in range(0, len(captions), 256):
                texts = tokenize(captions[start : start + 256])
                parts.append(F.normalize(model.clip.encode_text(texts).float(), dim=-1))
        return torch.cat(parts).numpy()

    return {
        "model": {
            "name": job.model,
            "pretrained": job.pretrained,
            "weights": model.weights,
            "cut": tower.cut,
            "grid": list(tower.grid),
            "dtype": loading.dtype_name(tower.dtype),
            "preprocess": dict(model.visual.preprocess_cfg),
        },
        "class_names": names,
        "shards": uris,
        "rankings": None if found.corpus is None else found.corpus.folder,
        "device": device,
        "images": rows[0]["images"],
        "figures": rows,
        "classes": figures.by_class(folder, there, names),
        "latency": latency,
        "retrieval": figures.retrieval(folder, there, encode) if model.has_text else [],
    }


_Costs = Callable[[str, float], tuple[int, int]]


def _costs(found: _Setting) -> _Costs:
    """From a method and a keep rate to the multiply-adds of an image, by the formula and as PyTorch counts them."""
    visual = copy.deepcopy(found.model.visual).to("meta")  # where counting takes no time
    bundle = None if found.bundle is None else copy.deepcopy(found.bundle).to("meta")

    @functools.cache
    def cost(method: str, keep: float) -> tuple[int, int]:
        if method == UNPRUNED:
            return adapt(visual).full_multiply_adds(), count_multiply_adds(visual)
        tower = pruned_tower(method, visual, found.tower.cut, keep, bundle)
        return tower.multiply_adds(), count_multiply_adds(tower)

    return cost


def _latency(job: EvaluationJob, found: _Setting, pool: Pool, cost: _Costs) -> tuple[list[dict[str, Any]], str]:
    """What one actor measures, once the others have nothing to do, and what it is."""
    plan = LatencyPlan(
        methods=tuple(name for name in found.methods if METHODS[name].timed),
        bundle=found.bundle,
        keep_rates=tuple(job.timed_keep_rates),
        batch_sizes=tuple(job.batch_sizes),
        seconds=job.timed_seconds,
    )
    for _, result in pool.run("latency", ["latency"], plan):
        if isinstance(result, Failed):
            raise UserError(
                f"the towers could not be timed ({result.reason}); --batch-sizes tells which batches to time"
            )
        measured, device = result
        full, _ = cost(UNPRUNED, 1.0)
        return [row | {"predicted": full / cost(row["method"], row["keep"])[0]} for row in measured], device
    raise AssertionError("the pool answers for every item")
