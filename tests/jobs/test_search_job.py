"""The search on real Ray processes: what jobs/search.py makes of good and bad shards, and of being stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import boto3
import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from tiny_search import command, once_waiting, search, search_here, tables, wait_for

from cluster import rank
from cluster.pool import Pool
from patchrank.store import rankings
from patchrank.store.card import CONFIGS_FILE
from patchrank.store.folder import BESIDE

pytest_plugins = ["s3", "tiny_results"]


def test_every_image_has_its_row(undisturbed):
    found = tables(undisturbed)
    assert len(found) == 6
    rows = [row for table in found.values() for row in table]
    assert {row["key"] for row in rows} == {f"{shard}-{number}" for shard in range(6) for number in range(12)}
    assert all(sorted(row["ranking"]) == list(range(36)) for row in rows)
    assert all(row["label"] == int(row["key"].split("-")[1]) % 3 for row in rows)
    assert all(row["prediction"] in (0, 1, 2) and len(row["pruned"]) == 5 for row in rows)


def test_three_actors_make_the_same_tables(data, undisturbed, address, tmp_path):
    done = search_here(data, tmp_path / "out", "--actors", "3", address=address)
    assert done.returncode == 0, done.stderr
    assert tables(tmp_path / "out") == tables(undisturbed)


@pytest.mark.long
def test_actors_with_two_shards_at_once_make_the_same_tables(data, undisturbed, address, hold, tmp_path, monkeypatch):
    """As actors on GPUs have; one of them is killed."""
    monkeypatch.setattr(rank, "Pool", lambda *given, **named: Pool(*given, **(named | {"at_once": 2})))
    with once_waiting(hold, "1-5", lambda actor: os.kill(actor, signal.SIGKILL)):
        done = search_here(data, tmp_path / "out", "--actors", "1", address=address)
    assert done.returncode == 0, done.stderr
    assert tables(tmp_path / "out") == tables(undisturbed)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [("--rank-by", "gates"), ("--rank-by", "exchanges"), ("--score", "similarities", "--steps", "2")]
)
def test_other_searches_make_the_same_tables_whoever_is_lost(data, address, hold, tmp_path, flags):
    """By one actor at once; or one and then several, one of which is killed. Similarities are to the first images."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    whole = search_here(data, alone, "--actors", "1", *flags, address=address)
    first = search_here(data, out, "--actors", "1", *flags, shards="images-0.tar", address=address)
    with once_waiting(hold, "1-5", lambda actor: os.kill(actor, signal.SIGKILL)):
        rest = search_here(data, out, "--actors", "3", *flags, shards="images-{1..5}.tar", address=address)
    assert [done.returncode for done in (whole, first, rest)] == [0, 0, 0], rest.stderr
    assert len(tables(out)) == 6 and tables(out) == tables(alone)
    again = search_here(data, out, "--estimate", *flags, address=address)
    assert again.returncode == 0 and "6 shards are finished" in again.stdout
    if "similarities" in flags:
        other = search_here(data, out, *flags, "--bank", str(data / "classes.json"), address=address)
        assert other.returncode == 2 and re.search(r'bank: "images \w+" there, "text \w+" now', other.stderr)


def test_a_killed_actor_costs_no_row(data, undisturbed, address, hold, tmp_path):
    def kill(actor):
        assert len(tables(tmp_path / "out")) == 1
        os.kill(actor, signal.SIGKILL)

    with once_waiting(hold, "1-5", kill):
        done = search_here(data, tmp_path / "out", "--actors", "1", address=address)
    assert done.returncode == 0, done.stderr
    assert tables(tmp_path / "out") == tables(undisturbed)


@pytest.mark.parametrize(
    "how, status", [pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.long), (signal.SIGINT, 130)]
)
def test_a_stopped_driver_goes_on_where_it_was(data, undisturbed, address, hold, tmp_path, how, status):
    out, pipe = tmp_path / "out", subprocess.PIPE
    flags = command(data, out, "--actors", "1")
    hold.at("1-5")
    with subprocess.Popen(flags, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        wait_for(lambda: hold.waiting("1-5"), process)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    if how == signal.SIGINT:
        assert "goes on from there" in stderr and "Traceback" not in stderr
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(finished) == 1
    hold.release()
    done = search_here(data, out, "--actors", "1", address=address)
    assert done.returncode == 0, done.stderr
    resumed = int(re.search(r"(\d) of 6 were finished before", done.stdout)[1])
    assert resumed in (1, 2)  # a killed driver's actor may finish the shard it is at
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not computed again
    assert tables(out) == tables(undisturbed)
    assert [path.name for path in out.glob(".*")] == [CONFIGS_FILE]


def test_a_finished_search_has_nothing_to_do(data, undisturbed, address):
    before = tables(undisturbed)
    done = search_here(data, undisturbed, address=address)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 were finished before" in done.stdout
    assert tables(undisturbed) == before


@pytest.mark.long
def test_prototypes_are_kept_for_the_run_that_goes_on(data, address, tmp_path):
    out = tmp_path / "out"
    flags = ("--prototypes", str(data / "images-{4,5}.tar"), "--actors", "1")
    first = search_here(data, out, *flags, shards="images-0.tar", address=address)
    assert first.returncode == 0, first.stderr
    kept = (out / BESIDE / "classes.safetensors").read_bytes()
    second = search_here(data, out, *flags, shards="images-{0..1}.tar", address=address)
    assert second.returncode == 0, second.stderr
    assert (out / BESIDE / "classes.safetensors").read_bytes() == kept
    assert len(tables(out)) == 2


def test_the_score_label_needs_labels_and_names_who_has_none(data, address, tmp_path):
    with wds.TarWriter(str(tmp_path / "mixed.tar")) as writer:
        image = Image.new("RGB", (24, 24), "red")
        writer.write({"__key__": "good", "png": image, "cls": 1})
        writer.write({"__key__": "bare", "png": image})
        writer.write({"__key__": "high", "png": image, "cls": 3})
    done = search_here(data, tmp_path / "out", "--score", "label", shards=tmp_path / "mixed.tar", address=address)
    assert done.returncode == 0, done.stderr
    assert [row["key"] for table in tables(tmp_path / "out").values() for row in table] == ["good"]
    rejects = {row["key"]: row["reason"] for row in rankings.open(str(tmp_path / "out")).rejects().to_pylist()}
    assert "no label" in rejects["bare"] and "label 3" in rejects["high"]


def test_shards_and_rankings_in_a_bucket(data, undisturbed, address, s3_bucket):
    bucket = boto3.client("s3")
    for number in range(2):
        name = f"images-{number}.tar"
        bucket.upload_file(str(data / name), s3_bucket.removeprefix("s3://"), f"shards/{name}")
    out = f"{s3_bucket}/rankings"
    done = search(data, out, "--actors", "1", shards=f"{s3_bucket}/shards")  # its Ray knows the bucket's endpoint
    assert done.returncode == 0, done.stderr
    assert f"jobs/query.py {out}" in done.stdout
    rows = {row["key"]: row for row in rankings.open(out).dataset.to_table().to_pylist()}
    on_disk = {row["key"]: row for table in tables(undisturbed).values() for row in table if row["key"][0] in "01"}
    assert {key: row | {"shard": ""} for key, row in rows.items()} == {
        key: row | {"shard": ""} for key, row in on_disk.items()
    }
    again = search_here(data, out, shards=f"{s3_bucket}/shards", address=address)
    assert "2 of 2 were finished before" in again.stdout


def test_bad_shards_are_reported_and_the_good_rows_kept(data, address, tmp_path):
    whole = (data / "images-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.tar").write_bytes(b"")
    with wds.TarWriter(str(tmp_path / "empty.tar")):
        pass
    (tmp_path / "good.tar").write_bytes(whole)
    rgb = Image.new("RGB", (30, 30), "green")
    with wds.TarWriter(str(tmp_path / "odd.tar"), encoder=True) as writer:
        writer.write({"__key__": "cmyk", "jpg": jpeg(rgb.convert("CMYK")), "cls": 0})
        writer.write({"__key__": "deep", "png": png(Image.fromarray(np.full((30, 30), 40000, np.uint16))), "cls": 0})
        writer.write({"__key__": "text", "jpg": b"this is no image", "cls": 0})
        writer.write({"__key__": "cmyk2", "jpg": jpeg(rgb), "cls": 0})
        writer.write({"__key__": "high", "jpg": jpeg(rgb), "cls": 99})
        writer.write({"__key__": "cmyk", "jpg": jpeg(rgb), "cls": 0})
    out, bad = tmp_path / "out", "{cut,zero,empty,good,odd,absent}.tar"
    done = search_here(data, out, "--actors", "1", shards=tmp_path / bad, address=address)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for name in ("cut.tar: truncated", "zero.tar", "absent.tar: No such file"):
        assert f"error: {tmp_path}/{name}" in done.stderr
    for name in ("good.tar", "empty.tar", "odd.tar"):
        assert name not in done.stderr
    found = {name.split("-")[0]: [row["key"] for row in table] for name, table in tables(out).items()}
    assert found.pop("cut")  # the rows before the cut
    assert found == {"empty": [], "good": [f"0-{n}" for n in range(12)], "odd": ["cmyk", "deep", "cmyk2"]}
    rejects = {row["key"]: row["reason"] for row in rankings.open(str(out)).rejects().to_pylist()}
    assert set(rejects) == {"text", "high", "cmyk"}
    assert "duplicate" in rejects["cmyk"]

    (tmp_path / "cut.tar").write_bytes(whole)  # put right: the same command takes it up, and it alone
    again = search_here(data, out, "--actors", "1", shards=tmp_path / "{cut,empty,good,odd}.tar", address=address)
    assert again.returncode == 0, again.stderr
    assert "3 of 4 were finished before" in again.stdout
    assert len(next(table for name, table in tables(out).items() if name.startswith("cut"))) == 12


def jpeg(image):
    from io import BytesIO

    image.save(buffer := BytesIO(), "jpeg")
    return buffer.getvalue()


def png(image):
    from io import BytesIO

    image.save(buffer := BytesIO(), "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--block", "2"], "search.block"),
        (["--model", "ViT-B-99"], "--model ViT-B-99"),
        (["--class-embeddings", "wrong.npz"], "but the model's embeddings have width 24"),
        (["--shards", "nothing-*.tar"], "nothing-"),
        (["--rescore", "some"], "--rescore some"),
        (["--keep-rates", "2"], "--keep-rates 2.0"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(data, undisturbed, address, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "wrong.npz", table=np.ones((3, 8)))
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    done = search_here(data, undisturbed, *flags, address=address)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


@pytest.mark.ray
def test_bad_input_ends_a_process_with_one_line(data, tmp_path):
    done = search(data, tmp_path / "out", "--block", "99")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "--block 99" in lines[0]
    assert not (tmp_path / "out").exists()
