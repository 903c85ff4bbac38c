"""The images of a report."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import made_up_evaluation
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from reading import CLASSES, LABELS, Page, changed

from jobs import report as job
from patchrank import assets
from patchrank.errors import UserError
from patchrank.report import gallery as report_gallery
from patchrank.report.evaluation import read


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
    for method in LABELS:
        answer = answers[shown[0], method]
        assert f"{CLASSES[answer]} {'✓' if answer == labels[shown[0]] else '✗'}" in part
    # An image that is in both galleries, or has many panels, is in the page once.
    assert page.style.count("data:image/webp") == len(set(pictures))


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("gone", [1, 2])
def test_shards_that_are_gone(gone, tmp_path, capsys):
    uris = [shutil.copy(uri, tmp_path) for uri in assets.TEST_SHARDS]
    made_up_evaluation.write(tmp_path, uris, CLASSES, images=12)
    for uri in uris[:gone]:
        Path(uri).unlink()
    found = read(str(tmp_path / "evaluation"))
    gallery = report_gallery.choose(found, 0.6, 4, "predictor")
    assert len(gallery.sample) == (0 if gone == 2 else 4)
    assert {one.shard for one in gallery.sample} == set(uris[gone:])
    assert f"{gone} shard{'s' * (gone == 2)} cannot be found" in gallery.notes[0]
    if gone == 2:
        assert job.main([str(tmp_path / "evaluation"), "--out", str(tmp_path / "report")]) == 0
        assert "note: 2 shards cannot be found" in capsys.readouterr().err
        page = Page((tmp_path / "report" / "index.html").read_text())
        assert "2 shards cannot be found" in page.text
        assert len(page.alts("")) == 5  # the charts


def test_a_damaged_shard_and_rankings_that_are_gone_are_said(tmp_path):
    uri = Path(shutil.copy(assets.TEST_SHARDS[0], tmp_path))
    made_up_evaluation.write(tmp_path, [str(uri)], CLASSES, images=12)
    uri.write_bytes(b"not a tar")
    shutil.rmtree(tmp_path / "rankings")
    gallery = report_gallery.choose(read(str(tmp_path / "evaluation")), 0.6, 4, "predictor")
    assert gallery.sample == [] and gallery.changed == []
    assert re.match(r"no heat maps: .*no such folder", gallery.notes[0])
    assert re.search(r"test-000000.tar.gz: cannot be read \(.*\); \d images not shown", gallery.notes[1])


def test_images_are_spread_over_the_classes_and_the_same_every_time(evaluation):
    found = read(str(evaluation[0]))
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
    gallery = report_gallery.choose(read(str(tmp_path / "evaluation")), 0.6, 1, "predictor")
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


def test_damaged_rows_are_refused(evaluation, tmp_path):
    folder = Path(changed(evaluation[0], tmp_path))
    file = sorted(folder.glob("*.parquet"))[0]
    table = pq.read_table(file)
    pq.write_table(table.drop_columns("prediction"), file)
    with pytest.raises(UserError, match=re.escape(f"{file}: cannot be read")):
        report_gallery.choose(read(str(folder)), 0.6, 4, "predictor")
    rows = [row | {"kept": [196]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(UserError, match=r"keeps token 196 of 196; run jobs/evaluate\.py again"):
        report_gallery.choose(read(str(folder)), 0.6, 40, "predictor")
    for preprocess in ({"size": "large"}, {"colour": 1}):
        content = json.loads((folder / "figures.json").read_text())
        content["model"]["preprocess"] = preprocess
        (folder / "figures.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"figures\.json: its preprocess is damaged"):
            report_gallery.cropping(read(str(folder)))
