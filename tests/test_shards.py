"""Shards as other readers of Parquet see them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from features import SPEC, five_clips


def test_plain_pyarrow_reads_tensors(tmp_path: Path) -> None:
    store = five_clips(tmp_path)
    column = pq.read_table(store.shards()[0])["features"].combine_chunks()
    assert column.type == pa.fixed_shape_tensor(pa.float16(), (SPEC.steps, SPEC.dim))
    assert column.to_numpy_ndarray().shape[1:] == (SPEC.steps, SPEC.dim)
    assert pq.read_metadata(store.shards()[0]).row_group(0).column(0).compression == "ZSTD"
