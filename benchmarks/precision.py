"""How well a low precision measures the effects of tokens, against float32, on one photo and a real model.

    python benchmarks/precision.py --model ViT-B-16 --pretrained openai --shard imagenette/imagenette-000002.tar
    python benchmarks/precision.py ... --search --dtypes float16        and what becomes of the golden ranking

Every 12th token is taken out of a photo. Its effect, the change of the embedding, is small, and so what a low precision
rounds away shows: printed are the error as a share of the effect's length, the cosine to the effect in float32, and the
error of the whole embedding as a share of its length. With --search the default search runs in each precision, too:
printed are the share of the tokens kept that float32 keeps as well, and the cosine of the pruned to the whole image's
embedding, both judged in float32. A search bears a good deal of error: see docs/search.md.

On a CPU the products of a low precision are computed in float32 and rounded (`RoundedProducts`), so that one without
such instructions takes no longer than for float32.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from patchrank.data import shards
from patchrank.errors import UserError, run
from patchrank.model import loading
from patchrank.model.tower import Tower
from patchrank.search.candidates import without_each
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.tokens import matching_rate, tokens_kept

KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
aten = torch.ops.aten


class RoundedProducts(TorchDispatchMode):
    """While it is entered: products of low-precision tensors are summed in float32 and rounded once, as GPUs do it.

    PyTorch's own products of a CPU without such instructions do the same seventeen times as slowly.
    """

    PRODUCTS = frozenset(
        {
            aten.linear.default,
            aten.matmul.default,
            aten.conv2d.default,
            aten.scaled_dot_product_attention.default,
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """One operation of PyTorch; those that are no product as they are."""
        kwargs = kwargs or {}
        if func not in self.PRODUCTS or args[0].dtype not in (torch.float16, torch.bfloat16):
            return func(*args, **kwargs)
        return func(*(arg.float() if isinstance(arg, Tensor) else arg for arg in args), **kwargs).to(args[0].dtype)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="open_clip name")
    parser.add_argument("--pretrained", help="open_clip tag or weights file")
    parser.add_argument("--shard", required=True, help="shard with photos")
    parser.add_argument("--photos", type=int, default=1, help="the first so many (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], help="beside float32 (%(default)s)")
    parser.add_argument("--search", action="store_true", help="search for golden rankings in each, too")
    args = parser.parse_args()
    if args.photos < 1:
        raise UserError(f"--photos {args.photos}: must be at least 1")
    model = loading.load(args.model, args.pretrained)
    preprocess = model.preprocess()
    photos = [preprocess(photo) for _, photo in itertools.islice(shards.photos(args.shard), args.photos)]
    if not photos:
        raise UserError(f"--shard {args.shard}: holds no image that can be decoded")
    pixels = torch.stack(photos)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # in convolutions PyTorch has it on, and float32 is not float32
    found, rankings = {}, {}
    with torch.inference_mode(), RoundedProducts() if device == "cpu" else contextlib.nullcontext():
        for name in tqdm(["float32", *args.dtypes]):
            dtype = loading.resolve_dtype(name, device == "cuda")
            tower = Tower(model.visual, dtype=dtype, device=device)
            tokens = tower.prefix(pixels)
            alive = torch.arange(tower.num_tokens, device=device).expand(len(pixels), -1)  # (B, N)
            kept = without_each(alive, alive[:, ::12])  # (B, M, N - 1)
            image = torch.arange(len(pixels), device=device).repeat_interleave(kept.shape[1])
            whole = tower.suffix(tokens)  # (B, E)
            found[name] = whole, tower.suffix(tokens, kept.flatten(0, 1), image) - whole[image]  # (B * M, E)
            if args.search:
                rankings[name] = Searcher(tower, SearchConfig()).search(pixels).ranking  # (B, N)
    exact, exact_effects = found["float32"]
    for name, (whole, effects) in found.items():
        error = ((effects - exact_effects).norm(dim=1) / exact_effects.norm(dim=1)).mean()
        cosine = F.cosine_similarity(effects, exact_effects).mean()
        off = ((whole - exact).norm(dim=1) / exact.norm(dim=1)).mean()
        print(f"{name:9} error of an effect {error:.3f}, its cosine {cosine:.3f}, error of the embedding {off:.4f}")
    if args.search:
        worth = judge(Tower(model.visual, device=device), pixels, rankings)
        print(f"\n{'at keep':9}{''.join(f'{keep:>16.0%}' for keep in KEEP_RATES)}")
        for name, figures in worth.items():
            print(f"{name:9}" + "".join(f"{same:>9.1%} {cosine:.4f}" for same, cosine in figures))
    return 0


@torch.inference_mode()
def judge(tower: Tower, pixels: Tensor, rankings: dict[str, Tensor]) -> dict[str, list[tuple[float, float]]]:
    """What (B, N) rankings of (B, 3, H, W) images found in several precisions share, and what they are worth.

    Returns:
        By precision, for each keep rate: the mean share of the tokens kept that float32 keeps as well, and the mean
        cosine of the pruned to the whole image's embedding in the precision of `tower`.
    """
    tokens = tower.prefix(pixels)
    whole = tower.suffix(tokens)  # (B, E)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rankings}
    for keep, (name, ranking) in itertools.product(KEEP_RATES, rankings.items()):
        count = tokens_kept(tower.num_tokens, keep)
        same = matching_rate(-ranking.argsort(dim=1), rankings["float32"], count).mean()
        kept = ranking[:, :count].sort(dim=1).values.to(tower.device)  # (B, count)
        cosine = F.cosine_similarity(tower.suffix(tokens, kept), whole).mean()
        found[name].append((same.item(), cosine.item()))
    return found


if __name__ == "__main__":
    run(main)
