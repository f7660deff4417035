"""Extractions for tests: a folder of videos and its store, in this process or as the command."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from clips import Frame, draw_frame, write_video
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._private.ray_constants import OBJECT_STORE_MINIMUM_MEMORY_BYTES

from raypipe.cluster import keep_servers_quiet
from raypipe.config import ExtractConfig, SamplingConfig
from raypipe.store import FeatureStore

SAMPLING = SamplingConfig(frames=4, frame_size=64)
FLAGS = ["--frames", "4", "--frame-size", "64"]


@contextmanager
def one_ray() -> Iterator[None]:
    """One cluster for all extractions of a module: starting one takes longer than all of them. Its object
    store is the smallest that Ray allows."""
    keep_servers_quiet()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=OBJECT_STORE_MINIMUM_MEMORY_BYTES,
    )  # fmt: skip
    yield
    ray.shutdown()


def object_store() -> dict[str, int]:
    """What has passed through the object stores of the cluster, in bytes: created, spilled."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    stats = get_memory_info_reply(state).store_stats
    return {"created": stats.cumulative_created_bytes, "spilled": stats.spilled_bytes_total}


@dataclass(frozen=True)
class Run:
    """A folder of videos and the store that is made of it."""

    videos: Path
    store: Path

    def config(self, **fields: object) -> ExtractConfig:
        paths = {"input": str(self.videos), "output": str(self.store)}
        return ExtractConfig.model_validate(paths | {"sampling": SAMPLING} | fields)

    def command(self, *flags: str) -> "subprocess.Popen[str]":
        return extract("--input", str(self.videos), "--output", str(self.store), *flags)

    def rows(self, *columns: str) -> list[tuple[object, ...]]:
        table = FeatureStore(self.store).read(list(columns))
        return list(zip(*table.to_pydict().values(), strict=True))

    def shards(self) -> dict[str, int]:
        return {shard.name: shard.stat().st_mtime_ns for shard in FeatureStore(self.store).shards()}


_begun: list["subprocess.Popen[str]"] = []


def end_commands() -> None:
    """Ends those that a test has left, as one that fails does: they would be in the way of others."""
    for command in _begun:
        if command.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
            command.communicate()
    _begun.clear()


def extract(*arguments: str) -> "subprocess.Popen[str]":
    """The command, in a process group of its own; it hears Ctrl-C even where tests run in the background."""
    command = subprocess.Popen(
        [sys.executable, "-m", "raypipe.extract", *arguments, *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _begun.append(command)
    return command


def write_videos(folder: Path, count: int, *, frames: int = 30, later: int = 0) -> Path:
    """`count` small videos a/00.mp4, a/01.mp4, ..., no two alike; `later` makes others of them."""
    for number in range(count):

        def draw(frame: int, width: int, height: int, moved: int = 7 * number + later) -> Frame:
            return draw_frame(frame + moved, width, height)

        write_video(folder / "a" / f"{number:02}.mp4", frames=frames, draw=draw, size=(64, 48))
    return folder


def ids(count: int) -> list[str]:
    """The ids of the videos that `write_videos` makes."""
    return [f"a/{number:02}.mp4" for number in range(count)]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def own_workers(name: str) -> list[int]:
    """The actors of this class that are at work in this process's cluster: children of its raylet."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_text(errors="replace")
            if f"({name})).submit" in title and parent(parent(int(folder.name))) == os.getpid():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found
