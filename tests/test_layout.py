"""Who may import what: the driver of a command starts fast, and only commands know Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raypipe

PACKAGE = Path(raypipe.__file__).parent


def imports(source: str) -> set[str]:
    """The top-level packages that a module imports anywhere, functions included.

    >>> sorted(imports("import ray.data\\ndef f():\\n    from keras import ops"))
    ['keras', 'ray']
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def importers(package: str) -> set[str]:
    return {file.name for file in PACKAGE.rglob("*.py") if package in imports(file.read_text())}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "ray",
            {
                "extract.py",
                "tune.py",
                "predict.py",
                "refit.py",
                "compare.py",
                "cluster.py",
                "monitoring.py",
                "watch.py",
                "workers.py",
            },
        ),
        ("tensorflow", {"replicas.py"}),
        ("jax", {"replicas_jax.py"}),
    ],
)
def test_only_these_modules_import(package: str, allowed: set[str]) -> None:
    assert importers(package)
    assert importers(package) <= allowed


def test_extract_starts_without_loading_what_it_may_not_need() -> None:
    code = "import sys, raypipe.extract; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    heavy = {"ray", "tensorflow", "keras", "av", "onnxruntime", "onnx", "cv2", "matplotlib", "sklearn"}
    assert "raypipe.extract" in loaded.split()
    assert not heavy & set(loaded.split())
