"""How fast the search scores candidates, measured side by side in one run.

    python benchmarks/search.py                                        ViT-B/16, the default search
    python benchmarks/search.py --dtype float32 --model ViT-L-14
    python benchmarks/search.py --shard-images 512                     and a whole actor, from tar to Parquet

(a) The default search: candidates/s, useful TFLOP/s (two a multiply-add, those of the candidates alone), and their
    share of a large matrix product of the same dtype.
(b) The shape of the paper's authors: one image at a time, all its candidates as one batch, attention weights
    materialised, every token through the last block; against the default search, and a one-shot search of the same
    candidates.
(c) open_clip's plain forward pass on sequences of as many tokens, per multiply-add.
(d) With --compile, forward passes of candidates through torch.compile, shapes static, against the same without.
(e) The share of an actor's time, from tar to Parquet over several shards, in which the device is idle. On a GPU that is
    the time without a kernel or copy, as PyTorch's profiler has it, which takes some time itself; on a CPU, which
    decodes as well, the time outside the search.

Weights and images are random: they say nothing about rankings, and speed does not depend on them. All take turns, so
that a noisy machine disturbs them alike; printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from cluster.actor import write
from cluster.places import Places
from cluster.rank import SearchJob
from patchrank import clock
from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading
from patchrank.errors import run
from patchrank.model.loading import resolve_dtype
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import Searcher
from patchrank.store import rankings
from patchrank.store.folder import Folder


def authors_shape(visual: Any, tokens: Tensor, full: Tensor, cut: int) -> Tensor:
    """Scores of all single-token candidates of one image, the way the authors' code goes.

    Args:
        tokens: (1 + N, D), before block `cut`.
        full: (E,), the embedding of the whole image.

    Returns:
        (N,)
    """
    n = len(tokens) - 1
    left = torch.arange(n).expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)  # (N, N - 1)
    kept = F.pad(left + 1, (1, 0)).to(tokens.device)  # (N, N)
    x = tokens[kept]  # (N, N, D)
    for block in visual.transformer.resblocks[cut:]:
        y = block.ln_1(x)
        x = x + block.ls_1(block.attn(y, y, y, need_weights=True)[0])
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    embeddings = visual._pool(x)[0] @ visual.proj  # (N, E)
    return F.cosine_similarity(embeddings.float(), full[None])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--images", type=int, help="images a search batch (64 on a GPU, as jobs/search.py has, else 2)")
    parser.add_argument("--shard-images", type=int, default=0, help="images of each of the actor's shards (no actor)")
    parser.add_argument("--shards", type=int, default=3, help="of the actor (%(default)s)")
    parser.add_argument("--chunk", type=int, help="candidates a forward pass (as jobs/search.py chooses)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.images = args.images or (64 if device == "cuda" else 2)
    dtype = resolve_dtype(args.dtype, device == "cuda")

    model = open_clip.create_model(args.model).eval().requires_grad_(False)
    tower = Tower(model.visual, dtype=dtype, device=device)
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
    )
    visual = model.visual.to(device, dtype)
    images = torch.randn(args.images, 3, *visual.image_size)
    default = Searcher(tower, SearchConfig(), chunk=args.chunk)
    one_shot = Searcher(tower, SearchConfig(steps=1, rank_by="scores"), chunk=args.chunk)
    chunk = default.candidates.chunk
    with torch.inference_mode():
        tokens = tower.prefix(images)  # (B, p + N, D)
        full = tower.suffix(tokens)  # (B, E)
    n = tower.num_tokens
    sequences = torch.randn(chunk, n, tower.width, device=device, dtype=dtype)  # n - 1 patches and the class token
    batches = -(-args.images * n // chunk)  # as much work as the one-shot search has
    side = 8192 if device == "cuda" else 2048
    square = torch.randn(side, side, device=device, dtype=dtype)
    products = 20 if device == "cuda" else 1

    seconds: dict[str, list[float]] = {}
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {
            "default": lambda: default.rank(tokens, full),
            "one-shot": lambda: one_shot.rank(tokens, full),
            "authors": lambda: [authors_shape(visual, *one, tower.cut) for one in zip(tokens, full, strict=True)],
            "open_clip": lambda: [visual._pool(visual.transformer(sequences))[0] @ visual.proj for _ in range(batches)],
            "product": lambda: [square @ square for _ in range(products)],
        }
        if args.compile:
            kept = torch.arange(n - 1, device=device).expand(chunk, -1)  # as many as candidates of the first step have
            image = torch.arange(chunk, device=device) % args.images
            compiled = torch.compile(tower.suffix, dynamic=False)
            calls["eager"] = lambda: tower.suffix(tokens, kept, image)
            calls["compiled"] = lambda: compiled(tokens, kept, image)
        ours = one_shot.search(images).score[0]
        theirs = authors_shape(visual, tokens[0], full[0], tower.cut).cpu()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 if dtype != torch.float32 else 1e-5)
        for call in calls.values():
            call()
        for _ in tqdm(range(args.rounds), disable=not sys.stderr.isatty()):
            for name, call in calls.items():
                seconds.setdefault(name, []).append(clock.seconds(call, torch.device(device)))

    cost = default.config.cost(tower.grid)
    candidates = {"default": sum(step.candidates for step in cost), "one-shot": n, "authors": n}  # an image
    adapter = tower.adapter
    open_clip_pass = adapter.depth * adapter.block_multiply_adds(n) + adapter.readout_multiply_adds(n)  # of a sequence
    work = {  # multiply-adds
        "default": args.images * sum(step.candidates * tower.suffix_multiply_adds(step.kept) for step in cost),
        "one-shot": args.images * n * tower.suffix_multiply_adds(n - 1),
        "open_clip": batches * chunk * open_clip_pass,
        "product": products * side**3,
    }

    def per_second(name: str, amount: float) -> float:
        return statistics.median(amount / second for second in seconds[name])

    def ratio(name: str, other: str, amounts: Mapping[str, float]) -> float:
        """Median over the rounds of what one does a second as a share of what the other does."""
        pairs = zip(seconds[name], seconds[other], strict=True)
        return statistics.median(amounts[name] / mine / (amounts[other] / its) for mine, its in pairs)

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {str(dtype).removeprefix('torch.')}, {where}, {args.images} images, chunk {chunk}")
    for name, count in candidates.items():
        print(f"{name:18}{per_second(name, args.images * count):10.1f} candidates/s")
    for name, amount in work.items():
        print(f"{name:18}{2 * per_second(name, amount) / 1e12:10.3f} TFLOP/s")
    print(f"default search / matrix product of {side} x {side}: {ratio('default', 'product', work):.2f}")
    print(f"default search / authors' shape, candidates: {ratio('default', 'authors', candidates):.2f}")
    print(f"one-shot search / authors' shape, candidates: {ratio('one-shot', 'authors', candidates):.2f}")
    print(f"one-shot search / open_clip forward, per multiply-add: {ratio('one-shot', 'open_clip', work):.2f}")
    if args.compile:
        print(f"forward pass of {chunk}, compiled / not: {ratio('compiled', 'eager', dict.fromkeys(calls, 1.0)):.2f}")
    if args.shard_images:
        searcher = Searcher(tower, SearchConfig(), keep_rates=SearchJob.keep_rates, chunk=args.chunk)
        wall, busy = actor(searcher, preprocess, args.shard_images, args.shards, args.images)
        print(
            f"actor, {args.shards} shards of {args.shard_images} images, tar to Parquet: {wall:.1f} s, "
            f"device idle {1 - busy / wall:.1%}"
        )
    return 0


def actor(
    searcher: Searcher, preprocess: Callable[..., Tensor], images: int, shards: int, batch: int
) -> tuple[float, float]:
    """Rank shards of noisy JPEG photos as an actor does: seconds in all, and those in which the device was busy."""
    gpu = searcher.tower.device.type == "cuda"
    threads = Places(actors=1, cpus=1, gpus=int(gpu)).threads
    ranker = ShardRanker(searcher, Reading(preprocess, batch, threads=threads))
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}.tar" for number in range(shards)]
        for number, path in enumerate(paths):
            write_photos(path, images, seed=number)
        out = Folder(f"{folder}/out").prepare({})
        device = threading.Lock()

        def rank(path: str) -> float:
            progress = Progress()
            write(out, path, ranker.rank(path, progress, device), rankings.encode)
            return progress.seconds["search"]

        with profile(activities=[ProfilerActivity.CUDA]) if gpu else contextlib.nullcontext() as profiled:
            start = time.perf_counter()
            with ThreadPoolExecutor(2 if gpu else 1) as pool:  # an actor on a GPU has two shards at once
                searching = sum(pool.map(rank, paths))
            wall = time.perf_counter() - start
    if profiled is None:
        return wall, searching
    on_device = [event.time_range for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return wall, covered([(each.start, each.end) for each in on_device]) / 1e6  # the profiler counts microseconds


def write_photos(path: str, count: int, seed: int) -> None:
    """A shard of noisy JPEG photos of 500 x 400 pixels."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for key in range(count):
            photo = io.BytesIO()
            smooth = Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).resize((500, 400))
            smooth.save(photo, "JPEG")
            member = tarfile.TarInfo(f"{key:06d}.jpg")
            member.size = photo.tell()
            photo.seek(0)
            tar.addfile(member, photo)


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    run(main)
