"""What Prometheus sees of a run: counters, gauges and histograms that each Ray node exports.

They count work that was done, so what Ray does again after a fault counts twice, and what a process did in
its last seconds may be missing; `summary.json` and `leaderboard.csv` are exact. What shows them is in
configs/monitoring/.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Upper bounds of the histograms' bins."""


class ExtractionMeter:
    """In a worker that embeds: what became of the clips that pass."""

    def __init__(self) -> None:
        self._videos = Counter("raypipe_videos", description="videos by outcome", tag_keys=("outcome",))
        self._frames = Counter("raypipe_frames", description="frames decoded that were asked for")
        self._bytes = Counter("raypipe_video_bytes", description="size of the files that were read")
        self._decode = Histogram("raypipe_decode_seconds", "CPU seconds to decode a clip", SECONDS)
        self._embed = Histogram("raypipe_embed_seconds", "CPU seconds to embed a clip", SECONDS)

    def add(self, row: Mapping[str, Any]) -> None:
        """A clip's row, as `EmbedClips` gives it; its video's outcome stands in the row of the last clip."""
        if row["video_outcome"]:
            self._videos.inc(1, {"outcome": row["video_outcome"]})
            if row["size_bytes"]:
                self._bytes.inc(row["size_bytes"])
        if row["frame_pts_s"]:
            self._frames.inc(len(row["frame_pts_s"]))
        for seconds, histogram in ((row["decode_cpu_s"], self._decode), (row["embed_cpu_s"], self._embed)):
            if seconds is not None:
                histogram.observe(seconds)


class RunMeter:
    """In the driver: how far a run is."""

    def __init__(self) -> None:
        self._left = Gauge("raypipe_videos_left", description="videos that are not stored yet")
        self._queued = Gauge("raypipe_queued", description="tables before a stage", tag_keys=("stage",))
        self._epochs = Counter("raypipe_trial_epochs", description="epochs by trial", tag_keys=("trial",))
        self._score = Gauge("raypipe_score", description="best so far by trial", tag_keys=("trial",))

    def videos_left(self, count: int) -> None:
        self._left.set(count)

    def queued(self, stage: str, tables: int) -> None:
        """So many tables of videos or clips wait before a stage of an extraction."""
        self._queued.set(tables, {"stage": stage})

    def epoch(self, trial: str, score: float) -> None:
        """A trial has trained one more epoch; `score`, by --metric, is that of its best one."""
        self._epochs.inc(1, {"trial": trial})
        self._score.set(score, {"trial": trial})
