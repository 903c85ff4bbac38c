"""A user's mistake: one clear line, no stack trace."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn


class UserError(Exception):
    """Input that a user can put right. The message is one line that names the file, key or flag and what to do."""


@contextlib.contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Ctrl-C in the `with` statement is answered with advice, and goes on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {advice}", file=sys.stderr)
        raise


def run(main: Callable[[], int]) -> NoReturn:
    """Run the main function of a job and leave the process with its exit status.

    A `UserError` becomes one line on stderr and status 2; Ctrl-C becomes status 130, as shells expect. What the
    encoding of stdout lacks is written escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:  # a name that the system hands over as bytes, and that is to be stored
        start = error.object.rfind("\n", 0, error.start) + 1  # it may be one of many lines
        name = error.object[start:].split("\n")[0]
        print(f"error: {ascii(name)[-200:]}: holds bytes that are no UTF-8; rename it", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        sys.stderr.close()
        sys.exit(141)
