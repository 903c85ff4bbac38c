"""Flags declared once: fields of configuration dataclasses carry them, parsers are built from the dataclasses.

    @dataclass(frozen=True)
    class Config:
        steps: int | None = flag(None, "search at most so many steps", group="search")
        machines: Machines = group("machines", Machines)

    args = parser("jobs/search.py", __doc__, Config).parse_args()
    config = read(Config, args)

tyro builds parsers from dataclasses, too, but boxes an error over several lines and lists types that help nobody.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from patchrank.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """What a field carries: see `flag`."""

    help: str
    name: str | None
    convert: Callable[[Any], Any] | None
    options: dict[str, Any]


def flag(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str | None = None,
    name: str | None = None,
    convert: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """A field of a dataclass that is a flag; its type says what the flag takes, a sequence one value or more.

    Args:
        default: of field and flag. A field that is true gets the flag --no-NAME.
        group: title, for this field and those after it; as for the field before where None.
        name: of the flag, where it is not that of the field.
        convert: from what the flag took, or the default, to the field's value. May raise UserError.
        options: further ones of `argparse.ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"group": group, "flag": Flag(help, name, convert, options)})


def group(title: str, kind: type) -> Any:
    """A field that is itself a dataclass with flags, of this kind; they get a group of their own."""
    return field(default_factory=kind, metadata={"group": title, "nested": True})


class _Parser(argparse.ArgumentParser):
    """`~` is the home folder in `--out=~/x`, too, which shells leave as it is."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([re.sub(r"^(--[\w-]+=)?(~[^/]*)", _home, each) for each in given], namespace)


def _home(found: re.Match[str]) -> str:
    return (found[1] or "") + os.path.expanduser(found[2])


def parser(prog: str, description: str | None, *sources: Any) -> argparse.ArgumentParser:
    """A parser of the flags of dataclasses; instances of them set defaults of their own. Groups of one title are one.

    The namespace that it parses has the flags' names.
    """
    result = _Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for source in sources:
        _add(result, groups, source)
    return result


def _add(
    parser: argparse.ArgumentParser, groups: dict[str, argparse._ArgumentGroup], source: Any, title: str | None = None
) -> None:
    owner = source if isinstance(source, type) else type(source)
    hints = get_type_hints(owner)
    for each in fields(owner):
        title = each.metadata.get("group") or title
        if "nested" in each.metadata:
            _add(parser, groups, getattr(source, each.name, hints[each.name]), title)
        if "flag" not in each.metadata:
            continue
        assert title is not None, f"{owner.__name__}.{each.name} has no group"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        found, default = each.metadata["flag"], getattr(source, each.name, None)
        kind, many = _kind(hints[each.name])
        options: dict[str, Any] = {"help": found.help, "default": list(default) if many and default else default}
        if kind is bool:
            options["action"] = "store_false" if default else "store_true"
        else:
            options |= {"type": kind} | ({"nargs": "+"} if many else {}) | found.options
        name = _name(each)
        groups[title].add_argument(f"--no-{name}" if default is True else f"--{name}", dest=_dest(each), **options)


def read(cls: type[T], args: argparse.Namespace, **rest: Any) -> T:
    """The dataclass that the flags describe; `rest` is what of it are no flags. Raises UserError where it does."""
    hints = get_type_hints(cls)
    for each in fields(cls):  # type: ignore[arg-type]
        if "nested" in each.metadata:
            rest[each.name] = read(hints[each.name], args)
        elif found := each.metadata.get("flag"):
            value = getattr(args, _dest(each))
            value = tuple(value) if isinstance(value, list) else value
            rest[each.name] = value if found.convert is None else found.convert(value)
    return cls(**rest)


def command(prog: str, job: str) -> str:
    """How to call a job, as the one at work was called: `python jobs/NAME.py`, or `patchrank NAME` where installed."""
    return f"python jobs/{job}.py" if prog.endswith(".py") else f"patchrank {job.replace('_', '-')}"


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises UserError for the first of these fields that is given and below the least."""
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in names and value is not None and value < least:
            raise UserError(f"--{_name(each)} {value}: must be at least {least}")


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of a flag's values, and whether it takes several."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    many = get_origin(kinds[0]) is get_origin(Sequence[Any])
    return (get_args(kinds[0])[0] if many else kinds[0]), many


def _name(each: Any) -> str:
    return each.metadata["flag"].name or each.name.replace("_", "-")


def _dest(each: Any) -> str:
    return _name(each).replace("-", "_")
