"""How far learning could come: cosine by a predictor, on photos that it learnt from and on others, and by none.

    python benchmarks/bound.py --shards photos.tar --model ViT-B-16 --pretrained openai --tokens tokens --keep 0.6

`--tokens` is what jobs/train_tokens.py left, with the --held-out that it had. "free": the usefulness of each photo's
tokens is numbers of its own, which begin at what the predictor says and follow the gradient through the gates, as a
predictor without limits could on photos that it knows; tokens and shifts stay as they are. Beside it what that cost.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.errors import UserError, run
from patchrank.pruning import predictor, prompts
from patchrank.pruning.methods import Method
from patchrank.pruning.prompts import VisualTokens
from patchrank.pruning.schedule import at_keep_rate
from patchrank.training import gating
from patchrank.training.images import ImageSource, TrainingImages, open_images

RATE = 0.08  # learning rate of the free usefulness, in its standard deviations


def cosines(
    images: TrainingImages, tokens: Tensor, usefulness: Tensor, wanted: Tensor, learnt: VisualTokens, m: int
) -> Tensor:
    """To the unpruned embeddings, (B,), with m patches: (B, p + N, D) tokens, (B, N) usefulness, (B, E) embeddings."""
    tower = images.tower
    along = learnt.along(tower.adapter, tower.cut, m)
    return F.cosine_similarity(gating.embeddings(tower, learnt.append(tokens), usefulness, m, along=along), wanted)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, metavar="SHARDS", help="that the tokens were trained on")
    parser.add_argument("--model", required=True, help="as for jobs/search.py")
    parser.add_argument("--pretrained", metavar="TAG", help="as for jobs/search.py")
    parser.add_argument("--tokens", required=True, metavar="FOLDER", help="what jobs/train_tokens.py left")
    parser.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the training (%(default)s)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6], metavar="RATE", help="(%(default)s)")
    parser.add_argument("--photos", type=int, default=16, metavar="N", help="of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of gradient descent (%(default)s)")
    args = parser.parse_args()
    if args.photos < 1:
        raise UserError(f"--photos {args.photos}: must be at least 1")
    source = ImageSource(
        rankings=None, shards=args.shards, model=args.model, pretrained=args.pretrained, held_out=args.held_out
    )
    images, model = open_images(source)
    images.start(torch.device("cpu"))
    tower = images.tower
    learnt, _ = prompts.load(args.tokens, tower, model.weights)
    network, _ = predictor.load(args.tokens, tower, model.weights)
    if learnt.config.place != "cut":
        raise UserError(f"{args.tokens}: its tokens join at the input; train them with --place cut")
    learnt.requires_grad_(False)
    print(f"{'photos':<10} keep  predictor    free, after {args.steps} steps of a forward and a backward pass")
    pairs = images.everything
    kinds = {"learnt": pairs.batches(0, 1, args.photos), "held out": pairs.held_out(args.photos)}
    for kind, batches in kinds.items():
        for batch in itertools.islice(batches, 1):
            tokens, wanted = images.whole(batch)
            for keep in args.keep:
                m = at_keep_rate(tower.adapter, Method(None, learnt), tower.cut, keep, "--keep")[tower.cut]
                with torch.no_grad():
                    usefulness = gating.standardized(network(tokens))  # (B, N)
                    first = cosines(images, tokens, usefulness, wanted, learnt, m)
                free = usefulness.clone().requires_grad_(True)
                optimizer = torch.optim.Adam([free], lr=RATE, betas=(0.9, 0.95))
                best = first
                for _ in range(args.steps):
                    found = cosines(images, tokens, free, wanted, learnt, m)
                    best = torch.maximum(best, found.detach())
                    optimizer.zero_grad()
                    (1 - found).sum().backward()
                    optimizer.step()
                print(f"{kind:<10} {keep:4g} {first.mean():10.4f} {best.mean():7.4f}", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
