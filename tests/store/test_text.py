"""Text as people save it."""

from __future__ import annotations

import pytest

from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.store import text

WORDS = "käse\nπ\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark", "utf-16-be-mark"])
def test_utf_8_and_utf_16_with_their_marks(encoding, tmp_path):
    data = (
        ("\ufeff" + WORDS).encode(encoding.removesuffix("-mark"))
        if encoding.endswith("mark")
        else WORDS.encode(encoding)
    )
    assert text.decode(data) == WORDS
    (tmp_path / "names.txt").write_bytes(data)
    assert classes.read_names(str(tmp_path / "names.txt")) == ["käse", "π"]


@pytest.mark.parametrize("data", ["käse".encode("latin-1"), b"\xff\xfe\x00", "käse".encode("utf-16-le")[:-1] + b"\xff"])
def test_anything_else_is_one_clear_error(data, tmp_path):
    with pytest.raises(
        ValueError, match=r"^neither UTF-8 nor UTF-16 with its mark: byte \d+ of \d+ is wrong; save it as"
    ):
        text.decode(data)
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"^--classes .*names\.txt: neither UTF-8 nor UTF-16"):
        classes.read_names(str(tmp_path / "names.txt"))
