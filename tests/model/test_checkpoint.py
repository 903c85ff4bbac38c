"""Weights files as trainers and compilers leave them."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch

from patchrank.errors import UserError
from patchrank.model import loading

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny-checkpoint.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    return open_clip.create_model("tiny-checkpoint")


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "torch.compile": lambda state: under("_orig_mod.", state),
    "compiled image tower": lambda state: {key.replace("visual.", "visual._orig_mod."): state[key] for key in state},
    "DDP of a compiled model": lambda state: {"epoch": 3, "state_dict": under("module._orig_mod.", state)},
    "Lightning": lambda state: {
        "pytorch-lightning_version": "2.5",
        "global_step": 7,
        "state_dict": under("model.", state) | {"loss.scale": torch.ones(1)},
        "optimizer_states": [{"state": {}}],
    },
    "a dict of others": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "args": ["--x"]},
    "twice": lambda state: {"model": {"module": under("clip.", state)}},
    "FSDP": lambda state: {
        key.replace("resblocks.1.", "resblocks.1._fsdp_wrapped_module."): state[key] for key in state
    },
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_around_the_weights_comes_off(whole, tmp_path, kind, alone):
    state = under("visual.", whole.visual.state_dict()) if alone else dict(whole.state_dict())
    torch.save(WRAPPED[kind](state), tmp_path / "weights.pt")
    loaded = loading.load("tiny-checkpoint", str(tmp_path / "weights.pt"))
    assert loaded.has_text is not alone
    theirs = loaded.visual.state_dict() if alone else loaded.clip.state_dict()
    own = whole.visual.state_dict() if alone else whole.state_dict()
    assert all(torch.equal(theirs[key], own[key]) for key in own)


def test_weights_of_something_else_are_still_refused(whole, tmp_path):
    torch.save({"model": {"layer.weight": torch.ones(2)}}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt: not the image tower of tiny-checkpoint: .*layer\.weight"):
        loading.load("tiny-checkpoint", str(tmp_path / "weights.pt"))
    torch.save([1, 2], tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt: cannot be read as weights"):
        loading.load("tiny-checkpoint", str(tmp_path / "weights.pt"))


def test_weights_that_are_not_finite_are_named(whole, tmp_path):
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    state["visual.proj"][0, 0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt: its weights visual\.proj are not all finite"):
        loading.load("tiny-checkpoint", str(tmp_path / "weights.pt"))
