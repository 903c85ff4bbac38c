"""Encoded images to RGB, as a vision model takes them."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchrank.store.storage import one_line
from patchrank.store.unfetched import stand_in

# What files named .jpg, .png and .webp hold in practice. Not all that Pillow can open: it starts Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_TILE = (322, 323)  # tags of a TIFF: width and length of its tiles
_WHITE_IS_ZERO = (262, 0)  # likewise, and how it says so
MAX_PIXELS = 89_478_485  # as Pillow has it: a quarter of a gigabyte in RGB


def limit_pixels(pixels: int) -> None:
    """Have this process refuse images of more pixels."""
    Image.MAX_IMAGE_PIXELS = pixels


def max_bytes() -> int:
    """The size of file that no image within the limit needs: 8 bytes a pixel, as 16-bit RGBA, and room for metadata."""
    return 8 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS) + (16 << 20)


def decode(data: bytes) -> Image.Image:
    """Decode an image file to mode RGB, 8 bits a channel. Can be called from several threads.

    16-bit values keep their high byte; 32-bit ones are taken for 8 or 16 bits, whichever they fit. As in open_clip's
    transforms, transparency is dropped and the orientation in EXIF is not applied. Of an animation, the first frame.

    Raises:
        ValueError: not an image, damaged, or of more pixels than the limit (`limit_pixels`); the message is one line.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            tags = getattr(image, "tag_v2", {})  # a TIFF's tiles, which may be larger than the image, are decoded whole
            sides = [side for side in map(tags.get, _TILE) if isinstance(side, int)]
            pixels, limit = max(image.width * image.height, math.prod(sides)), Image.MAX_IMAGE_PIXELS
            # Pillow itself only warns up to twice this limit. Turning warnings into errors would not be thread-safe.
            if limit is not None and pixels > limit:
                raise ValueError(f"{pixels} pixels exceed the limit of {limit} (--max-pixels)")
            image.load()
            return _rgb(image)
    except UnidentifiedImageError:
        raise ValueError(stand_in(data[:512], binary=True) or f"not an image ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # which do not know of the flag
        raise ValueError(f"cannot be decoded: {one_line(error).partition(',')[0]} (--max-pixels)") from None
    except MemoryError:  # the machine's trouble, not the image's
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise ValueError(f"cannot be decoded: {one_line(error)}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # "I;16", "I;16B"; "I" is 32-bit
        pixels = np.asarray(image)  # (H, W), uint16 or int32
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"integer pixels have no known range ({pixels.min()} to {pixels.max()})")
        tag, value = _WHITE_IS_ZERO
        if getattr(image, "tag_v2", {}).get(tag) == value:  # which Pillow minds in fewer bits alone
            pixels = 0xFFFF - pixels
        eight_bits = image.mode == "I" and pixels.max() <= 0xFF  # 32 bits wide, and no 16-bit image, which is "I;16"
        image = Image.fromarray((pixels if eight_bits else pixels >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns where a palette with transparency becomes RGB directly
    return image.convert("RGB")
