"""Temporary folders end with their process, also where it is killed."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from raypipe.scratch import YOUNG_S, scratch

HOLD = """
import time
from raypipe.scratch import scratch
with scratch() as folder:
    (folder / "state").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def age(folder: Path) -> None:
    old_s = time.time() - 2 * YOUNG_S
    os.utime(folder, (old_s, old_s))


def test_a_folder_goes_with_what_is_in_it(temporary: Path) -> None:
    with scratch() as folder, scratch() as another:
        (folder / "file").write_text("x")
        assert folder.parent == temporary and folder != another
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_used_stays(temporary: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    folders = []
    for holder in holders:
        assert holder.stdout
        folders.append(Path(holder.stdout.readline().strip()))
    killed, alive = folders
    holders[0].kill()
    holders[0].communicate()
    with scratch():
        assert killed.exists(), "it may be one that is just being made"
    for folder in folders:
        age(folder)
    with scratch():
        assert not killed.exists() and (alive / "state").exists()
    holders[1].kill()
    holders[1].communicate()


def test_a_folder_that_may_not_be_removed_is_in_nobodys_way(temporary: Path) -> None:
    file = temporary / "raypipe-scratch-no-folder"
    file.write_text("x")
    age(file)
    with scratch():
        pass
    assert file.exists()
