"""Rank the patches of your own images, from Python: a folder of photos becomes shards, and shards become rankings.

python examples/search_my_shards.py                        # a few of the embedded images
python examples/search_my_shards.py photos/                # photos/CLASS/*.jpg
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.rank import SearchJob, search
from patchrank import assets
from patchrank.errors import run
from patchrank.model.loading import ModelSource
from patchrank.store import rankings

JOBS = Path(__file__).parent.parent / "jobs"


def main() -> int:
    """Make shards, search, look at what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="patchrank-"))
    if len(sys.argv) > 1:
        make = [sys.executable, str(JOBS / "make_shards.py"), "--images", sys.argv[1], "--out", str(folder / "shards")]
        status = subprocess.run(make).returncode
        if status not in (0, 1):  # 1: it has skipped images that cannot be decoded, and named them
            return status
        shards, limit = [str(folder / "shards")], None
    else:
        shards, limit = list(assets.TEST_SHARDS), 8

    # What jobs/search.py does: actors on every GPU or core, a Parquet file a shard, resumable.
    job = SearchJob(shards, out=str(folder / "rankings"), model=ModelSource(assets.MODEL), limit=limit)
    summary = search(job)
    for shard, reason in summary.failures.items():
        print(f"error: {shard}: {reason}", file=sys.stderr)
    print(f"{summary.total('images')} images ranked in {summary.seconds:.0f} s")

    # What came of it: token ids, most useful first, as torch tensors.
    corpus = rankings.open(summary.folder)
    found = corpus.tensors(["ranking"])
    for key, ranking in list(zip(found["key"], found["ranking"], strict=True))[:5]:
        rows, columns = (ranking[:5] // corpus.grid[1]).tolist(), (ranking[:5] % corpus.grid[1]).tolist()
        best = ", ".join(f"({row}, {column})" for row, column in zip(rows, columns, strict=True))
        print(f"{key}: its five most useful patches are at (row, column) {best}")
    print(f"next: python jobs/query.py {summary.folder} accuracy")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    run(main)
