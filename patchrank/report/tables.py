"""The tables of a report: what stands in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchrank.evaluation.record import RECALLS, Figure
from patchrank.pruning.methods import UNPRUNED
from patchrank.report.evaluation import Evaluation, in_order, method_name, same, unit

NONE, TIMES, MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
_CLASSES = 12  # rows of the class table that are not folded


def percent(share: float | None, images: int) -> str:
    """A share in percent, with as many digits as so many images bear out."""
    return NONE if share is None else f"{100 * share:.{1 if images < 5000 else 2}f}"


def number(value: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Attributes:
        caption: what it shows; also what a screen reader calls it.
        head, rows: the first cell of a row names it, the others are numbers.
        marked: rows to set apart.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


def matrix(evaluation: Evaluation, what: str) -> Table:
    """One figure, "top1" or "cosine", by method and keep rate; the unpruned model for comparison."""

    def cell(one: Figure | None) -> str:
        if one is None:
            return NONE
        return percent(one.top1, one.images) if what == "top1" else number(one.cosine, 4)

    rates = evaluation.keep_rates
    rows = [
        [method_name(method), *(cell(evaluation.figure(method, rate)) for rate in rates)]
        for method in evaluation.methods
    ]
    if what == "top1":
        rows.insert(0, [method_name(UNPRUNED), *[cell(evaluation.unpruned)] * len(rates)])
        caption = "Top-1 accuracy in percent, by keep rate"
    else:
        caption = "Mean cosine to the unpruned embedding, by keep rate"
    return Table(caption, ["", *(f"{rate:g}" for rate in rates)], rows)


def figures(evaluation: Evaluation) -> Table:
    """All figures, those of one keep rate together."""
    scale, letter = unit(evaluation)
    whole = evaluation.unpruned
    picked = [whole] if whole else []
    for rate in evaluation.keep_rates:
        picked += [one for method in evaluation.methods if (one := evaluation.figure(method, rate))]
    starts = [index for index, one in enumerate(picked) if index and not same(one.keep, picked[index - 1].keep)]
    head = ["Method", "Keep rate", "Images", "Top-1 %", "Top-5 %", "Cosine", "Matching %", f"{letter} multiply-adds"]
    rows = [
        [
            *(method_name(one.method), f"{one.keep:g}", f"{one.images:,}"),
            *(percent(one.top1, one.images), percent(one.top5, one.images), number(one.cosine, 4)),
            *(percent(one.matching, one.images), number(one.multiply_adds / scale, 2)),
        ]
        for one in picked
    ]
    return Table("All figures, by keep rate and method", head, rows, marked=starts)


def speedups(evaluation: Evaluation) -> Table:
    """Measured speed-up by method, batch and keep rate."""
    measured = {(one.method, one.batch, one.keep): one for one in evaluation.latency if one.method != UNPRUNED}
    rates = sorted({keep for _, _, keep in measured}, reverse=True)
    order = in_order({method for method, _, _ in measured})
    rows, batches = [], []
    for batch, method in sorted({(batch, order.index(method)) for method, batch, _ in measured}):
        found = [measured.get((order[method], batch, rate)) for rate in rates]
        cells = [NONE if one is None else f"{one.speedup:.2f}{TIMES}" for one in found]
        rows.append([method_name(order[method]), f"{batch:,}", *cells])
        batches.append(batch)
    starts = [index for index in range(1, len(rows)) if batches[index] != batches[index - 1]]
    caption = f"Measured speed-up over the unpruned model by batch and keep rate, on {evaluation.device}"
    return Table(caption, ["", "Batch", *(f"{rate:g}" for rate in rates)], rows, marked=starts)


def latency(evaluation: Evaluation) -> Table:
    """Milliseconds a batch and speed-ups, measured and expected."""
    order = in_order({one.method for one in evaluation.latency})
    lines = sorted(evaluation.latency, key=lambda one: (one.batch, -one.keep, order.index(one.method)))
    groups = [(one.batch, one.keep) for one in lines]
    starts = [index for index in range(1, len(lines)) if groups[index] != groups[index - 1]]
    head = [
        "Method",
        "Keep rate",
        "Batch",
        "ms a batch",
        "Unpruned, ms",
        "Images a second",
        "Speed-up",
        "By multiply-adds",
    ]
    rows = [
        [
            *(method_name(one.method), f"{one.keep:g}", f"{one.batch:,}"),
            *(f"{1000 * one.seconds:.2f}", f"{1000 * one.unpruned_seconds:.2f}"),
            f"{one.batch / one.seconds:,.0f}" if one.seconds > 0 else NONE,
            *(f"{one.speedup:.2f}{TIMES}", NONE if one.predicted is None else f"{one.predicted:.2f}{TIMES}"),
        ]
        for one in lines
    ]
    return Table(f"Latency on {evaluation.device}", head, rows, marked=starts)


def retrieval(evaluation: Evaluation) -> Table:
    """Recall of captions by image and of images by caption."""
    order = in_order({one.method for one in evaluation.retrieval})
    lines = sorted(evaluation.retrieval, key=lambda one: (-one.keep, order.index(one.method)))
    ways = [f"{way} at\N{NO-BREAK SPACE}{k}" for way in ("Image to text", "Text to image") for k in RECALLS]
    rows = [
        [
            *(method_name(one.method), f"{one.keep:g}", f"{one.images:,}", f"{one.captions:,}"),
            *(percent(way.get(k), one.images) for way in (one.image_to_text, one.text_to_image) for k in RECALLS),
        ]
        for one in lines
    ]
    head = ["Method", "Keep rate", "Images", "Captions", *ways]
    starts = [index for index, one in enumerate(lines) if index and not same(one.keep, lines[index - 1].keep)]
    return Table("Retrieval, recall in percent", head, rows, marked=starts)


def neighbours(evaluation: Evaluation) -> Table:
    """How many of the nearest neighbours stay, in indexes of pruned embeddings and of others."""
    order = in_order({one.method for one in evaluation.neighbours})
    lines = sorted(evaluation.neighbours, key=lambda one: (-one.keep, order.index(one.method)))
    rows = []
    for one in lines:
        shares = (one.pruned_queries, one.pruned_index, one.pruned, one.mixed)
        firsts = (one.first_by_pruned_queries, one.first_in_pruned_index)
        cells = (percent(share, one.images) for share in (*shares, *firsts))
        rows.append([method_name(one.method), f"{one.keep:g}", *cells])
    pruned = ("queries", "the index", "both", "half the index")
    head = ["Pruned:", "Keep rate", *pruned, "queries, recall at 1", "the index, recall at 1"]
    starts = [index for index, one in enumerate(lines) if index and not same(one.keep, lines[index - 1].keep)]
    first = evaluation.neighbours[0]
    caption = f"Share of the {first.nearest} nearest neighbours among {first.images:,} images that stay, in percent"
    return Table(caption, head, rows, marked=starts)


def classes(evaluation: Evaluation, keep: float, leading: str) -> list[Table]:
    """Top-1 accuracy by class at a keep rate, the classes first that lose most by the leading method.

    Returns:
        The first rows, and the others, if there are more; nothing where no class has an accuracy at this keep rate.
    """
    at: dict[int, dict[str, float]] = {}
    about: dict[int, tuple[str, int]] = {}
    for one in evaluation.classes:
        if one.top1 is not None and (one.method == UNPRUNED or same(one.keep, keep)):
            at.setdefault(one.label, {})[one.method] = one.top1
            about[one.label] = one.name, one.images
    methods = in_order({method for found in at.values() for method in found})
    pruned = [method for method in methods if method != UNPRUNED]
    if not pruned:
        return []
    leading = leading if leading in pruned else pruned[0]

    def change(label: int) -> float | None:
        found = at[label]
        return found[leading] - found[UNPRUNED] if leading in found and UNPRUNED in found else None

    def place(label: int) -> tuple[float, int]:
        lost = change(label)
        return (at[label].get(leading, 1.0) if lost is None else lost - 1, label)  # known losses before the others

    rows = []
    for label in sorted(at, key=place):
        name, images = about[label]
        lost = change(label)
        signed = NONE if lost is None else f"{100 * lost:+.1f}".replace("-", MINUS).replace("+0.0", "0.0")
        rows.append([name, f"{images:,}", signed, *(percent(at[label].get(method), images) for method in methods)])
    head = ["Class", "Images", "Change", *(method_name(method) for method in methods)]
    caption = f"Top-1 accuracy in percent by class at keep rate {keep:g}"
    first = f"{caption}, and its change by {method_name(leading).lower()}: largest losses first"
    found = [Table(first, head, rows[:_CLASSES]), Table(f"{caption}, the others", head, rows[_CLASSES:])]
    return [one for one in found if one.rows]
