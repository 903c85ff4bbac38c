"""Text as people save it: UTF-8 with or without a mark, or UTF-16 with its mark."""

from __future__ import annotations

import codecs

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(data: bytes, errors: str = "strict") -> str:
    """Bytes of a text file as text, without its mark.

    Raises:
        ValueError: they are something else; one line.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        at = f"byte {error.start + 1} of {len(data)}"
        raise ValueError(f"neither UTF-8 nor UTF-16 with its mark: {at} is wrong; save it as UTF-8") from None
