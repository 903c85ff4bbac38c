"""What becomes of errors and of text that cannot be written where it goes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from here import ROOT

HEAD = "from patchrank.errors import run\ndef main():\n"


def done(body, encoding="utf-8"):
    command = [sys.executable, "-c", HEAD + f"    {body}\nrun(main)"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding=encoding, check=False)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_text_that_the_terminal_cannot_show_is_escaped(encoding):
    found = done("print('π ä \\udce4'); return 0", encoding)
    assert found.returncode == 0 and not found.stderr
    assert "\\udce4" in found.stdout and ("\\u03c0" in found.stdout) == (encoding != "utf-8")


def test_a_name_that_is_no_utf_8_is_one_line():
    found = done("'/x/\\udce4'.encode()")
    assert found.returncode == 2
    assert found.stderr == "error: '/x/\\udce4': holds bytes that are no UTF-8; rename it\n"
    found = done("('/y\\n' * 999 + '/x/\\udce4\\n/z\\n').encode()")  # a list of shards
    assert found.stderr == "error: '/x/\\udce4': holds bytes that are no UTF-8; rename it\n"
