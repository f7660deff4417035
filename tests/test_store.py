"""The feature store: what a reader may see of it, and what any crash may leave."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from features import SPEC, make_store
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from raypipe.commits import Commits
from raypipe.errors import UserError
from raypipe.files import write_atomically
from raypipe.plan import Plan, plan_run
from raypipe.schema import INDEX_COLUMNS, ROW_SCHEMA
from raypipe.shards import ROW_GROUP_ROWS, features_array, shard_table, stage_shard
from raypipe.store import FeatureStore
from raypipe.videos import Video

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
"""Python 3.12 warns of locks that other threads may hold; Arrow's threads are made anew in a forked child."""


def rows(*clips: str, **columns: Any) -> pa.Table:
    """A shard's rows of these clips, each with `columns` and its own features: "a" or "a.0" is a's first."""
    row = {"path": "/v.mp4", "outcome": "ok"} | columns
    table = pa.Table.from_pylist(
        [{"video_id": video_id, "clip_index": index, **row} for video_id, index in named(*clips)],
        schema=ROW_SCHEMA,
    )
    failed = row["outcome"] == "failed"
    return shard_table(table, [None if failed else vector(clip).tobytes() for clip in clips], SPEC)


def named(*clips: str) -> list[tuple[str, int]]:
    """Video and number of each clip."""
    split = [clip.partition(".") for clip in clips]
    return [(video_id, int(index or 0)) for video_id, _, index in split]


def vector(clip: str) -> np.ndarray:
    """The made-up features [T, D] of a clip."""
    rng = np.random.default_rng(list(clip.removesuffix(".0").encode()))
    return rng.normal(size=(SPEC.steps, SPEC.dim)).astype(np.float16)


def add(store: FeatureStore, *tables: pa.Table, shard_rows: int = 64) -> list[list[str]]:
    """Commits tables of whole videos; which of them became visible with each."""
    commits = Commits(store, shard_rows=shard_rows)
    return [
        commits.add(stage_shard(table, store.staging), Counter(table["video_id"].to_pylist()))
        for table in tables
    ]


def stored(store: FeatureStore) -> list[str]:
    return store.read(["video_id"])["video_id"].to_pylist()


def seen(folder: Path) -> dict[str, list[int]]:
    """The clips of each video, as a reader sees them that knows nothing but Parquet.

    It opens each file once: pq.read_table of a *path* opens it twice, and fails where it was replaced
    in between.
    """
    clips = defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            table = file.read(["video_id", "clip_index"])
        for row in table.to_pylist():
            clips[row["video_id"]].append(row["clip_index"])
    return {video_id: sorted(clips[video_id]) for video_id in sorted(clips)}


def row_counts(store: FeatureStore) -> list[int]:
    return sorted(pq.read_metadata(shard).num_rows for shard in store.shards())


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Holds a, b, c in one shard, d, e in another."""
    store = FeatureStore(tmp_path / "features")
    with store.writing(SPEC):
        add(store, rows("c", "a", "b", label="x"), rows("e", "d", label="y", group="g"), shard_rows=3)
    return store


# --- reading ----------------------------------------------------------------------------------------


def test_what_is_written_reads_as_it_was(store: FeatureStore) -> None:
    table = FeatureStore(store.path).read(["video_id", "label", "group", "features"])
    assert table.column_names == ["video_id", "label", "group", "features"]
    assert table["video_id"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert table["label"].to_pylist() == ["x", "x", "x", "y", "y"]
    assert table["group"].to_pylist() == [None, None, None, "g", "g"]
    expected = np.stack([vector(video_id) for video_id in "abcde"])
    np.testing.assert_array_equal(features_array(table["features"], SPEC), expected)
    assert store.spec() == SPEC
    assert json.loads((store.path / "features.json").read_text())["fingerprint"] == SPEC.fingerprint


def test_plain_pyarrow_reads_tensors(store: FeatureStore) -> None:
    column = pq.read_table(store.shards()[0])["features"].combine_chunks()
    assert column.type == pa.fixed_shape_tensor(pa.float16(), (SPEC.steps, SPEC.dim))
    assert column.to_numpy_ndarray().shape[1:] == (SPEC.steps, SPEC.dim)
    assert pq.read_metadata(store.shards()[0]).row_group(0).column(0).compression == "ZSTD"


def test_a_failed_video_has_no_features(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        add(store, rows("a"), rows("b", outcome="failed", reason="damaged", message="cut"))
    table = store.read(["outcome", "reason", "message", "features"])
    assert table.drop_columns(["features"]).to_pylist() == [
        {"outcome": "ok", "reason": None, "message": None},
        {"outcome": "failed", "reason": "damaged", "message": "cut"},
    ]
    assert table["features"].is_null().to_pylist() == [False, True]
    expected = [vector("a"), np.zeros((SPEC.steps, SPEC.dim))]
    np.testing.assert_array_equal(features_array(table["features"], SPEC), expected)


def test_an_empty_store(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    assert not store.exists() and list(store.index()) == []
    with store.writing(SPEC):
        pass
    assert store.exists() and store.read(["video_id", "features"]).num_rows == 0
    assert features_array(store.read(["features"])["features"], SPEC).shape == (0, SPEC.steps, SPEC.dim)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "--features {path}: no feature store there; run python -m raypipe.extract first, "
         "or name the folder it wrote"),
        ("{", "{path}/features.json: cannot be read: "),
        ('{"schema_version": 99}', "{path}/features.json: is not of schema_version 2, which this version "
         "of raypipe reads; extract the features again"),
        ('{"schema_version": 2}', "{path}/features.json: is not of schema_version 2, which"),
        ("[]", "{path}/features.json: is not of schema_version 2, which"),
    ],
    ids=["none", "broken", "another version", "half", "a list"],
)  # fmt: skip
def test_no_store_to_read(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "features.json").write_text(content)
    with pytest.raises(UserError) as caught:
        FeatureStore(tmp_path).spec()
    assert str(caught.value).startswith(said.replace("{path}", str(tmp_path)))


def test_a_shard_that_something_damaged_is_named(store: FeatureStore) -> None:
    shard = store.shards()[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        store.read(["label"])
    assert str(caught.value).startswith(f"{shard}: cannot be read: ")
    assert "delete it and run raypipe.extract again" in str(caught.value)


@pytest.mark.parametrize("field", ["frames", "view", "motion_gap_s", "weights_digest", "dim"])
def test_fingerprints_differ_where_a_field_does(field: str) -> None:
    other = replace(SPEC, **{field: "other" if isinstance(getattr(SPEC, field), str) else 9})
    assert other.fingerprint != SPEC.fingerprint == replace(SPEC).fingerprint


# --- one writer, one kind of features ---------------------------------------------------------------


def test_other_features_are_refused_by_name(store: FeatureStore) -> None:
    with pytest.raises(UserError) as caught, store.writing(replace(SPEC, view="both", dim=16)):
        pass
    assert str(caught.value) == (
        f"--output {store.path}: holds other features: view is rgb there and both here, "
        "dim is 8 there and 16 here; choose another --output"
    )
    assert store.spec() == SPEC


def hold(path: Path, held: Any, release: Any) -> None:
    with FeatureStore(path).writing(SPEC):
        held.set()
        release.wait()


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_second_writer_is_refused_until_the_first_is_gone(end: str, store: FeatureStore) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    first = context.Process(target=hold, args=(store.path, held, release), daemon=True)
    first.start()
    assert held.wait(20)
    with pytest.raises(UserError) as caught, store.writing(SPEC):
        pass
    assert str(caught.value) == f"--output {store.path}: another run is writing there; wait for it"
    assert stored(store) == list("abcde")  # reading goes on
    release.set() if end == "finished" else first.kill()
    first.join()
    with store.writing(SPEC):
        add(store, rows("f"))
    assert stored(store) == list("abcdef")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(UserError) as caught, FeatureStore(path).writing(SPEC):
            pass
        assert str(caught.value) == f"--output {path}: cannot be written: {reason}"


# --- writing ----------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_not_seen_and_cleaned(store: FeatureStore) -> None:
    store.staging.mkdir()
    stage_shard(rows("z"), store.staging)
    half = (store.path / store.shards()[0]).read_bytes()[:100]
    (store.path / f".{store.shards()[0].name}.123").write_bytes(half)
    assert stored(store) == list("abcde")
    with store.writing(SPEC):
        assert list(store.staging.iterdir()) == []
        add(store, rows("z"))
    assert stored(store) == list("abcdez")
    assert not store.staging.exists()


def ended(shard: str, shards: list[str]) -> dict[str, int]:
    """What workers tell of a shard of all these: how many clips each video has whose last one is in it."""
    counts: dict[str, int] = {}
    for video_id, index in named(*" ".join(shards).split()):
        counts[video_id] = max(counts.get(video_id, 0), index + 1)
    return {video_id: counts[video_id] for video_id, i in named(*shard.split()) if i + 1 == counts[video_id]}


ONCE = [
    ["a b", "c"],
    ["a.0 a.1 b", "c.0 c.1"],
    ["a.0 a.1", "a.2 b"],
    ["a.2 b", "a.1", "a.0"],  # the last clip first
    ["a.0 b.0 c.0", "c.1 b.1", "a.1"],
    ["a.0 b.1", "b.0 c.0", "c.1 a.1"],
    ["a.0", "a.1 b.0", "b.1"],  # a has as many rows as the shard
]
TWICE = [
    ["a b", "b a"],
    ["a b", "b c", "c a"],
    ["a.0 b", "a.0 a.1", "a.1 b"],
    ["a.0 a.1 b.0", "b.0 a.1 b.1", "b.1 b.0 a.0"],
    ["a.0 a.0 a.1 b"],  # both times in one shard
    ["a.1 b.0", "a.1 a.0 b.0", "c b.1"],
]


@pytest.mark.parametrize("shard_rows", [1, 3, 64])
@pytest.mark.parametrize("shards", ONCE + TWICE, ids=", ".join)
def test_a_video_is_seen_once_and_when_all_its_clips_are_there(
    shards: list[str], shard_rows: int, tmp_path: Path
) -> None:
    store, visible = FeatureStore(tmp_path), {}
    with store.writing(SPEC):
        commits = Commits(store, shard_rows=shard_rows)
        for i, shard in enumerate(shards):
            staged = stage_shard(rows(*shard.split()), store.staging)
            assert seen(tmp_path) == visible  # staging shows nothing
            became = commits.add(staged, ended(shard, shards))
            there = set(named(*" ".join(shards[: i + 1]).split()))
            counts = ended(" ".join(shards), shards)
            now = {
                video_id: list(range(count))
                for video_id, count in counts.items()
                if there >= {(video_id, index) for index in range(count)}
            }
            assert seen(tmp_path) == now
            assert sorted(became) == sorted(now.keys() - visible.keys())
            visible = now
        assert visible and commits.done == visible.keys()
    table = store.read(["video_id", "clip_index", "features"])
    expected = [vector(f"{row['video_id']}.{row['clip_index']}") for row in table.to_pylist()]
    np.testing.assert_array_equal(features_array(table["features"], SPEC), expected)


@pytest.mark.parametrize("shards", ONCE, ids=", ".join)
def test_a_staged_shard_is_removed_when_all_its_rows_are_visible(shards: list[str], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        commits = Commits(store)
        names = [stage_shard(rows(*shard.split()), store.staging) for shard in shards]
        for i, (staged, shard) in enumerate(zip(names, shards, strict=True)):
            commits.add(staged, ended(shard, shards))
            needed = {
                name
                for name, other in zip(names, shards, strict=True)
                if name not in names[: i + 1] or {v for v, _ in named(*other.split())} - commits.done
            }
            assert {path.name for path in store.staging.iterdir()} == needed
        assert not needed


@pytest.mark.parametrize(
    "shards",
    [
        pytest.param(["a b", "a b"], id="grouped alike"),
        pytest.param(["a", "b", "a b"], id="grouped as the driver does"),
        pytest.param(["a.0 b", "a.0 b", "a.1"], id="while it waits"),
    ],
)
def test_a_shard_staged_twice_before_it_is_taken(shards: list[str], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        commits = Commits(store)
        names = [stage_shard(rows(*shard.split()), store.staging) for shard in shards]
        for staged, shard in zip(names, shards, strict=True):
            commits.add(staged, ended(shard, shards))
        assert commits.done == set("ab")
    assert {video_id: clips[0] for video_id, clips in seen(tmp_path).items()} == {"a": 0, "b": 0}


@pytest.mark.parametrize("again", ["a b", "b a", "a"])
def test_a_staged_shard_without_anything_new_is_removed(again: str, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        commits = Commits(store)
        for shard in ("a b", again):
            commits.add(stage_shard(rows(*shard.split()), store.staging), ended(shard, [shard]))
        assert list(store.staging.iterdir()) == []


@pytest.mark.parametrize("first", ["a.0", "a.0 a.1"])
def test_a_second_attempt_that_failed_does_not_pass_for_the_first(first: str, tmp_path: Path) -> None:
    """A worker died after some windows; done again, the video timed out: a failed row, its only one."""
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        commits = Commits(store)
        commits.add(stage_shard(rows(*first.split()), store.staging), {})
        failed = stage_shard(rows("a.0", outcome="failed", reason="timeout"), store.staging)
        assert commits.add(failed, {"a": 1}) == ["a"]
        assert list(store.staging.iterdir()) == []
    assert store.read(["video_id", "outcome"]).to_pylist() == [{"video_id": "a", "outcome": "failed"}]


@pytest.mark.parametrize("shards", [["a.0 a.1 d"], ["a.1 d", "a.0"], ["a.1", "a.0", "d z"]], ids=", ".join)
def test_replaced_rows_stay_until_the_new_ones_are_there(shards: list[str], store: FeatureStore) -> None:
    """a has one clip, now two; d one clip, now one of another file; z is new; all else stays as it was."""
    files, views = store.shards(), []

    def look() -> None:
        table = store.read(["video_id", "clip_index", "label"]).to_pylist()
        views.append({v: [r["label"] for r in table if r["video_id"] == v] for v in "abcdez"})

    with store.writing(SPEC), around_renames(look):
        commits = Commits(store, shard_rows=3, replaced=["a", "d"])
        for shard in shards:
            commits.add(stage_shard(rows(*shard.split(), label="new"), store.staging), ended(shard, shards))
    for view in views:
        assert view["a"] in (["x"], ["new"] * 2) and view["d"] in (["y"], ["new"])
        assert (view["b"], view["c"], view["e"]) == (["x"], ["x"], ["y"])
    assert views[0]["a"] == ["x"] and views[0]["d"] == ["y"]
    assert views[-1]["a"] == ["new"] * 2 and views[-1]["d"] == ["new"]
    assert [v["a"] for v in views] == sorted((v["a"] for v in views), reverse=True)  # never back
    assert store.shards() == files  # their names stay


@contextmanager
def around_renames(look: Callable[[], object]) -> Iterator[None]:
    """Looks just before and after every rename out of the staging folder: at all that a reader can ever see
    meanwhile, however fast it looks."""
    rename = os.replace

    def looked_at(source: Any, target: Any) -> None:
        is_shown = Path(target).parent.name != ".staging"
        if is_shown:
            look()
        rename(source, target)
        if is_shown:
            look()

    with mock.patch("os.replace", looked_at):
        yield


def test_one_rename_shows_a_video_and_what_is_renamed_is_on_disk(tmp_path: Path) -> None:
    """A power cut loses what was not synced: the file must be before it has its name, the folder after."""
    events: list[tuple[str, int, str]] = []
    rename, sync = os.replace, os.fsync

    def renamed(source: Any, target: Any) -> None:
        events.append(("rename", os.stat(source).st_ino, str(target)))
        rename(source, target)

    def synced(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino, ""))
        sync(descriptor)

    store, shards = FeatureStore(tmp_path), ["a.0 b", "a.1", "c", "c a.0"]
    with store.writing(SPEC), mock.patch("os.replace", renamed), mock.patch("os.fsync", synced):
        commits = Commits(store)
        for shard in shards:
            commits.add(stage_shard(rows(*shard.split()), store.staging), ended(shard, shards))
    shown = [i for i, (_, _, target) in enumerate(events) if Path(target).parent == tmp_path]
    assert len(shown) == 3  # of b, of a and of c
    folder = tmp_path.stat().st_ino
    for i in shown:
        assert ("sync", events[i][1], "") in events[:i]
        assert events[i + 1] == ("sync", folder, "")


def test_many_small_runs_leave_few_shards(tmp_path: Path) -> None:
    store, total = FeatureStore(tmp_path), 0
    with store.writing(SPEC):
        for i in range(200):
            clips = [f"v{i}.{index}" for index in range(1 + i % 2)]
            add(store, rows(*clips), shard_rows=16)
            total += len(clips)
    counts = row_counts(store)
    assert sum(counts) == total == 300 and max(counts) <= 16
    assert len(counts) <= total / (16 / 2)
    assert seen(tmp_path) == dict(sorted((f"v{i}", list(range(1 + i % 2))) for i in range(200)))


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([2, 2], [4]),
        ([2, 3], [2, 3]),  # no room for the second
        ([4, 1], [1, 4]),
        ([3, 2, 1, 2], [2, 3, 3]),
        ([1] * 9, [1, 4, 4]),
        ([9], [9]),  # a video is never in two shards
        ([1, 9, 3], [4, 9]),
    ],
)
def test_new_rows_join_the_last_shard_while_it_has_room(
    sizes: list[int], counts: list[int], tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        tables = [rows(*(f"v{i}.{k}" for k in range(size))) for i, size in enumerate(sizes)]
        add(store, *tables, shard_rows=4)
    assert row_counts(store) == counts


def test_a_video_of_many_clips_is_one_shard_in_row_groups(tmp_path: Path) -> None:
    """A row group is what is in memory at once."""
    clips = [f"a.{index}" for index in range(2 * ROW_GROUP_ROWS + 100)]
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        commits = Commits(store)
        random.Random(0).shuffle(clips)
        for first in range(0, len(clips), 64):
            some = clips[first : first + 64]
            commits.add(stage_shard(rows(*some), store.staging), ended(" ".join(some), clips))
        assert list(store.staging.iterdir()) == []
    (shard,) = store.shards()
    metadata = pq.read_metadata(shard)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(groups) == len(clips) and len(groups) == 3
    assert max(groups) < ROW_GROUP_ROWS + 64
    table = store.read(["features"])
    np.testing.assert_array_equal(features_array(table["features"], SPEC)[1], vector("a.1"))


def test_relabel(store: FeatureStore) -> None:
    untouched = store.shards()[0].stat().st_mtime_ns, store.shards()[1].stat().st_mtime_ns
    with store.writing(SPEC):
        store.relabel({})
        store.relabel({"b": Video("b", "/b", "new", "h", "test"), "nobody": Video("nobody", "/n")})
    now = store.shards()[0].stat().st_mtime_ns, store.shards()[1].stat().st_mtime_ns
    assert sum(a == b for a, b in zip(untouched, now, strict=True)) == 1
    table = store.read(["video_id", "label", "group", "split", "path", "features"])
    assert table.select(["label", "group", "split"]).to_pylist() == [
        {"label": "x", "group": None, "split": None},
        {"label": "new", "group": "h", "split": "test"},
        {"label": "x", "group": None, "split": None},
        {"label": "y", "group": "g", "split": None},
        {"label": "y", "group": "g", "split": None},
    ]
    assert set(table["path"].to_pylist()) == {"/v.mp4"}
    np.testing.assert_array_equal(features_array(table["features"], SPEC)[1], vector("b"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, b"older")
    write_atomically(file, b"old")
    assert list(tmp_path.iterdir()) == [file]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(file, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"


# --- what there is to do ----------------------------------------------------------------------------

INDEX = pa.Table.from_pylist(
    [
        {"video_id": video_id, "size_bytes": size, "modified_s": modified_s, "label": "x", "outcome": outcome}
        for video_id, size, modified_s, outcomes in [
            ("good", 5, 1.25, ["ok"]),
            ("partial", 5, 1.25, ["partial"]),
            ("bad", 5, 1.25, ["failed"]),
            ("gone", None, None, ["failed"]),
            ("windows", 5, 1.25, ["ok", "partial", "ok"]),
            ("first window bad", 5, 1.25, ["failed", "ok", "ok"]),
            ("one window bad", 5, 1.25, ["ok", "failed", "ok"]),
            ("last window bad", 5, 1.25, ["ok", "ok", "failed"]),
        ]
        for outcome in outcomes
    ],
    schema=pa.schema([ROW_SCHEMA.field(name) for name in INDEX_COLUMNS]),
)


def video(video_id: str, size_bytes: int | None = 5, modified_s: float | None = 1.25, **words: str) -> Video:
    labels = {"label": "x"} | words
    return Video(video_id, f"/{video_id}", size_bytes=size_bytes, modified_s=modified_s, **labels)


@pytest.mark.parametrize(
    ("listed", "planned", "planned_with_retry_failed"),
    [
        (video("good"), "done", "done"),
        (video("new"), "new", "new"),
        (video("new", None, None), "new", "new"),  # a manifest's, missing
        (video("good", size_bytes=6), "replaced", "replaced"),
        (video("good", modified_s=1.5), "replaced", "replaced"),
        (video("good", None, None), "replaced", "replaced"),  # it is gone now
        (video("good", size_bytes=6, label="y"), "replaced", "replaced"),
        (video("good", label="y"), "relabelled", "relabelled"),
        (video("good", group="g"), "relabelled", "relabelled"),
        (video("good", split="test"), "relabelled", "relabelled"),
        (video("partial"), "done", "done"),
        (video("bad"), "done", "replaced"),
        (video("bad", label="y"), "relabelled", "replaced"),
        (video("bad", size_bytes=6), "replaced", "replaced"),
        (video("gone", None, None), "done", "replaced"),
        (video("gone"), "replaced", "replaced"),  # it is there now
        (video("windows"), "done", "done"),
        (video("windows", size_bytes=6), "replaced", "replaced"),
        (video("windows", label="y"), "relabelled", "relabelled"),
        (video("first window bad"), "done", "replaced"),
        (video("one window bad"), "done", "replaced"),
        (video("last window bad"), "done", "replaced"),
        (video("one window bad", label="y"), "relabelled", "replaced"),
    ],
)
@pytest.mark.parametrize("retry_failed", [False, True])
def test_plan(listed: Video, planned: str, planned_with_retry_failed: str, retry_failed: bool) -> None:
    plan = plan_run([listed], [INDEX], retry_failed=retry_failed)
    expected = planned_with_retry_failed if retry_failed else planned
    assert plan.new == [listed] * (expected == "new")
    assert plan.replaced == [listed] * (expected == "replaced")
    assert plan.relabelled == ({listed.video_id: listed} if expected == "relabelled" else {})
    assert plan.todo == plan.new + plan.replaced and plan.done == 1 - len(plan.todo)


def test_a_plan_keeps_the_order_of_the_list_and_leaves_unlisted_videos_alone() -> None:
    listed = [video("z"), video("one window bad"), video("good"), video("a"), video("bad"), video("gone")]
    plan = plan_run(listed, [INDEX], retry_failed=True)
    assert [v.video_id for v in plan.new] == ["z", "a"]
    assert [v.video_id for v in plan.replaced] == ["one window bad", "bad", "gone"]
    assert (plan.done, plan.relabelled) == (1, {})


def test_planning_holds_the_rows_of_one_shard_at_a_time() -> None:
    listed = [video(f"{n:06}") for n in range(20_000)]
    ids = [one.video_id for one in listed]

    def shards() -> Iterator[pa.Table]:
        for start in range(0, len(ids), 1000):
            rows = INDEX.slice(0, 1).to_pylist() * 1000
            yield pa.Table.from_pylist(
                [row | {"video_id": one} for row, one in zip(rows, ids[start : start + 1000], strict=True)],
                schema=INDEX.schema,
            )

    tracemalloc.start()
    plan = plan_run(listed, shards(), retry_failed=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.done == 20_000 and peak < 150 * len(listed), "bytes a video, where rows as dicts take 800"


def test_made_up_stores_are_real_ones(tmp_path: Path) -> None:
    """The other tests' stores obey the same schema."""
    store = make_store(tmp_path, clips=4, failed=1)
    assert pq.read_schema(store.shards()[0]).equals(SPEC.shard_schema)
    assert stored(store) == [f"clip{i:03}.mp4" for i in range(5)]


# --- any order of events, and a crash at any of them -------------------------------------------------


@dataclass(frozen=True)
class Footage:
    """What extracting a video gives at the moment."""

    take: int
    """Another one whenever it gives something else."""
    clips: int
    failed: bool

    @property
    def digest(self) -> str:
        return f"{self.take}/{self.clips}"


Group = list[tuple[str, int]]
"""The clips that a worker stages together, each as video and number."""


def whole_videos(folder: Path) -> dict[str, tuple[str, str]]:
    """Digest and label of each video to a reader that knows nothing but Parquet; asserts that each is whole:
    every clip there, once, and all of one take."""
    clips = defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            table = file.read(["video_id", "clip_index", "content_digest", "label"])
        for row in table.to_pylist():
            clips[row["video_id"]].append((row["clip_index"], row["content_digest"], row["label"]))
    videos = {}
    for video_id, rows_there in clips.items():
        ((digest, label),) = {row[1:] for row in rows_there}
        indices = sorted(index for index, _, _ in rows_there)
        assert indices == list(range(int(digest.split("/")[1]))), (video_id, rows_there)
        videos[video_id] = (digest, label)
    return videos


def staged_rows(group: Group, listed: dict[str, Video], footage: dict[str, Footage]) -> pa.Table:
    found = []
    for video_id, index in group:
        film, failed = footage[video_id], footage[video_id].failed and index == 0
        columns = asdict(listed[video_id]) | {"clip_index": index, "content_digest": film.digest}
        found.append(columns | {"outcome": "failed" if failed else "ok"})
    features = [None if row["outcome"] == "failed" else b"\0" * 2 * SPEC.steps * SPEC.dim for row in found]
    return shard_table(pa.Table.from_pylist(found, schema=ROW_SCHEMA), features, SPEC)


def grouped(clips: Group, rng: random.Random) -> list[Group]:
    """The clips in shards as workers may stage them: any order and size, some twice, some shards too."""
    groups: list[Group] = []
    for some in (clips, rng.sample(clips, rng.randint(0, len(clips)))):
        left = rng.sample(some, len(some))
        while left:
            size = rng.randint(1, 4)
            groups.append(left[:size])
            left = left[size:]
    groups += rng.sample(groups, rng.randint(0, min(2, len(groups))))
    return rng.sample(groups, len(groups))


def extract(
    store: FeatureStore,
    listed: dict[str, Video],
    footage: dict[str, Footage],
    rng: random.Random,
    *,
    retry_failed: bool,
    tell: Callable[[list[str]], object],
) -> None:
    """A run without Ray and decoding: up to three shards are staged ahead of the one that is committed."""
    with store.writing(SPEC):
        plan = plan_run(list(listed.values()), store.index(), retry_failed=retry_failed)
        store.relabel(plan.relabelled)
        replaced = [video.video_id for video in plan.replaced]
        commits = Commits(store, shard_rows=rng.choice([2, 4, 8]), replaced=replaced)
        ids = [video.video_id for video in plan.todo]
        waiting: list[tuple[str, dict[str, int]]] = []
        for group in grouped([(v, i) for v in ids for i in range(footage[v].clips)], rng):
            last = {v: i + 1 for v, i in group if i + 1 == footage[v].clips}
            waiting.append((stage_shard(staged_rows(group, listed, footage), store.staging), last))
            while len(waiting) > rng.randint(0, 3):
                tell(commits.add(*waiting.pop(0)))
        for staged, last in waiting:
            tell(commits.add(staged, last))
        assert commits.done == set(ids)


def forked(work: Callable[[], object]) -> int:
    """The id of a child process that does this work and exits with 0, or with 1 where it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)  # a child that hangs is killed, and seen to be
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


FILE_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def kill_at_change(number: int) -> None:
    """SIGKILL for this process when it is about to change a file system for the `number`th time.

    A name made, given or removed: between two of these nothing changes but what is in a file that nobody
    sees yet, see `kill_at_size`. Python raises the event just before the system call. Nothing runs after
    the signal: no `finally`, no flushing of buffers.
    """
    left = number

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in FILE_CHANGES or writes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def kill_at_size(size_bytes: int) -> None:
    """The kernel kills this process in the middle of writing a file that is longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


Change = tuple[str, int, int, bool]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["new", "new", "another file", "another label", "would do now"]),
        st.integers(0, 20),
        st.integers(1, 5),
        st.booleans(),
    ),
    max_size=6,
)
SEEDS = st.integers(0, 999)
Crash = tuple[Callable[[int], None], int]
CRASHES = st.one_of(
    st.builds(lambda number: (kill_at_change, number), st.integers(3, 60)),
    st.builds(lambda size: (kill_at_size, size), st.integers(6_200, 7_000)),
)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Runs over listings that change, some of them killed, and what a reader sees after and during each."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = FeatureStore(Path(self.folder.name) / "store")
        self.listed: dict[str, Video] = {}
        self.footage: dict[str, Footage] = {}
        self.visible: dict[str, str] = {}  # the digest of each video that the reader has seen
        self.takes = 0
        self.change("new", 0, clips=3, failed=True)

    def film(self, video_id: str, clips: int, failed: bool) -> None:
        self.takes += 1
        self.footage[video_id] = Footage(self.takes, clips, failed)

    def change(self, kind: str, which: int, clips: int, failed: bool) -> None:
        """One event since the last run: a new video, or something about one that is listed."""
        if kind == "new":
            video_id = f"v{len(self.listed)}"
            self.listed[video_id] = Video(video_id, "/v", label="x", size_bytes=0, modified_s=0.0)
            self.film(video_id, clips, failed)
            return
        video_id = list(self.listed)[which % len(self.listed)]
        old = self.listed[video_id]
        if kind == "another file":
            self.listed[video_id] = replace(old, size_bytes=old.size_bytes + 1)
            self.film(video_id, clips, failed)
        elif kind == "another label":
            self.listed[video_id] = replace(old, label="xyz"[clips % 3])
        elif self.footage[video_id].failed:  # "would do now"
            self.film(video_id, clips, False)

    @rule(changes=CHANGES, seed=SEEDS, retry_failed=st.booleans())
    def a_run(self, changes: list[Change], seed: int, retry_failed: bool) -> None:
        for change in changes:
            self.change(*change)
        plan, told = self.plan(retry_failed), []
        with around_renames(lambda: self.look(plan.todo)):
            extract(
                self.store, self.listed, self.footage, random.Random(seed),
                retry_failed=retry_failed, tell=told.extend,
            )  # fmt: skip
        self.finished(plan, told, retry_failed)

    @rule(changes=CHANGES, seed=SEEDS, retry_failed=st.booleans(), crash=CRASHES)
    def a_killed_run(self, changes: list[Change], seed: int, retry_failed: bool, crash: Crash) -> None:
        for change in changes:
            self.change(*change)
        plan = self.plan(retry_failed)
        reading, writing = os.pipe()
        arm, at = crash

        def work() -> None:
            arm(at)
            extract(
                self.store, self.listed, self.footage, random.Random(seed), retry_failed=retry_failed,
                tell=lambda ids: os.write(writing, "".join(f"{v}\n" for v in ids).encode()),
            )  # fmt: skip

        child = forked(work)
        os.close(writing)
        with open(reading) as pipe:
            told = pipe.read().split()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:  # it was done before it came to that
            self.finished(plan, told, retry_failed)
            return
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ)
        self.look(plan.todo)
        assert all(self.visible[v] == self.footage[v].digest for v in told)

    def plan(self, retry_failed: bool) -> Plan:
        return plan_run(list(self.listed.values()), self.store.index(), retry_failed=retry_failed)

    def look(self, todo: list[Video]) -> None:
        """What a reader sees while a run is doing `todo`."""
        now = whole_videos(self.store.path)
        assert now.keys() >= self.visible.keys()
        extracted = {video.video_id for video in todo}
        for video_id, (digest, _) in now.items():
            is_new = video_id in extracted and digest == self.footage[video_id].digest
            assert is_new or digest == self.visible.get(video_id)
        self.visible = {video_id: digest for video_id, (digest, _) in now.items()}

    def finished(self, plan: Plan, told: list[str], retry_failed: bool) -> None:
        self.look(plan.todo)
        assert sorted(told) == sorted(video.video_id for video in plan.todo)
        assert all(self.visible[v] == self.footage[v].digest for v in told)
        there = whole_videos(self.store.path)
        assert {v: label for v, (_, label) in there.items()} == {v: x.label for v, x in self.listed.items()}
        names = {path.name for path in self.store.path.iterdir() if not path.name.startswith("part-")}
        assert names - {f for f in names if f.startswith(".features.json.")} == {"features.json", ".lock"}
        again = self.plan(False)
        assert (again.todo, again.relabelled, again.done) == ([], {}, len(self.listed))
        if retry_failed:
            still = [v for v in self.plan(True).todo if not self.footage[v.video_id].failed]
            assert still == []

    def teardown(self) -> None:
        with self.folder:
            self.a_run([], seed=0, retry_failed=True)
            assert self.visible == {video_id: film.digest for video_id, film in self.footage.items()}


@forks
def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        AnyOrderOfEvents,
        settings=settings(
            max_examples=15,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # making a failure smaller takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


@forks
@pytest.mark.parametrize("seed", range(2))
def test_a_writer_killed_at_random_moments_under_a_readers_eyes(seed: int, tmp_path: Path) -> None:
    """The writer extracts, changes and relabels videos without end; it is killed nine times."""
    store, rng = FeatureStore(tmp_path / "store"), random.Random(seed)

    def write() -> None:
        mine = random.Random(rng.random())
        take = time.time_ns()
        while True:
            listed, footage = {}, {}
            for number in range(12):
                take += 1
                video_id = f"v{number}"
                changed = mine.random() < 0.5
                listed[video_id] = Video(
                    video_id,
                    "/v",
                    label=mine.choice("xyz"),
                    size_bytes=take if changed else 0,
                    modified_s=0.0,
                )
                footage[video_id] = Footage(take, mine.randint(1, 5), mine.random() < 0.3)
            extract(store, listed, footage, mine, retry_failed=True, tell=len)

    def read() -> None:
        known: set[str] = set()
        changes, before = 0, None
        while not (tmp_path / "enough").exists():
            now = whole_videos(store.path)
            assert now.keys() >= known
            known, changes, before = set(now), changes + (now != before), now
        assert known and changes > 1

    reader = forked(read)
    for _ in range(9):
        writer = forked(write)
        time.sleep(rng.uniform(0.1, 0.6))
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
        whole_videos(store.path)
    (tmp_path / "enough").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0
    with store.writing(SPEC):  # the lock went with the writer
        assert list(store.staging.iterdir()) == []


def test_a_store_from_before_the_policies_is_one_of_uniform_sampling(tmp_path: Path) -> None:
    content = asdict(SPEC)
    del content["policy"], content["sample_fps"]
    (tmp_path / "features.json").write_text(json.dumps(content))
    assert FeatureStore(tmp_path).spec() == SPEC
    assert SPEC.fingerprint != replace(SPEC, policy="middle").fingerprint


def test_other_policies_do_not_mix(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        pass
    with pytest.raises(UserError, match="policy is uniform there and middle here"):
        store.refuse_other(replace(SPEC, policy="middle"))
