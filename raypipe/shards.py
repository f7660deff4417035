"""One Parquet shard of the feature store: written whole, read in one version."""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe.files import put_file
from raypipe.schema import ROW_SCHEMA, FeatureSpec
from raypipe.storage import Place, RemotePath, place


def row_count(shard: Place) -> int:
    found = shard.read(pq.read_metadata) if isinstance(shard, RemotePath) else pq.read_metadata(shard)
    return int(found.num_rows)


CHANGES_BORNE = 5


def read_table(
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


def rows_of(tables: Iterable[pa.Table]) -> Iterator[tuple[Any, ...]]:
    """The rows, one after another. Only a table's are Python objects at once."""
    for table in tables:
        for batch in table.to_batches(max_chunksize=ROW_GROUP_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


ROW_GROUP_ROWS = 1024


def stage_shard(table: pa.Table, staging: str | Place) -> str:
    """Writes a shard completely into the staging folder; its name, from its content, is returned."""
    folder = place(staging)
    with written([table], folder) as file:
        name = content_name(file)
        put_file(file, folder / name)
    return name


@contextmanager
def written(tables: Iterable[pa.Table], folder: Place) -> Iterator[Path]:
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


def content_name(path: Path) -> str:
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
