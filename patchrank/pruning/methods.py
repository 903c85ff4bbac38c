"""The ways of pruning, one line each: what the library, the evaluation, its flags and the report know of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

UNPRUNED = "unpruned"  # the model as it is, which every comparison begins with
GOLDEN, PREDICTOR, TOKENS = "golden", "predictor", "predictor-tokens"
ATTENTION, MERGING, RANDOM = "class-attention", "token-merging", "random"


class Need(Enum):
    """What a method may need beside the model; the value is the error of an evaluation without it."""

    RANKINGS = "--methods {method}: needs --rankings"
    PREDICTOR = "--methods {method}: needs --predictor or --bundle"
    TOKENS = "--methods {method}: needs --tokens or --bundle"
    BLOCK = "--cut 0: there is no block before the cut whose class-token attention could rank the tokens"


@dataclass(frozen=True)
class Entry:
    """What is known about a method.

    Attributes:
        label: its name for people.
        colour: in charts on a light page, and, where `dark` is None, on a dark one.
        marker, dashes: in charts, as matplotlib takes them: charts can be read without their colours.
        leading: the report is about the method with the lowest number of those that it has.
        dark: the colour on a dark page, where it is another.
        needs: what it cannot do without.
        shown: whether the report shows the tokens that it keeps.
        timed: whether an evaluation measures how long it takes.
    """

    label: str
    colour: str
    marker: str
    dashes: Any
    leading: int
    dark: str | None = None
    needs: tuple[Need, ...] = ()
    shown: bool = False
    timed: bool = True


# By name, in the order of every table and legend. The Okabe-Ito colours, which colour-blind people can tell apart; blue
# is too dark for a dark page, black for neither. What a user would deploy leads before what bounds it.
METHODS: dict[str, Entry] = {
    GOLDEN: Entry("Golden ranking", "#E69F00", "o", "-", 2, needs=(Need.RANKINGS,), shown=True, timed=False),
    PREDICTOR: Entry("Predictor", "#0072B2", "s", "-", 1, dark="#56B4E9", needs=(Need.PREDICTOR,), shown=True),
    TOKENS: Entry("Predictor + tokens", "#009E73", "D", (0, (6, 1.5)), 0, needs=(Need.PREDICTOR, Need.TOKENS)),
    ATTENTION: Entry("Class attention", "#D55E00", "^", (0, (4, 2)), 3, needs=(Need.BLOCK,), shown=True),
    MERGING: Entry("Token merging", "#CC79A7", "v", (0, (4, 1.5, 1, 1.5)), 4),
    RANDOM: Entry("Random", "#7d858f", "X", (0, (1.5, 1.5)), 5, timed=False),
}
