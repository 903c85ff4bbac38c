"""Prune a CLIP, classify a folder of photos with it, and see how much faster it has become.

python examples/prune_my_clip.py                                              # the embedded CLIP and its images
python examples/prune_my_clip.py --model ViT-B-16-quickgelu --pretrained openai --how my-bundle \\
    --images photos --classes cat dog
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import open_clip
import torch
from PIL import Image

import patchrank
from patchrank import assets
from patchrank.data import shards
from patchrank.data.images import decode
from patchrank.errors import UserError, run
from patchrank.evaluation import latency
from patchrank.store.storage import one_line


def photos_in(folder: Path) -> list[Image.Image]:
    """The first photos of a folder."""
    photos = []
    for path in sorted(folder.glob("*.*g"))[:64]:
        try:
            photos.append(decode(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {one_line(error)}; take it out of the folder") from None
    if not photos:
        raise UserError(f"--images {folder}: no jpg, jpeg or png file there")
    return photos


def main() -> int:
    """Load, prune, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=assets.MODEL, help="open_clip name")
    parser.add_argument("--pretrained", help="open_clip tag or weights file")
    parser.add_argument("--how", default="class-attention", help="a bundle, or class-attention, token-merging, random")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--images", type=Path, help="folder of photos")
    parser.add_argument("--classes", nargs="+", help="what they may show")
    args = parser.parse_args()
    if bool(args.images) != bool(args.classes):
        raise UserError("--images and --classes: give both, or neither for the embedded images")

    # 1. A CLIP as you load it anyway.
    try:
        model, preprocess = open_clip.create_model_from_pretrained(args.model, args.pretrained, return_transform=True)
    except Exception as error:  # open_clip raises what its libraries raise: network, file and shape errors alike
        raise UserError(f"--model {args.model} --pretrained {args.pretrained}: {one_line(error)[:200]}") from None
    model.eval()
    tokenizer = open_clip.get_tokenizer(args.model)

    # 2. Some images, and what they may show.
    if args.images:
        photos, classes = photos_in(args.images), args.classes
    else:
        photos = [photo for _, photo in itertools.islice(shards.photos(shards.expand(assets.TEST_SHARDS)[0]), 64)]
        classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    images = torch.stack([preprocess(photo) for photo in photos])

    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in classes]), normalize=True)
        before = model.encode_image(images, normalize=True)
        unpruned = model.visual

        # 3. The line that this is about; `patchrank.restore(model)` would take it back.
        patchrank.prune(model, args.how, keep=args.keep)

        after = model.encode_image(images, normalize=True)

    same = ((before @ texts.T).argmax(dim=1) == (after @ texts.T).argmax(dim=1)).float().mean().item()
    whole, pruned = latency.measure({"unpruned": unpruned, "pruned": model.visual}, images, seconds=5)
    print(f"{len(images)} images: cosine {(before * after).sum(dim=1).mean():.4f}, {same:.0%} get the same answer")
    times = f"{1000 * whole.seconds:.0f} ms and now takes {1000 * pruned.seconds:.0f} ms"
    print(f"a batch took {times}: {pruned.speedup:.2f} times as fast")
    return 0


if __name__ == "__main__":
    run(main)
