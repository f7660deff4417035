"""Small files that are there whole or not at all, on a disk and in a bucket."""

import io
import json
import math
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.storage import Place, RemotePath


def write_atomically(path: Place, content: Any) -> None:
    """The content under its name, complete or not at all, even if the machine stops now."""
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_torn(folder: Path, names: Collection[str]) -> None:
    """Removes what a `write_atomically` of these files that was killed has left in a folder, nothing else."""
    for file in folder.iterdir():
        if is_torn(file.name, names):
            file.unlink(missing_ok=True)


def is_torn(name: str, names: Collection[str]) -> bool:
    """Whether a `write_atomically` of one of `names` calls a file so before it is whole.

    >>> is_torn(".a.json.123", ["a.json"]), is_torn(".a.json.backup", ["a.json"])
    (True, False)
    """
    return any(re.fullmatch(rf"\.{re.escape(whole)}\.[0-9]+", name) for whole in names)


def write_json(path: Place, content: object) -> None:
    """`content` as indented JSON, written like `write_atomically`. What is not known is null, not NaN."""
    write_atomically(path, (json.dumps(_known(content), indent=2, allow_nan=False) + "\n").encode())


def _known(value: Any) -> Any:
    """
    >>> _known({"auc": float("nan"), "interval": (0.5, float("nan"))})
    {'auc': None, 'interval': [0.5, None]}
    """
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_array(path: Place, array: NDArray[Any]) -> None:
    """An array as .npy, written like `write_atomically`."""
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getbuffer())


def read_array(path: Place) -> NDArray[Any]:
    """What `write_array` wrote."""
    array: NDArray[Any] = np.load(io.BytesIO(path.read_bytes()))
    return array


def remove_folder(path: Place) -> None:
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_folder(path: Place) -> None:
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_file(file: Path, target: Place) -> None:
    """Gives a whole local file, on the target's own disk if that is local, the target's name or place."""
    if isinstance(target, RemotePath):
        target.put_file(file)
    else:
        os.replace(file, target)
