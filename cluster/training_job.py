"""How to train, and on which machines, as users say it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.places import Machines
from patchrank.errors import UserError
from patchrank.flags import at_least, flag, group


@dataclass(frozen=True)
class Workers(Machines):
    """The machines of a training, whose actors train together."""

    actors: int | None = flag(
        None,
        "processes that train together (as before; at first one a GPU, else one a machine)",
        name="workers",
    )
    cpus_per_actor: int | None = flag(None, "cores of a worker", name="cpus-per-worker")
    gpus_per_actor: float | None = flag(None, "1, or 0 for none (1 if the cluster has any)", name="gpus-per-worker")

    def __post_init__(self) -> None:
        if self.gpus_per_actor not in (None, 0, 1):  # DeepSpeed puts a process on one GPU of its own
            raise UserError(f"--gpus-per-worker {self.gpus_per_actor:g}: must be 0 or 1")
        super().__post_init__()


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, whatever it is; flags that all training jobs share. Raises UserError for what makes no sense."""

    out: str = flag(help="local, s3:// or gs:// (%(default)s)", group="training", metavar="FOLDER")
    epochs: float = flag(10.0, "times that the images are gone over (%(default)g)")
    batch: int = flag(64, "images that a worker takes in at a time (%(default)s)")
    accumulate: int = flag(1, "batches a worker and step (%(default)s)")
    learning_rate: float = flag(1e-3, "the highest (%(default)g)")
    seed: int = flag(0, "(%(default)s)")
    deepspeed: str | None = flag(None, "DeepSpeed's configuration (patchrank/training/deepspeed.json)", metavar="FILE")
    checkpoints: int = flag(5, "in the course of it (%(default)s)")
    max_failures: int = flag(3, "times to replace lost workers (%(default)s)")
    machines: Workers = group("machines", Workers)
    curve: bool = True  # whether each checkpoint has the figures of that moment, and not the last alone

    def __post_init__(self) -> None:
        at_least(self, 1, "batch", "accumulate", "checkpoints")
        at_least(self, 0, "max_failures")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
