"""The Ray actor that evaluates shards on one device, and times image towers there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from cluster.actor import Shared, TowerActor, keeper
from patchrank.data.progress import Progress, ShardReport
from patchrank.data.shard_job import ShardResult
from patchrank.evaluation import latency
from patchrank.evaluation.evaluate import EvaluationConfig, ShardEvaluator
from patchrank.evaluation.latency import Timing
from patchrank.evaluation.record import Latency
from patchrank.model.kinds import adapt
from patchrank.pruning import methods
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import UNPRUNED
from patchrank.pruning.pruned import pruned_tower
from patchrank.store import rankings
from patchrank.store.folder import Folder
from patchrank.store.partial import Partial


@dataclass(frozen=True)
class EvaluationPlan:
    """What an actor must know to evaluate a shard; `rankings` is a folder or None."""

    folder: Folder
    methods: tuple[str, ...]
    bundle: Bundle | None
    rankings: str | None
    config: EvaluationConfig
    keep_work: float


@dataclass(frozen=True)
class LatencyPlan:
    """What an actor must know to time towers."""

    methods: tuple[str, ...]
    bundle: Bundle | None
    timing: Timing


class EvaluationActor(TowerActor):
    """Holds the tower on one device and evaluates the shards it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._evaluator: ShardEvaluator | None = None  # of the one plan that an actor is given

    def _evaluation(self, shared: Shared, plan: EvaluationPlan) -> ShardEvaluator:
        tower, preprocess = self._load(shared)
        with self._loading:
            if self._evaluator is None:
                made = methods.make(plan.methods, tower.device, plan.bundle)
                corpus = None if plan.rankings is None else rankings.open(plan.rankings)
                threads = shared.places.threads
                self._evaluator = ShardEvaluator(tower, made, preprocess, plan.config, corpus, threads)
            return self._evaluator

    def evaluate(self, shared: Shared, shard: str, plan: EvaluationPlan) -> ShardReport:
        """Evaluate a shard and write its table and its rejects. Raises OutputError where they cannot be written."""

        def work(progress: Progress, part: Partial) -> ShardResult:
            return self._evaluation(shared, plan).evaluate(shard, progress, part)

        part = Partial(plan.folder, shard, plan.keep_work, write=keeper(plan.folder))
        return self._made(shard, plan.folder, work, part)

    def latency(self, shared: Shared, item: str, plan: LatencyPlan) -> tuple[list[Latency], str]:
        """Seconds a batch and speed-up of every method at every keep rate and batch size, and the device's name."""
        tower, _ = self._load(shared)
        visual = copy.deepcopy(tower.visual)
        adapt(visual).unprepare()
        towers: dict[tuple[str, float], nn.Module] = {(UNPRUNED, 1.0): visual}
        for name in plan.methods:
            for keep in plan.timing.keep_rates:
                made = pruned_tower(name, visual, tower.cut, keep, plan.bundle)
                towers[name, keep] = made.to(tower.device).eval()
        names = {f"{name} {keep}": (name, keep) for name, keep in towers}
        rows = []
        for batch in plan.timing.batch_sizes:
            images = torch.randn(batch, 3, *visual.image_size, device=tower.device, dtype=tower.dtype)
            timed = latency.measure({name: towers[names[name]] for name in names}, images, plan.timing.seconds)
            for one in timed[1:]:
                method, keep = names[one.name]
                rows.append(Latency(method, keep, batch, one.seconds, timed[0].seconds, one.speedup, one.rounds))
        return rows, latency.device_name(tower.device, torch.get_num_threads())
