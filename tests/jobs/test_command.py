"""The command `patchrank`."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from here import ROOT

from jobs import command
from patchrank import __version__
from patchrank.errors import UserError


def printed(capsys, *arguments):
    """What it prints before it exits, to stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    return end.value.code, *capsys.readouterr()


def test_it_lists_every_job(capsys):
    status, out, _ = printed(capsys, "--help")
    files = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "command", "training"}
    assert status == 0 and {job.replace("-", "_") for job in command.JOBS} == files
    lines = out.partition("\njobs:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(command.JOBS)
    assert all(20 < len(line) < 90 for line in lines)
    assert "  search           Search golden rankings" in lines


def test_version(capsys):
    assert printed(capsys, "--version") == (0, f"patchrank {__version__}\n", "")


@pytest.mark.parametrize("job", command.JOBS)
def test_usage_says_how_it_was_called(capsys, job):
    status, out, _ = printed(capsys, job, "--help")
    assert status == 0 and out.startswith(f"usage: patchrank {job} [-h]")


def test_a_file_says_how_it_was_called(capsys):
    from jobs import query

    with pytest.raises(SystemExit):
        query.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: jobs/query.py [-h]")


@pytest.mark.parametrize("arguments, words", [(["serch"], "invalid choice: 'serch'"), ([], "are required: JOB")])
def test_another_job_is_refused(capsys, arguments, words):
    status, _, err = printed(capsys, *arguments)
    assert status == 2 and words in err.splitlines()[-1]


def test_flags_reach_the_job(tmp_path):
    with pytest.raises(UserError, match="--limit 0: must be at least 1"):
        command.main(["search", "--limit", "0"])
    with pytest.raises(UserError, match=str(tmp_path)):
        command.main(["query", str(tmp_path)])


QUICK = """
import sys
from jobs import command
for arguments in (["--help"], ["--version"], ["query", "--help"], ["status", "--help"]):
    try:
        command.main(arguments)
    except SystemExit as end:
        assert end.code == 0
assert not {"torch", "ray", "open_clip"} & set(sys.modules)
"""


def test_help_version_query_and_status_do_without_torch_and_ray():
    done = subprocess.run([sys.executable, "-c", QUICK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_what_gets_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"patchrank": "jobs.command:command"} and callable(command.command)
