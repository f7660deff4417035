"""A person's mistake ends in one sentence and its own exit status."""

import subprocess
import sys

import pytest

CODE = """
from raypipe.console import run_command
from raypipe.errors import RunFailed, UserError
def command():
    raise {error}("--input videos: no such folder")
run_command(command)
"""


@pytest.mark.parametrize(("error", "status"), [("UserError", 2), ("RunFailed", 1)])
def test_the_status_tells_a_wrong_command_from_one_that_could_not_finish(error: str, status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CODE.format(error=error)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr == "error: --input videos: no such folder\n"
