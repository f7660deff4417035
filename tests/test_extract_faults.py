"""What extraction survives, each shown by causing the fault; the killed, stopped and starved run."""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from clips import Frame, draw_frame, write_video
from disks import mount, small_disk
from runs import SAMPLING, Run, end_commands, extract, ids, one_ray, own_workers, write_videos

from benchmarks.soak import family, soak
from raypipe import extract as extraction
from raypipe import workers
from raypipe.config import LimitsConfig
from raypipe.errors import RunFailed
from raypipe.extract import main
from raypipe.shards import features_array
from raypipe.store import FeatureStore
from raypipe.videos import Video

GO_ON = "run the same command to go on"


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with one_ray():
        yield


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    end_commands()


@pytest.fixture
def attached(_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands join this module's cluster, which is quicker than starting one each."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small videos."""
    return write_videos(tmp_path_factory.mktemp("many"), 40)


def wait_until(happened: Callable[[], object], child: "subprocess.Popen[str] | None" = None) -> None:
    """Waits for something in a run that goes on; where it has ended, its last words are the test's."""
    deadline_s = time.monotonic() + 240
    while not happened():
        if child:
            assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def finish(child: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Exit status and the lines on standard error of a command that is left alone."""
    out, said = child.communicate(timeout=240)
    assert "Traceback" not in out + said, out + said
    return child.returncode, said.splitlines()


def once_each(run: Run) -> list[str]:
    """The ids that a reader sees, each checked to be there once."""
    counts = Counter(str(video_id) for (video_id,) in run.rows("video_id"))
    assert not [video_id for video_id, count in counts.items() if count > 1]
    return sorted(counts)


# --- killed -------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_no_video(many: Path, tmp_path: Path, _ray: None) -> None:
    run = Run(many, tmp_path / "features")
    killed = []

    def kill() -> None:
        while not (pids := own_workers("ExtractClips")):
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)
        killed.append(pids[0])

    threading.Thread(target=kill, daemon=True).start()
    summary = main(run.config(shard_rows=4))
    assert len(killed) == 1
    assert summary["outcomes"] == {"ok": 40}
    assert once_each(run) == ids(40)


def test_a_killed_run_is_gone_on_with(many: Path, tmp_path: Path, attached: None) -> None:
    run = Run(many, tmp_path / "features")
    child = run.command("--shard-rows", "4")
    wait_until(run.shards, child)
    child.kill()
    child.communicate()
    done = len(once_each(run))
    assert 0 < done < 40
    summary = main(run.config(shard_rows=4))
    assert (summary["done_before"], summary["extracted"]) == (done, 40 - done)
    assert once_each(run) == ids(40)
    assert not (run.store / ".staging").exists()


STOPS = [
    (signal.SIGKILL, None),
    (signal.SIGTERM, f"stopped by SIGTERM; what was finished is kept, {GO_ON}"),
    (signal.SIGINT, f"stopped by Ctrl-C; what was finished is kept, {GO_ON}"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "words"), STOPS, ids=["SIGKILL", "SIGTERM", "Ctrl-C"])
def test_a_stopped_run_leaves_no_process_and_is_gone_on_with(
    number: signal.Signals, words: str | None, many: Path, tmp_path: Path
) -> None:
    """With a cluster of its own. Ctrl-C reaches the whole process group, as on a terminal."""
    run = Run(many, tmp_path / "features")
    child = run.command("--shard-rows", "4", "--cpus", "1")  # it has time to go on
    wait_until(run.shards, child)
    started = {pid: at for pid in family(child.pid) if (at := started_at(pid))}
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    out, said = child.communicate(timeout=60)
    assert 0 < len(once_each(run)) < 40
    if words is None:
        assert child.returncode == -number
    else:
        assert (child.returncode, out) == (1, "") and "Traceback" not in said
        assert said.splitlines()[-1] == words
        assert not (run.store / ".staging").exists()
    del started[child.pid]
    assert len(started) > 5  # the cluster's servers, workers and decode children
    wait_until(lambda: not [pid for pid, at in started.items() if started_at(pid) == at])

    done = len(once_each(run))
    status, lines = finish(run.command())
    assert status == 0 and f"40 videos: {done} done before, {40 - done} to do" in lines[0]
    assert once_each(run) == ids(40)
    assert not (run.store / ".staging").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "words"), STOPS[1:], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_stopped_while_ray_starts(
    number: signal.Signals, words: str, many: Path, tmp_path: Path
) -> None:
    run = Run(many, tmp_path / "features")
    child = run.command()
    started: dict[int, str] = {}

    def ray_is_starting() -> bool:
        started.update({pid: at for pid in family(child.pid) if pid != child.pid and (at := started_at(pid))})
        return bool(started)

    wait_until(ray_is_starting, child)
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    while child.poll() is None:
        ray_is_starting()
        time.sleep(0.02)
    out, said = child.communicate()
    assert (child.returncode, out) == (1, "") and "Traceback" not in said
    assert said.splitlines()[-1] == words
    wait_until(lambda: not [pid for pid, at in started.items() if started_at(pid) == at])
    assert not (run.store / ".staging").exists() and not run.shards()


def started_at(pid: int) -> str | None:
    """When the process started, which tells it from a later one of that number; None once it has ended."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    return None


@pytest.mark.slow
def test_a_killed_node_costs_no_video(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    run = Run(many, tmp_path / "features")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        child = run.command("--shard-rows", "2")
        wait_until(run.shards, child)
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        raylet = max(raylets, key=lambda pid: len(family(pid)))
        assert any("ExtractClips" in title for title in map(title_of, family(raylet)))
        os.kill(raylet, signal.SIGKILL)
        assert len(once_each(run)) < 40
        assert finish(child)[0] == 0
    finally:
        cluster.shutdown()
    assert once_each(run) == ids(40)
    assert {outcome for (outcome,) in run.rows("outcome")} == {"ok"}


def title_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


# --- a place that cannot be written -------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    with small_disk(tmp_path / "disk", "200k") as path:
        yield path


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_up(many: Path, disk: Path, attached: None) -> None:
    run = Run(many, disk / "features")
    status, lines = finish(run.command("--shard-rows", "4"))
    done = once_each(run)
    assert status == 1 and 0 < len(done) < 40
    assert lines[-1] == (
        f"error: extraction stopped after {len(done)} of 40 videos: {run.store}: No space left on device; "
        f"make room there; these are kept, {GO_ON}"
    )
    rows = run.rows("video_id", "features")
    assert not mount("-o", "remount,size=20m", str(disk))
    status, lines = finish(run.command("--shard-rows", "4"))
    assert status == 0 and f"40 videos: {len(done)} done before" in lines[0]
    assert once_each(run) == ids(40)
    assert set(map(str, rows)) <= set(map(str, run.rows("video_id", "features")))


def test_a_disk_that_is_full_from_the_start(many: Path, disk: Path) -> None:
    run = Run(many, disk / "features")
    run.store.mkdir()
    fill(disk)
    status, lines = finish(run.command())
    assert status == 1
    assert lines == [f"error: {run.store}: No space left on device; make room there, then {GO_ON}"]
    assert not FeatureStore(run.store).exists()


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end(many: Path, disk: Path, attached: None) -> None:
    """All videos are done, but what lies beside the shards cannot be written."""
    assert not mount("-o", "remount,size=20m", str(disk))
    run = Run(many, disk / "features")
    assert finish(run.command())[0] == 0
    fill(disk)
    status, lines = finish(run.command())
    assert status == 1
    assert lines[-1] == f"error: {run.store}: No space left on device; make room there, then {GO_ON}"
    (disk / "ballast").unlink()
    assert finish(run.command())[0] == 0
    assert once_each(run) == ids(40)


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(many: Path, disk: Path, tmp_path: Path, attached: None) -> None:
    run = Run(tmp_path / "videos", disk / "features")
    write_videos(run.videos, 10)
    assert finish(run.command())[0] == 0
    shutil.copytree(many, run.videos, dirs_exist_ok=True)
    assert not mount("-o", "remount,ro", str(disk))
    status, lines = finish(run.command())
    assert status == 2
    assert lines == [f"error: --output {run.store}: cannot be written: Read-only file system"]
    assert len(once_each(run)) == 10
    status, lines = finish(run.command("--failures"))
    assert status == 0 and lines[-1].endswith(f"10 videos: 10 ok, 0 partial, 0 failed: {run.store}")
    assert finish(run.command("--dry-run"))[0] == 0
    assert not mount("-o", "remount,rw,size=20m", str(disk))
    assert finish(run.command())[0] == 0
    assert once_each(run) == ids(40)


# --- two at once --------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_store_is_refused(many: Path, tmp_path: Path, attached: None) -> None:
    run = Run(many, tmp_path / "features")
    first = run.command()
    wait_until((run.store / ".staging").exists, first)
    os.kill(first.pid, signal.SIGSTOP)  # it stays in the middle until the second has ended
    try:
        status, lines = finish(run.command())
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert status == 2
    assert lines == [f"error: --output {run.store}: another run is writing there; wait for it"]
    assert finish(first)[0] == 0
    assert once_each(run) == ids(40)


# --- rows that are replaced ---------------------------------------------------------------------------


def test_old_rows_stay_until_the_new_ones_are_there(tmp_path: Path, attached: None) -> None:
    run = Run(write_videos(tmp_path / "videos", 24, frames=30), tmp_path / "features")
    main(run.config(shard_rows=4))
    write_videos(run.videos, 24, frames=20, later=5)
    old, new = [(video_id, 30) for video_id in ids(24)], [(video_id, 20) for video_id in ids(24)]

    def seen() -> list[tuple[object, ...]]:
        rows = run.rows("video_id", "frame_count")
        assert [row in (old[i], new[i]) for i, row in enumerate(rows)] == [True] * 24
        return rows

    child = run.command("--shard-rows", "4")
    wait_until(lambda: seen() != old, child)
    child.kill()
    child.communicate()
    assert seen() not in (old, new)
    left = sum(frames == 30 for _, frames in seen())
    summary = main(run.config(shard_rows=4))
    assert (summary["extracted"], summary["done_before"]) == (left, 24 - left)
    assert run.rows("video_id", "frame_count") == new


@pytest.mark.slow
def test_no_failed_row_is_lost_while_it_is_tried_again(tmp_path: Path, attached: None) -> None:
    run = Run(write_videos(tmp_path / "videos", 24), tmp_path / "features")
    main(run.config(shard_rows=4, limits=LimitsConfig(max_pixels=64), max_failed=1000))
    assert Counter(run.rows("outcome", "reason")) == {("failed", "too_large"): 24}
    child = run.command("--shard-rows", "4", "--retry-failed")
    wait_until(lambda: ("ok",) in run.rows("outcome"), child)
    child.kill()
    child.communicate()
    assert once_each(run) == ids(24)
    counts = Counter(run.rows("outcome", "reason"))
    ok, failed = counts["ok", None], counts["failed", "too_large"]
    assert ok + failed == 24 and failed
    assert main(run.config(shard_rows=4, max_failed=1000))["extracted"] == 0
    assert main(run.config(shard_rows=4, retry_failed=True))["extracted"] == failed
    assert run.rows("video_id", "outcome") == [(video_id, "ok") for video_id in ids(24)]


# --- stalled ------------------------------------------------------------------------------------------


def patience(monkeypatch: pytest.MonkeyPatch, stall_s: float) -> None:
    """Lets a run stand still for so long only."""
    monkeypatch.setattr(extraction, "STALL_MARGIN_S", stall_s - 2 * 60)
    assert extraction.patience_s(LimitsConfig()) == stall_s


def test_patience_outlasts_the_slowest_video() -> None:
    assert extraction.patience_s(LimitsConfig(timeout_s=60)) == 2 * 60 + 600


def freezing(name: str, frozen: Path) -> type:
    """The step of this name, whose first process to work stops in the middle of it."""
    kind: Any = getattr(workers, name)

    def stop(value: object) -> object:
        with contextlib.suppress(FileExistsError), frozen.open("x") as file:
            file.write(str(os.getpid()))
            file.flush()
            time.sleep(5)  # what it told the tally is on its way
            os.kill(os.getpid(), signal.SIGSTOP)
        return value

    methods = {
        "EmbedClips": {"_embed": lambda self, clips: kind._embed(self, stop(clips))},
        "StageShards": {"__call__": lambda self, rows: kind.__call__(self, stop(rows))},
    }
    return type(name, (kind,), methods[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("EmbedClips", r"embedding a/\d\d\.mp4 hangs for \d+:\d\d \(process PID on \S+\)"),
        ("StageShards", "StageShards hangs"),
    ],
    ids=["embed", "write"],
)
def test_a_step_that_hangs_is_named(
    name: str,
    words: str,
    many: Path,
    tmp_path: Path,
    _ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, frozen = Run(many, tmp_path / "features"), tmp_path / "frozen"
    with monkeypatch.context() as patched:
        patience(patched, 60)
        patched.setattr(workers, name, freezing(name, frozen))
        with pytest.raises(RunFailed) as caught:
            main(run.config(shard_rows=4))
    pid = int(frozen.read_text())
    with contextlib.suppress(ProcessLookupError):  # the cluster has killed it
        os.kill(pid, signal.SIGKILL)
    assert re.fullmatch(
        r"extraction stopped after \d+ of 40 videos: nothing has moved for a long time; "
        rf"{words.replace('PID', str(pid))}; these are kept, {GO_ON}",
        str(caught.value),
    )
    assert main(run.config(shard_rows=4))["outcomes"] == {"ok": 40}
    assert once_each(run) == ids(40)


@pytest.mark.slow
def test_slow_videos_are_not_taken_for_a_step_that_hangs(
    many: Path, tmp_path: Path, _ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are one task of Ray's, which hands on nothing before its end, long after our patience."""

    class EmbedClips(workers.EmbedClips):
        def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            time.sleep(1.5 * len(rows))
            return super().__call__(rows)

    def one_table(videos: list[Video], cpus: int) -> list[pa.Table]:
        return [pa.concat_tables(video_tables(videos, cpus)).combine_chunks()]

    video_tables = extraction.video_tables
    monkeypatch.setattr(extraction, "video_tables", one_table)
    monkeypatch.setattr(workers, "EmbedClips", EmbedClips)
    patience(monkeypatch, 45)
    run = Run(many, tmp_path / "features")
    started_s = time.monotonic()
    assert main(run.config())["outcomes"] == {"ok": 40}
    assert time.monotonic() > started_s + 40 * 1.5


@pytest.mark.parametrize(
    ("where", "patience_s", "words"),
    [
        ("_embed", 200, r"a worker died 3 times over the same work, of: a/.*"),
        pytest.param(
            "__init__",
            40,
            # Whichever comes first: the last of Ray's retries, or the end of our patience.
            "(a worker died 3 times before it began any work|"
            "nothing has moved for a long time; no worker is at work; they cannot start, .*)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["at work", "at the start"],
)
def test_a_worker_that_always_dies_ends_the_run(
    where: str,
    patience_s: float,
    words: str,
    tmp_path: Path,
    _ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def die(self: object, *arguments: object, **options: object) -> None:
        time.sleep(1)  # what it told the tally is on its way
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "EmbedClips", type("EmbedClips", (workers.EmbedClips,), {where: die}))
    monkeypatch.setattr(extraction, "RETRIES", 2)
    monkeypatch.setattr(extraction, "FINITE_RETRIES", {"max_task_retries": 2})
    patience(monkeypatch, patience_s)
    run = Run(write_videos(tmp_path / "videos", 4), tmp_path / "features")
    with pytest.raises(RunFailed) as caught:
        main(run.config())
    assert "\n" not in str(caught.value)
    assert re.fullmatch(
        rf"extraction stopped after 0 of 4 videos: {words}; these are kept, {GO_ON}", str(caught.value)
    )
    out, said = capfd.readouterr()
    assert "Traceback" not in out + said


# --- what a person sees -------------------------------------------------------------------------------

HOSTILE = ["line\nbreak.mp4", "\x1b[31mred.mp4", os.fsdecode(b"byte\xff.mp4"), 'tab\t, quote".mp4']


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, _ray: None) -> Run:
    """Text files under names that would spoil a screen or a table."""
    folder = tmp_path_factory.mktemp("hostile")
    run = Run(folder / "videos", folder / "features")
    run.videos.mkdir()
    for name in HOSTILE:
        (run.videos / name).write_text("not a video\n" * 100)
    main(run.config(max_failed=1000))
    return run


def test_a_dry_run_writes_nothing(hostile: Run, tmp_path: Path) -> None:
    fresh = Run(hostile.videos, tmp_path / "new" / "features")
    status, lines = finish(fresh.command("--dry-run"))
    assert (status, list(tmp_path.iterdir())) == (0, [])
    assert [line[9:] for line in lines if "labels" not in line] == [
        r"4 new, would be extracted:  [31mred.mp4, byte\xff.mp4, line break.mp4 and 1 more",
        "4 videos: 0 done before, 4 to do; nothing was done",
    ]

    there = Run(tmp_path / "videos", tmp_path / "features")
    shutil.copytree(hostile.videos, there.videos)
    shutil.copytree(hostile.store, there.store)
    (there.videos / "new").mkdir()
    (there.videos / "new" / "v.mp4").write_text("new")
    (there.videos / HOSTILE[1]).write_text("changed")
    before = files(there.store)
    status, lines = finish(there.command("--dry-run"))
    assert status == 0
    assert [line[9:] for line in lines] == [
        "1 new, would be extracted: new/v.mp4",
        "1 changed or tried again, rows would be replaced:  [31mred.mp4",
        "5 videos: 3 done before, 2 to do; nothing was done",
    ]
    assert files(there.store) == before


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]
    }


def test_names_that_would_spoil_the_screen(hostile: Run) -> None:
    status, lines = finish(hostile.command("--failures"))
    assert status == 0 and not [line for line in lines if not line.isprintable()]
    table = "\n".join(lines)
    for name in (" [31mred.mp4: ", r"byte\xff.mp4: ", "line break.mp4: "):
        assert name in table
    assert lines[-2].endswith(f"all 4: {hostile.store / 'failures.csv'}")
    assert lines[-1].endswith(f"4 videos: 0 ok, 0 partial, 4 failed: {hostile.store}")
    with open(hostile.store / "failures.csv", newline="") as file:
        listed = [row["video_id"] for row in csv.DictReader(file)]
    assert sorted(listed) == sorted(os.fsencode(name).decode(errors="backslashreplace") for name in HOSTILE)


def test_failures_of_a_folder_that_is_no_store(tmp_path: Path) -> None:
    status, lines = finish(extract("--output", str(tmp_path), "--failures"))
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: --output {tmp_path}: no feature store there; ")


def test_failures_after_a_run_that_wrote_no_list(hostile: Run) -> None:
    """It was killed before its end."""
    (hostile.store / "failures.csv").unlink()
    status, lines = finish(hostile.command("--failures"))
    assert status == 0 and lines[-2].endswith(f"all 4: {hostile.store / 'failures.csv'}")
    with open(hostile.store / "failures.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


# --- windows ------------------------------------------------------------------------------------------

LOSSLESS = {"crf": "0", "g": "30"}
WINDOWS = SAMPLING.model_copy(update={"window_s": 2.0})


def from_second(start_s: int) -> Callable[[int, int, int], Frame]:
    return lambda number, width, height: draw_frame(number + 30 * start_s, width, height)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory, _ray: None) -> Run:
    """A video of ten seconds, its five windows as files of their own, and a copy with a hole."""
    folder = tmp_path_factory.mktemp("windows")
    run = Run(folder / "videos", folder / "features")
    for start_s in range(0, 10, 2):
        write_video(run.videos / f"cut{start_s}.mp4", draw=from_second(start_s), options=LOSSLESS)
    long = write_video(run.videos / "long.mp4", frames=300, options=LOSSLESS, index_first=True)
    content = bytearray(long.read_bytes())
    start = content.index(b"mdat")
    size = len(content) - start
    hole = slice(start + size * 38 // 100, start + size * 65 // 100)
    content[hole] = bytes(hole.stop - hole.start)
    (run.videos / "hole.mp4").write_bytes(content)
    main(run.config(sampling=WINDOWS))
    return run


def video_rows(run: Run, video_id: str, *columns: str) -> list[tuple[object, ...]]:
    return [row[1:] for row in run.rows("video_id", *columns) if row[0] == video_id]


def test_a_row_per_window(windows: Run) -> None:
    assert video_rows(windows, "long.mp4", "clip_index", "start_s", "end_s", "outcome", "frame_count") == [
        (index, 2.0 * index, pytest.approx(2.0 * index + 2), "ok", 300) for index in range(5)
    ]
    assert [tuple(map(len, row)) for row in video_rows(windows, "long.mp4", "frame_pts_s")] == [(4,)] * 5


def test_a_window_is_what_a_file_of_its_own_would_be(windows: Run) -> None:
    store = FeatureStore(windows.store)
    table = store.read(["video_id", "outcome", "features"])
    table = table.filter(np.array(table["outcome"].to_pylist()) == "ok")
    features = features_array(table["features"], store.spec())
    of = {
        name: features[[video_id.startswith(name) for video_id in table["video_id"].to_pylist()]]
        for name in ("cut", "long")
    }
    assert of["cut"].shape == of["long"].shape == (5, 4, 2560)
    np.testing.assert_allclose(of["long"], of["cut"], atol=2e-3)
    assert np.ptp(of["long"].astype(np.float32), axis=0).max() > 0.1  # the windows are not alike


def test_windows_that_overlap(windows: Run, tmp_path: Path) -> None:
    run = Run(windows.videos / "long.mp4", tmp_path / "features")
    overlapping = WINDOWS.model_copy(update={"stride_s": 1.0})
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path\n{run.videos}\n")
    main(run.config(sampling=overlapping, input=str(manifest)))
    assert run.rows("clip_index", "start_s", "outcome") == [(index, 1.0 * index, "ok") for index in range(10)]
    assert [end_s for (end_s,) in run.rows("end_s")] == pytest.approx([*range(2, 11), 10])
    store, apart = FeatureStore(run.store), FeatureStore(windows.store)
    every_other = features_array(store.read(["features"])["features"], store.spec())[::2]
    table = apart.read(["video_id", "features"])
    of_long = table.filter(np.array(table["video_id"].to_pylist()) == "long.mp4")["features"]
    np.testing.assert_allclose(every_other, features_array(of_long, apart.spec()), atol=2e-3)


def test_a_hole_costs_the_windows_it_is_in(windows: Run) -> None:
    outcomes = [outcome for (outcome,) in video_rows(windows, "hole.mp4", "outcome")]
    assert len(outcomes) == 5
    assert (outcomes[0], outcomes[-1]) == ("ok", "ok")
    assert "failed" in outcomes and set(outcomes[2:3]) <= {"partial", "failed"}
    whole = video_rows(windows, "long.mp4", "clip_index", "start_s", "features")
    assert [video_rows(windows, "hole.mp4", "clip_index", "start_s")[i] for i in (0, 4)] == [
        whole[i][:2] for i in (0, 4)
    ]


def test_failures_of_windows_say_where_they_are(windows: Run) -> None:
    status, lines = finish(extract("--output", str(windows.store), "--failures"))
    assert status == 0
    assert [line for line in lines if re.search(r"hole\.mp4 at 4 s: ", line)]
    with open(windows.store / "failures.csv", newline="") as file:
        listed = [(row["video_id"], int(row["clip_index"]), row["outcome"]) for row in csv.DictReader(file)]
    assert listed == [row for row in windows.rows("video_id", "clip_index", "outcome") if row[2] != "ok"]


def test_a_video_with_a_failed_window_is_done_until_it_is_tried_again(windows: Run, tmp_path: Path) -> None:
    run = Run(windows.videos, tmp_path / "features")
    shutil.copytree(windows.store, run.store)
    before = run.shards()
    assert main(run.config(sampling=WINDOWS))["extracted"] == 0
    assert run.shards() == before
    rows = run.rows("video_id", "clip_index", "outcome", "reason", "start_s")
    summary = main(run.config(sampling=WINDOWS, retry_failed=True))
    assert (summary["extracted"], summary["clips"]) == (1, 15)
    assert run.rows("video_id", "clip_index", "outcome", "reason", "start_s") == rows


def test_a_child_that_dies_again_and_again_in_the_middle(
    windows: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows so far, and one for the rest."""

    class DecodeClips(workers.DecodeClips):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            sandbox = self._sandbox
            hear = sandbox._hear

            def hear_two_windows() -> dict[str, object]:
                reply = hear()
                if reply["span"]["index"] < 2:
                    return reply
                sandbox._child.kill()
                return hear()

            sandbox._hear = hear_two_windows

    run = Run(tmp_path / "videos", tmp_path / "features")
    run.videos.mkdir()
    shutil.copy(windows.videos / "long.mp4", run.videos)
    shutil.copy(windows.videos / "cut0.mp4", run.videos)
    with monkeypatch.context() as patched:
        patched.setattr(workers, "DecodeClips", DecodeClips)
        summary = main(run.config(sampling=WINDOWS))
    assert summary["outcomes"] == {"ok": 1, "partial": 1}
    columns = ("video_id", "clip_index", "start_s", "end_s", "outcome", "reason", "message")
    assert run.rows(*columns) == [
        ("cut0.mp4", 0, 0.0, pytest.approx(2), "ok", None, None),
        ("long.mp4", 0, 0.0, pytest.approx(2), "ok", None, None),
        ("long.mp4", 1, 2.0, pytest.approx(4), "ok", None, None),
        (
            "long.mp4",
            2,
            pytest.approx(4),
            pytest.approx(10),
            "failed",
            "crash",
            "the decoder died of SIGKILL",
        ),
    ]
    assert main(run.config(sampling=WINDOWS))["extracted"] == 0
    assert main(run.config(sampling=WINDOWS, retry_failed=True))["extracted"] == 1
    assert video_rows(run, "long.mp4", "clip_index", "outcome") == [(index, "ok") for index in range(5)]


# --- a soak -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_killed_throughout_cost_nothing(fights: Path, tmp_path: Path) -> None:
    """benchmarks/soak.py does the same with 3,000 clips."""
    done = soak(fights, tmp_path, clips=300)
    assert (done.status, done.lost, done.duplicated) == (0, 0, 0), done.said
    assert done.outcomes.total() == 300
    assert done.blamed <= 2  # a file whose two children were both killed is blamed for it
    assert done.kills  # how many depends on how fast the machine is
