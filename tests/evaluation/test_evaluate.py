"""Evaluation: every row against pruning the model by hand, the figures against sums, and the job as a user runs it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from PIL import Image
from small_model import save_model

import patchrank
from cluster.evaluate import EvaluatedModel, EvaluationJob, Pruning, run
from cluster.places import Machines
from jobs import evaluate as evaluate_job
from patchrank.data import shards
from patchrank.data.held_out import is_held_out
from patchrank.data.images import decode
from patchrank.data.shard_job import Reading
from patchrank.errors import UserError
from patchrank.evaluation import neighbours
from patchrank.evaluation.evaluate import EvaluationConfig, ShardEvaluator
from patchrank.evaluation.latency import Timing
from patchrank.model import loading
from patchrank.model.class_source import ClassSource
from patchrank.model.loading import tower_digest
from patchrank.model.tower import Tower
from patchrank.pruning import methods
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.merging import MergedTower
from patchrank.pruning.methods import METHODS, Entry, Method
from patchrank.pruning.predictor import PredictorConfig
from patchrank.pruning.prompts import TokensConfig
from patchrank.pruning.pruned import pruned_tower
from patchrank.pruning.selector import Selector
from patchrank.report import evaluation as report_evaluation
from patchrank.search.config import SearchConfig
from patchrank.search.ranker import ShardRanker
from patchrank.search.searcher import Searcher
from patchrank.store import rankings
from patchrank.store.folder import BESIDE, Folder, file_name

pytest_plugins = ["shared_ray"]

CLASSES = ["ant", "bee", "cat"]
KEEP_RATES = (0.75, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small model, two shards of nine images with captions, one of them broken, their rankings, and a bundle."""
    folder = tmp_path_factory.mktemp("data")
    name = save_model(folder / "model", context_length=8, image_size=16)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    random = np.random.default_rng(0)
    for shard in range(2):
        with wds.TarWriter(str(folder / f"images-{shard}.tar")) as writer:
            for number in range(9):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                sample = {"__key__": f"{shard}-{number}", "png": Image.fromarray(pixels)}
                if number != 4:
                    sample["cls"] = number % 3
                if number != 5:
                    sample["txt"] = f"number {shard} {number}" + f"\nanother {number} {shard}" * (number % 2)
                if number == 8:
                    sample["png"] = b"broken"
                writer.write(sample)
    model = loading.load(name)
    tower = Tower(model.visual)
    settings = {
        "model": {"weights": model.weights, "cut": 1, "dtype": "float32"},
        "grid": [4, 4],
        "search": asdict(SearchConfig()),
        "keep_rates": [0.5],
        "classes": None,
        "about": {"model": model.name, "pretrained": None, "class_names": None},
    }
    ranked = Folder(str(folder / "rankings")).prepare(settings)
    ranker = ShardRanker(Searcher(tower, SearchConfig(), keep_rates=[0.5]), Reading(model.preprocess()))
    for shard in range(2):
        uri = str(folder / f"images-{shard}.tar")
        ranked.write(uri, ranker.rank(uri).table, encode=rankings.encode)
    about = {
        "name": model.name,
        "pretrained": None,
        "weights": {"float32": tower_digest(model.visual)},
        "cut": 1,
        "grid": [4, 4],
        "blocks": 4,
    }
    torch.manual_seed(1)
    bundle = Bundle(about, asdict(PredictorConfig((4, 4), 32, width=8)), asdict(TokensConfig(32, count=2)))
    for parameter in bundle.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    bundle.save_pretrained(folder / "bundle")
    return folder


def job(data, out, address=None, rankings="rankings", batch_sizes=(1, 2), **pruning):
    return EvaluationJob(
        rankings=rankings and str(data / rankings),
        shards=[str(data / "images-{0,1}.tar")],
        out=str(out),
        model=EvaluatedModel(f"local-dir:{data / 'model'}", dtype="float32"),
        pruning=Pruning(**{"bundle": str(data / "bundle"), "keep_rates": KEEP_RATES, **pruning}),
        classes=ClassSource(str(data / "classes.json")),
        timing=Timing(batch_sizes, [0.5], 0),
        machines=Machines(address, cpus_per_actor=1),
        images_per_batch=4,
    )


@pytest.fixture(scope="module")
def done(data, address, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return run(job(data, out, address=address, save_bundle=str(out.parent / "bundle")))


def rows_of(folder):
    return [row for path in sorted(Path(folder).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def samples_of(data, preprocess):
    for shard in range(2):
        for sample in shards.read(str(data / f"images-{shard}.tar")):
            if not sample.key.endswith("8"):
                yield sample, preprocess(decode(sample.image))[None]


def test_every_row_is_what_pruning_the_model_by_hand_gives(data, done):
    rows = {(row["key"], row["method"], row["keep"]): row for row in rows_of(done.folder)}
    model = open_clip.create_model(f"local-dir:{data / 'model'}").eval()
    loaded = loading.load(f"local-dir:{data / 'model'}")
    names = ["golden", "predictor", "predictor-tokens", "class-attention", "token-merging", "random"]
    cells = [("unpruned", 1.0)] + [(name, keep) for name in names for keep in KEEP_RATES]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{data / 'model'}")
    embeddings = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, ["a photo of a {}."]).T
    golden = patchrank.Golden(str(data / "rankings"))
    bundle = Bundle.open(str(data / "bundle"))
    plain = Bundle(bundle.model, asdict(bundle.predictor.config))
    plain.load_state_dict({key: value for key, value in bundle.state_dict().items() if "tokens." not in key})
    ways = {"golden": golden, "predictor": plain, "predictor-tokens": bundle}
    seen = 0
    for sample, pixels in samples_of(data, loaded.preprocess()):
        with torch.no_grad():
            whole = patchrank.restore(model).encode_image(pixels, normalize=True)[0]
        for name, keep in cells:
            row = rows[sample.key, name, keep]
            seen += 1
            if name == "random":  # matched to the predictor: as many tokens as its multiply-adds pay for
                schedule = pruned_tower(name, model.visual, bundle.cut, keep, bundle).schedule
                assert len(row["kept"]) == schedule[bundle.cut] >= 16 * keep
                continue
            with torch.no_grad(), golden.of([sample.key]):
                if name == "token-merging":
                    model.visual = pruned_tower(name, model.visual, bundle.cut, keep, bundle)
                elif name == "class-attention":
                    patchrank.prune(model, name, keep=len(row["kept"]) / 16)
                elif name != "unpruned":
                    patchrank.prune(model, ways[name], keep=keep)
                found = model.encode_image(pixels, normalize=True)[0]
                patchrank.restore(model)
            likely = (loaded.logit_scale * embeddings @ found).softmax(dim=0)
            assert row["cosine"] == pytest.approx((found @ whole).item(), abs=1e-5)
            assert row["confidence"] == pytest.approx(likely.max().item(), abs=1e-4)
            assert row["label"] == sample.label and row["shard"].endswith(f"images-{sample.key[0]}.tar")
            if likely.topk(2).values.diff().abs() > 1e-3:
                assert row["prediction"] == int(likely.argmax())
            assert row["top5"] == (None if sample.label is None else True)  # of three classes
            assert (row["kept"] is None) == (name in ("unpruned", "token-merging"))
            assert row["captions"] == (list(sample.captions) or None)
            if sample.captions:
                torch.testing.assert_close(torch.tensor(row["embedding"]), found, atol=1e-4, rtol=0)
            if name == "golden":
                assert row["matching"] == 1
    assert seen == len(rows) == 16 * len(cells)
    rejects = rows_of(Path(done.folder) / BESIDE / "rejects")
    assert [row["key"] for row in rejects] == ["0-8", "1-8"]


@pytest.mark.long
def test_a_search_with_a_limit_limits_its_evaluation(data, address, tmp_path):
    whole = rankings.open(str(data / "rankings"))
    part = Folder(str(tmp_path / "rankings")).prepare(whole.settings | {"limit": 3})
    for shard in range(2):
        uri = str(data / f"images-{shard}.tar")
        part.write(uri, whole.shard(uri)[:3], encode=rankings.encode)
    flags = {"rankings": str(tmp_path / "rankings"), "batch_sizes": [], "keep_rates": [0.5]}
    summary = run(job(data, tmp_path / "out", address=address, methods=["golden"], **flags))
    assert {row["key"] for row in rows_of(summary.folder)} == {f"{shard}-{n}" for shard in range(2) for n in range(3)}
    assert not (Path(summary.folder) / BESIDE / "rejects").exists()


def test_the_figures_are_the_sums_of_the_rows(data, done):
    content = json.loads((Path(done.folder) / BESIDE / "figures.json").read_text())
    assert content == json.loads(json.dumps(asdict(done.record)))
    rows = rows_of(done.folder)
    assert content["images"] == 16 and content["class_names"] == CLASSES and len(content["figures"]) == 13
    for figure in content["figures"]:
        mine = [row for row in rows if (row["method"], row["keep"]) == (figure["method"], figure["keep"])]
        labelled = [row for row in mine if row["label"] is not None]
        assert (figure["images"], figure["labelled"]) == (16, 14) == (len(mine), len(labelled))
        assert figure["top1"] == np.mean([row["prediction"] == row["label"] for row in labelled])
        assert figure["top5"] == 1
        assert figure["cosine"] == pytest.approx(np.mean([row["cosine"] for row in mine]))
        matching = [row["matching"] for row in mine if row["matching"] is not None]
        assert figure["matching"] == (pytest.approx(np.mean(matching)) if matching else None)
        assert figure["multiply_adds"] == figure["counted"]  # the formula and PyTorch agree
    cost = {(figure["method"], figure["keep"]): figure["multiply_adds"] for figure in content["figures"]}
    assert content["compared_at"] == "equal multiply-adds"
    for keep in KEEP_RATES:
        assert cost["predictor-tokens", keep] == cost["predictor", keep] > cost["golden", keep]
        assert cost["class-attention", keep] <= cost["predictor", keep] >= cost["random", keep] >= cost["golden", keep]
    assert content["figures"][0]["method"] == "unpruned" and content["figures"][1]["keep"] == 0.75
    for one in content["classes"]:
        mine = [row for row in rows if all(row[name] == one[name] for name in ("label", "method", "keep"))]
        assert one["name"] == CLASSES[one["label"]] and one["images"] == len(mine)
        assert one["top1"] == pytest.approx(np.mean([row["prediction"] == row["label"] for row in mine]))


def test_retrieval_against_a_loop(data, done):
    rows = rows_of(done.folder)
    model = loading.load(f"local-dir:{data / 'model'}")
    for one in asdict(done.record)["retrieval"]:
        mine = [row for row in rows if row["captions"] and (row["method"], row["keep"]) == (one["method"], one["keep"])]
        texts = [(number, caption) for number, row in enumerate(mine) for caption in row["captions"]]
        with torch.no_grad():
            vectors = model.clip.encode_text(model.tokenizer()([text for _, text in texts]), normalize=True).numpy()
        images = np.array([row["embedding"] for row in mine])
        similar = images @ vectors.T
        assert (one["images"], one["captions"]) == (14, len(texts)) == (len(mine), 20)
        for k in (1, 5, 10):
            hits = [any(texts[t][0] == i for t in np.argsort(-similar[i])[:k]) for i in range(len(mine))]
            assert one["image_to_text"][str(k)] == pytest.approx(np.mean(hits))
            hits = [texts[t][0] in np.argsort(-similar[:, t])[:k] for t in range(len(texts))]
            assert one["text_to_image"][str(k)] == pytest.approx(np.mean(hits))
    assert len(asdict(done.record)["retrieval"]) == 13


def test_times_and_the_bundle(data, done):
    timed = [(row["method"], row["keep"], row["batch"]) for row in asdict(done.record)["latency"]]
    names = ["predictor", "predictor-tokens", "class-attention", "token-merging"]
    assert timed == [(name, 0.5, batch) for batch in (1, 2) for name in names]
    full = asdict(done.record)["figures"][0]["multiply_adds"]
    for row in asdict(done.record)["latency"]:
        assert row["seconds"] > 0 and row["speedup"] > 0 and row["rounds"] >= 3
        costs = {(one["method"], one["keep"]): one["multiply_adds"] for one in asdict(done.record)["figures"]}
        assert row["predicted"] == full / costs[row["method"], 0.5]
    bundle = Bundle.open(str(Path(done.folder).parent / "bundle"))
    assert {row["method"] for row in bundle.figures} == {"unpruned", "predictor", "predictor-tokens"}
    near = {(one.method, one.keep): one for one in done.record.neighbours}
    assert bundle.figures[1]["neighbours"] == near["predictor", 0.75].pruned_queries
    bundle.keep = 0.5
    assert neighbours.sentence(near["predictor-tokens", 0.5]) in str(bundle.generate_model_card())


@pytest.mark.long
def test_an_evaluation_goes_on_where_it_was_and_another_is_kept_out(data, address, done, tmp_path):
    files = {path: path.stat().st_mtime_ns for path in Path(done.folder).glob("*.parquet")}
    (first, _), before = sorted(files), rows_of(done.folder)
    first.unlink()
    again = run(job(data, done.folder, address=address, batch_sizes=[]))
    assert again.resumed == 1 and again.total("images") == 8 and asdict(again.record)["latency"] == []
    assert rows_of(done.folder) == before
    assert asdict(again.record)["figures"] == asdict(done.record)["figures"]
    with pytest.raises(UserError, match=r"holds another evaluation \(keep_rates: \[0.75, 0.5\] there, \[0.5\] now"):
        run(job(data, done.folder, address=address, keep_rates=[0.5]))
    settings = json.loads((Path(done.folder) / BESIDE / "evaluation.json").read_text())["settings"]
    before = {name: value for name, value in settings.items() if name != "compared_at"}  # as 0.1.0 wrote them
    Folder(str(tmp_path / "out"), "evaluation").prepare(before)
    with pytest.raises(UserError, match=r"another evaluation \(compared_at: not set there, .*\); give another --out"):
        run(job(data, tmp_path / "out", address=address))


def test_figures_are_of_the_job_s_shards_alone(data, address, tmp_path):
    flags = {"address": address, "batch_sizes": [], "keep_rates": [0.5], "methods": ["random"]}
    first, second = (
        run(replace(job(data, tmp_path / "out", **flags), shards=[str(data / f"images-{number}.tar")]))
        for number in range(2)
    )
    assert first.folder == second.folder and len(rows_of(first.folder)) == 2 * 16
    for number, summary in enumerate((first, second)):
        content = asdict(summary.record)
        assert [Path(uri).name for uri in content["shards"]] == [f"images-{number}.tar"]
        assert content["images"] == 8 and {row["images"] for row in content["figures"]} == {8}
        assert {row["images"] for row in content["retrieval"]} == {7}
        assert sum(row["images"] for row in content["classes"] if row["method"] == "random") == 7
    assert report_evaluation.read(second.folder).files == [file_name(str(data / "images-1.tar"))]


def test_where_no_shard_can_be_read_the_reason_is_told(data, address, tmp_path):
    lost = replace(job(data, tmp_path / "out", address=address, rankings=None), shards=[str(tmp_path / "lost.tar")])
    with pytest.raises(UserError, match=r"lost\.tar: .*No such file"):
        run(lost)


def test_an_image_that_overflows_in_one_way_of_pruning_is_rejected(data):
    model = loading.load(f"local-dir:{data / 'model'}")
    tower = Tower(model.visual)

    class Overflows(MergedTower):
        def forward(self, images):
            return super().forward(images).index_fill(0, torch.tensor([2]), math.inf)

    one = Method(image_tower=lambda visual, schedule: Overflows(visual, [1, 1, 1]))
    chosen = {"merging": one} | methods.make(["random"], tower.device)
    config = EvaluationConfig([0.5], images_per_batch=8)
    found = ShardEvaluator(tower, chosen, model.preprocess(), config).evaluate(str(data / "images-0.tar"))
    assert set(found.table["key"].to_pylist()) == {f"0-{number}" for number in range(8) if number != 2}
    assert len(found.table) == 7 * 3 and all(math.isfinite(value) for value in found.table["cosine"].to_pylist())
    assert [(reject.key, "float32" in reject.reason) for reject in found.rejects] == [("0-2", True), ("0-8", False)]


def test_at_keep_1_every_way_of_pruning_leaves_a_tower_of_low_precision_as_it_is(data):
    model = loading.load(f"local-dir:{data / 'model'}")
    tower = Tower(model.visual, dtype=torch.bfloat16)
    chosen = methods.make(["random", "class-attention", "token-merging"], tower.device)
    evaluator = ShardEvaluator(tower, chosen, model.preprocess(), EvaluationConfig([1.0]))
    found = evaluator.evaluate(str(data / "images-0.tar"))
    assert len(found.table) == 8 * 4 and min(found.table["cosine"].to_pylist()) > 0.9999


def test_a_method_that_is_new_in_the_registry_is_evaluated(data, monkeypatch):
    class First(Selector):
        def forward(self, tokens, count, attention, batch=None):
            return -torch.arange(float(count)).expand(len(tokens), -1)

    monkeypatch.setitem(METHODS, "first", Entry("First", lambda bundle: Method(First()), "#000000", "x", "-", 9))
    model = loading.load(f"local-dir:{data / 'model'}")
    tower = Tower(model.visual)
    chosen = methods.make(methods.choose(["first"], set()), tower.device)
    evaluator = ShardEvaluator(tower, chosen, model.preprocess(), EvaluationConfig([0.5]))
    table = evaluator.evaluate(str(data / "images-0.tar")).table
    kept = [row["kept"] for row in table.to_pylist() if row["method"] == "first"]
    assert kept == [list(range(8))] * 8


def test_held_out_images_alone_and_images_without_a_ranking(data, tmp_path):
    model = loading.load(f"local-dir:{data / 'model'}")
    tower = Tower(model.visual)
    golden, config = methods.make(["golden"], tower.device), EvaluationConfig([0.5], held_out=0.5)
    corpus = rankings.open(str(data / "rankings"))
    found = ShardEvaluator(tower, golden, model.preprocess(), config, corpus).evaluate(str(data / "images-0.tar"))
    keys = {key for key in (f"0-{number}" for number in range(8)) if is_held_out(key, 0.5)}
    assert 0 < len(keys) < 8 and set(found.table["key"].to_pylist()) == keys
    assert found.table["prediction"].null_count == len(found.table)  # without classes

    cut = tmp_path / "images-0.tar"
    content = (data / "images-0.tar").read_bytes()
    cut.write_bytes(content[: content.index(b"0-6.png")])
    chance = methods.make(["random"], tower.device)
    found = ShardEvaluator(tower, chance, model.preprocess(), EvaluationConfig([0.5])).evaluate(str(cut))
    assert "truncated" in found.error and len(set(found.table["key"].to_pylist())) >= 5


def test_bad_input_is_one_line_and_writes_nothing(data, address, tmp_path):
    name = f"local-dir:{data / 'model'}"
    some = ["--shards", str(data / "images-0.tar"), "--model", name]
    ranked = ["--rankings", str(data / "rankings")]
    tokens = [*ranked, "--bundle", str(data / "bundle")]
    for flags, words in (
        (["--shards", "x.tar"], "--shards needs --model"),
        (["--rankings", str(tmp_path)], "holds no search.json"),
        ([*some, "--limit", "0"], "--limit 0"),
        ([*some, "--held-out", "0"], "--held-out 0.0"),
        ([*some, "--batch-sizes", "0"], "--batch-sizes 0"),
        ([*some, "--tokens", "x"], "--tokens needs --predictor"),
        ([*some, "--bundle", "x", "--predictor", "y"], "exclude each other"),
        ([*some, "--save-bundle", "x"], "--save-bundle needs --predictor"),
        ([*ranked, "--bundle", "x", "--save-bundle", "s3://b/x"], "--save-bundle s3://b/x: must be a folder of this"),
        ([*ranked, "--gpus-per-actor", "-1"], "--gpus-per-actor -1.0: must be 0, or 0.0001 to 1"),
        ([*ranked, "--gpus-per-actor", "2"], "--gpus-per-actor 2.0: must be 0, or 0.0001 to 1"),
        ([*ranked, "--model", "embedded", "--pretrained", "openai"], "--pretrained needs --model, an open_clip name"),
        ([*some, "--methods", "golden"], "--methods golden: needs --rankings"),
        ([*some, "--methods", "guess"], "--methods guess: must be one of"),
        ([*some, "--methods", "predictor"], "--methods predictor: needs --predictor"),
        ([*ranked, "--keep-rates", "0"], "--keep-rates 0"),
        ([*ranked, "--match", "17"], "--match 17: must be 1 to 16"),
        ([*ranked, "--cut", "2"], "another --cut"),
        ([*tokens, "--cut", "2"], "--cut 2: the predictor was trained for --cut 1"),
        ([*ranked, "--bundle", str(tmp_path)], "holds no bundle"),
        ([*tokens, "--keep-rates", "0.5", "0.1"], "^--keep-rates 0.1: leaves no place for patches beside 2 learnable"),
        ([*tokens, "--timed-keep-rates", "0.1"], "^--timed-keep-rates 0.1: leaves no place for patches beside 2"),
        ([*ranked, "--pretrained", "openai"], "--pretrained needs --model"),
    ):
        with pytest.raises(UserError, match=words) as error:
            evaluate_job.main([*flags, "--address", address, "--out", str(tmp_path / "out")])
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
