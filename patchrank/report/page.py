"""The HTML page of a report. Whatever comes from files is escaped; nothing is loaded from elsewhere, and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from patchrank.report import tables
from patchrank.report.charts import Chart
from patchrank.report.data import UNPRUNED, Evaluation, in_order, method_name, same, unit
from patchrank.report.gallery import GONE, KEPT, SCALE, Gallery, Shown, heat, veil
from patchrank.report.style import STYLE

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
    pictures = _Pictures()
    sections = [
        ("charts", "Charts", _charts(charts)),
        ("figures", "Figures", _figures(evaluation)),
        ("latency", "Latency", _latency(evaluation) if evaluation.latency else ""),
        ("retrieval", "Retrieval", tables.retrieval(evaluation) if evaluation.retrieval else ""),
        ("classes", "Classes", tables.classes(evaluation, keep, leading) or ""),
        ("images", "What stays of an image", _sample(evaluation, keep, gallery, pictures)),
        ("changed", "Where pruning changes the answer", _changed(evaluation, keep, gallery, pictures)),
        ("about", "About this report", _about(evaluation, command)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section><h2 id="{name}">{title}</h2>{content}</section>' for name, title, content in sections)
    model, images, shards = evaluation.model.title, _some(evaluation.images, "image"), _some(evaluation.shards, "shard")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Even a mistake in here loads nothing from anywhere.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape(model)} pruned: {images} of {shards}</title>"
        f"<style>{STYLE}{pictures.style()}</style></head>\n<body><main><header>"
        f"<h1>Pruning {escape(model)}</h1>"
        f'<p class="lead">{escape(_lead(evaluation))}</p>{_tiles(evaluation, keep, leading)}<nav>{links}</nav></header>'
        f"\n{body}\n</main></body></html>\n"
    )


class _Pictures:
    """The images, each in the page once: the panels of an image share it as their background."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}
        self._rules: list[str] = []

    def name(self, one: Shown) -> str:
        """The class of an element that shows the image."""
        if (one.shard, one.key) not in self._names:
            name = f"p{len(self._rules)}"
            self._names[one.shard, one.key] = name
            size = f"aspect-ratio:{one.size[0]}/{one.size[1]}"
            self._rules.append(f".{name}{{{size}}}.{name}.seen{{background-image:url({one.picture})}}")
        return self._names[one.shard, one.key]

    def style(self) -> str:
        """The rules of those classes."""
        return "\n".join(self._rules)


def _lead(evaluation: Evaluation) -> str:
    rates = ", ".join(f"{rate:g}" for rate in evaluation.keep_rates)
    methods = _some(evaluation.methods, "way")
    return (
        f"What is left of the image tower on {_some(evaluation.images, 'image')} of "
        f"{_some(evaluation.shards, 'shard')} when patch tokens leave before block "
        f"{evaluation.model.cut}: {methods} of choosing those that stay, "
        f"at keep rates {rates}."
    )


def _tiles(evaluation: Evaluation, keep: float, leading: str) -> str:
    one, whole = evaluation.figure(leading, keep), evaluation.unpruned
    if one is None:
        return ""
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
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<p class="over">{escape(method_name(leading))} at keep rate {keep:g}</p><dl class="tiles">{items}</dl>'


def _charts(charts: Sequence[Chart]) -> str:
    def uri(svg: bytes) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    return '<div class="charts">{}</div>'.format(
        "".join(
            f'<figure><h3>{escape(chart.title)}</h3><p class="note">{escape(chart.note)}</p><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{uri(chart.dark)}">'
            f'<img src="{uri(chart.light)}" alt="{escape(chart.alt)}" width="470" height="430"></picture></figure>'
            for chart in charts
        )
    )


def _figures(evaluation: Evaluation) -> str:
    both = (["top1"] if evaluation.labelled else []) + ["cosine"]
    labelled = evaluation.unpruned.labelled if evaluation.unpruned else 0
    note = ""
    if not evaluation.labelled:
        note = "There were no labels or no class embeddings, so accuracy is not known."
    elif labelled < evaluation.images:
        note = f"Accuracy is that of the {labelled:,} images that have a label."
    text = f'<p class="note">{note}</p>' if note else ""
    return (
        f'{text}<div class="pair">{"".join(tables.matrix(evaluation, what) for what in both)}</div>'
        f"{tables.folded('All figures', tables.figures(evaluation))}"
    )


def _latency(evaluation: Evaluation) -> str:
    return tables.speedups(evaluation) + tables.folded("All times", tables.latency(evaluation))


def _sample(evaluation: Evaluation, keep: float, gallery: Gallery, pictures: _Pictures) -> str:
    colours = ", ".join(f"rgb{colour}" for colour in SCALE)
    heated = any(one.ranking is not None for one in gallery.sample)
    bar = f"<span class=scale style='background:linear-gradient(90deg, {colours})'></span>"
    key = f"Golden ranking: of no use {bar} most useful"
    notes = "".join(f'<p class="missing">{escape(note)}</p>' for note in gallery.notes)
    if not gallery.sample:
        return notes or '<p class="note">No image was asked for.</p>'
    note = (
        f'<p class="note">{_some(gallery.sample, "image")} at keep rate {keep:g}, as the model sees them, chosen by '
        f"hash{' and spread over the classes' if gallery.changed is not None else ''}.</p>"
        f'<p class="note keys"><span><span class=gone style="background:rgb{GONE}"></span>Patches that have left</span>'
        + (f"<span>{key}</span>" if heated else "")
        + "</p>"
    )
    return notes + note + "".join(_image(evaluation, one, pictures, answers=False) for one in gallery.sample)


def _changed(evaluation: Evaluation, keep: float, gallery: Gallery, pictures: _Pictures) -> str:
    if gallery.changed is None:
        return (
            '<p class="note">There were no class embeddings, so there are no answers to compare.</p>'
            if gallery.sample
            else ""
        )
    if not gallery.looked_at:
        return ""
    note = (
        f'<p class="note">Of the {_some(gallery.looked_at, "image")} looked at, {gallery.with_change:,} get another '
        f"answer from some method at keep rate {keep:g} than from the unpruned model. "
        "Answers that differ are in colour and bold; ✓ and ✗ tell whether an answer is the label.</p>"
    )
    return note + "".join(_image(evaluation, one, pictures, answers=True) for one in gallery.changed)


def _image(evaluation: Evaluation, one: Shown, pictures: _Pictures, answers: bool) -> str:
    """An image with its golden ranking and what each method keeps; with the answers of all methods if asked for."""
    name, grid = pictures.name(one), evaluation.model.grid
    title = f"image {one.key}"
    label = "" if one.label is None else f"label: {evaluation.class_name(one.label)}"
    panels = [
        f'<figure class="first"><div class="picture seen {name}" role="img" aria-label="{escape(title)}"></div>'
        f"<figcaption>{f'Unpruned{_answer(evaluation, one, UNPRUNED)}' if answers else 'Image'}</figcaption></figure>"
    ]
    if one.ranking is not None:
        panels.append(
            f'<figure class="first"><div class="picture {name}"><img src="{heat(one.ranking, grid)}" '
            f'alt="{escape(f"heat map of the golden ranking of {title}")}"></div>'
            "<figcaption>Golden ranking</figcaption></figure>"
        )
    for method in KEPT:
        if method not in one.kept:
            continue
        kept = one.kept[method]
        text = (
            f"{len(kept)} of {grid[0] * grid[1]} patches of {title}, those that stay by {method_name(method).lower()}"
        )
        caption = escape(f"Kept by {'golden' if method == 'golden' else method_name(method).lower()}")
        if answers:
            caption += _answer(evaluation, one, method)
        elif method in one.matching and method != "golden":
            caption += f"<br>Matching rate {100 * one.matching[method]:.0f} %"
        panels.append(
            f'<figure><div class="picture seen {name}"><img src="{veil(kept, grid)}" alt="{escape(text)}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    others = ""
    if answers:
        rest = [method for method in in_order(set(one.answers)) if method not in (UNPRUNED, *one.kept)]
        items = "".join(
            f"<div><dt>{escape(method_name(method))}</dt>{_answer(evaluation, one, method, 'dd')}</div>"
            for method in rest
        )
        others = f'<dl class="answers">{items}</dl>' if items else ""
    return (
        f'<article class="image"><header><h3>{escape(one.key)}</h3><span class="note">{escape(label)}</span></header>'
        f'<div class="panels">{"".join(panels)}</div>{others}</article>'
    )


def _answer(evaluation: Evaluation, one: Shown, method: str, tag: str = "strong") -> str:
    """What a method answers, set apart where it differs from the unpruned model."""
    if method not in one.answers:
        return ""
    text = evaluation.class_name(one.answers[method])
    if one.label is not None:
        text += " ✓" if one.answers[method] == one.label else " ✗"
    line = "<br>" if tag == "strong" else ""
    return f"{line}<{tag}{' class=differs' if method in one.changed else ''}>{escape(text)}</{tag}>"


def _about(evaluation: Evaluation, command: str) -> str:
    model = evaluation.model
    names = evaluation.shards[:_LISTED]
    more = len(evaluation.shards) - len(names)
    rows = [
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
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return (
        f'<dl class="facts">{facts}</dl><p class="note" style="margin:28px 0 0">To make this report again:</p>'
        f"<pre tabindex=0><code>{escape(command)}</code></pre>"
    )


def _some(things: int | Sequence[object], name: str) -> str:
    """How many, with the noun: "1 image", "1,000 images"."""
    count = things if isinstance(things, int) else len(things)
    return f"{count:,} {name}{'s' * (count != 1)}"
