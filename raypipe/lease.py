"""One writer at a time in a folder: by a lock on a disk; by a lease in a bucket, which has no locks."""

import contextlib
import fcntl
import functools
import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from raypipe.errors import RunFailed, UserError
from raypipe.storage import Place, RemotePath

LOG = logging.getLogger("raypipe")


@contextlib.contextmanager
def only_writer(folder: Place, *, named: str, refuse: str) -> Iterator[Callable[[], None]]:
    """Keeps other writers out of a folder, which is made. Yields what raises RunFailed where the place was
    lost meanwhile.

    Raises UserError, which begins with `named`, where nobody may write, or, saying `refuse`, where another
    does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(folder, RemotePath):
            lease = Lease(folder / LOCK, refuse=f"{named}: {refuse}")
            lease.take()
        else:
            lock = open(folder / LOCK, "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise UserError(f"{named}: cannot be written: {error.strerror or error}") from None
    if isinstance(folder, RemotePath):
        with contextlib.closing(lease):
            yield lease.check
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{named}: {refuse}") from None
        yield lambda: None


LOCK = ".lock"
"""The file, or in a bucket the folder, that says who writes."""
BEAT_S = 5.0
LEASE_S = 30.0
"""A writer that has given no sign of life for so long is taken for dead."""
TRIES = 3


class Lease:
    """One writer at a time in a folder of a file system that has no locks.

    Each puts a marker there first, then looks whether it is alone; what is put is seen by every later look
    (S3, GCS and Azure promise that), so of two never both believe to be alone. The marker is renewed as
    long as its writer lives. One that stays the same is removed, so a killed run needs no cleaning up.
    """

    def __init__(self, folder: RemotePath, *, refuse: str) -> None:
        self._folder, self._refuse = folder, refuse
        self._marker = folder / uuid.uuid4().hex
        self._beats = 0
        self._beaten_s = 0.0
        self._lost: RunFailed | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, object]:
        """What a copy in another process has of it: nothing."""
        return {}

    def take(self) -> None:
        """Raises UserError, saying `refuse`, where another writer lives."""
        for _ in range(TRIES):
            self._beat()
            if not self._others():
                self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
                self._thread.start()
                return
            self._marker.unlink(missing_ok=True)
            self._remove_dead()
            time.sleep(random.random())  # two that began together shall not meet again
        raise UserError(self._refuse)

    def close(self) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
        with contextlib.suppress(OSError):
            self._marker.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises RunFailed where this writer was away for so long that another may have begun."""
        if self._lost:
            raise self._lost
        if not self._was_away():
            return
        if not self._marker.exists():
            raise RunFailed(f"{self._folder.parent}: lost its place as the writer there; run it again")
        self._beat()
        if self._others():
            raise RunFailed(f"{self._folder.parent}: another run writes there now; run it again")

    def _was_away(self) -> bool:
        return _awake_s() - self._beaten_s >= LEASE_S / 2

    def _others(self) -> dict[str, bytes]:
        """What the markers of other writers say, by name."""
        found = {}
        for marker in self._folder.glob("*"):
            if marker.name != self._marker.name:
                try:
                    found[marker.name] = marker.read_bytes()
                except FileNotFoundError:
                    continue
                except OSError:  # renewed or removed while it was read: somebody lives
                    found[marker.name] = os.urandom(8)
        return found

    def _remove_dead(self) -> None:
        """Watches the other markers for as long as a lease lasts. Raises UserError where one is renewed."""
        before = {name: said for name, said in self._others().items() if not self._is_gone(name, said)}
        if not before:
            return
        LOG.info("another run may be writing to %s; watching it for %g s", self._folder.parent, LEASE_S)
        until_s = _awake_s() + LEASE_S
        while _awake_s() < until_s:
            time.sleep(BEAT_S / 2)
            now = self._others()
            if any(now.get(name, said) != said for name, said in before.items()):
                raise UserError(self._refuse)
            if not before.keys() & now.keys():
                return
        for name in before:
            (self._folder / name).unlink(missing_ok=True)

    def _is_gone(self, name: str, said: bytes) -> bool:
        """Removes the marker of a process that was on this machine and has ended."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            who = json.loads(said)
            if who["machine"] == _machine() and _started(int(who["pid"])) != who["started"]:
                (self._folder / name).unlink(missing_ok=True)
                return True
        return False

    def _beat(self) -> None:
        self._beats += 1
        began_s = _awake_s()
        pid = os.getpid()
        who = {"machine": _machine(), "pid": pid, "started": _started(pid), "beat": self._beats}
        self._marker.write_in_place(json.dumps(who).encode())  # gone for a moment, it would be missed
        self._beaten_s = began_s

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            # A marker that another has removed must not come back; and one that came back all the same, as it
            # was on its way while this process stood still, must not pass for a writer that was never away.
            with contextlib.suppress(OSError):
                try:
                    self.check()
                except RunFailed as error:
                    self._lost = error
                    return
                if self._marker.exists():
                    self._beat()


def _awake_s() -> float:
    """Seconds of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@functools.cache
def _machine() -> str:
    """Names the kernel and the process numbers that count there; empty where that is not to be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _started(pid: int) -> str | None:
    """When a process of this machine started; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
