"""Draw the picture of docs/architecture.md from the imports of the code.

    python docs/architecture.py docs/architecture.png

A row a room, with its files. Arcs are imports, thicker where there are more; they all point down.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image

from patchrank.errors import UserError, run

ROOT = Path(__file__).parents[1]
FACADE = "patchrank"  # the module with the names that users import, each from its file when first asked for
INSIDE = ("report", "evaluation", "training", "pruning", "search", "data", "model", "store")
ROOMS = ("jobs", "cluster", *(f"patchrank.{room}" for room in INSIDE))  # from top to bottom
LEAVES = tuple(f"patchrank.{leaf}" for leaf in ("errors", "tokens", "flags", "clock", "assets"))  # anybody's
WIDTH, HEIGHT, STEP, MARGIN = 6.6, 0.5, 0.64, 1.55  # of a row, from row to row, and for arcs on both sides: inches
CHARACTERS = 97  # of a line of files
INNER, OUTER = "#dbe7f3", "#f5e3cc"


@dataclass(frozen=True)
class Import:
    """Of a module, or of a name in one, at a line: with the importing module, when a function runs, or for types."""

    target: str
    line: int
    when: Literal["first", "later", "types"]


def sources(*folders: str) -> dict[str, str]:
    """The sources of the project's modules, by name."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: path.read_text() for name, path in zip(names, paths, strict=True)}


@cache
def imports(source: str) -> list[Import]:
    """All imports of a module: at its head, in its functions, and for the eyes of a type checker."""
    found: list[Import] = []
    when: dict[int, Literal["later", "types"]] = {}
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            when |= {id(below): "later" for below in ast.walk(node)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            when |= {id(below): "types" for below in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            found += [Import(module + alias.name, node.lineno, when.get(id(node), "first")) for alias in node.names]
    return found


def arrows(modules: dict[str, str], types: bool = True) -> dict[str, dict[str, int]]:
    """By module, the other modules that it imports, and in which line; with those that types alone need, or without.

    What the facade imports does not count.
    """
    found: dict[str, dict[str, int]] = {}
    for name, source in modules.items():
        found[name] = {}
        for each in imports(source) if name != FACADE else ():
            target = each.target if each.target in modules else each.target.rpartition(".")[0]
            if target in modules and target not in (name, FACADE) and (types or each.when != "types"):
                found[name].setdefault(target, each.line)
    return found


def inside(name: str, rooms: tuple[str, ...]) -> bool:
    """Whether a module is one of these, or below one."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def draw(path: str) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure  # not pyplot, which wants a display
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    modules = sources("patchrank", "cluster", "jobs")
    found = [(name, target) for name, targets in arrows(modules).items() for target in targets]
    figure = Figure(figsize=(WIDTH + 2 * MARGIN, (len(ROOMS) + 1) * STEP + 0.1))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-MARGIN, WIDTH + MARGIN), ylim=(0, figure.get_figheight()))
    axes.axis("off")
    middle = {room: (len(ROOMS) - row + 0.5) * STEP + 0.05 for row, room in enumerate((*ROOMS, "anybody"))}
    for room, y in middle.items():
        files = [name.rpartition(".")[2] for name in modules if inside(name, (room,)) and name != room]
        files = files or [leaf.rpartition(".")[2] for leaf in LEAVES]
        colour = INNER if "." in room else OUTER if room in ROOMS else "#eeeeee"
        corner, style = (0, y - HEIGHT / 2), "round,pad=0,rounding_size=0.06"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=colour, edgecolor="#8090a0"))
        axes.text(0.1, y, room.removeprefix("patchrank."), weight="bold", size=10, va="center")
        axes.text(1.15, y, textwrap.fill("   ".join(files), CHARACTERS), size=7.5, va="center", linespacing=1.3)
    for source, target in itertools.permutations(ROOMS, 2):
        count = sum(inside(name, (source,)) and inside(other, (target,)) for name, other in found)
        left = "." in source  # within patchrank; on the right is what comes from outside
        ends = [(0 if left else WIDTH, middle[source] - 0.05), (0 if left else WIDTH, middle[target] + 0.05)]
        shape = {"connectionstyle": f"arc3,rad={0.4 if left else -0.4}", "arrowstyle": "-|>", "mutation_scale": 8}
        look = {"linewidth": 0.4 + 0.4 * count**0.5, "color": "#51677e" if left else "#b07a2a", "alpha": 0.75}
        if count:
            axes.add_patch(FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, **shape, **look))
    figure.savefig(drawn := io.BytesIO(), dpi=110)
    try:
        Image.open(drawn).convert("RGB").quantize(32).save(path, optimize=True)
    except (OSError, ValueError) as error:  # the latter where the name's ending is unknown
        raise UserError(f"{path}: cannot be written ({error})") from None


def main() -> int:
    """Parse, draw, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="PNG file to write")
    args = parser.parse_args()
    draw(args.picture)
    print(args.picture)
    return 0


if __name__ == "__main__":
    run(main)
