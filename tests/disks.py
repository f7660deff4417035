"""Small disks of their own, which fill up and can be made read-only. Needs root and the right to mount."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A disk of `size` (as mount has it: 200k) at `path`, which is made."""
    path.mkdir()
    if os.geteuid() or mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)):
        pytest.skip("needs root and the right to mount a small tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode
