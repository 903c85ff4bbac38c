"""What a training will cost, told before anything is written."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from cluster.places import Places, connected
from cluster.train import steps_of
from cluster.training_job import TrainingConfig
from cluster.training_worker import Task
from patchrank import clock
from patchrank.errors import UserError

SECONDS = 10.0  # of timing each kind of step
EVALUATED = 16  # images of timing an evaluation


@dataclass(frozen=True)
class TrainingEstimate:
    """The cost of a training.

    Attributes:
        steps: of the whole training.
        images: of a step, those of all workers.
        step_seconds: mean of all steps, from the median of each kind that was timed.
        evaluation_seconds: of one evaluation, of which there are `evaluations`.
        seconds: in all.
        device_hours: of all workers together.
        places: the workers.
        memory, gpu_memory: peak of a worker, in bytes.
    """

    steps: int
    images: int
    step_seconds: float
    evaluations: int
    evaluation_seconds: float
    seconds: float
    device_hours: float
    places: Places
    memory: int
    gpu_memory: int


def estimate(task: Task, config: TrainingConfig) -> TrainingEstimate:
    """Time a training's steps and its evaluation on one worker as it will run them; nothing is written.

    What workers spend on telling each other gradients is left out: a predictor has less than a million weights.

    Raises:
        UserError: as `train`.
    """
    task.steps_per_epoch(1)  # refuses what cannot be trained on, before Ray is started
    with connected(config.machines, together=True) as places:
        steps = steps_of(task, config, places)
        timed = ray.remote(num_cpus=places.cpus, num_gpus=places.gpus)(_timed)
        try:
            found = ray.get(timed.remote(task, config, places, steps))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        training, evaluation, memory, gpu_memory = found
        evaluations = 1 + (config.checkpoints if config.curve else 1)
        seconds = training + evaluations * evaluation
        return TrainingEstimate(
            steps=steps,
            images=config.batch * config.accumulate * places.actors,
            step_seconds=training / steps,
            evaluations=evaluations,
            evaluation_seconds=evaluation,
            seconds=seconds,
            device_hours=places.actors * seconds / 3600,
            places=places,
            memory=memory,
            gpu_memory=gpu_memory,
        )


def _timed(task: Task, config: TrainingConfig, places: Places, steps: int) -> tuple[float, float, int, int]:
    """Seconds of all steps and of one evaluation, and bytes of memory and of GPU memory, of a worker."""
    torch.set_num_threads(places.cpus)
    device = torch.device("cuda" if places.gpu else "cpu")
    module = task.start(device, steps).to(device)
    training = 0.0
    for first, count in task.phases():
        batches = task.batches(0, places.actors, config.batch, config.accumulate, first)

        def step(batches: Iterator[Any] = batches) -> None:
            for batch in itertools.islice(batches, config.accumulate):
                task.loss(module, batch).backward()

        taken = [clock.seconds(step, device)]  # the first one warms up
        while len(taken) < 2 or sum(taken) < SECONDS:
            taken.append(clock.seconds(step, device))
        training += count * statistics.median(taken[1:])
    module.eval()
    share = max(1, task.evaluated() // EVALUATED)

    def evaluate() -> None:
        with torch.no_grad():
            task.evaluate(module, 0, share, lambda tensor: tensor)

    evaluation = clock.seconds(evaluate, device) * share / places.actors
    return training, evaluation, *places.peak_bytes()
