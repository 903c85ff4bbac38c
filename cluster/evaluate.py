"""Evaluation on Ray: what every way of pruning costs and saves, on the actors of the search."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F

from cluster.actor import OutputError, Shared
from cluster.evaluation_actor import EvaluationActor, EvaluationPlan, LatencyPlan
from cluster.places import Machines, connected
from cluster.pool import PATIENCE, Failed, Pool
from cluster.prototypes import settle
from cluster.rank import KEEP_WORK, Summary, about, model_settings, work_through
from patchrank.data import pairs, shards
from patchrank.data.images import MAX_PIXELS
from patchrank.errors import UserError
from patchrank.evaluation import figures, neighbours, record
from patchrank.evaluation.evaluate import COLUMNS, EvaluationConfig
from patchrank.evaluation.latency import Timing
from patchrank.evaluation.record import Latency, Record
from patchrank.flags import at_least, flag, group
from patchrank.model import class_source, loading
from patchrank.model.class_source import ClassSource, FoundClasses
from patchrank.model.classes import classes_of
from patchrank.model.kinds import adapt
from patchrank.model.loading import Model, ModelSource
from patchrank.model.tower import Tower
from patchrank.pruning import methods
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import METHODS, UNPRUNED, Need
from patchrank.pruning.pruned import pruned_tower
from patchrank.pruning.schedule import at_keep_rate
from patchrank.pruning.stand_in import count_multiply_adds
from patchrank.store import partial, rankings, storage
from patchrank.store.folder import Folder
from patchrank.store.rankings import Rankings


@dataclass(frozen=True)
class EvaluatedModel(ModelSource):
    """A model whose cut is known to others."""

    cut: int | None = flag(None, "tokens leave before this block (that of the predictor or the rankings)", metavar="L")


@dataclass(frozen=True)
class Pruning:
    """What is compared. Raises UserError for what does not go together."""

    predictor: str | None = flag(None, "what jobs/train_predictor.py left", metavar="FOLDER")
    tokens: str | None = flag(None, "what jobs/train_tokens.py left", metavar="FOLDER")
    bundle: str | None = flag(None, "instead of both: a bundle's folder or id on the Hugging Face hub", metavar="NAME")
    methods: Sequence[str] | None = flag(None, f"of {', '.join(METHODS)} (all that there is all for)", metavar="NAME")
    keep_rates: Sequence[float] = flag(
        (0.8, 0.7, 0.6, 0.5, 0.4), "shares of the tokens that stay, learnable ones among them (%(default)s)"
    )
    match: int | None = flag(None, "tokens that the matching rate looks at (as many as stay)", metavar="M")
    save_bundle: str | None = flag(None, "write what patchrank.prune needs here, with these figures", metavar="FOLDER")

    def __post_init__(self) -> None:
        if self.tokens and not self.predictor:
            raise UserError("--tokens needs --predictor, which tells the tokens that stay")
        if self.bundle and self.predictor:
            raise UserError("--bundle and --predictor exclude each other: choose one")
        if self.save_bundle and not (self.predictor or self.bundle):
            raise UserError("--save-bundle needs --predictor: a bundle is what training left")
        if self.save_bundle and "://" in self.save_bundle:
            raise UserError(f"--save-bundle {self.save_bundle}: must be a folder of this machine")


@dataclass(frozen=True)
class EvaluationJob:
    """Everything that `run` is told; the flags of jobs/evaluate.py. Raises UserError for what makes no sense."""

    rankings: str | None = flag(
        None,
        "golden rankings of the images (test-rankings, unless --shards is given)",
        group="images, model and output",
        metavar="FOLDER",
    )
    shards: Sequence[str] = flag((), "as for jobs/search.py (all that the rankings name)", metavar="SHARDS")
    out: str = flag("evaluation", "local, s3:// or gs:// (%(default)s)", metavar="FOLDER")
    limit: int | None = flag(None, "only the first N samples of each shard (those of --rankings, or all)", metavar="N")
    held_out: float = flag(1.0, "only images that such a training left out (all)", metavar="SHARE")
    max_pixels: int = flag(MAX_PIXELS, "reject larger images (%(default)s)", metavar="N")
    neighbours: int = flag(
        neighbours.IMAGES, "compare the nearest neighbours of so many images; 0: of none (%(default)s)", metavar="N"
    )
    model: EvaluatedModel = group("images, model and output", EvaluatedModel)
    pruning: Pruning = group("ways of pruning", Pruning)
    classes: ClassSource = group("classes (those of the rankings)", ClassSource)
    timing: Timing = group("time", Timing)
    machines: Machines = group("machines", Machines)
    patience: float = flag(PATIENCE, "stop once all actors are lost and none is back for so many seconds (%(default)g)")
    keep_work: float = flag(partial.SECONDS, KEEP_WORK, metavar="SECONDS")
    images_per_batch: int | None = flag(None, "images an actor evaluates at a time")

    def __post_init__(self) -> None:
        at_least(self, 1, "limit", "max_pixels", "patience", "images_per_batch")
        at_least(self, 0, "neighbours", "keep_work")
        if not 0 < self.held_out <= 1:
            raise UserError(f"--held-out {self.held_out}: must be above 0 and at most 1")


@dataclass
class EvaluationSummary(Summary):
    """The outcome of `run`; `record` is None until it is through."""

    record: Record | None = None


@dataclass(frozen=True)
class _Setting:
    """What the job's flags come to."""

    tower: Tower
    model: Model
    corpus: Rankings | None
    bundle: Bundle | None
    classes: FoundClasses
    methods: list[str]


def run(job: EvaluationJob) -> EvaluationSummary:
    """Evaluate every image of the shards that have no table yet, then time the towers and sum up.

    Finished shards stay finished: stopped in whatever way, the same call goes on from there.

    Raises:
        UserError: bad input; a folder of another evaluation; a disk that is full.
        KeyboardInterrupt: Ctrl-C; every file in the folder is whole.
    """
    corpus = rankings.open(job.rankings) if job.rankings else None
    if job.shards:
        uris = shards.expand(job.shards)
    elif corpus is not None:
        uris = corpus.shards()
    else:
        raise UserError("neither shards nor rankings, which name shards, are given")
    prototypes = shards.expand(job.classes.prototypes) if job.classes.prototypes else []
    names = job.classes.names()
    model = job.model.load()
    folder = Folder(job.out, "evaluation")
    if corpus is not None and job.limit is None:
        job = replace(job, limit=corpus.settings.get("limit"))
    if corpus is not None and not job.classes.given:
        identity, known = classes_of(corpus)
        classes = FoundClasses(identity, corpus.class_names, known)
    else:
        classes = class_source.find(job.classes, names, model, folder, prototypes)
    with connected(job.machines, len(uris)) as places, storage.one_line_errors(folder.uri):
        found = _setting(job, model, corpus, classes, loading.resolve_dtype(job.model.dtype, places.gpu))
        folder.prepare(_settings(job, found), COLUMNS)
        done = folder.finished(uris)
        partial.remove(folder, done)
        todo = [uri for uri in uris if uri not in done]
        summary = EvaluationSummary(folder.uri, len(uris), len(done))
        start = time.monotonic()
        shared = Shared(ray.put(found.tower), ray.put(model.preprocess()), places, job.max_pixels)
        size = min(places.actors, max(1, len(todo), len(prototypes)))
        pool = Pool(EvaluationActor, shared, size, places.cpus, places.gpus, (OutputError,), places.room)
        pool.patience = job.patience
        batch = job.images_per_batch or (64 if places.gpu else 8)
        known = settle(pool, classes, folder, batch)
        plan = EvaluationPlan(
            folder=folder,
            methods=tuple(found.methods),
            bundle=found.bundle,
            rankings=None if corpus is None else corpus.folder,
            config=EvaluationConfig(
                keep_rates=tuple(job.pruning.keep_rates),
                classes=known.embeddings if known else None,
                logit_scale=model.logit_scale,
                images_per_batch=batch,
                limit=job.limit,
                held_out=job.held_out,
                match=job.pruning.match,
                embeddings=-(-job.neighbours // len(uris)),  # of each shard as many
            ),
            keep_work=job.keep_work,
        )
        work_through(pool, "evaluate", folder, ray.put(plan), todo, summary, job.limit)
        summary.seconds = time.monotonic() - start
        there = folder.tables(uris)
        if not there:
            shard, reason = min(summary.failures.items())
            raise UserError(f"{shard}: {reason}" + ("; no other shard has a table either" if len(uris) > 1 else ""))
        summary.record = _sum_up(job, found, uris, there, folder.uri, pool)
        summary.record.write(folder)
    save_bundle = job.pruning.save_bundle
    if save_bundle and found.bundle is not None:
        own = [UNPRUNED, *(name for name, entry in METHODS.items() if Need.PREDICTOR in entry.needs)]
        about: dict[tuple[str, float], dict[str, Any]] = {
            (one.method, one.keep): {"neighbours": one.pruned_queries, "index": neighbours.sentence(one)}
            for one in summary.record.neighbours
        }
        figured = [row for row in summary.record.figures if row.method in own]
        rows = [asdict(row) | about.get((row.method, row.keep), {}) for row in figured]
        try:
            found.bundle.with_figures(rows).save_pretrained(save_bundle)
        except OSError as error:
            raise UserError(f"--save-bundle {save_bundle}: {storage.one_line(error)}") from None
    return summary


def _setting(
    job: EvaluationJob, model: Model, corpus: Rankings | None, classes: FoundClasses, dtype: torch.dtype
) -> _Setting:
    """Open what the job names. Raises UserError for what does not fit together, before anything is written."""
    bundle, pruning = None, job.pruning
    if pruning.bundle is not None:
        bundle = Bundle.open(pruning.bundle)
        bundle.check(model.visual)
    elif pruning.predictor is not None:
        bundle = Bundle.from_training(model, pruning.predictor, pruning.tokens)
    cut = job.model.cut
    if cut is None and bundle is not None:
        cut = bundle.cut
    elif cut is None and corpus is not None:
        cut = corpus.settings["model"]["cut"]
    tower = Tower(model.visual, cut, dtype, name=model.name)
    if bundle is not None and bundle.cut != tower.cut:
        raise UserError(f"--cut {tower.cut}: the predictor was trained for --cut {bundle.cut}")
    if corpus is not None:
        pairs.check(corpus, tower, model.weights)
    if pruning.match is not None and not 0 < pruning.match <= tower.num_tokens:
        raise UserError(f"--match {pruning.match}: must be 1 to {tower.num_tokens}")
    there = methods.there_is(tower.cut, bundle, corpus is not None, tower.adapter.rotary)
    chosen = methods.choose(pruning.methods, there)
    made = methods.make(chosen, tower.device, bundle)
    for name, rates in (("--keep-rates", pruning.keep_rates), ("--timed-keep-rates", job.timing.keep_rates)):
        for keep in rates:
            for method in made.values():
                at_keep_rate(tower.adapter, method, tower.cut, keep, name)
    return _Setting(tower, model, corpus, bundle, classes, chosen)


def _settings(job: EvaluationJob, found: _Setting) -> dict[str, Any]:
    """What decides the tables, and under "about" what does not."""
    model, tower, corpus = found.model, found.tower, found.corpus
    return {
        "model": model_settings(model, tower),
        "grid": list(tower.grid),
        "methods": found.methods,
        "keep_rates": list(job.pruning.keep_rates),
        "compared_at": record.EQUAL_COST,  # tables of before 0.2, which were not, are not mixed with these
        "classes": found.classes.identity,
        "rankings": None if corpus is None else corpus.fingerprint,
        "bundle": None if found.bundle is None else loading.digest(found.bundle.state_dict()),
        "limit": job.limit,
        "held_out": job.held_out,
        "match": job.pruning.match,
        "max_pixels": job.max_pixels,
        "about": about(model, job.model.pretrained, found.classes, job.shards),
    }


def _sum_up(job: EvaluationJob, found: _Setting, uris: list[str], there: list[str], folder: str, pool: Pool) -> Record:
    """The record of the job's shards alone, whatever others have tables in the folder."""
    tower, model = found.tower, found.model
    cost = _costs(found)
    rows = figures.figures(folder, there, found.methods, cost)
    latency, device = _latency(job, found, pool, cost)

    def encode(captions: list[str]) -> np.ndarray:
        parts, tokenize = [], model.tokenizer()
        with torch.inference_mode():
            for start in range(0, len(captions), 256):
                texts = tokenize(captions[start : start + 256])
                parts.append(F.normalize(model.clip.encode_text(texts).float(), dim=-1))
        return torch.cat(parts).numpy()

    return Record(
        model=record.Model(
            name=model.name,
            pretrained=job.model.pretrained,
            weights=model.weights,
            cut=tower.cut,
            grid=tower.grid,
            dtype=loading.dtype_name(tower.dtype),
            preprocess=dict(model.visual.preprocess_cfg),
        ),
        class_names=found.classes.names,
        shards=uris,
        rankings=None if found.corpus is None else found.corpus.folder,
        device=device,
        images=rows[0].images,
        figures=rows,
        classes=figures.by_class(folder, there, found.classes.names),
        latency=latency,
        retrieval=figures.retrieval(folder, there, encode) if model.has_text else [],
        compared_at=record.EQUAL_COST,
        neighbours=neighbours.neighbours(folder, there, job.neighbours) if job.neighbours else [],
    )


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


def _latency(job: EvaluationJob, found: _Setting, pool: Pool, cost: _Costs) -> tuple[list[Latency], str]:
    """What one actor measures, once the others have nothing to do, and what it is."""
    plan = LatencyPlan(
        methods=tuple(name for name in found.methods if METHODS[name].timed),
        bundle=found.bundle,
        timing=job.timing,
    )
    for _, result in pool.run("latency", ["latency"], plan):
        if isinstance(result, Failed):
            raise UserError(
                f"the towers could not be timed ({result.reason}); --batch-sizes tells which batches to time"
            )
        measured, device = result
        full, _ = cost(UNPRUNED, 1.0)
        return [replace(row, predicted=full / cost(row.method, row.keep)[0]) for row in measured], device
    raise AssertionError("the pool answers for every item")
