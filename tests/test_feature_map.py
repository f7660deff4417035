import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from disks import small_disk
from features import make_store

from raypipe import feature_map
from raypipe.dataset import load_dataset
from raypipe.errors import RunFailed
from raypipe.feature_map import FeatureSource
from raypipe.shards import features_array


@pytest.fixture
def source(tmp_path) -> FeatureSource:
    store = make_store(tmp_path / "features", clips=10, failed=2)
    return load_dataset(store).clips.source


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_map.tempfile, "tempdir", str(tmp_path))


def test_a_map_holds_what_the_store_holds(tmp_path, source):
    store = feature_map.FeatureStore(source.store)
    table = store.read(["outcome", "features"]).slice(0, 10)
    mapped = source.open(tmp_path / "maps")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, features_array(table["features"], store.spec()))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 0


def test_a_map_has_the_clips_that_were_asked_for_in_their_order(tmp_path, source):
    some = FeatureSource(source.store, source.clips[7:2:-2], source.steps, source.dim)
    np.testing.assert_array_equal(some.open(tmp_path / "maps"), source.open(tmp_path / "maps")[7:2:-2])


def test_a_map_is_made_once(tmp_path, source):
    source.open(tmp_path / "maps")
    (file,) = (tmp_path / "maps").glob("*.npy")
    made = file.stat().st_ino
    source.open(tmp_path / "maps")
    assert [f.stat().st_ino for f in (tmp_path / "maps").glob("*.npy")] == [made]


def test_other_content_has_another_map(tmp_path, source):
    source.open(tmp_path / "maps")
    other = load_dataset(make_store(tmp_path / "others", clips=10, signal=2.0)).clips.source
    assert not np.array_equal(other.open(tmp_path / "maps"), source.open(tmp_path / "maps"))


def test_rows_that_were_replaced_have_another_map(tmp_path, source):
    """Their shard keeps its name."""
    before = source.open(tmp_path / "maps").copy()
    store = feature_map.FeatureStore(source.store)
    (shard,) = store.shards()
    with store.writing(store.spec()):
        rows = store.rows_without(shard, ())
        values = rows["features"].combine_chunks().storage
        doubled = pa.FixedSizeListArray.from_arrays(
            pc.multiply(values.flatten().cast(pa.float32()), 2).cast(pa.float16()),
            values.type.list_size,
        )
        failed = rows.filter(pc.is_null(rows["features"]))
        whole = rows.filter(pc.is_valid(rows["features"])).set_column(
            rows.num_columns - 1,
            "features",
            pa.ExtensionArray.from_storage(store.spec().features_type, doubled),
        )
        store.replace(shard, [whole, failed])
    assert store.shards() == [shard]
    np.testing.assert_array_equal(source.open(tmp_path / "maps"), before * 2)


def test_a_map_that_nobody_opens_is_removed_when_another_is_made(tmp_path, source):
    source.open(tmp_path / "maps")
    (old,) = (tmp_path / "maps").glob("*.npy")
    os.utime(old, (0, 0))
    FeatureSource(source.store, source.clips[:3], source.steps, source.dim).open(tmp_path / "maps")
    assert not old.exists()
    assert len(list((tmp_path / "maps").glob("*.npy"))) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"file/maps: cannot hold the features .* set TMPDIR"):
        source.open(tmp_path / "file" / "maps")


def test_a_full_disk_is_said_and_ends_no_process(tmp_path):
    clips = load_dataset(make_store(tmp_path / "large", clips=2000, failed=0)).clips
    assert clips.source
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(RunFailed, match=r"cannot hold the features \(No space left on"):
            clips.source.open(disk)
        assert [file.suffix for file in disk.iterdir()] == [".lock"]


def test_clips_are_sent_without_their_features_and_mapped_where_they_arrive(tmp_path, source):
    store = make_store(tmp_path / "large", clips=2000, failed=0)
    clips = load_dataset(store).clips
    sent = pickle.dumps(clips)
    assert len(sent) < clips.features.nbytes
    code = """
import pickle, sys
clips = pickle.load(sys.stdin.buffer)
print(type(clips.features).__name__, clips.features.sum(dtype=float), clips.view)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=sent,
        capture_output=True,
        check=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert run.stdout.decode().split() == ["memmap", str(clips.features.sum(dtype=float)), "rgb"]
    half = clips.seen_as("all")
    assert half.source is clips.source
