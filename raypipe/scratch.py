"""A folder of this machine for temporary files, which does not stay where its process is killed."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "raypipe-scratch-"
YOUNG_S = 60.0
"""A folder of this age may not be locked yet."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder, locked while it is in use and removed in the end; those that killed processes left behind
    are removed first."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, or just removed
            if folder.stat().st_mtime < time.time() - YOUNG_S:
                _remove_unused(folder)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name,
        _locked(Path(name)),
    ):
        yield Path(name)


def _remove_unused(folder: Path) -> None:
    """Raises BlockingIOError where a process uses it."""
    with _locked(folder):
        shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock ends with the process, whatever ends it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
