"""Feature stores made up in a moment, without extracting anything."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.commits import Commits
from raypipe.schema import ROW_SCHEMA, FeatureSpec
from raypipe.shards import shard_table, stage_shard
from raypipe.store import FeatureStore

SPEC = FeatureSpec(
    frames=4,
    frame_size=32,
    view="rgb",
    motion_gap_s=0.0667,
    window_s=None,
    stride_s=None,
    min_frames=1,
    backbone="made_up",
    weights_digest="0" * 16,
    steps=4,
    dim=8,
)


def make_store(
    path: Path,
    *,
    clips: int = 60,
    classes: tuple[str, ...] = ("calm", "fight"),
    signal: float = 1.0,
    clips_per_group: int = 2,
    failed: int = 0,
    splits: tuple[str | None, ...] = (None,),
    grouped: bool = True,
    turned: Collection[str] = (),
) -> FeatureStore:
    """`clips` clips of classes in turn; the features of class k are shifted by k * signal. Those `turned`
    have the label of the next class, and features of the other sign."""
    rng = np.random.default_rng(0)
    rows, features = [], []
    for i in range(clips + failed):
        is_failed = i >= clips
        is_turned = f"clip{i:03}.mp4" in turned
        label = classes[(i // clips_per_group + is_turned) % len(classes)]
        rows.append(
            {
                "video_id": f"clip{i:03}.mp4",
                "clip_index": 0,
                "path": f"/videos/clip{i:03}.mp4",
                "label": label,
                "group": f"g{i // clips_per_group}" if grouped else None,
                "split": splits[i % len(splits)],
                "content_digest": f"{i:016x}",
                "outcome": "failed" if is_failed else "ok",
                "reason": "damaged" if is_failed else None,
            }
        )
        values = rng.normal(size=(SPEC.steps, SPEC.dim)) + signal * classes.index(label)
        values = -values if is_turned else values
        features.append(None if is_failed else values.astype(np.float16).tobytes())
    store = FeatureStore(path)
    with store.writing(SPEC):
        table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
        Commits(store).add(
            stage_shard(shard_table(table, features, SPEC), store.staging),
            {row["video_id"]: 1 for row in rows},
        )
    return store


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


def five_clips(path: Path) -> FeatureStore:
    """Holds a, b, c in one shard, d, e in another."""
    store = FeatureStore(path)
    with store.writing(SPEC):
        add(store, rows("c", "a", "b", label="x"), rows("e", "d", label="y", group="g"), shard_rows=3)
    return store
