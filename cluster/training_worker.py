"""What every worker of a training runs: the loop around DeepSpeed's engine."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.places import Places
from cluster.training_job import TrainingConfig
from patchrank.errors import UserError
from patchrank.store import storage
from patchrank.store.folder import Folder
from patchrank.training import outcome
from patchrank.training.outcome import Figures


class Task(Protocol):
    """What is trained, on what, and how it is judged. It travels to the workers by pickle, before `start` is called."""

    name: str  # for the progress bar

    def settings(self) -> dict[str, Any]:
        """JSON values that decide the result."""

    def steps_per_epoch(self, global_batch: int) -> int:
        """Steps in which as many samples are seen as there are; asked in the driver."""

    def start(self, device: torch.device, steps: int) -> nn.Module:
        """What is to be trained, in so many steps. What is frozen goes to the device and stays out of the module."""

    def parameters(self, module: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
        """The module's parameters in groups, each with its learning rate as a share of the training's."""

    def phases(self) -> list[tuple[int, int]]:
        """The kinds of steps, once it has started: the first step and the number of steps of each."""

    def batches(self, rank: int, world: int, size: int, accumulation: int, start: int) -> Iterator[Any]:
        """The batches of one rank from step `start` on, without end; `accumulation` of them a step, always the same."""

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def evaluate(self, module: nn.Module, rank: int, world: int, add: Callable[[Tensor], Tensor]) -> Figures:
        """The figures over all held-out samples, of which a rank takes its part; `add` sums a tensor over the ranks."""

    def evaluated(self) -> int:
        """How many samples `evaluate` goes over, at most."""

    def report(self) -> Any:
        """What this rank has to say of its data at the end."""

    def save(self, module: nn.Module, folder: str, before: Figures, after: Figures, reports: Sequence[Any]) -> None:
        """Write what users load. One rank is asked to, and gets the reports of all."""


@dataclass(frozen=True)
class Plan:
    """What a worker must know; `task` and `board` are references."""

    task: Any
    board: Any
    folder: Folder
    steps: int
    config: TrainingConfig
    places: Places
    deepspeed: dict[str, Any]


@dataclass
class Done:
    """How far a training is; kept in every checkpoint."""

    step: int = 0
    before: Figures | None = None
    after: Figures | None = None


def work(config: dict[str, Plan]) -> None:
    """The function that Ray Train calls on every worker."""
    plan = config["plan"]
    if ray.get(plan.board.read.remote()).failure:  # Ray Train has replaced the workers that failed: so would these
        return
    try:
        with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
            Worker(plan, Path(scratch)).run()
    except UserError as error:
        ray.get(plan.board.fail.remote(str(error)))
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a disk that is full stays so
            ray.get(plan.board.fail.remote(f"{plan.folder.uri}: {storage.one_line(error)}; make room and train again"))
        raise


class Worker:
    """One rank of a training; `scratch` is an empty folder on this machine.

    Raises:
        UserError: the folder is not that of the training, or a DeepSpeed configuration that DeepSpeed does not take.
    """

    def __init__(self, plan: Plan, scratch: Path) -> None:
        import ray.train.torch

        if not plan.folder.holds():
            raise UserError(
                f"{plan.folder.uri}: as seen from {socket.gethostname()} not the folder of this training; with several "
                "nodes it must be in a bucket or on a shared disk"
            )
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.plan, self.scratch = plan, scratch
        self.task: Task = ray.get(plan.task)
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(plan.places.cpus)
        torch.manual_seed(plan.config.seed)
        self.module = self.task.start(self.device, plan.steps)
        self.engine = _engine(self.task, self.module, plan)

    def run(self) -> None:
        """Train from the last checkpoint, if there is one, to the end, and save.

        Raises:
            UserError: a loss that is not finite, or data that cannot be used.
        """
        plan, done = self.plan, self._restored()
        if self.rank == 0:
            ray.get(plan.board.begin.remote(done.step))
        with contextlib.closing(Log(plan.folder.uri, self.scratch, done.step, self.rank == 0)) as log:
            if done.before is None:
                done.before = done.after = self._evaluate()
                log.write(0, done.before)
            every = math.ceil(plan.steps / plan.config.checkpoints)
            batches = self.task.batches(self.rank, self.world, plan.config.batch, plan.config.accumulate, done.step)
            while done.step < plan.steps:
                learning_rate = self.engine.get_lr()[0]
                loss = self._step(itertools.islice(batches, plan.config.accumulate), done.step + 1, learning_rate)
                done.step += 1
                log.write(done.step, {"loss": loss, "learning rate": learning_rate})
                if self.rank == 0:
                    plan.board.post.remote(done.step, loss, learning_rate)
                last = done.step == plan.steps
                if last or done.step % every == 0:
                    if last or plan.config.curve:
                        done.after = self._evaluate()
                        log.write(done.step, done.after)
                    log.flush()
                    self._checkpoint(done)
        reports: list[Any] = [None] * self.world
        dist.all_gather_object(reports, self.task.report())
        if self.rank == 0:
            before, after = done.before or {}, done.after or {}
            self.task.save(self.module, plan.folder.uri, before, after, reports)
            outcome.write(plan.folder.uri, before, after)

    def _step(self, batches: Iterator[Any], step: int, learning_rate: float) -> float:
        """One optimizer step; its loss, the mean over all ranks and batches."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.engine(batch)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss of step {step} is {loss.item()}, at learning rate {learning_rate:.3g}; "
                    "train with a lower --learning-rate, into another --out"
                )
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach().float()
        dist.all_reduce(total)
        return total.item() / (self.world * self.plan.config.accumulate)

    def _evaluate(self) -> Figures:
        """The figures of the module as it is now, over all ranks."""
        self.module.eval()
        with torch.no_grad():
            figures = self.task.evaluate(self.module, self.rank, self.world, self._sum)
        self.module.train()
        return figures

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        result = tensor.to(self.device, copy=True)
        dist.all_reduce(result)
        return result.to(tensor.device)

    def _checkpoint(self, done: Done) -> None:
        """Report a checkpoint to Ray Train; every rank adds its part of the optimizer's state."""
        from ray.train import Checkpoint, report

        folder = self.scratch / "checkpoint"
        self.engine.save_checkpoint(str(folder), tag="state", client_state={"done": vars(done)})
        report(dict(done.after or {}), Checkpoint.from_directory(folder), checkpoint_dir_name=f"step-{done.step:08d}")
        shutil.rmtree(folder)

    def _restored(self) -> Done:
        """How far the last checkpoint is, once it is loaded."""
        from ray.train import get_checkpoint

        checkpoint = get_checkpoint()
        if checkpoint is None:
            return Done()
        with checkpoint.as_directory() as folder:
            _, state = self.engine.load_checkpoint(folder, tag="state")
        return Done(**state["done"])


class _Loss(nn.Module):
    """The module, called as DeepSpeed calls it: its output is the loss. The task's frozen parts are none of it."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._loss = task.loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.module, batch)


class Log:
    """TensorBoard's file below a training's folder; for a remote one it is written here and copied there."""

    def __init__(self, folder: str, scratch: Path, step: int, active: bool) -> None:
        self._remote = None if storage.is_local(folder) else folder
        self._local = scratch / "tensorboard" if self._remote else Path(folder) / "tensorboard"
        self._writer: Any = None
        if active:
            from torch.utils.tensorboard import SummaryWriter

            # What a run wrote after its last checkpoint is void: the run that goes on writes it again.
            self._writer = SummaryWriter(str(self._local), purge_step=step + 1)

    def write(self, step: int, figures: Figures) -> None:
        """Add figures at a step."""
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring to the folder what was written."""
        if self._writer is not None:
            self._writer.flush()
            if self._remote:
                for file in self._local.iterdir():
                    storage.write_atomic(storage.join(self._remote, "tensorboard", file.name), file.read_bytes())

    def close(self) -> None:
        """Flush, and write no more."""
        if self._writer is not None:
            self._writer.close()
            self.flush()


def _engine(task: Task, module: nn.Module, plan: Plan) -> Any:
    """DeepSpeed's engine around the module, in the process group that Ray Train has made."""
    if not plan.places.gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # An all-reduce for inference, which DeepSpeed would compile at every first start on a CPU, for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    rate = plan.deepspeed["optimizer"].get("params", {}).get("lr", plan.config.learning_rate)
    groups = [{"params": parameters, "lr": share * rate} for parameters, share in task.parameters(module)]
    try:
        engine, *_ = deepspeed.initialize(model=_Loss(task, module), model_parameters=groups, config=plan.deepspeed)
    except (AssertionError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"--deepspeed: DeepSpeed does not take this configuration: {storage.one_line(error)}") from None
    return engine
