"""Embedding end to end, tar to Parquet: is a pruned tower's speed-up still there, and what do the stages take?

    python benchmarks/embed.py                                      # ViT-B/16, photos of ImageNet's size, keep 0.6
    python benchmarks/embed.py --images 1024 --batch 256 --threads 16                # for a GPU

In turn, round by round: "decode", the images of a shard read, decoded and preprocessed on as many threads, and nothing
else; "stub", all that an actor does, with a tower that takes no time, both on a shard of ImageNet's size, which has the
same photos many times; "unpruned" and "pruned", with this model, pruned by a predictor as `patchrank.prune` has it;
"plain", the loop over webdataset and open_clip that a user would write, its DataLoader with as many workers. "towers"
are the two towers alone. Printed are medians; the exit status is 1 where one is beyond the limit beside it. Where there
are others on the machine, processor seconds say more than seconds. Weights and photos are random, which does not change
the time.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is no installed package
from benchmarks.pruned import untrained
from cluster.places import Places
from patchrank.data.progress import Progress
from patchrank.data.shard_job import Reading
from patchrank.errors import UserError, run
from patchrank.evaluation import latency
from patchrank.model import loading
from patchrank.model.tower import Tower
from patchrank.pruning.embedder import Embedder, Pruning, ShardEmbedder
from patchrank.pruning.methods import TOKENS
from patchrank.store import embeddings
from patchrank.store.folder import Folder

SHARE = 0.9  # of the towers' speed-up, and of the decoding rate
SIZE, BYTES = (500, 375), 110_000  # of ImageNet's photos, about


class Stub(nn.Module):
    """Embeds images in no time."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E)."""
        return torch.ones(len(images), self.tower.embed_dim)


def write_photos(path: str, count: int, rows: int | None = None) -> float:
    """A shard of `count` photos of `SIZE` and about `BYTES` each, again and again up to `rows`; the bytes of one."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        photos = []
        for _ in range(count):
            smooth = Image.fromarray(rng.integers(256, size=(38, 50, 3), dtype=np.uint8)).resize(SIZE)
            noisy = np.asarray(smooth, np.int16) + rng.integers(-24, 25, size=(*SIZE[::-1], 3))
            photo = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(photo, "JPEG", quality=92)
            photos.append(photo.getvalue())
        for key in range(rows or count):
            member = tarfile.TarInfo(f"{key:06d}.jpg")
            member.size = len(photos[key % count])
            tar.addfile(member, io.BytesIO(photos[key % count]))
    return sum(map(len, photos)) / count


def plain(shard: str, visual: nn.Module, preprocess: Callable[..., Tensor], batch: int, workers: int, out: str) -> None:
    """The loop that a user would write; the tower's dtype and device are those of its weights."""
    weight = next(visual.parameters())
    data = wds.WebDataset(shard, shardshuffle=False, empty_check=False).decode("pil").to_tuple("__key__", "jpg")
    loader = DataLoader(
        data.map_tuple(lambda key: key, preprocess).batched(batch), batch_size=None, num_workers=workers
    )
    keys, found = [], []
    with torch.inference_mode():
        for names, images in loader:
            keys += names
            found.append(F.normalize(visual(images.to(weight)), dim=-1).float().cpu())
    flat = pa.array(torch.cat(found).numpy().astype(np.float16).reshape(-1))
    embedded = pa.FixedSizeListArray.from_arrays(flat, len(flat) // len(keys))
    pq.write_table(pa.table({"key": keys, "embedding": embedded}), out, compression="zstd")


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.6, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=128, help="of the shard that a tower embeds (%(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="of the shard for decode and stub (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images at a time (%(default)s)")
    parser.add_argument("--threads", type=int, help="that decode (as an actor with all cores has)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the towers alone (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    args = parser.parse_args()
    for name in ("images", "rows", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    threads = args.threads or Places(actors=1, cpus=cores, gpus=int(gpu)).threads
    device, dtype = torch.device("cuda" if gpu else "cpu"), loading.resolve_dtype(args.dtype, gpu)

    if open_clip.get_model_config(args.model) is None:
        raise UserError(f"--model {args.model}: open_clip does not know it")
    visual = open_clip.create_model(args.model).visual.eval().requires_grad_(False)
    tower = Tower(visual, None, dtype, device, args.model)
    config = open_clip.transform.PreprocessCfg(**visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    towers: dict[str, Any] = {
        "stub": Stub(tower),  # first, right after the decoding that it is compared with
        "unpruned": Embedder(tower, Pruning()),
        "pruned": Embedder(tower, Pruning(TOKENS, args.keep, untrained(tower.adapter, tower.cut).to(device, dtype))),
    }
    reading = Reading(preprocess, args.batch, threads=threads)
    embedders = {name: ShardEmbedder(each, reading) for name, each in towers.items()}
    visual.to(device, dtype)
    rows = {name: args.rows if name in ("decode", "stub") else args.images for name in ("decode", *embedders, "plain")}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    processor: dict[str, list[float]] = {name: [] for name in rows}
    stages: dict[str, Progress] = {}
    with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
        shard, long = f"{scratch}/photos.tar", f"{scratch}/many.tar"
        size = write_photos(shard, args.images)
        write_photos(long, args.images, args.rows)
        print(f"{latency.device_name(device, torch.get_num_threads())}, {loading.dtype_name(dtype)}, {threads} threads")
        print(f"{args.images} photos of {SIZE[0]} x {SIZE[1]}, {size / 1000:.0f} kB each, batches of {args.batch}")

        def decode() -> None:
            progress = Progress()
            progress.begin("none")
            for _ in reading.batches(long, lambda reject: None, progress):
                pass

        def embed(name: str) -> None:
            stages[name] = progress = Progress()
            photos = long if name == "stub" else shard
            found = embedders[name].embed(photos, progress)
            with progress.timed("write"):
                homes[name].write(photos, found.table, found.rejects, found.error, embeddings.encode)

        homes = {name: Folder(f"{scratch}/{name}", "embedding").prepare({}) for name in embedders}
        calls: dict[str, Callable[[], None]] = {"decode": decode}
        calls |= {name: lambda name=name: embed(name) for name in embedders}  # type: ignore[misc]
        calls["plain"] = lambda: plain(shard, visual, preprocess, args.batch, threads, f"{scratch}/plain.parquet")
        for number in range(args.rounds + 1):
            for name, call in calls.items():
                start, used = time.perf_counter(), time.process_time()
                call()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - used)
    for name, taken in seconds.items():
        spent = ""
        if name in stages:
            spent = "".join(f"  {stage} {value:.2f}" for stage, value in stages[name].seconds.items())
        rate, used = rows[name] / statistics.median(taken), 1000 * statistics.median(processor[name]) / rows[name]
        cpu = "" if name == "plain" else f"{used:>8.1f} ms of CPU each"  # whose workers are other processes
        print(f"{name:<10}{rate:>9.1f} images/s{cpu}{'   seconds of the last round:' if spent else ''}{spent}")
    images = torch.randn(args.batch, 3, *visual.image_size, device=device)
    alone = latency.measure({name: towers[name] for name in ("unpruned", "pruned")}, images, args.seconds)[1].speedup

    def ratio(one: str, other: str, taken: dict[str, list[float]] = seconds) -> float:
        return statistics.median(a / b for a, b in zip(taken[other], taken[one], strict=True))

    whole = ratio("pruned", "unpruned")
    good = True
    for title, value, limit in (
        (f"pruned / unpruned, end to end {whole:.2f}, of the towers' {alone:.2f}", whole / alone, SHARE),
        (
            f"stub / decode, of processor seconds {ratio('stub', 'decode', processor):.2f}, of seconds",
            ratio("stub", "decode"),
            SHARE,
        ),
        ("unpruned / plain", ratio("unpruned", "plain"), 1.0),
    ):
        good = good and value >= limit
        print(f"{title}: {value:.2f}, at least {limit:g}{'' if value >= limit else '   BEYOND THE LIMIT'}")
    return 0 if good else 1


if __name__ == "__main__":
    run(main)
