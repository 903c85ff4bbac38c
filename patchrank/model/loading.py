"""Models by name: of open_clip, built-in with a tag or a file, hub, folder, or of transformers, hf:."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchrank import assets
from patchrank.errors import UserError
from patchrank.flags import flag
from patchrank.model import checkpoint, fidelity, transformers_model
from patchrank.model.kinds import adapt
from patchrank.model.preprocessing import Preprocess
from patchrank.store.storage import one_line

IMAGE_TOWER_LOGIT_SCALE = 100.0  # of a file without a text tower: the value at which CLIP's training clamps it


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        name: as given by the user.
        clip: the model of open_clip, or a `TransformersModel`, in float32 on the CPU, in eval mode; without `has_text`
            its text tower is untrained, or there is none.
        has_text: whether the text tower's weights were loaded.
        weights: digest of the image tower's weights and structure, 16 hex digits, which tells models apart.
        text_weights: the same of everything else, the text tower among it.
        logit_scale: the factor on cosines before the softmax over classes.
    """

    name: str
    clip: Any  # open_clip has no types
    has_text: bool
    weights: str
    text_weights: str
    logit_scale: float

    @property
    def visual(self) -> Any:
        """The image tower."""
        return self.clip.visual

    def preprocess(self) -> Preprocess:
        """The model's own inference transform: PIL image -> (3, H, W) float32."""
        return Preprocess(self.visual.preprocess_cfg)

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The model's tokenizer."""
        if self.name.startswith(transformers_model.PREFIX):
            return transformers_model.tokenizer(self.name, self.clip.context_length)
        import open_clip

        return open_clip.get_tokenizer(self.name)


@dataclass(frozen=True)
class ModelSource:
    """Which model, cut where, in which precision; the flags of jobs. Raises UserError for what does not go together.

    Attributes:
        name: as for `load`; the default is the caller's where None.
    """

    name: str | None = flag(
        None,
        "open_clip name, hf-hub:ORG/REPO, local-dir:FOLDER, embedded or embedded-siglip; of transformers hf:ORG/REPO "
        "or hf:FOLDER",
        name="model",
        metavar="NAME",
    )
    pretrained: str | None = flag(
        None, "open_clip tag or weights file, which may hold the image tower alone", metavar="TAG"
    )
    cut: int | None = flag(None, "tokens leave before this block, counted from 0 (a quarter of the depth)", metavar="L")
    dtype: str = flag("auto", "auto, float32, bfloat16 or float16 (%(default)s)")

    def __post_init__(self) -> None:
        if self.pretrained and self.name in (None, *assets.EMBEDDED, *assets.EMBEDDED.values()):
            raise UserError("--pretrained needs --model, an open_clip name")

    def load(self) -> Model:
        """As `load`. Raises UserError."""
        if self.name is None:
            raise UserError("--model is needed: an open_clip name, or embedded for the model in this project")
        return load(assets.EMBEDDED.get(self.name, self.name), self.pretrained)


def load(name: str, pretrained: str | None = None) -> Model:
    """Load a model whose image tower patchrank can cut.

    Args:
        name: a built-in name of open_clip ("ViT-B-16"), "hf-hub:ORG/REPO" or "local-dir:FOLDER"; or a model of
            transformers, "hf:ORG/REPO" or "hf:FOLDER".
        pretrained: for a built-in name, a tag of open_clip ("openai") or a weights file. The file may hold the whole
            model or the image tower alone, its keys with or without "visual.".

    Raises:
        UserError: unknown model or tag, a file that does not fit, or an image tower of another kind.
    """
    if name.startswith(transformers_model.PREFIX):
        if pretrained is not None:
            raise UserError(f"--pretrained {pretrained}: --model {name} holds its weights; leave it out")
        clip = transformers_model.load(name)
        return _checked(name, None, clip, clip.text is not None)
    # Not above: it takes seconds, which what needs no model should not (see `kinds`).
    import open_clip
    from open_clip.factory import parse_model_name

    import patchrank.assets.siglip_tower  # noqa: F401  # names the architecture of assets.SIGLIP

    schema, _ = parse_model_name(name)
    if schema is None:
        config = open_clip.get_model_config(name.replace("/", "-"))
        if config is None:
            raise UserError(f"--model {name}: open_clip does not know it; `open_clip.list_models()` lists the names")
        if pretrained is None:
            tags = open_clip.list_pretrained_tags_by_model(name)
            known = f" ({', '.join(tags)})" if tags else ""
            raise UserError(f"--model {name} needs --pretrained: a weights file or one of open_clip's tags{known}")
    with _quiet(), contextlib.ExitStack() as stack:
        state: dict[str, Tensor] = {}
        image_tower, file = None, pretrained
        if schema is None and os.path.isfile(str(pretrained)) and not str(pretrained).endswith((".npz", ".npy")):
            state, wrapped = checkpoint.read(str(pretrained))
            image_tower = _image_tower_weights(state)
            file = None if image_tower else stack.enter_context(checkpoint.stored(state)) if wrapped else pretrained
        try:
            clip = open_clip.create_model(
                open_clip_name(name, pretrained), pretrained=file, require_pretrained=image_tower is None
            )
        except Exception as error:  # open_clip raises what its libraries raise: network, file and shape errors alike
            raise UserError(f"--model {name} --pretrained {pretrained}: {_short(error)}") from None
    for key, value in clip.state_dict().items() if not image_tower else ():
        if key in state and key.endswith("positional_embedding") and len(state[key]) != len(value):  # it was resized
            raise UserError(
                f"--pretrained {pretrained}: its {key} is for {len(state[key])} tokens, and that of {name} for "
                f"{len(value)}: it is of a model of another size"
            )
    adapt(clip.visual, name)
    if image_tower:
        try:
            clip.visual.load_state_dict(image_tower)
        except RuntimeError as error:
            raise UserError(f"--pretrained {pretrained}: not the image tower of {name}: {_short(error)}") from None
    return _checked(name, pretrained, clip, image_tower is None)


def _checked(name: str, pretrained: str | None, clip: Any, has_text: bool) -> Model:
    """A model that was loaded. Raises UserError where its image tower cannot be cut or its weights make no sense."""
    adapter = adapt(clip.visual, name)
    asked = f"--model {name}" if pretrained is None else f"--model {name} --pretrained {pretrained}"
    for key, value in clip.state_dict().items():
        if (has_text or key.startswith("visual.")) and not value.isfinite().all():
            raise UserError(f"{asked}: its weights {key} are not all finite")
    clip.eval().requires_grad_(False)
    fidelity.check(adapter, name)
    scale = clip.logit_scale.exp().item() if has_text else IMAGE_TOWER_LOGIT_SCALE
    text = {key: value for key, value in clip.state_dict().items() if not key.startswith("visual.")}
    return Model(name, clip, has_text, tower_digest(clip.visual), digest(text), scale)


def tower_digest(visual: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Digest of an image tower's structure and of its weights rounded to a dtype, 16 hex digits.

    A tower that is kept in a lower precision has the digest of the float32 one in that precision.
    """
    weights, structure = adapt(visual).content()
    return digest({key: value.to(dtype) for key, value in weights.items()}, structure)


def open_clip_name(name: str, pretrained: str | None) -> str:
    """The name under which open_clip builds a model as its weights were trained.

    Those of OpenAI and some others were trained with QuickGELU, and "ViT-B-16" has none, whatever the tag: open_clip
    only warns. "ViT-B-16-quickgelu" has it.
    """
    import open_clip

    quick = f"{name.replace('/', '-')}-quickgelu"
    tagged = pretrained is not None and open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained)
    return quick if tagged and tagged.get("quick_gelu") and open_clip.get_model_config(quick) else name


def _image_tower_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The image tower's state dict if there is nothing else, with plain keys; None of a whole model."""
    if all(key.startswith("visual.") for key in state):
        return {key.removeprefix("visual."): value for key, value in state.items()}
    text_tower = any(key.startswith(("token_embedding.", "text.", "visual.")) for key in state)
    return None if text_tower else dict(state)


def digest(weights: Mapping[str, Tensor], structure: str = "") -> str:
    """16 hex digits that tell weights, and the structure that they are for, from others."""
    found = hashlib.sha256(structure.encode())
    for key, value in sorted(weights.items()):
        found.update(key.encode())
        found.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _short(error: Exception) -> str:
    """A message; of long lists of keys the first ones, lest those that are missing hide those that are there."""
    text = re.sub(r'(?<=state_dict: )(("[^"]*", ){3})("[^"]*"(, )?)+', r"\1...", one_line(error))
    return text if len(text) <= 400 else f"{text[:400]}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs its own view of what was loaded ("No pretrained weights loaded"), wrong when we load them."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def resolve_dtype(name: str, gpu: bool) -> torch.dtype:
    """The dtype of a flag; "auto" is bfloat16 on a GPU and on a CPU with bfloat16 instructions, else float32.

    Raises:
        UserError: another name than auto, float32, bfloat16 or float16.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if gpu or _cpu_has_bfloat16() else torch.float32
    if name not in dtypes:
        raise UserError(f"--dtype {name}: must be auto, {', '.join(dtypes)}")
    return dtypes[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `resolve_dtype` takes, as files have it."""
    return str(dtype).removeprefix("torch.")


def _cpu_has_bfloat16() -> bool:
    # Older versions of PyTorch cannot tell, and leave it at float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
