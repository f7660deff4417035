"""From the shards that workers staged to rows that readers see."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa

from raypipe.shards import read_table, row_count
from raypipe.storage import Place
from raypipe.store import FeatureStore


@dataclass(frozen=True)
class StagedRow:
    """Where a row is before it is committed."""

    shard: str
    number: int


class Commits:
    """Makes staged rows visible: a video when all its clips are there, once, in place of its old rows.

    New rows join the last shard as long as it has room, so that many small runs leave few shards.
    """

    def __init__(
        self, store: FeatureStore, *, shard_rows: int = 64, replaced: Collection[str] = frozenset()
    ) -> None:
        self._store, self._shard_rows = store, shard_rows
        self._homes = store.homes(replaced)
        self._staged: dict[str, dict[int, StagedRow]] = {}  # of the clips whose video is not whole yet
        self._counts: dict[str, int] = {}
        self._taken: set[str] = set()
        self._left = Counter[str]()  # rows of a staged shard that are still to be committed
        self._room = store.smallest_shard()
        self.done: set[str] = set()
        """Ids of the videos made visible."""

    def add(self, staged: str, clip_counts: Mapping[str, int]) -> list[str]:
        """Takes a staged shard; returns the ids of the videos that became visible.

        `clip_counts` has the number of clips of each video whose last clip is in this shard.
        """
        self._left.setdefault(staged, 0)
        whole = [] if staged in self._taken else self._take(staged, clip_counts)
        by_home: dict[Place | None, list[str]] = {}
        for video_id in whole:
            by_home.setdefault(self._homes.get(video_id), []).append(video_id)
        for home, videos in by_home.items():
            if home:
                self._store.replace(home, chain([self._store.rows_without(home, videos)], self._rows(videos)))
            else:
                self._append(videos)
        self._forget(whole)
        return whole

    def _take(self, staged: str, clip_counts: Mapping[str, int]) -> list[str]:
        """Notes which rows of a staged shard are to be committed; returns the videos that are whole now."""
        self._taken.add(staged)
        self._counts |= clip_counts
        table = read_table(self._store.staging / staged, columns=["video_id", "clip_index"])
        ids, indices = table["video_id"].to_pylist(), table["clip_index"].to_pylist()
        for number, (video_id, index) in enumerate(zip(ids, indices, strict=True)):
            if video_id in self.done:  # Ray computed it twice
                continue
            rows = self._staged.setdefault(video_id, {})
            # A clip that came before stays, but for the one that ends the video: where it ended earlier
            # this time, in a failure, that is what there is to know of it.
            if index not in rows or index == clip_counts.get(video_id, 0) - 1:
                if index in rows:
                    self._left[rows[index].shard] -= 1
                rows[index] = StagedRow(staged, number)
                self._left[staged] += 1
        return [v for v in dict.fromkeys(ids) if v not in self.done and self._is_whole(v)]

    def _is_whole(self, video_id: str) -> bool:
        count = self._counts.get(video_id)
        return count is not None and self._staged[video_id].keys() >= set(range(count))

    def _append(self, videos: list[str]) -> None:
        """Makes new videos visible."""
        added = sum(self._counts[video_id] for video_id in videos)
        if self._room and row_count(self._room) + added <= self._shard_rows:
            before = self._store.rows_without(self._room, ())
            self._store.replace(self._room, chain([before], self._rows(videos)))
            return
        entire = self._shard_of_only(videos)
        path = self._store.publish_staged(entire) if entire else self._store.publish(self._rows(videos))
        if added < self._shard_rows and isinstance(path, Path):
            self._room = path

    def _shard_of_only(self, videos: list[str]) -> str | None:
        """The staged shard that holds all rows of these videos and no others, where there is one.

        It is the usual case, and spares the driver to write what a worker has written.
        """
        rows = [row for video_id in videos for row in self._staged[video_id].values()]
        shards = {row.shard for row in rows}
        staged = shards.pop()
        whole = not shards and row_count(self._store.staging / staged) == len(rows)
        return staged if whole else None

    def _rows(self, videos: list[str]) -> Iterator[pa.Table]:
        """All rows of these videos, a table per staged shard."""
        by_shard: dict[str, list[int]] = {}
        for video_id in videos:
            for index in range(self._counts[video_id]):
                row = self._staged[video_id][index]
                by_shard.setdefault(row.shard, []).append(row.number)
        for staged, numbers in by_shard.items():
            yield self._store.read_staged(staged).take(sorted(numbers))

    def _forget(self, videos: list[str]) -> None:
        """Notes that they are visible, and removes the staged shards of which nothing else is needed."""
        for video_id in videos:
            self._left.subtract(row.shard for row in self._staged.pop(video_id).values())
        self.done.update(videos)
        for staged in [staged for staged, rows in self._left.items() if rows == 0]:
            (self._store.staging / staged).unlink(missing_ok=True)
            del self._left[staged]
