"""How much memory a step of learning through the frozen model takes: counted, on no device, from the shapes alone.

    python benchmarks/memory.py                                          # ViT-L/14, 16 images a step
    python benchmarks/memory.py --models ViT-B-16 ViT-L-14 ViT-H-14 --batch 64

A line a model, in GB: its weights, and what the forward pass keeps for the gradient (each storage counted once), as
it is and with --recompute, where blocks keep their input alone and one at a time is computed again. All tokens stay,
which is the most there can be. Predictor and optimizer are a few MB.
"""

from __future__ import annotations

import argparse
import logging

import open_clip
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from patchrank.errors import UserError, run
from patchrank.model.tower import Tower


def kept_bytes(tower: Tower, batch: int, learnable: int, recompute: bool) -> int:
    """Bytes that the forward pass of a step keeps for the gradient; of the tower's weights, none.

    Args:
        tower: best on the device "meta", where nothing is computed.
        batch, learnable: images, and learnable tokens beside the patches.
    """
    owned = {parameter.untyped_storage()._cdata for parameter in tower.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; alive, so that no storage is taken for another

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    shape = batch, tower.length + learnable, tower.width
    tokens = torch.empty(shape, dtype=tower.dtype, device=tower.device, requires_grad=True)
    gates = torch.ones(batch, tower.num_tokens, device=tower.device, requires_grad=True)
    tower.recompute = recompute
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        tower.suffix(tokens, gates=gates)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in owned)


def main() -> int:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-L-14"], help="open_clip names (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="learnable tokens (%(default)s)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    print("model          weights, GB   kept, GB   with --recompute")
    for name in args.models:
        if name not in open_clip.list_models():
            raise UserError(f"--models {name}: open_clip does not know it")
        tower = Tower(open_clip.create_model(name, device="meta").visual, dtype=torch.bfloat16, device="meta")
        weights = sum(parameter.nbytes for parameter in tower.parameters())
        plain, again = (kept_bytes(tower, args.batch, args.tokens, recompute) for recompute in (False, True))
        print(f"{name:<14} {weights / 1e9:>11.2f} {plain / 1e9:>10.2f} {again / 1e9:>18.2f}")
    return 0


if __name__ == "__main__":
    run(main)
