"""Every video is accounted for: by outcome, by reason, by name."""

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
from features import make_store

from raypipe.errors import UserError
from raypipe.outcomes import (
    CLIP_COLUMNS,
    Costs,
    account_for,
    failures_table,
    full_run,
    printable,
    summarize,
    write_failures,
)
from raypipe.plan import plan_run
from raypipe.store import FeatureStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store") / "features", clips=6, failed=2)


def test_each_video_is_in_the_account_once(store: FeatureStore) -> None:
    account = account_for(store)
    assert account.outcomes == {"ok": 6, "failed": 2}
    assert (account.clips, account.reasons) == (8, {"damaged": 2})
    assert [clip["video_id"] for clip in account.not_whole] == ["clip006.mp4", "clip007.mp4"]


@pytest.mark.parametrize("clips", [1, 6])
def test_a_shard_that_somebody_copied_is_noticed(clips: int, tmp_path: Path) -> None:
    store = make_store(tmp_path / "features", clips=clips)
    (shard,) = store.shards()
    shutil.copy(str(shard), tmp_path / "features" / "part-z.parquet")
    words = f"{store.path}: clip000.mp4 is there twice, in {shard.name} and part-z.parquet; delete all"
    for read in (lambda: store.read(["video_id"]), lambda: account_for(store)):
        with pytest.raises(UserError, match=re.escape(words)):
            read()


def test_of_listed_videos_only_these_are_counted(store: FeatureStore) -> None:
    assert account_for(store, []).outcomes == {}


def test_the_file_of_failures_has_a_line_for_each(store: FeatureStore, tmp_path: Path) -> None:
    write_failures(account_for(store), tmp_path / "failures.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "failures.csv").read_text())))
    assert list(rows[0]) == CLIP_COLUMNS
    assert [(row["video_id"], row["reason"]) for row in rows] == [
        ("clip006.mp4", "damaged"),
        ("clip007.mp4", "damaged"),
    ]


def test_the_summary_of_a_run_with_nothing_to_do(store: FeatureStore) -> None:
    summary = summarize(account_for(store), plan_run([], store.index(), retry_failed=False), Costs(), 0.5)
    assert (summary["extracted"], summary["videos_per_s"], summary["start_s"]) == (0, None, None)


def test_the_table_shows_the_commonest_reason_first_and_three_examples_of_each() -> None:
    broken = [
        {
            "video_id": f"{reason}{number}.mp4",
            "clip_index": 0,
            "outcome": "failed",
            "reason": reason,
            "message": None,
        }
        for reason, count in (("timeout", 1), ("damaged", 5))
        for number in range(count)
    ]
    lines = [line.split() for line in failures_table(broken).splitlines()]
    assert [line[:3] for line in lines[1:] if line[0] == "failed"] == [
        ["failed", "damaged", "5"],
        ["failed", "timeout", "1"],
    ]
    assert sum("damaged" in " ".join(line) for line in lines) == 3


def test_a_name_does_not_reach_beyond_its_line() -> None:
    assert printable("a\x1b[31m\n" + "b" * 300) == "a [31m " + "b" * 92 + "…"


FULL = {"videos": 6, "wall_s": 9.0, "videos_per_s": 0.667, "cpu_s": {"decode": 3.5, "embed": 7.5}}


@pytest.mark.parametrize(
    ("summary", "previous", "kept"),
    [
        (FULL | {"extracted": 6, "done_before": 0}, {}, FULL),
        (FULL | {"extracted": 0, "done_before": 6, "wall_s": 0.3}, {"full_run": FULL}, FULL),
        (FULL | {"extracted": 2, "done_before": 4}, {}, None),
    ],
)
def test_the_summary_keeps_what_a_full_run_took(summary: dict, previous: dict, kept: dict | None) -> None:
    assert full_run(summary, previous) == kept
