"""The flags that the jobs on actors share: jobs/search.py and jobs/evaluate.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from patchrank.errors import UserError
from patchrank.model.classes import TEMPLATES


def add_classes(parser: argparse.ArgumentParser, title: str) -> None:
    """The flags that name classes or their embeddings, in a group of their own."""
    add = parser.add_argument_group(title).add_argument
    add("--classes", metavar="FILE", help="class names by label: JSON list or one a line; the text tower embeds them")
    add("--templates", nargs="+", default=["photo"], metavar="T", help=f"prompts with {{}}, or {', '.join(TEMPLATES)}")
    add("--class-embeddings", metavar="FILE", help="class embeddings: FILE.safetensors or FILE.npz, :ARRAY if several")
    add("--prototypes", nargs="+", default=[], metavar="SHARDS", help="labelled shards whose mean embeddings to use")


def add_machines(parser: argparse.ArgumentParser, verb: str) -> argparse._ArgumentGroup:
    """The flags of the actors; what they do with images is the verb. The group, for further ones."""
    group = parser.add_argument_group("machines")
    add = group.add_argument
    add("--address", help="Ray cluster to join: auto or HOST:PORT (RAY_ADDRESS, else a local Ray)")
    add("--actors", type=int, help="actors to start (one a GPU, or as many as the cores allow)")
    add("--cpus-per-actor", type=int, help="cores of an actor")
    add("--gpus-per-actor", type=float, help="GPUs of an actor, 0 for none (1 if the cluster has any)")
    add("--images-per-batch", type=int, help=f"images an actor {verb} at a time")
    return group


def check_machines(args: argparse.Namespace, counts: Sequence[str]) -> None:
    """Raises UserError for flags of actors that make no sense, or another number of `counts` below 1."""
    check_positive(args, (*counts, "actors", "cpus_per_actor", "images_per_batch"))
    gpus = args.gpus_per_actor
    if gpus and not 0.0001 <= gpus <= 1:  # Ray knows no smaller part
        raise UserError(f"--gpus-per-actor {gpus}: must be 0, or 0.0001 to 1: an actor works on one GPU")


def check_positive(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UserError for the first flag of these that is given and below 1."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
