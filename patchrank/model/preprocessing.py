"""Images as a model takes them: open_clip's own transform, in bounded memory whatever the shape of an image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

THIN = 16  # times the pixels that the model sees, from which on an image is not resized as a whole


class Preprocess:
    """PIL image -> (3, H, W) float32; what open_clip does at inference.

    open_clip resizes an image so that its shorter side is that of the model, and cuts out the middle. Of a thin image,
    one pixel high and thousands wide, that makes gigabytes of which next to nothing is kept; of such, only the middle
    is computed, by the same filter.

    Args:
        fields: of open_clip's PreprocessCfg, as a model's `visual.preprocess_cfg` has them. May raise what that raises.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.config = PreprocessCfg(**fields)
        self._transform: Any = image_transform_v2(self.config, is_train=False)

    def __call__(self, image: Image.Image) -> Tensor:
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
