"""What a run has to do: the listed videos less those that the store holds unchanged."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

import numpy as np
import pyarrow as pa

from raypipe.schema import INDEX_COLUMNS, Outcome
from raypipe.shards import rows_of
from raypipe.videos import Video


@dataclass(frozen=True)
class Plan:
    """What a run has to do for a listing, given what the store holds."""

    new: list[Video]
    replaced: list[Video]
    """Videos with rows that new ones take the place of: the file changed, or it failed and is tried again."""
    relabelled: dict[str, Video]
    """Videos already extracted whose label, group or split is another one now."""
    done: int

    @property
    def todo(self) -> list[Video]:
        return self.new + self.replaced


def plan_run(videos: list[Video], index: Iterable[pa.Table], *, retry_failed: bool) -> Plan:
    """The listing's videos less those the store holds unchanged; pure. `index` has INDEX_COLUMNS."""
    positions = {video.video_id: position for position, video in enumerate(videos)}
    standing = np.full(len(videos), _NEW, np.int8)
    for video_id, *row in rows_of(table.select(INDEX_COLUMNS) for table in index):
        if (position := positions.get(video_id)) is not None:
            now = _standing(videos[position], *row, retry_failed=retry_failed)
            standing[position] = max(standing[position], now)
    relabelled = compress(videos, standing == _RELABELLED)
    return Plan(
        new=list(compress(videos, standing == _NEW)),
        replaced=list(compress(videos, standing == _REPLACED)),
        relabelled={video.video_id: video for video in relabelled},
        done=int(np.isin(standing, [_DONE, _RELABELLED]).sum()),
    )


_NEW, _DONE, _RELABELLED, _REPLACED = range(4)
"""How a listed video stands to a row of it. Of several rows the greatest counts."""


def _standing(
    video: Video,
    size_bytes: int | None,
    modified_s: float | None,
    label: str | None,
    group: str | None,
    split: str | None,
    outcome: Outcome,
    *,
    retry_failed: bool,
) -> int:
    if (size_bytes, modified_s) != (video.size_bytes, video.modified_s):
        return _REPLACED
    if retry_failed and outcome == "failed":
        return _REPLACED
    return _DONE if (label, group, split) == (video.label, video.group, video.split) else _RELABELLED
