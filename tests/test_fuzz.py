"""Hundreds of mutated and hostile files: each gives clips or a reason in time, and harms nobody else.

`python benchmarks/fuzz.py` does the same to thousands. A seed that fails here is written out by its --only.
"""

import csv
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
from clips import write_video
from fuzzing import (
    LIMITS,
    REQUEST,
    WatchedSandbox,
    is_alive,
    message_defects,
    open_files,
    own_descriptors,
    read_sources,
    run_case,
    write_sources,
)
from mutations import MUTATORS, Bait, Source, mutate, parts
from test_containers import Listener, Watch

from raypipe.decode import ClipRequest, DecodedClip
from raypipe.sandbox import Limits

WINDOWED = replace(REQUEST, window_s=0.5, stride_s=0.4)
SMALL_PIXELS = 10_000_000
"""Of all frames together: the files that are decoded in a moment."""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return read_sources(write_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that nothing is wrong with."""
    return str(write_video(tmp_path_factory.mktemp("good") / "good.mp4", frames=8, size=(64, 64)))


@contextmanager
def safe_place(
    good: str,
    *,
    request: ClipRequest = REQUEST,
    limits: Limits = LIMITS,
    on_start: Callable[[int], None] | None = None,
) -> Iterator[WatchedSandbox]:
    """A sandbox that has to give back all that it took, whatever it is fed."""
    before = own_descriptors()
    with WatchedSandbox(request, limits, on_start=on_start) as sandbox:
        yield sandbox
    assert not any(is_alive(pid) for pid in sandbox.pids), "a child is left"
    assert own_descriptors() <= before, "a descriptor is left"


def pictures(sandbox: WatchedSandbox, path: str) -> list[bytes]:
    return [clip.pictures.tobytes() for clip in sandbox.decode(path) if isinstance(clip, DecodedClip)]


def check_mutations(
    seeds: Sequence[int], sources: list[Source], good: str, folder: Path, request: ClipRequest
) -> None:
    """Feeds the mutations to one sandbox, the good file between them."""
    bait_path = folder / "bait.mp4"
    bait_path.write_bytes(Path(good).read_bytes())
    found: dict[str, list[str]] = {}
    with Watch(bait_path) as watch, Listener() as listener, safe_place(good, request=request) as sandbox:
        bait = Bait(str(bait_path), bait_path.name, listener.address)
        expected = pictures(sandbox, good)
        assert expected
        for seed in seeds:
            mutation = mutate(seed, sources, bait)
            path = folder / mutation.name
            path.write_bytes(mutation.content)
            defects = list(run_case(sandbox, str(path), request=request).defects)
            if pictures(sandbox, good) != expected:
                defects.append("the next file's pictures are not its own")
            if watch.opened() or listener.called():
                defects.append("the bait was taken")
            if defects:
                found[f"seed {seed}: {mutation.description}"] = defects
            path.unlink()
    assert not found


def share(seeds: range, size: int = 40) -> list[range]:
    return [seeds[at : at + size] for at in range(0, len(seeds), size)]


@pytest.fixture
def quiet_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Path]:
    """The working folder of a test during which nobody may print anything or leave anything behind."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.rglob("core*"))


@pytest.mark.parametrize("seeds", share(range(160)), ids=str)
def test_mutated_files(seeds: range, generated: list[Source], good: str, quiet_folder: Path) -> None:
    check_mutations(seeds, generated, good, quiet_folder, REQUEST)


@pytest.mark.parametrize("seeds", share(range(1000, 1060)), ids=str)
def test_mutated_files_in_windows(
    seeds: range, generated: list[Source], good: str, quiet_folder: Path
) -> None:
    check_mutations(seeds, generated, good, quiet_folder, WINDOWED)


@pytest.mark.parametrize("request_", [REQUEST, WINDOWED], ids=["whole", "in windows"])
def test_mutated_files_from_the_wild(
    request_: ClipRequest, wild: Path, good: str, quiet_folder: Path
) -> None:
    with (wild / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    small = [
        wild / row["name"]
        for row in rows
        if int(row["frames"]) * int(row["width"]) * int(row["height"]) <= SMALL_PIXELS
    ]
    assert len(small) > 20
    seeds = range(40) if request_ == REQUEST else range(1000, 1020)
    check_mutations(seeds, read_sources(small), good, quiet_folder, request_)


def test_mutated_fights(fights: Path, good: str, quiet_folder: Path) -> None:
    some = sorted(fights.rglob("*.mp4"), key=lambda path: path.stat().st_size)[:6]
    check_mutations(range(20), read_sources(some), good, quiet_folder, REQUEST)


# --- hostile by what they are -----------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # in the working folder, since such a name has to be short


def make_sparse(path: Path, *, head: bytes = b"") -> None:
    path.write_bytes(head)
    os.truncate(path, 5 << 30)


def make_sparse_video(path: Path) -> None:
    """A whole MP4, then five gigabytes that take no space."""
    write_video(path, frames=8, size=(64, 64), index_first=True)
    os.truncate(path, 5 << 30)


def make_many_packets(path: Path) -> None:
    """200,000 frames of some bytes each: one small VP8 frame, again and again."""
    write_video(path, codec="libvpx", frames=1, size=(32, 32), options={"deadline": "realtime"})
    ivf = path.read_bytes()
    frame = ivf[44:]
    heads = (len(frame).to_bytes(4, "little") + number.to_bytes(8, "little") for number in range(200_000))
    path.write_bytes(ivf[:32] + b"".join(head + frame for head in heads))


@pytest.mark.parametrize(
    ("make", "suffix", "reasons"),
    [
        (os.mkfifo, ".mp4", {"unreadable"}),
        (lambda path: path.symlink_to("/dev/zero"), ".mp4", {"unreadable"}),
        (lambda path: path.symlink_to("/dev/tty"), ".mp4", {"unreadable"}),
        (lambda path: path.mkdir(), ".mp4", {"unreadable"}),
        (make_socket, ".mp4", {"unreadable"}),
        (lambda path: path.symlink_to(path), ".mp4", {"unreadable"}),
        (lambda path: path.symlink_to("/proc/self/mem"), ".mp4", {"not_video", "unreadable"}),
        (make_sparse, ".mp4", {"not_video", "timeout"}),
        (make_sparse, ".h264", {"not_video", "no_frames", "damaged", "timeout", "out_of_memory"}),
        (lambda path: make_sparse(path, head=b"G" + bytes(187) + b"G"), ".ts", {"not_video", "timeout"}),
        (make_sparse_video, ".mp4", {"ok"}),
        (make_many_packets, ".ivf", {"too_large", "timeout"}),
    ],
    ids=[
        *("FIFO", "device", "terminal", "folder", "socket", "loop", "own memory", "sparse", "sparse raw"),
        *("sparse TS", "sparse video", "200,000 packets"),
    ],
)
def test_hostile_files(
    make: Callable[[Path], object], suffix: str, reasons: set[str], good: str, quiet_folder: Path
) -> None:
    path = quiet_folder / f"hostile{suffix}"
    make(path)
    limits = Limits(timeout_s=5, max_memory_mb=1024)
    with safe_place(good, limits=limits) as sandbox:
        expected = pictures(sandbox, good)
        outcome = run_case(sandbox, str(path), limits=limits)
        assert not outcome.defects
        assert outcome.reason in reasons
        assert pictures(sandbox, good) == expected


def test_sound_that_begins_late(good: str, quiet_folder: Path) -> None:
    """A recorded stream may show its second track long after the container was opened."""
    path = write_video(quiet_folder / "late.flv", fps=1, frames=120, size=(64, 64), options={"bf": "0"})
    with path.open("ab") as file:
        for sound in (b"\xaf\0\x12\x10", b"\xaf\1\x21\x10\x04\x60\x8c\x1c"):  # AAC: its settings, a packet
            tag = b"\x08" + len(sound).to_bytes(3, "big") + (119_000).to_bytes(3, "big") + bytes(4) + sound
            file.write(tag + len(tag).to_bytes(4, "big"))
    with safe_place(good) as sandbox:
        outcome = run_case(sandbox, str(path))
    assert (outcome.reason, outcome.message) == ("ok", "")


def test_the_decoder_has_no_threads_of_its_own(wild: Path, good: str, quiet_folder: Path) -> None:
    """dav1d's would wait for Python's lock, whose holder waits for them: damaged AV1 would hang at times."""
    with safe_place(good, request=WINDOWED) as sandbox:
        threads = [
            len(os.listdir(f"/proc/{sandbox.pids[-1]}/task"))
            for _ in sandbox.decode(str(wild / "mp4ff__av1.ivf"))
        ]
    assert len(threads) > 1 and set(threads) == {1}


# --- hostile by what happens meanwhile --------------------------------------------------------------


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It takes a while to decode, so that something can happen meanwhile."""
    folder = tmp_path_factory.mktemp("long")
    return write_video(folder / "long.mkv", codec="mpeg4", frames=200, size=(480, 360), options={"g": "200"})


class Meanwhile:
    """Does something to each child once it has a file open."""

    def __init__(self, path: Path, harm: Callable[[int], None]) -> None:
        self._path, self._harm = str(path), harm
        self.harmed: list[int] = []
        self._threads: list[threading.Thread] = []

    def watch(self, pid: int) -> None:
        self._threads.append(threading.Thread(target=self._wait, args=(pid,)))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _wait(self, pid: int) -> None:
        while is_alive(pid):
            if self._path in open_files(pid):
                self._harm(pid)
                self.harmed.append(pid)
                return
            time.sleep(0.002)


@pytest.mark.parametrize(
    ("number", "timeout_s", "reason", "message"),
    [
        (signal.SIGSEGV, 60, "crash", "the decoder died of SIGSEGV"),
        (signal.SIGABRT, 60, "crash", "the decoder died of SIGABRT"),
        # A busy machine needs some seconds to start a child.
        pytest.param(
            *(signal.SIGSTOP, 8, "timeout", "no answer within --timeout-s 8"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_file_that_kills_its_decoder_each_time(
    number: signal.Signals,
    timeout_s: float,
    reason: str,
    message: str,
    long_video: Path,
    good: str,
    quiet_folder: Path,
) -> None:
    """No real file is known that does; the signal comes while the file is being decoded."""
    meanwhile = Meanwhile(long_video, lambda pid: os.kill(pid, number))
    limits = Limits(timeout_s=timeout_s, max_memory_mb=1024)
    with safe_place(good, limits=limits, on_start=meanwhile.watch) as sandbox:
        outcome = run_case(sandbox, str(long_video), limits=limits)
        assert (outcome.reason, outcome.message) == (reason, message)
        assert not outcome.defects and len(outcome.lost) == 2 == len(meanwhile.harmed)
        assert pictures(sandbox, good)
    meanwhile.join()


@pytest.mark.parametrize("request_", [REQUEST, WINDOWED], ids=["whole", "in windows"])
def test_a_file_that_changes_while_it_is_read(
    request_: ClipRequest, long_video: Path, good: str, quiet_folder: Path
) -> None:
    path, whole = quiet_folder / "changing.mkv", long_video.read_bytes()
    path.write_bytes(whole)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            os.truncate(path, len(whole) // 3)
            time.sleep(0.01)
            other = path.with_suffix(".new")
            other.write_bytes(whole[len(whole) // 2 :])
            os.replace(other, path)
            time.sleep(0.01)
            path.write_bytes(whole)
            time.sleep(0.05)

    thread = threading.Thread(target=change)
    with safe_place(good, request=request_) as sandbox:
        expected = pictures(sandbox, good)
        thread.start()
        try:
            outcomes = [run_case(sandbox, str(path), request=request_) for _ in range(4)]
        finally:
            stop.set()
            thread.join()
        assert not [defect for outcome in outcomes for defect in outcome.defects]
        assert pictures(sandbox, good) == expected


def test_a_file_that_vanishes_while_it_is_read(long_video: Path, good: str, quiet_folder: Path) -> None:
    """Who has it open reads on."""
    path = quiet_folder / "vanishing.mkv"
    path.write_bytes(long_video.read_bytes())
    meanwhile = Meanwhile(path, lambda pid: path.unlink())
    with safe_place(good, on_start=meanwhile.watch) as sandbox:
        assert run_case(sandbox, str(path)).reason == "ok"
        assert run_case(sandbox, str(path)).reason == "missing"
    meanwhile.join()


# --- the fuzzer itself ------------------------------------------------------------------------------


def test_a_seed_means_one_mutation(generated: list[Source], tmp_path: Path) -> None:
    assert read_sources(write_sources(tmp_path)) == generated
    mutations = [mutate(seed, generated) for seed in range(300)]
    assert mutations == [mutate(seed, generated) for seed in range(300)]
    contents = {source.content for source in generated}
    assert sum(mutation.content not in contents for mutation in mutations) > 290


def test_the_parts_of_containers_are_found(generated: list[Source]) -> None:
    names = {source.name: {part.name for part in parts(source.content)} for source in generated}
    for name, expected in {
        "h264.mp4": {"moov", "stsz", "stts", "avc1", "mdat"},
        "h264.mkv": {"1654AE6B", "1F43B675", "A3"},
        "h264.avi": {"RIFF", "LIST", "avih", "00dc"},
        "h264.flv": {"tag 9", "tag 18"},
        "wmv2.wmv": {"3026b275", "9107dcb7"},
        "vp8.ogg": {"4f67675300"},
        "h264.ts": {"packet 0", "packet 1"},
        "raw.h264": {"00000167", "00000165"},
    }.items():
        assert expected <= names[name]
    for source in generated:
        for part in parts(source.content):
            assert 0 <= part.start <= part.body <= part.stop <= len(source.content)


def test_every_mutator_takes_any_content() -> None:
    sources = [
        Source("a.mp4", b""),
        Source("b.mkv", b"\x1aE\xdf\xa3\x80"),
        Source("c", bytes(9)),
        Source("d", b"G"),
    ]
    for (mutator, _), source, seed in product(MUTATORS, sources, range(20)):
        content, text = mutator(Random(seed), source.content, sources)
        assert isinstance(content, bytes) and text


def test_what_a_message_may_not_be() -> None:
    assert not message_defects("moov atom not found; h264: error while decoding MB 3 4")
    for message in ("", " ", "two\nlines", "x" * 600, "IndexError: list index out of range", "a\x00b"):
        assert len(message_defects(message)) == 1


def test_a_neighbours_pictures_would_be_noticed(good: str, generated: list[Source], tmp_path: Path) -> None:
    other = tmp_path / generated[0].name
    other.write_bytes(generated[0].content)
    with safe_place(good) as sandbox:
        assert pictures(sandbox, good) == pictures(sandbox, good) != pictures(sandbox, str(other))
