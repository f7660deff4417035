"""From videos to feature shards: list, leave out what is done, decode, embed, write, account for all.

python -m raypipe.extract --input videos/ --output results/features
"""

import errno
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raypipe.backbones import Backbone, Network, OnnxNetwork, load_backbone, onnx_sees_gpus
from raypipe.commits import Commits
from raypipe.config import (
    EmbeddingConfig,
    ExtractConfig,
    LimitsConfig,
    SamplingConfig,
)
from raypipe.console import duration, run_command, shown_path
from raypipe.errors import RunFailed, UserError
from raypipe.files import write_json
from raypipe.folders import naming
from raypipe.outcomes import (
    EXAMPLES_SHOWN,
    FAILURES_FILE,
    Costs,
    account_for,
    counts_line,
    few,
    full_run,
    say_failures,
    summarize,
    write_failures,
)
from raypipe.plan import Plan, plan_run
from raypipe.progress import Progress, Reporter, Tally, stalled_line
from raypipe.reading import load_config, write_yaml
from raypipe.schema import ROW_SCHEMA, FeatureSpec
from raypipe.store import FeatureStore
from raypipe.videos import Listing, Video, list_videos, local_path

if TYPE_CHECKING:  # imported where it is used: a run with nothing to do loads no decoder and no Ray
    from raypipe.monitoring import RunMeter
    from raypipe.workers import EmbedClips, StagedShard

LOG = logging.getLogger("raypipe")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
GO_ON = "run the same command to go on"

VIDEO_BATCH = 4
"""Videos whose clips a worker hands on together."""
BLOCK_BYTES = 32 << 20
"""In one object of Ray's store: by default 6 clips on their way to a GPU, or 400 with their features."""
MOST_VIDEOS, MOST_BYTES = 64, 256 << 20
"""In one task of Ray's, unless a video alone is larger: what a killed worker's successor does again."""
MOST_STARTS = 10
"""Of the pipeline: it begins anew where lost nodes have it wait for ever."""
STALL_MARGIN_S = 600.0
"""How much longer than a video may take to decode nothing may move: nodes have to come, networks to load."""


def main(config: ExtractConfig, listing: Listing | None = None) -> dict[str, Any]:
    """Runs the extraction, of --input or of what the caller has listed; returns what summary.json holds.
    Raises UserError and RunFailed."""
    started_s = time.monotonic()
    store = FeatureStore(config.output, flag="--output")
    if config.failures:
        return show_failures(store)
    with naming(f"--output {config.output}"):
        backbone = backbone_of(config, store)
    listing = listing or list_videos(sample_videos() if config.input is None else config.input)
    if listing.ignored:
        LOG.info("%d other files there are not videos by name", listing.ignored)
    if not any(video.label for video in listing.videos):
        LOG.info("these videos have no labels: their features serve raypipe.predict, not raypipe.tune")

    spec = feature_spec(config.sampling, backbone)
    if config.dry_run:
        with naming(f"--output {config.output}"):
            return dry_run(config, store, spec, listing.videos)
    with saying_bad_places(store), store.writing(spec):
        plan = plan_run(listing.videos, store.index(), retry_failed=config.retry_failed)
        LOG.info("%d videos: %d done before, %d to do", len(listing.videos), plan.done, len(plan.todo))
        store.relabel(plan.relabelled)
        costs = extract_missing(plan, store, spec, backbone, config) if plan.todo else Costs()
        account = account_for(store, listing.videos)
        summary = summarize(account, plan, costs, time.monotonic() - started_s)
        summary["full_run"] = full_run(summary, store.summary())
        write_json(store.path / "summary.json", summary)
        write_failures(account, store.path / FAILURES_FILE)
        write_yaml(config, store.path / "config.yaml")
    say_failures(account, store)
    LOG.info(
        "%s in %s: %s", counts_line(summary["outcomes"]), duration(summary["wall_s"]), shown_path(store.path)
    )
    refuse_too_many_failures(config, summary)
    return summary


def show_failures(store: FeatureStore) -> dict[str, Any]:
    """Says what is not whole in the store, and how much is there in all."""
    store.spec()  # refuses where there is no store
    account = account_for(store)
    with suppress(OSError):  # where nobody may write, the list of the last run stands
        write_failures(account, store.path / FAILURES_FILE)
    say_failures(account, store)
    LOG.info("%s: %s", counts_line(account.outcomes), shown_path(store.path))
    return {"outcomes": account.outcomes}


@contextmanager
def saying_bad_places(store: FeatureStore) -> Iterator[None]:
    """Raises RunFailed where the disk does not take what a run writes."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{bad_place(error, store)}, then {GO_ON}") from error


def bad_place(error: OSError, store: FeatureStore) -> str:
    advice = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    return f"{shown_path(store.path)}: {error.strerror or error}; {advice}"


def dry_run(
    config: ExtractConfig, store: FeatureStore, spec: FeatureSpec, videos: list[Video]
) -> dict[str, Any]:
    """Says what a run would do, and does nothing."""
    if store.exists():
        store.refuse_other(spec)
    plan = plan_run(videos, store.index(), retry_failed=config.retry_failed)
    for what, some in (
        ("new, would be extracted", [video.video_id for video in plan.new]),
        ("changed or tried again, rows would be replaced", [video.video_id for video in plan.replaced]),
        ("another label, group or split, would be noted", list(plan.relabelled)),
    ):
        if some:
            LOG.info("%d %s: %s", len(some), what, few(some))
    LOG.info("%d videos: %d done before, %d to do; nothing was done", len(videos), plan.done, len(plan.todo))
    return {"videos": len(videos), "to_do": len(plan.todo), "done_before": plan.done}


def sample_videos() -> str:
    """The manifest of the built-in sample clips, made where it is missing."""
    from raypipe.samples import make_samples

    folder = Path("results/samples")
    LOG.info("no --input: using the built-in sample clips in %s", folder)
    return str(make_samples(folder))


def backbone_of(config: ExtractConfig, store: FeatureStore) -> Backbone:
    """The backbone that the config names. Where the store's rows are of it, D is known without loading it."""
    embedding = config.embedding
    backbone = load_backbone(
        embedding.backbone, weights=embedding.weights, frame_size=config.sampling.frame_size
    )
    there = store.spec() if store.exists() else None
    if there and (there.backbone, there.weights_digest) == (backbone.name, backbone.weights_digest):
        return backbone.with_dim(there.dim // (2 if there.view == "both" else 1))
    return backbone


def feature_spec(sampling: SamplingConfig, backbone: Backbone) -> FeatureSpec:
    """What the rows of this run are."""
    return FeatureSpec(
        frames=sampling.frames,
        frame_size=sampling.frame_size,
        view=sampling.view,
        motion_gap_s=sampling.motion_gap_s,
        window_s=sampling.window_s,
        stride_s=sampling.window_s and (sampling.stride_s or sampling.window_s),
        min_frames=sampling.min_frames,
        backbone=backbone.name,
        weights_digest=backbone.weights_digest,
        steps=sampling.frames,
        dim=backbone.dim * (2 if sampling.view == "both" else 1),
        policy=sampling.policy,
        sample_fps=sampling.sample_fps,
    )


# --- the pipeline ---------------------------------------------------------------------------------


def extract_missing(
    plan: Plan, store: FeatureStore, spec: FeatureSpec, backbone: Backbone, config: ExtractConfig
) -> Costs:
    """Decodes, embeds and stores the plan's videos on Ray."""
    from raypipe.cluster import ask, connect, workers_for

    started_s = time.time()

    with connect() as cluster:
        import ray
        from ray.data.exceptions import ExecutionTimeoutError
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from raypipe.monitoring import RunMeter
        from raypipe.watch import NodesLost
        from raypipe.workers import EmbedClips

        cpus = workers_for(cluster, config.cpus, videos=len(plan.todo))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Not one of the tasks on the dashboard: a line a message would bury the others and cost more than it.
        tally = (
            ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here, enable_task_events=False).remote()
        )
        progress = Progress(lambda: ask(tally.standing.remote(), None), len(plan.todo))
        replaced = [video.video_id for video in plan.replaced]
        commits = Commits(store, shard_rows=config.shard_rows, replaced=replaced)
        stages_s, meter = Counter[str](), RunMeter()
        try:
            network = backbone.network(gpu=config.embedding.device != "cpu" and cluster.most_gpus > 0)
            gpus = gpus_for(network, cluster.most_gpus, config.embedding)
            embed = partial(EmbedClips, spec, ray.put(network), gpu=gpus > 0)
            for starts_left in reversed(range(MOST_STARTS)):
                left = [video for video in plan.todo if video.video_id not in commits.done]
                try:
                    for shard in run_pipeline(
                        left, store, spec, config, cpus=cpus, gpus=gpus, embed=embed, tally=tally, meter=meter
                    ):
                        commits.add(shard.name, shard.clip_counts)
                        meter.videos_left(len(plan.todo) - len(commits.done))
                        stages_s.update({"decode": shard.decode_cpu_s, "embed": shard.embed_cpu_s})
                    break
                except NodesLost as lost:
                    if not starts_left:
                        raise
                    missing = len(plan.todo) - len(commits.done)
                    LOG.warning("%s: the %d videos that are missing begin anew", lost, missing)
        except (RayError, ExecutionTimeoutError, OSError) as error:
            raise RunFailed(
                f"extraction stopped after {len(commits.done)} of {len(plan.todo)} videos: "
                f"{why_stopped(error, tally, store)}; these are kept, {GO_ON}"
            ) from error
        finally:
            progress.close()
        missing = len(plan.todo) - len(commits.done)
        if missing:
            raise RunFailed(f"{missing} videos were lost on the way; run the same command to do them")
        begun_s: float | None = ask(tally.begun_s.remote(), None)
        return Costs(dict(stages_s), begun_s and max(0.0, begun_s - started_s))


def gpus_for(network: Network, there: int, embedding: EmbeddingConfig) -> int:
    """How many of the cluster's GPUs may embed. Raises UserError where they are asked for in vain."""
    from raypipe.cluster import gpus_are_fake

    if embedding.device == "cpu" or not there:
        if embedding.device == "gpu":
            raise UserError("--device gpu: the cluster has no GPU")
        return 0
    if isinstance(network, OnnxNetwork) and not onnx_sees_gpus() and not gpus_are_fake():
        advice = "install onnxruntime-gpu in place of onnxruntime"
        if embedding.device == "gpu":
            raise UserError(f"--device gpu: this ONNX Runtime cannot use GPUs; {advice}")
        LOG.info("the network runs on CPU cores: this ONNX Runtime cannot use GPUs; %s", advice)
        return 0
    LOG.info("the network runs on GPUs, up to %d of them, and the CPU cores decode", there)
    return there


def why_stopped(error: Exception, tally: Any, store: FeatureStore) -> str:
    """What ended the pipeline, in a sentence: a full disk, a step that hangs or kills, or Ray's words."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

    from raypipe.cluster import ask
    from raypipe.watch import Stalled

    words = str(error).strip()
    # Of what a worker raised, Ray Data leaves the text alone.
    number = next((number for number in DISK_ERRORS if f"[Errno {number}]" in words), None)
    if number and (isinstance(error, OSError) or "StagingError" in words):
        return bad_place(OSError(number, os.strerror(number)), store)
    steps: list[tuple[str, str, str, float]] = ask(tally.steps.remote(), [])
    if isinstance(error, ExecutionTimeoutError):
        stages = words if isinstance(error, Stalled) else ""
        return f"nothing has moved for a long time; {stalled_line(steps, time.time(), stages)}"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"a worker could not start: {words.splitlines()[-1].strip()}"
    if isinstance(error, RayActorError | WorkerCrashedError):
        # Of which step is not known: the tally hears of one when it has lasted.
        at_work = "; ".join(what for _, _, what, _ in steps[:EXAMPLES_SHOWN])
        if not at_work:
            return f"a worker died {1 + RETRIES} times before it began any work"
        return f"a worker died {1 + RETRIES} times over the same work, of: {at_work}"
    lines = words.partition("\n\nThe above exception")[0].splitlines()
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]


def run_pipeline(
    videos: list[Video],
    store: FeatureStore,
    spec: FeatureSpec,
    config: ExtractConfig,
    *,
    cpus: int,
    gpus: int,
    embed: Callable[[Reporter], "EmbedClips"],
    tally: Any,
    meter: "RunMeter",
) -> Iterator["StagedShard"]:
    """Yields what became of the videos, a staged shard at a time."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    from raypipe.decode import ClipRequest
    from raypipe.sandbox import Limits
    from raypipe.watch import Watch
    from raypipe.workers import DecodeClips, DecodeTables, EmbedTables, ExtractClips, StagedShard, StageShards

    context = DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; `Progress` counts videos
    context.execution_no_progress_timeout_s = -1  # `Watch` sees more
    context.execution_options.preserve_order = False
    context.target_max_block_size = BLOCK_BYTES
    context.custom_execution_callback_classes = [partial(Watch, tally, meter, patience_s(config.limits))]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # `why_stopped` says it in a sentence
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
        max_duration_s=limits.max_duration_s,
        window_s=spec.window_s,
        stride_s=spec.stride_s,
        policy=sampling.policy,
        sample_fps=sampling.sample_fps,
    )
    decode = partial(DecodeClips, request, Limits(limits.timeout_s, limits.max_memory_mb))
    workers: Any = {"batch_size": VIDEO_BATCH, "batch_format": "pyarrow"} | FINITE_RETRIES
    # Where files come over a network, a second worker uses a core while the first one waits for bytes.
    per_core = 2 if any(local_path(video.path) is None for video in videos) else 1
    per_cpu = ActorPoolStrategy(size=cpus * per_core, max_tasks_in_flight_per_actor=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        # `from_arrow` would have a CPU task look at each table, for which an autoscaler starts every node.
        listed = ray.data.from_blocks(video_tables(videos, cpus))
        if gpus:
            # GPUs are fed by all cores, through the object store; only as many are taken as these keep busy.
            per_gpu = ActorPoolStrategy(min_size=1, max_size=gpus, max_tasks_in_flight_per_actor=4)
            clips = listed.map_batches(
                DecodeTables,  # 1 video : a row per clip, with its pictures or the reason why there are none
                fn_constructor_args=(decode, tally),
                compute=per_cpu,
                num_cpus=1 / per_core,
                **workers,
            ).map_batches(
                EmbedTables,  # 1 row : 1 row, pictures become features
                fn_constructor_args=(embed, tally),
                compute=per_gpu,
                num_cpus=0,  # the cores are the decoders': a CPU more than there are would never come
                num_gpus=1,
                **workers,
            )
        else:
            # One worker a core decodes and embeds in turn: its child decodes while it waits, so a core is
            # never shared, and pictures go no further than from the child's memory into the network.
            clips = listed.map_batches(
                ExtractClips,  # 1 video : a row per clip, with its features or the reason why there are none
                fn_constructor_args=(decode, embed, tally),
                compute=per_cpu,
                num_cpus=1 / per_core,
                **workers,
            )
        shards = clips.map_batches(
            StageShards,  # N rows : 1 shard
            fn_constructor_args=(spec, str(store.staging)),
            batch_size=config.shard_rows,
            batch_format="pyarrow",
            # Tasks would do, but Ray waits for ever for one on a node that falls silent (decision 22).
            compute=ActorPoolStrategy(min_size=1, max_size=2),
            num_cpus=0,
            **FINITE_RETRIES,
        )
    for batch in shards.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from (StagedShard(**row) for row in batch.to_pylist())


# A worker may die with its node. Work that kills worker after worker must not be retried for ever, which
# is Ray Data's default: these count per batch of work. Workers themselves are replaced as often as needed,
# since a pool that ran out of them would wait for ever; one that cannot start at all ends the run, through
# Ray's own limit or the stall timeout. Ray deprecates this way of saying so and offers no other yet.
RETRIES = 10
FINITE_RETRIES: Any = {"max_task_retries": RETRIES}


def patience_s(limits: LimitsConfig) -> float:
    """Seconds without any movement after which a step hangs: a video may use up its time twice."""
    return 2 * limits.timeout_s + STALL_MARGIN_S


def video_tables(videos: list[Video], cpus: int) -> list[pa.Table]:
    """The videos in tables that get smaller to the end, where the cores wait for each other.

    Of what is left each takes a core's eighth: large tables cost Ray least, small ones end together, and
    long videos, of which few fit into one, are not done again by the dozen after a fault.
    """
    columns = {field.name: [getattr(video, field.name) for video in videos] for field in fields(Video)}
    table = pa.table(columns, schema=pa.schema([ROW_SCHEMA.field(name) for name in columns]))
    sizes = [video.size_bytes or 0 for video in videos]
    tables, start = [], 0
    while start < len(videos):
        size = max(1, min(MOST_VIDEOS, (len(videos) - start) // (cpus * 8)))
        ends = np.cumsum(sizes[start : start + size])
        size = max(1, int(np.searchsorted(ends, MOST_BYTES, side="right")))
        tables.append(table.slice(start, size))
        start += size
    return tables


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
