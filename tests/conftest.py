"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' models are tiny: threads only cost
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets everything else on a busy machine go first

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

STATUS = pytest.StashKey[int]()


def pytest_configure():
    """Scripts start what they put into the background with Ctrl-C ignored; what tests start must not inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items):
    """Mark what uses the fixtures that start Ray; a test that starts it by itself has the mark in its file."""
    for item in items:
        if not {"environment", "undisturbed"}.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.ray)


def pytest_sessionfinish(session, exitstatus):
    """Remember what the tests came to, for `pytest_unconfigure`."""
    session.config.stash[STATUS] = exitstatus


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave with the tests' status, and without what an interpreter does in the end.

    Threads of Ray, Arrow and the AWS SDK that this process has started are still there then, and on a busy machine one
    of them can crash the process after everything has passed.
    """
    if STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])


@pytest.fixture
def small_clip():
    """A function that builds a small open_clip model with random weights, 4 blocks, a grid of 4 x 5 tokens."""

    def build(dtype=torch.float32, seed=0, quick_gelu=False, **vision):
        torch.manual_seed(seed)
        config = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 4, "image_size": (16, 20), **vision}
        text = CLIPTextCfg(context_length=8, width=16, heads=2, layers=1)
        model = open_clip.CLIP(24, CLIPVisionCfg(**config), text, quick_gelu=quick_gelu)
        for parameter in model.visual.parameters():  # layer norms and biases start at 1 and 0: a swap would go unseen
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval().requires_grad_(False).to(dtype)

    return build
