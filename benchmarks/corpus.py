"""A rankings corpus of ImageNet's size: how large it gets, and how fast it is written, asked, read and resumed.

    python benchmarks/corpus.py                              1,281 shards of 1,000 images: 1.1 GB in a temporary folder
    python benchmarks/corpus.py --folder FOLDER              the same in a folder that stays: a second run only measures
    python benchmarks/corpus.py --shards 20 --listed 100     a quick look

Rankings are drawn at random, which makes them as hard to compress as any; schema and writer are those of the search.
Every named query runs as a user runs it, in a process of its own, and is told with its processor time: where others
use the machine too, that is what it would take alone, divided by the processors. The exit status is 1 where something
took longer, or more memory, than the limits printed beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from patchrank.data import shards
from patchrank.errors import run
from patchrank.model.loading import resolve_dtype
from patchrank.model.tower import Tower
from patchrank.store import queries, rankings
from patchrank.store.folder import Folder, file_name
from patchrank.store.rankings import Rankings

GRID = (14, 14)
KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
CLASSES = 1000
UNCHANGED = 0.9  # of the predictions, at each keep rate
QUERY_SECONDS, QUERY_BYTES, READER_RATIO, LISTING_SECONDS, FIRST_ROW_SECONDS = 5.0, 1e9, 20.0, 5.0, 2.0
FIRST_ROW = """\
import json, sys, time
times = [(time.perf_counter(), time.process_time())]
import datasets, torch
times.append((time.perf_counter(), time.process_time()))
rows = datasets.load_dataset(sys.argv[1], split="train", streaming=True)
times.append((time.perf_counter(), time.process_time()))
length = len(next(iter(rows))["ranking"])
times.append((time.perf_counter(), time.process_time()))
print(json.dumps([length, *times]))
"""
TRAINING_COLUMNS = ("ranking", "score")  # that patchrank.data.join reads of every table


class Report:
    """Prints figures, and remembers whether one of them is beyond its limit."""

    def __init__(self) -> None:
        self.good = True

    def line(self, title: str, text: str, within: bool = True) -> None:
        """Print a figure; `within` tells whether it keeps to its limit."""
        self.good = self.good and within
        print(f"{title:<26}{text}{'' if within else '   BEYOND THE LIMIT'}", flush=True)


def uri(shard: int) -> str:
    """Of a made-up shard."""
    return f"/data/imagenet/train-{shard:06d}.tar"


def drawn(shard: int, rows: int) -> pa.Table:
    """The table of a shard whose rankings are random: 4 tokens leave in a step until 40 % are left."""
    rng = np.random.default_rng(shard)
    tokens = GRID[0] * GRID[1]
    ranking = rng.random((rows, tokens), np.float32).argsort(axis=1)  # (B, N)
    leaving = np.zeros(tokens, np.int64)  # by position in the ranking, of which the end leaves first
    leaving[-118:] = np.arange(118)[::-1] // 4 + 1
    step = np.empty_like(ranking)
    np.put_along_axis(step, ranking, np.tile(leaving, (rows, 1)), axis=1)  # (B, N), by token id
    shape = (rows, len(KEEP_RATES))
    labels = rng.integers(0, CLASSES, rows)
    prediction = np.where(rng.random(rows) < 0.7, labels, rng.integers(0, CLASSES, rows))
    found = rankings.Ranked(
        keys=[f"n{label:08d}_{rng.integers(100_000)}_{row}" for row, label in enumerate(labels)],
        labels=labels.tolist(),
        ranking=ranking,
        score=1 - np.abs(rng.normal(0, 0.01, ranking.shape)).astype(np.float32),
        step=step,
        prediction=prediction,
        confidence=rng.random(rows, np.float32),
        keep_rates=KEEP_RATES,
        pruned_prediction=np.where(
            rng.random(shape) < UNCHANGED, prediction[:, None], rng.integers(0, CLASSES, shape)
        ),
        pruned_confidence=rng.random(shape, np.float32),
        pruned_cosine=1 - np.abs(rng.normal(0, 0.01, shape)).astype(np.float32),
    )  # fmt: skip
    return rankings.table(uri(shard), found)


def write(folder: str, count: int, rows: int, report: Report) -> None:
    """Write the shards that the folder does not have yet."""
    about = {"class_names": [f"class {label}" for label in range(CLASSES)]}
    settings = {"grid": list(GRID), "keep_rates": list(KEEP_RATES), "about": about}
    home = Folder(folder).prepare(settings, rankings.COLUMNS)
    done = home.finished([uri(shard) for shard in range(count)])
    todo = [shard for shard in range(count) if uri(shard) not in done]
    seconds, size = 0.0, 0
    for shard in todo:
        table = drawn(shard, rows)
        start = time.perf_counter()
        size += home.write(uri(shard), table, encode=rankings.encode)
        seconds += time.perf_counter() - start
    if todo:
        written = len(todo) * rows
        report.line("write", f"{written / seconds:,.0f} rows/s, {size / written:.0f} bytes a row, {size / 1e9:.2f} GB")


def ask(folder: str, report: Report) -> None:
    """Every named query, in a process of its own."""
    job = str(Path(__file__).parent.parent / "jobs" / "query.py")
    with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
        for name in queries.NAMED:
            before, start, memory = processor_seconds(), time.perf_counter(), 0
            process = subprocess.Popen([sys.executable, job, folder, name, "--out", os.path.join(scratch, "rows.csv")])
            while process.poll() is None:
                memory = max(memory, peak_memory(process.pid))
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            text = f"{seconds:.1f} s, {processor_seconds() - before:.1f} s of CPU, {memory / 1e6:.0f} MB"
            text += f" (limits {QUERY_SECONDS:.0f} s, {QUERY_BYTES / 1e6:.0f} MB)"
            good = not process.returncode and seconds < QUERY_SECONDS and 0 < memory < QUERY_BYTES
            report.line(f"query {name}", text, good)


def processor_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_memory(process: int) -> int:
    """Of a running process, in bytes; 0 where it has none. What getrusage says of a child is at least its parent's."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def read(corpus: Rankings, count: int, model: str, report: Report) -> None:
    """The table-reading part of a pass of training, against the pace at which the tower makes its input."""
    start = time.perf_counter()
    rows = sum(len(corpus.tensors(TRAINING_COLUMNS, uri(shard))["key"]) for shard in range(count))
    tables = rows / (time.perf_counter() - start)
    gpu = torch.cuda.is_available()
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, which speed does not depend on
    clip = open_clip.create_model(model).eval().requires_grad_(False)
    tower = Tower(clip.visual, dtype=resolve_dtype("auto", gpu), device="cuda" if gpu else "cpu")
    images = torch.randn(256 if gpu else 8, 3, *clip.visual.image_size)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            tower.prefix(images).sum().item()  # waits for the device
            best = min(best, time.perf_counter() - start)
    consumed = len(images) / best
    text = f"{tables:,.0f} rows/s, a pass in {rows / tables:.1f} s; {model} to block {tower.cut} takes {consumed:,.0f} "
    ratio = tables / consumed
    report.line("training reader", f"{text}images/s: {ratio:,.0f} times as fast", ratio >= READER_RATIO)


def first_row(folder: str, report: Report) -> None:
    """How long `datasets` takes to the first row of a corpus that it streams, in a process of its own.

    Its import, and that of torch, which it imports to stream, are told beside.
    """
    done = subprocess.run([sys.executable, "-c", FIRST_ROW, folder], stdout=subprocess.PIPE, text=True, check=True)
    length, *times = json.loads(done.stdout)
    imports, load, first = ([now - then for then, now in zip(*pair, strict=True)] for pair in itertools.pairwise(times))
    seconds, processor = (sum(pair) for pair in zip(load, first, strict=True))
    text = f"{seconds:.2f} s, {processor:.2f} s of CPU (limit {FIRST_ROW_SECONDS:.0f} s): "
    text += f"load_dataset {load[0]:.2f} s, the row {first[0]:.2f} s; "
    text += f"imports before it {imports[0]:.2f} s, {imports[1]:.2f} s of CPU"
    report.line("first row streamed", text, length == GRID[0] * GRID[1] and seconds < FIRST_ROW_SECONDS)


def resume(count: int, report: Report) -> None:
    """What a search does before its first shard: list the shards, and decide which of them are to be done."""
    with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
        tars, folder = Path(scratch, "shards"), Path(scratch, "rankings")
        for place in (tars, folder):
            place.mkdir()
        names = [str(tars / f"train-{shard:06d}.tar") for shard in range(count)]
        for number, name in enumerate(names):
            Path(name).touch()
            if number % 2:  # half of them are done
                (folder / file_name(name)).write_bytes(b"-")
        start = time.perf_counter()
        uris = shards.expand([str(tars)])
        listed = time.perf_counter() - start
        done = Folder(str(folder)).finished(uris)
        seconds = time.perf_counter() - start
    correct = len(uris) == count and len(done) == count // 2
    text = f"{count:,} shards: {listed:.2f} s to list, {seconds - listed:.2f} s to tell which are done"
    report.line("resume", f"{text} (limit {LISTING_SECONDS:.0f} s)", correct and seconds < LISTING_SECONDS)


def small_files(corpus: Rankings, report: Report) -> None:
    """The same rows as a file a shard and as one file: what compaction would gain."""
    import duckdb

    names = [f"{corpus.folder}/{name}" for name in corpus.files[:128]]
    sql = queries.NAMED["accuracy"].sql
    with tempfile.TemporaryDirectory(prefix="patchrank-") as scratch:
        one = os.path.join(scratch, "one.parquet")
        with pq.ParquetFile(names[0]) as first, pq.ParquetWriter(one, first.schema_arrow, compression="zstd") as writer:
            for name in names:
                writer.write_table(pq.read_table(name).replace_schema_metadata(first.schema_arrow.metadata))
        seconds = {}
        for files in (names, [one]):
            best = float("inf")
            for _ in range(3):
                connection = duckdb.connect(config={"threads": min(4, os.cpu_count() or 1)})
                connection.read_parquet(files).create_view("rankings")
                start = time.perf_counter()
                connection.execute(sql).fetchall()
                best = min(best, time.perf_counter() - start)
                connection.close()
            seconds[len(files)] = best
        start = time.perf_counter()
        for name in names:
            pq.read_metadata(name)
        footers = (time.perf_counter() - start) / len(names)
    many, single = seconds[len(names)], seconds[1]
    text = f"accuracy of {len(names)} files {many:.2f} s, of the same rows in one file {single:.2f} s"
    report.line("small files", f"{text}; a footer {1000 * footers:.2f} ms")


def main() -> int:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write the corpus, or where it is (a temporary folder)")
    parser.add_argument("--shards", type=int, default=1281, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="images a shard (%(default)s)")
    parser.add_argument("--listed", type=int, default=10_000, help="shards to list and resume (%(default)s)")
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name, whose pace is measured (%(default)s)")
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="patchrank-") as temporary:
        folder = args.folder or temporary
        write(folder, args.shards, args.rows, report)
        ask(folder, report)
        corpus = rankings.open(folder)
        read(corpus, args.shards, args.model, report)
        small_files(corpus, report)
        first_row(folder, report)
    resume(args.listed, report)
    return 0 if report.good else 1


if __name__ == "__main__":
    run(main)
