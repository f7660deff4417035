import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clips import draw_black, write_video
from disks import small_disk
from fuzzing import is_alive, own_descriptors

from raypipe import sandbox as sandboxes
from raypipe.containers import DecodeError
from raypipe.decode import ClipRequest, ClipSpan, DecodedClip, FailedClip, decode_clips
from raypipe.sandbox import Limits, Sandbox

REQUEST = ClipRequest(
    frames=4,
    size=64,
    view="both",
    motion_gap_s=0.1,
    min_frames=2,
    max_pixels=1 << 26,
    max_packets=10_000,
    max_duration_s=1000.0,
)
LIMITS = Limits(timeout_s=30, max_memory_mb=1024)


class Counting(Sandbox):
    """Counts its children, and does something to each as it starts."""

    def __init__(self, limits: Limits = LIMITS, *, harm: Callable[[int, int], None] | None = None) -> None:
        super().__init__(REQUEST, limits)
        self.pids: list[int] = []
        self._harm = harm

    def only(self, path: str) -> DecodedClip:
        """The clip of a file that has one."""
        (clip,) = self.decode(path)
        assert isinstance(clip, DecodedClip)
        return clip

    def _start(self) -> "subprocess.Popen[bytes]":
        child = super()._start()
        self.pids.append(child.pid)
        if self._harm:
            self._harm(child.pid, len(self.pids))
        return child


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("clips") / "clip.mp4"))


@pytest.fixture
def sandbox() -> Iterator[Counting]:
    with Counting() as sandbox:
        yield sandbox


def failure(sandbox: Counting, path: str) -> tuple[str, str]:
    with pytest.raises(DecodeError) as caught:
        sandbox.only(path)
    return caught.value.reason, str(caught.value)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def test_a_clip_is_what_decoding_here_gives(clip: str, sandbox: Counting) -> None:
    (here,), there = decode_clips(clip, REQUEST), sandbox.only(clip)
    np.testing.assert_array_equal(there.pictures, here.pictures)
    assert (there.frame_pts_s, there.frame_ok, there.facts, there.content_digest, there.message) == (
        here.frame_pts_s,
        here.frame_ok,
        here.facts,
        here.content_digest,
        here.message,
    )


def test_one_child_decodes_many_files(clip: str, sandbox: Counting, tmp_path: Path) -> None:
    other = write_video(tmp_path / os.fsdecode(b"an\xff\n other.mp4"), frames=30)
    first = sandbox.only(clip)
    kept = first.pictures.copy()
    assert failure(sandbox, str(tmp_path / "none.mp4")) == ("missing", "no such file")
    assert sandbox.only(str(other)).facts.frame_count == 30
    np.testing.assert_array_equal(first.pictures, kept)  # a copy, not the memory that clips go through
    before_s = sandbox.cpu_s()
    sandbox.only(clip)
    assert 0 < before_s < sandbox.cpu_s()
    assert len(sandbox.pids) == 1


def test_the_child_is_confined(clip: str, sandbox: Counting) -> None:
    sandbox.only(clip)
    limits = Path(f"/proc/{sandbox.pids[0]}/limits").read_text()
    soft_and_hard = {line[:25].strip(): line[25:].split()[:2] for line in limits.splitlines()}
    assert soft_and_hard["Max core file size"] == ["0", "0"]
    assert soft_and_hard["Max address space"] == [str(1024 << 20)] * 2


# --- what can happen to a child ---------------------------------------------------------------------


def test_a_child_killed_between_files_costs_nothing(clip: str, sandbox: Counting) -> None:
    sandbox.only(clip)
    os.kill(sandbox.pids[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(sandbox.pids[0]))
    assert sandbox.only(clip).frame_ok == [True] * 4
    assert len(sandbox.pids) == 2


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGSEGV, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_file_is_not_blamed_for_one_lost_child(number: signal.Signals, clip: str) -> None:
    def harm(pid: int, start: int) -> None:
        if start == 1:
            os.kill(pid, number)

    with Counting(Limits(timeout_s=10, max_memory_mb=1024), harm=harm) as sandbox:
        assert sandbox.only(clip).frame_ok == [True] * 4
        assert len(sandbox.pids) == 2 and not is_alive(sandbox.pids[0])


def test_a_file_is_blamed_for_two_lost_children(clip: str) -> None:
    def harm(pid: int, start: int) -> None:
        if start <= 2:
            os.kill(pid, signal.SIGSEGV)

    with Counting(harm=harm) as sandbox:
        assert failure(sandbox, clip) == ("crash", "the decoder died of SIGSEGV")
        assert sandbox.only(clip).frame_ok == [True] * 4  # the next file has a child of its own
        assert len(sandbox.pids) == 3


WINDOWS = replace(REQUEST, window_s=0.5, min_frames=1)


class Windowed(Counting):
    """Cuts files into windows of half a second; the first `losses` children die at the third one."""

    def __init__(self, losses: int) -> None:
        Sandbox.__init__(self, WINDOWS, LIMITS)
        self.pids, self._harm, self._losses, self._heard = [], None, losses, 0

    def _hear(self) -> dict[str, object]:
        self._heard += 1
        if self._heard > 2 and len(self.pids) <= self._losses:
            os.kill(self.pids[-1], signal.SIGKILL)
        return super()._hear()


@pytest.mark.parametrize("losses", [0, 1])
def test_a_lost_child_costs_no_clip(losses: int, clip: str) -> None:
    here = list(decode_clips(clip, WINDOWS))
    with Windowed(losses) as sandbox:
        there = list(sandbox.decode(clip))
        assert len(sandbox.pids) == losses + 1
    assert len(there) == len(here) == 4
    for expected, found in zip(here, there, strict=True):
        assert found.span == expected.span
        np.testing.assert_array_equal(found.pictures, expected.pictures)


def test_what_follows_a_clip_that_kills_every_child_is_one_failed_clip(clip: str) -> None:
    with Windowed(losses=9) as sandbox:
        first, second, rest = sandbox.decode(clip)
        assert len(sandbox.pids) == 2
    assert isinstance(first, DecodedClip) and isinstance(second, DecodedClip)
    assert rest == FailedClip(ClipSpan(2, True, 1.0, 2.0), "crash", "the decoder died of SIGKILL")


def test_nobody_wants_the_rest(clip: str) -> None:
    with Windowed(losses=0) as sandbox:
        clips = sandbox.decode(clip)
        next(clips)
        clips.close()
        assert not is_alive(sandbox.pids[0])
        assert len(list(sandbox.decode(clip))) == 4


def test_time_limit(clip: str) -> None:
    with Counting(
        Limits(timeout_s=0.4, max_memory_mb=1024), harm=lambda pid, _: os.kill(pid, signal.SIGSTOP)
    ) as s:
        assert failure(s, clip) == ("timeout", "no answer within --timeout-s 0.4")
        assert len(s.pids) == 2 and not any(is_alive(pid) for pid in s.pids)


def test_memory_limit(clip: str, tmp_path: Path) -> None:
    """The pictures of the large file take 54 MB each, and the codec holds several."""
    large = write_video(tmp_path / "a.mp4", size=(6000, 6000), frames=3, codec="mpeg4", draw=draw_black)
    with Counting(Limits(timeout_s=30, max_memory_mb=350)) as sandbox:
        assert failure(sandbox, str(large))[0] == "out_of_memory"
        assert sandbox.only(clip).frame_ok == [True] * 4
        assert len(sandbox.pids) == 2  # what the first child had allocated is gone with it
    with Counting() as sandbox:
        assert sandbox.only(str(large)).facts.width == 6000


def test_last_words_are_kept(clip: str) -> None:
    """With so little memory the child does not come as far as decoding."""
    with Counting(Limits(timeout_s=30, max_memory_mb=64)) as sandbox:
        reason, message = failure(sandbox, clip)
    assert reason in ("crash", "out_of_memory")
    assert message.startswith("the decoder ended with status ") and len(message.split(": ", 1)[1]) > 10


def test_closing_leaves_nothing_behind(clip: str) -> None:
    before = own_descriptors()
    with Counting() as sandbox:
        sandbox.only(clip)
        assert is_alive(sandbox.pids[0]) and len(own_descriptors() - before) > 3
    assert not is_alive(sandbox.pids[0])
    assert own_descriptors() <= before


@pytest.mark.parametrize("size", ["20k", "200k"])
def test_a_full_disk_of_shared_memory_blames_no_file(
    size: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too small for the pictures of a clip, 98 kB; or full after they have their place."""
    with small_disk(tmp_path / "memory", size) as memory:
        monkeypatch.setattr(sandboxes, "MEMORY", str(memory))
        with Counting() as sandbox:
            with contextlib.suppress(OSError), open(memory / "ballast", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1000))
            sandbox.only(clip)
            assert len(sandbox.pids) == 1


def test_no_room_for_pictures_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "memory", "20k") as memory:
        monkeypatch.setattr(sandboxes, "MEMORY", str(memory))
        monkeypatch.setattr(tempfile, "tempdir", str(memory))
        before = own_descriptors()
        with pytest.raises(OSError, match="98304 bytes for the pictures of a clip: No space left on device"):
            Counting()
        assert own_descriptors() == before


def test_a_child_does_not_outlive_its_parent(clip: str) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sandbox import Counting
sandbox = Counting()
sandbox.only({clip!r})
print(sandbox.pids[0], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGSTOP)  # so it cannot notice by itself that its input has ended
    assert is_alive(child)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_alive(child))


def test_a_thread_that_ends_takes_the_child_but_not_the_sandbox(clip: str, sandbox: Counting) -> None:
    thread = threading.Thread(target=sandbox.only, args=(clip,))
    thread.start()
    thread.join()
    wait_until(lambda: not is_alive(sandbox.pids[0]))
    assert sandbox.only(clip).frame_ok == [True] * 4
    assert len(sandbox.pids) == 2


def test_ctrl_c_is_not_the_childs_to_handle(clip: str, sandbox: Counting) -> None:
    sandbox.only(clip)
    os.kill(sandbox.pids[0], signal.SIGINT)
    sandbox.only(clip)
    assert len(sandbox.pids) == 1
