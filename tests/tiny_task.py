"""A task for the training loop that takes no time: a straight line, learnt from points.

python tests/tiny_task.py OUT HELD    # as a job would train it; for HELD see `Line`
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from cluster.train import train
from cluster.training_job import TrainingConfig
from patchrank.errors import run

CONFIG = {"epochs": 2, "batch": 8, "learning_rate": 0.1}  # 60 steps of 8 points


@dataclass
class Line:
    """Learns y = 3 x - 1.

    `poison` is a step whose points have no y. While there is a file `held`, workers wait at the 20th step, two thirds
    of the way from the first checkpoint to the second, and leave HELD.PID.
    """

    name: str = "line"
    poison: int | None = None
    held: str | None = None

    def settings(self):
        return {"slope": 3, "poison": self.poison}

    def steps_per_epoch(self, global_batch):
        return 240 // global_batch

    def start(self, device, steps):
        self.device = device
        return nn.Linear(1, 1)

    def parameters(self, module):
        return [([module.weight], 1.0), ([module.bias], 1.0)]

    def phases(self):
        return [(0, 60)]

    def evaluated(self):
        return 101

    def batches(self, rank, world, size, accumulation, start):
        for step in range(start, 10**9):
            points = torch.randn(world * accumulation, size, 1, generator=torch.Generator().manual_seed(step))
            while step == 19 and self.held and os.path.exists(self.held):
                Path(f"{self.held}.{os.getpid()}").touch()
                time.sleep(0.02)
            for x in points[rank::world].to(self.device):  # (B, 1)
                yield x, 3 * x - 1 if step + 1 != self.poison else x * torch.nan

    def loss(self, module, batch):
        return (module(batch[0].to(module.weight.dtype)).float() - batch[1]).square().mean()

    def evaluate(self, module, rank, world, add):
        x = torch.linspace(-1, 1, 101, device=self.device)[rank::world, None]
        sums = add(torch.tensor([self.loss(module, (x, 3 * x - 1)).item() * len(x), len(x)]))
        return {"error": (sums[0] / sums[1]).item()}

    def report(self):
        return time.time()

    def save(self, module, folder, before, after, reports):
        save_file({key: value.float() for key, value in module.state_dict().items()}, Path(folder) / "line.safetensors")


if __name__ == "__main__":
    import tiny_task  # the workers know the class by this name

    run(lambda: print(train(tiny_task.Line(held=sys.argv[2]), TrainingConfig(sys.argv[1], **CONFIG))) or 0)
