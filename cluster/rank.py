"""The search on Ray: an actor a GPU ranks shard after shard, the driver feeds the actors and tells how far they are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ray

from cluster import bank
from cluster.actor import OutputError, Shared
from cluster.places import Machines, Places, connected
from cluster.pool import PATIENCE, Failed, Pool
from cluster.prototypes import settle
from cluster.ranking_actor import Plan, RankingActor
from patchrank import __version__
from patchrank.data import shards
from patchrank.data.images import MAX_PIXELS
from patchrank.data.meter import Meter
from patchrank.data.progress import ShardReport
from patchrank.errors import UserError
from patchrank.flags import at_least, flag, group
from patchrank.model import class_source, loading
from patchrank.model.class_source import ClassSource, FoundClasses
from patchrank.model.loading import Model, ModelSource
from patchrank.model.tower import Tower
from patchrank.search import bank as banks
from patchrank.search.bank import FoundBank
from patchrank.search.config import SearchConfig
from patchrank.search.objective import SCORES
from patchrank.store import partial, rankings, retry, status, storage
from patchrank.store.folder import Folder

KEEP_WORK = "of a shard in work, write what is done; a lost actor costs at most so much of it (%(default)g)"


@dataclass(frozen=True)
class SearchJob:
    """Everything that `search` is told; the flags of jobs/search.py. Raises UserError for what makes no sense."""

    shards: Sequence[str] = flag(
        (), "WebDataset tars: path, {000..123}, glob, folder or list file", group="input and output", metavar="SHARDS"
    )
    out: str = flag("rankings", "folder of rankings, local, s3:// or gs:// (%(default)s)", metavar="FOLDER")
    limit: int | None = flag(None, "rank only the first N samples of each shard", metavar="N")
    retry_rejects: bool = flag(False, "try what finished shards rejected again, and that alone; also by a larger limit")
    max_pixels: int = flag(MAX_PIXELS, "reject larger images (%(default)s)", metavar="N")
    model: ModelSource = group("model", ModelSource)
    classes: ClassSource = group("classes, for predictions and for the scores 'label' and 'confidence'", ClassSource)
    config: SearchConfig = group("search", SearchConfig)
    bank: str | None = flag(
        None,
        "of the score 'similarities': texts, as --classes, embeddings, as --class-embeddings, or a tar of images (the "
        "first images of the shards)",
        metavar="FILE",
        group="search",
    )
    keep_rates: Sequence[float] = flag((0.8, 0.7, 0.6, 0.5, 0.4), "to predict at (%(default)s)", nargs="*")
    machines: Machines = group("machines", Machines)
    patience: float = flag(PATIENCE, "stop once all actors are lost and none is back for so many seconds (%(default)g)")
    keep_work: float = flag(partial.SECONDS, KEEP_WORK, metavar="SECONDS")
    images_per_batch: int | None = flag(None, "images an actor searches at a time")
    candidates_per_batch: int | None = flag(None, "candidates in a forward pass; halved when memory runs out")

    def __post_init__(self) -> None:
        at_least(self, 1, "limit", "max_pixels", "patience", "images_per_batch", "candidates_per_batch")
        at_least(self, 0, "keep_work")
        if self.bank and not SCORES[self.config.score].bank:
            raise UserError(f"--bank {self.bank}: is of --score similarities, not of {self.config.score}")


@dataclass
class Summary:
    """The outcome of a job that makes a table of every shard; sums are of this run alone."""

    folder: str
    shards: int
    resumed: int
    seconds: float = 0.0
    reports: dict[str, ShardReport] = field(default_factory=dict)  # by shard, in the order in which they finished
    failures: dict[str, str] = field(default_factory=dict)  # shard -> why

    def total(self, name: str) -> int:
        """The sum of "images", "rejects", "candidates" or "kept" over this run's shards."""
        return sum(getattr(report.progress, name) for report in self.reports.values())


@dataclass
class SearchSummary(Summary):
    """The outcome of `search`."""

    def mean_cosine(self) -> list[float]:
        """Of the images of this run, the mean cosine between pruned and whole image at each keep rate."""
        images = self.total("images")
        sums = zip(*(report.progress.cosine for report in self.reports.values()), strict=True)
        return [sum(column) / images for column in sums]

    def memory(self) -> tuple[int, int]:
        """Peak memory, in bytes, of the actor that ranked most shards: after its first and after its last."""
        by_process: dict[str, list[int]] = {}
        for report in self.reports.values():
            by_process.setdefault(report.process, []).append(report.memory)
        longest = max(by_process.values(), key=len)
        return longest[0], longest[-1]


def search(job: SearchJob) -> SearchSummary:
    """Rank every image of the shards that have no table yet.

    Finished shards stay finished: stopped in whatever way, the same call goes on from there.

    Raises:
        UserError: bad input; a folder of another search; a disk that is full.
        KeyboardInterrupt: Ctrl-C; every file in the folder is whole.
    """
    uris = shards.expand(job.shards)
    prototypes = shards.expand(job.classes.prototypes) if job.classes.prototypes else []
    names = job.classes.names()
    model = job.model.load()
    folder = Folder(job.out)
    classes = class_source.find(job.classes, names, model, folder, prototypes)
    compared = bank_of(job, model, folder, uris)
    with connected(job.machines, len(uris)) as places, storage.one_line_errors(folder.uri):
        tower = Tower(model.visual, job.model.cut, loading.resolve_dtype(job.model.dtype, places.gpu), name=model.name)
        # Before anything is written.
        job.config.check(tower.grid, job.keep_rates, classes.identity is not None, compared is not None)
        told = settings(job, model, tower, classes, compared)
        if job.retry_rejects and (there := folder.read()):
            told["max_pixels"] = there["settings"].get("max_pixels")  # may be another this time
        folder.prepare(told, rankings.COLUMNS)
        done = folder.finished(uris)
        again = retry.with_rejects(folder, done) if job.retry_rejects else set()
        done -= again
        partial.remove(folder, done)
        status.write_shards(folder.uri, uris)
        todo = [uri for uri in uris if uri not in done]
        summary = SearchSummary(folder.uri, len(uris), len(done))
        if not todo:
            return summary
        start = time.monotonic()
        shared = Shared(ray.put(tower), ray.put(model.preprocess()), places, job.max_pixels)
        size = min(places.actors, max(len(todo), len(prototypes)))
        at_once = 2 if places.gpu else 1  # a CPU decodes with the very cores that search
        pool = Pool(RankingActor, shared, size, places.cpus, places.gpus, (OutputError,), places.room, at_once=at_once)
        pool.patience = job.patience
        plan = plan_of(job, folder, model, places)
        known = settle(pool, classes, folder, plan.images_per_batch)
        embeddings = bank.settle(pool, compared, folder, plan.images_per_batch)
        plan = replace(plan, classes=known.embeddings if known else None, bank=embeddings, again=frozenset(again))
        work_through(pool, "rank", folder, ray.put(plan), todo, summary, job.limit, again)
        summary.seconds = time.monotonic() - start
    return summary


def bank_of(job: SearchJob, model: Model, folder: Folder, uris: Sequence[str]) -> FoundBank | None:
    """What images are compared with; None where the score needs no bank. Raises UserError."""
    return banks.find(job.bank, model, folder, uris) if SCORES[job.config.score].bank else None


def plan_of(job: SearchJob, folder: Folder, model: Model, places: Places) -> Plan:
    """What an actor must know, without class embeddings."""
    return Plan(
        folder=folder,
        config=job.config,
        keep_rates=tuple(job.keep_rates),
        classes=None,
        logit_scale=model.logit_scale,
        # As told, or many on a GPU, and on a CPU so few that progress shows.
        images_per_batch=job.images_per_batch or (64 if places.gpu else 4),
        candidates_per_batch=job.candidates_per_batch,
        limit=job.limit,
        keep_work=job.keep_work,
    )


def work_through(
    pool: Pool,
    method: str,
    folder: Folder,
    plan: ray.ObjectRef,
    todo: list[str],
    summary: Summary,
    limit: int | None = None,
    again: Collection[str] = (),
) -> None:
    """Have every shard worked on by a method of the pool's actors, which write its table, and fill in the summary.

    Args:
        method: (shared, shard, plan) -> ShardReport.
        limit: images of a shard that are worked on, if not all.
        again: shards that are finished, and stay so if they fail.

    Raises:
        UserError: tables cannot be written.
    """
    with contextlib.closing(Meter(folder.kind, summary.shards, folder.uri, summary.resumed, limit)) as meter:

        def show() -> None:
            meter.show(pool.running(), pool.actors_up)

        try:
            for uri, report in pool.run(method, todo, plan, tick=show, further=partial.Watch(folder).grown):
                if isinstance(report, Failed):
                    summary.failures[uri] = report.reason
                    if uri not in again:
                        folder.record_failure(uri, report.reason)
                    meter.fail()
                    continue
                summary.reports[uri] = report
                if report.error:
                    summary.failures[uri] = report.error
                meter.add(report.progress)
                show()
        except OutputError as error:
            raise UserError(f"{error}; finished shards are kept: mend this and run the same command again") from None
    for uri in summary.reports.keys() - summary.failures.keys() - folder.finished(todo):
        summary.failures[uri] = "was finished, but its table has since been taken out of the folder"


def settings(
    job: SearchJob, model: Model, tower: Tower, classes: FoundClasses, bank: FoundBank | None
) -> dict[str, Any]:
    """What decides the rankings, and under "about" what does not."""
    return {
        "model": model_settings(model, tower),
        "grid": list(tower.grid),
        "search": asdict(job.config),
        "keep_rates": list(job.keep_rates),
        "classes": classes.identity,
        **({} if bank is None else {"bank": bank.identity}),  # folders of other scores have none
        "limit": job.limit,
        "max_pixels": job.max_pixels,
        "about": about(model, job.model.pretrained, classes, job.shards),
    }


def about(model: Model, pretrained: str | None, classes: FoundClasses, specs: Sequence[str]) -> dict[str, Any]:
    """What decides no table, for readers of a folder; `specs` name the shards."""
    return {
        "model": model.name,
        "pretrained": pretrained,
        "shards": list(specs),
        "class_names": classes.names,
        "patchrank": __version__,
    }


def model_settings(model: Model, tower: Tower) -> dict[str, Any]:
    """What of the model decides a job's tables."""
    return {
        "weights": model.weights,
        "cut": tower.cut,
        "dtype": loading.dtype_name(tower.dtype),
        "preprocess": dict(model.visual.preprocess_cfg),
        "logit_scale": round(model.logit_scale, 4),
    }
