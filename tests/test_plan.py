"""What a run has to do, by what the store holds."""

import tracemalloc
from collections.abc import Iterator

import pyarrow as pa
import pytest

from raypipe.plan import plan_run
from raypipe.schema import INDEX_COLUMNS, ROW_SCHEMA
from raypipe.videos import Video

INDEX = pa.Table.from_pylist(
    [
        {"video_id": video_id, "size_bytes": size, "modified_s": modified_s, "label": "x", "outcome": outcome}
        for video_id, size, modified_s, outcomes in [
            ("good", 5, 1.25, ["ok"]),
            ("partial", 5, 1.25, ["partial"]),
            ("bad", 5, 1.25, ["failed"]),
            ("gone", None, None, ["failed"]),
            ("windows", 5, 1.25, ["ok", "partial", "ok"]),
            ("first window bad", 5, 1.25, ["failed", "ok", "ok"]),
            ("one window bad", 5, 1.25, ["ok", "failed", "ok"]),
            ("last window bad", 5, 1.25, ["ok", "ok", "failed"]),
        ]
        for outcome in outcomes
    ],
    schema=pa.schema([ROW_SCHEMA.field(name) for name in INDEX_COLUMNS]),
)


def video(video_id: str, size_bytes: int | None = 5, modified_s: float | None = 1.25, **words: str) -> Video:
    labels = {"label": "x"} | words
    return Video(video_id, f"/{video_id}", size_bytes=size_bytes, modified_s=modified_s, **labels)


@pytest.mark.parametrize(
    ("listed", "planned", "planned_with_retry_failed"),
    [
        (video("good"), "done", "done"),
        (video("new"), "new", "new"),
        (video("new", None, None), "new", "new"),  # a manifest's, missing
        (video("good", size_bytes=6), "replaced", "replaced"),
        (video("good", modified_s=1.5), "replaced", "replaced"),
        (video("good", None, None), "replaced", "replaced"),  # it is gone now
        (video("good", size_bytes=6, label="y"), "replaced", "replaced"),
        (video("good", label="y"), "relabelled", "relabelled"),
        (video("good", group="g"), "relabelled", "relabelled"),
        (video("good", split="test"), "relabelled", "relabelled"),
        (video("partial"), "done", "done"),
        (video("bad"), "done", "replaced"),
        (video("bad", label="y"), "relabelled", "replaced"),
        (video("bad", size_bytes=6), "replaced", "replaced"),
        (video("gone", None, None), "done", "replaced"),
        (video("gone"), "replaced", "replaced"),  # it is there now
        (video("windows"), "done", "done"),
        (video("windows", size_bytes=6), "replaced", "replaced"),
        (video("windows", label="y"), "relabelled", "relabelled"),
        (video("first window bad"), "done", "replaced"),
        (video("one window bad"), "done", "replaced"),
        (video("last window bad"), "done", "replaced"),
        (video("one window bad", label="y"), "relabelled", "replaced"),
    ],
)
@pytest.mark.parametrize("retry_failed", [False, True])
def test_plan(listed: Video, planned: str, planned_with_retry_failed: str, retry_failed: bool) -> None:
    plan = plan_run([listed], [INDEX], retry_failed=retry_failed)
    expected = planned_with_retry_failed if retry_failed else planned
    assert plan.new == [listed] * (expected == "new")
    assert plan.replaced == [listed] * (expected == "replaced")
    assert plan.relabelled == ({listed.video_id: listed} if expected == "relabelled" else {})
    assert plan.todo == plan.new + plan.replaced and plan.done == 1 - len(plan.todo)


def test_a_plan_keeps_the_order_of_the_list_and_leaves_unlisted_videos_alone() -> None:
    listed = [video("z"), video("one window bad"), video("good"), video("a"), video("bad"), video("gone")]
    plan = plan_run(listed, [INDEX], retry_failed=True)
    assert [v.video_id for v in plan.new] == ["z", "a"]
    assert [v.video_id for v in plan.replaced] == ["one window bad", "bad", "gone"]
    assert (plan.done, plan.relabelled) == (1, {})


def test_planning_holds_the_rows_of_one_shard_at_a_time() -> None:
    listed = [video(f"{n:06}") for n in range(20_000)]
    ids = [one.video_id for one in listed]

    def shards() -> Iterator[pa.Table]:
        for start in range(0, len(ids), 1000):
            rows = INDEX.slice(0, 1).to_pylist() * 1000
            yield pa.Table.from_pylist(
                [row | {"video_id": one} for row, one in zip(rows, ids[start : start + 1000], strict=True)],
                schema=INDEX.schema,
            )

    tracemalloc.start()
    plan = plan_run(listed, shards(), retry_failed=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.done == 20_000 and peak < 150 * len(listed), "bytes a video, where rows as dicts take 800"
