"""Thousands of mutated videos through the decoding child: what comes of them, and what may never happen.

python benchmarks/fuzz.py --cases 4000 --seed 0 --jobs 2
python benchmarks/fuzz.py --truth --cases 600
python benchmarks/fuzz.py --only 296

The first mutates generated videos, and those of ../shared/wild and ../shared/fights where they are there;
every case is a seed (tests/mutations.py). The second damages fights and compares each frame that is called
real (`frame_ok`) with the same frame of the whole file. The third writes the file of one seed into the
working folder and decodes it. Exits with 1 where something happened that may never happen.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

import raypipe
from raypipe.console import LiveLine, duration, text_table
from raypipe.containers import DecodeError
from raypipe.decode import DecodedClip
from raypipe.sandbox import Limits

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fuzzing import REQUEST, Outcome, WatchedSandbox, read_sources, remux, run_case, write_sources  # noqa: E402
from mutations import Bait, Damage, Source, damage, mutate, parts  # noqa: E402
from test_containers import Listener, Watch  # noqa: E402

SANDBOXES = {
    "whole": REQUEST,
    "in windows": replace(REQUEST, window_s=0.5, stride_s=0.4),
    "under strace": REQUEST,
}
WINDOWED_EVERY, TRACED_EVERY, CHECKED_EVERY = 4, 10, 10
"""Each so manieth file is cut into windows, decoded under strace, and followed by a good one.

So is each that cost a child: the good one has to give its own pictures.
"""
LIMITS = Limits(timeout_s=10, max_memory_mb=1024)
FIGHTS = 6
CHUNK = 10
SLOWEST_SHOWN = 5
SEEDS_FILE = Path("results/fuzz-seeds.csv")


@dataclass(frozen=True)
class Case:
    """One mutated file and what came of it."""

    seed: int
    sandbox: str
    description: str
    outcome: Outcome


# --- the files --------------------------------------------------------------------------------------


def shared(name: str, pattern: str) -> list[Path]:
    """Real videos beside this repository, where they are there."""
    return sorted(path for path in (ROOT.parent / "shared" / name).rglob(pattern) if path.suffix != ".csv")


def all_sources(folder: Path) -> list[Source]:
    """What is mutated; the same list in the same order wherever the same files are there."""
    fights = sorted(shared("fights", "*.mp4"), key=lambda path: (path.stat().st_size, path.name))[:FIGHTS]
    return read_sources([*write_sources(folder), *shared("wild", "*.*"), *fights])


# --- a worker's side --------------------------------------------------------------------------------


class Fuzzer:
    """Holds a worker's folder, bait and sandboxes."""

    def __init__(self, folder: Path, sources: list[Source]) -> None:
        self._folder, self._sources = folder, sources
        self._good, bait, self._traces = folder / "good.mp4", folder / "bait.mp4", folder / "traces"
        for path in (self._good, bait):
            path.write_bytes(sources[0].content)
        self._traces.mkdir()
        self._watch, self._listener = Watch(bait), Listener()
        self._bait = Bait(str(bait), bait.name, self._listener.address)
        self._sandboxes = {
            name: WatchedSandbox(request, LIMITS, on_start=self._trace if name == "under strace" else None)
            for name, request in SANDBOXES.items()
        }
        self._expected = {name: self._good_pictures(name) for name in SANDBOXES}
        assert all(self._expected.values())

    def run(self, seed: int) -> Case:
        """Mutates, decodes and looks whether anybody else was harmed."""
        mutation = mutate(seed, self._sources, self._bait)
        path = self._folder / mutation.name
        path.write_bytes(mutation.content)
        name = "whole" if seed % WINDOWED_EVERY else "in windows"
        if seed % TRACED_EVERY == 1 and shutil.which("strace"):
            name = "under strace"
        outcome = run_case(self._sandboxes[name], str(path), request=SANDBOXES[name], limits=LIMITS)
        path.unlink()
        defects = list(outcome.defects)
        followed = bool(outcome.lost) or seed % CHECKED_EVERY == 0
        if followed and self._good_pictures(name) != self._expected[name]:
            defects.append("the next file's pictures are not its own")
        if self._watch.opened() or self._listener.called():
            defects.append("the bait was taken")
        return Case(seed, name, mutation.description, replace(outcome, defects=tuple(defects)))

    def _good_pictures(self, name: str) -> list[bytes]:
        clips = self._sandboxes[name].decode(str(self._good))
        return [clip.pictures.tobytes() for clip in clips if isinstance(clip, DecodedClip)]

    def _trace(self, pid: int) -> None:
        """Has strace write down which files and addresses a child opens."""
        calls = "trace=%network,open,openat,openat2,creat"
        command = ["strace", "-f", "-p", str(pid), "-o", str(self._traces / f"{pid}"), "-e", calls]
        try:
            subprocess.Popen(command, stderr=subprocess.DEVNULL)
        except FileNotFoundError:  # there is no strace
            return
        deadline_s = time.monotonic() + 5
        status = Path(f"/proc/{pid}/status")
        while re.search(r"TracerPid:\s+0\n", status.read_text()) and time.monotonic() < deadline_s:
            time.sleep(0.005)


@functools.cache
def fuzzer(folder: Path) -> Fuzzer:
    """This worker's, made when it is first needed."""
    mine = folder / f"worker-{os.getpid()}"
    mine.mkdir()
    os.chdir(mine)
    sources = [Source(path.name[4:], path.read_bytes()) for path in sorted((folder / "sources").iterdir())]
    return Fuzzer(mine, sources)


def fuzz_one(task: tuple[Path, int]) -> Case:
    folder, seed = task
    return fuzzer(folder).run(seed)


# --- what a child opened ----------------------------------------------------------------------------

CALL = re.compile(r"^\d+\s+(\w+)\((.*)")
OPENED = re.compile(r'^(?:AT_FDCWD|\d+), "((?:[^"\\]|\\.)*)"|^"((?:[^"\\]|\\.)*)"')
OPENING = ("open", "openat", "openat2", "creat")
ITS_OWN = re.compile(r"/worker-\d+/(\d{7}\.?[^/]*|good\.mp4)$")
ALLOWED = (
    *(sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), str(Path(raypipe.__file__).parent)),
    *(
        "/usr/lib",
        "/lib",
        "/etc/ld.so",
        "/dev/shm",
        "/proc/self",
        "/proc/sys/vm",
        "/dev/urandom",
        "/sys/devices/system/cpu",
    ),
)
"""What Python and the libraries may open besides the file itself."""


@dataclass(frozen=True)
class Trace:
    """What strace saw of the children, from the first video that each opened on."""

    own: int = 0
    """How many times a video was opened."""
    foreign: Counter[str] = field(default_factory=Counter)
    """Network calls and files outside the allow list."""


def read_trace(text: str) -> Trace:
    own, foreign = 0, Counter[str]()
    for line in text.splitlines():
        call = CALL.match(line)
        if not call:
            continue
        name, rest = call.groups()
        opened = OPENED.match(rest) if name in OPENING else None
        path = (opened[1] or opened[2] or "") if opened else f"{name}({rest[:80]}"
        if ITS_OWN.search(path):
            own += 1
        elif own and not path.startswith(ALLOWED):
            foreign[path] += 1
    return Trace(own, foreign)


# --- many cases -------------------------------------------------------------------------------------


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="raypipe-fuzz-") as name:
        yield Path(name)


def spread(work: Callable[[Any], Any], tasks: Sequence[Any], *, jobs: int) -> Iterator[Any]:
    """`work` on every task, in processes of their own; a line tells how far it is."""
    line, started_s = LiveLine(), time.monotonic()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, result in enumerate(pool.imap_unordered(work, tasks, chunksize=CHUNK), start=1):
            line.show(f"{done:,} of {len(tasks):,} files, {duration(time.monotonic() - started_s)}")
            yield result
    line.close()


def fuzz(*, cases: int, seed: int, jobs: int) -> bool:
    """Runs the cases and prints what came of them. Whether nothing forbidden happened."""
    with temporary_folder() as folder:
        sources = all_sources(folder / "generated")
        (folder / "sources").mkdir()
        for number, source in enumerate(sources):
            (folder / "sources" / f"{number:03}-{source.name}").write_bytes(source.content)
        started_s = time.monotonic()
        tasks = [(folder, number) for number in range(seed, seed + cases)]
        done: list[Case] = list(spread(fuzz_one, tasks, jobs=jobs))
        wall_s = time.monotonic() - started_s
        traces = [read_trace(path.read_text(errors="replace")) for path in folder.glob("worker-*/traces/*")]
        trace = Trace(sum(t.own for t in traces), sum((t.foreign for t in traces), Counter()))
    print(f"{cases:,} files, seeds {seed} to {seed + cases - 1}, of {len(sources)} videos\n")
    print(outcome_table(done))
    print()
    print(summary_table(done, trace, wall_s))
    print(f"\nthe {SLOWEST_SHOWN} slowest")
    print(slowest_table(done))
    return report_bad(done, trace.foreign)


def outcome_table(cases: list[Case]) -> str:
    counts = Counter(case.outcome.reason for case in cases)
    rows = [[reason, f"{count:,}", f"{count / len(cases):.1%}"] for reason, count in counts.most_common()]
    return text_table([["outcome", "files", "share"], *rows])


def summary_table(cases: list[Case], trace: Trace, wall_s: float) -> str:
    outcomes = [case.outcome for case in cases]
    ends = Counter(lost.partition(":")[0] for outcome in outcomes for lost in outcome.lost)
    by_sandbox = Counter(case.sandbox for case in cases)
    rows = [
        ["clips", f"{sum(outcome.clips for outcome in outcomes):,}"],
        ["cut into windows", f"{by_sandbox['in windows']:,} files"],
        ["children that died", str(ends["crash"])],
        ["children killed for their time", str(ends["timeout"])],
        ["children lost to memory", str(ends["out_of_memory"])],
        [
            "out_of_memory told by the child",
            str(sum(o.reason == "out_of_memory" and not o.lost for o in outcomes)),
        ],
        ["most memory of a child", f"{max(outcome.peak_mb for outcome in outcomes):.0f} MB"],
        ["files a second", f"{len(cases) / wall_s:.1f}"],
    ]
    if trace.own:
        seen = f"{by_sandbox['under strace']:,} files, opened {trace.own:,} times"
        rows.append(["under strace", seen])
        rows.append(["network calls, foreign files opened", str(trace.foreign.total())])
    else:
        rows.append(["network calls, foreign files opened", "not measured: strace saw nothing"])
    rows.append(["what may never happen", str(sum(len(outcome.defects) for outcome in outcomes))])
    return text_table(rows)


def slowest_table(cases: list[Case]) -> str:
    slowest = sorted(cases, key=lambda case: -case.outcome.slowest_clip_s)[:SLOWEST_SHOWN]
    rows = [
        [
            str(case.seed),
            f"{case.outcome.slowest_clip_s:.1f}",
            f"{case.outcome.cpu_s:.1f}",
            case.outcome.reason,
            case.description[:80],
        ]
        for case in slowest
    ]
    return text_table([["seed", "s a clip", "CPU s", "outcome", "mutation"], *rows])


def report_bad(cases: list[Case], calls: Counter[str]) -> bool:
    """Names what may never happen and writes the seeds of it, and of every lost child, into a file."""
    for call, count in calls.most_common():
        print(f"opened {count} times: {call}")
    bad = sorted((c for c in cases if c.outcome.lost or c.outcome.defects), key=lambda case: case.seed)
    for case in bad:
        for defect in case.outcome.defects:
            print(f"seed {case.seed}, {case.sandbox}: {defect}")
    if bad:
        SEEDS_FILE.parent.mkdir(exist_ok=True)
        with SEEDS_FILE.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["seed", "decoded", "outcome", "children lost", "defects", "mutation"])
            for case in bad:
                lost, defects = "; ".join(case.outcome.lost), "; ".join(case.outcome.defects)
                writer.writerow(
                    [case.seed, case.sandbox, case.outcome.reason, lost, defects, case.description]
                )
        print(f"\n{len(bad)} seeds of lost children and defects: {SEEDS_FILE}")
    return not calls and not any(case.outcome.defects for case in cases)


def repeat(seed: int) -> bool:
    """Writes the file of one seed into the working folder and decodes it."""
    with temporary_folder() as folder:
        mutation = mutate(seed, all_sources(folder))
    path = Path(f"fuzz-{mutation.name}")
    path.write_bytes(mutation.content)
    print(f"{path}: {mutation.description}")
    name = "whole" if seed % WINDOWED_EVERY else "in windows"
    with WatchedSandbox(SANDBOXES[name], LIMITS) as sandbox:
        outcome = run_case(sandbox, str(path), request=SANDBOXES[name], limits=LIMITS)
    print(f"decoded {name}: {outcome}")
    return not outcome.defects


# --- does frame_ok tell the truth -------------------------------------------------------------------

KINDS: tuple[Damage, ...] = get_args(Damage)
CONTAINERS: dict[str, dict[str, str]] = {"mp4": {"movflags": "+faststart"}, "ts": {}, "mkv": {}}
TRUTH_REQUEST = replace(REQUEST, frames=16, min_frames=1, max_pixels=1 << 26)
EVERY_FRAME = replace(TRUTH_REQUEST, frames=160)
"""More than a fight has: all of its frames, some twice."""
FIGHTS_EVERY = 10
TAIL_BYTES = 2000
SAME, FAR = 0.5, 3.0
"""Mean differences of a pixel, of 255: below the first two frames are one, above the second far apart."""
VERDICTS = ("right", "other time", "wrong", "far wrong", "repeated")
Reference = dict[float, NDArray[np.uint8]]


@functools.cache
def reference(path: Path) -> Reference:
    """Every frame of a whole file by its time."""
    with WatchedSandbox(EVERY_FRAME, replace(LIMITS, timeout_s=60)) as sandbox:
        (clip,) = sandbox.decode(str(path))
    assert isinstance(clip, DecodedClip) and all(clip.frame_ok)
    return dict(zip(np.round(clip.frame_pts_s, 3).tolist(), clip.pictures, strict=True))


def judge(task: tuple[Path, Damage, int]) -> tuple[str, Damage, Counter[str]]:
    """Damages a file and counts how many frames are as `frame_ok` says."""
    path, kind, seed = task
    counts = Counter[str]()
    content = path.read_bytes()
    head = next((part.body for part in parts(content) if part.name in ("mdat", "1F43B675")), 0)
    damaged = path.parent / f"{os.getpid()}{path.suffix}"
    damaged.write_bytes(damage(seed, content, kind, head=max(head, 5000), tail=TAIL_BYTES))
    with WatchedSandbox(TRUTH_REQUEST, replace(LIMITS, timeout_s=60)) as sandbox:
        try:
            (clip,) = sandbox.decode(str(damaged))
        except DecodeError as error:
            counts["failed"] += 1
            counts[error.reason] += 1
            return path.suffix[1:], kind, counts
    assert isinstance(clip, DecodedClip)
    counts["whole" if all(clip.frame_ok) else "partial"] += 1
    for time_s, is_ok, picture in zip(
        np.round(clip.frame_pts_s, 3).tolist(), clip.frame_ok, clip.pictures, strict=True
    ):
        counts[verdict(picture, time_s, reference(path)) if is_ok else "repeated"] += 1
    return path.suffix[1:], kind, counts


def verdict(picture: NDArray[np.uint8], time_s: float, frames: Reference) -> str:
    """What a frame is that was called real."""
    distances = {time: float(np.abs(picture.astype(int) - frame).mean()) for time, frame in frames.items()}
    if distances.get(time_s, np.inf) <= SAME:
        return "right"
    if min(distances.values()) <= SAME:
        return "other time"
    return "far wrong" if min(distances.values()) > FAR else "wrong"


def truth(*, cases: int, seed: int, jobs: int) -> bool:
    """Damages fights and prints how far `frame_ok` can be relied on."""
    fights = shared("fights", "*.mp4")[::FIGHTS_EVERY]
    if not fights:
        raise SystemExit("--truth needs the real videos in ../shared/fights")
    with temporary_folder() as folder:
        files = {
            suffix: [remux(path, folder / f"{path.stem}.{suffix}", **options) for path in fights]
            for suffix, options in CONTAINERS.items()
        }
        rounds = -(-cases // (len(KINDS) * len(CONTAINERS)))
        tasks = [
            (files[suffix][number % len(fights)], kind, seed + number)
            for number, kind, suffix in itertools.product(range(rounds), KINDS, CONTAINERS)
        ]
        counts: dict[tuple[str, str], Counter[str]] = {}
        # File by file, so that a worker need not decode every whole one.
        for suffix, kind, found in spread(judge, sorted(tasks, key=lambda task: task[0]), jobs=jobs):
            counts.setdefault((suffix, kind), Counter()).update(found)
    print(f"{len(tasks):,} damaged files of {len(fights)} fights, 16 frames each\n")
    print(truth_table(counts))
    return True


def truth_table(counts: dict[tuple[str, str], Counter[str]]) -> str:
    files = ("whole", "partial", "failed")
    rows = [["container", "damage", *(f"files {name}" for name in files), *VERDICTS, "wrong of ok"]]
    total = sum(counts.values(), Counter[str]())
    for (suffix, kind), found in [*sorted(counts.items()), (("all", ""), total)]:
        ok = sum(found[name] for name in VERDICTS[:4])
        wrong = (found["wrong"] + found["far wrong"]) / max(1, ok)
        numbers = [f"{found[name]:,}" for name in (*files, *VERDICTS)]
        rows.append([suffix, kind, *numbers, f"{wrong:.2%}"])
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=4000, help="how many files")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--truth", action="store_true", help="does frame_ok tell the truth")
    parser.add_argument("--only", type=int, metavar="SEED", help="write the file of one seed out")
    arguments = parser.parse_args()
    if arguments.only is not None:
        sys.exit(not repeat(arguments.only))
    work = truth if arguments.truth else fuzz
    sys.exit(not work(cases=arguments.cases, seed=arguments.seed, jobs=arguments.jobs))


if __name__ == "__main__":
    main()
