"""The command `patchrank`: the jobs as its subcommands, with the flags that their files have.

patchrank --help
patchrank search --model ViT-B-16 --pretrained openai --shards shards --out rankings
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from patchrank import __version__, errors

JOBS = (
    *("fit", "make-shards", "search", "embed", "query", "status"),
    *("train-predictor", "train-tokens", "evaluate", "report"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that is named first, with the rest of the arguments."""
    argv = sys.argv[1:] if argv is None else argv
    jobs = "\n".join(f"  {job:<17}{_what(job)}" for job in JOBS)
    parser = argparse.ArgumentParser(
        prog="patchrank",
        usage="patchrank [-h] [--version] JOB ...",
        description="Golden rankings of patch tokens, and CLIP models that drop tokens by them.",
        epilog=f"jobs:\n{jobs}\n\n`patchrank JOB --help` tells what a job does, and its flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"patchrank {__version__}")
    parser.add_argument("job", choices=JOBS, metavar="JOB", help="one of those below")
    job = parser.parse_args(argv[:1]).job
    return importlib.import_module(f"jobs.{_module(job)}").main(argv[1:], prog=f"patchrank {job}")


def command() -> NoReturn:
    """What is installed as `patchrank`."""
    errors.run(main)


def _module(job: str) -> str:
    return job.replace("-", "_")


def _what(job: str) -> str:
    """How a job's docstring begins, which is read: importing a job takes seconds."""
    source = Path(__file__).with_name(f"{_module(job)}.py").read_text(encoding="utf-8")
    return re.split("[:.\n]", ast.get_docstring(ast.parse(source)) or "")[0]
