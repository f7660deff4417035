"""Exactly once: what a reader may see of the videos while shards are committed."""

import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from features import SPEC, add, around_renames, five_clips, named, rows, seen, vector

from raypipe.commits import Commits
from raypipe.shards import ROW_GROUP_ROWS, features_array, stage_shard
from raypipe.store import FeatureStore


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
def test_replaced_rows_stay_until_the_new_ones_are_there(shards: list[str], tmp_path: Path) -> None:
    """a has one clip, now two; d one clip, now one of another file; z is new; all else stays as it was."""
    store = five_clips(tmp_path)
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


def row_counts(store: FeatureStore) -> list[int]:
    return sorted(pq.read_metadata(shard).num_rows for shard in store.shards())


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
