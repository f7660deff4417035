"""Feature stores made up in a moment: what `tune` needs to be tested without extracting anything."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

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
