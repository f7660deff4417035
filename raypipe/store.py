"""The feature store: Parquet shards that hold each video exactly once, and what they were made with.

    features.json            the FeatureSpec: rows made with another one never mix in
    part-<content>.parquet   whole rows, visible whole or not at all
    .staging/                shards that workers wrote and the driver has not committed; readers skip it
    .lock                    held by the one run that may write

Workers stage shards, one process (the driver) commits them by renaming. So a reader of part-*.parquet
never sees half a file, and a video that Ray computed twice, after a node died, is committed once.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe.errors import UserError
from raypipe.videos import Video

SCHEMA_VERSION = 1

Outcome = Literal["ok", "partial", "failed"]

ROW_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("modified_s", pa.float64()),
        pa.field("content_digest", pa.string()),
        pa.field("label", pa.string()),
        pa.field("group", pa.string()),
        pa.field("split", pa.string()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("rotation", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("frame_count", pa.int64()),
        pa.field("duration_s", pa.float64()),
        pa.field("codec", pa.string()),
        pa.field("container", pa.string()),
        pa.field("frame_pts_s", pa.list_(pa.float64())),
        pa.field("frame_ok", pa.list_(pa.bool_())),
    ]
)
"""Every column of a row but `features`, whose shape is the FeatureSpec's."""

INDEX_COLUMNS = ["video_id", "size_bytes", "modified_s", "label", "group", "split", "outcome", "reason"]


@dataclass(frozen=True)
class FeatureSpec:
    """What the features are: everything that must agree between two rows of one store."""

    frames: int
    frame_size: int
    view: str
    motion_gap_s: float
    min_frames: int
    backbone: str
    weights_digest: str
    steps: int
    """T, feature vectors per clip."""
    dim: int
    """D, length of a feature vector."""
    dtype: str = "float16"
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """16 hex digits that a model keeps to recognise the features it was trained on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def features_type(self) -> pa.DataType:
        return pa.fixed_shape_tensor(pa.float16(), (self.steps, self.dim))

    @property
    def shard_schema(self) -> pa.Schema:
        return ROW_SCHEMA.append(pa.field("features", self.features_type))


@dataclass(frozen=True)
class Plan:
    """What a run has to do for a listing, given what the store holds."""

    todo: list[Video]
    done: int
    stale: frozenset[str]
    """Ids whose rows are replaced: the file changed, or it failed and is tried again."""
    relabelled: dict[str, Video]
    """Videos already extracted whose label, group or split is another one now."""


def plan_run(videos: list[Video], index: pa.Table, *, retry_failed: bool) -> Plan:
    """The listing's videos less those the store holds unchanged; pure."""
    known = {row["video_id"]: row for row in index.to_pylist()}
    todo, stale, relabelled = [], set(), {}
    for video in videos:
        row = known.get(video.video_id)
        if row is None:
            todo.append(video)
            continue
        changed = (row["size_bytes"], row["modified_s"]) != (video.size_bytes, video.modified_s)
        if changed or (retry_failed and row["outcome"] == "failed"):
            todo.append(video)
            stale.add(video.video_id)
        elif (row["label"], row["group"], row["split"]) != (video.label, video.group, video.split):
            relabelled[video.video_id] = video
    return Plan(todo, len(videos) - len(todo), frozenset(stale), relabelled)


class FeatureStore:
    """A folder of shards. Reading needs no lock; writing happens inside `writing()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    # --- reading ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return (self.path / "features.json").is_file()

    def spec(self) -> FeatureSpec:
        """Raises UserError where there is no feature store, or one of another version of raypipe."""
        file = self.path / "features.json"
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:
            raise UserError(
                f"--features {self.path}: no feature store there; "
                "run python -m raypipe.extract first, or name the folder it wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        names = [field.name for field in fields(FeatureSpec)]
        whole = isinstance(content, dict) and all(name in content for name in names)
        if not whole or content["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{file}: is not of schema_version {SCHEMA_VERSION}, which this version of raypipe reads; "
                "extract the features again, into another folder"
            )
        return FeatureSpec(**{name: content[name] for name in names})

    def shards(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def read(self, columns: list[str]) -> pa.Table:
        """These columns of every row, sorted by video and clip, so that order never depends on timing.

        Raises UserError naming a shard that something else has damaged.
        """
        wanted = list(dict.fromkeys([*columns, "video_id", "clip_index"]))
        schema = pa.schema([field for field in self._schema() if field.name in wanted])
        tables = [_read_shard(shard, wanted, schema) for shard in self.shards()]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        order = pc.sort_indices(table, sort_keys=[("video_id", "ascending"), ("clip_index", "ascending")])
        return table.take(order).select(columns)

    def index(self) -> pa.Table:
        """INDEX_COLUMNS of every video."""
        return self.read(INDEX_COLUMNS) if self.exists() else _index_schema().empty_table()

    def _schema(self) -> pa.Schema:
        return self.spec().shard_schema

    # --- writing ------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, spec: FeatureSpec) -> Iterator[None]:
        """Holds the store for one writer. Raises UserError if another writes, or another spec's rows are
        there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the run ends
        except OSError as error:
            raise UserError(f"--output {self.path}: cannot be written: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--output {self.path}: another run is writing there; wait for it") from None
            self._agree(spec)
            shutil.rmtree(self.staging, ignore_errors=True)  # of a run that was killed
            self.staging.mkdir()
            try:
                yield
            finally:
                shutil.rmtree(self.staging, ignore_errors=True)

    def _agree(self, spec: FeatureSpec) -> None:
        if not self.exists():
            content = asdict(spec) | {"fingerprint": spec.fingerprint}
            write_json(self.path / "features.json", content)
            return
        self.refuse_other(spec)

    def refuse_other(self, spec: FeatureSpec) -> None:
        """Raises UserError naming the fields in which the stored features differ from `spec`."""
        there = asdict(self.spec())
        differing = [
            f"{k} is {there[k]} there and {v} here" for k, v in asdict(spec).items() if there[k] != v
        ]
        if differing:
            raise UserError(
                f"--output {self.path}: holds other features: {', '.join(differing)}; choose another --output"
            )

    @property
    def staging(self) -> Path:
        return self.path / ".staging"

    def commit(self, staged: str, *, already: set[str]) -> list[str]:
        """Makes a staged shard visible, without the videos in `already`; returns the ids it added."""
        source = self.staging / staged
        ids: list[str] = pq.read_table(source, columns=["video_id"])["video_id"].to_pylist()
        twice = already.intersection(ids)
        if twice:
            table = pq.read_table(source, schema=self._schema())
            table = table.filter(pc.invert(pc.is_in(table["video_id"], pa.array(sorted(twice)))))
            source.unlink()
            if table.num_rows == 0:
                return []
            staged = stage_shard(table, self.staging)
        os.replace(self.staging / staged, self.path / staged)
        _sync_folder(self.path)
        return [video_id for video_id in ids if video_id not in twice]

    def drop(self, video_ids: frozenset[str]) -> None:
        """Removes the rows of these videos, one shard after the other, each at once."""
        if video_ids:
            gone = pa.array(sorted(video_ids))
            self._rewrite(gone, lambda table: table.filter(pc.invert(pc.is_in(table["video_id"], gone))))

    def relabel(self, videos: Mapping[str, Video]) -> None:
        """Gives the rows of these videos their new label, group and split."""
        if not videos:
            return

        def renew(table: pa.Table) -> pa.Table:
            for column in ("label", "group", "split"):
                values = [
                    getattr(videos[video_id], column) if video_id in videos else value
                    for video_id, value in zip(
                        table["video_id"].to_pylist(), table[column].to_pylist(), strict=True
                    )
                ]
                position = table.schema.get_field_index(column)
                table = table.set_column(position, table.schema.field(column), pa.array(values, pa.string()))
            return table

        self._rewrite(pa.array(sorted(videos)), renew)

    def _rewrite(self, video_ids: pa.Array, change: Any) -> None:
        for shard in self.shards():
            ids = pq.read_table(shard, columns=["video_id"])["video_id"]
            if not pc.any(pc.is_in(ids, video_ids)).as_py():
                continue
            table = change(pq.read_table(shard, schema=self._schema()))
            if table.num_rows:
                # In place: under a new name a reader could see both files, or neither.
                os.replace(self.staging / stage_shard(table, self.staging), shard)
            else:
                shard.unlink()


def _read_shard(shard: Path, columns: list[str], schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(shard, columns=columns, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{shard}: cannot be read: {' '.join(str(error).split())}; "
            "delete it and run raypipe.extract again, which makes its rows anew"
        ) from None


def stage_shard(table: pa.Table, staging: str | Path) -> str:
    """Writes a shard completely into the staging folder; its name, from its content, is returned."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue()
    name = f"part-{hashlib.sha256(content).hexdigest()[:20]}.parquet"
    write_atomically(Path(staging) / name, content)
    return name


def shard_table(rows: pa.Table, features: list[bytes | None], spec: FeatureSpec) -> pa.Table:
    """Rows with their features: each the bytes of float16 [T, D], None where the video failed."""
    size = spec.steps * spec.dim
    values = np.zeros((len(features), size), np.float16)
    for i, content in enumerate(features):
        if content is not None:
            values[i] = np.frombuffer(content, np.float16)
    missing = pa.array([content is None for content in features])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size, mask=missing)
    column = pa.ExtensionArray.from_storage(spec.features_type, storage)
    return rows.select(ROW_SCHEMA.names).cast(ROW_SCHEMA).append_column("features", column)


def features_array(column: pa.ChunkedArray, spec: FeatureSpec) -> NDArray[np.float16]:
    """A features column without nulls as one float16 array [N, T, D]."""
    parts = [
        chunk.storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, spec.steps, spec.dim)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, spec.steps, spec.dim), np.float16)


def _index_schema() -> pa.Schema:
    return pa.schema([ROW_SCHEMA.field(name) for name in INDEX_COLUMNS])


def write_atomically(path: Path, content: Any) -> None:
    """The content under its name, complete or not at all, even if the machine stops now."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """`content` as indented JSON, written like `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
