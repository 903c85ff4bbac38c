"""The charts of a report, by matplotlib: for a light page, for a dark one, and as PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from patchrank.errors import UserError
from patchrank.evaluation.record import Figure
from patchrank.pruning.methods import METHODS, UNPRUNED
from patchrank.report.evaluation import Evaluation, method_name, unit

NAMES = (
    *("top1-by-multiply-adds", "top1-by-keep", "cosine-by-multiply-adds", "cosine-by-keep"),
    *("speedup-by-keep", "cosine-by-speedup"),
)
_SIZE = (4.7, 4.3)  # inches, so that the text is legible on a phone, and on a laptop no larger than that of the page
_KEEP = "keep rate"
_ACCURACY, _COSINE = "top-1 accuracy, %", "mean cosine to the unpruned embedding"
_Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart in three renderings.

    Attributes:
        name: of its file, without extension; one of `NAMES`.
        title, note, alt: a heading, a sentence below it, and the chart in words and numbers.
        light, dark: SVG for a page of that scheme, on a transparent ground.
        png: on white, with its title.
    """

    name: str
    title: str
    note: str
    alt: str
    light: bytes
    dark: bytes
    png: bytes


@dataclass
class _Plot:
    """What to draw: lines by method, all in the units of the axes."""

    name: str
    title: str
    note: str
    x: str
    y: str
    digits: int  # of y, in words
    lines: dict[str, _Points]
    expected: dict[str, _Points] = field(default_factory=dict)  # thin lines beside them
    level: float | None = None  # of the unpruned model
    at: float | None = None  # its place on the x axis, if it has one
    ticks: list[float] = field(default_factory=list)  # of the x axis; none: as matplotlib likes


@dataclass(frozen=True)
class _Scheme:
    text: str
    muted: str
    grid: str
    dark: bool = False

    def colour(self, method: str) -> str | None:
        """Of a method's line; None where it is not known."""
        if method not in METHODS:
            return None
        return (METHODS[method].dark if self.dark else None) or METHODS[method].colour


_LIGHT = _Scheme(text="#1d2126", muted="#5b636d", grid="#e4e7eb")
_DARK = _Scheme(text="#e8eaed", muted="#a3abb5", grid="#2c3238", dark=True)
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


def draw(evaluation: Evaluation) -> list[Chart]:
    """All charts that the evaluation has the figures for.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the report's charts need matplotlib; run: pip install matplotlib") from None
    # The same bytes for the same figures; text as text, and a dollar sign as itself.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "patchrank", "text.parse_math": False}):
        return [_render(plot) for plot in _plots(evaluation)]


def _plots(evaluation: Evaluation) -> Iterable[_Plot]:
    whole = evaluation.unpruned
    scale, letter = unit(evaluation)
    cost = f"{letter} multiply-adds an image"
    level = whole.top1 * 100 if whole and whole.top1 is not None else None
    place = whole.multiply_adds / scale if whole else None
    ticks = evaluation.keep_rates if len(evaluation.keep_rates) <= 8 else []

    def lines(x: Callable[[Figure], float], y: Callable[[Figure], float | None]) -> dict[str, _Points]:
        found = {}
        for method in evaluation.methods:
            mine = [one for one in evaluation.figures if one.method == method]
            points = [(x(one), value) for one in mine if (value := y(one)) is not None]
            if points:
                found[method] = sorted(points)
        return found

    def by_cost(one: Figure) -> float:
        return one.multiply_adds / scale

    def by_keep(one: Figure) -> float:
        return one.keep

    def percent(one: Figure) -> float | None:
        return None if one.top1 is None else 100 * one.top1

    def cosine(one: Figure) -> float | None:
        return one.cosine

    against_cost = partial(_Plot, note="The star and the dotted line are the unpruned model.", x=cost, at=place)
    against_keep = partial(_Plot, x=_KEEP, ticks=ticks)
    if evaluation.labelled:
        yield against_cost(
            name="top1-by-multiply-adds",
            title="Accuracy against cost",
            y=_ACCURACY,
            digits=1,
            lines=lines(by_cost, percent),
            level=level,
        )
        yield against_keep(
            name="top1-by-keep",
            title="Accuracy against keep rate",
            note="The dotted line is the unpruned model.",
            y=_ACCURACY,
            digits=1,
            lines=lines(by_keep, percent),
            level=level,
        )
    else:
        yield against_cost(
            name="cosine-by-multiply-adds",
            title="Cosine against cost",
            y=_COSINE,
            digits=4,
            lines=lines(by_cost, cosine),
            level=1.0,
        )
    yield against_keep(
        name="cosine-by-keep",
        title="Cosine against keep rate",
        note="1 would be the embedding of the unpruned model.",
        y=_COSINE,
        digits=4,
        lines=lines(by_keep, cosine),
    )
    measured = [one for one in evaluation.latency if one.method != UNPRUNED]
    if measured:
        batch = max(one.batch for one in measured)
        speed: dict[str, _Points] = {}
        expected: dict[str, _Points] = {}
        for one in measured:
            if one.batch == batch:
                speed.setdefault(one.method, []).append((one.keep, one.speedup))
                if one.predicted is not None:
                    expected.setdefault(one.method, []).append((one.keep, one.predicted))
        yield against_keep(
            name="speedup-by-keep",
            title="Speed-up against keep rate",
            note=f"On batches of {batch}; thin lines: by multiply-adds alone.",
            y="speed-up over the unpruned model, times",
            digits=2,
            lines={method: sorted(speed[method]) for method in evaluation.methods if method in speed},
            expected={method: sorted(points) for method, points in expected.items()},
            level=1.0,
        )
        kept = {(one.method, one.keep): one.cosine for one in evaluation.figures}
        yield _Plot(
            name="cosine-by-speedup",
            title="Cosine against measured speed",
            note=f"On batches of {batch}; up and to the right is better.",
            x="speed-up over the unpruned model, times",
            y=_COSINE,
            digits=4,
            lines={
                method: sorted((faster, near) for keep, faster in speed[method] if (near := kept.get((method, keep))))
                for method in evaluation.methods
                if method in speed
            },
        )


def _render(plot: _Plot) -> Chart:
    return Chart(
        name=plot.name,
        title=plot.title,
        note=plot.note,
        alt=_in_words(plot),
        light=_svg(plot, _LIGHT),
        dark=_svg(plot, _DARK),
        png=_save(_figure(plot, _LIGHT, plot.title), "png"),
    )


def _in_words(plot: _Plot) -> str:
    """An alternative text: what the axes are, and where each line begins and ends."""
    parts = [f"Line chart of {plot.y} against {plot.x}."]
    if plot.level is not None:
        parts.append(f"Unpruned: {plot.level:.{plot.digits}f}.")
    for method, points in plot.lines.items():
        (x, y), (last_x, last_y) = points[-1], points[0]
        end = f", {last_y:.{plot.digits}f} at {last_x:.4g}" if len(points) > 1 else ""
        parts.append(f"{method_name(method)}: {y:.{plot.digits}f} at {x:.4g}{end}.")
    return " ".join(parts)


def _figure(plot: _Plot, scheme: _Scheme, title: str | None = None) -> Any:
    from matplotlib.figure import Figure as Canvas  # not pyplot, which keeps its figures and wants a display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Canvas(figsize=_SIZE, layout=ConstrainedLayoutEngine(h_pad=0.09))
    axis = figure.add_subplot()
    spare = iter(("#56B4E9", "#F0E442", "#b07d62") * len(plot.lines))
    for method, points in plot.lines.items():
        marker, dashes = (METHODS[method].marker, METHODS[method].dashes) if method in METHODS else ("P", "-")
        colour = scheme.colour(method) or next(spare)
        x, y = zip(*points, strict=True)
        axis.plot(
            x,
            y,
            color=colour,
            marker=marker,
            linestyle=dashes,
            linewidth=1.8,
            markersize=5.5,
            markeredgecolor="none",
            label=method_name(method),
            zorder=3,
            clip_on=False,
        )
        if method in plot.expected:
            axis.plot(*zip(*plot.expected[method], strict=True), color=colour, linewidth=0.8, alpha=0.75, zorder=2)
    if plot.level is not None:
        axis.axhline(plot.level, color=scheme.muted, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
        if plot.at is not None:
            axis.plot([plot.at], [plot.level], "*", color=scheme.text, markersize=11, zorder=4, label="Unpruned")
    axis.margins(0.06, 0.08)
    axis.ticklabel_format(useOffset=False)
    if plot.ticks:
        axis.set_xticks(plot.ticks, [f"{tick:g}" for tick in plot.ticks])
    axis.set_xlabel(plot.x, color=scheme.muted, fontsize=9.5, labelpad=6)
    # Above the axis it is read without turning the head, and takes nothing from the width of a phone.
    axis.set_title(plot.y, loc="left", color=scheme.muted, fontsize=9.5, pad=10)
    axis.grid(True, axis="y", color=scheme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=scheme.muted, labelsize=9.5, length=0, pad=5)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(scheme.muted)
        spine.set_linewidth(0.8)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        labelcolor=scheme.text,
        handlelength=2.6,
        columnspacing=1.4,
        borderpad=0.2,
    )
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold", color=scheme.text)
    return figure


def _svg(plot: _Plot, scheme: _Scheme) -> bytes:
    """The chart with its text as text, in the fonts of the page: small, and sharp at any size."""
    svg = _save(_figure(plot, scheme), "svg").decode()
    svg = svg[svg.index("<svg") :]  # the XML declaration and the address of a DTD serve nobody inside a page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'font-family: [^;"]*', f"font-family: {_FONTS}", svg).encode()


def _save(figure: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    figure.savefig(buffer, format=form, dpi=160, transparent=form == "svg", metadata=metadata)
    return buffer.getvalue()
