"""From videos to feature shards: list, leave out what is done, decode, embed, write, account for all.

python -m raypipe.extract --input videos/ --output results/features
"""

import logging
import shlex
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import __version__
from raypipe.backbones import Backbone, load_backbone
from raypipe.config import ExtractConfig, SamplingConfig, load_config, write_yaml
from raypipe.console import LiveLine, duration, run_command, shown_path
from raypipe.errors import RunFailed
from raypipe.store import (
    ROW_SCHEMA,
    FeatureSpec,
    FeatureStore,
    Plan,
    plan_run,
    shard_table,
    stage_shard,
    write_json,
)
from raypipe.videos import Video, list_videos

if TYPE_CHECKING:  # imported where they are used: a run with nothing to do loads no decoder and no Ray
    from raypipe.decode import ClipRequest
    from raypipe.sandbox import Limits, Sandbox

LOG = logging.getLogger("raypipe")

OUTCOMES = ("ok", "partial", "failed")
STALL_TIMEOUT_S = 900
"""A pipeline without any progress for so long is given up, with everything finished kept."""


def main(config: ExtractConfig) -> dict[str, Any]:
    """Runs the extraction; returns what summary.json holds. Raises UserError and RunFailed."""
    started_s = time.monotonic()
    backbone = load_backbone(config.embedding.backbone)
    listing = list_videos(config.input or sample_videos())
    if listing.ignored:
        LOG.info("%d other files there are not videos by name", listing.ignored)
    if not any(video.label for video in listing.videos):
        LOG.info("these videos have no labels: their features serve raypipe.predict, not raypipe.tune")

    spec = feature_spec(config.sampling, backbone)
    store = FeatureStore(config.output)
    with store.writing(spec):
        plan = plan_run(listing.videos, store.index(), retry_failed=config.retry_failed)
        LOG.info("%d videos: %d done before, %d to do", len(listing.videos), plan.done, len(plan.todo))
        store.relabel(plan.relabelled)
        store.drop(plan.stale)
        stages_s = extract_missing(plan, store, spec, config) if plan.todo else {}
        rows = listed_rows(store, listing.videos)
        summary = summarize(rows, plan, stages_s, time.monotonic() - started_s)
        write_json(store.path / "summary.json", summary)
        write_yaml(config, store.path / "config.yaml")
    report_failures(rows)
    LOG.info(
        "%s in %s: %s", counts_line(summary["outcomes"]), duration(summary["wall_s"]), shown_path(store.path)
    )
    refuse_too_many_failures(config, summary)
    return summary


def sample_videos() -> str:
    """The manifest of the built-in sample clips, made where it is missing."""
    from raypipe.samples import make_samples

    folder = Path("results/samples")
    LOG.info("no --input: using the built-in sample clips in %s", folder)
    return str(make_samples(folder))


def feature_spec(sampling: SamplingConfig, backbone: Backbone) -> FeatureSpec:
    """What the rows of this run are."""
    return FeatureSpec(
        frames=sampling.frames,
        frame_size=sampling.frame_size,
        view=sampling.view,
        motion_gap_s=sampling.motion_gap_s,
        min_frames=sampling.min_frames,
        backbone=backbone.name,
        weights_digest=backbone.weights_digest,
        steps=sampling.frames,
        dim=backbone.dim * (2 if sampling.view == "both" else 1),
    )


# --- the pipeline ---------------------------------------------------------------------------------


def extract_missing(
    plan: Plan, store: FeatureStore, spec: FeatureSpec, config: ExtractConfig
) -> dict[str, float]:
    """Decodes, embeds and stores the plan's videos on Ray; CPU seconds by stage."""
    from raypipe.cluster import connect

    with connect() as cluster:
        import ray
        from ray.exceptions import RayError

        cpus = max(1, min(config.cpus or cluster.cpus, cluster.cpus, len(plan.todo)))
        tally = ray.remote(Tally).options(num_cpus=0).remote()
        progress = Progress(tally, len(plan.todo))
        committed: set[str] = set()
        stages_s = Counter[str]()
        try:
            for shard in run_pipeline(plan.todo, store, spec, config, cpus=cpus, tally=tally):
                added = store.commit(shard["shard"], already=committed)
                committed.update(added)
                stages_s.update({"decode": shard["decode_cpu_s"], "embed": shard["embed_cpu_s"]})
        except RayError as error:
            first = str(error).strip().splitlines()[0]
            raise RunFailed(
                f"extraction stopped after {len(committed)} of {len(plan.todo)} videos: {first}; "
                "these are kept, run the same command to go on"
            ) from error
        finally:
            progress.close()
        missing = len(plan.todo) - len(committed)
        if missing:
            raise RunFailed(f"{missing} videos were lost on the way; run the same command to do them")
        return dict(stages_s)


def run_pipeline(
    videos: list[Video],
    store: FeatureStore,
    spec: FeatureSpec,
    config: ExtractConfig,
    *,
    cpus: int,
    tally: Any,
) -> Iterator[dict[str, Any]]:
    """Yields one summary per staged shard: its name, and CPU seconds by stage."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    from raypipe.decode import ClipRequest
    from raypipe.sandbox import Limits

    context = DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; `Progress` counts videos
    context.execution_no_progress_timeout_s = STALL_TIMEOUT_S
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Few videos keep few workers busy, about which Ray has long advice.
    warnings.filterwarnings("ignore", "The (min|max)imum number of concurrent", UserWarning)

    sampling, limits = config.sampling, config.limits
    request = ClipRequest(
        frames=sampling.frames,
        size=sampling.frame_size,
        view=sampling.view,
        motion_gap_s=sampling.motion_gap_s,
        min_frames=sampling.min_frames,
        max_pixels=limits.max_pixels,
        max_packets=limits.max_packets,
    )
    # One decoder and one embedder a core, each half a core to Ray: decoding waits for its child
    # process, embedding for decoded clips, and the operating system shares the cores between them.
    workers = ActorPoolStrategy(size=cpus)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        chain = (
            ray.data.from_arrow(video_tables(videos, cpus))
            .map_batches(
                DecodeClips,  # 1 video : 1 row, with its pictures or the reason why there are none
                fn_constructor_args=(request, Limits(limits.timeout_s, limits.max_memory_mb)),
                batch_size=4,
                batch_format="pyarrow",
                compute=workers,
                num_cpus=0.5,
                **FINITE_RETRIES,
            )
            .map_batches(
                EmbedClips,  # 1 row : 1 row, pictures become features
                fn_constructor_args=(spec, tally),
                batch_size=4,
                batch_format="pyarrow",
                compute=workers,
                num_cpus=0.5,
                **FINITE_RETRIES,
            )
            .map_batches(
                write_shard,  # N rows : 1 shard
                fn_args=(spec, str(store.staging)),
                batch_size=config.shard_rows,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(size=2),
                num_cpus=0,
            )
        )
    for batch in chain.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


# A worker may die with its node. Work that kills worker after worker must not be retried for ever, which
# is Ray Data's default. Ray deprecates this way of saying so and offers no other yet.
FINITE_RETRIES: Any = {"max_task_retries": 4}


def video_tables(videos: list[Video], cpus: int) -> list[pa.Table]:
    """The videos in tables of up to 64, but enough tables to keep every core busy to the end."""
    rows = [asdict(video) for video in videos]
    schema = pa.schema([ROW_SCHEMA.field(name) for name in rows[0]])
    size = max(1, min(64, len(rows) // (cpus * 8)))
    return [pa.Table.from_pylist(rows[i : i + size], schema=schema) for i in range(0, len(rows), size)]


PICTURES_SCHEMA = ROW_SCHEMA.append(pa.field("pictures", pa.large_binary())).append(
    pa.field("decode_cpu_s", pa.float64())
)


class DecodeClips:
    """Videos in, rows with their pictures out. Holds the child process that decodes."""

    def __init__(self, request: "ClipRequest", limits: "Limits") -> None:
        from raypipe.sandbox import Sandbox

        self._sandbox = Sandbox(request, limits)

    def __call__(self, videos: pa.Table) -> pa.Table:
        rows = [clip_row(Video(**video), self._sandbox) for video in videos.to_pylist()]
        return pa.Table.from_pylist(rows, schema=PICTURES_SCHEMA)


def clip_row(video: Video, sandbox: "Sandbox") -> dict[str, Any]:
    """The row of a video as PICTURES_SCHEMA has it: its pictures, or the reason why there are none."""
    from raypipe.containers import DecodeError

    row: dict[str, Any] = asdict(video) | {"clip_index": 0}
    before_s = sandbox.cpu_s()
    try:
        clip = sandbox.decode(video.path)
    except DecodeError as error:
        return row | {"outcome": "failed", "reason": error.reason, "message": str(error)}
    whole = all(clip.frame_ok)
    return (
        row
        | asdict(clip.facts)
        | {
            "start_s": 0.0,
            "end_s": clip.facts.duration_s,
            "content_digest": clip.content_digest,
            "outcome": "ok" if whole else "partial",
            "reason": None if whole else "damaged",
            "message": clip.message,
            "frame_pts_s": clip.frame_pts_s,
            "frame_ok": clip.frame_ok,
            "pictures": clip.pictures.tobytes(),
            "decode_cpu_s": sandbox.cpu_s() - before_s,
        }
    )


class EmbedClips:
    """Rows with pictures in, rows with features out. Holds the loaded backbone."""

    def __init__(self, spec: FeatureSpec, tally: Any) -> None:
        self._spec = spec
        self._embedder = load_backbone(spec.backbone).session()
        self._tally = tally

    def __call__(self, rows: pa.Table) -> pa.Table:
        before_s = time.process_time()
        features = [self._embed(pictures) for pictures in rows["pictures"].to_pylist()]
        embed_cpu_s = (time.process_time() - before_s) / max(1, rows.num_rows)
        self._tally.add.remote(rows["outcome"].to_pylist())
        return (
            rows.drop_columns(["pictures"])
            .append_column("features", pa.array(features, pa.large_binary()))
            .append_column("embed_cpu_s", pa.array([embed_cpu_s] * rows.num_rows))
        )

    def _embed(self, pictures: bytes | None) -> bytes | None:
        """[V*T, H, W, 3] -> float16 [T, V*D], the views side by side."""
        if pictures is None:
            return None
        spec = self._spec
        shape = (-1, spec.frame_size, spec.frame_size, 3)
        vectors = self._embedder(np.frombuffer(pictures, np.uint8).reshape(shape))
        views = vectors.reshape(-1, spec.steps, vectors.shape[1])
        return np.concatenate(list(views), axis=1).astype(np.float16).tobytes()


def write_shard(rows: pa.Table, spec: FeatureSpec, staging: str) -> pa.Table:
    """Stages the rows as one shard; the driver commits it."""
    name = stage_shard(shard_table(rows, rows["features"].to_pylist(), spec), staging)
    stages = {stage: pc.sum(rows[stage]).as_py() or 0.0 for stage in ("decode_cpu_s", "embed_cpu_s")}
    return pa.Table.from_pylist([{"shard": name, **stages}])


# --- what a person sees ----------------------------------------------------------------------------


class Tally:
    """An actor that counts finished videos by outcome while their shards are not written yet."""

    def __init__(self) -> None:
        self._counts = Counter[str]()

    def add(self, outcomes: list[str]) -> None:
        self._counts.update(outcomes)

    def counts(self) -> dict[str, int]:
        return dict(self._counts)


class Progress:
    """Shows the tally as one live line until it is closed."""

    def __init__(self, tally: Any, total: int) -> None:
        self._tally, self._total = tally, total
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import ray

        line, started_s = LiveLine(), time.monotonic()
        while not self._closed.wait(0.5):
            try:
                counts = ray.get(self._tally.counts.remote(), timeout=5)
            except ray.exceptions.RayError:
                continue  # the cluster is busy or ending; the stored rows are what counts
            line.show(progress_line(counts, self._total, time.monotonic() - started_s))
        line.close()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def progress_line(counts: dict[str, int], total: int, elapsed_s: float) -> str:
    """
    >>> progress_line({"ok": 115, "partial": 1, "failed": 2}, 242, 19.3)
    'videos 118/242 · ok 115 · partial 1 · failed 2 · 6.1/s · 0:20 left'
    """
    done = sum(counts.values())
    outcomes = " · ".join(f"{name} {counts.get(name, 0)}" for name in OUTCOMES)
    if not done:
        return f"videos 0/{total} · starting"
    rate = done / elapsed_s
    return f"videos {done}/{total} · {outcomes} · {rate:.1f}/s · {duration((total - done) / rate)} left"


def counts_line(outcomes: dict[str, int]) -> str:
    """
    >>> counts_line({"ok": 240, "partial": 0, "failed": 2})
    '242 videos: 240 ok, 0 partial, 2 failed'
    """
    counts = ", ".join(f"{outcomes.get(name, 0)} {name}" for name in OUTCOMES)
    return f"{sum(outcomes.values())} videos: {counts}"


def listed_rows(store: FeatureStore, videos: list[Video]) -> list[dict[str, Any]]:
    """What became of each listed video: video_id, outcome, reason, message."""
    listed = {video.video_id for video in videos}
    table = store.read(["video_id", "outcome", "reason", "message"])
    return [row for row in table.to_pylist() if row["video_id"] in listed]


def summarize(
    rows: list[dict[str, Any]], plan: Plan, stages_s: dict[str, float], wall_s: float
) -> dict[str, Any]:
    """What summary.json holds: the listed videos by outcome and reason, and what the run cost."""
    extracted = len(plan.todo)
    return {
        "videos": plan.done + extracted,
        "extracted": extracted,
        "done_before": plan.done,
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "reasons": dict(Counter(row["reason"] for row in rows if row["reason"])),
        "wall_s": round(wall_s, 3),
        "videos_per_s": round(extracted / wall_s, 3) if extracted else None,
        "cpu_s": {stage: round(seconds, 3) for stage, seconds in stages_s.items()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "raypipe": __version__,
        "command": shlex.join(["python", "-m", "raypipe.extract", *sys.argv[1:]]),
    }


FAILURES_SHOWN = 3


def report_failures(rows: list[dict[str, Any]]) -> None:
    """A few lines: failures by reason, with examples; all of them are rows of the store."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["outcome"] == "failed":
            by_reason.setdefault(row["reason"], []).append(row)
    for reason, failed in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        examples = "; ".join(f"{row['video_id']}: {row['message']}" for row in failed[:FAILURES_SHOWN])
        more = f"; and {len(failed) - FAILURES_SHOWN} more" if len(failed) > FAILURES_SHOWN else ""
        LOG.info("failed, %s: %d (%s%s)", reason, len(failed), examples, more)


def refuse_too_many_failures(config: ExtractConfig, summary: dict[str, Any]) -> None:
    """Raises RunFailed when more videos failed than --max-failed."""
    failed, total = summary["outcomes"].get("failed", 0), summary["videos"]
    allowed = config.max_failed * total if config.max_failed < 1 else config.max_failed
    if failed > allowed:
        raise RunFailed(
            f"{failed} of {total} videos failed, more than --max-failed {config.max_failed:g}; "
            f"everything finished is kept in {config.output}"
        )


if __name__ == "__main__":
    run_command(lambda: main(load_config(ExtractConfig, prog="python -m raypipe.extract")))
