"""Parsers from dataclasses, and dataclasses from what was parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from patchrank.errors import UserError
from patchrank.flags import at_least, flag, group, parser, read


@dataclass(frozen=True)
class Machines:
    address: str | None = flag(None, "where")
    cpus_per_actor: int | None = flag(None, "cores", metavar="N")

    def __post_init__(self):
        at_least(self, 1, "cpus_per_actor")


@dataclass(frozen=True)
class Workers(Machines):
    cpus_per_actor: int | None = flag(None, "cores of a worker", name="cpus-per-worker")


@dataclass(frozen=True)
class Job:
    grid: tuple[int, int]  # no flag
    out: str = flag("here", "folder (%(default)s)", group="output")
    rates: Sequence[float] = flag((0.5, 0.25), "(%(default)s)")
    shards: Sequence[str] | None = flag(None, "", nargs="*")
    token: bool = flag(True, "leave it out")
    dry: bool = flag(False, "only tell")
    machines: Machines = group("machines", Machines)
    width: int | None = flag(64, "0 for none (%(default)s)", convert=lambda width: width or None)


def parsed(*flags, job=Job):
    return read(Job, parser("job", None, job).parse_args(flags), grid=(2, 3))


def test_without_flags_it_has_its_defaults():
    assert parsed() == Job((2, 3))


def test_every_flag_reaches_its_field():
    found = parsed("--out", "there", "--rates", "1", "2", "--shards", "--no-token", "--dry", "--width", "0")
    assert found == Job((2, 3), "there", (1.0, 2.0), (), False, True, width=None)
    assert parsed("--address", "auto", "--cpus-per-actor", "2").machines == Machines("auto", 2)


def test_help_shows_groups_and_defaults():
    text = parser("job", "What it does.", Job).format_help()
    output, machines = text.split("output:\n")[1].split("machines:\n")
    assert "--out OUT" in output and "folder (here)" in output and "([0.5, 0.25])" in output and "--no-token" in output
    assert "--cpus-per-actor N" in machines and "0 for none (64)" in machines


def test_an_instance_sets_other_defaults():
    other = Job((2, 3), out="elsewhere", width=8)
    assert "(elsewhere)" in parser("job", None, other).format_help()
    assert parsed(job=other) == other


def test_errors_name_the_flag():
    with pytest.raises(UserError, match=r"^--cpus-per-actor 0: must be at least 1$"):
        parsed("--cpus-per-actor", "0")
    with pytest.raises(UserError, match=r"^--cpus-per-worker 0: "):
        Workers(cpus_per_actor=0)


def test_a_wrong_value_is_one_line(capsys):
    with pytest.raises(SystemExit):
        parsed("--width", "wide")
    assert capsys.readouterr().err.splitlines()[-1] == "job: error: argument --width: invalid int value: 'wide'"
