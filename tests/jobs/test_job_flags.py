"""The flags of the jobs: names and defaults stay what scripts of users rely on; each is declared once."""

from __future__ import annotations

import re

import pytest
from here import ROOT

from cluster.evaluate import EvaluationJob
from cluster.rank import SearchJob
from cluster.training_job import TrainingConfig
from jobs import embed, evaluate, fit, make_shards, query, report, search, status, train_predictor, train_tokens
from patchrank import assets, flags
from patchrank.errors import UserError
from patchrank.pruning.predictor import SCALED
from patchrank.training.images import ImageSource

RATES = [0.8, 0.7, 0.6, 0.5, 0.4]
CLASSES = {"classes": None, "templates": ["photo"], "class_embeddings": None, "prototypes": []}
MODEL = {"model": None, "pretrained": None, "cut": None, "dtype": "auto"}
ACTORS = {name: None for name in ("address", "actors", "cpus_per_actor", "gpus_per_actor", "images_per_batch")}
ACTORS |= {"patience": 600.0, "keep_work": 300.0}
IMAGES = {
    "rankings": "rankings", "shards": None, "model": None, "pretrained": None, "dtype": "auto",
    "held_out": 0.1, "test": None, "measured": 1000, "cache_features": None, "cut": None, "recompute": False,
}  # fmt: skip
TRAINING = {
    "batch": 64, "accumulate": 1, "seed": 0, "deepspeed": None, "checkpoints": 5, "max_failures": 3,
    "address": None, "workers": None, "cpus_per_worker": None, "gpus_per_worker": None, "estimate": False,
    "keep_rates": RATES,
}  # fmt: skip
DEFAULTS = {
    search: {
        **MODEL, **CLASSES, **ACTORS, "shards": [], "out": "rankings", "limit": None, "max_pixels": 89478485,
        "retry_rejects": False,
        "estimate": False, "score": "preservation", "keep": 0.4, "steps": None, "remove_per_step": 4, "block": 1,
        "rescore": 0, "rank_by": "effects", "proposals": 2, "bank": None, "keep_rates": RATES,
        "candidates_per_batch": None,
    },
    evaluate: {
        **MODEL, **CLASSES, **ACTORS, "rankings": None, "shards": [], "out": "evaluation", "limit": None,
        "held_out": 1.0, "max_pixels": 89478485, "predictor": None, "tokens": None, "bundle": None, "methods": None,
        "keep_rates": RATES, "match": None, "save_bundle": None, "batch_sizes": [1, 8, 64],
        "timed_keep_rates": [0.6, 0.5], "timed_seconds": 5.0, "neighbours": 5000,
    },
    embed: {
        **MODEL, **CLASSES, **ACTORS, "shards": [], "out": "embeddings", "precision": "float16", "limit": None,
        "max_pixels": 89478485, "estimate": False, "bundle": None, "keep": None,
    },
    train_predictor: {
        **IMAGES, **TRAINING, "loss": "bce", "target": None, "width": SCALED, "expansion": 2.0, "mixing": SCALED,
        "layers": 2, "readout": True, "class_token": True,
        "golden": 0.5, "objective": None, "keep": 0.5, "out": "predictor", "epochs": 10, "learning_rate": 0.003,
    },
    train_tokens: {
        **IMAGES, **TRAINING, "predictor": "predictor", "keep": 0.6, "tokens": 4, "place": "cut", "text": False,
        "label_weight": 0.1, "predictor_rate": 0.2, "shift_rate": 0.1, "shifts": True, "scales": True, "merged": 0.375,
        "out": "tokens", "epochs": 5, "learning_rate": 0.01,
    },
}  # fmt: skip
JOBS = {job.__name__.removeprefix("jobs."): job for job in (*DEFAULTS, fit, make_shards, query, report, status)}


@pytest.mark.parametrize("job", DEFAULTS)
def test_names_and_defaults(job):
    found = vars(job.parser().parse_args([]))
    assert {name: list(value) if value == () else value for name, value in found.items()} == DEFAULTS[job]


@pytest.mark.parametrize(
    "job, expected",
    [
        (search, SearchJob()),
        (evaluate, EvaluationJob()),
        (train_tokens, ImageSource()),
        (train_predictor, train_predictor.DEFAULT),
    ],
)
def test_without_flags_a_configuration_has_its_own_defaults(job, expected):
    assert flags.read(type(expected), job.parser().parse_args([])) == expected


def test_every_flag_of_a_training_reaches_its_configuration():
    given = "--out o --epochs 0.5 --batch 2 --accumulate 3 --learning-rate 1 --seed 4 --deepspeed d --checkpoints 5"
    machines = "--max-failures 6 --address a --workers 7 --cpus-per-worker 8 --gpus-per-worker 1"
    found = flags.read(TrainingConfig, train_tokens.parser().parse_args(f"{given} {machines}".split()))
    assert list(vars(found).values())[:9] == ["o", 0.5, 2, 3, 1.0, 4, "d", 5, 6]
    assert list(vars(found.machines).values()) == ["a", 7, 8, 1.0]


def test_a_search_without_flags_is_of_what_is_embedded():
    job = search.job(search.parser().parse_args([]))
    assert (job.shards, job.model.name, job.classes.class_names) == (
        assets.TRAIN_SHARDS,
        assets.MODEL,
        str(assets.CLASSNAMES),
    )
    siglip = search.job(search.parser().parse_args(["--model", "embedded-siglip", "--shards", "a.tar"]))
    assert (siglip.shards, siglip.model.name, siglip.classes) == (("a.tar",), assets.SIGLIP, job.classes)
    own = search.job(search.parser().parse_args(["--model", "RN50", "--shards", "a.tar", "--rescore", "all"]))
    assert (own.shards, own.model.name, own.classes.given, own.config.rescore) == (("a.tar",), "RN50", False, None)


@pytest.mark.parametrize(
    "job, given, words",
    [
        (search, "--shards a.tar", "--shards needs --model: an open_clip name, or embedded"),
        (search, "--model embedded", "--model needs --shards: which images"),
        (search, "--pretrained openai", "--pretrained needs --model, an open_clip name"),
        (search, "--limit 0", "--limit 0: must be at least 1"),
        (search, "--bank b.txt", "--bank b.txt: is of --score similarities, not of preservation"),
        (search, "--rescore some", "--rescore some: must be a number or 'all'"),
        (search, "--gpus-per-actor 2", "--gpus-per-actor 2.0: must be 0, or 0.0001 to 1: an actor works on one GPU"),
        (embed, "--shards a.tar", "--shards and --model are needed"),
        (embed, "--precision int8", "--precision int8: must be one of float16, float32"),
        (evaluate, "--batch-sizes 8 0", "--batch-sizes 0: must be at least 1"),
        (evaluate, "--held-out 0", "--held-out 0.0: must be above 0 and at most 1"),
        (evaluate, "--tokens t", "--tokens needs --predictor, which tells the tokens that stay"),
        (evaluate, "--bundle b --predictor p", "--bundle and --predictor exclude each other: choose one"),
        (evaluate, "--save-bundle b", "--save-bundle needs --predictor: a bundle is what training left"),
        (evaluate, "--shards a.tar", "--shards needs --model: "),
    ],
)
def test_flags_that_do_not_go_together_are_refused(job, given, words):
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        job.job(job.parser().parse_args(given.split()))


@pytest.mark.parametrize(
    "file",
    ["README.md", *(f"docs/{name}.md" for name in ("search", "training", "pruning", "models", "cluster", "corpus"))],
)
def test_documented_commands_have_flags_that_there_are(file, capsys):
    text = (ROOT / file).read_text().replace("\\\n", " ")
    commands = re.findall(r"jobs/(\w+)\.py((?: [^`#\n]*)?)", text)
    assert commands
    for name, given in commands:
        with pytest.raises(SystemExit):
            JOBS[name].main(["--help"])
        helped = capsys.readouterr().out
        for flag in re.findall(r"(?<= )--[a-z][a-z-]*", given):
            assert re.search(rf"{flag}\b(?!-)", helped), f"{name}: {flag}"
