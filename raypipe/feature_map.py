"""The features of a store's clips as one memory-mapped array on each node: made once, shared by its trials.

What trials read of it is the operating system's page cache, once for all of them; nothing is sent to them.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.errors import RunFailed
from raypipe.shards import features_array
from raypipe.store import FeatureStore

UNUSED_S = 7 * 24 * 3600.0
"""Maps that no trial has opened for so long are removed when another is made."""


@dataclass(frozen=True)
class FeatureSource:
    """Where the features of these clips come from; small, so it can be sent to any node.

    A clip that has none, since it failed, is zeros.
    """

    store: str
    clips: tuple[tuple[str, int], ...]
    """video_id and clip_index of each."""
    steps: int
    dim: int

    def open(self, folder: Path | None = None) -> NDArray[np.float16]:
        """This node's map [N, T, D], read-only; made first where it is missing, from one shard at a time.

        `folder` holds the node's maps. Raises RunFailed where it cannot be written.
        """
        folder = folder or Path(tempfile.gettempdir()) / f"raypipe-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = folder / f"{self._key()}.npy"
            with open(folder / f"{file.stem}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of several trials that start at once, one makes it
                if not file.exists():
                    _remove_unused(folder)
                    self._make(file)
            os.utime(file)
            features: NDArray[np.float16] = np.load(file, mmap_mode="r")
        except OSError as error:
            raise RunFailed(
                f"{folder}: cannot hold the features ({error.strerror}); "
                "make room there, or set TMPDIR to a folder that has it"
            ) from None
        return features

    def _key(self) -> str:
        """Names the content. A shard's rows may be replaced under its name, which changes its time."""
        store = FeatureStore(self.store)
        shards = [(shard.name, shard.stat()) for shard in store.shards()]
        content = [store.spec().fingerprint]
        content += [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in shards]
        content += [f"{video_id}\0{clip_index}" for video_id, clip_index in self.clips]
        return hashlib.sha256("\n".join(content).encode(errors="surrogateescape")).hexdigest()[:32]

    def _make(self, file: Path) -> None:
        store, temporary = FeatureStore(self.store), file.with_suffix(".part")
        rows = {clip: row for row, clip in enumerate(self.clips)}
        shape = (len(rows), self.steps, self.dim)
        features = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        _take_room(temporary)
        for shard in store.shards():
            table = store.read(["video_id", "clip_index", "features"], shards=[shard])
            table = table.filter(pc.is_valid(table["features"]))
            ids = zip(table["video_id"].to_pylist(), table["clip_index"].to_pylist(), strict=True)
            places = [rows.get(clip, -1) for clip in ids]
            wanted = [i for i, place in enumerate(places) if place >= 0]
            values = features_array(table["features"], store.spec())
            features[[places[i] for i in wanted]] = values[wanted]
        features.flush()
        os.replace(temporary, file)


def _take_room(file: Path) -> None:
    """Now, so that a full disk is an error here: written to through a map, it would end the process."""
    try:
        with open(file, "rb+") as place:
            os.posix_fallocate(place.fileno(), 0, place.seek(0, os.SEEK_END))
    except OSError:
        file.unlink()
        raise


def _remove_unused(folder: Path) -> None:
    for file in folder.glob("*.npy"):
        if time.time() - file.stat().st_mtime > UNUSED_S:
            file.unlink(missing_ok=True)
            file.with_suffix(".lock").unlink(missing_ok=True)
