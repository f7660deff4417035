"""What became of the videos of a store: outcomes by video, the summary, and what is not whole."""

import csv
import io
import logging
import shlex
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from raypipe import __version__
from raypipe.console import shown_path, text_table
from raypipe.files import write_atomically
from raypipe.plan import Plan
from raypipe.shards import rows_of
from raypipe.storage import Place
from raypipe.store import FeatureStore
from raypipe.videos import Video

LOG = logging.getLogger("raypipe")

OUTCOMES = ("ok", "partial", "failed")
FAILURES_FILE = "failures.csv"
EXAMPLES_SHOWN = 3


def video_outcome(clip_outcomes: Collection[str]) -> str:
    """
    >>> video_outcome(["ok", "ok"]), video_outcome(["ok", "failed"]), video_outcome(["failed"])
    ('ok', 'partial', 'failed')
    """
    return next(iter(clip_outcomes)) if len(set(clip_outcomes)) == 1 else "partial"


def counts_line(outcomes: dict[str, int]) -> str:
    """
    >>> counts_line({"ok": 240, "partial": 0, "failed": 2})
    '242 videos: 240 ok, 0 partial, 2 failed'
    """
    counts = ", ".join(f"{outcomes.get(name, 0)} {name}" for name in OUTCOMES)
    return f"{sum(outcomes.values())} videos: {counts}"


CLIP_COLUMNS = ["video_id", "clip_index", "start_s", "end_s", "path", "outcome", "reason", "message"]


@dataclass(frozen=True)
class Account:
    """What became of videos and their clips."""

    outcomes: dict[str, int]
    """Videos by outcome."""
    clips: int
    reasons: dict[str, int]
    """Clips by reason."""
    not_whole: list[dict[str, Any]]
    """CLIP_COLUMNS of the clips that failed or were repaired."""


def account_for(store: FeatureStore, videos: Sequence[Video] | None = None) -> Account:
    """Of these videos, or of all that the store holds. Of whole clips only a shard's are in memory.

    Raises UserError where a video is there twice.
    """
    listed = None if videos is None else {video.video_id for video in videos}
    outcomes, reasons, count, broken = Counter[str](), Counter[str](), 0, []
    # Each shard by itself, as two copies of one with a single video would be one group.
    groups = (
        found for table in store.by_shard(CLIP_COLUMNS) for found in groupby(rows_of([table]), itemgetter(0))
    )
    seen = array("q")  # hashes of names, for their memory
    for video_id, group in groups:
        if listed is not None and video_id not in listed:
            continue
        seen.append(hash(video_id))
        clips = [dict(zip(CLIP_COLUMNS, row, strict=True)) for row in group]
        outcomes[video_outcome([clip["outcome"] for clip in clips])] += 1
        reasons.update(clip["reason"] for clip in clips if clip["reason"])
        count += len(clips)
        broken += [clip for clip in clips if clip["outcome"] != "ok"]
    if len(np.unique(np.frombuffer(seen, np.int64))) < len(seen):
        store.read(["video_id"])  # which names the video
    broken.sort(key=lambda clip: (clip["video_id"], clip["clip_index"]))
    return Account(dict(outcomes), count, dict(reasons), broken)


@dataclass(frozen=True)
class Costs:
    """What the extraction itself took."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    """By stage."""
    start_s: float | None = None
    """Until the first video was begun: Ray, the workers, the network."""


def summarize(account: Account, plan: Plan, costs: Costs, wall_s: float) -> dict[str, Any]:
    """What summary.json holds: the listed videos by outcome, their clips by reason, and what the run cost."""
    extracted = len(plan.todo)
    return {
        "videos": plan.done + extracted,
        "extracted": extracted,
        "done_before": plan.done,
        "outcomes": account.outcomes,
        "clips": account.clips,
        "reasons": account.reasons,
        "wall_s": round(wall_s, 3),
        "videos_per_s": round(extracted / wall_s, 3) if extracted else None,
        "start_s": costs.start_s and round(costs.start_s, 3),
        "cpu_s": {stage: round(seconds, 3) for stage, seconds in costs.cpu_s.items()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "raypipe": __version__,
        "command": shlex.join(["python", "-m", "raypipe.extract", *sys.argv[1:]]),
    }


def full_run(summary: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any] | None:
    """What the last run took that had everything to do: a re-run is measured against it."""
    if summary["extracted"] and not summary["done_before"]:
        return {name: summary[name] for name in ("videos", "wall_s", "videos_per_s", "cpu_s")}
    return previous.get("full_run")


def write_failures(account: Account, path: Place) -> None:
    """Every clip that failed or was repaired, a line each, for a spreadsheet."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CLIP_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(account.not_whole)
    write_atomically(path, file.getvalue().encode(errors="backslashreplace"))


def say_failures(account: Account, store: FeatureStore) -> None:
    """Failed and repaired clips by reason, with examples, and where all of them are listed."""
    if not (broken := account.not_whole):
        return
    LOG.info("not all videos are whole:\n%s", failures_table(broken))
    if (file := store.path / FAILURES_FILE).is_file():
        LOG.info("all %d: %s", len(broken), shown_path(file))


def failures_table(broken: list[dict[str, Any]]) -> str:
    """A row per outcome and reason, the commonest first, each with a few examples."""
    kinds = Counter((clip["outcome"], clip["reason"]) for clip in broken)
    lines = [["outcome", "reason", "clips", "for example"]]
    for (outcome, reason), count in kinds.most_common():
        examples = [c for c in broken if (c["outcome"], c["reason"]) == (outcome, reason)][:EXAMPLES_SHOWN]
        for i, clip in enumerate(examples):
            example = f"{printable(clip_name(clip))}: {printable(clip['message'] or 'no message')}"
            lines.append([outcome, reason, str(count), example] if i == 0 else ["", "", "", example])
    return text_table(lines)


def clip_name(clip: dict[str, Any]) -> str:
    """
    >>> clip_name({"video_id": "a.mp4", "clip_index": 2, "start_s": 4.0})
    'a.mp4 at 4 s'
    """
    return f"{clip['video_id']} at {clip['start_s']:g} s" if clip["clip_index"] else str(clip["video_id"])


MESSAGE_WIDTH = 100


def printable(text: str) -> str:
    """
    >>> printable("a name\\nwith a line break")
    'a name with a line break'
    """
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= MESSAGE_WIDTH else line[: MESSAGE_WIDTH - 1] + "…"


def few(names: Sequence[str]) -> str:
    """
    >>> few(["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"])
    'a.mp4, b.mp4, c.mp4 and 2 more'
    """
    more = f" and {len(names) - EXAMPLES_SHOWN} more" if len(names) > EXAMPLES_SHOWN else ""
    return ", ".join(map(printable, names[:EXAMPLES_SHOWN])) + more
