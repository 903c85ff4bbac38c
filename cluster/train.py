"""Training on Ray: one loop for every task, DeepSpeed inside Ray Train's TorchTrainer.

A task says what is trained, on what and how it is judged (`cluster.training_worker.Task`); `train` does the rest. It
leaves in the folder, beside what the task saves:

    OUT/training.json    the settings of the training and their fingerprint
    OUT/checkpoints/     Ray Train's; an interrupted run goes on from the last one
    OUT/tensorboard/     the loss, the learning rate and the figures, by step
    OUT/figures.json     the figures before and after; written last: a folder that has it is finished
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.places import Places, connected
from cluster.training_job import TrainingConfig
from cluster.training_worker import Plan, Task, work
from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.folder import Folder
from patchrank.training import configuration, outcome
from patchrank.training.outcome import Figures
from patchrank.training.progress import Board, StepMeter

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrainingSummary:
    """The outcome of `train`.

    Attributes:
        folder: where everything is.
        steps: of the whole training.
        resumed: the step from which this run went on; `steps` where nothing was left to do.
        seconds: of this run.
        before, after: the figures of the untrained and of the trained module.
    """

    folder: str
    steps: int
    resumed: int
    seconds: float
    before: Figures
    after: Figures


def train(task: Task, config: TrainingConfig) -> TrainingSummary:
    """Train, or go on with a training that was interrupted in whatever way.

    Raises:
        UserError: bad input; a folder of another training; a loss that is not finite.
        KeyboardInterrupt: Ctrl-C; the last checkpoint is kept.
    """
    folder = Folder(config.out, "training")
    deepspeed = configuration.read(config.deepspeed)
    task.steps_per_epoch(1)  # refuses what cannot be trained on, before Ray is started
    with folder.usable():
        found = folder.read()
    # A training that goes on has as many workers as before, whatever machines are up by now.
    workers = config.machines.actors or (found["settings"]["workers"] if found else None)
    machines = replace(config.machines, actors=workers)
    with connected(machines, together=True) as places:
        steps = steps_of(task, config, places)
        settings = {
            "task": task.settings(),
            "steps": steps,
            "batch": config.batch,
            "accumulate": config.accumulate,
            "workers": places.actors,  # the optimizer's state is kept in as many parts
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "deepspeed": deepspeed,
        }
        automatic = {
            "train_micro_batch_size_per_gpu": config.batch,
            "gradient_accumulation_steps": config.accumulate,
            "lr": config.learning_rate,
            "enabled": places.gpu,  # of bf16
            "total_num_steps": steps,
            "warmup_num_steps": max(2, steps // 10),
        }
        filled = configuration.fill(deepspeed, automatic)
        folder.prepare(settings)
        resumed, start = steps, time.monotonic()
        if outcome.read(folder.uri) is None:
            # Beside the driver: no other machine that is lost can take it away.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
            plan = Plan(
                task=ray.put(task),
                board=board,
                folder=folder,
                steps=steps,
                config=config,
                places=places,
                deepspeed=filled,
            )
            resumed = _fit(plan, task.name)
        before, after = outcome.read(folder.uri) or ({}, {})
        return TrainingSummary(folder.uri, steps, resumed, time.monotonic() - start, before, after)


def steps_of(task: Task, config: TrainingConfig, places: Places) -> int:
    """The steps of a whole training, with as many workers as there are places."""
    return max(1, round(config.epochs * task.steps_per_epoch(config.batch * config.accumulate * places.actors)))


def _fit(plan: Plan, title: str) -> int:
    """Run the workers to their end, show meanwhile how far they are, and return the step at which they began."""
    from ray.train import TrainingFailedError

    trainer = _trainer(plan)
    ended = threading.Event()

    def show() -> None:
        with contextlib.closing(StepMeter(title, plan.steps)) as meter:
            while not ended.wait(POLL_SECONDS):
                meter.show(ray.get(plan.board.read.remote()))

    # No thread may be at work in Ray when we leave it: so this one is joined, and Ray Train runs in the main one.
    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    on_interrupt, failed = signal.getsignal(signal.SIGINT), None
    try:
        trainer.fit()
    except SystemExit:  # Ray Train takes Ctrl-C for itself, ends the workers, and would end with status 0
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        failed = error
    finally:
        ended.set()
        shower.join()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
    state = ray.get(plan.board.read.remote())
    if state.failure:
        raise UserError(state.failure)
    if failed:
        raise _reason(failed, plan.folder.uri) from None
    return state.began or 0


def _trainer(plan: Plan) -> Any:
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # workers stay where they are, and relative paths keep their meaning
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    system, path = storage.resolve(plan.folder.uri)
    places = plan.places
    return TorchTrainer(
        work,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=places.actors,
            use_gpu=places.gpu,
            resources_per_worker={"CPU": places.cpus, **({"GPU": places.gpus} if places.gpu else {})},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=plan.config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _reason(error: BaseException, folder: str) -> BaseException:
    """Why Ray Train gave up, as one line where it was not a mistake in the code."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, ControllerError):
        cause = storage.one_line(error.controller_failure)
        return UserError(f"{folder}: {cause[:300]}; if its checkpoints are damaged, delete {folder}/checkpoints")
    if isinstance(error, WorkerGroupError):
        died = [cause for cause in error.worker_failures.values() if isinstance(cause, RayActorError)]
        if died:
            cause = str(died[0]).strip().splitlines()[-1].strip()
            return UserError(f"workers died too often: {cause}; the same command goes on from the last checkpoint")
        for cause in error.worker_failures.values():
            if isinstance(cause, OSError):  # a bucket or a disk; other workers fail because this one has gone
                return UserError(
                    f"{cause.filename or folder}: a worker cannot go on ({storage.one_line(cause)}); put that right, "
                    "and the same command goes on from the last checkpoint"
                )
    return error
