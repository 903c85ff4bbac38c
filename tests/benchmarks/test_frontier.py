"""benchmarks/frontier.py on tiny images: it resumes, takes rankings that a search left, and shows what it measured."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from here import run_here
from tiny_search import tables

pytest_plugins = ["tiny_results"]
DEFAULT = "effects k=4 m=2"


def measure(data, results, *flags):
    return run_here(
        "benchmarks/frontier.py", "measure", results,
        "--model", f"local-dir:{data / 'model'}", "--shards", str(data / "images-0.tar"), "--dtype", "float32",
        "--prototypes", str(data / "images-{1,2}.tar"), "--classes", str(data / "classes.json"), *flags,
    )  # fmt: skip


def rows(results):
    return {(row["key"], row["search"]): row for row in pq.read_table(results).to_pylist()}


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    results = tmp_path_factory.mktemp("frontier") / "frontier.parquet"
    done = measure(data, results, "--photos", "2", "--searches", "random", "one-shot r=2", "effects k=2", DEFAULT)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1].split(",")[0] for line in done.stdout.splitlines()] == [" 4 searches"] * 2
    return results


def test_what_is_there_is_not_measured_again(data, measured):
    before = rows(measured)
    assert {key for key, _ in before} == {"0-0", "0-1"}
    done = measure(data, measured, "--photos", "3", "--searches", "random", DEFAULT)
    assert done.returncode == 0, done.stderr
    after = rows(measured)
    assert after.items() >= before.items()
    assert after.keys() - before.keys() == {("0-2", "random"), ("0-2", DEFAULT)}


def test_rankings_of_a_search_are_those_it_finds_itself(data, measured, undisturbed, tmp_path):
    done = measure(data, tmp_path / "new", "--photos", "2", "--searches", DEFAULT, "--rankings", str(undisturbed))
    assert done.returncode == 0, done.stderr
    ranked = {row["key"]: row["ranking"] for row in next(iter(tables(undisturbed).values()))}
    for (key, name), row in rows(tmp_path / "new").items():
        own = rows(measured)[key, name]
        assert row["ranking"] == own["ranking"] == ranked[key]
        assert row["candidates"] == own["candidates"] > 36
        assert row["cosine"] == pytest.approx(own["cosine"], abs=1e-6)


def test_the_table_and_the_picture(measured, tmp_path):
    picture = tmp_path / "frontier.png"
    done = run_here("benchmarks/frontier.py", "show", measured, "--plot", picture)
    assert done.returncode == 0, done.stderr
    lines = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert list(lines) == ["search", "random", "one-shot r=2", "effects k=2", DEFAULT]
    assert "| 1.00 1.00 |" in lines["one-shot r=2"]
    assert lines[DEFAULT].endswith("| 100% 100% |")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--searches", "no such"], "--searches no such: none of them"),
        (["--shards", "lost.tar"], "lost.tar: "),
        (["--dtype", "float16"], "of other weights, another cut or another precision"),
        (["--cut", "2"], "of other weights, another cut or another precision"),
        (["--cut", "2", "--rankings", "{undisturbed}"], "another cut (1)"),
    ],
)
def test_bad_input_in_one_line(data, measured, undisturbed, flags, message):
    done = measure(data, measured, *(flag.format(undisturbed=undisturbed) for flag in flags))
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
