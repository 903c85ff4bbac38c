"""How fast the search scores candidates, against two others, measured side by side in one run.

    python benchmarks/search.py                                        ViT-B/16, one-shot search of single tokens
    python benchmarks/search.py --dtype float32 --model ViT-L-14

(a) The shape of the paper's authors: one image at a time, all its candidates as one batch, attention weights
    materialised, every token through the last block. Ratio in candidates a second.
(b) open_clip's plain forward pass on sequences of as many tokens. Ratio in multiply-adds a second.

Weights are random: they say nothing about rankings, and speed does not depend on them. The three take turns, so that a
noisy machine disturbs all alike; printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patchrank.errors import run
from patchrank.models import resolve_dtype
from patchrank.search import SearchConfig, Searcher
from patchrank.vit import Tower


def authors_shape(visual: Any, tokens: Tensor, cut: int) -> Tensor:
    """Scores of all single-token candidates of one image: tokens (1 + N, D) -> (N,), the way the authors' code goes."""
    n = len(tokens) - 1
    left = torch.arange(n).expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)  # (N, N - 1)
    kept = F.pad(left + 1, (1, 0)).to(tokens.device)  # (N, N)
    x = torch.cat([tokens[kept], tokens[kept[:1]]])  # (N + 1, N, D); the last stands for the whole image
    for block in visual.transformer.resblocks[cut:]:
        y = block.ln_1(x)
        x = x + block.ls_1(block.attn(y, y, y, need_weights=True)[0])
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    embeddings = visual._pool(x)[0] @ visual.proj
    return F.cosine_similarity(embeddings[:-1].float(), embeddings[-1:].float())


def clock(call: Callable[[], object], device: str) -> float:
    """Seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--images", type=int, default=2, help="images a search batch (%(default)s)")
    parser.add_argument("--chunk", type=int, help="candidates a forward pass (as jobs/search.py chooses)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(args.dtype, device == "cuda")

    model = open_clip.create_model(args.model).eval().requires_grad_(False)
    tower = Tower(model.visual, dtype=dtype, device=device)
    visual = model.visual.to(device, dtype)
    images = torch.randn(args.images, 3, *visual.image_size)
    searcher = Searcher(tower, SearchConfig(steps=1), chunk=args.chunk)
    chunk = searcher.chunk
    tokens = tower.prefix(images)  # (B, 1 + N, D)
    n = tower.num_tokens
    sequences = torch.randn(chunk, n, tower.width, device=device, dtype=dtype)  # n - 1 patches and the class token

    batches = -(-args.images * n // chunk)  # as much work as the search has

    seconds: dict[str, list[float]] = {"search": [], "authors": [], "open_clip": []}
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {
            "search": lambda: searcher._rank(tokens, tower.suffix(tokens), None),
            "authors": lambda: [authors_shape(visual, one, tower.cut) for one in tokens],
            "open_clip": lambda: [visual._pool(visual.transformer(sequences))[0] @ visual.proj for _ in range(batches)],
        }
        ours = searcher.search(images).score[0]
        theirs = authors_shape(visual, tokens[0], tower.cut).cpu()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 if dtype != torch.float32 else 1e-5)
        for call in calls.values():
            call()
        for _ in tqdm(range(args.rounds), disable=not sys.stderr.isatty()):
            for name, call in calls.items():
                seconds[name].append(clock(call, device))

    candidates = args.images * n
    useful = candidates * tower.suffix_multiply_adds(n - 1) + args.images * tower.suffix_multiply_adds(n)
    hidden = visual.transformer.resblocks[0].mlp.c_fc.out_features
    block = (4 * tower.width**2 + 2 * tower.width * hidden) * n + 2 * n * n * tower.width
    plain = batches * chunk * (len(visual.transformer.resblocks) * block + tower.width * tower.embed_dim)
    rates = {name: [1 / second for second in values] for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in rates.items()}
    against_authors = statistics.median(a / b for a, b in zip(rates["search"], rates["authors"], strict=True))
    against_plain = statistics.median(
        a * useful / (b * plain) for a, b in zip(rates["search"], rates["open_clip"], strict=True)
    )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {str(dtype).removeprefix('torch.')}, {where}, {args.images} images, chunk {chunk}")
    print(f"search            {middle['search'] * candidates:8.1f} candidates/s")
    print(f"authors' shape    {middle['authors'] * candidates:8.1f} candidates/s        search: {against_authors:.2f}")
    print(f"search            {middle['search'] * useful / 1e9:8.1f} G multiply-adds/s")
    print(f"open_clip forward {middle['open_clip'] * plain / 1e9:8.1f} G multiply-adds/s  search: {against_plain:.2f}")
    return 0


if __name__ == "__main__":
    run(main)
