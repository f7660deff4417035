"""A folder of this machine in the place of one in a bucket: what can only write to a disk writes there.

    with mirrored(place, last="state/folds.npz") as mirror:    what the place holds is in mirror.folder
        ...                                                     new and changed files go to the place:
        mirror.push_in_passing()                                while work goes on
                                                                and at the end, whatever the end is

On a disk the place itself is the folder, and nothing is copied.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from raypipe.scratch import scratch
from raypipe.storage import Place, RemotePath, StorageError

LOG = logging.getLogger("raypipe")

AT_ONCE = 8
"""Copies on their way together: each mostly waits for an answer."""
SHARE = 0.1
"""Of the time, that copying in passing may take."""
MOST_APART_S = 60.0


class Mirror:
    """A local folder, and the place that its files are copied to, each whole.

    `last` is the file that says that the others are there: it is put after them and taken before them, so
    that whoever finds it finds all that it speaks of. With no place nothing is copied.
    """

    def __init__(self, folder: Path, target: RemotePath | None, *, last: str = "") -> None:
        self.folder = folder
        self._target, self._last = target, last
        self._copied: dict[str, tuple[int, int]] = {}
        self._next_s = 0.0

    def pull(self) -> None:
        """Copies what the place holds into the folder. Raises StorageError."""
        if self._target is None:
            return
        if self._last:
            with suppress(FileNotFoundError):
                self._get(self._last)
        others = [name for name in self._target.names() if name != self._last]
        each(others, self._get)

    def push(self) -> None:
        """Copies what is new or changed in the folder to the place. Raises StorageError."""
        if self._target is None:
            return
        names = [file.relative_to(self.folder) for file in self.folder.rglob("*") if file.is_file()]
        visible = [str(name) for name in names if not any(part.startswith(".") for part in name.parts)]
        changed = [name for name in visible if self._copied.get(name) != self._version(name)]
        each([name for name in changed if name != self._last], self._put)
        if self._last in changed:
            self._put(self._last)

    def push_in_passing(self) -> None:
        """`push`, but never so often that it takes more than a tenth of the time; where the place takes
        nothing, it is for the next time."""
        began_s = time.monotonic()
        if began_s < self._next_s:
            return
        try:
            self.push()
        except StorageError as error:
            LOG.warning("%s: takes no copies: %s", self._target, error)
        ended_s = time.monotonic()
        self._next_s = ended_s + min((ended_s - began_s) / SHARE, MOST_APART_S)

    def _get(self, name: str) -> None:
        assert self._target is not None
        content = (self._target / name).read_bytes()
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self._copied[name] = self._version(name)

    def _put(self, name: str) -> None:
        assert self._target is not None
        version, target = self._version(name), self._target / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.folder / name).read_bytes())
        self._copied[name] = version

    def _version(self, name: str) -> tuple[int, int]:
        status = (self.folder / name).stat()
        return status.st_size, status.st_mtime_ns


def each(names: Iterable[str], copy: Callable[[str], None]) -> None:
    """Copies several at once. Raises what the first that failed did, when all have ended."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(copy, names))


@contextmanager
def mirrored(target: Place, *, last: str = "") -> Iterator[Mirror]:
    """A place's content in a folder of this machine; in the end, whatever that is, what became of it is in
    the place. Raises StorageError."""
    if isinstance(target, Path):
        target.mkdir(parents=True, exist_ok=True)
        yield Mirror(target, None)
        return
    with scratch() as folder:
        mirror = Mirror(folder, target, last=last)
        mirror.pull()
        try:
            yield mirror
        finally:
            mirror.push()


@contextmanager
def borrowed(target: Place | None) -> Iterator[Path | None]:
    """A place's content in a folder of this machine, to be read. Raises StorageError."""
    if target is None or isinstance(target, Path):
        yield target
        return
    with scratch() as folder:
        Mirror(folder, target).pull()
        yield folder


@contextmanager
def on_disk(file: Place) -> Iterator[Path]:
    """A file, or a copy of it while it is needed, for what reads only from a disk. Raises StorageError."""
    if isinstance(file, Path):
        yield file
        return
    with scratch() as folder:
        copy = folder / file.name
        copy.write_bytes(file.read_bytes())
        yield copy
