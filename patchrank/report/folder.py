"""The report of an evaluation: one HTML page that needs nothing beside it, and its charts as PNG files.

OUT/index.html      charts, tables and images; no script, and nothing that is loaded from elsewhere
OUT/CHART.png       each chart, on white
"""

from __future__ import annotations

from patchrank.errors import UserError
from patchrank.report import charts as report_charts
from patchrank.report import gallery as report_gallery
from patchrank.report import page as report_page
from patchrank.report.evaluation import choose_keep, read
from patchrank.store import storage

PAGE = "index.html"


def write(folder: str, out: str, command: str, keep: float | None = None, images: int = 12) -> list[str]:
    """Write the report of an evaluation.

    Args:
        folder: what an evaluation left, local, s3:// or gs://.
        out: folder of the report, likewise; files of an earlier report in it are replaced.
        command: the command line that makes this report again, for the page to show.
        keep: the keep rate of the class table and the images; None is 0.6 or the nearest that was evaluated.
        images: how many to show, at most, in each of the two galleries.

    Returns:
        What the page lacks and why, a line each.

    Raises:
        UserError: `folder` holds no finished evaluation, or a damaged one; `keep` was not evaluated; `out` cannot be
            written; matplotlib is not installed.
    """
    if images < 0:
        raise UserError(f"--images {images}: must be at least 0")
    evaluation = read(folder)
    keep = choose_keep(evaluation, keep)
    leading = evaluation.leading(keep)
    gallery = report_gallery.choose(evaluation, keep, images, leading)
    charts = report_charts.draw(evaluation)
    page = report_page.render(evaluation, keep, leading, charts, gallery, command)
    try:
        for name in set(report_charts.NAMES) - {chart.name for chart in charts}:
            storage.delete(storage.join(out, f"{name}.png"))  # of an earlier report
        for chart in charts:
            storage.write_atomic(storage.join(out, f"{chart.name}.png"), chart.png)
        storage.write_atomic(storage.join(out, PAGE), page.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({storage.one_line(error)})") from None
    return gallery.notes
