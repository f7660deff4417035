"""The killable child that decodes: whatever a file does to it, the parent gets an answer in time.

`Sandbox` (in a worker) starts `python -m raypipe.sandbox` once and sends it one file after another: a
line of JSON each way, pixels through shared memory. The child has limits on time and memory, writes no
core dump and dies with its parent. A file is blamed only after a second, fresh child failed on it too,
since a child killed for another reason would make an innocent file look guilty.
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
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from raypipe.containers import DecodeError, Reason
from raypipe.decode import ClipRequest, DecodedClip, Pictures, VideoFacts, decode_clip

LAST_WORDS_BYTES = 2000
"""How much of what the codec printed before it died is kept."""


@dataclass(frozen=True)
class Limits:
    """What a file may cost before it is given up."""

    timeout_s: float
    max_memory_mb: int


class Sandbox:
    """Decodes files in a child process. Not thread-safe: one sandbox per worker."""

    def __init__(self, request: ClipRequest, limits: Limits) -> None:
        self._request, self._limits = request, limits
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._pixels: IO[bytes] = tempfile.TemporaryFile(dir=memory)  # noqa: SIM115 - see close
        self._pixels.truncate(int(np.prod(request.pictures_shape)))
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

    def decode(self, path: str) -> DecodedClip:
        """The clip of the file at `path`. Raises DecodeError within twice the time limit."""
        try:
            return self._ask(path)
        except _ChildLost:
            pass
        try:
            return self._ask(path)
        except _ChildLost as lost:
            raise DecodeError(lost.reason, lost.message) from None

    def cpu_s(self) -> float:
        """CPU seconds that this sandbox's children have used so far."""
        return self._cpu_s

    def _ask(self, path: str) -> DecodedClip:
        child = self._child or self._start()
        assert child.stdin and child.stdout
        line = json.dumps({"path": os.fsencode(path).hex()}).encode() + b"\n"
        try:
            child.stdin.write(line)
            child.stdin.flush()
        except BrokenPipeError:
            raise self._lost("crash") from None
        ready, _, _ = select.select([child.stdout], [], [], self._limits.timeout_s)
        if not ready:
            raise self._lost("timeout")
        answer = child.stdout.readline()
        if not answer.endswith(b"\n"):
            raise self._lost("crash")
        reply = json.loads(answer)
        self._cpu_s += reply.pop("cpu_s")
        if "reason" in reply:
            if reply["reason"] == "out_of_memory":
                self._kill()  # what it allocated so far may stay with it
            raise DecodeError(reply["reason"], reply["message"])
        facts = VideoFacts(**reply.pop("facts"))
        return DecodedClip(pictures=self._shared.copy(), facts=facts, **reply)

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
    """Answers one line of JSON per line of JSON until its standard input ends."""
    # Codecs print to standard output, which would break the protocol: only `answers` keeps it.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _confine(settings["max_memory_mb"], settings["parent"])
    request = ClipRequest(**settings["request"])
    shared = map_pictures(settings["pixels"], request)
    for line in sys.stdin.buffer:
        path = os.fsdecode(bytes.fromhex(json.loads(line)["path"]))
        before_s = time.process_time()
        answer = _answer(path, request, shared) | {"cpu_s": time.process_time() - before_s}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _answer(path: str, request: ClipRequest, shared: Pictures) -> dict[str, Any]:
    try:
        clip = decode_clip(path, request)
    except DecodeError as error:
        return {"reason": error.reason, "message": str(error)}
    except MemoryError:
        return {"reason": "out_of_memory", "message": "the memory limit was reached"}
    except Exception as error:  # the process boundary: PyAV raises far more than its own errors
        return {"reason": "damaged", "message": f"{type(error).__name__}: {error}"}
    shared[:] = clip.pictures
    return {
        "frame_pts_s": clip.frame_pts_s,
        "frame_ok": clip.frame_ok,
        "facts": asdict(clip.facts),
        "content_digest": clip.content_digest,
        "message": clip.message,
    }


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
