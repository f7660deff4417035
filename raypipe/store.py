"""The feature store: Parquet shards that hold each video exactly once, and what they were made with.

    features.json            the FeatureSpec: rows made with another one never mix in
    part-<content>.parquet   whole rows, visible whole or not at all
    .staging/                shards that workers wrote and the driver has not committed; readers skip it
    .lock                    held by the one run that may write

Workers stage shards, one process (the driver) commits them by renaming, one rename for all rows of a
video (`Commits`). In a bucket a copy of the whole object, put in its place, stands for the rename. So a
reader that opens each part-*.parquet once, whenever it looks, sees each video whole and once: also where
Ray computed it twice, where it replaces old rows, and where small shards grow into larger ones.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain, compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe.errors import UserError
from raypipe.lease import only_writer
from raypipe.storage import Place, RemotePath, place
from raypipe.videos import Video

SCHEMA_VERSION = 2

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

INDEX_COLUMNS = ["video_id", "size_bytes", "modified_s", "label", "group", "split", "outcome"]


ADDED_LATER: Mapping[str, Any] = {"policy": "uniform", "sample_fps": None}
"""Fields of a FeatureSpec that older stores and models do not name, with what they were made with. With these
values a fingerprint is the old one."""


@dataclass(frozen=True)
class FeatureSpec:
    """What the features are: everything that must agree between two rows of one store."""

    frames: int
    frame_size: int
    view: str
    motion_gap_s: float
    window_s: float | None
    """Seconds a clip; None: the whole video is one."""
    stride_s: float | None
    min_frames: int
    backbone: str
    weights_digest: str
    steps: int
    """T, feature vectors per clip."""
    dim: int
    """D, length of a feature vector."""
    dtype: str = "float16"
    schema_version: int = SCHEMA_VERSION
    policy: str = "uniform"
    """Which frames are sampled."""
    sample_fps: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "FeatureSpec":
        """What a file says; one of before the fields in ADDED_LATER holds what was done then.

        Raises KeyError with the name of a field that is missing.
        """
        known = {**ADDED_LATER, **content}
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    @property
    def fingerprint(self) -> str:
        """16 hex digits that a model keeps to recognise the features it was trained on."""
        said = {
            name: value for name, value in asdict(self).items() if (name, value) not in ADDED_LATER.items()
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def features_type(self) -> pa.DataType:
        return pa.fixed_shape_tensor(pa.float16(), (self.steps, self.dim))

    @property
    def shard_schema(self) -> pa.Schema:
        return ROW_SCHEMA.append(pa.field("features", self.features_type))


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
    places = {video.video_id: place for place, video in enumerate(videos)}
    standing = np.full(len(videos), _NEW, np.int8)
    for video_id, *row in rows_of(table.select(INDEX_COLUMNS) for table in index):
        if (place := places.get(video_id)) is not None:
            now = _standing(videos[place], *row, retry_failed=retry_failed)
            standing[place] = max(standing[place], now)
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


def rows_of(tables: Iterable[pa.Table]) -> Iterator[tuple[Any, ...]]:
    """The rows, one after another. Only a table's are Python objects at once."""
    for table in tables:
        for batch in table.to_batches(max_chunksize=ROW_GROUP_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


class FeatureStore:
    """A folder of shards. Reading needs no lock; writing happens inside `writing()`."""

    def __init__(self, path: str | Place) -> None:
        self.path = place(path, flag="feature store")
        self._check_held: Callable[[], None] = lambda: None

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
        try:
            spec = FeatureSpec.from_json(content)
        except (KeyError, TypeError):
            spec = None
        if spec is None or spec.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"{file}: is not of schema_version {SCHEMA_VERSION}, which this version of raypipe reads; "
                "extract the features again, into another folder"
            )
        return spec

    def summary(self) -> dict[str, Any]:
        """What the last extraction said of itself; empty where none has ended."""
        try:
            content = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def shards(self) -> list[Place]:
        return sorted(self.path.glob("part-*.parquet"))

    def read(self, columns: list[str], *, shards: Sequence[Place] | None = None) -> pa.Table:
        """These columns of every row, or of those in `shards`, sorted by video and clip, so that order never
        depends on timing.

        Raises UserError naming a shard that something else has damaged.
        """
        wanted = _with_order(columns)
        schema = self._schema_of(wanted)
        tables = [_read_shard(s, wanted, schema) for s in (self.shards() if shards is None else shards)]
        return _in_order(pa.concat_tables(tables) if tables else schema.empty_table()).select(columns)

    def by_shard(self, columns: list[str]) -> Iterator[pa.Table]:
        """What `read` gives, a shard at a time, in the memory of one; each video is whole in one of them.
        Nothing where there is no store."""
        if not self.exists():
            return
        wanted = _with_order(columns)
        schema = self._schema_of(wanted)
        for shard in self.shards():
            yield _in_order(_read_shard(shard, wanted, schema)).select(columns)

    def index(self) -> Iterator[pa.Table]:
        """INDEX_COLUMNS of every clip, a shard at a time."""
        return self.by_shard(INDEX_COLUMNS)

    def _schema_of(self, columns: Collection[str]) -> pa.Schema:
        return pa.schema([field for field in self._schema() if field.name in columns])

    def _schema(self) -> pa.Schema:
        return self.spec().shard_schema

    # --- writing ------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, spec: FeatureSpec) -> Iterator[None]:
        """Holds the store for one writer. Raises UserError if another writes, if nobody may, or if another
        spec's rows are there."""
        refuse = "another run is writing there; wait for it"
        with only_writer(self.path, named=f"--output {self.path}", refuse=refuse) as self._check_held:
            self._agree(spec)
            _remove_folder(self.staging)  # of a run that was killed
            self.staging.mkdir(exist_ok=True)
            for torn in self.path.glob(".*.json.*"):  # `write_atomically` of one
                torn.unlink()
            try:
                yield
            finally:
                _remove_folder(self.staging)

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
    def staging(self) -> Place:
        return self.path / ".staging"

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

        ids = pa.array(sorted(videos))
        for shard in self.shards():
            stored = _table(shard, columns=["video_id"])["video_id"]
            if pc.any(pc.is_in(stored, ids)).as_py():
                self.replace(shard, [renew(self.rows_without(shard, ()))])

    def homes(self, video_ids: Collection[str]) -> dict[str, Place]:
        """The shard of each of these videos that has rows."""
        wanted = set(video_ids)
        return {
            video_id: shard
            for shard in (self.shards() if wanted else [])
            for video_id in _table(shard, columns=["video_id"])["video_id"].to_pylist()
            if video_id in wanted
        }

    def smallest_shard(self) -> Place | None:
        """Where new rows have the most room. In a bucket none: whoever reads a shard in several requests
        would get parts of two, so there a shard changes only where its rows do."""
        if isinstance(self.path, RemotePath):
            return None
        return min(self.shards(), key=row_count, default=None)

    def read_staged(self, staged: str) -> pa.Table:
        """All rows of a shard that is not visible yet."""
        return _table(self.staging / staged, schema=self._schema())

    def rows_without(self, shard: Place, video_ids: Collection[str]) -> pa.Table:
        """The rows of a visible shard but those of these videos."""
        table = _table(shard, schema=self._schema())
        gone = pc.is_in(table["video_id"], pa.array(list(video_ids), pa.string()))
        return table.filter(pc.invert(gone))

    def publish_staged(self, staged: str) -> Place:
        """Makes a staged shard visible as it is."""
        path, source = self.path / staged, self.staging / staged
        self._check_held()
        if isinstance(source, RemotePath) and isinstance(path, RemotePath):
            source.copy_to(path)  # what is staged goes when the run ends
        else:
            os.replace(str(source), str(path))
            _sync_folder(self.path)
        return path

    def publish(self, rows: Iterable[pa.Table]) -> Place:
        """Makes a new shard of these rows visible."""
        with _written(rows, self.staging) as file:
            path = self.path / _name(file)
            self._put(file, path)
        return path

    def replace(self, shard: Place, rows: Iterable[pa.Table]) -> None:
        """Gives a visible shard other rows, at once. Its name stays, or a reader could miss both; so it says
        what the shard held at first."""
        with _written(rows, self.staging) as file:
            self._put(file, shard)

    def _put(self, file: Path, target: Place) -> None:
        self._check_held()
        put_file(file, target)
        _sync_folder(self.path)


class Commits:
    """Makes staged rows visible: a video when all its clips are there, once, in place of its old rows.

    New rows join the last shard as long as it has room, so that many small runs leave few shards.
    """

    def __init__(
        self, store: FeatureStore, *, shard_rows: int = 64, replaced: Collection[str] = frozenset()
    ) -> None:
        self._store, self._shard_rows = store, shard_rows
        self._homes = store.homes(replaced)
        self._places: dict[str, dict[int, _Place]] = {}  # of the clips whose video is not whole yet
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
        table = _table(self._store.staging / staged, columns=["video_id", "clip_index"])
        ids, indices = table["video_id"].to_pylist(), table["clip_index"].to_pylist()
        for row, (video_id, index) in enumerate(zip(ids, indices, strict=True)):
            if video_id in self.done:  # Ray computed it twice
                continue
            places = self._places.setdefault(video_id, {})
            # A clip that came before stays, but for the one that ends the video: where it ended earlier
            # this time, in a failure, that is what there is to know of it.
            if index not in places or index == clip_counts.get(video_id, 0) - 1:
                if index in places:
                    self._left[places[index].staged] -= 1
                places[index] = _Place(staged, row)
                self._left[staged] += 1
        return [v for v in dict.fromkeys(ids) if v not in self.done and self._is_whole(v)]

    def _is_whole(self, video_id: str) -> bool:
        count = self._counts.get(video_id)
        return count is not None and self._places[video_id].keys() >= set(range(count))

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
        places = [place for video_id in videos for place in self._places[video_id].values()]
        shards = {place.staged for place in places}
        staged = shards.pop()
        whole = not shards and row_count(self._store.staging / staged) == len(places)
        return staged if whole else None

    def _rows(self, videos: list[str]) -> Iterator[pa.Table]:
        """All rows of these videos, a table per staged shard."""
        by_shard: dict[str, list[int]] = {}
        for video_id in videos:
            for index in range(self._counts[video_id]):
                place = self._places[video_id][index]
                by_shard.setdefault(place.staged, []).append(place.row)
        for staged, rows in by_shard.items():
            yield self._store.read_staged(staged).take(sorted(rows))

    def _forget(self, videos: list[str]) -> None:
        """Notes that they are visible, and removes the staged shards of which nothing else is needed."""
        for video_id in videos:
            self._left.subtract(place.staged for place in self._places.pop(video_id).values())
        self.done.update(videos)
        for staged in [staged for staged, rows in self._left.items() if rows == 0]:
            (self._store.staging / staged).unlink(missing_ok=True)
            del self._left[staged]


@dataclass(frozen=True)
class _Place:
    """Where a staged row is."""

    staged: str
    row: int


def row_count(shard: Place) -> int:
    found = shard.read(pq.read_metadata) if isinstance(shard, RemotePath) else pq.read_metadata(shard)
    return int(found.num_rows)


CHANGES_BORNE = 5


def _table(
    shard: Place, *, columns: Sequence[str] | None = None, schema: pa.Schema | None = None
) -> pa.Table:
    """The rows of one version of the shard, which in a bucket may be replaced while it is read."""

    def read(source: Any) -> pa.Table:
        return _rows_of(source, columns, schema)

    if not isinstance(shard, RemotePath):
        return read(shard)
    before = shard.stat()
    with suppress(pa.ArrowInvalid, OSError):  # what is really damaged is so below as well
        table = shard.read(read)  # several requests, for the columns that are wanted
        if shard.stat() == before:
            return table
    for _ in range(CHANGES_BORNE):
        content = pa.BufferReader(shard.read_bytes())  # one request, and one to ask for the size before
        with suppress(pa.ArrowInvalid, OSError):
            return read(content)
    return read(content)


def _rows_of(source: Any, columns: Sequence[str] | None, schema: pa.Schema | None) -> pa.Table:
    """What `pyarrow.parquet.read_table` gives, which loads pandas first: half of what a re-run took."""
    with pq.ParquetFile(source) as file:
        names = columns or (schema or file.schema_arrow).names
        if missing := set(names) - set(file.schema_arrow.names):
            raise pa.ArrowInvalid(f"it has no column {min(missing)}")
        table = file.read(names).select(names)
    wanted = schema and pa.schema([schema.field(name) for name in names])
    return table if wanted is None or wanted == table.schema else table.cast(wanted)


def _read_shard(shard: Place, columns: list[str], schema: pa.Schema) -> pa.Table:
    try:
        return _table(shard, columns=columns, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{shard}: cannot be read: {_words(error)}; "
            "delete it and run raypipe.extract again, which makes its rows anew"
        ) from None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


ROW_GROUP_ROWS = 1024


def stage_shard(tables: pa.Table | Iterable[pa.Table], staging: str | Place) -> str:
    """Writes a shard completely into the staging folder; its name, from its content, is returned."""
    folder = place(staging)
    with _written([tables] if isinstance(tables, pa.Table) else tables, folder) as file:
        name = _name(file)
        put_file(file, folder / name)
    return name


def put_file(file: Path, target: Place) -> None:
    """Gives a whole local file, on the target's own disk if that is local, the target's name or place."""
    if isinstance(target, RemotePath):
        target.put_file(file)
    else:
        os.replace(file, target)


@contextmanager
def _written(tables: Iterable[pa.Table], folder: Place) -> Iterator[Path]:
    """A file of these rows, on disk and complete, under a name of its own until the caller renames it: in
    the folder, or for one in a bucket in this machine's temporary one.

    Of many tables only as many rows as a row group has are in memory at once.
    """
    pieces = _row_groups(tables)
    path = (folder if isinstance(folder, Path) else Path(tempfile.gettempdir())) / f".{uuid.uuid4().hex}"
    try:
        with open(path, "wb") as file:
            first = next(pieces)
            with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
                for piece in chain([first], pieces):
                    writer.write_table(piece)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _name(path: Path) -> str:
    """What a shard is called, from its content."""
    with path.open("rb") as file:
        return f"part-{hashlib.file_digest(file, 'sha256').hexdigest()[:20]}.parquet"


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(table.num_rows for table in waiting) >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


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
    """A features column as one float16 array [N, T, D]; zeros where a clip has none."""
    parts = []
    for chunk in column.chunks:
        values = chunk.storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, spec.steps, spec.dim)
        if chunk.null_count:  # what flattens to nothing
            filled = np.zeros((len(chunk), spec.steps, spec.dim), np.float16)
            filled[pc.is_valid(chunk).to_numpy(zero_copy_only=False)] = values
            values = filled
        parts.append(values)
    return np.concatenate(parts) if parts else np.zeros((0, spec.steps, spec.dim), np.float16)


def _with_order(columns: list[str]) -> list[str]:
    return list(dict.fromkeys([*columns, "video_id", "clip_index"]))


def _in_order(table: pa.Table) -> pa.Table:
    order = pc.sort_indices(table, sort_keys=[("video_id", "ascending"), ("clip_index", "ascending")])
    return table.take(order)


def write_atomically(path: Place, content: Any) -> None:
    """The content under its name, complete or not at all, even if the machine stops now."""
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Place, content: object) -> None:
    """`content` as indented JSON, written like `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_array(path: Place, array: NDArray[Any]) -> None:
    """An array as .npy, written like `write_atomically`."""
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getbuffer())


def read_array(path: Place) -> NDArray[Any]:
    """What `write_array` wrote."""
    array: NDArray[Any] = np.load(io.BytesIO(path.read_bytes()))
    return array


def _remove_folder(path: Place) -> None:
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync_folder(path: Place) -> None:
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
