"""Pruned models in the wrappers that train on several processes, by PyTorch itself: here there is one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import patchrank
from patchrank.errors import UserError

IMAGES = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    dist.destroy_process_group()


class Images(nn.Module):
    """The part of a model that is trained."""

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.visual.requires_grad_(True)

    def forward(self, images):
        return self.model.encode_image(images)


def test_data_parallel_pruned_before_and_after(group, small_clip):
    wanted = patchrank.prune(small_clip(), "class-attention", keep=0.5).encode_image(IMAGES)
    before = DistributedDataParallel(Images(patchrank.prune(small_clip(), "class-attention", keep=0.5)))
    after = DistributedDataParallel(Images(small_clip()))
    patchrank.prune(after, "class-attention", keep=0.5)
    for wrapped in (before, after):
        for _ in range(2):  # the second would say that some parameters took no part in the first
            found = wrapped(IMAGES)
            torch.testing.assert_close(found, wanted)
            found.sum().backward()


def test_sharded_as_a_whole_but_not_block_by_block(group, small_clip):
    model = small_clip()
    fully_shard(model.visual)
    with pytest.raises(UserError, match=r"this model is sharded \(FSDP\): prune it before it is wrapped"):
        patchrank.prune(model, "class-attention", keep=0.5)
    model = patchrank.prune(small_clip(), "class-attention", keep=0.5)
    wanted = model.encode_image(IMAGES)
    fully_shard(model.visual.original.transformer.resblocks[2].mlp)
    fully_shard(model.visual)
    torch.testing.assert_close(model.encode_image(IMAGES), wanted)
    model = patchrank.prune(small_clip(), "class-attention", keep=0.5)
    fully_shard(model.visual.original.transformer.resblocks[2])
    with pytest.raises(UserError, match=r"this pruned model: its block 2 is a torch\.distributed\.fsdp"):
        model.encode_image(IMAGES)
