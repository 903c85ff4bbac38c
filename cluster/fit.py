"""From images to a pruned model in one go: shards, golden rankings if wanted, predictor, tokens, evaluation, bundle.

WORK/shards/        of a folder of images
WORK/rankings/      of the images that are searched first
WORK/features/      tokens before the cut, where images come again and are not too many
WORK/predictor/, WORK/tokens/, WORK/evaluation/, WORK/report/
OUT/                the bundle

Each is what the job of that name leaves, and goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from cluster import estimate as search_estimate
from cluster import evaluate, rank
from cluster.evaluate import EvaluatedModel, EvaluationJob, Pruning
from cluster.rank import SearchJob
from cluster.train import train
from cluster.training_estimate import estimate
from cluster.training_job import TrainingConfig, Workers
from patchrank.data import shard_writer, shards
from patchrank.data.shard_writer import Skipped
from patchrank.errors import UserError
from patchrank.evaluation.latency import Timing
from patchrank.evaluation.record import Record
from patchrank.flags import at_least, flag, group
from patchrank.model.class_source import ClassSource
from patchrank.model.classes import text_identity
from patchrank.model.loading import ModelSource
from patchrank.pruning import predictor, prompts
from patchrank.pruning.methods import ATTENTION, MERGING, PREDICTOR, TOKENS
from patchrank.pruning.predictor import Predictor, PredictorConfig
from patchrank.pruning.prompts import TokensConfig
from patchrank.report import folder as report
from patchrank.store import storage
from patchrank.store.folder import Folder
from patchrank.training.images import ImageSource, TrainingImages, open_images
from patchrank.training.tasks import PATCHES, PredictorTask, TokensTask

KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
PREDICTOR_RATE, TOKENS_RATE = 2e-3, 1e-2  # learning rates, for batches of 16
CHECKPOINTS = 4  # of each training, the last of which is measured
CACHED = 4e9  # bytes of features that are kept at most
MEASURED = 100  # held-out images that trainings look at, before and after, at most
EVALUATED = 1000  # that the evaluation looks at, at most
PER_SHARD = 1000  # samples of the shards that are made
MADE = "images.json"  # tells of what images shards were made


@dataclass(frozen=True)
class FitJob:
    """Everything that a fit is told; the flags of jobs/fit.py. Raises UserError for what makes no sense.

    Attributes:
        images: a folder of images, or shards as for a search.
    """

    images: Sequence[str]
    out: str = flag("bundle", "folder of the bundle (%(default)s)", group="images and output", metavar="FOLDER")
    work: str | None = flag(None, "what leads to it: local, s3:// or gs:// (OUT-work)", metavar="FOLDER")
    class_folders: bool = flag(False, "the folders in the folder of images are classes; measure top-1")
    held_out: float = flag(0.1, "of the images, to evaluate on and never to train on (%(default)s)", metavar="SHARE")
    model: ModelSource = group("model", ModelSource)
    keep: float = flag(0.6, "keep rate that the bundle is for (%(default)s)", group="training")
    samples_seen: int = flag(2400, "images to learn from, each of them as often as it takes (%(default)s)", metavar="N")
    batch: int = flag(16, "images that a worker takes in at a time (%(default)s)")
    tokens: int = flag(4, "learnable tokens; none are kept where held-out images lose more with them (%(default)s)")
    rankings: str | None = flag(None, "golden rankings of images among these, the first teacher", metavar="FOLDER")
    search: int | None = flag(None, "search golden rankings of N of the images first", metavar="N")
    seed: int = flag(0, "(%(default)s)")
    classes: ClassSource = group("classes, to measure top-1 (none)", ClassSource)
    machines: Workers = group("machines", Workers)

    def __post_init__(self) -> None:
        at_least(self, 1, "samples_seen", "batch", "search")
        at_least(self, 0, "tokens")
        for name in ("held_out", "keep"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name):g}: must be between 0 and 1")
        if "://" in self.out:
            raise UserError(f"--out {self.out}: must be a folder of this machine; --work may be in a bucket")
        if self.rankings and self.search:
            raise UserError("--rankings and --search exclude each other: choose one")
        if self.class_folders and self.classes.given:
            raise UserError("--class-folders: says what the classes are; leave out other flags that do")

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """To learn and to evaluate at, largest first."""
        return tuple(sorted({*KEEP_RATES, self.keep}, reverse=True))

    def place(self, name: str) -> str:
        """The folder of one step."""
        return storage.join(self.work or f"{self.out.rstrip('/')}-work", name)


class Fit:
    """A fit whose images are found, and in shards.

    Attributes:
        skipped: image files that this run left out of the shards.
        images: to learn from, with golden rankings once they are there.

    Raises:
        UserError: bad input, too few images, or a folder of work on other images.
    """

    def __init__(self, job: FitJob) -> None:
        if job.model.name is None:
            raise UserError("--model is needed: an open_clip name, or embedded for the model in this project")
        self.job = job
        self.skipped: list[Skipped] = []
        made = self._made()
        self._shards = shards.expand(job.images if made is None else [made])
        self.images = self._opened(job.rankings)
        if self.images.corpus is not None and self.images.corpus.settings["search"].get("score") == PATCHES:
            raise UserError(f"--rankings {job.rankings}: are of patches, and a fit is for embeddings; train_predictor")

    @property
    def begun(self) -> bool:
        """Whether an earlier run has begun to train."""
        return Folder(self.job.place("predictor"), "training").read() is not None

    def seconds(self) -> float:
        """About how long it takes, from some seconds of timing. Raises UserError as `run` does."""
        job, images = self.job, replace(self.images, features=None)
        searching = search_estimate.estimate(self._search(job.search)).seconds if job.search else 0.0
        untrained = Predictor(self._shape())
        found = estimate(self._tokens_task(images, untrained), self._training("tokens", TOKENS_RATE))
        # The predictor's training takes about as long, and the evaluation prunes in twice as many ways.
        held_out = images.everything.rows[1]
        share = min(held_out, EVALUATED) / min(held_out, MEASURED)
        return searching + 2 * found.seconds + 2 * share * found.evaluation_seconds

    def run(self, command: str) -> Record:
        """Do all of it that is not done yet; what held-out images say of it.

        Args:
            command: the command line that makes the report again, for its page.

        Raises:
            UserError: bad input; a folder of another job; a shard that cannot be read; a disk that is full.
            KeyboardInterrupt: Ctrl-C; the same call goes on from there.
        """
        job = self.job
        if job.search:
            searched = rank.search(self._search(job.search))
            _refuse(searched)
            self.images = self._opened(searched.folder)
        task = PredictorTask(self.images, keep_rates=job.keep_rates, config=self._shape(), keep=job.keep)
        train(task, self._training("predictor", PREDICTOR_RATE))
        learnt, _ = predictor.load(job.place("predictor"))
        train(self._tokens_task(self.images, learnt), self._training("tokens", TOKENS_RATE))
        summary = evaluate.run(self._evaluation())
        _refuse(summary)
        report.write(job.place("evaluation"), job.place("report"), command, job.keep)
        assert summary.record is not None  # the evaluation has come to its end
        return summary.record

    def _made(self) -> str | None:
        """The folder of the shards of a folder of images, which are made unless they are there; None of other input."""
        job = self.job
        folder = job.images[0]
        if not os.path.isdir(folder) or any(name.endswith(shards.SHARD_SUFFIXES) for name in os.listdir(folder)):
            if job.class_folders:
                raise UserError("--class-folders: goes with a folder of images; shards have labels, so give --classes")
            return None
        if len(job.images) > 1:
            raise UserError(f"{folder}: one folder of images at a time, or shards")
        out, names = job.place("shards"), None
        if not storage.is_local(out):
            raise UserError(f"--work {job.work}: images become shards in a folder of this machine alone; give shards")
        if job.class_folders:
            files, names = shard_writer.from_folders(folder)
        else:
            files = shard_writer.from_any_folder(folder)
        listed = [(file.path, _size(os.path.join(folder, file.path)), file.label) for file in files]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        about = json.dumps({"folder": os.path.abspath(folder), "images": len(files), "digest": digest}).encode()
        made = storage.join(out, MADE)
        if storage.exists(made):
            if storage.read_bytes(made) != about:
                raise UserError(f"{out}: was made of other images than are in {folder} now; give another --work")
            return out
        for name in os.listdir(out) if os.path.isdir(out) else []:
            storage.delete(storage.join(out, name))  # of a run that was stopped
        written = shard_writer.write(files, out, names, "shard", PER_SHARD)
        bar = tqdm(written, "shards", len(files), unit=" images", disable=not sys.stderr.isatty())
        self.skipped = [skipped for skipped in bar if skipped is not None]
        storage.write_atomic(made, about)
        return out

    def _opened(self, rankings: str | None) -> TrainingImages:
        job = self.job
        source = ImageSource(
            rankings=rankings,
            shards=self._shards,
            model=job.model.name,
            pretrained=job.model.pretrained,
            cut=None if job.search and rankings else job.model.cut,
            dtype=job.model.dtype,
            held_out=job.held_out,
            test=[],
            measured=MEASURED,
        )
        images, model = open_images(source, job.seed)
        self._reads_names = model.has_text
        if job.classes.class_names and not (job.classes.class_embeddings or job.classes.prototypes):
            text_identity(model, [], [])  # refuses a model without a text tower, before it is trained for
        images.everything.steps_per_epoch(1)  # refuses what cannot be trained on
        train_on, held_out = images.everything.rows
        if not held_out:
            raise UserError(
                f"{job.images[0]}: none of its {train_on} images would be held out to evaluate on; give more of them, "
                f"or a larger share than --held-out {job.held_out:g}"
            )
        size = train_on * images.tower.length * images.tower.width * 4  # bytes
        if size <= CACHED and job.samples_seen > train_on and storage.is_local(job.place("features")):
            images.features = job.place("features")
        return images

    def _shape(self) -> PredictorConfig:
        return PredictorConfig.of(self.images.tower)

    def _tokens_task(self, images: TrainingImages, learnt: Predictor) -> TokensTask:
        job = self.job
        tower = images.tower
        shifted = tower.adapter.depth - tower.cut
        config = TokensConfig(tower.width, job.tokens, shifted=shifted, scaled=True, merged=prompts.MERGED)
        return TokensTask(images, keep_rates=job.keep_rates, config=config, predictor=learnt, keep=job.keep)

    def _training(self, name: str, rate: float) -> TrainingConfig:
        job = self.job
        return TrainingConfig(
            out=job.place(name),
            epochs=job.samples_seen / 2 / self.images.everything.rows[0],
            batch=job.batch,
            learning_rate=rate,
            seed=job.seed,
            checkpoints=CHECKPOINTS,
            curve=False,
            machines=job.machines,
        )

    def _search(self, count: int) -> SearchJob:
        """The first images of every shard, as many of each."""
        job = self.job
        limit = -(-count // len(self._shards))
        out = job.place("rankings")
        return SearchJob(shards=self._shards, out=out, limit=limit, model=job.model, machines=job.machines)

    def _evaluation(self) -> EvaluationJob:
        job = self.job
        _, record = prompts.load(job.place("tokens"))
        learnt = [PREDICTOR] if TokensConfig(**record["config"]).nothing else [PREDICTOR, TOKENS]
        tower, held_out = self.images.tower, self.images.everything.rows[1]
        most = max(1, round(EVALUATED / job.held_out / len(self._shards)))  # samples of a shard
        classes, made = job.classes, job.place("shards")
        if job.class_folders:
            names, prototypes = storage.join(made, "classnames.json"), () if self._reads_names else (made,)
            classes = replace(classes, class_names=names, prototypes=prototypes)
        return EvaluationJob(
            shards=self._shards,
            out=job.place("evaluation"),
            limit=most if held_out > EVALUATED else None,
            held_out=job.held_out,
            model=EvaluatedModel(job.model.name, job.model.pretrained, dtype=job.model.dtype),
            pruning=Pruning(
                predictor=job.place("predictor"),
                tokens=job.place("tokens"),
                methods=[*learnt, *([ATTENTION] if tower.cut else []), *([] if tower.adapter.rotary else [MERGING])],
                keep_rates=job.keep_rates,
                save_bundle=job.out,
            ),
            classes=classes,
            timing=Timing((1, job.batch), (job.keep,)),
            machines=job.machines,
        )


def _size(path: str) -> int | None:
    """Bytes of a file; None where a link leads nowhere."""
    return os.path.getsize(path) if os.path.exists(path) else None


def _refuse(summary: rank.Summary) -> None:
    """Raises UserError for the first shard that failed."""
    for shard, reason in sorted(summary.failures.items()):
        raise UserError(f"{shard}: {reason}")
