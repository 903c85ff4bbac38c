"""Scripts as a user runs them, but in this process: without the seconds that another takes to import torch."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent


def run_here(script, *arguments):
    """What `python SCRIPT ARGUMENTS...` in the project's folder prints and returns."""
    command = [str(ROOT / script), *map(str, arguments)]
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), patch.object(sys, "argv", command):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(command, status, stdout.getvalue(), stderr.getvalue())
