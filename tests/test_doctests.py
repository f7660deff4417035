"""The worked examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

import raypipe

EXAMPLES = [
    path.stem for path in Path(raypipe.__path__[0]).glob("*.py") if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", sorted(EXAMPLES))
def test_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"raypipe.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
