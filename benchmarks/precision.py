"""How well a low precision measures the effects of tokens, against float32, on one photo and a real model.

    python benchmarks/precision.py --model ViT-B-16 --pretrained openai --shard imagenette/imagenette-000002.tar

Every 12th token is taken out of a photo. Its effect, the change of the embedding, is small, and so what a low precision
rounds away shows: printed are the error as a share of the effect's length, the cosine to the effect in float32, and the
error of the whole embedding as a share of its length. A search bears a good deal of it: see docs/search.md.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from tqdm import tqdm

from patchrank import models, shards
from patchrank.candidates import without_each
from patchrank.errors import run
from patchrank.images import decode
from patchrank.vit import Tower


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="open_clip name")
    parser.add_argument("--pretrained", help="open_clip tag or weights file")
    parser.add_argument("--shard", required=True, help="shard with photos")
    parser.add_argument("--photos", type=int, default=1, help="the first so many (%(default)s)")
    args = parser.parse_args()
    model = models.load(args.model, args.pretrained)
    preprocess = model.preprocess()
    samples = (sample for sample in shards.read(args.shard) if isinstance(sample, shards.Sample))
    pixels = torch.stack([preprocess(decode(sample.image)) for sample in itertools.islice(samples, args.photos)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    with torch.inference_mode():
        for dtype in tqdm((torch.float32, torch.float16, torch.bfloat16)):
            tower = Tower(model.visual, dtype=dtype, device=device)
            tokens = tower.prefix(pixels)
            alive = torch.arange(tower.num_tokens, device=device).expand(len(pixels), -1)  # (B, N)
            kept = without_each(alive, alive[:, ::12])  # (B, M, N - 1)
            image = torch.arange(len(pixels), device=device).repeat_interleave(kept.shape[1])
            whole = tower.suffix(tokens)  # (B, E)
            found[dtype] = whole, tower.suffix(tokens, kept.flatten(0, 1), image) - whole[image]  # (B * M, E)
    exact, exact_effects = found[torch.float32]
    for dtype, (whole, effects) in found.items():
        error = ((effects - exact_effects).norm(dim=1) / exact_effects.norm(dim=1)).mean()
        cosine = F.cosine_similarity(effects, exact_effects).mean()
        off = ((whole - exact).norm(dim=1) / exact.norm(dim=1)).mean()
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} error of an effect {error:.3f}, its cosine {cosine:.3f}, error of the embedding {off:.4f}")
    return 0


if __name__ == "__main__":
    run(main)
