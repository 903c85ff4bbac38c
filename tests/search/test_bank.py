"""The bank of the score "similarities": where it comes from, and that a search that goes on has the same."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchrank import assets
from patchrank.errors import UserError
from patchrank.model import classes, loading
from patchrank.model.classes import Classes
from patchrank.model.tower import Tower
from patchrank.search import bank
from patchrank.search.config import SearchConfig
from patchrank.search.objective import Objective
from patchrank.search.searcher import Searcher
from patchrank.store.folder import BESIDE, Folder

URIS = ["/data/a.tar", "/data/b.tar"]


@pytest.fixture(scope="module")
def model():
    return loading.load(assets.MODEL)


def test_texts_are_embedded_as_they_are(model, tmp_path):
    (tmp_path / "texts.txt").write_text("a bag on a chair\ntwo coats\n")
    found = bank.find(str(tmp_path / "texts.txt"), model, Folder(str(tmp_path / "out")), URIS)
    expected = model.clip.encode_text(model.tokenizer()(["a bag on a chair", "two coats"]), normalize=True)
    torch.testing.assert_close(found.known.embeddings, expected)
    (tmp_path / "texts.json").write_text(json.dumps(["a bag on a chair", "one coat"]))
    other = bank.find(str(tmp_path / "texts.json"), model, Folder(str(tmp_path / "out")), URIS)
    assert found.identity.startswith("text ") and found.identity != other.identity


def test_embeddings_of_a_file(model, tmp_path):
    table = np.random.default_rng(0).normal(size=(5, model.visual.output_dim))
    np.savez(tmp_path / "x.npz", five=table, six=table)
    found = bank.find(f"{tmp_path}/x.npz:five", model, Folder(str(tmp_path / "out")), URIS)
    torch.testing.assert_close(found.known.embeddings, F.normalize(torch.from_numpy(table).float(), dim=-1))
    assert found.identity.startswith("file ")


def test_images_are_made_once_for_a_folder(model, tmp_path):
    """Those of the first shard; whoever goes on with the folder has these, whatever the shards."""
    out = Folder(str(tmp_path / "out"))
    found = bank.find(None, model, out, URIS)
    assert found.known is None and found.shard == "/data/a.tar" and found.identity.startswith("images ")
    assert bank.find(None, model, out, URIS[1:]).identity != found.identity
    assert bank.find("/data/b.tar", model, out, URIS) == bank.find(None, model, out, URIS[1:])
    out.prepare({"bank": found.identity})
    embeddings = F.normalize(torch.randn(3, 8), dim=-1)
    classes.save(f"{out.uri}/{BESIDE}/bank.safetensors", Classes(embeddings, found.identity, None))
    for uris in (URIS, URIS[1:]):
        again = bank.find(None, model, Folder(out.uri), uris)
        assert again.identity == found.identity and torch.equal(again.known.embeddings, embeddings)
    assert bank.find("/data/b.tar", model, out, URIS).identity != found.identity


def test_what_is_no_bank_is_named(model, tmp_path):
    (tmp_path / "one.txt").write_text("a bag\n")
    (tmp_path / "empty.txt").write_text("")
    np.savez(tmp_path / "wide.npz", x=np.ones((3, 7)))
    np.savez(tmp_path / "one.npz", x=np.ones((1, model.visual.output_dim)))
    for name, words in {
        "one.txt": "two embeddings at least",
        "one.npz": "two embeddings at least",
        "empty.txt": "holds no names",
        "wide.npz": "is 3 x 7, but the model's embeddings have width",
        "absent.json": "absent.json",
        "absent-*.tar": "absent-",
    }.items():
        with pytest.raises(UserError) as error:
            bank.find(str(tmp_path / name), model, Folder(str(tmp_path / "out")), URIS)
        assert words in str(error.value) and name in str(error.value)
    (tmp_path / "two.txt").write_text("a bag\na coat\n")
    with pytest.raises(UserError, match=r"two.txt: .* has no weights of a text tower; name embeddings or a shard"):
        image_tower = dataclasses.replace(model, has_text=False)
        bank.find(str(tmp_path / "two.txt"), image_tower, Folder(str(tmp_path / "out")), URIS)


def test_a_search_without_a_bank_is_refused(small_clip):
    with pytest.raises(UserError, match="--score similarities needs a bank"):
        Searcher(Tower(small_clip().visual), SearchConfig(score="similarities"))


def test_an_image_is_not_compared_with_itself():
    """Of which it would be told alone: whether an image, or a copy, is in the bank makes no difference."""
    whole = torch.randn(3, 24, dtype=torch.float64)
    others = F.normalize(torch.randn(6, 24, dtype=torch.float64), dim=-1)
    candidates, image = whole + 0.3 * torch.randn(3, 24, dtype=torch.float64), torch.arange(3)
    without, beside = (
        Objective("similarities", whole, bank=each, logit_scale=20.0).score_minus_one(candidates, image)
        for each in (others, torch.cat([others, F.normalize(whole, dim=-1)]))
    )
    alone = [
        Objective("similarities", whole[row : row + 1], bank=each, logit_scale=20.0).score_minus_one(
            candidates[row : row + 1], torch.zeros(1, dtype=torch.int64)
        )
        for row, each in enumerate(
            torch.cat([others, F.normalize(whole[[other for other in range(3) if other != row]], dim=-1)])
            for row in range(3)
        )
    ]
    assert (without < 0).all()
    torch.testing.assert_close(beside, torch.cat(alone))
    assert Objective("similarities", whole, bank=others).score_minus_one(whole, image).abs().max() < 1e-12
