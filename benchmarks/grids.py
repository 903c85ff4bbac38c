"""What the default search costs an image on larger grids: candidates, multiply-adds, and seconds by timing.

    python benchmarks/grids.py [--models ViT-B-16-SigLIP ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512]
    python benchmarks/grids.py --processor-time     # on a machine that others use: of one core, and no waiting

Weights are random: cost does not depend on them. Seconds are of a few timed forward passes, as `--estimate` has them,
beside the share of the rate that a large matrix product reaches in the same run.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from open_clip.model import _build_vision_tower

from patchrank import clock
from patchrank.errors import UserError, run
from patchrank.model.loading import resolve_dtype
from patchrank.model.tower import Tower
from patchrank.search.config import SearchConfig
from patchrank.search.estimate import multiply_adds, seconds_per_image
from patchrank.search.searcher import Searcher

KEEP_RATES = (0.8, 0.7, 0.6, 0.5, 0.4)
SIZE = 4096  # of the square matrices


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds a second of a product of large matrices, the best of three."""
    x = torch.randn(SIZE, SIZE, device=device, dtype=dtype)
    return max(SIZE**3 / clock.seconds(lambda: x @ x, device) for _ in range(3))


def main() -> int:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP-384", "ViT-B-16-SigLIP-512"]
    parser.add_argument("--models", nargs="+", default=default, metavar="NAME", help="(%(default)s)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="at a time (%(default)s)")
    parser.add_argument("--processor-time", action="store_true", help="seconds of the processor, on one of its cores")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.processor_time else "cpu")
    if args.processor_time:
        torch.set_num_threads(1)
        clock.seconds = clock.processor_seconds  # for the estimate, too
    dtype = resolve_dtype("auto", gpu=device.type == "cuda")
    rate = product_rate(dtype, device)
    print(f"{dtype} on {device.type}: a product of {SIZE} x {SIZE} matrices has {rate / 1e12:.2f} T multiply-adds/s\n")
    print("| model | tokens | candidates | a token | G multiply-adds | in passes of the model | seconds ", end="")
    print("| of the product's rate |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"--models {name}: open_clip does not know it")
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"]).eval()
        tower = Tower(visual, dtype=dtype, device=device, name=name)
        searcher = Searcher(tower, SearchConfig(), None, keep_rates=KEEP_RATES)
        candidates = sum(step.candidates for step in searcher.config.cost(tower.grid))
        cost = multiply_adds(searcher)
        seconds = seconds_per_image(searcher, torch.randn(args.images, 3, *visual.image_size), budget=0)
        print(
            f"| {name} | {tower.num_tokens} | {candidates} | {candidates / tower.num_tokens:.2f} | {cost / 1e9:,.0f} "
            f"| {cost / tower.adapter.full_multiply_adds():.0f} | {seconds:.1f} | {cost / seconds / rate:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run(main)
