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

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.errors import UserError
from raypipe.files import put_file, remove_folder, remove_torn, sync_folder, write_json
from raypipe.lease import only_writer
from raypipe.schema import INDEX_COLUMNS, SCHEMA_VERSION, FeatureSpec
from raypipe.shards import content_name, read_table, row_count, written
from raypipe.storage import Place, RemotePath, place
from raypipe.videos import Video

SMALL_FILES = ("features.json", "summary.json", "failures.csv", "config.yaml")
"""What an extraction writes beside its shards."""


class FeatureStore:
    """A folder of shards. Reading needs no lock; writing happens inside `writing()`."""

    def __init__(self, path: str | Place, *, flag: str = "--features") -> None:
        """`flag`: with which a person named the folder."""
        self.path, self._flag = place(path, flag=flag), flag
        self._check_held: Callable[[], None] = lambda: None
        self._agreed: FeatureSpec | None = None

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
                f"{self._flag} {self.path}: no feature store there; "
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

        Raises UserError naming a shard that something else has damaged, or the video that two of them hold.
        """
        wanted = _with_order(columns)
        schema = self._schema_of(wanted)
        tables = [_read_shard(s, wanted, schema) for s in (self.shards() if shards is None else shards)]
        table = _in_order(pa.concat_tables(tables) if tables else schema.empty_table())
        if twice := _first_twice(table):
            self._refuse_twice(twice)
        return table.select(columns)

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

    def _refuse_twice(self, video_id: str) -> None:
        """Raises UserError: raypipe writes each video once, so something else has copied a shard."""
        stored = (
            (shard.name, read_table(shard, columns=["video_id"])["video_id"]) for shard in self.shards()
        )
        holders = [name for name, ids in stored if video_id in ids.to_pylist()]
        raise UserError(
            f"{self.path}: {video_id} is there twice, in {' and '.join(holders)}; "
            "delete all of them but one and run raypipe.extract again, which makes what is missing anew"
        )

    def _schema_of(self, columns: Collection[str]) -> pa.Schema:
        return pa.schema([field for field in self._schema() if field.name in columns])

    def _schema(self) -> pa.Schema:
        return (self._agreed or self.spec()).shard_schema

    # --- writing ------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, spec: FeatureSpec) -> Iterator[None]:
        """Holds the store for one writer. Raises UserError if another writes, if nobody may, or if another
        spec's rows are there."""
        refuse = "another run is writing there; wait for it"
        with only_writer(self.path, named=f"--output {self.path}", refuse=refuse) as self._check_held:
            self._agree(spec)
            self._agreed = spec
            remove_folder(self.staging)  # of a run that was killed
            self.staging.mkdir(exist_ok=True)
            if isinstance(self.path, Path):
                remove_torn(self.path, SMALL_FILES)
            try:
                yield
            finally:
                remove_folder(self.staging)

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
            stored = read_table(shard, columns=["video_id"])["video_id"]
            if pc.any(pc.is_in(stored, ids)).as_py():
                self.replace(shard, [renew(self.rows_without(shard, ()))])

    def homes(self, video_ids: Collection[str]) -> dict[str, Place]:
        """The shard of each of these videos that has rows."""
        wanted = set(video_ids)
        return {
            video_id: shard
            for shard in (self.shards() if wanted else [])
            for video_id in read_table(shard, columns=["video_id"])["video_id"].to_pylist()
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
        return read_table(self.staging / staged, schema=self._schema())

    def rows_without(self, shard: Place, video_ids: Collection[str]) -> pa.Table:
        """The rows of a visible shard but those of these videos."""
        table = read_table(shard, schema=self._schema())
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
            sync_folder(self.path)
        return path

    def publish(self, rows: Iterable[pa.Table]) -> Place:
        """Makes a new shard of these rows visible."""
        with written(rows, self.staging) as file:
            path = self.path / content_name(file)
            self._put(file, path)
        return path

    def replace(self, shard: Place, rows: Iterable[pa.Table]) -> None:
        """Gives a visible shard other rows, at once. Its name stays, or a reader could miss both; so it says
        what the shard held at first."""
        with written(rows, self.staging) as file:
            self._put(file, shard)

    def _put(self, file: Path, target: Place) -> None:
        self._check_held()
        put_file(file, target)
        sync_folder(self.path)


def _read_shard(shard: Place, columns: list[str], schema: pa.Schema) -> pa.Table:
    try:
        return read_table(shard, columns=columns, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{shard}: cannot be read: {_words(error)}; "
            "delete it and run raypipe.extract again, which makes its rows anew"
        ) from None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


def _first_twice(table: pa.Table) -> str | None:
    """The first video of a table in order that has a clip twice."""
    same = [pc.equal(table[name].slice(1), table[name].slice(0, max(0, len(table) - 1))) for name in ORDER]
    places = pc.indices_nonzero(pc.and_(*same))
    return str(table["video_id"][places[0].as_py()]) if len(places) else None


ORDER = ["video_id", "clip_index"]


def _with_order(columns: list[str]) -> list[str]:
    return list(dict.fromkeys([*columns, *ORDER]))


def _in_order(table: pa.Table) -> pa.Table:
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ORDER])
    return table.take(order)
