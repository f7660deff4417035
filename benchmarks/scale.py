"""How listing, planning and re-running grow with the number of videos: time, and the driver's memory.

    python -m benchmarks.scale --videos 1000 10000 100000
    python -m benchmarks.scale --videos 1000000 --clips none    # videos that are only named, not there
    python -m benchmarks.scale --videos 100000 --commands       # the commands themselves, over hard links

Every size is measured in a process of its own. `links` walks a folder of hard links to one tiny clip; `none`
makes the listing up, where making the files would take longer than all the rest. What would be extracted is
written as rows with small made-up features by the same `Commits` that extraction uses; nothing is decoded.
Then `again` is what a re-run does when all is done: read the index and all outcomes, find nothing to do.
`--commands` times `raypipe.extract` with nothing extracted (`--dry-run`), with nothing left to do, and with a
tenth of the videos new (`--dry-run`), each a process from its start to its end.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from raypipe.backbones import load_backbone
from raypipe.commits import Commits
from raypipe.config import EmbeddingConfig, SamplingConfig
from raypipe.extract import feature_spec, video_tables
from raypipe.outcomes import Costs, account_for, summarize
from raypipe.plan import plan_run
from raypipe.schema import ROW_SCHEMA, FeatureSpec
from raypipe.shards import shard_table, stage_shard
from raypipe.store import FeatureStore
from raypipe.videos import Video, list_videos

SPEC = FeatureSpec(
    frames=4, frame_size=32, view="rgb", motion_gap_s=0.0667, window_s=None, stride_s=None, min_frames=1,
    backbone="made_up", weights_digest="0" * 16, steps=4, dim=8,
)  # fmt: skip
SHARD_ROWS = 1024


def peak_mb() -> float:
    """The most memory that this process has had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def make_links(root: Path, count: int) -> None:
    """`count` names for one tiny file, a thousand a folder."""
    root.mkdir(parents=True)
    clip = root.parent / "clip"
    clip.write_bytes(b"\0" * 1000)
    for number in range(count):
        folder = root / f"{number // 1000:04}"
        if number % 1000 == 0:
            folder.mkdir()
            original = folder / f"{number:07}.mp4"  # a file has at most some 65,000 links
            original.write_bytes(clip.read_bytes())
        else:
            os.link(original, folder / f"{number:07}.mp4")


def made_up(count: int) -> list[Video]:
    names = (f"{n // 1000:04}/{n:07}.mp4" for n in range(count))
    return [Video(name, f"/videos/{name}", name[:4], None, None, 1000, 1e9) for name in names]


def fill(store: FeatureStore, videos: list[Video], spec: FeatureSpec = SPEC) -> None:
    """A row for each video, by the way that extraction takes."""
    features = b"\0" * (spec.steps * spec.dim * 2)
    with store.writing(spec):
        commits = Commits(store, shard_rows=SHARD_ROWS)
        for start in range(0, len(videos), SHARD_ROWS):
            some = videos[start : start + SHARD_ROWS]
            ids = [video.video_id for video in some]
            rows = [asdict(video) | {"clip_index": 0, "outcome": "ok"} for video in some]
            whole = shard_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), [features] * len(ids), spec)
            commits.add(stage_shard(whole, store.staging), dict.fromkeys(ids, 1))


def measure(count: int, *, clips: str, folder: Path) -> dict[str, float]:
    figures: dict[str, float] = {"videos": count}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        started_s = time.monotonic()
        yield
        figures[f"{name}_s"] = round(time.monotonic() - started_s, 3)
        figures[f"{name}_mb"] = round(now_mb())

    root, store = folder / "videos", FeatureStore(folder / "features")
    if clips == "links":
        with step("make"):
            make_links(root, count)
    figures["start_mb"] = round(now_mb())
    with step("list"):
        videos = list_videos(str(root)).videos if clips == "links" else made_up(count)
    with step("plan"):
        plan = plan_run(videos, store.index(), retry_failed=False)
    assert len(plan.todo) == count
    with step("tables"):
        tables = sum(table.num_rows for table in video_tables(plan.todo, 2))
    assert tables == count
    with step("store"):
        fill(store, plan.todo)
    figures["shards"] = len(store.shards())
    with step("again"):
        plan = plan_run(videos, store.index(), retry_failed=False)
        summary = summarize(account_for(store, videos), plan, Costs(), 1.0)
    assert plan.done == count and summary["outcomes"] == {"ok": count}
    figures["peak_mb"] = round(peak_mb())
    return figures


# In a small process of its own: the peak of a child begins with what its parent had.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, used = os.wait4(process.pid, 0)
print([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024])
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measure_commands(count: int, folder: Path) -> dict[str, float]:
    sampling = SamplingConfig(frames=4, frame_size=32, view="rgb")
    backbone = load_backbone(EmbeddingConfig().backbone, weights=None, frame_size=32)
    root, store = folder / "videos", FeatureStore(folder / "features")
    flags = ["--frames", "4", "--frame-size", "32", "--view", "rgb"]
    command = ["-m", "raypipe.extract", "--input", str(root), "--output", str(store.path), *flags]
    figures: dict[str, float] = {"videos": count}

    def run(name: str, *more: str) -> None:
        started_s = time.monotonic()
        launched = [sys.executable, "-c", LAUNCH, sys.executable, *command, *more]
        cpu_s, peak_mb = json.loads(subprocess.run(launched, check=True, capture_output=True).stdout)
        figures[f"{name}_s"] = round(time.monotonic() - started_s, 2)
        figures[f"{name}_cpu_s"] = round(cpu_s, 2)
        figures[f"{name}_mb"] = round(peak_mb)

    make_links(root, count)
    run("nothing_done", "--dry-run")
    fill(store, list_videos(str(root)).videos, feature_spec(sampling, backbone))
    run("all_done")
    assert store.summary()["outcomes"] == {"ok": count}
    for new in range(count // 10):
        (root / "new" / f"{new // 1000}").mkdir(parents=True, exist_ok=True)
        os.link(root / f"{new // 1000:04}/{new // 1000 * 1000:07}.mp4", root / f"new/{new // 1000}/{new}.mp4")
    run("a_tenth_new", "--dry-run")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--videos", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--clips", choices=["links", "none"], default="links")
    parser.add_argument("--commands", action="store_true", help="time the commands instead")
    parser.add_argument("--one", action="store_true", help="measure here, and print JSON")
    asked = parser.parse_args()
    if asked.one:
        with tempfile.TemporaryDirectory() as name:
            count, folder = asked.videos[0], Path(name)
            if asked.commands:
                print(json.dumps(measure_commands(count, folder)))
            else:
                print(json.dumps(measure(count, clips=asked.clips, folder=folder)))
        return
    names: list[str] = []
    for count in asked.videos:
        command = [sys.executable, "-m", "benchmarks.scale", "--videos", str(count), "--clips", asked.clips]
        command += ["--one", *(["--commands"] if asked.commands else [])]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if list(figures) != names:
            names = list(figures)
            print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        print("| " + " | ".join(f"{figures[name]:g}" for name in names) + " |", flush=True)


if __name__ == "__main__":
    main()
