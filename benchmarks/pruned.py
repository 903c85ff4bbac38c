"""Is a pruned model as much faster as its multiply-adds promise? Every tower against the unpruned one, side by side.

    python benchmarks/pruned.py                                                  # ViT-B/16 at batch 1 and 64
    python benchmarks/pruned.py --models ViT-B-16 ViT-L-14 --batch-sizes 1 64 --compile       # for a GPU
    python benchmarks/pruned.py --processor-time         # on a machine that others use: of one core, and no waiting
    python benchmarks/pruned.py --models hf:CLIPVisionModel --batch-sizes 1 8                 # transformers, with sdpa

A line a way of pruning, keep rate and batch size: the median of the ratios of rounds in which all towers take turns,
what the multiply-adds predict, and the share of that which was measured. "predictor" is the whole of what
`patchrank.prune` does; class attention and token merging (ToMe) get as many multiply-adds as that takes, the predictor
included. Then the share of the pruned model's time that the predictor alone takes. Time does not depend on what weights
hold, so these are random.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from dataclasses import asdict
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from patchrank import clock
from patchrank.errors import UserError, run
from patchrank.evaluation import latency
from patchrank.model import loading
from patchrank.model.adapter import Adapter
from patchrank.model.kinds import adapt
from patchrank.model.tower import default_cut
from patchrank.model.transformers_model import PREFIX
from patchrank.model.transformers_tower import CLIP, FAMILIES, ImageTower, library
from patchrank.pruning.bundle import Bundle
from patchrank.pruning.methods import ATTENTION, MERGING, PREDICTOR, UNPRUNED
from patchrank.pruning.predictor import PredictorConfig
from patchrank.pruning.pruned import pruned_tower

METHODS = (PREDICTOR, ATTENTION, MERGING)


def untrained(adapter: Adapter, cut: int) -> Bundle:
    """A bundle of the default shape, never trained."""
    about: dict[str, Any] = {
        "name": "random weights",
        "pretrained": None,
        "weights": {},
        "cut": cut,
        "grid": adapter.grid,
    }
    return Bundle(about, asdict(PredictorConfig(adapter.grid, adapter.width, prefix_tokens=adapter.prefix_tokens)))


def image_tower(name: str) -> Any:
    """An image tower with random weights: of a name of open_clip, or hf: and the class of a vision model.

    That is of the class's default configuration, but CLIP's for patches of 16; unpruned, the model of transformers
    itself is timed, and pruned, what gives its outputs.

    Raises:
        UserError: there is no such one.
    """
    if not name.startswith(PREFIX):
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"--models {name}: open_clip does not know it")
        return _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
    kind = name.removeprefix(PREFIX)
    if kind not in FAMILIES:
        raise UserError(f"--models {name}: must be {PREFIX} and one of {', '.join(FAMILIES)}")
    model = getattr(library(), kind)
    config = model.config_class(**({"patch_size": 16} if kind == CLIP else {}))
    tower = ImageTower(model._from_config(config, attn_implementation="sdpa"))
    tower.own_output = True
    return tower


def predictor_share(bundle: Bundle, tower: nn.Module, images: torch.Tensor, rounds: int, timed: Any) -> float:
    """The predictor's time as a share of the pruned tower's, both timed in turn; the median over rounds."""
    shape = bundle.predictor.config
    tokens = torch.randn(len(images), shape.prefix_tokens + shape.num_tokens, shape.input_width).to(images)
    shares = []
    for _ in range(rounds):
        alone = latency.measure({"predictor": bundle.predictor}, tokens, 0, least=1, timed=timed)[0].seconds
        whole = latency.measure({"tower": tower}, images, 0, least=1, timed=timed)[0].seconds
        shares.append(alone / whole)
    return statistics.median(shares)


def main() -> int:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16"], help="open_clip names, or hf:CLASS (%(default)s)")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.6, 0.5], help="(%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64], help="(%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a batch size, at least (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at least (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(%(default)s)")
    parser.add_argument("--processor-time", action="store_true", help="seconds of the processor, on one of its cores")
    parser.add_argument("--compile", action="store_true", help="all towers through torch.compile, the unpruned too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.processor_time else "cpu")
    if args.processor_time:
        torch.set_num_threads(1)
    timer = clock.processor_seconds if args.processor_time else clock.seconds
    dtype = loading.resolve_dtype(args.dtype, device.type == "cuda")
    print(f"{latency.device_name(device, torch.get_num_threads())}, {str(dtype).removeprefix('torch.')}")
    print("model     batch  keep  method            ms/batch  speed-up  predicted  share")
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    for name in args.models:
        visual = image_tower(name).eval().requires_grad_(False).to(device, dtype)
        adapter = adapt(visual, name)
        cut = default_cut(adapter.depth)
        bundle = untrained(adapter, cut).to(device, dtype)
        towers: dict[str, nn.Module] = {UNPRUNED: visual}
        cells = {}
        for keep in args.keep_rates:
            for method in args.methods:
                if method == MERGING and adapter.rotary:
                    continue
                tower = pruned_tower(method, visual, cut, keep, bundle)
                towers[f"{method} {keep}"] = tower
                cells[f"{method} {keep}"] = (method, keep, adapter.full_multiply_adds() / tower.multiply_adds())
        if args.compile:
            for each in towers.values():
                each.compile(fullgraph=True)
        for batch in args.batch_sizes:
            images = torch.randn(batch, 3, *visual.image_size).to(device, dtype)
            timed = latency.measure(towers, images, args.seconds, args.rounds, timed=timer)
            print(f"{name:<10}{batch:>5}  {'1':>4}  {UNPRUNED:<16}{1000 * timed[0].seconds:>10.1f}", flush=True)
            for one in timed[1:]:
                method, keep, predicted = cells[one.name]
                print(
                    f"{name:<10}{batch:>5}  {keep:>4g}  {method:<16}{1000 * one.seconds:>10.1f}{one.speedup:>10.2f}"
                    f"{predicted:>11.2f}{one.speedup / predicted:>7.2f}",
                    flush=True,
                )
            key = f"{PREDICTOR} {args.keep_rates[0]}"
            if key in towers:
                with torch.no_grad():
                    share = predictor_share(bundle, towers[key], images, args.rounds, timer)
                print(f"{name:<10}{batch:>5}  {args.keep_rates[0]:>4g}  the predictor alone: {share:.2%} of the time")
    return 0


if __name__ == "__main__":
    run(main)
