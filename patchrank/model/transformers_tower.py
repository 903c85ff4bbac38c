"""transformers' vision models: what their classes are called, and the image tower that patchrank makes of one.

transformers is imported nowhere here before a model of its own is at hand.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchrank.errors import UserError

CLASS_TOKEN, MEAN, LEARNT_QUERY = "token", "avg", "map"  # how embeddings are read out, in timm's words
CLIP, SIGLIP, SIGLIP2, VIT = "CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "ViTModel"
KNOWN = "CLIP, SigLIP, SigLIP2, DINOv2 and ViT"


@dataclass(frozen=True)
class Family:
    """The names of a vision model's parts.

    Attributes:
        package: of transformers.models.
        prefix: of its classes.
        blocks: where its blocks are.
        layer: the class of these, without the prefix.
        norms: before attention and before the MLP.
        attention: of a block.
        out: the output projection of attention.
        last_norm: the norm after all blocks.
    """

    package: str
    prefix: str
    blocks: str
    layer: str
    norms: tuple[str, str]
    attention: str
    out: str
    last_norm: str

    def known(self, name: str) -> tuple[type, ...]:
        """Classes of this family by their names without the prefix, "A|B"."""
        module = importlib.import_module(f"transformers.models.{self.package}.modeling_{self.package}")
        found = (getattr(module, self.prefix + each, None) for each in name.split("|"))
        return tuple(each for each in found if each is not None)


_TWO_TOWERS = ("encoder.layers", "EncoderLayer", ("layer_norm1", "layer_norm2"), "self_attn", "out_proj")
_DINO = ("encoder.layer", "Layer", ("norm1", "norm2"), "attention", "o_proj", "layernorm")
FAMILIES = {
    CLIP: Family("clip", "CLIP", *_TWO_TOWERS, "post_layernorm"),
    SIGLIP: Family("siglip", "Siglip", *_TWO_TOWERS, "post_layernorm"),
    SIGLIP2: Family("siglip2", "Siglip2", *_TWO_TOWERS, "post_layernorm"),
    "Dinov2Model": Family("dinov2", "Dinov2", *_DINO),
    "Dinov2WithRegistersModel": Family("dinov2_with_registers", "Dinov2WithRegisters", *_DINO),
    VIT: Family(
        "vit", "ViT", "layers", "Layer", ("layernorm_before", "layernorm_after"), "attention", "o_proj", "layernorm"
    ),
}


def family_of(module: nn.Module) -> str | None:
    """The name in `FAMILIES` of a vision model's class or of one that it is derived from; None where there is none."""
    for kind in type(module).__mro__:
        family = FAMILIES.get(kind.__name__)
        if family is not None and kind.__module__ == f"transformers.models.{family.package}.modeling_{family.package}":
            return kind.__name__
    return None


class ImageTower(nn.Module):
    """The image tower of a transformers model, as patchrank takes towers: images in, embeddings out.

    It holds the model's own modules and no weights beside them.

    Args:
        vision: a vision model of one of `FAMILIES`.
        projection: what takes what it pools into the space of texts, where there is one.
        image_size: H and W of images; those of its configuration where None.

    Attributes:
        own_output: whether the forward pass gives what the vision model gives, the tokens among it, instead of the
            embeddings alone.
        preprocess_cfg: how images are prepared, as towers of open_clip have it.

    Raises:
        UserError: transformers is another version than its models are known of, or images cannot be cut into patches.
    """

    def __init__(
        self, vision: Any, projection: nn.Linear | None = None, image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projection = projection
        self.family = family_of(vision)
        self.own_output = False
        self.preprocess_cfg: dict[str, Any] = {}
        size = getattr(vision.config, "image_size", None)
        self.patch_size = _pair(vision.config.patch_size)
        if image_size is None and size is None:  # SigLIP2 with images of any shape: the grid of its positions
            side = int(vision.config.num_patches**0.5)
            size = (side * self.patch_size[0], side * self.patch_size[1])
        self.image_size = _pair(size if image_size is None else image_size)
        self.output_dim = vision.config.hidden_size if projection is None else projection.out_features

    @property
    def config(self) -> Any:
        """Of the vision model."""
        return self.vision.config

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (down, across) = self.image_size, self.patch_size
        return height // down, width // across

    @property
    def any_size(self) -> bool:
        """Whether the vision model takes images of any size, and the size is a choice."""
        return self.family not in (CLIP, SIGLIP, VIT)

    @property
    def pool(self) -> str:
        """How embeddings are read out."""
        if self.family in (SIGLIP, SIGLIP2):
            return LEARNT_QUERY if self.vision.use_head else MEAN
        return CLASS_TOKEN

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """What the vision model is given: (B, 3, H, W), or patches of SigLIP2's own processor, (B, N, 3 P P)."""
        if self.family != SIGLIP2:
            return {"pixel_values": images}
        (rows, columns), (down, across) = self.grid, self.patch_size
        if images.ndim == 4:
            x = images.unflatten(3, (columns, across)).unflatten(2, (rows, down))  # (B, 3, rows, P, columns, P)
            images = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, P P 3)
        shapes = torch.tensor([[rows, columns]], device=images.device).expand(images.shape[0], -1)  # (B, 2)
        return {"pixel_values": images, "spatial_shapes": shapes}

    def embeddings(self, images: Tensor) -> Tensor:
        """By the vision model's own forward pass: (B, 3, H, W) -> (B, E), not normalised."""
        found = self._own(images)
        if self.family == VIT:  # whose pooler, where there is one, comes after the class token
            pooled = found.last_hidden_state[:, 0]
        elif self.pool == MEAN:
            pooled = found.last_hidden_state.mean(dim=1)
        else:
            pooled = found.pooler_output
        return pooled if self.projection is None else self.projection(pooled)

    def forward(self, images: Tensor) -> Any:
        """(B, 3, H, W) -> (B, E); with `own_output` what the vision model gives."""
        return self._own(images) if self.own_output else self.embeddings(images)

    def _own(self, images: Tensor) -> Any:
        """What the vision model gives."""
        given = self.inputs(images)
        if self.family == SIGLIP2:
            given["pixel_attention_mask"] = torch.ones(given["pixel_values"].shape[:2], device=images.device).long()
        return self.vision(**given, return_dict=True)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def library() -> Any:
    """The package transformers. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"transformers cannot be imported ({error}): pip install 'transformers>=5.24'") from None
