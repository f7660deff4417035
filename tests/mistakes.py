"""Configs as a command reads them, and the one sentence that a mistake in one gives."""

from pathlib import Path

import pytest

from raypipe.config import Command
from raypipe.errors import UserError
from raypipe.reading import load_config


def load(kind: type[Command], *arguments: str) -> Command:
    return load_config(kind, arguments, prog=f"python -m raypipe.{kind.__name__}")


def error_of(kind: type[Command], *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(kind, *arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2
    return str(caught.value)


def error_in_file(kind: type[Command], content: str, folder: Path) -> str:
    file = folder / "mine.yaml"
    file.write_text(content)
    error = error_of(kind, "--config", str(file))
    assert error.startswith(f"{file}: ")
    return error.removeprefix(f"{file}: ")
