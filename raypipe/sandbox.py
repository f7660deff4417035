"""The killable child that decodes: whatever a file does to it, the parent gets an answer in time.

`Sandbox` (in a worker) starts `python -m raypipe.sandbox` once and sends it one file after another:
lines of JSON each way, one clip's pixels at a time through shared memory. The child has limits on time
and memory, writes no core dump and dies with its parent. A file is blamed only after a second, fresh
child failed at the same clip of it, since a child killed for another reason would make an innocent file
look guilty.
"""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from raypipe.containers import DecodeError, Reason
from raypipe.decode import ClipRequest, ClipSpan, DecodedClip, FailedClip, decode_clips
from raypipe.frames import Pictures, VideoFacts

GO_ON: dict[str, Any] = {}
"""What the parent tells the child between two clips of a file."""

MEMORY = "/dev/shm"
"""A file system in memory, where there is one."""

LAST_WORDS_BYTES = 2000
"""How much of what the codec printed before it died is kept."""


@dataclass(frozen=True)
class Limits:
    """What a file may cost before it is given up."""

    timeout_s: float
    """For one clip: the whole video, or one window of it."""
    max_memory_mb: int


class Sandbox:
    """Decodes files in a child process. Not thread-safe: one sandbox per worker."""

    def __init__(self, request: ClipRequest, limits: Limits) -> None:
        self._request, self._limits = request, limits
        self._pixels = picture_file(int(np.prod(request.pictures_shape)))
        self._shared = map_pictures(self._pixels.fileno(), request)
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - see close
        self._child: subprocess.Popen[bytes] | None = None
        self._cpu_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child and frees the shared memory."""
        self._kill()
        self._stderr.close()
        self._pixels.close()
        self._shared = self._shared[:0].copy()  # unmaps it

    def decode(self, path: str, *, first: int = 0) -> Iterator[DecodedClip | FailedClip]:
        """The clips of the file at `path` from number `first` on, each within twice the time limit, the last
        one marked.

        Where the file cannot be read on, one FailedClip stands for the rest of it. Raises DecodeError
        where it gives nothing at all.
        """
        done, lost_at = first, first - 1  # clips so far; the clip at which a child was lost before
        end_s = duration_s = 0.0
        while True:
            try:
                for clip in self._ask(path, first=done):
                    yield clip
                    done, end_s = done + 1, clip.span.end_s
                    if isinstance(clip, DecodedClip):
                        duration_s = clip.facts.duration_s
                return
            except _ChildLost as lost:
                if done > lost_at:
                    lost_at = done
                    continue
                error = DecodeError(lost.reason, lost.message)
            except DecodeError as refused:
                error = refused
            break
        if done == first:
            raise error
        yield FailedClip(ClipSpan(done, True, end_s, duration_s), error.reason, str(error))

    def cpu_s(self) -> float:
        """CPU seconds that this sandbox's children have used so far."""
        return self._cpu_s

    def _ask(self, path: str, *, first: int) -> Iterator[DecodedClip | FailedClip]:
        """The file's clips from number `first` on, by the child that is there or a fresh one."""
        self._tell({"path": os.fsencode(path).hex(), "first": first})
        finished = False
        try:
            while not finished:
                reply = self._hear()
                finished = reply["span"] is None or reply["span"]["is_last"]
                yield self._clip(reply)
                if not finished:
                    self._tell(GO_ON)
        finally:
            if not finished:  # nobody wants the rest
                self._kill()

    def _clip(self, reply: dict[str, Any]) -> DecodedClip | FailedClip:
        """The clip that a reply describes. Raises DecodeError where it says that there is none."""
        if reply["span"] is None:
            if reply["reason"] == "out_of_memory":
                self._kill()  # what it allocated so far may stay with it
            raise DecodeError(reply["reason"], reply["message"])
        span = ClipSpan(**reply.pop("span"))
        if "reason" in reply:
            return FailedClip(span, **reply)
        facts = VideoFacts(**reply.pop("facts"))
        return DecodedClip(span=span, pictures=self._shared.copy(), facts=facts, **reply)

    def _tell(self, message: dict[str, Any]) -> None:
        child = self._child or self._start()
        assert child.stdin
        try:
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            raise self._lost("crash") from None

    def _hear(self) -> dict[str, Any]:
        child = self._child
        assert child and child.stdout
        ready, _, _ = select.select([child.stdout], [], [], self._limits.timeout_s)
        if not ready:
            raise self._lost("timeout")
        line = child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._lost("crash")
        reply: dict[str, Any] = json.loads(line)
        self._cpu_s += reply.pop("cpu_s")
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {
            "request": asdict(self._request),
            "pixels": self._pixels.fileno(),
            "max_memory_mb": self._limits.max_memory_mb,
            "parent": os.getpid(),
        }
        self._child = subprocess.Popen(
            [sys.executable, "-m", "raypipe.sandbox", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=[self._pixels.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        return self._child

    def _lost(self, reason: Reason) -> "_ChildLost":
        """Ends the child that gave no answer and says why it had to."""
        child = self._child
        assert child
        if reason == "crash":
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
        status = child.poll()
        self._kill()
        words = self._last_words()
        if reason == "timeout":
            message = f"no answer within --timeout-s {self._limits.timeout_s:g}"
        elif status is not None and status < 0:
            message = f"the decoder died of {signal.Signals(-status).name}"
        else:
            message = f"the decoder ended with status {status}"
        if "MemoryError" in words or "Cannot allocate memory" in words:
            reason = "out_of_memory"
        return _ChildLost(reason, f"{message}: {words}" if words else message)

    def _last_words(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - LAST_WORDS_BYTES))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._stderr.seek(0)
        self._stderr.truncate()
        return lines[-1].strip() if lines else ""

    def _kill(self) -> None:
        if self._child:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe and pipe.close()
            self._child = None


def picture_file(size: int) -> IO[bytes]:
    """A file of so many bytes for parent and child to map: in memory, or where that has no room, as in a
    container with little of it, on the temporary folder's disk.

    All of it is allocated now: whoever writes into it on a disk that is full dies of SIGBUS, and a file
    would be blamed. Raises OSError where there is no room.
    """
    folders = [MEMORY, tempfile.gettempdir()] if os.path.isdir(MEMORY) else [tempfile.gettempdir()]
    for folder in folders:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the sandbox closes it
        try:
            allocate(file.fileno(), size)
        except OSError as error:
            file.close()
            no_room = OSError(
                error.errno, f"{size} bytes for the pictures of a clip: {error.strerror}", folder
            )
        else:
            return file
    raise no_room


def allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.truncate(descriptor, size)


def map_pictures(descriptor: int, request: ClipRequest) -> Pictures:
    """The memory that parent and child share, as the pictures [V*T, H, W, 3] of one clip."""
    shape = request.pictures_shape
    return np.frombuffer(mmap.mmap(descriptor, int(np.prod(shape))), np.uint8).reshape(shape)


class _ChildLost(Exception):
    """The child gave no answer. Another may."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message


# --- the child ----------------------------------------------------------------------------------


def _child_main(settings: dict[str, Any]) -> None:
    """Answers requests for a file's clips, a line of JSON each, until its standard input ends."""
    # Codecs print to standard output, which would break the protocol: only `answers` keeps it.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _confine(settings["max_memory_mb"], settings["parent"])
    request = ClipRequest(**settings["request"])
    shared = map_pictures(settings["pixels"], request)
    requests = iter(sys.stdin.buffer.readline, b"")
    for line in requests:
        asked = json.loads(line)
        path, spent_s = os.fsdecode(bytes.fromhex(asked["path"])), time.process_time()
        for reply in _replies(path, request, asked["first"], shared):
            now_s = time.process_time()
            answers.write(json.dumps(reply | {"cpu_s": now_s - spent_s}).encode() + b"\n")
            answers.flush()
            spent_s = now_s
            if reply["span"] and not reply["span"]["is_last"]:
                next(requests)  # the parent has taken the pictures


def _replies(path: str, request: ClipRequest, first: int, shared: Pictures) -> Iterator[dict[str, Any]]:
    """What the child says of a file: a reply per clip, or one with the reason why there are none."""
    try:
        for clip in decode_clips(path, request, first=first, out=shared):
            reply = {name: getattr(clip, name) for name in clip.__dataclass_fields__ if name != "pictures"}
            if isinstance(clip, DecodedClip):
                reply["facts"] = asdict(clip.facts)
            yield reply | {"span": asdict(clip.span)}
    except DecodeError as error:
        yield {"span": None, "reason": error.reason, "message": str(error)}
    except MemoryError:
        yield {"span": None, "reason": "out_of_memory", "message": "the memory limit was reached"}
    except Exception as error:  # the process boundary: PyAV raises far more than its own errors
        yield {"span": None, "reason": "damaged", "message": f"{type(error).__name__}: {error}"}


PR_SET_PDEATHSIG = 1


def _confine(max_memory_mb: int, parent: int) -> None:
    """No core dumps, bounded memory, and no life after the parent's."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        resource.setrlimit(resource.RLIMIT_AS, (max_memory_mb << 20, max_memory_mb << 20))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


if __name__ == "__main__":
    _child_main(json.loads(sys.argv[1]))
