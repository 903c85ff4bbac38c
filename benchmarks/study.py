"""Which choices of the trainings are right: the same images, equal multiply-adds, and figures of held-out images.

    python benchmarks/study.py study                                  # the embedded model and its images
    python benchmarks/study.py study --model ViT-B-16 --pretrained openai --shards 'photos-{0..3}.tar' --parts tokens
    python benchmarks/study.py study --show --plot docs/teachers.png  # the rows so far, and the picture of the teachers

teachers    what golden rankings add: --budgets times 374 steps of 16 images through the model, spent on such steps,
            on rankings of as many images as that pays for, golden or by gates, or half on these, which teach first
cuts        tokens leave before block 1, 2, 3 or 4, at as many multiply-adds; also golden, of --golden images a shard
predictors  the predictor's width, token mixing, layers and readout
tokens      how many learnable tokens stand beside the patches, and none without shifts
rates       which keep rates the training draws

Parts but the first take --steps steps a training; learnable tokens go on from the default predictor. A row is made by
the jobs, in STUDY/NAME, and kept in STUDY/NAME.json: stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from patchrank import assets
from patchrank.data import shards
from patchrank.errors import UserError, run
from patchrank.pruning.predictor import PredictorConfig
from patchrank.pruning.schedule import scheduled_multiply_adds
from patchrank.search import estimate
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher
from patchrank.tokens import count_kept
from patchrank.training import gating, outcome
from patchrank.training.images import ImageSource, TrainingImages, open_images

KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
PARTS = ("teachers", "cuts", "predictors", "tokens", "rates")
STEPS, BATCH = 374, 16  # of the budget 1
DEFAULT = "predictor"  # the row that learnable tokens go on from
JOBS = Path(__file__).parent.parent / "jobs"
QUERIES = {  # mean cosine by keep rate, of the tables that a job leaves
    "search": "SELECT avg(p.cosine) FROM (SELECT unnest(pruned) AS p FROM read_parquet(?)) "
    "GROUP BY p.keep ORDER BY p.keep DESC",
    "evaluate": "SELECT avg(cosine) FROM read_parquet(?) WHERE method = 'predictor' GROUP BY keep ORDER BY keep DESC",
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        jobs: name, flags, and the folder they write, one after the other; the figures are those of the last one.
        keep_rates: that are measured, KEEP_RATES or what costs as much.
        budget: how much was spent, of the teachers.
    """

    part: str
    name: str
    jobs: Sequence[tuple[str, Sequence[str], Path]]
    keep_rates: Sequence[float] = KEEP_RATES
    budget: float | None = None

    def figures(self) -> list[float]:
        """Mean cosines at the keep rates."""
        job, _, folder = self.jobs[-1]
        if job in QUERIES:
            return [cosine for (cosine,) in duckdb.execute(QUERIES[job], [f"{folder}/*.parquet"]).fetchall()]
        found = outcome.read(str(folder))
        assert found is not None
        end = " with tokens" if job == "train_tokens" else ""
        return [found[1][f"held-out/cosine at keep {keep:g}{end}"] for keep in self.keep_rates]


@dataclass
class Study:
    """What all rows share."""

    args: argparse.Namespace
    images: TrainingImages = field(init=False)

    def __post_init__(self) -> None:
        args = self.args
        source = ImageSource(None, args.shards, args.model, args.pretrained, test=[])
        self.images = open_images(source)[0]
        self.folder = Path(args.study)
        self.model = ["--model", args.model, *(["--pretrained", args.pretrained] if args.pretrained else [])]
        self.epoch = self.images.everything.steps_per_epoch(BATCH)

    def rows(self) -> Iterator[Row]:
        """Of the parts that are asked for."""
        parts, steps = self.args.parts, self.args.steps
        first = self.folder / DEFAULT
        default = self._train(DEFAULT, steps, [])
        if "teachers" in parts:
            for budget in self.args.budgets:
                yield from self._teachers(budget)
        if "cuts" in parts:
            yield from self._cuts()
        if {"predictors", "tokens"} & set(parts):
            yield Row("predictors", DEFAULT, [default])
        if "predictors" in parts:
            shape = PredictorConfig.of(self.images.tower)
            assert shape.width is not None and shape.mixing is not None
            for name, flags in {
                "one layer": ["--layers", "1"],
                "three layers": ["--layers", "3"],
                "no readout": ["--no-readout"],
                "half the width": ["--width", str(shape.width // 2)],
                "twice the width": ["--width", str(2 * shape.width)],
                "twice the mixing": ["--mixing", str(2 * shape.mixing)],
                "no class token": ["--no-class-token"],
            }.items():
                yield Row("predictors", name, [self._train(name, steps, flags)])
        if "tokens" in parts:
            for count in (0, 1, 2, 4, 8, 16):
                flags = ["--tokens", str(count), "--merged", "0", "--predictor", str(first)]
                yield Row("tokens", f"{count} tokens", [self._train(f"{count} tokens", steps, flags, "train_tokens")])
            flags = ["--no-shifts", "--merged", "0", "--predictor", str(first)]
            yield Row("tokens", "4, no shifts", [self._train("4, no shifts", steps, flags, "train_tokens")])
        if "rates" in parts:
            for name, rates in {
                "0.6 alone": (0.6,),
                "0.7 and 0.5": (0.7, 0.5),
                "0.9 to 0.3": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
            }.items():
                yield Row("rates", name, [self._train(name, steps, [], rates=rates), self._evaluate(name)])

    def _train(
        self,
        name: str,
        steps: int,
        flags: Sequence[str],
        job: str = "train_predictor",
        rates: Sequence[float] = KEEP_RATES,
        golden: Path | None = None,
    ) -> tuple[str, list[str], Path]:
        out = self.folder / name
        rate = 1e-2 if job == "train_tokens" else 2e-3
        wanted = ["--rankings", "none" if golden is None else str(golden), "--shards", *self.args.shards, *self.model]
        wanted += ["--keep-rates", *map(str, rates), "--batch", str(BATCH), "--epochs", str(steps / self.epoch)]
        wanted += ["--learning-rate", str(rate), "--checkpoints", "1", "--test", "--measured", str(self.args.measured)]
        wanted += ["--cache-features", str(self.folder / "features"), "--dtype", self.args.dtype]
        return job, [*wanted, "--out", str(out), *flags], out

    def _teachers(self, budget: float) -> Iterator[Row]:
        tower = self.images.tower
        a_step = BATCH * sum(self._through(count_kept(tower.num_tokens, keep)) for keep in KEEP_RATES) / len(KEEP_RATES)
        everything = budget * STEPS * a_step
        there = math.ceil(sum(self.images.everything.rows) / len(self.args.shards))
        name = f"through the model, {budget:g}"
        yield Row("teachers", name, [self._train(name, round(budget * STEPS), [])], budget=budget)
        for search, rank_by in (("golden", "effects"), ("by gates", "gates")):
            a_ranking = estimate.multiply_adds(Searcher(tower, SearchConfig(rank_by=rank_by)))
            for name, share in ((f"{search} alone", 1.0), (f"{search}, then through the model", 0.5)):
                each = max(1, min(there, int(share * everything / a_ranking / len(self.args.shards))))  # images a shard
                left = everything - each * len(self.args.shards) * a_ranking
                steps = round(budget * STEPS) if share == 1 else 2 * max(1, round(left / a_step))
                searched = self._search(f"{search}, {each} a shard", each, ["--rank-by", rank_by])
                flags = ["--golden", str(share)]
                job = self._train(f"{name}, {budget:g}", steps, flags, golden=searched[2])
                yield Row("teachers", f"{name}, {budget:g}", [searched, job], budget=budget)

    def _cuts(self) -> Iterator[Row]:
        tower = self.images.tower
        adapter, tokens = tower.adapter, tower.num_tokens
        for cut in range(1, min(5, adapter.depth)):
            rates = []
            for keep in KEEP_RATES:
                limit = scheduled_multiply_adds(adapter, {tower.cut: count_kept(tokens, keep)})
                kept = next((m for m in range(tokens, 0, -1) if scheduled_multiply_adds(adapter, {cut: m}) <= limit), 0)
                rates.append(round(kept / tokens, 4))
            if not all(rates):
                continue  # the blocks before it cost more than all may
            flags = ["--cut", str(cut)]
            job = self._train(f"cut {cut}", self.args.steps, flags, rates=rates)
            yield Row("cuts", f"cut {cut}", [job], rates)
            search = self._search(
                f"cut {cut}, golden", self.args.golden, [*flags, "--keep-rates", *map(str, rates), "--keep", "0.3"]
            )
            yield Row("cuts", f"cut {cut}, golden", [search], rates)

    def _search(self, name: str, limit: int, flags: Sequence[str] = ()) -> tuple[str, list[str], Path]:
        out = self.folder / name
        wanted = ["--shards", *self.args.shards, *self.model, "--limit", str(limit), "--dtype", self.args.dtype]
        return "search", [*wanted, "--out", str(out), *flags], out

    def _evaluate(self, name: str) -> tuple[str, list[str], Path]:
        """At KEEP_RATES, of a predictor that learnt others."""
        out = self.folder / f"{name}, evaluated"
        wanted = ["--shards", *self.args.shards, *self.model, "--held-out", "0.1", "--dtype", self.args.dtype]
        wanted += ["--predictor", str(self.folder / name), "--methods", "predictor", "--batch-sizes"]
        return "evaluate", [*wanted, "--keep-rates", *map(str, KEEP_RATES), "--out", str(out)], out

    def _through(self, kept: int) -> int:
        """Multiply-adds of an image in a step through the model, forwards and backwards."""
        tower = self.images.tower
        there = min(tower.num_tokens, kept + round(gating.NEXT * tower.num_tokens))
        return tower.suffix_multiply_adds(there) + tower.derivative_multiply_adds(there)


def make(row: Row, kept: Path) -> None:
    """Make a row by its jobs, and keep it. Raises UserError where one of them fails, whose own message stands above."""
    for job, flags, folder in row.jobs:
        print(f"--- {row.part}, {row.name}: jobs/{job}.py", flush=True)
        if job != "search" and outcome.read(str(folder)) is not None:
            continue
        code = subprocess.run([sys.executable, str(JOBS / f"{job}.py"), *flags], check=False).returncode
        if code:
            raise UserError(f"jobs/{job}.py for {folder} ended with exit code {code}; the same command goes on there")
    told = {name: value for name, value in asdict(row).items() if name != "jobs"}
    kept.write_text(json.dumps({**told, "cosine": row.figures()}) + "\n")


def show(study: Path, plot: str | None) -> None:
    """Print the rows that are kept, and draw the teachers."""
    paths = sorted(study.glob("*.json"), key=lambda path: path.stat().st_mtime)
    found = [json.loads(path.read_text()) for path in paths]
    for part in PARTS:
        rows = [row for row in found if row["part"] == part]
        if rows:
            print(f"\n{part:<38}" + "".join(f"  keep {keep:g}" for keep in KEEP_RATES))
        for row in rows:
            print(f"{row['name']:<38}" + "".join(f"  {cosine:8.4f}" for cosine in row["cosine"]))
            if row["keep_rates"] != list(KEEP_RATES):
                print(f"{'  at the cost of these, keep':<38}" + "".join(f"  {keep:8.3f}" for keep in row["keep_rates"]))
    if plot:
        draw([row for row in found if row["part"] == "teachers"], plot)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """What is lost against what was spent, at keep 0.6 and 0.4, a line a teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = sorted({row["budget"] for row in rows})
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for panel, keep in zip(panels, (0.6, 0.4), strict=True):
        for teacher in dict.fromkeys(row["name"].rpartition(",")[0] for row in rows):
            mine = [row for row in rows if row["name"].startswith(f"{teacher},")]
            lost = [1 - row["cosine"][KEEP_RATES.index(keep)] for row in mine]
            panel.plot([row["budget"] for row in mine], lost, marker="o", label=teacher)
        panel.set(
            xscale="log",
            yscale="log",
            title=f"keep {keep:g}",
            xlabel="multiply-adds, of 374 steps through the model",
            ylabel="1 - cosine",
        )
        panel.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        panel.set_xticks([], minor=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    print(path)


def main() -> int:
    """Parse, make what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="folder of the rows")
    parser.add_argument("--model", default="embedded", help="as for jobs/search.py (%(default)s)")
    parser.add_argument("--pretrained", metavar="TAG", help="as for jobs/search.py")
    parser.add_argument("--shards", nargs="+", default=assets.TRAIN_SHARDS, help="to learn from (the embedded ones)")
    parser.add_argument("--dtype", default="auto", help="as for jobs/search.py (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.25, 1, 4), help="of the teachers (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of the other parts (%(default)s)")
    parser.add_argument("--golden", type=int, default=4, metavar="N", help="images a shard, by cut (%(default)s)")
    parser.add_argument(
        "--measured", type=int, default=1000, metavar="N", help="held-out images, at most (%(default)s)"
    )
    parser.add_argument("--show", action="store_true", help="train nothing")
    parser.add_argument("--plot", metavar="FILE", help="draw the teachers")
    args = parser.parse_args()
    args.shards = shards.expand(args.shards)
    folder = Path(args.study)
    if not args.show:
        folder.mkdir(parents=True, exist_ok=True)
        for row in Study(args).rows():
            kept = folder / f"{row.name}.json"
            if not kept.exists():
                make(row, kept)
    show(folder, args.plot)
    return 0


if __name__ == "__main__":
    run(main)
