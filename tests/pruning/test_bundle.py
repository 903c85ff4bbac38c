"""Bundles: made of what training left, saved, shared, loaded, and refused where they do not belong."""

from __future__ import annotations

import base64
import errno
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub import ModelCard, constants
from small_model import save_model

import patchrank
from patchrank.errors import UserError
from patchrank.model import classes, loading
from patchrank.model.classes import Classes
from patchrank.pruning import predictor, prompts
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.predictor import Predictor, PredictorConfig
from patchrank.pruning.prompts import TokensConfig, VisualTokens

FIGURES = [
    {"method": "unpruned", "keep": 1.0, "images": 7, "top1": 0.9, "cosine": 1.0, "multiply_adds": 2_000_000_000},
    {"method": "predictor", "keep": 0.5, "images": 7, "top1": None, "cosine": 0.987654, "multiply_adds": None},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, and folders of a predictor and of tokens with and without text tokens, as training leaves them."""
    folder = tmp_path_factory.mktemp("trained")
    model = loading.load(save_model(folder / "model"))
    torch.manual_seed(1)
    about = {"name": model.name, "pretrained": None, "weights": model.weights, "cut": 1}
    record = {"model": about, "search": "0123abcd", "keep": 0.5}
    predictor.save(str(folder / "predictor"), Predictor(PredictorConfig((6, 6), 32, width=8)), record)
    plain = record | {"classes": None, "class_names": ["ant", "bee"]}
    prompts.save(str(folder / "tokens"), VisualTokens(TokensConfig(32, count=3)), plain)
    coupled = VisualTokens(TokensConfig(32, count=3, place="input", text_width=8))
    own = Classes(torch.nn.functional.normalize(torch.randn(2, 24), dim=-1), "text tokens 12", ["ant", "bee"])
    prompts.save(str(folder / "text-tokens"), coupled, plain | {"classes": own.identity})
    classes.save(str(folder / "text-tokens" / "classes.safetensors"), own)
    return folder, model


@pytest.fixture
def clip(trained):
    """The model as its user loads it."""
    return open_clip.create_model(trained[1].name).eval()


@pytest.mark.parametrize("tokens", [None, "tokens", "text-tokens"])
def test_a_bundle_comes_back_as_it_was_and_prunes_as_before(trained, clip, tmp_path, tokens):
    folder, model = trained
    bundle = Bundle.from_training(model, str(folder / "predictor"), tokens and str(folder / tokens))
    bundle.with_figures(FIGURES).save_pretrained(tmp_path / "bundle")
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert len({path.stat().st_mode for path in (tmp_path / "bundle").iterdir()}) == 1  # whoever reads one reads all

    again = Bundle.from_pretrained(str(tmp_path / "bundle"))
    assert again.state_dict().keys() == bundle.state_dict().keys()
    assert all(torch.equal(value, bundle.state_dict()[key]) for key, value in again.state_dict().items())
    assert (again.cut, again.keep, again.search, again.figures) == (1, 0.5, "0123abcd", FIGURES)
    assert again.model == bundle.model and again.class_names == (["ant", "bee"] if tokens == "text-tokens" else None)
    assert (again.classes is None) == (tokens != "text-tokens")

    images = torch.randn(4, 3, 24, 24)
    expected = patchrank.prune(clip, bundle, keep=0.5).encode_image(images)
    for how in (tmp_path / "bundle", str(tmp_path / "bundle"), again):
        torch.testing.assert_close(patchrank.prune(clip, how, keep=0.5).encode_image(images), expected)
    made_for = patchrank.prune(clip, bundle, keep=0.5).visual.schedule
    assert patchrank.prune(clip, again).visual.schedule == made_for
    assert made_for[1] == 18 if tokens is None else made_for[1] < 18  # learnable tokens take places


def test_a_bundle_that_could_not_be_written_is_none(trained, tmp_path, monkeypatch):
    folder, model = trained
    bundle = Bundle.from_training(model, str(folder / "predictor"))
    bundle.save_pretrained(tmp_path / "bundle")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        bundle.save_pretrained(tmp_path / "bundle")
    assert not [path for path in (tmp_path / "bundle").iterdir() if path.suffix == ".tmp"]
    with pytest.raises(UserError, match="holds no bundle"):
        Bundle.open(str(tmp_path / "bundle"))


def test_the_model_card_tells_how_to_use_it_and_how_good_it_is(trained, tmp_path):
    folder, model = trained
    bundle = Bundle.from_training(model, str(folder / "predictor"), str(folder / "tokens"))
    bundle.with_figures(FIGURES).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "patchrank" and {"clip", "token-pruning"} <= set(card.data.tags)
    assert str(folder) not in card.text + (tmp_path / "config.json").read_text()  # it goes elsewhere
    assert "patchrank.prune(model" in card.text and "| 3, before block 1 |" in card.text
    assert (
        "| predictor | 0.5 | 7 |  | 0.9877 |  |  |" in card.text
        and "| unpruned | 1 | 7 | 90.0 | 1.0000 |  | 2.00 |" in card.text
    )
    bundle.save_pretrained(tmp_path)  # other figures, so another card
    assert "No evaluation figures" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    bundle.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_model_in_lower_precision_is_known_again(trained, clip):
    folder, model = trained
    bundle = Bundle.from_training(model, str(folder / "predictor"))
    for dtype in (torch.bfloat16, torch.float16):
        low = open_clip.create_model(model.name).eval().to(dtype)
        patchrank.prune(low, bundle, keep=0.5)
        assert low.encode_image(torch.randn(1, 3, 24, 24, dtype=dtype)).isfinite().all()
        low.visual.original.conv1.weight.data[0, 0, 0, 0] += 1
        with pytest.raises(UserError, match="this bundle is for"):
            patchrank.prune(low, bundle, keep=0.5)
    for precision in ("fp16", "bf16", "pure_fp16"):  # the first two keep layer norms in float32
        low = open_clip.create_model(model.name, precision=precision).eval()
        patchrank.prune(low, bundle, keep=0.5)
        images = torch.randn(1, 3, 24, 24, dtype=low.visual.original.conv1.weight.dtype)
        assert low.encode_image(images).isfinite().all()
    with pytest.raises(UserError, match="a model in float64 cannot be told"):
        patchrank.prune(clip.double(), bundle)


def test_a_bundle_of_another_model_is_refused_by_name(trained, tmp_path):
    folder, model = trained
    bundle = Bundle.from_training(model, str(folder / "predictor"))
    for number, vision in enumerate(({"seed": 1}, {"layers": 5}, {"image_size": 28}, {"head_width": 16})):
        other = open_clip.create_model(save_model(tmp_path / str(number), **vision))
        before = other.visual
        with pytest.raises(UserError, match=f"this bundle is for local-dir:model, image tower {model.weights}, and"):
            patchrank.prune(other, bundle)
        assert other.visual is before


def test_training_of_another_model_makes_no_bundle(trained, tmp_path):
    folder, _ = trained
    other = loading.load(save_model(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="this predictor was made for another model"):
        Bundle.from_training(other, str(folder / "predictor"))
    with pytest.raises(UserError, match="holds no predictor"):
        Bundle.from_training(other, str(tmp_path))


def test_what_is_no_bundle_is_refused_in_one_line(trained, clip, tmp_path):
    folder, model = trained
    whole = tmp_path / "whole"
    Bundle.from_training(model, str(folder / "predictor")).save_pretrained(whole)

    def broken(name, change):
        path = tmp_path / name
        path.mkdir()
        for file in whole.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        change(path)
        return path

    def edit(**changes):
        def change(path):
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | changes))

        return change

    cases = [
        (folder / "predictor", "it is what training left"),
        (tmp_path, "holds no bundle"),
        (broken("cut", lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100)), "damaged"),
        (broken("gone", lambda path: (path / "model.safetensors").unlink()), "damaged"),
        (broken("text", lambda path: (path / "config.json").write_text("{")), "damaged"),
        (broken("future", edit(format="9")), "has format 9, and this version"),
        (broken("strange", edit(predictor_config={"grid": [2, 2]})), "damaged"),
        (broken("small", edit(predictor_config={"grid": [2, 2], "input_width": 32})), "damaged"),
    ]
    for path, words in cases:
        with pytest.raises(UserError, match=words) as error:
            patchrank.prune(clip, path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the mixin needs: create a repository, take a commit, hand its files out."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            return self._json({"url": "http://127.0.0.1/me/small", "name": "me/small"})
        if "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    Hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._json(
                {"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/me/small/commit/0"}
            )
        return self._json({})

    def do_HEAD(self):
        self._file(False)

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            return self._json({"id": "me/small", "sha": "0" * 40, "siblings": []})
        return self._file(True)

    def _file(self, body):
        owner, _, name = self.path.partition("/resolve/")
        data = Hub.files.get(name.partition("/")[2]) if owner == "/me/small" else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if owner == "/me/small" else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _json(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for module in (constants, huggingface_hub.file_download, huggingface_hub.hf_api):
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE"):
            if hasattr(module, name):
                value = {"ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
                template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
                monkeypatch.setattr(module, name, value.get(name, template))
    monkeypatch.setattr(Hub, "files", {})
    yield endpoint
    server.shutdown()
    server.server_close()


def test_a_bundle_goes_to_the_hub_and_comes_back(trained, clip, hub):
    folder, model = trained
    bundle = Bundle.from_training(model, str(folder / "predictor"))
    bundle.push_to_hub("me/small", token="hf_not_a_secret")
    assert {"config.json", "model.safetensors", "README.md"} <= Hub.files.keys()
    images = torch.randn(2, 3, 24, 24)
    expected = patchrank.prune(clip, bundle).encode_image(images)
    torch.testing.assert_close(patchrank.prune(clip, "me/small").encode_image(images), expected)
    with pytest.raises(UserError, match="me/nothing: no such folder, and the hub says"):
        patchrank.prune(clip, "me/nothing")
