"""The ways of pruning, a line each: what `patchrank.prune`, evaluations, their flags and reports know of them.

A new one is a file beside this one, with a `Selector` or what else makes a `Method`, and a line in `METHODS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from patchrank.errors import UserError

if TYPE_CHECKING:  # the report reads this file, and torch takes seconds to import
    import torch
    from torch import Tensor

    from patchrank.pruning.bundle import Bundle
    from patchrank.pruning.prompts import VisualTokens
    from patchrank.pruning.selector import Selector
    from patchrank.pruning.stand_in import StandIn

UNPRUNED = "unpruned"  # the model as it is, which every comparison begins with
GOLDEN, PREDICTOR, TOKENS = "golden", "predictor", "predictor-tokens"
ATTENTION, MERGING, RANDOM = "class-attention", "token-merging", "random"


class Need(Enum):
    """What a method may need beside the model; the value is the error of an evaluation without it."""

    RANKINGS = "--methods {method}: needs --rankings"
    PREDICTOR = "--methods {method}: needs --predictor or --bundle"
    TOKENS = "--methods {method}: needs --tokens or --bundle"
    MERGEABLE = "--methods {method}: takes no tower that turns tokens by their places (RoPE); merged ones have none"
    BLOCK = "--cut 0: there is no block before the cut whose class-token attention could rank the tokens"


@dataclass(frozen=True)
class Method:
    """A way of pruning, ready for use.

    Attributes:
        selector: tells which patch tokens stay; all do where None.
        tokens: learnable tokens that go along.
        classes: (K, E) normalised class embeddings of its own, which learnable text tokens give.
        image_tower: for what is no choice of tokens: makes, of a model's image tower, one that takes about so many
            multiply-adds an image.
        allowance: for what is matched to a predictor, the multiply-adds of that: it may take as many as what the
            predictor prunes does in all. None keeps the share of tokens that a keep rate says.
    """

    selector: Selector | None = None
    tokens: VisualTokens | None = None
    classes: Tensor | None = None
    image_tower: Callable[[Any, int], StandIn] | None = None
    allowance: int | None = None

    @property
    def prunes(self) -> bool:
        """Whether it leaves less at a lower keep rate."""
        return self.selector is not None or self.image_tower is not None


@dataclass(frozen=True)
class Entry:
    """What is known about a method.

    Attributes:
        label: its name for people.
        make: makes it, of a bundle where it needs a predictor.
        colour: in charts on a light page, and, where `dark` is None, on a dark one.
        marker, dashes: in charts, as matplotlib takes them: charts can be read without their colours.
        leading: the report is about the method with the lowest number of those that it has.
        needs: what it cannot do without.
        dark: the colour on a dark page, where it is another.
        shown: whether the report shows the tokens that it keeps.
        timed: whether an evaluation measures how long it takes.
    """

    label: str
    make: Callable[[Bundle | None], Method]
    colour: str
    marker: str
    dashes: Any
    leading: int
    needs: tuple[Need, ...] = ()
    dark: str | None = None
    shown: bool = False
    timed: bool = True


def _of(path: str, matched: bool = False) -> Callable[[Bundle | None], Method]:
    """A function of a file of this package, or a class of selectors that need nothing; imported when called.

    Args:
        matched: whether what it makes is matched to the bundle's predictor.
    """

    def make(bundle: Bundle | None) -> Method:
        file, name = path.split(".")
        found = getattr(importlib.import_module(f"patchrank.pruning.{file}"), name)
        method = Method(found()) if isinstance(found, type) else found(bundle)
        allowance = 0 if bundle is None else bundle.predictor.multiply_adds()
        return replace(method, allowance=allowance) if matched else method

    return make


# By name, in the order of every table and legend. The Okabe-Ito colours, which colour-blind people can tell apart; blue
# is too dark for a dark page, black for neither. What a user would deploy leads before what bounds it.
METHODS: dict[str, Entry] = {
    GOLDEN: Entry(
        "Golden ranking", _of("golden.OfBatches"), "#E69F00", "o", "-", 2, (Need.RANKINGS,), shown=True, timed=False
    ),
    PREDICTOR: Entry(
        "Predictor", _of("predicted.alone"), "#0072B2", "s", "-", 1, (Need.PREDICTOR,), "#56B4E9", shown=True
    ),
    TOKENS: Entry(
        "Predictor + tokens",
        _of("predicted.with_tokens"),
        "#009E73",
        "D",
        (0, (6, 1.5)),
        0,
        (Need.PREDICTOR, Need.TOKENS),
    ),
    ATTENTION: Entry(
        "Class attention",
        _of("class_attention.ClassAttention", matched=True),
        "#D55E00",
        "^",
        (0, (4, 2)),
        3,
        (Need.BLOCK,),
        shown=True,
    ),
    MERGING: Entry(
        "Token merging",
        _of("merging.by_merging", matched=True),
        "#CC79A7",
        "v",
        (0, (4, 1.5, 1, 1.5)),
        4,
        (Need.MERGEABLE,),
    ),
    RANDOM: Entry("Random", _of("chance.Chance", matched=True), "#7d858f", "X", (0, (1.5, 1.5)), 5, timed=False),
}


def by_name_alone() -> list[str]:
    """The methods that a model can be pruned by without rankings, predictor or tokens."""
    return [name for name, entry in METHODS.items() if set(entry.needs) <= {Need.BLOCK, Need.MERGEABLE}]


def there_is(cut: int, bundle: Bundle | None, ranked: bool, rotary: bool = False) -> set[Need]:
    """What an evaluation has: a model cut before block `cut`, a bundle, golden rankings; and whether it has RoPE."""
    have = {
        Need.RANKINGS: ranked,
        Need.PREDICTOR: bundle is not None,
        Need.TOKENS: bundle is not None and bundle.tokens is not None,
        Need.MERGEABLE: not rotary,
        Need.BLOCK: cut > 0,
    }
    return {need for need, there in have.items() if there}


def choose(names: Sequence[str] | None, have: Collection[Need]) -> list[str]:
    """The methods of these names, or all that there is all for where None, in the order of `METHODS`.

    Raises:
        UserError: a name that is not known, or that something is missing for.
    """
    if names is None:
        return [name for name, entry in METHODS.items() if set(entry.needs) <= set(have)]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name}: must be one of {', '.join(METHODS)}")
        for need in METHODS[name].needs:
            if need not in have:
                raise UserError(need.value.format(method=name))
    return [name for name in METHODS if name in names]


def make(names: Sequence[str], device: torch.device, bundle: Bundle | None = None) -> dict[str, Method]:
    """Methods by name, on a device; the bundle moves there, too."""
    made = {name: METHODS[name].make(None if bundle is None else bundle.to(device)) for name in names}
    for method in made.values():
        if method.selector is not None:
            method.selector.to(device)
    return made
