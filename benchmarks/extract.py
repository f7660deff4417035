"""Extraction beside other ways to do the same work, in one table of medians over paired runs.

python benchmarks/extract.py --videos ../shared/fights --cases clips long12 long250

Every way (`ways.py`) gives features of 16 frames of each video by the same network, in one process tree that
is measured from outside. The ways take turns in each round, so that a ratio is taken between runs that are
neighbours in time; the table has the medians over the rounds. Cases:

clips     the videos in the folder
many      hard links to them, `--times` as many
long12    minute-long files, four made from them once (H.264 720p) and hard links to these, with a keyframe
          every 12 frames
long250   the same with a keyframe every 250 frames

The peers are not needed by raypipe: `pip install --target peers torch torchcodec decord daft`, then
`--peers peers`. Those that do not load are left out, and it says so. torchcodec also needs FFmpeg's libraries
(`apt install ffmpeg`) and a version that was built for the torch beside it.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from typing import Any

from soak import Meter, family
from ways import PEERS, WAYS, Done, Job

from raypipe.console import text_table

LONG_S, LONG_FPS, LONG_SIZE, LONG_FILES, LONG_COPIES = 60, 30, (1280, 720), 4, 8
CPU_SAMPLE_S = 0.25
TICKS_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Case:
    """Videos to extract, each of about so many seconds."""

    videos: list[str]
    duration_s: float


@dataclass(frozen=True)
class Run:
    """One way on one case: what it says of itself, and what was measured from outside."""

    done: Done
    wall_s: float
    cpu_s: float
    peak_mb: float

    @property
    def videos_per_s(self) -> float:
        """Without the start."""
        return self.done.videos / self.done.work_s

    @property
    def work_cpu_s(self) -> float | None:
        """CPU seconds a video of decoding and embedding alone."""
        done = self.done
        stages = (done.decode_cpu_s or 0.0) + (done.embed_cpu_s or 0.0)
        return stages / done.videos if stages and done.videos else None

    def share(self, cpu_s: float | None, cores: int) -> float | None:
        """Of what the cores could have done in the run's whole time."""
        return None if cpu_s is None else cpu_s / (self.wall_s * cores)


# --- cases --------------------------------------------------------------------------------------------


def make_case(name: str, arguments: argparse.Namespace, folder: Path) -> Case:
    clips = sorted(str(path.resolve()) for path in arguments.videos.glob("*/*.mp4"))
    random.Random(0).shuffle(clips)
    clips = clips[: arguments.clips]
    if name == "clips":
        return Case(clips, 2.0)
    if name == "many":
        return Case(list(links(clips, folder / "many", arguments.times)), 2.0)
    keyframe_every = int(name.removeprefix("long"))
    files = [arguments.cache / f"long{keyframe_every}-{number}.mp4" for number in range(LONG_FILES)]
    for number, file in enumerate(files):
        if not file.exists():
            write_long(file, clips[number::LONG_FILES], keyframe_every)
    return Case(list(links([str(file.resolve()) for file in files], folder / name, LONG_COPIES)), LONG_S)


def links(clips: list[str], folder: Path, times: int) -> Iterator[str]:
    """`times` names for each clip."""
    folder.mkdir(parents=True)
    for turn in range(times):
        for number, clip in enumerate(clips):
            link = folder / f"{turn:03}-{number:05}.mp4"
            try:
                os.link(clip, link)
            except OSError:  # another file system
                link.symlink_to(clip)
            yield str(link.resolve().parent / link.name)


def write_long(file: Path, clips: list[str], keyframe_every: int) -> None:
    """A minute of the clips one after another."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished.mp4")
    with av.open(str(unfinished), "w") as output:
        options = {"g": str(keyframe_every), "keyint_min": str(min(keyframe_every, 25)), "sc_threshold": "0"}
        stream = output.add_stream("libx264", rate=LONG_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *LONG_SIZE, "yuv420p"
        number = 0
        for clip in cycle(clips):
            with av.open(clip) as source:
                for frame in source.decode(video=0):
                    if number == LONG_S * LONG_FPS:
                        break
                    scaled = frame.reformat(*LONG_SIZE, "yuv420p")
                    scaled.pts, scaled.time_base = number, Fraction(1, LONG_FPS)
                    output.mux(stream.encode(scaled))
                    number += 1
            if number == LONG_S * LONG_FPS:
                break
        output.mux(stream.encode(None))
    unfinished.rename(file)


# --- measuring ----------------------------------------------------------------------------------------


def measure(way: str, case: Case, arguments: argparse.Namespace, folder: Path) -> tuple[Run, float | None]:
    """The way on the case; for raypipe also the seconds that doing it again takes, with nothing to do."""
    job = Job(
        videos=case.videos,
        duration_s=case.duration_s,
        frames=16,
        size=224,
        view=arguments.view,
        cores=arguments.cores,
        folder=str(folder),
        peers=arguments.peers and str(arguments.peers.resolve()),
    )
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    command = [sys.executable, str(Path(__file__).with_name("ways.py")), way, str(folder / "job.json")]
    run = measured(command)
    again_s = measured(command).wall_s if way == "raypipe" else None
    return run, again_s


class WayFailed(Exception):
    """A way ended with an error: its last words."""


def measured(command: Sequence[str]) -> Run:
    """Raises WayFailed."""
    with tempfile.TemporaryFile("w+") as words:
        started_s = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True)
        memory, cpu = Meter(process.pid), CpuMeter(process.pid)
        said, _ = process.communicate()
        wall_s = time.monotonic() - started_s
        if process.returncode:
            words.seek(0)
            raise WayFailed(words.read()[-3000:])
    return Run(Done(**json.loads(said.splitlines()[-1])), wall_s, cpu.total_s(), memory.peak_mb())


class CpuMeter:
    """CPU seconds of a process and everything below it, as last seen before each ended."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while Path(f"/proc/{self._pid}/fd").exists():
            for pid in family(self._pid):
                with contextlib.suppress(OSError):  # it has just ended
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    self._seen[pid] = (int(fields[11]) + int(fields[12])) * TICKS_S
            time.sleep(CPU_SAMPLE_S)

    def total_s(self) -> float:
        """Once the process has ended."""
        self._thread.join()
        return sum(self._seen.values())


# --- the table ----------------------------------------------------------------------------------------

COLUMNS = [
    "case",
    "way",
    "videos",
    "videos/s",
    "CPU s/video",
    "start s",
    "peak MB",
    "decode",
    "embed",
    "rest",
    "idle",
    "raypipe is",
    "by CPU",
]


def table(runs: dict[str, dict[str, list[Run]]], cores: int) -> str:
    """A line per case and way, medians over the rounds."""
    lines = [COLUMNS]
    for case, ways in runs.items():
        for way, rounds in ways.items():
            if not rounds:
                continue
            done = [run.done for run in rounds]
            decode = [run.share(run.done.decode_cpu_s, cores) for run in rounds]
            embed = [run.share(run.done.embed_cpu_s, cores) for run in rounds]
            busy = [run.cpu_s / (run.wall_s * cores) for run in rounds]
            stages = [(d or 0) + (e or 0) for d, e in zip(decode, embed, strict=True)]
            rest = [b - s for b, s in zip(busy, stages, strict=True)] if decode[0] else [None]
            lines.append(
                [
                    case,
                    way,
                    str(done[0].videos),
                    f"{median([run.videos_per_s for run in rounds]):.2f}",
                    f"{median([run.cpu_s / run.done.videos for run in rounds]):.3f}",
                    f"{median([d.start_s for d in done]):.1f}",
                    f"{median([run.peak_mb for run in rounds]):,.0f}",
                    percent(decode),
                    percent(embed),
                    percent(rest),
                    percent([max(0.0, 1 - b) for b in busy]),
                    times(ways.get("raypipe"), rounds, lambda run: run.videos_per_s),
                    times(rounds, ways.get("raypipe"), lambda run: run.cpu_s / run.done.videos),
                ]
            )
    return text_table(lines)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percent(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{median(known):.0%}" if known else "-"


def times(above: list[Run] | None, below: list[Run] | None, value: Any) -> str:
    """How many times larger `value` is, round by round."""
    if not above or not below or above is below:
        return ""
    return f"{median([value(a) / value(b) for a, b in zip(above, below, strict=True)]):.2f} x"


def loadable(way: str, peers: Path | None) -> bool:
    """Whether the packages are there; says so where not."""
    package = PEERS.get(way)
    if package is None:
        return True
    code = f"import sys; sys.path.append({str(peers)!r}); import {package}"
    code += ".decoders" if package == "torchcodec" else ""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        print(f"{way} is left out: {package} does not load: {found.stderr.strip().splitlines()[-1][:200]}")
    return found.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, default=Path("../shared/fights"))
    parser.add_argument("--cases", nargs="+", default=["clips", "long12", "long250"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--clips", type=int, default=None, help="so many of the videos; none: all")
    parser.add_argument("--times", type=int, default=10, help="hard links to each clip, for the case many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--view", default="rgb", help="of raypipe and bare; the others show frames alone")
    parser.add_argument("--peers", type=Path, default=None, help="folder with the peers' packages")
    parser.add_argument("--cache", type=Path, default=Path("results/benchmark-videos"))
    arguments = parser.parse_args()
    ways = [way for way in arguments.ways if loadable(way, arguments.peers)]
    runs: dict[str, dict[str, list[Run]]] = {}
    agains: dict[str, list[tuple[float, float]]] = {}
    Path("results").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="results") as folder:
        for case_name in arguments.cases:
            case = make_case(case_name, arguments, Path(folder))
            runs[case_name] = {way: [] for way in ways}
            for turn in range(arguments.rounds):
                for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                    place = Path(folder, f"{case_name}-{way}-{turn}")
                    place.mkdir()
                    try:
                        run, again_s = measure(way, case, arguments, place)
                    except WayFailed as error:
                        print(f"{way} failed on {case_name}: {error}")
                        continue
                    runs[case_name][way].append(run)
                    said = f"{run.videos_per_s:.2f} videos/s, {run.cpu_s / run.done.videos:.3f} CPU s a video"
                    print(f"{case_name}, round {turn + 1}, {way}: {said}", file=sys.stderr, flush=True)
                    if again_s:
                        agains.setdefault(case_name, []).append((run.wall_s, again_s))
    print(table(runs, arguments.cores))
    for case_name, pairs in agains.items():
        first_s, again_s = (median([pair[i] for pair in pairs]) for i in (0, 1))
        ratio = median([first / again for first, again in pairs])
        print(f"{case_name}: raypipe {first_s:.1f} s, again {again_s:.2f} s: {ratio:.0f} times faster")


if __name__ == "__main__":
    main()
