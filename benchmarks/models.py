"""Which of open_clip's configurations can be pruned, tried one by one: the table of docs/models.md.

    python benchmarks/models.py                      # all, minutes
    python benchmarks/models.py ViT-B-16-SigLIP PE   # those whose names hold one of these

Each image tower is built with random weights and two blocks, which take the same code as all of them. Compared: its own
forward pass with ours, all tokens kept; half of them dropped with hard gates on all; the multiply-adds that are told
with those that PyTorch counts, unpruned and pruned.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import open_clip
import torch
from open_clip import timm_model
from open_clip.model import _build_vision_tower

from patchrank.errors import UserError, run
from patchrank.model.adapter import embedding_of
from patchrank.model.kinds import adapt
from patchrank.model.tower import Tower
from patchrank.pruning.pruned import pruned_tower
from patchrank.pruning.stand_in import count_multiply_adds

BLOCKS = 2
_CREATE = timm_model.timm.create_model


def built(config: dict[str, Any]) -> Any:
    """The image tower of a configuration, with random weights and few blocks, where it has a number of blocks."""
    vision = dict(config["vision_cfg"])

    def shallow(name: str, **settings: Any) -> Any:
        try:
            return _CREATE(name, depth=BLOCKS, **settings)
        except TypeError:  # of another kind, which has stages
            return _CREATE(name, **settings)

    if isinstance(vision.get("layers"), int) and not vision.get("timm_model_name"):
        vision["layers"] = BLOCKS
    with mock.patch.object(timm_model.timm, "create_model", shallow):
        return _build_vision_tower(config["embed_dim"], vision).eval()


@torch.no_grad()
def tried(name: str) -> tuple[str, str]:
    """The class of a configuration's tower, and what came of it.

    Raises:
        UserError: it cannot be pruned, and why.
    """
    visual = built(open_clip.get_model_config(name) or {})
    adapter = adapt(visual, name)
    images = torch.randn(1, 3, *visual.image_size, generator=torch.Generator().manual_seed(0))
    own = embedding_of(visual(images))
    tower = Tower(visual, 1, name=name)
    tokens = tower.prefix(images)  # (1, p + N, D)
    kept = torch.randperm(tower.num_tokens, generator=torch.Generator().manual_seed(1))[: tower.num_tokens // 2][None]
    gates = torch.zeros(1, tower.num_tokens).scatter(1, kept, 1.0)
    differences = [
        _difference(tower.suffix(tokens), own),
        _difference(tower.suffix(tokens, kept), tower.suffix(tokens, gates=gates)),
    ]
    pruned = pruned_tower("random", visual, 1, 0.5)
    counts = [
        (adapter.full_multiply_adds(), count_multiply_adds(visual)),
        (pruned.multiply_adds(), count_multiply_adds(pruned)),
    ]
    right = max(differences) < 1e-4 and all(told == counted for told, counted in counts)
    rows, columns = adapter.grid
    about = f"{rows} x {columns} patches, {adapter.prefix_tokens} before them"
    return type(adapter).__name__, f"{about}{'' if right else f': WRONG, {differences} {counts}'}"


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of two embeddings, (1, E) each, as a share of their length."""
    return float((found - wanted).norm() / wanted.norm())


def outcomes(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Of every configuration: its name, the adapter that takes it or none, and what is to say of it."""
    for name in names:
        try:
            yield (name, *tried(name))
        except UserError as error:
            yield name, "", str(error).partition(": ")[2].partition(";")[0]


def main() -> int:
    """Try, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of names (all)")
    args = parser.parse_args()
    names = [name for name in open_clip.list_models() if not args.names or any(part in name for part in args.names)]
    if not names:
        raise UserError(f"{' '.join(args.names)}: open_clip has no such models")
    logging.disable(logging.WARNING)
    found = sorted(outcomes(names), key=lambda row: (not row[1], row[1], row[2], row[0]))
    print(f"{sum(bool(row[1]) for row in found)} of {len(found)} can be pruned\n")
    print("| adapter | its towers | configurations |\n|---|---|---|")
    for (adapter, what), rows in itertools.groupby(found, key=lambda row: row[1:]):
        print(f"| {adapter or 'none'} | {what} | {', '.join(row[0] for row in rows)} |")
    return 1 if any("WRONG" in row[2] for row in found) else 0


if __name__ == "__main__":
    run(main)
