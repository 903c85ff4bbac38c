"""The training jobs from a search to the table, as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from PIL import Image
from small_model import save_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import patchrank
from cluster.places import Machines
from cluster.rank import SearchJob, search
from jobs import evaluate as evaluate_job
from jobs import train_predictor, train_tokens, training
from patchrank.data import shards
from patchrank.data.images import decode
from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.model.class_source import ClassSource
from patchrank.model.loading import ModelSource
from patchrank.pruning import methods, predictor, prompts
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.comparison import Comparison
from patchrank.pruning.prompts import PromptedText, TokensConfig
from patchrank.store import rankings
from patchrank.training.images import ImageSource, open_images
from patchrank.training.tasks import TokensTask

pytest_plugins = ["shared_ray"]

CLASSES = ["dark", "bright"]


@pytest.fixture(scope="module")
def data(address, tmp_path_factory):
    """A model, two shards of 40 images whose brightness is their class, and the rankings of both."""
    folder = tmp_path_factory.mktemp("data")
    name = save_model(folder / "model")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    random = np.random.default_rng(0)
    for shard in range(2):
        with wds.TarWriter(str(folder / f"images-{shard}.tar")) as writer:
            for number in range(40):
                pixels = random.integers(0, 128, (24, 24, 3)) + 127 * (number % 2)
                image = Image.fromarray(pixels.astype(np.uint8))
                writer.write({"__key__": f"{shard}-{number}", "png": image, "cls": number % 2})
    done = search(
        SearchJob(
            [str(folder / "images-{0,1}.tar")],
            str(folder / "rankings"),
            model=ModelSource(name, dtype="float32"),
            classes=ClassSource(str(folder / "classes.json"), prototypes=[str(folder / "images-0.tar")]),
            machines=Machines(address, 1, 1),
        )
    )
    assert done.total("images") == 80 and not done.failures
    return folder


def flags(data, *more):
    return ["--rankings", str(data / "rankings"), "--held-out", "0.2", "--dtype", "float32", *more]


def test_from_rankings_to_the_table(data, address, tmp_path, capsys):
    """With more workers than shards, and tokens before the cut kept on disk."""
    cache, test = str(tmp_path / "cache"), str(data / "images-1.tar")
    shared = ["--shards", str(data / "images-0.tar"), "--test", test, "--cache-features", cache, "--batch", "8"]
    shared += ["--address", address, "--cpus-per-worker", "1"]
    trained = ["--out", str(tmp_path / "predictor"), "--workers", "2", "--epochs", "20", "--learning-rate", "0.01"]
    assert train_predictor.main(flags(data, *shared, *trained)) == 0
    printed = capsys.readouterr().out
    assert "40 with a ranking, 0 without, 0 rankings without an image" in printed
    assert f"next          python jobs/train_tokens.py --rankings {data / 'rankings'}" in printed
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    learnt, record = predictor.load(str(tmp_path / "predictor"))
    before, after = record["figures"]["before"], record["figures"]["after"]
    assert learnt.config.grid == (6, 6)
    assert {"held-out/matching rate at 18", "held-out/Kendall tau", "test/cosine at keep 0.5"} <= set(after)
    assert after["held-out/Kendall tau"] > before["held-out/Kendall tau"]

    trained = ["--predictor", str(tmp_path / "predictor"), "--out", str(tmp_path / "tokens"), "--workers", "1"]
    more = ["--tokens", "4", "--keep", "0.5", "--epochs", "20", "--held-out", "0"]
    assert train_tokens.main(flags(data, *shared, *trained, *more)) == 0
    assert "jobs/evaluate.py" in capsys.readouterr().out
    tokens, record = prompts.load(str(tmp_path / "tokens"))
    before, after = record["figures"]["before"], record["figures"]["after"]
    assert tokens.extra().shape == (4, 32) and record["helps"] is None  # nothing was held out that could tell
    assert after["test/cosine at keep 0.5 with tokens"] > before["test/cosine at keep 0.5 with tokens"]
    losses = [event.value for event in EventAccumulator(str(tmp_path / "tokens/tensorboard")).Reload().Scalars("loss")]
    assert sum(losses[-16:]) < sum(losses[:16]) / 2

    learnt_from = ["--predictor", str(tmp_path / "predictor"), "--tokens", str(tmp_path / "tokens")]
    evaluated = ["--rankings", str(data / "rankings"), "--shards", test, "--dtype", "float32", "--keep-rates", "0.5"]
    out = ["--out", str(tmp_path / "evaluation"), "--save-bundle", str(tmp_path / "bundle"), "--timed-seconds", "0"]
    out += ["--address", address, "--cpus-per-actor", "1"]
    assert evaluate_job.main([*evaluated, *learnt_from, *out]) == 0
    printed = capsys.readouterr().out
    blocks = [block.splitlines() for block in printed.split("\n\n")]
    table = {
        block[0].split(",")[0].split()[0]: {line[:17].strip(): line[17:] for line in block[1:]} for block in blocks[:3]
    }
    assert list(table["top-1"]) == [
        *("unpruned", "golden", "predictor", "predictor-tokens", "class-attention", "token-merging", "random")
    ]
    top1 = after["test/top-1 at keep 0.5 with tokens"]
    assert float(table["top-1"]["predictor-tokens"]) == pytest.approx(100 * top1, abs=0.1)
    assert float(table["cosine"]["golden"]) > float(table["cosine"]["random"])
    assert "40 images of 1 shards" in printed and "PyTorch counts" not in printed

    # What is shipped does what was trained.
    model = open_clip.create_model(f"local-dir:{data / 'model'}").eval()
    patchrank.prune(model, str(tmp_path / "bundle"), keep=0.5)
    _, known = classes.classes_of(rankings.open(str(data / "rankings")))
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{data / 'model'}", return_transform=True)
    samples = [sample for sample in shards.read(test)]
    with torch.no_grad():
        found = model.encode_image(torch.stack([preprocess(decode(sample.image)) for sample in samples]))
    hits = (found @ known.embeddings.T).argmax(dim=1) == torch.tensor([sample.label for sample in samples])
    assert hits.float().mean().item() == pytest.approx(top1, abs=0.03)


@pytest.fixture(scope="module")
def untrained(data, tmp_path_factory):
    """A predictor for the model of the data, cut elsewhere."""
    folder = tmp_path_factory.mktemp("untrained")
    weights = rankings.open(str(data / "rankings")).settings["model"]["weights"]
    learnt = predictor.Predictor(predictor.PredictorConfig((6, 6), 32))
    about = {"name": f"local-dir:{data / 'model'}", "pretrained": None, "weights": weights}
    for name, cut in (("same", 1), ("cut", 2)):
        predictor.save(str(folder / name), learnt, {"model": {**about, "cut": cut}, "keep": 0.5})
    return folder


def test_text_tokens_bring_their_class_embeddings(data, untrained, tmp_path):
    """The task of --text in this process, as the training loop calls it."""
    images, model = open_images(ImageSource(str(data / "rankings"), dtype="float32", held_out=0.2))
    learnt, _ = predictor.load(str(untrained / "same"), images.tower, model.weights)
    prompted = PromptedText(model, CLASSES, 4)
    config = TokensConfig(32, 4, text_width=prompted.width)
    task = TokensTask(images, config=config, predictor=learnt, keep=0.5, prompted=prompted)
    torch.manual_seed(0)
    module = task.start(torch.device("cpu"), 30)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    losses = []
    for batch, _ in zip(task.batches(0, 1, 16, 1, 0), range(30), strict=False):
        loss = task.loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    after = task.evaluate(module, 0, 1, lambda tensor: tensor)
    nothing = replace(task, images=open_images(ImageSource(str(data / "rankings"), dtype="float32", held_out=0))[0])
    assert nothing.evaluate(nothing.start(torch.device("cpu"), 30), 0, 1, lambda tensor: tensor) == {}
    task.save(module, str(tmp_path), {}, after, [task.report()])

    tokens, record = prompts.load(str(tmp_path), images.tower, model.weights)
    assert tokens.text is not None and tokens.text.shape == (4, 8)
    assert record["class_names"] == CLASSES and record["samples"]["joined"] == 80
    bundle = Bundle.from_training(model, str(untrained / "same"), str(tmp_path))
    made = methods.make(["predictor-tokens"], images.tower.device, bundle)
    comparison = Comparison(images.tower, made, [0.5], images.classes)
    for batch in images.ranked.held_out(64):
        comparison.add(batch)
    assert comparison.rows()[-1].top1 == after["held-out/top-1 at keep 0.5 with tokens"]
    (tmp_path / "classes.safetensors").unlink()
    with pytest.raises(UserError, match=r"classes\.safetensors is missing"):
        Bundle.from_training(model, str(untrained / "same"), str(tmp_path))


@pytest.mark.parametrize("alone, together", [(0.91, 0.92), (0.91, 0.905), (0.89, 0.88)])
def test_tokens_that_do_harm_are_not_kept(data, untrained, tmp_path, alone, together):
    """Held-out images decide, at equal cost: tokens and predictor, that predictor alone, or the one of before."""
    images, model = open_images(ImageSource(str(data / "rankings"), dtype="float32", held_out=0.2))
    learnt, _ = predictor.load(str(untrained / "same"), images.tower, model.weights)
    task = TokensTask(images, config=TokensConfig(32, 4), predictor=learnt)
    module = task.start(torch.device("cpu"), 30)
    with torch.no_grad():
        for parameter in module.predictor.parameters():
            parameter += 1
    before, after = {}, {}
    for keep in (0.8, 0.7, 0.6, 0.5, 0.4):
        before[f"held-out/cosine at keep {keep:g} without tokens"] = 0.9
        after[f"held-out/cosine at keep {keep:g} without tokens"] = alone
        after[f"held-out/cosine at keep {keep:g} with tokens"] = together
    task.save(module, str(tmp_path), before, after, [task.report()])
    tokens, record = prompts.load(str(tmp_path), images.tower, model.weights)
    bundle = Bundle.from_training(model, str(untrained / "same"), str(tmp_path))
    helps = together > 0.91
    assert record["helps"] == helps and tokens.config.count == (4 if helps else 0)
    assert (bundle.tokens is not None) == helps
    kept = module.predictor if alone > 0.9 else learnt
    assert all(torch.equal(a, b) for a, b in zip(bundle.predictor.parameters(), kept.parameters(), strict=True))


@pytest.mark.long
def test_images_without_rankings_teach_and_what_it_takes_is_told(data, address, tmp_path, capsys):
    there = ["--rankings", "none", "--shards", str(data / "images-{0,1}.tar"), "--dtype", "float32"]
    there += ["--model", f"local-dir:{data / 'model'}", "--batch", "8", "--held-out", "0.2", "--epochs", "4"]
    there += ["--address", address, "--workers", "1", "--cpus-per-worker", "1", "--keep-rates", "0.5", "0.4"]
    assert train_predictor.main([*there, "--out", str(tmp_path / "predictor"), "--estimate"]) == 0
    printed = capsys.readouterr().out
    assert "of 8 images" in printed and "device-hours" in printed and not (tmp_path / "predictor").exists()
    assert train_predictor.main([*there, "--out", str(tmp_path / "predictor")]) == 0
    printed = capsys.readouterr().out
    assert "0 with a ranking, 80 without" in printed
    assert f"train_tokens.py --rankings none --shards {data / 'images-{0,1}.tar'} --model local-dir:" in printed
    _, record = predictor.load(str(tmp_path / "predictor"))
    before, after = record["figures"]["before"], record["figures"]["after"]
    assert record["search"] is None and record["golden"] == 0
    assert set(after) == {f"held-out/cosine at keep {keep:g}" for keep in (0.5, 0.4)} and after != before


def test_shards_that_were_not_searched_are_told(data, tmp_path, capsys):
    (tmp_path / "other.tar").write_bytes(b"")
    wanted = [str(data / "images-0.tar"), str(tmp_path / "other.tar")]
    images, _ = training.opened(ImageSource(str(data / "rankings"), wanted), seed=0)
    assert images.ranked.shards == [str(data / "images-0.tar")] and images.everything.shards == wanted
    assert f"warning: 1 of the shards have no rankings in {data / 'rankings'}, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--rankings", "{tmp}"], "search.json"),
        (["--rankings", "{tmp}/absent"], "no such folder"),
        (["--shards", "{tmp}/other.tar"], "name the shards as the search did"),
        (["--model", "{tmp}/other"], "was made for another model: weights"),
        (["--pretrained", "openai"], "--pretrained needs --model"),
        (["--held-out", "1"], "--held-out"),
        (["--held-out", "1.5"], "--held-out 1.5"),
        (["--keep", "0.01"], "--keep 0.01"),
        (["--keep", "1.5"], "--keep 1.5"),
        (["--loss", "square"], "--loss square"),
        (["--target", "word"], "--target word"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--batch", "0"], "--batch 0"),
        (["--measured", "0"], "--measured 0"),
        (["--deepspeed", "{tmp}/absent.json"], "--deepspeed"),
    ],
)
def test_bad_input_of_the_predictor_is_one_line_and_writes_nothing(data, tmp_path, changes, words):
    (tmp_path / "other.tar").write_bytes(b"")
    if "--model" in changes:
        torch.manual_seed(1)
        save_model(tmp_path / "other", layers=5)
    changes = [change.format(tmp=tmp_path) for change in changes]
    changes = [f"local-dir:{change}" if changes[0] == "--model" and "/" in change else change for change in changes]
    with pytest.raises(UserError, match=words) as error:
        train_predictor.main(flags(data, "--out", str(tmp_path / "out"), *changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--predictor", "{untrained}/cut"], "another --cut: 2, here 1"),
        (["--predictor", "{untrained}/absent"], "holds no predictor"),
        (["--keep", "0.01"], "--keep 0.01"),
        (["--place", "end"], "--place end"),
        (["--tokens", "-1"], "--tokens -1"),
        (["--tokens", "20"], "--keep-rates 0.5: leaves no place for patches beside 20"),
        (["--rankings", "none"], "--rankings none: needs --shards and --model"),
        (["--text", "--tokens", "30"], "--tokens 30"),
        (["--place", "input", "--cache-features", "{tmp}"], "--cache-features"),
    ],
)
def test_bad_input_of_the_tokens_is_one_line_and_writes_nothing(data, untrained, tmp_path, changes, words):
    changes = [change.format(tmp=tmp_path, untrained=untrained) for change in changes]
    shared = flags(data, "--predictor", str(untrained / "same"), "--out", str(tmp_path / "out"))
    with pytest.raises(UserError, match=words) as error:
        train_tokens.main([*shared, *changes])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
