"""How fast JPEGs are decoded, by what, and what that does to pixels and embeddings.

    python benchmarks/decoding.py                                              # photos of ImageNet's size, random
    python benchmarks/decoding.py --shards photos --model ViT-B-16-quickgelu --pretrained FILE      # your own

A line a decoder, all on the same images in turn, round by round, on one thread: images a second to pixels alone, and to
what the model takes in (resized, cropped, normalised); then, against Pillow, the largest and mean difference of RGB
values (of 255), and the lowest and mean cosine of embeddings. "pillow" is what patchrank reads images with. "pillow
draft" is libjpeg's scaled decoding as Pillow offers it: an image is decoded at half, a quarter or an eighth of its size
where no side is below the model's then, which takes photos of twice that. "torchvision" is its own binding of
libjpeg-turbo; "simplejpeg", another one, is there if it is installed, and so is its scaled decoding. Without
--pretrained, weights are random.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is no installed package
from benchmarks.embed import write_photos
from patchrank.data import images, shards
from patchrank.data.shards import Sample
from patchrank.errors import UserError, run
from patchrank.model import loading


def decoders(side: int) -> dict[str, Callable[[bytes], Image.Image]]:
    """JPEG bytes to RGB, by name; `side` is that of the model's images."""

    def draft(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (side, side))
        return image.convert("RGB")

    def torchvision(data: bytes) -> Image.Image:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)  # (3, H, W)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    found: dict[str, Callable[[bytes], Image.Image]] = {
        "pillow": images.decode,
        "pillow draft": draft,
        "torchvision": torchvision,
    }
    try:
        import simplejpeg
    except ImportError:
        return found
    found["simplejpeg"] = lambda data: Image.fromarray(simplejpeg.decode_jpeg(data))
    found["simplejpeg scaled"] = lambda data: Image.fromarray(
        simplejpeg.decode_jpeg(data, min_height=side, min_width=side)
    )
    return found


def encoded(specs: list[str], count: int) -> list[bytes]:
    """The first JPEGs of shards. Raises UserError where there are none."""
    samples = (sample for uri in shards.expand(specs) for sample in shards.read(uri))
    jpegs = (sample.image for sample in samples if isinstance(sample, Sample) and sample.image[:2] == b"\xff\xd8")
    found = list(itertools.islice(jpegs, count))
    if not found:
        raise UserError(f"--shards {' '.join(specs)}: hold no JPEG")
    return found


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", metavar="SHARDS", help="of JPEGs (random ones of ImageNet's size)")
    parser.add_argument("--images", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name (%(default)s)")
    parser.add_argument("--pretrained", metavar="TAG", help="as for jobs/search.py (random weights)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    for name in ("images", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    torch.set_num_threads(1)
    if args.pretrained:
        visual = loading.load(args.model, args.pretrained).visual
    elif open_clip.get_model_config(args.model) is None:
        raise UserError(f"--model {args.model}: open_clip does not know it")
    else:
        visual = open_clip.create_model(args.model).visual.eval().requires_grad_(False)
    config = open_clip.transform.PreprocessCfg(**visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
        if not args.shards:
            write_photos(f"{scratch}/photos.tar", args.images)
        data = encoded(args.shards or [scratch], args.images)
    ways = decoders(max(visual.image_size))
    alone: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, decode in ways.items():
            start = time.perf_counter()
            decoded = [decode(each) for each in data]
            middle = time.perf_counter()
            for image in decoded:
                preprocess(image)
            alone[name].append(middle - start)
            whole[name].append(time.perf_counter() - start)

    def embedded(decode: Callable[[bytes], Image.Image]) -> Tensor:
        batches = torch.stack([preprocess(decode(each)) for each in data]).split(16)
        with torch.inference_mode():
            return F.normalize(torch.cat([visual(batch) for batch in batches]), dim=-1)  # (B, E)

    reference = embedded(ways["pillow"])
    print(f"{len(data)} JPEGs of {sum(map(len, data)) / len(data) / 1000:.0f} kB on average, one thread")
    print(f"{'':<18}decoded/s  model's input/s  largest, mean difference  lowest, mean cosine")
    for name, decode in ways.items():
        pairs = [(np.asarray(ways["pillow"](each), np.int16), np.asarray(decode(each), np.int16)) for each in data]
        apart = [np.abs(one - other) for one, other in pairs if one.shape == other.shape]
        pixels = "of another size"
        if len(apart) == len(data):
            pixels = f"{max(each.max() for each in apart)}, {statistics.mean(float(each.mean()) for each in apart):.3f}"
        cosines = (embedded(decode) * reference).sum(dim=1)  # (B,)
        rates = [len(data) / statistics.median(seconds[name]) for seconds in (alone, whole)]
        print(
            f"{name:<18}{rates[0]:>9.1f}{rates[1]:>17.1f}  {pixels:>24}  {cosines.min():>10.5f}, {cosines.mean():.5f}"
        )
    return 0


if __name__ == "__main__":
    run(main)
