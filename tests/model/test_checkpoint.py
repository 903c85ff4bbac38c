"""Weights files as trainers and compilers leave them."""

from __future__ import annotations

import json

import open_clip
import pytest
import safetensors.torch
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


WRAPPED |= {
    "DeepSpeed": lambda state: {"module": state, "optimizer": None, "global_steps": 7},
    "a name of their own": lambda state: {"weights": under("backbone.", state)},
    "an average beside it": lambda state: {"params": state, "params_ema": {key: state[key] * 0 for key in state}},
    "a teacher beside it": lambda state: {"state_dict": under("model.", state) | under("distill.teacher.", state)},
    "an average of a trainer": lambda state: {"n_averaged": torch.ones(1), **under("module.", state)},
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


REFUSED = {
    "a list": (lambda state: [1, 2], "holds a list, not weights by their names: save model.state_dict"),
    "no tensors": (lambda state: {"epoch": 3, "args": None}, "holds no weights, only epoch, args"),
    "two models": (
        lambda state: {"student": state, "teacher": state},
        r"holds several models, student\., teacher\.: ",
    ),
    "a module": (lambda state: torch.nn.Linear(2, 2), "it holds torch.nn.modules.linear.Linear, and tensors alone are"),
    "arrays": (lambda state: {key: state[key].numpy() for key in state}, "it holds numpy.* and tensors alone are read"),
    "int8": (lambda state: {key: (100 * state[key]).to(torch.int8) for key in state}, r"are quantised \(int8\)"),
    "another size": (
        lambda state: state | {"visual.positional_embedding": torch.ones(26, 32)},
        "its visual.positional_embedding is for 26 tokens, and that of tiny-checkpoint for 17: it is of a model of",
    ),
    "no number": (
        lambda state: state | {"logit_scale": torch.tensor(torch.nan)},
        "its weights logit_scale are not all",
    ),
    "JSON": (b'{"model": "ViT"}', 'a text that begins \'{"model": "ViT"}\', not the file itself'),
    "nothing": (b"", "the file is empty"),
    "GGUF": (b"GGUF" + bytes(99), "cannot be read as weights: neither a file of torch.save nor of safetensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_another_model_is_refused(whole, tmp_path, kind):
    made, words = REFUSED[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(made) if isinstance(made, bytes) else torch.save(made(dict(whole.state_dict())), path)
    with pytest.raises(UserError, match=rf"weights\.pt: .*{words}") as error:
        loading.load("tiny-checkpoint", str(path))
    assert "\n" not in str(error.value)


def test_weights_are_told_by_what_they_are(whole, tmp_path):
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "weights.pt")
    loaded = loading.load("tiny-checkpoint", str(tmp_path / "weights.pt"))
    assert torch.equal(loaded.visual.proj, whole.visual.proj) and loaded.has_text


def test_weights_that_are_not_finite_are_named(whole, tmp_path):
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    state["visual.proj"][0, 0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt: its weights visual\.proj are not all finite"):
        loading.load("tiny-checkpoint", str(tmp_path / "weights.pt"))
