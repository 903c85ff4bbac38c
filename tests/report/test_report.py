"""The report of a made-up evaluation: a page that is read as a browser would read it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import made_up_evaluation
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import report as job
from patchrank import assets
from patchrank.errors import UserError
from patchrank.report import charts as report_charts
from patchrank.report import data as report_data
from patchrank.report import gallery as report_gallery
from patchrank.report import page as report_page
from patchrank.report import tables as report_tables
from patchrank.report import writer
from patchrank.report.data import METHODS

CLASSES = ["<b>&\"'", *json.loads(Path(assets.CLASSNAMES).read_text())[1:]]
VOID = {"meta", "link", "img", "br", "source"}


class Page(HTMLParser):
    """Elements, tables and text of a page; fails on tags that do not nest.

    Attributes:
        elements: tag and attributes, in order.
        tables: by what a screen reader calls them, rows of cells.
        text: all text but that of the style sheet.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = self.style = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute comes twice in {tag}"
        self.elements.append((tag, found))
        if tag not in VOID:
            self._open.append(tag)
        if found.get("role") == "region":
            self._rows = self.tables[found["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] == ["style"]:
            self.style += data
            return
        self.text += data
        if "table" in self._open:
            self._rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def alts(self, start: str) -> list[str]:
        return [image["alt"] for image in self.all("img") if image["alt"].startswith(start)]

    def table(self, start: str) -> list[list[str]]:
        """The rows of the table whose name starts so, without its head."""
        (name,) = [name for name in self.tables if name.startswith(start)]
        head, *rows = self.tables[name]
        assert all(len(row) == len(head) for row in rows)
        return rows


def addresses(page: Page) -> Iterator[str]:
    """Whatever a browser would load or go to."""
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href", "ping"):
                yield value
    yield from re.findall(r"url\(\s*['\"]?([^)]*)", page.style)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A whole evaluation, with the content of its figures.json."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "evaluation", made_up_evaluation.write(folder, assets.TEST_SHARDS, CLASSES)


@pytest.fixture(scope="module")
def out(evaluation, tmp_path_factory):
    """Its report, made by the job."""
    folder = tmp_path_factory.mktemp("report of all") / "report"
    assert job.main([str(evaluation[0]), "--out", str(folder), "--images", "5"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(out):
    return Page((out / "index.html").read_text())


def changed(folder: Path, tmp_path: Path, **changes) -> str:
    """A copy of an evaluation with other figures."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    content = json.loads((folder / "figures.json").read_text())
    (copy / "figures.json").write_text(json.dumps(content | changes))
    return str(copy)


def test_the_page_needs_nothing_beside_it(page, out):
    found = list(addresses(page))
    assert all(value.startswith(("data:", "#")) for value in found)
    assert {value for value in found if value.startswith("#")} == {
        f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes
    }
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in page.style
    assert (out / "index.html").stat().st_size < 1_000_000
    assert sorted(path.name for path in out.iterdir()) == [
        *("cosine-by-keep.png", "index.html", "speedup-by-keep.png", "top1-by-keep.png", "top1-by-multiply-adds.png")
    ]


def test_the_head_names_model_images_shards_and_the_command(page, out, evaluation):
    assert "embedded pruned: 80 images of 2 shards" in page.text
    assert "Pruning embedded" in page.text
    command = f"python jobs/report.py {evaluation[0]} --out '{out}' --images 5"  # quoted for its space
    assert command in page.text
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_the_tables_have_the_figures(page, evaluation):
    figures = evaluation[1]
    rows = {(row[0], row[1]): row[2:] for row in page.table("All figures")}
    assert len(rows) == len(figures["figures"]) == 31
    for one in figures["figures"]:
        matching = "–" if one["matching"] is None else f"{100 * one['matching']:.1f}"  # noqa: RUF001
        assert rows[METHODS[one["method"]], f"{one['keep']:g}"] == [
            *(str(one["images"]), f"{100 * one['top1']:.1f}", f"{100 * one['top5']:.1f}", f"{one['cosine']:.4f}"),
            *(matching, f"{one['multiply_adds'] / 1e6:.2f}"),
        ]
    top1 = {(one["method"], one["keep"]): f"{100 * one['top1']:.1f}" for one in figures["figures"]}
    rates = made_up_evaluation.KEEP_RATES
    assert page.table("Top-1 accuracy in percent, by keep rate")[1:] == [
        [METHODS[method], *(top1[method, keep] for keep in rates)] for method in METHODS if method != "unpruned"
    ]
    assert page.table("Mean cosine")[0][0] == "Golden ranking"


def test_latency_and_retrieval(page, evaluation):
    times = {tuple(row[:3]): row[3:] for row in page.table("Latency on a made-up CPU")}
    assert len(times) == len(evaluation[1]["latency"]) == 30
    for one in evaluation[1]["latency"]:
        row = times[METHODS[one["method"]], f"{one['keep']:g}", str(one["batch"])]
        assert row[:2] == [f"{1000 * one['seconds']:.2f}", f"{1000 * one['unpruned_seconds']:.2f}"]
        assert [cell[:4] for cell in row[3:]] == [f"{one['speedup']:.2f}", f"{one['predicted']:.2f}"]
    speed = page.table("Measured speed-up")
    assert [row[:2] for row in speed[:1] + speed[-1:]] == [["Predictor", "1"], ["Token merging", "64"]]
    recalls = page.table("Retrieval")
    assert recalls[0] == ["Unpruned", "1", "500", "2,500", "81.2", "95.7", "98.1", "62.4", "86.1", "91.7"]


def test_the_classes_that_lose_most_come_first_and_names_are_escaped(page, evaluation):
    rows = page.table("Top-1 accuracy in percent by class at keep rate 0.6")
    top1 = {(one["name"], one["method"], one["keep"]): one["top1"] for one in evaluation[1]["classes"]}
    change = [top1[row[0], "predictor-tokens", 0.6] - top1[row[0], "unpruned", 1.0] for row in rows]
    assert change == sorted(change)
    assert min(change) < 0
    assert {row[0] for row in rows} == set(CLASSES)
    for row in rows:
        assert row[3] == f"{100 * top1[row[0], 'unpruned', 1.0]:.1f}"
        assert row[6] == f"{100 * top1[row[0], 'predictor-tokens', 0.6]:.1f}"
    assert not page.all("b")  # the class of that name is text


def test_a_long_class_table_is_folded(evaluation, tmp_path):
    classes = [
        {"label": label, "name": f"class {label}", "method": method, "keep": keep, "images": 3, "top1": 0.5}
        for label in range(30)
        for method, keep in (("unpruned", 1.0), ("golden", 0.6), ("golden", 0.5))
    ]
    found = report_data.read(changed(evaluation[0], tmp_path, classes=classes))
    part = Page(report_tables.classes(found, 0.6, "predictor"))
    assert [len(rows) - 1 for rows in part.tables.values()] == [12, 18]
    assert len(part.all("details")) == 1
    assert "The other 18 classes" in part.text


def test_every_chart_is_there_for_light_and_dark_and_in_words(page, out, evaluation):
    charts = page.alts("Line chart")
    assert len(charts) == len(page.all("picture")) == len(page.all("source")) == 4
    assert [re.match(r"Line chart of (.*?)\.( |$)", alt)[1] for alt in charts] == [
        "top-1 accuracy, % against M multiply-adds an image",
        "top-1 accuracy, % against keep rate, the share of patch tokens that stay",
        "mean cosine to the unpruned embedding against keep rate, the share of patch tokens that stay",
        "speed-up over the unpruned model, times against keep rate, the share of patch tokens that stay",
    ]
    top1 = {(one["method"], one["keep"]): 100 * one["top1"] for one in evaluation[1]["figures"]}
    golden = f"Golden ranking: {top1['golden', 0.8]:.1f} at 0.8, {top1['golden', 0.4]:.1f} at 0.4."
    assert golden in charts[1]
    assert f"Unpruned: {top1['unpruned', 1.0]:.1f}." in charts[1]
    for source, image in zip(page.all("source"), page.all("img"), strict=False):
        assert source["media"] == "(prefers-color-scheme: dark)"
        light, dark = (svg(uri) for uri in (image["src"], source["srcset"]))
        assert light != dark
        assert ">Predictor</text>" in light and ">Predictor</text>" in dark
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (752, 688)


def svg(uri: str) -> str:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def test_both_galleries(page, evaluation):
    assert len(page.alts("heat map of the golden ranking")) == 10  # five images in each
    for method in ("golden ranking", "predictor", "class attention"):
        kept = [alt for alt in page.alts("118 of 196 patches") if alt.endswith(f"those that stay by {method}")]
        assert len(kept) == 10
    assert "5 images at keep rate 0.6" in page.text
    rows = rows_of(evaluation[0])
    answers = {(row["key"], row["method"]): row["prediction"] for row in rows if row["keep"] in (0.6, 1.0)}
    different = {key for key, method in answers if answers[key, method] != answers[key, "unpruned"]}
    assert f"Of the 80 images looked at, {len(different)} get another answer" in page.text
    pictures = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("role") == "img"]
    shown = [name.removeprefix("image ") for name in pictures[5:]]
    assert len(shown) == 5 and set(shown) <= different
    assert all(answers[key, "predictor-tokens"] != answers[key, "unpruned"] for key in shown[:2])  # the leading method
    part = page.text.partition("✓ and ✗ tell")[2].partition(shown[1])[0]  # what is said of the first of them
    labels = {row["key"]: row["label"] for row in rows}
    assert f"label: {CLASSES[labels[shown[0]]]}" in part
    for method in METHODS:
        answer = answers[shown[0], method]
        assert f"{CLASSES[answer]} {'✓' if answer == labels[shown[0]] else '✗'}" in part
    # An image that is in both galleries, or has many panels, is in the page once.
    assert page.style.count("data:image/webp") == len(set(pictures))


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_without_labels_latency_and_rankings(tmp_path):
    made_up_evaluation.write(
        *(tmp_path, assets.TEST_SHARDS[:1], CLASSES),
        **{"images": 8, "labels": False, "latency": False, "ranked": False},
    )
    out = tmp_path / "report"
    out.mkdir()
    (out / "top1-by-keep.png").write_text("of an earlier report")
    (out / "other.png").write_text("somebody's")
    assert writer.write(str(tmp_path / "evaluation"), str(out), "command", images=3) == []
    page = Page((out / "index.html").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        *("cosine-by-keep.png", "cosine-by-multiply-adds.png", "index.html", "other.png")
    ]
    assert len(page.alts("Line chart")) == 2
    assert "accuracy is not known" in page.text
    assert "no answers to compare" in page.text
    assert "Latency" not in page.text and "Retrieval" not in page.text
    assert not page.alts("heat map")
    assert len(page.alts("118 of 196 patches")) == 9
    assert [name for name in page.tables if "Top-1" in name] == []


@pytest.mark.parametrize("gone", [1, 2])
def test_shards_that_are_gone(gone, tmp_path, capsys):
    uris = [shutil.copy(uri, tmp_path) for uri in assets.TEST_SHARDS]
    made_up_evaluation.write(tmp_path, uris, CLASSES, images=12)
    for uri in uris[:gone]:
        Path(uri).unlink()
    found = report_data.read(str(tmp_path / "evaluation"))
    gallery = report_gallery.choose(found, 0.6, 4, "predictor")
    assert len(gallery.sample) == (0 if gone == 2 else 4)
    assert {one.shard for one in gallery.sample} == set(uris[gone:])
    assert f"{gone} shard{'s' * (gone == 2)} cannot be found" in gallery.notes[0]
    if gone == 2:
        assert job.main([str(tmp_path / "evaluation"), "--out", str(tmp_path / "report")]) == 0
        assert "note: 2 shards cannot be found" in capsys.readouterr().err
        page = Page((tmp_path / "report" / "index.html").read_text())
        assert "2 shards cannot be found" in page.text
        assert len(page.alts("")) == 4  # the charts


def test_a_damaged_shard_and_rankings_that_are_gone_are_said(tmp_path):
    uri = Path(shutil.copy(assets.TEST_SHARDS[0], tmp_path))
    made_up_evaluation.write(tmp_path, [str(uri)], CLASSES, images=12)
    uri.write_bytes(b"not a tar")
    shutil.rmtree(tmp_path / "rankings")
    gallery = report_gallery.choose(report_data.read(str(tmp_path / "evaluation")), 0.6, 4, "predictor")
    assert gallery.sample == [] and gallery.changed == []
    assert re.match(r"no heat maps: .*no such folder", gallery.notes[0])
    assert re.search(r"test-000000.tar.gz: cannot be read \(.*\); \d images not shown", gallery.notes[1])


def test_images_are_spread_over_the_classes_and_the_same_every_time(evaluation):
    found = report_data.read(str(evaluation[0]))
    first, again = (report_gallery.choose(found, 0.5, 10, "predictor") for _ in range(2))
    assert {one.label for one in first.sample} == set(range(10))
    assert [one.key for one in first.sample] == [one.key for one in again.sample]
    assert all(one.size == (224, 224) and one.picture.startswith("data:image/webp") for one in first.sample)
    assert report_gallery.choose(found, 0.5, 0, "predictor").sample == []


def test_a_large_image_is_made_small(tmp_path):
    size = {"size": [288, 384]}
    made_up_evaluation.write(
        *(tmp_path, assets.TEST_SHARDS[:1], CLASSES, 4, (3, 4)), preprocess=made_up_evaluation.PREPROCESS | size
    )
    gallery = report_gallery.choose(report_data.read(str(tmp_path / "evaluation")), 0.6, 1, "predictor")
    assert gallery.sample[0].size == (224, 168)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_veil_and_heat_map_have_a_pixel_a_patch():
    veil = decoded(report_gallery.veil([0, 5], (2, 3)))
    assert veil.size == (3, 2)
    assert (np.asarray(veil)[:, :, 3] > 0).tolist() == [[False, True, True], [True, True, False]]
    heat = decoded(report_gallery.heat(np.array([4, 0, 1, 2, 3, 5]), (2, 3)))
    assert heat.size == (3, 2)
    assert heat.getpixel((1, 1)) == (253, 231, 37)  # token 4, the most useful
    assert heat.getpixel((2, 1)) == (68, 1, 84)


def test_all_text_from_files_is_escaped(evaluation, tmp_path):
    hostile = "</style><i title='\"x\"'>&amp;"
    figures = [one | {"method": hostile} for one in evaluation[1]["figures"][1:6]]
    latency = [one | {"method": hostile} for one in evaluation[1]["latency"][:5]]
    changes = {"device": hostile, "shards": [hostile], "rankings": hostile, "class_names": [hostile] * 10}
    changes["model"] = evaluation[1]["model"] | {"name": hostile, "pretrained": hostile, "dtype": hostile}
    found = report_data.read(changed(evaluation[0], tmp_path, figures=figures, latency=latency, **changes))
    one = report_gallery.Shown(hostile, hostile, 1, {"unpruned": 0, hostile: 1}, {"golden": [0, 1]}, {}, np.arange(196))
    gallery = report_gallery.Gallery([one], [one], 1, 1, [hostile])
    page = Page(report_page.render(found, 0.6, hostile, report_charts.draw(found), gallery, hostile))
    assert not page.all("i") and hostile in page.text
    assert page.text.count("&amp;") == page.text.count("</style>") > 10
    assert "&amp;" in page.alts("Line chart")[0]
    assert "&lt;/style&gt;" in svg(page.all("img")[0]["src"])


def test_what_is_no_evaluation_is_refused(tmp_path, evaluation):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        writer.write(str(tmp_path / "nowhere"), str(tmp_path / "out"), "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no figures\.json, so it is not .* evaluation"):
        writer.write(str(tmp_path / "empty"), str(tmp_path / "out"), "")
    (tmp_path / "empty" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"empty: holds no figures\.json yet; run jobs/evaluate\.py to its end"):
        writer.write(str(tmp_path / "empty"), str(tmp_path / "out"), "")
    with pytest.raises(UserError, match=r"--keep 0\.55: was not evaluated; there are 0\.8, 0\.7, 0\.6, 0\.5, 0\.4"):
        job.main([str(evaluation[0]), "--out", str(tmp_path / "out"), "--keep", "0.55"])
    with pytest.raises(UserError, match="--images -1: must be at least 0"):
        job.main([str(evaluation[0]), "--out", str(tmp_path / "out"), "--images", "-1"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"model": None},
        {"figures": []},
        {"figures": [{"method": "golden"}]},
        {"figures": [{"method": "golden", "keep": "0.6", "images": 1, "multiply_adds": 1}]},
        {"latency": [{"method": "golden", "keep": float("nan")}]},
        {"retrieval": [1]},
    ],
)
def test_damaged_figures_are_refused(damage, evaluation, tmp_path):
    with pytest.raises(UserError, match=r"figures\.json: damaged \(.*\); run jobs/evaluate\.py again"):
        report_data.read(changed(evaluation[0], tmp_path, **damage))


def test_damaged_rows_are_refused(evaluation, tmp_path):
    folder = Path(changed(evaluation[0], tmp_path))
    file = sorted(folder.glob("*.parquet"))[0]
    table = pq.read_table(file)
    pq.write_table(table.drop_columns("prediction"), file)
    with pytest.raises(UserError, match=re.escape(f"{file}: cannot be read")):
        report_gallery.choose(report_data.read(str(folder)), 0.6, 4, "predictor")
    rows = [row | {"kept": [196]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(UserError, match=r"keeps token 196 of 196; run jobs/evaluate\.py again"):
        report_gallery.choose(report_data.read(str(folder)), 0.6, 40, "predictor")
    for preprocess in ({"size": "large"}, {"colour": 1}):
        content = json.loads((folder / "figures.json").read_text())
        content["model"]["preprocess"] = preprocess
        (folder / "figures.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"figures\.json: its preprocess is damaged"):
            report_gallery._crop(report_data.read(str(folder)))


def test_a_report_that_cannot_be_written_is_a_users_error(evaluation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: cannot be written"):
        writer.write(str(evaluation[0]), str(tmp_path / "file"), "", images=0)


def test_the_keep_rate_is_the_nearest_to_0_6_unless_one_is_asked_for(evaluation, tmp_path):
    found = report_data.read(str(evaluation[0]))
    assert report_data.choose_keep(found, None) == 0.6
    assert report_data.choose_keep(found, 0.1 + 0.6) == 0.7
    figures = [one for one in evaluation[1]["figures"] if one["keep"] in (1.0, 0.8, 0.5)]
    other = report_data.read(changed(evaluation[0], tmp_path, figures=figures))
    assert report_data.choose_keep(other, None) == 0.5
    whole = report_data.read(changed(evaluation[0], tmp_path / "whole", figures=figures[:1]))
    with pytest.raises(UserError, match="no image was pruned"):
        report_data.choose_keep(whole, None)


def test_the_name_of_a_model_in_a_folder_is_short(evaluation, tmp_path):
    model = evaluation[1]["model"] | {"name": "local-dir:/some/where/tiny/"}
    found = report_data.read(changed(evaluation[0], tmp_path, model=model))
    assert found.model.title == "tiny"
    assert found.class_name(3) == CLASSES[3]
    assert found.class_name(10) == "class 10" and found.class_name(-1) == "class -1"
