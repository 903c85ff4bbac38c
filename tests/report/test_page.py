"""The page of a made-up evaluation: what stands on it, and that it needs nothing beside it."""

from __future__ import annotations

import re

import made_up_evaluation
import numpy as np
import pytest
from PIL import Image
from reading import CLASSES, LABELS, Page, addresses, changed, svg

from patchrank import assets
from patchrank.errors import UserError
from patchrank.evaluation.record import EQUAL_COST
from patchrank.report import charts as report_charts
from patchrank.report import gallery as report_gallery
from patchrank.report import page as report_page
from patchrank.report.evaluation import read
from patchrank.report.folder import write


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
        *("cosine-by-keep.png", "cosine-by-speedup.png", "index.html"),
        *("speedup-by-keep.png", "top1-by-keep.png", "top1-by-multiply-adds.png"),
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
        assert rows[LABELS[one["method"]], f"{one['keep']:g}"] == [
            *(str(one["images"]), f"{100 * one['top1']:.1f}", f"{100 * one['top5']:.1f}", f"{one['cosine']:.4f}"),
            *(matching, f"{one['multiply_adds'] / 1e6:.2f}"),
        ]
    top1 = {(one["method"], one["keep"]): f"{100 * one['top1']:.1f}" for one in figures["figures"]}
    rates = made_up_evaluation.KEEP_RATES
    assert page.table("Top-1 accuracy in percent, by keep rate")[1:] == [
        [LABELS[method], *(top1[method, keep] for keep in rates)] for method in LABELS if method != "unpruned"
    ]
    assert page.table("Mean cosine")[0][0] == "Golden ranking"


def test_latency_and_retrieval(page, evaluation):
    times = {tuple(row[:3]): row[3:] for row in page.table("Latency on a made-up CPU")}
    assert len(times) == len(evaluation[1]["latency"]) == 30
    for one in evaluation[1]["latency"]:
        row = times[LABELS[one["method"]], f"{one['keep']:g}", str(one["batch"])]
        assert row[:2] == [f"{1000 * one['seconds']:.2f}", f"{1000 * one['unpruned_seconds']:.2f}"]
        assert [cell[:4] for cell in row[3:]] == [f"{one['speedup']:.2f}", f"{one['predicted']:.2f}"]
    speed = page.table("Measured speed-up")
    assert [row[:2] for row in speed[:1] + speed[-1:]] == [["Predictor", "1"], ["Token merging", "64"]]
    recalls = page.table("Retrieval")
    assert recalls[0] == ["Unpruned", "1", "500", "2,500", "81.2", "95.7", "98.1", "62.4", "86.1", "91.7"]


def test_neighbours_and_whether_an_index_can_be_shared(evaluation, tmp_path):
    near = [
        {"method": method, "keep": keep, "images": 500, "nearest": 10, "pruned_queries": kept, "pruned_index": kept}
        | {"pruned": kept - 0.1, "mixed": kept - 0.05, "first_by_pruned_queries": 1.0, "first_in_pruned_index": 0.998}
        for method, keep, kept in (("predictor", 0.6, 0.875), ("random", 0.6, 0.5), ("predictor", 0.4, 0.75))
    ]
    found = read(changed(evaluation[0], tmp_path, neighbours=near))
    gallery = report_gallery.Gallery([], None, 0, 0, [])
    page = Page(report_page.render(found, 0.6, "predictor", [], gallery, "command"))
    assert page.table("Share of the 10 nearest neighbours among 500 images") == [
        ["Predictor", "0.6", "87.5", "87.5", "77.5", "82.5", "100.0", "99.8"],
        ["Random", "0.6", "50.0", "50.0", "40.0", "45.0", "100.0", "99.8"],
        ["Predictor", "0.4", "75.0", "75.0", "65.0", "70.0", "100.0", "99.8"],
    ]
    assert "At keep rate 0.6, pruned and unpruned embeddings can share an index" in page.text


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
    found = read(changed(evaluation[0], tmp_path, classes=classes))
    gallery = report_gallery.Gallery([], None, 0, 0, [])
    page = Page(report_page.render(found, 0.6, "predictor", [], gallery, "command"))
    assert [len(rows) - 1 for name, rows in page.tables.items() if "by class" in name] == [12, 18]
    assert len(page.all("details")) == 3  # all figures, all times, and these
    assert "The other 18 classes" in page.text


@pytest.mark.parametrize("told", [{}, {"compared_at": EQUAL_COST}])
def test_what_methods_are_compared_at_is_said_where_it_is_known(evaluation, tmp_path, told):
    found = read(changed(evaluation[0], tmp_path, **told))
    gallery = report_gallery.Gallery([], None, 0, 0, [])
    page = Page(report_page.render(found, 0.6, "predictor", [], gallery, "command"))
    assert ("Compared at equal multiply-adds" in page.text) == bool(told)


def test_every_chart_is_there_for_light_and_dark_and_in_words(page, out, evaluation):
    charts = page.alts("Line chart")
    assert len(charts) == len(page.all("picture")) == len(page.all("source")) == 5
    assert [re.match(r"Line chart of (.*?)\.( |$)", alt)[1] for alt in charts] == [
        "top-1 accuracy, % against M multiply-adds an image",
        "top-1 accuracy, % against keep rate",
        "mean cosine to the unpruned embedding against keep rate",
        "speed-up over the unpruned model, times against keep rate",
        "mean cosine to the unpruned embedding against speed-up over the unpruned model, times",
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


def test_without_labels_latency_and_rankings(tmp_path):
    made_up_evaluation.write(
        *(tmp_path, assets.TEST_SHARDS[:1], CLASSES),
        **{"images": 8, "labels": False, "latency": False, "ranked": False},
    )
    out = tmp_path / "report"
    out.mkdir()
    (out / "top1-by-keep.png").write_text("of an earlier report")
    (out / "other.png").write_text("somebody's")
    assert write(str(tmp_path / "evaluation"), str(out), "command", images=3) == []
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


def test_all_text_from_files_is_escaped(evaluation, tmp_path):
    hostile = "</style><i title='\"x\"'>&amp;"
    figures = [one | {"method": hostile} for one in evaluation[1]["figures"][1:6]]
    latency = [one | {"method": hostile} for one in evaluation[1]["latency"][:5]]
    changes = {"device": hostile, "shards": [hostile], "rankings": hostile, "class_names": [hostile] * 10}
    changes["model"] = evaluation[1]["model"] | {"name": hostile, "pretrained": hostile, "dtype": hostile}
    found = read(changed(evaluation[0], tmp_path, figures=figures, latency=latency, **changes))
    one = report_gallery.Shown(hostile, hostile, 1, {"unpruned": 0, hostile: 1}, {"golden": [0, 1]}, {}, np.arange(196))
    gallery = report_gallery.Gallery([one], [one], 1, 1, [hostile])
    page = Page(report_page.render(found, 0.6, hostile, report_charts.draw(found), gallery, hostile))
    assert not page.all("i") and hostile in page.text
    assert page.text.count("&amp;") == page.text.count("</style>") > 10
    assert "&amp;" in page.alts("Line chart")[0]
    assert "&lt;/style&gt;" in svg(page.all("img")[0]["src"])


def test_a_report_that_cannot_be_written_is_a_users_error(evaluation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: cannot be written"):
        write(str(evaluation[0]), str(tmp_path / "file"), "", images=0)
