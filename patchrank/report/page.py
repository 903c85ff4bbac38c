"""The HTML page of a report. Whatever comes from files is escaped; nothing is loaded from elsewhere, and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from patchrank.evaluation.neighbours import sentence
from patchrank.pruning.methods import GOLDEN, UNPRUNED
from patchrank.report import tables
from patchrank.report.charts import Chart
from patchrank.report.evaluation import Evaluation, counted, in_order, method_name, same, unit
from patchrank.report.gallery import GONE, SCALE, Gallery, heat, veil

_LISTED = 20  # shards named on the page


def render(
    evaluation: Evaluation, keep: float, leading: str, charts: Sequence[Chart], gallery: Gallery, command: str
) -> str:
    """The page.

    Args:
        keep: the keep rate of the class table and the gallery.
        leading: the method that the figures at the top are of.
        command: the command line that makes the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("patchrank.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    for function in (heat, veil, method_name):
        environment.filters[function.__name__] = function
    environment.filters |= {"some": counted, "svg": _svg, "in_order": lambda methods: in_order(set(methods))}
    shown = {(one.shard, one.key): one for one in (*gallery.sample, *(gallery.changed or ()))}
    return environment.get_template("page.html").render(
        evaluation=evaluation,
        keep=f"{keep:g}",
        rates=", ".join(f"{rate:g}" for rate in evaluation.keep_rates),
        leading=leading,
        tiles=_tiles(evaluation, keep, leading),
        charts=charts,
        labelled=evaluation.unpruned.labelled if evaluation.unpruned else 0,
        tables=tables,
        shared=next((sentence(one) for one in evaluation.neighbours if (one.method, one.keep) == (leading, keep)), ""),
        classes=tables.classes(evaluation, keep, leading),
        gallery=gallery,
        shown=shown.values(),
        pictures={place: f"p{number}" for number, place in enumerate(shown)},
        tokens=evaluation.model.grid[0] * evaluation.model.grid[1],
        gone=GONE,
        scale=SCALE,
        golden=GOLDEN,
        unpruned=UNPRUNED,
        facts=_facts(evaluation),
        command=command,
    )


def _tiles(evaluation: Evaluation, keep: float, leading: str) -> list[tuple[str, str]]:
    """The figures at the top: what each is, and its value."""
    one, whole = evaluation.figure(leading, keep), evaluation.unpruned
    if one is None:
        return []
    scale, letter = unit(evaluation)
    tiles = []
    if one.top1 is not None:
        than = f", unpruned {tables.percent(whole.top1, whole.images)} %" if whole else ""
        tiles.append((f"top-1 accuracy{than}", f"{tables.percent(one.top1, one.images)} %"))
    if one.cosine is not None:
        tiles.append(("mean cosine to the unpruned embedding", f"{one.cosine:.4f}"))
    than = f", of {whole.multiply_adds / scale:.2f}" if whole else ""
    tiles.append((f"{letter} multiply-adds an image{than}", f"{one.multiply_adds / scale:.2f}"))
    timed = [time for time in evaluation.latency if time.method == leading and same(time.keep, keep)]
    if timed:
        time = max(timed, key=lambda time: time.batch)
        tiles.append((f"measured speed-up, batches of {time.batch}", f"{time.speedup:.2f}{tables.TIMES}"))
    return tiles


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What the report is about: a name and a value each."""
    model = evaluation.model
    names = evaluation.shards[:_LISTED]
    more = len(evaluation.shards) - len(names)
    return [
        ("Model", model.name),
        ("Weights", f"{model.pretrained or 'its own'} (digest {model.weights})"),
        ("Tokens", f"{model.grid[0]} {tables.TIMES} {model.grid[1]} patches, leaving before block {model.cut}"),
        ("Number format", model.dtype),
        ("Device", evaluation.device),
        ("Images", f"{evaluation.images:,}"),
        ("Shards", ", ".join(names) + (f" and {more:,} more" if more else "")),
        ("Golden rankings", evaluation.rankings or "none"),
        ("Evaluation", evaluation.folder),
    ]


def _svg(data: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"
