"""What the worker processes of an extraction do: decode, embed, stage shards."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from raypipe.cluster import gpus_are_fake
from raypipe.containers import DecodeError
from raypipe.decode import ClipRequest, DecodedClip, FailedClip
from raypipe.frames import Pictures
from raypipe.monitoring import ExtractionMeter
from raypipe.outcomes import clip_name, printable, video_outcome
from raypipe.progress import Reporter
from raypipe.sandbox import Limits, Sandbox
from raypipe.schema import ROW_SCHEMA, FeatureSpec
from raypipe.shards import shard_table, stage_shard
from raypipe.videos import Video

MOST_PICTURES = 128
"""In one call of the network, which bounds the memory that it takes of a GPU: by default four clips."""
CLIPS_PER_TABLE = 64
"""Clips of a long video, 80 kB each by default, that a worker hands on together."""


def reporter_to(tally: Any) -> Reporter:
    return Reporter(tally, ray.get_runtime_context().get_actor_id() or "")


class DecodeClips:
    """Videos in, rows with their pictures out. Holds the child process that decodes."""

    def __init__(self, request: ClipRequest, limits: Limits, reporter: Reporter) -> None:
        self._sandbox, self._reporter = Sandbox(request, limits), reporter

    def __call__(self, videos: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for video in videos:
            name, rows = printable(video["video_id"]), clip_rows(Video(**video), self._sandbox)
            row: dict[str, Any] = {}
            while row.get("clips") is None:  # which a video's last clip has
                self._reporter.begin("decoding", name, tell=not row)
                row = next(rows)
                yield row


def clip_rows(video: Video, sandbox: Sandbox) -> Iterator[dict[str, Any]]:
    """The rows of a video, as FEATURES_SCHEMA has them but with pictures, or the reason, for features."""
    base: dict[str, Any] = asdict(video) | {"clip_index": 0}
    outcomes: list[str] = []
    spent_s = sandbox.cpu_s()
    try:
        for clip in sandbox.decode(video.path):
            row = base | clip_columns(clip)
            outcomes.append(row["outcome"])
            if clip.span.is_last:
                row |= {"clips": len(outcomes), "video_outcome": video_outcome(outcomes)}
            yield row | {"decode_cpu_s": sandbox.cpu_s() - spent_s}
            spent_s = sandbox.cpu_s()
    except DecodeError as error:
        failed = {"outcome": "failed", "reason": error.reason, "message": str(error)}
        yield base | failed | {"clips": 1, "video_outcome": "failed"}


def clip_columns(clip: DecodedClip | FailedClip) -> dict[str, Any]:
    """What a clip says of itself, as columns."""
    columns: dict[str, Any] = {
        "clip_index": clip.span.index,
        "start_s": clip.span.start_s,
        "end_s": clip.span.end_s,
        "message": clip.message,
    }
    if isinstance(clip, FailedClip):
        return columns | {"outcome": "failed", "reason": clip.reason}
    whole = all(clip.frame_ok)
    return (
        columns
        | asdict(clip.facts)
        | {
            "content_digest": clip.content_digest,
            "outcome": "ok" if whole else "partial",
            "reason": None if whole else "damaged",
            "frame_pts_s": clip.frame_pts_s,
            "frame_ok": clip.frame_ok,
            "pictures": clip.pictures,
        }
    )


class EmbedClips:
    """Rows with pictures in, rows with features out, all in one call of the network. Holds the backbone."""

    def __init__(self, spec: FeatureSpec, network: Any, reporter: Reporter, *, gpu: bool) -> None:
        self._spec = spec
        self._embedder = ray.get(network).session(gpu=gpu and not gpus_are_fake())
        self._reporter = reporter
        self._meter = ExtractionMeter()

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same rows; the network's time is shared out evenly."""
        before_s, features = time.process_time(), []
        given = [row.pop("pictures", None) for row in rows]
        if clips := [pictures for pictures in given if pictures is not None]:
            self._reporter.begin("embedding", printable(clip_name(rows[0])))
            features = self._embed(clips)
        share_s, made = (time.process_time() - before_s) / len(rows), iter(features)
        for row, pictures in zip(rows, given, strict=True):
            row |= {"features": None if pictures is None else next(made), "embed_cpu_s": share_s}
            self._meter.add(dict.fromkeys(FEATURES_SCHEMA.names) | row)
        return rows

    def _embed(self, clips: list[Pictures]) -> list[bytes]:
        """Of each clip the V*T pictures of H x W x 3 bytes -> float16 [T, V*D], the views side by side."""
        size = self._spec.frame_size
        pictures = clips[0] if len(clips) == 1 else np.concatenate(clips)
        pictures = pictures.reshape(-1, size, size, 3)
        starts = range(0, len(pictures), MOST_PICTURES)
        vectors = np.concatenate([self._embedder(pictures[at : at + MOST_PICTURES]) for at in starts])
        by_clip = vectors.reshape(len(clips), -1, self._spec.steps, vectors.shape[1])
        return [np.concatenate(list(views), axis=1).astype(np.float16).tobytes() for views in by_clip]


FEATURES_SCHEMA = pa.schema(
    [
        *ROW_SCHEMA,
        pa.field("features", pa.large_binary()),
        pa.field("decode_cpu_s", pa.float64()),
        pa.field("embed_cpu_s", pa.float64()),
        # Of a video's last clip only: how many it has, and what became of the video.
        pa.field("clips", pa.int32()),
        pa.field("video_outcome", pa.string()),
    ]
)


class ExtractClips:
    """Videos in, rows with their features out, one clip after another."""

    def __init__(
        self, decode: Callable[[Reporter], DecodeClips], embed: Callable[[Reporter], EmbedClips], tally: Any
    ) -> None:
        self._reporter = reporter_to(tally)
        self._decode, self._embed = decode(self._reporter), embed(self._reporter)

    def __call__(self, videos: pa.Table) -> Iterator[pa.Table]:
        rows = (self._embed([row])[0] for row in self._decode(videos.to_pylist()))
        while some := list(islice(rows, CLIPS_PER_TABLE)):
            self._reporter.rest(ended_videos(some))
            yield pa.Table.from_pylist(some, schema=FEATURES_SCHEMA)


def ended_videos(rows: list[dict[str, Any]]) -> list[str]:
    """The outcomes of videos whose last clip is among the rows."""
    return [row["video_outcome"] for row in rows if row.get("video_outcome")]


PICTURES_SCHEMA = FEATURES_SCHEMA.append(pa.field("pictures", pa.large_binary()))


class DecodeTables:
    """Videos in, rows with their pictures out, for workers of another kind that embed."""

    def __init__(self, decode: Callable[[Reporter], DecodeClips], tally: Any) -> None:
        self._reporter = reporter_to(tally)
        self._decode = decode(self._reporter)

    def __call__(self, videos: pa.Table) -> Iterator[pa.Table]:
        for row in self._decode(videos.to_pylist()):
            if "pictures" in row:
                row["pictures"] = row["pictures"].tobytes()
            self._reporter.rest([])
            yield pa.Table.from_pylist([row], schema=PICTURES_SCHEMA)


class EmbedTables:
    """Rows with pictures in, rows with features out."""

    def __init__(self, embed: Callable[[Reporter], EmbedClips], tally: Any) -> None:
        self._reporter = reporter_to(tally)
        self._embed = embed(self._reporter)

    def __call__(self, rows: pa.Table) -> pa.Table:
        some = rows.drop_columns(["pictures"]).to_pylist()
        for row, pictures in zip(some, rows["pictures"], strict=True):
            row["pictures"] = np.frombuffer(pictures.as_buffer(), np.uint8) if pictures.is_valid else None
        self._reporter.begin("embedding", printable(clip_name(some[0])), tell=True)
        embedded = self._embed(some)
        self._reporter.rest(ended_videos(embedded))
        return pa.Table.from_pylist(embedded, schema=FEATURES_SCHEMA)


@dataclass(frozen=True)
class StagedShard:
    """What the driver has to know of a shard to commit it."""

    name: str
    ended: list[tuple[str, int]]
    """The videos whose last clip it holds, each with the number of its clips."""
    decode_cpu_s: float
    embed_cpu_s: float

    @property
    def clip_counts(self) -> dict[str, int]:
        return dict(self.ended)


class StagingError(OSError):
    """The store's disk does not take a shard. Of what a worker raises, Ray Data leaves the text alone."""


class StageShards:
    """Rows in, a summary of the shard they make out; the driver commits it."""

    def __init__(self, spec: FeatureSpec, staging: str) -> None:
        self._spec, self._staging = spec, staging

    def __call__(self, rows: pa.Table) -> pa.Table:
        shard = shard_table(rows, rows["features"].to_pylist(), self._spec)
        try:
            name = stage_shard(shard, self._staging)
        except OSError as error:
            raise StagingError(*error.args) from error
        ended = rows.filter(pc.is_valid(rows["clips"])).select(["video_id", "clips"]).to_pylist()
        spent_s = {spent: pc.sum(rows[spent]).as_py() or 0.0 for spent in ("decode_cpu_s", "embed_cpu_s")}
        staged = StagedShard(name, [(row["video_id"], row["clips"]) for row in ended], **spent_s)
        return pa.Table.from_pylist([asdict(staged)], schema=STAGED_SCHEMA)


STAGED_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("ended", pa.map_(pa.string(), pa.int32())),
        pa.field("decode_cpu_s", pa.float64()),
        pa.field("embed_cpu_s", pa.float64()),
    ]
)
"""Of a StagedShard."""
