"""Decoding images: every kind that shards hold, and what is no image."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny_shards import tar

from patchrank.data import images


def encode(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png(pixels: np.ndarray, color_type: int, bits: int = 16, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of (H, W, C) pixels, for what Pillow does not write; `size`: what the header says instead."""
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)
    width, height = size or (pixels.shape[1], pixels.shape[0])
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PIXELS = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, 4), dtype=np.uint16)
GRAY, GRAY_ALPHA, RGB, RGBA = PIXELS[..., :1], PIXELS[..., :2], PIXELS[..., :3], PIXELS


def three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray.reshape(5, 7, 1), 3, axis=2)


DEEP = {
    "png gray": (png(GRAY, 0), three(GRAY >> 8)),
    "png gray alpha": (png(GRAY_ALPHA, 4), three(GRAY >> 8)),
    "png rgb": (png(RGB, 2), RGB >> 8),
    "png rgba": (png(RGBA, 6), RGB >> 8),
    "tiff I;16": (encode(Image.fromarray(GRAY[..., 0]), "TIFF"), three(GRAY >> 8)),
    "tiff I;16B": (
        encode(Image.frombytes("I;16B", (7, 5), GRAY.astype(">u2").tobytes()), "TIFF"),
        three(GRAY >> 8),
    ),
    "tiff I": (encode(Image.fromarray(GRAY[..., 0].astype(np.int32)), "TIFF"), three(GRAY >> 8)),
}


@pytest.mark.parametrize("name", DEEP)
def test_sixteen_bits_become_eight(name):
    data, expected = DEEP[name]
    image = images.decode(data)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_thirty_two_bits_are_what_they_fit():
    eight, sixteen = np.arange(35, dtype=np.int32).reshape(5, 7) * 7, GRAY[..., 0].astype(np.int32)
    for pixels, expected in ((eight, eight), (sixteen, sixteen >> 8), (np.full((5, 7), 256, np.int32), 1)):
        found = np.asarray(images.decode(encode(Image.fromarray(pixels), "TIFF")))
        assert np.array_equal(found, np.broadcast_to(np.asarray(expected)[..., None], (5, 7, 3)))
    dark = np.full((5, 7), 200, np.uint16)  # 16 bits wide, whatever they hold
    assert not np.asarray(images.decode(encode(Image.fromarray(dark), "TIFF"))).any()


def test_cmyk_jpeg():
    """Cyan, and a dark orange: inverted or ignored inks would be far off."""
    for cmyk, rgb in (((255, 0, 0, 0), (0, 255, 255)), ((0, 128, 255, 128), (127, 63, 0))):
        image = images.decode(encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100))
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[8, 8], rgb, atol=4)


@pytest.mark.filterwarnings("error")
def test_modes_of_eight_bits_and_less():
    rgb = (RGB >> 8).astype(np.uint8)
    photo = Image.fromarray(rgb)
    gray = Image.fromarray(rgb[..., 0])
    with_alpha = photo.copy()
    with_alpha.putalpha(77)
    palette = photo.quantize(256)
    two = gray.point(lambda value: 255 * (value > 99)).convert("1")
    lossless = {
        "png": (encode(photo, "PNG"), rgb),
        "webp": (encode(photo, "WEBP", lossless=True), rgb),
        "bmp": (encode(photo, "BMP"), rgb),
        "gray": (encode(gray, "PNG"), three(rgb[..., 0])),
        "gray alpha": (encode(gray.convert("LA"), "PNG"), three(rgb[..., 0])),
        "alpha": (encode(with_alpha, "PNG"), rgb),
        "palette": (encode(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "transparent palette": (encode(palette, "PNG", transparency=bytes(256)), np.asarray(palette.convert("RGB"))),
        "gif": (encode(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        "one bit": (encode(two, "PNG"), three(np.asarray(two) * 255)),
    }
    for name, (data, expected) in lossless.items():
        image = images.decode(data)
        assert image.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)


def test_truncated_images_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(noise, form)
        images.decode(data)
        # The last bytes of a PNG are checksums and its end chunk: without them the pixels are still all there.
        for cut in [*range(0, len(data) - 25, len(data) // 40), len(data) - 25]:
            with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
                images.decode(data[:cut])


HUGE = {"over the limit": (10_000, 10_000), "over twice the limit": (20_000, 10_000)}


@pytest.mark.parametrize("size", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bombs_are_refused(size, action, recwarn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [(action, None, Warning, None, 0)])
        with pytest.raises(
            ValueError, match=rf"({size[0] * size[1]} pixels|{size[0] * size[1]}).* limit .*\(--max-pixels\)$"
        ):
            images.decode(png(RGB, 2, 8, size))


def test_what_is_not_an_image():
    for data in (b"", b"a text named .jpg\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", tar()):
        with pytest.raises(ValueError, match=r"^(not an image|a text that begins '(a text named|%!PS-Adobe))"):
            images.decode(data)
    unknown_range = (np.full((2, 2), 70_000, np.int32), np.full((2, 2), -1, np.int32), np.zeros((2, 2), np.float32))
    for pixels in unknown_range:
        with pytest.raises(ValueError, match="no known range"):
            images.decode(encode(Image.fromarray(pixels), "TIFF"))
