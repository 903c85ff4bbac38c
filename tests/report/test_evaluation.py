"""What a report reads of an evaluation's folder, and what it refuses."""

from __future__ import annotations

import pytest
from reading import CLASSES, changed

from jobs import report as job
from patchrank.errors import UserError
from patchrank.report.evaluation import choose_keep, read
from patchrank.report.folder import write


def test_what_is_no_evaluation_is_refused(tmp_path, evaluation):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        write(str(tmp_path / "nowhere"), str(tmp_path / "out"), "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no figures\.json, so it is not .* evaluation"):
        write(str(tmp_path / "empty"), str(tmp_path / "out"), "")
    (tmp_path / "empty" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"empty: holds no figures\.json yet; run jobs/evaluate\.py to its end"):
        write(str(tmp_path / "empty"), str(tmp_path / "out"), "")
    with pytest.raises(UserError, match=r"--keep 0\.55: was not evaluated; there are 0\.8, 0\.7, 0\.6, 0\.5, 0\.4"):
        job.main([str(evaluation[0]), "--out", str(tmp_path / "out"), "--keep", "0.55"])
    with pytest.raises(UserError, match="--images -1: must be at least 0"):
        job.main([str(evaluation[0]), "--out", str(tmp_path / "out"), "--images", "-1"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"model": None}, "'NoneType'"),
        ({"figures": []}, "it has no figures"),
        ({"figures": [{"method": "golden"}]}, "'keep'"),
        ({"figures": [{"method": "golden", "keep": "0.6", "images": 1}]}, "'0.6' where a number belongs"),
        ({"latency": [{"method": "golden", "keep": float("nan")}]}, "nan where a number belongs"),
        ({"images": 0.5}, "0.5 where a whole number belongs"),
        ({"device": None}, "None where a text belongs"),
        ({"retrieval": [1]}, "'int'"),
    ],
)
def test_damaged_figures_are_refused(damage, words, evaluation, tmp_path):
    with pytest.raises(UserError, match=rf"figures\.json: damaged \(.*{words}.*\); run jobs/evaluate\.py again"):
        read(changed(evaluation[0], tmp_path, **damage))


def test_the_keep_rate_is_the_nearest_to_0_6_unless_one_is_asked_for(evaluation, tmp_path):
    found = read(str(evaluation[0]))
    assert choose_keep(found, None) == 0.6
    assert choose_keep(found, 0.1 + 0.6) == 0.7
    figures = [one for one in evaluation[1]["figures"] if one["keep"] in (1.0, 0.8, 0.5)]
    other = read(changed(evaluation[0], tmp_path, figures=figures))
    assert choose_keep(other, None) == 0.5
    whole = read(changed(evaluation[0], tmp_path / "whole", figures=figures[:1]))
    with pytest.raises(UserError, match="no image was pruned"):
        choose_keep(whole, None)


def test_the_name_of_a_model_in_a_folder_is_short(evaluation, tmp_path):
    model = evaluation[1]["model"] | {"name": "local-dir:/some/where/tiny/"}
    found = read(changed(evaluation[0], tmp_path, model=model))
    assert found.model.title == "tiny"
    assert found.class_name(3) == CLASSES[3]
    assert found.class_name(10) == "class 10" and found.class_name(-1) == "class -1"
