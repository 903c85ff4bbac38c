"""Models of transformers by name, hf:FOLDER or hf:ORG/REPO, as the rest of patchrank takes a model of open_clip."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.model.preprocessing import PROCESSOR, Preprocess
from patchrank.model.transformers_tower import KNOWN, SIGLIP2, ImageTower, family_of, library
from patchrank.store.storage import one_line

PREFIX = "hf:"
_LOADED_BY_NAME = ("CLIPVisionModelWithProjection",)  # which AutoModel would load without its projection
_UNREAD = "pooler."  # which most ViTs are stored without, and no embedding needs


class TransformersModel(nn.Module):
    """A model of transformers as those of open_clip are asked: an image tower, and a text tower where there is one.

    Attributes:
        visual: an `ImageTower`.
        text: the text tower; None where there is none.
        use: how Python has it of transformers: `loader`, as of `loader_of`, and `call`, what images are given to.
    """

    def __init__(self, model: Any, visual: ImageTower, loader: str) -> None:
        super().__init__()
        call = "model.get_image_features" if hasattr(model, "get_image_features") else "model"
        self.use = {"loader": loader, "call": call}
        self.visual = visual
        self.text: Any = getattr(model, "text_model", None)
        self.text_projection: Any = getattr(model, "text_projection", None)
        self.logit_scale = getattr(model, "logit_scale", None)

    @property
    def context_length(self) -> int:
        """The tokens of a text."""
        length: int = self.text.config.max_position_embeddings
        return length

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings: (B, 3, H, W) -> (B, E)."""
        found: Tensor = self.visual(image)
        return F.normalize(found, dim=-1) if normalize else found

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings of what a `tokenizer` made: (B, L) int64 -> (B, E)."""
        found = self.text(input_ids=text).pooler_output
        found = found if self.text_projection is None else self.text_projection(found)
        return F.normalize(found, dim=-1) if normalize else found


def path_of(name: str) -> str:
    """What transformers calls a model: the folder or ORG/REPO."""
    return os.path.expanduser(name.removeprefix(PREFIX))


def loader_of(name: str) -> str:
    """The class of transformers that loads all that encodes the images of a model with the prefix hf:."""
    stored = library().AutoConfig.from_pretrained(path_of(name)).architectures or ()
    return next((each for each in stored if each in _LOADED_BY_NAME), "AutoModel")


def load(name: str) -> TransformersModel:
    """The model of a name with the prefix hf:, float32 on the CPU, in eval mode, without gradients.

    Raises:
        UserError: transformers is not there, or no such model, one without an image tower that is known, or whose
            weights or image processor are missing or of another image size.
    """
    transformers = library()
    path = path_of(name)
    try:
        with _quiet(transformers):
            loader = loader_of(name)
            # Pickled weights could run anything.
            model, found = getattr(transformers, loader).from_pretrained(
                path, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
            processor = transformers.AutoImageProcessor.from_pretrained(path)
    except Exception as error:  # transformers raises what its libraries raise: network, file and shape errors alike
        raise UserError(f"--model {name}: {one_line(error)[:200]}") from None
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(_UNREAD))
    if missing:
        raise UserError(f"--model {name}: its weights lack {missing[0]} and {len(missing) - 1} others")
    vision = next((each for each in model.modules() if family_of(each) is not None), None)
    if vision is None:
        raise UserError(f"--model {name}: a {type(model).__name__} has no image tower of transformers' {KNOWN}")
    visual = ImageTower(vision, getattr(model, "visual_projection", None), _image_size(vision, processor))
    visual.preprocess_cfg = {PROCESSOR: _fields(processor, visual)}
    loaded = TransformersModel(model.eval().requires_grad_(False), visual, loader)
    made = tuple(Preprocess(visual.preprocess_cfg).of_blank().shape[1:])
    if made != visual.image_size:
        ours, theirs = (f"{height} x {width}" for height, width in (visual.image_size, made))
        raise UserError(f"--model {name}: its processor makes images of {theirs}, and its image tower takes {ours}")
    return loaded


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Its own view of what was loaded is told as an error, where it matters; bars are for terminals."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def tokenizer(name: str, length: int) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a name with the prefix hf:, texts -> (B, length) int64. Raises UserError where there is none."""
    try:
        found = library().AutoTokenizer.from_pretrained(path_of(name))
    except Exception as error:  # as in `load`
        raise UserError(f"--model {name}: no tokenizer: {one_line(error)[:200]}") from None

    def tokenize(texts: list[str]) -> Tensor:
        made = found(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = made["input_ids"]
        return ids

    return tokenize


def _image_size(vision: Any, processor: Any) -> tuple[int, int] | None:
    """H and W of what the processor makes, where the vision model takes images of any size; None where it does not."""
    tower = ImageTower(vision)
    if not tower.any_size or tower.family == SIGLIP2:
        return None
    size = (getattr(processor, "do_center_crop", False) and processor.crop_size) or processor.size
    if "height" not in size:
        return None
    return size["height"], size["width"]


def _fields(processor: Any, visual: ImageTower) -> dict[str, Any]:
    """What JSON keeps of an image processor."""
    fields: dict[str, Any] = json.loads(processor.to_json_string())
    if visual.family == SIGLIP2:  # whose own makes patches of images of any shape; here all have one grid
        height, width = visual.image_size
        for key in ("max_num_patches", "patch_size"):
            fields.pop(key, None)
        fields |= {"image_processor_type": "SiglipImageProcessor", "size": {"height": height, "width": width}}
    return fields
