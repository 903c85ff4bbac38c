"""Images as a model takes them: its library's own transform, in bounded memory whatever the shape of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

from PIL import Image
from torch import Tensor

from patchrank.errors import UserError
from patchrank.model.transformers_tower import library

PROCESSOR = "processor"  # the field with those of an image processor of transformers
THIN = 16  # times the pixels that the model sees, from which on an image is not resized as a whole


class Preprocess:
    """PIL image -> (3, H, W) float32; what open_clip does at inference, or an image processor of transformers.

    open_clip resizes an image so that its shorter side is that of the model, and cuts out the middle. Of a thin image,
    one pixel high and thousands wide, that makes gigabytes of which next to nothing is kept; of such, only the middle
    is computed, by the same filter. A processor that does so is given the middle of such an image.

    Args:
        fields: of open_clip's PreprocessCfg, as a model's `visual.preprocess_cfg` has them, or an image processor's as
            JSON under `PROCESSOR`. May raise what these raise.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)
        self._processor: Any = None
        if PROCESSOR in fields:
            self._processor = _image_processor(fields[PROCESSOR])
            return
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.config = PreprocessCfg(**fields)
        self._transform: Any = image_transform_v2(self.config, is_train=False)

    @property
    def normalised_by(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the channels, of pixels in 0 .. 1."""
        if self._processor is None:
            return self.config.mean, self.config.std
        if not self._processor.do_normalize:
            return (0.0,) * 3, (1.0,) * 3
        return self._processor.image_mean, self._processor.image_std

    def of_blank(self) -> Tensor:
        """What it makes of a black square."""
        return self(Image.new("RGB", (64, 64)))

    def __call__(self, image: Image.Image) -> Tensor:
        if self._processor is not None:
            made: Tensor = self._processor(images=_not_thin(image.convert("RGB")), return_tensors="pt")["pixel_values"]
            return made[0].float()
        return self._transform(self._middle(image) if self.config.resize_mode == "shortest" else image)

    def _middle(self, image: Image.Image) -> Image.Image:
        """The middle of a thin image, resized; any other as it is."""
        size = self.config.size
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        ratio = min(image.height / height, image.width / width)
        # Rounded as in torchvision's Resize for a square, and as in open_clip's for others.
        whole = int if height == width else round
        resized = max(width, whole(image.width / ratio)), max(height, whole(image.height / ratio))
        if resized[0] * resized[1] <= THIN * width * height:
            return image
        left, top = (round((there - kept) / 2) for there, kept in zip(resized, (width, height), strict=True))
        x, y = image.width / resized[0], image.height / resized[1]  # pixels of the image for one of the resized
        bilinear = self.config.interpolation == "bilinear" and height == width
        resize = partial(
            Image.Image.resize, resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        )
        # Rows first that matter, with those that the filter reaches; then across and down, in the order of open_clip's
        # one call, which rounds in between.
        reach = ceil(2 * max(y, 1)) + 1
        first, last = max(0, int(top * y) - reach), min(image.height, ceil((top + height) * y) + reach)
        rows = image.crop((0, first, image.width, last))
        across = resize(rows, (width, rows.height), box=(left * x, 0, min((left + width) * x, rows.width), rows.height))
        down = top * y - first, min((top + height) * y - first, rows.height)
        return resize(across, (width, height), box=(0, down[0], width, down[1]))


def _image_processor(fields: Mapping[str, Any]) -> Any:
    """The image processor of these fields. Raises UserError where transformers is not there, or knows no such one."""
    kind = str(fields.get("image_processor_type", ""))
    found = getattr(library(), kind, None) if "ImageProcessor" in kind else None
    if found is None:
        raise UserError(f"image processor {kind!r}: transformers has none of this name")
    return found.from_dict(dict(fields))


def _not_thin(image: Image.Image) -> Image.Image:
    """The middle of an image more than `THIN` times as long as wide; any other as it is."""
    width, height = (min(side, THIN * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))
