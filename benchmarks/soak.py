"""Extraction with its workers killed throughout: no row may be lost or doubled, nor memory grow.

python benchmarks/soak.py --videos ../shared/fights --clips 300 3000

Makes hard links to the videos until there are as many clips as asked for, extracts them with the command,
and meanwhile kills decode children, workers and writers, one at a time, at random.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from raypipe.console import text_table
from raypipe.outcomes import OUTCOMES
from raypipe.store import FeatureStore
from raypipe.videos import list_videos

KINDS = {
    "decode child": "-m raypipe.sandbox",
    "worker": "(ExtractClips)",
    "writer": "(StageShards)",
}
"""What is killed, and what its command line or title holds."""

PAUSE_S = (1.0, 4.0)
"""The least and the most time between two kills."""
AIMS = 10
"""How often a victim of one kind is looked for, some tenths of a second each, before another kind's turn."""
SAMPLE_S = 2.0
TIMEOUT_S = 1800.0

SMALL = ["--frames", "2", "--frame-size", "64", "--view", "rgb", "--shard-rows", "16"]
"""Flags that make a clip cheap, so that many can be tried."""


@dataclass(frozen=True)
class Soaked:
    """What a run under fire left."""

    status: int
    said: str
    outcomes: Counter[str]
    lost: int
    """Listed videos without a row."""
    duplicated: int
    """Rows beyond the first of their video."""
    blamed: int
    """Videos that failed because their worker was killed. Some are damaged, which is another matter."""
    kills: Counter[str]
    wall_s: float
    peak_mb: float
    """The most memory that the driver and everything it started had at once (PSS: shared pages once)."""


def soak(videos: Path, folder: Path, *, clips: int, seed: int = 0) -> Soaked:
    """Extracts `clips` hard links to the files below `videos`, killing workers throughout."""
    link_clips(videos, folder / "videos", clips)
    output = folder / "features"
    command = ["--input", str(folder / "videos"), "--output", str(output), *SMALL]
    with tempfile.TemporaryFile("w+") as words:
        started_s = time.monotonic()
        run = subprocess.Popen([sys.executable, "-m", "raypipe.extract", *command], stderr=words)
        meter = Meter(run.pid)
        kills = kill_throughout(run, random.Random(seed))
        wall_s = time.monotonic() - started_s
        words.seek(0)
        said = words.read()
    listed = {video.video_id for video in list_videos(str(folder / "videos")).videos}
    rows = FeatureStore(output).read(["video_id", "outcome", "reason"]).to_pydict()
    counts = Counter(rows["video_id"])
    return Soaked(
        status=run.returncode,
        said=said,
        outcomes=Counter(rows["outcome"]),
        lost=len(listed - counts.keys()),
        duplicated=counts.total() - len(counts),
        blamed=sum(reason in ("crash", "timeout", "out_of_memory") for reason in rows["reason"]),
        kills=kills,
        wall_s=wall_s,
        peak_mb=meter.peak_mb(),
    )


def link_clips(videos: Path, folder: Path, count: int) -> None:
    """`count` hard links, under names of their own, to the files of the sub-folders of `videos`."""
    files = sorted(path for path in videos.glob("*/*") if path.is_file())
    for number in range(count):
        file = files[number % len(files)]
        link = folder / file.parent.name / f"{number:05}-{file.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, link)


def kill_throughout(run: "subprocess.Popen[bytes]", chance: random.Random) -> Counter[str]:
    """Kills one worker after another until the run ends; how many of each kind."""
    kills = Counter[str]()
    deadline_s = time.monotonic() + TIMEOUT_S
    while run.poll() is None:
        kind = chance.choice(list(KINDS))
        if victim := find(run, KINDS[kind], chance):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kills[kind] += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(chance.uniform(*PAUSE_S))
        if time.monotonic() > deadline_s:
            run.kill()
    return kills


def find(run: "subprocess.Popen[bytes]", title: str, chance: random.Random) -> int | None:
    """A process of the run with this in its title, as soon as there is one: a write takes milliseconds."""
    for _ in range(AIMS):
        members = family(run.pid)
        chance.shuffle(members)
        for _ in range(100):
            if run.poll() is not None:
                return None
            if victim := next((pid for pid in members if title in command_line(pid)), None):
                return victim
            time.sleep(0.002)
    return None


def family(pid: int) -> list[int]:
    """The process and everything below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found.extend(children.get(one, []))
    return found


def command_line(pid: int) -> str:
    """Its arguments, or the title it gave itself; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Meter:
    """Watches the memory of a process and everything below it until it ends."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak_kb = pid, 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while used_kb := sum(map(proportional_kb, family(self._pid))):
            self._peak_kb = max(self._peak_kb, used_kb)
            time.sleep(SAMPLE_S)

    def peak_mb(self) -> float:
        """Once the process has ended."""
        self._thread.join()
        return self._peak_kb / 1024


def proportional_kb(pid: int) -> int:
    """Its memory, shared pages divided among those who share them; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def table(runs: dict[int, Soaked]) -> str:
    """A column per run."""
    rows = [
        ["clips", *(f"{clips:,}" for clips in runs)],
        ["exit status", *(str(run.status) for run in runs.values())],
        *([outcome, *(f"{run.outcomes[outcome]:,}" for run in runs.values())] for outcome in OUTCOMES),
        ["rows lost", *(str(run.lost) for run in runs.values())],
        ["rows duplicated", *(str(run.duplicated) for run in runs.values())],
        ["blamed for a kill", *(str(run.blamed) for run in runs.values())],
        *([f"killed: {kind}", *(str(run.kills[kind]) for run in runs.values())] for kind in KINDS),
        ["wall time, s", *(f"{run.wall_s:.0f}" for run in runs.values())],
        ["peak memory, MB", *(f"{run.peak_mb:,.0f}" for run in runs.values())],
    ]
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, default=Path("../shared/fights"))
    parser.add_argument("--clips", type=int, nargs="+", default=[300, 3000])
    arguments = parser.parse_args()
    runs = {}
    for clips in arguments.clips:
        # Beside the results: hard links do not cross file systems.
        Path("results").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir="results") as folder:
            runs[clips] = soak(arguments.videos, Path(folder), clips=clips)
        if runs[clips].status:
            sys.stderr.write(runs[clips].said)
    print(table(runs))
    unharmed = [(run.status, run.lost, run.duplicated) == (0, 0, 0) for run in runs.values()]
    sys.exit(not all(unharmed))


if __name__ == "__main__":
    main()
