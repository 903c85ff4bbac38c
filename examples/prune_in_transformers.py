"""Prune a CLIP of transformers, classify photos with its pipeline, and see how much faster its image tower has become.

python examples/prune_in_transformers.py photos/*.jpg --labels cat dog                # downloads OpenAI's ViT-B/16
python examples/prune_in_transformers.py photos/*.jpg --labels cat dog --model my-folder --how my-bundle
"""

from __future__ import annotations

import argparse

import torch
import transformers
from PIL import Image

import patchrank
from patchrank.errors import UserError, run
from patchrank.evaluation import latency
from patchrank.store.storage import one_line


def main() -> int:
    """Load, prune, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="image files")
    parser.add_argument("--labels", nargs="+", required=True, help="what they may show")
    parser.add_argument("--model", default="openai/clip-vit-base-patch16", help="ORG/REPO or a folder (%(default)s)")
    parser.add_argument("--how", default="class-attention", help="a bundle, or class-attention, token-merging, random")
    parser.add_argument("--keep", type=float, default=0.6)
    args = parser.parse_args()

    # 1. Photos, and a pipeline as you load it anyway.
    photos = []
    for path in args.photos:
        try:
            photos.append(Image.open(path).convert("RGB"))
        except OSError as error:
            raise UserError(f"{path}: {one_line(error)}") from None
    try:
        classify = transformers.pipeline("zero-shot-image-classification", model=args.model)
    except Exception as error:  # transformers raises what its libraries raise: network, file and shape errors alike
        raise UserError(f"--model {args.model}: {one_line(error)[:200]}") from None
    model = classify.model.eval()
    before = classify(photos, candidate_labels=args.labels)

    # 2. The image tower's time, and the line that this is about; `patchrank.restore(model)` would take it back.
    pixels = classify.image_processor(photos, return_tensors="pt")["pixel_values"].to(model.device)
    (whole,) = latency.measure({"whole": model.vision_model}, pixels, seconds=2)
    patchrank.prune(model, args.how, keep=args.keep)
    (pruned,) = latency.measure({"pruned": model.vision_model}, pixels, seconds=2)

    # 3. The same pipeline, and features of the patches that are left, put back where they were.
    for photo, old, new in zip(args.photos, before, classify(photos, candidate_labels=args.labels), strict=True):
        print(f"{photo}: {new[0]['label']} {new[0]['score']:.1%}, before {old[0]['label']} {old[0]['score']:.1%}")
    with torch.no_grad():
        found = model.vision_model(pixels)
    if model.vision_model.patch_ids is not None:  # merged tokens have none
        ids = model.vision_model.patch_ids  # (B, n)
        grid = model.vision_model.pruned_tower.adapter.grid
        features = patchrank.on_grid(found.last_hidden_state[:, -ids.shape[1] :], ids, grid, "nearest")
        print(f"{ids.shape[1]} patches are left; a map of features: {tuple(features.shape)}")
    print(f"a batch took {1000 * whole.seconds:.0f} ms and now takes {1000 * pruned.seconds:.0f} ms")
    return 0


if __name__ == "__main__":
    run(main)
