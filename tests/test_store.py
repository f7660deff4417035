import json
import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from features import SPEC, make_store

from raypipe.errors import UserError
from raypipe.store import (
    INDEX_COLUMNS,
    ROW_SCHEMA,
    FeatureStore,
    features_array,
    plan_run,
    shard_table,
    stage_shard,
    write_atomically,
)
from raypipe.videos import Video


def rows(*ids: str, **columns: Any) -> pa.Table:
    """A shard's rows of these videos, each with `columns` and its own features."""
    row = {"clip_index": 0, "path": "/v.mp4", "outcome": "ok"} | columns
    table = pa.Table.from_pylist([{"video_id": i, **row} for i in ids], schema=ROW_SCHEMA)
    return shard_table(
        table, [None if row["outcome"] == "failed" else vector(i).tobytes() for i in ids], SPEC
    )


def vector(video_id: str) -> np.ndarray:
    """The made-up features [T, D] of a video."""
    rng = np.random.default_rng(list(video_id.encode()))
    return rng.normal(size=(SPEC.steps, SPEC.dim)).astype(np.float16)


def add(store: FeatureStore, *tables: pa.Table, already: frozenset[str] = frozenset()) -> list[list[str]]:
    return [store.commit(stage_shard(table, store.staging), already=set(already)) for table in tables]


def stored(store: FeatureStore) -> list[str]:
    return store.index()["video_id"].to_pylist()


def files(store: FeatureStore) -> list[str]:
    return sorted(path.name for path in store.path.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Holds a, b, c in one shard, d, e in another."""
    store = FeatureStore(tmp_path / "features")
    with store.writing(SPEC):
        add(store, rows("c", "a", "b", label="x"), rows("e", "d", label="y", group="g"))
    return store


# --- reading ----------------------------------------------------------------------------------------


def test_what_is_written_reads_as_it_was(store: FeatureStore) -> None:
    table = FeatureStore(store.path).read(["video_id", "label", "group", "features"])
    assert table.column_names == ["video_id", "label", "group", "features"]
    assert table["video_id"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert table["label"].to_pylist() == ["x", "x", "x", "y", "y"]
    assert table["group"].to_pylist() == [None, None, None, "g", "g"]
    expected = np.stack([vector(video_id) for video_id in "abcde"])
    np.testing.assert_array_equal(features_array(table["features"], SPEC), expected)
    assert store.spec() == SPEC
    assert json.loads((store.path / "features.json").read_text())["fingerprint"] == SPEC.fingerprint


def test_plain_pyarrow_reads_tensors(store: FeatureStore) -> None:
    column = pq.read_table(store.shards()[0])["features"].combine_chunks()
    assert column.type == pa.fixed_shape_tensor(pa.float16(), (SPEC.steps, SPEC.dim))
    assert column.to_numpy_ndarray().shape[1:] == (SPEC.steps, SPEC.dim)
    assert pq.read_metadata(store.shards()[0]).row_group(0).column(0).compression == "ZSTD"


def test_a_failed_video_has_no_features(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(SPEC):
        add(store, rows("a"), rows("b", outcome="failed", reason="damaged", message="cut"))
    table = store.read(["outcome", "reason", "message", "features"])
    assert table.drop_columns(["features"]).to_pylist() == [
        {"outcome": "ok", "reason": None, "message": None},
        {"outcome": "failed", "reason": "damaged", "message": "cut"},
    ]
    assert table["features"].is_null().to_pylist() == [False, True]
    np.testing.assert_array_equal(features_array(table["features"].drop_null(), SPEC), [vector("a")])


def test_an_empty_store(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    assert not store.exists() and store.index().column_names == INDEX_COLUMNS
    with store.writing(SPEC):
        pass
    assert store.exists() and store.read(["video_id", "features"]).num_rows == 0
    assert features_array(store.read(["features"])["features"], SPEC).shape == (0, SPEC.steps, SPEC.dim)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "--features {path}: no feature store there; run python -m raypipe.extract first, "
         "or name the folder it wrote"),
        ("{", "{path}/features.json: cannot be read: "),
        ('{"schema_version": 99}', "{path}/features.json: is not of schema_version 1, which this version "
         "of raypipe reads; extract the features again"),
        ('{"schema_version": 1}', "{path}/features.json: is not of schema_version 1, which"),
        ("[]", "{path}/features.json: is not of schema_version 1, which"),
    ],
    ids=["none", "broken", "another version", "half", "a list"],
)  # fmt: skip
def test_no_store_to_read(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "features.json").write_text(content)
    with pytest.raises(UserError) as caught:
        FeatureStore(tmp_path).spec()
    assert str(caught.value).startswith(said.replace("{path}", str(tmp_path)))


def test_a_shard_that_something_damaged_is_named(store: FeatureStore) -> None:
    shard = store.shards()[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        store.read(["label"])
    assert str(caught.value).startswith(f"{shard}: cannot be read: ")
    assert "delete it and run raypipe.extract again" in str(caught.value)


@pytest.mark.parametrize("field", ["frames", "view", "motion_gap_s", "weights_digest", "dim"])
def test_fingerprints_differ_where_a_field_does(field: str) -> None:
    other = replace(SPEC, **{field: "other" if isinstance(getattr(SPEC, field), str) else 9})
    assert other.fingerprint != SPEC.fingerprint == replace(SPEC).fingerprint


# --- one writer, one kind of features ---------------------------------------------------------------


def test_other_features_are_refused_by_name(store: FeatureStore) -> None:
    with pytest.raises(UserError) as caught, store.writing(replace(SPEC, view="both", dim=16)):
        pass
    assert str(caught.value) == (
        f"--output {store.path}: holds other features: view is rgb there and both here, "
        "dim is 8 there and 16 here; choose another --output"
    )
    assert store.spec() == SPEC


def hold(path: Path, held: Any, release: Any) -> None:
    with FeatureStore(path).writing(SPEC):
        held.set()
        release.wait()


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_second_writer_is_refused_until_the_first_is_gone(end: str, store: FeatureStore) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    first = context.Process(target=hold, args=(store.path, held, release), daemon=True)
    first.start()
    assert held.wait(20)
    with pytest.raises(UserError) as caught, store.writing(SPEC):
        pass
    assert str(caught.value) == f"--output {store.path}: another run is writing there; wait for it"
    assert stored(store) == list("abcde")  # reading goes on
    release.set() if end == "finished" else first.kill()
    first.join()
    with store.writing(SPEC):
        add(store, rows("f"))
    assert stored(store) == list("abcdef")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(UserError) as caught, FeatureStore(path).writing(SPEC):
            pass
        assert str(caught.value) == f"--output {path}: cannot be written: {reason}"


# --- writing ----------------------------------------------------------------------------------------


def test_a_shard_is_seen_when_committed_not_when_staged(store: FeatureStore) -> None:
    with store.writing(SPEC):
        name = stage_shard(rows("f", "g"), store.staging)
        assert stored(store) == list("abcde")
        assert store.commit(name, already=set()) == ["f", "g"]
        assert stored(store) == list("abcdefg")
    assert ".staging" not in files(store)


def test_videos_that_came_twice_are_committed_once(store: FeatureStore) -> None:
    with store.writing(SPEC):
        again, partly = rows("f", "g"), rows("g", "h", "f")
        assert add(store, again) == [["f", "g"]]
        assert add(store, partly, already=frozenset("fg")) == [["h"]]
        before = files(store)
        assert add(store, again, already=frozenset("fgh")) == [[]]
        assert files(store) == before
    assert stored(store) == list("abcdefgh")


def test_what_a_killed_run_left_is_not_seen_and_cleaned(store: FeatureStore) -> None:
    store.staging.mkdir()
    stage_shard(rows("z"), store.staging)
    half = (store.path / store.shards()[0]).read_bytes()[:100]
    (store.path / f".{store.shards()[0].name}.123").write_bytes(half)
    assert stored(store) == list("abcde")
    with store.writing(SPEC):
        assert list(store.staging.iterdir()) == []
        add(store, rows("z"))
    assert stored(store) == list("abcdez")


@pytest.mark.parametrize("gone", ["", "b", "de", "acd", "abcde"])
def test_drop(gone: str, store: FeatureStore) -> None:
    with store.writing(SPEC):
        store.drop(frozenset(gone))
    left = [video_id for video_id in "abcde" if video_id not in gone]
    table = store.read(["video_id", "features"])
    assert table["video_id"].to_pylist() == left
    np.testing.assert_array_equal(
        features_array(table["features"], SPEC),
        np.array([vector(video_id) for video_id in left]).reshape(-1, SPEC.steps, SPEC.dim),
    )
    assert len(store.shards()) == len({video_id in "abc" for video_id in left})


def test_relabel(store: FeatureStore) -> None:
    untouched = store.shards()[0].stat().st_mtime_ns, store.shards()[1].stat().st_mtime_ns
    with store.writing(SPEC):
        store.relabel({})
        store.relabel({"b": Video("b", "/b", "new", "h", "test"), "nobody": Video("nobody", "/n")})
    now = store.shards()[0].stat().st_mtime_ns, store.shards()[1].stat().st_mtime_ns
    assert sum(a == b for a, b in zip(untouched, now, strict=True)) == 1
    table = store.read(["video_id", "label", "group", "split", "path", "features"])
    assert table.select(["label", "group", "split"]).to_pylist() == [
        {"label": "x", "group": None, "split": None},
        {"label": "new", "group": "h", "split": "test"},
        {"label": "x", "group": None, "split": None},
        {"label": "y", "group": "g", "split": None},
        {"label": "y", "group": "g", "split": None},
    ]
    assert set(table["path"].to_pylist()) == {"/v.mp4"}
    np.testing.assert_array_equal(features_array(table["features"], SPEC)[1], vector("b"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, b"older")
    write_atomically(file, b"old")
    assert list(tmp_path.iterdir()) == [file]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(file, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"


# --- what there is to do ----------------------------------------------------------------------------

INDEX = pa.Table.from_pylist(
    [
        {"video_id": "good", "size_bytes": 5, "modified_s": 1.25, "label": "x", "outcome": "ok"},
        {"video_id": "bad", "size_bytes": 5, "modified_s": 1.25, "label": "x", "outcome": "failed"},
        {"video_id": "gone", "size_bytes": None, "modified_s": None, "label": "x", "outcome": "failed"},
    ],
    schema=pa.schema([ROW_SCHEMA.field(name) for name in INDEX_COLUMNS]),
)


def video(video_id: str, size_bytes: int | None = 5, modified_s: float | None = 1.25, **words: str) -> Video:
    labels = {"label": "x"} | words
    return Video(video_id, f"/{video_id}", size_bytes=size_bytes, modified_s=modified_s, **labels)


@pytest.mark.parametrize(
    ("listed", "retry_failed", "todo", "stale", "relabelled"),
    [
        (video("good"), False, False, False, False),
        (video("good"), True, False, False, False),
        (video("new"), False, True, False, False),
        (video("good", size_bytes=6), False, True, True, False),
        (video("good", modified_s=1.5), False, True, True, False),
        (video("good", size_bytes=6, label="y"), False, True, True, False),
        (video("good", label="y"), False, False, False, True),
        (video("good", group="g"), False, False, False, True),
        (video("good", split="test"), False, False, False, True),
        (video("bad"), False, False, False, False),
        (video("bad", label="y"), False, False, False, True),
        (video("bad"), True, True, True, False),
        (video("bad", size_bytes=6), False, True, True, False),
        (video("gone", None, None), False, False, False, False),
        (video("gone", None, None), True, True, True, False),
        (video("gone"), False, True, True, False),  # it is there now
    ],
)
def test_plan(listed: Video, retry_failed: bool, todo: bool, stale: bool, relabelled: bool) -> None:
    plan = plan_run([listed], INDEX, retry_failed=retry_failed)
    assert plan.todo == [listed] * todo and plan.done == 1 - todo
    assert plan.stale == frozenset([listed.video_id] * stale)
    assert plan.relabelled == ({listed.video_id: listed} if relabelled else {})


def test_a_plan_keeps_the_order_of_the_list_and_leaves_unlisted_videos_alone() -> None:
    listed = [video("z"), video("good"), video("a")]
    plan = plan_run(listed, INDEX, retry_failed=True)
    assert ([v.video_id for v in plan.todo], plan.done, plan.stale) == (["z", "a"], 1, frozenset())


def test_made_up_stores_are_real_ones(tmp_path: Path) -> None:
    """The other tests' stores obey the same schema."""
    store = make_store(tmp_path, clips=4, failed=1)
    assert pq.read_schema(store.shards()[0]).equals(SPEC.shard_schema)
    assert stored(store) == [f"clip{i:03}.mp4" for i in range(5)]
