"""How far a search or an embedding is, told from its folder alone: while it runs, and after it has ended somehow.

    shards.txt    the shards of the last run, one a line
    run.json      what its driver last said: replaced every few seconds, so one that is old is of a driver that died

Both are where `Folder.beside` says. What is done, failed and rejected follows from the files of the shards themselves,
never from these two.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from patchrank.errors import UserError
from patchrank.store import kinds, partial, storage, text
from patchrank.store.folder import Folder, file_name, find, parquet_files

RUN_FILE, SHARDS_FILE = "run.json", "shards.txt"
REPORT_SECONDS = 10.0  # between two reports of a driver
SILENT_SECONDS = 90.0  # after which it is taken for dead: an object store may take its time


@dataclass
class Run:
    """What a driver says of its run; times are seconds since 1970, counts are of this run alone.

    Attributes:
        title: what it is at: "search", or "prototypes" before it.
        started: when it began.
        updated: when it said this.
        ended: whether it has ended, done or not.
        actors: those that are up.
        images, rejects, candidates: of the shards that are finished or in work.
        images_per_second: of the last minutes; None before the first image.
        seconds_left: how long the rest takes at this pace; None before the first shard is finished.
        stages: seconds by stage, all actors together; see `patchrank.data.progress.Progress`.
        running: images done so far by shard in work.
    """

    title: str
    started: float
    updated: float
    ended: bool = False
    actors: int = 0
    images: int = 0
    rejects: int = 0
    candidates: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """Where a search or an embedding stands.

    Attributes:
        folder: its URI, absolute.
        state: "running"; "finished", every shard is done; "stopped" by its user or an error, or ended with failed
            shards; "died" without a word; "unknown" where no run has said anything.
        shards: of the last run; None where that is not known.
        done: those of them that have their tables.
        running: images so far by shard that the driver has in work, or had when it fell silent.
        failed: why, by shard.
        kept: shards of which a part is kept, for the next run to go on from.
        images, rejects: rows in the folder.
        reasons: of the rejects, how often each.
        run: what the driver last said, if anything.
        kind: "search" or "embedding".
    """

    folder: str
    state: str
    shards: int | None
    done: int
    running: dict[str, int]
    failed: dict[str, str]
    kept: list[str]
    images: int
    rejects: int
    reasons: dict[str, int]
    run: Run | None
    kind: str = "search"

    @property
    def waiting(self) -> int | None:
        """Shards that are neither done nor failed nor running."""
        return None if self.shards is None else self.shards - self.done - len(self.failed) - len(self.running)

    @property
    def ends(self) -> float | None:
        """When a running search will be through, in seconds since 1970; None where that cannot be told."""
        if self.state != "running" or self.run is None or self.run.seconds_left is None:
            return None
        return self.run.updated + self.run.seconds_left

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self) | {"waiting": self.waiting, "ends": self.ends}


def write_shards(folder: str, shards: Sequence[str]) -> None:
    """Note which shards a run is about, once its folder is prepared. Raises OSError where that cannot be written."""
    content = "".join(f"{shard}\n" for shard in shards)
    storage.write_atomic((find(folder) or Folder(folder)).beside(SHARDS_FILE), content.encode())


def write_run(folder: str, run: Run) -> None:
    """Replace what was said of the run. Raises OSError where that cannot be written.

    Does not bring back a folder that has been removed.
    """
    home = find(folder)
    if home is not None:
        storage.write_atomic(home.beside(RUN_FILE), json.dumps(asdict(run), indent=1).encode() + b"\n")


def read(folder: str, now: float | None = None) -> Status:
    """Where the search, or the embedding, of a folder stands.

    Args:
        folder: a path, s3:// or gs://.
        now: in seconds since 1970.

    Raises:
        UserError: no such folder, or not one of a search or an embedding.
    """
    folder = storage.absolute(folder)
    now = time.time() if now is None else now
    try:
        home = find(folder)
        if home is None or home.kind == "evaluation" or home.read() is None:
            raise UserError(f"{folder}: holds no search.json, so no search has begun there")
        run = _run(home)
        shards = _shards(home)
        files = parquet_files(folder)
        names = {file_name(shard): shard for shard in shards}
        # A record that is damaged gives the name of its file for that of its shard.
        failed = {names.get(f"{one['shard']}.parquet", one["shard"]): one["error"] for one in home.failures()}
        kept = partial.kept(home, shards)
        corpus = kinds.open(folder) if files else None
        images = len(corpus) if corpus else 0
        reasons = Counter(corpus.rejects()["reason"].to_pylist() if corpus else [])
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({storage.one_line(error)})") from None
    finished = set(files) - {file_name(shard) for shard in failed}  # a failed shard may have a part of its rows
    running = {} if run is None or run.ended else run.running
    if shards:
        finished &= set(names)
        running = {shard: count for shard, count in running.items() if file_name(shard) in names}
        failed = {shard: error for shard, error in failed.items() if file_name(shard) in names}
    running = {shard: count for shard, count in running.items() if file_name(shard) not in finished}
    failed = {shard: error for shard, error in failed.items() if shard not in running}  # it is being tried again
    return Status(
        folder=folder,
        state=_state(run, len(shards), len(finished), now),
        shards=len(shards) or None,
        done=len(finished),
        running=running,
        failed=failed,
        kept=sorted(kept),
        images=images,
        rejects=reasons.total(),
        reasons=dict(reasons.most_common()),
        run=run,
        kind=home.kind,
    )


def _state(run: Run | None, shards: int, done: int, now: float) -> str:
    if shards and done == shards:
        return "finished"
    if run is None:
        return "unknown"
    if run.ended:
        return "stopped"
    return "running" if now - run.updated < SILENT_SECONDS else "died"


def _run(folder: Folder) -> Run | None:
    try:
        return Run(**json.loads(storage.read_bytes(folder.beside(RUN_FILE))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # it tells nothing that cannot do without
        return None


def _shards(folder: Folder) -> list[str]:
    try:
        return [line for line in text.lines(text.decode(storage.read_bytes(folder.beside(SHARDS_FILE)))) if line]
    except (FileNotFoundError, ValueError):  # likewise
        return []
