"""What is there in the place of a file that was not fetched: a pointer to it, a web page, an error message."""

from __future__ import annotations

import codecs
import re

_PAGE = re.compile(rb"(<!--.*?-->\s*)?<(!doctype html|html|head|body)", re.IGNORECASE | re.DOTALL)
_ERROR = re.compile(rb"(<\?xml[^>]*>\s*)?<Error>")
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{8,}")
_EXCERPT = 40  # bytes of a text that was not asked for


def stand_in(start: bytes, binary: bool = False) -> str | None:
    """What a file is that begins so, where it stands for another that was not fetched; None of any other.

    Args:
        binary: whether what was wanted is no text, so that any text is something else.
    """
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith((b"version https://git-lfs", b"version https://hawser")):
        return "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"
    if _PAGE.match(text):
        return "a web page, not the file itself: download it again"
    if _ERROR.match(text):
        return "an error message of a bucket, not the file itself: download it again"
    if binary and b"\0" not in start and _TEXT.fullmatch(text[:_EXCERPT]):
        begins = " ".join(text[:_EXCERPT].decode().split())
        return f"a text that begins {begins!r}, not the file itself: download it again"
    return None
