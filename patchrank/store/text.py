"""Text as people save it: UTF-8 with or without a mark, or UTF-16 with its mark."""

from __future__ import annotations

import codecs
import re
from decimal import Decimal

from patchrank.store.unfetched import stand_in

_NUMBER = re.compile(
    r"[+-]?(?=\.?[0-9])[0-9]{0,30}(\.[0-9]{0,30})?([eE][+-][0-9]{2})?"
)  # as numpy, pandas and spreadsheets write it, too

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(data: bytes, errors: str = "strict") -> str:
    """Bytes of a text file as text, without its mark.

    Raises:
        ValueError: they are something else; one line.
    """
    if errors == "strict" and (reason := stand_in(data)):
        raise ValueError(reason)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        found = data.decode(encoding, errors)
        wrong = found.find("\0")  # what UTF-16 without its mark, and UTF-32, have between letters
        if wrong < 0 or errors != "strict":
            return found.replace("\0", "\ufffd").replace("\ufeff", "")  # marks of files that were joined, too
        wrong = len(found[:wrong].encode(encoding))
    except UnicodeDecodeError as error:
        wrong = error.start
    at = f"byte {wrong + 1} of {len(data)}"
    raise ValueError(f"neither UTF-8 nor UTF-16 with its mark: {at} is wrong; save it as UTF-8")


def lines(content: str) -> list[str]:
    """The lines of a text, without their ends; unlike `str.splitlines`, what else Unicode breaks lines at stays."""
    return re.split(r"\r\n|\r|\n", content.removesuffix("\n").removesuffix("\r"))


def label(written: str) -> int | None:
    """The integer of up to nine digits, which fit a rankings file, that is written in a text, as a float or otherwise.

    None where it is something else. pandas writes integers as floats where a column has gaps, numpy by powers of ten.
    """
    number = Decimal(written.strip()) if is_number(written) else Decimal("0.5")
    return int(number) if number == number.to_integral_value() and abs(number) < 10**9 else None


def is_number(written: str) -> bool:
    """Whether a text is a number, of whatever size."""
    return _NUMBER.fullmatch(written.strip()) is not None
