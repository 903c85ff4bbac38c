"""What CONTRIBUTING.md says it takes to add something is all that it takes."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import pytest
import torch
from here import ROOT
from open_clip.transformer import VisionTransformer

import patchrank
from patchrank.model import kinds
from patchrank.model.tower import Tower
from patchrank.pruning.predictor import LOSSES
from patchrank.pruning.stand_in import count_multiply_adds
from patchrank.search.config import SearchConfig
from patchrank.search.searcher import Searcher


class RegisterViT(VisionTransformer):
    """The made-up tower of the example."""

    def forward(self, images):
        x = self._embeds(images)
        x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


@pytest.fixture
def added(monkeypatch):
    """A function that does as a section says: runs its files, and puts the entries where they belong."""

    def add(section):
        text = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
        defined = {}
        for path, registry, code in re.findall(r"```python\n# (\S+)\.py(?:, in (\w+))?\n(.*?)```", text, re.DOTALL):
            name = path.replace("/", ".")
            if not (ROOT / f"{path}.py").exists():
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            module = importlib.import_module(name)
            entries = getattr(module, registry, None)
            if not registry:
                exec(code, vars(module))
                defined |= vars(module)
            elif isinstance(entries, dict):
                for key, value in eval(f"{{{code}}}", defined | vars(module)).items():
                    monkeypatch.setitem(entries, key, value)
            else:
                monkeypatch.setattr(module, registry, (*eval(f"({code})", defined), *entries))

    return add


def test_a_search_strategy(added, small_clip):
    added("A search strategy")
    tower, images = Tower(small_clip().visual), torch.randn(2, 3, 16, 20)
    searcher = Searcher(tower, SearchConfig(rank_by="length"), keep_rates=[0.5])
    lengths = tower.prefix(images)[:, 1:].norm(dim=-1)
    assert torch.equal(searcher.search(images).ranking, lengths.argsort(dim=1, descending=True))
    assert searcher.config.cost(tower.grid) == []


def test_a_way_of_pruning(added, small_clip):
    added("A way of pruning")
    model, images = small_clip(), torch.randn(2, 3, 16, 20)
    tower = Tower(model.visual, cut=1)
    tokens = tower.prefix(images)
    kept = tokens[:, 1:].norm(dim=-1).topk(10).indices.sort(dim=1).values
    patchrank.prune(model, "longest", keep=0.5)
    torch.testing.assert_close(model.encode_image(images), tower.suffix(tokens, kept))


def test_a_predictor_loss(added):
    added("A predictor loss")
    assert LOSSES["squared"](torch.zeros(2, 3), torch.full((2, 3), 2.0)) == 4


def test_a_kind_of_tower(added, small_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_towers", sys.modules[__name__])
    added("A kind of tower")
    model = small_clip()
    model.visual.__class__ = RegisterViT
    model.visual.registers = torch.nn.Parameter(torch.randn(3, 32), requires_grad=False)
    assert kinds.adapt(model.visual).prefix_tokens == 4
    patchrank.prune(model, "class-attention", keep=0.5)
    assert model.encode_image(torch.randn(2, 3, 16, 20)).shape == (2, 24)
    assert count_multiply_adds(model.visual) == model.visual.multiply_adds()
