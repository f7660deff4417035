"""What a search has found, in detail: decisions side by side, groups, mistakes with their frames, look-alikes
across sides, cost. It takes some seconds, so only a finished search has it; while trials run, the page is
rewritten without."""

import csv
import io
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.files import read_array
from raypipe.importance import importances
from raypipe.leaderboard import Leaderboard
from raypipe.neighbours import near_duplicates
from raypipe.population import rounds
from raypipe.report import (
    Cost,
    Findings,
    GroupResult,
    LookAlike,
    LookAlikes,
    Miss,
    Side,
    varying_settings,
)
from raypipe.results import BestResult, SideResult, Yardstick
from raypipe.run import Run
from raypipe.splits import ALWAYS_TRAIN, TEST, have_groups

NAN = float("nan")
MISSES_KEPT = 12
LOOK_ALIKES_KEPT = 20


def find(run: Run, board: Leaderboard, best: BestResult, yardstick: Yardstick) -> Findings:
    """Everything on the page that needs the best model."""
    return Findings(
        sides=sides_of(run, best, yardstick),
        importances=importances(board.trials, varying_settings(board.trials), seed=run.config.seed),
        groups=group_results(run, best),
        misses=worst_misses(run, best.test or best.validation),
        look_alikes=look_alikes(run),
        durations_s=durations_s(run),
        cost=cost_of(run, board, yardstick),
    )


def sides_of(run: Run, best: BestResult, yardstick: Yardstick) -> tuple[Side, ...]:
    """Validation, and test where there is one, with what the network said before the temperature."""
    labels = run.dataset.clips.labels
    out_of_fold = read_array(run.out_of_fold(best.trial_id))
    sides = [
        Side(
            "Validation",
            run.splits.validation_how,
            labels[best.validation.positions],
            out_of_fold[best.validation.positions],
            best.validation.probabilities,
            yardstick.validation.probabilities,
        )
    ]
    if best.test and yardstick.test:
        assert best.raw_test is not None, "a test side was predicted"
        sides.append(
            Side(
                "Test",
                "held out, read once",
                labels[best.test.positions],
                best.raw_test,
                best.test.probabilities,
                yardstick.test.probabilities,
            )
        )
    return tuple(sides)


def group_results(run: Run, best: BestResult) -> tuple[GroupResult, ...]:
    """The groups of both sides, those with the most mistakes first; none where each video is its own."""
    clips, groups = run.dataset.clips, run.dataset.groups
    if not have_groups(groups):
        return ()
    found = []
    for title, side in (("validation", best.validation), ("test", best.test)):
        if side is None:
            continue
        names = [groups[position] for position in side.positions]
        right = side.answers == clips.labels[side.positions]
        hits = Counter(name for name, hit in zip(names, right, strict=True) if hit)
        found += [GroupResult(name, title, count, hits[name]) for name, count in Counter(names).items()]
    return tuple(sorted(found, key=lambda group: (group.right - group.clips, group.accuracy, group.name)))


# --- mistakes ----------------------------------------------------------------------------------------------


def worst_misses(run: Run, side: SideResult) -> tuple[Miss, ...]:
    """The wrong answers that the model was surest of, with their frames."""
    from raypipe.strips import strips

    clips = run.dataset.clips
    chosen = surest_misses(clips.labels, side)
    pictures = strips(addresses(run, side.positions[chosen]), run.store.spec()) if len(chosen) else []
    return tuple(
        Miss(
            video_id=clips.video_ids[side.positions[i]],
            truth=clips.class_names[clips.labels[side.positions[i]]],
            predicted=clips.class_names[side.answers[i]],
            probability=float(side.probabilities[i, side.answers[i]]),
            jpeg=picture.jpeg,
            missing=picture.missing,
        )
        for i, picture in zip(chosen, pictures, strict=True)
    )


def surest_misses(labels: NDArray[np.int64], side: SideResult) -> NDArray[np.int64]:
    """Rows of `side` that are answered wrongly, the surest first."""
    wrong = np.flatnonzero(side.answers != labels[side.positions])
    sure = side.probabilities[wrong, side.answers[wrong]]
    return wrong[np.argsort(-sure, kind="stable")][:MISSES_KEPT]


def addresses(run: Run, positions: NDArray[np.int64]) -> list[tuple[str, int]]:
    """Path of the video, and number of the clip in it, of the clips at `positions`."""
    rows = stored(run, positions, ["path", "clip_index"])
    return [(row["path"], row["clip_index"]) for row in rows]


def stored(run: Run, positions: NDArray[np.int64], columns: list[str]) -> list[dict[str, Any]]:
    """What the store says of the clips at `positions`."""
    source = run.dataset.clips.source
    assert source, "clips of a store say where they are from"
    wanted = {source.clips[position]: place for place, position in enumerate(positions)}
    found: list[dict[str, Any]] = [{}] * len(wanted)
    for row in run.store.read([*columns, "video_id", "clip_index"]).to_pylist():
        place = wanted.get((row["video_id"], row["clip_index"]))
        if place is not None:
            found[place] = row
    return found


# --- leaks -------------------------------------------------------------------------------------------------


def look_alikes(run: Run) -> LookAlikes:
    """Clips on two sides that are much alike, by name."""
    clips, groups, sides = run.dataset.clips, run.dataset.groups, run.splits.sides
    found = near_duplicates(clips, sides, seed=run.config.seed)
    shown = tuple(
        LookAlike(
            first=clips.video_ids[pair.first],
            second=clips.video_ids[pair.second],
            groups=(groups[pair.first], groups[pair.second]),
            sides=(side_name(int(sides[pair.first])), side_name(int(sides[pair.second]))),
            cosine=pair.cosine,
        )
        for pair in found.pairs[:LOOK_ALIKES_KEPT]
    )
    return LookAlikes(found.view, found.cut_off, found.compared, len(found.pairs), shown)


def side_name(side: int) -> str:
    """
    >>> side_name(TEST), side_name(0)
    ('test', 'fold 1')
    """
    return {TEST: "test", ALWAYS_TRAIN: "train"}.get(side, f"fold {side + 1}")


# --- data --------------------------------------------------------------------------------------------------


def durations_s(run: Run) -> tuple[tuple[float, float, float], ...]:
    """Of each class the shortest, the middle and the longest clip."""
    labels = run.dataset.clips.labels
    rows = stored(run, np.arange(len(labels)), ["start_s", "end_s"])
    lengths = np.array([(row["end_s"] or NAN) - (row["start_s"] or 0.0) for row in rows])
    of_classes = [lengths[labels == number] for number in range(len(run.dataset.clips.class_names))]
    return tuple(tuple(np.percentile(one, [0, 50, 100]).tolist()) for one in map(known, of_classes))


def known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without NaN, or one NaN where there is nothing else."""
    there = values[~np.isnan(values)]
    return there if len(there) else np.array([NAN])


# --- cost --------------------------------------------------------------------------------------------------


def cost_of(run: Run, board: Leaderboard, yardstick: Yardstick) -> Cost:
    """What all trials took, and what extraction said of itself."""
    trials = board.trials
    hours = sum(trial.wall_s for trial in trials if np.isfinite(trial.wall_s)) / 3600
    startups_s = [trial.startup_s for trial in trials if np.isfinite(trial.startup_s)]
    summary = run.store.summary()
    extraction = summary.get("full_run") or {}
    return Cost(
        trials_s=3600 * hours,
        startup_s=sum(startups_s) if startups_s else NAN,
        cpu_hours=hours * run.claim.cpus,
        gpu_hours=hours * run.claim.gpus if run.claim.gpus else NAN,
        energy_kwh=energy_j(run, [trial.trial_id for trial in trials]) / 3.6e6,
        yardstick_s=yardstick.wall_s,
        extraction_s=extraction.get("wall_s") or NAN,
        extraction_cpu_s=sum(extraction["cpu_s"].values()) if extraction.get("cpu_s") else NAN,
    )


def energy_j(run: Run, trial_ids: Sequence[str]) -> float:
    """What the GPUs drew over all epochs of these trials; NaN where one of them was not measured."""
    total = 0.0
    ends = rounds(run.config) if run.config.scheduler == "pbt" else []
    parts = [(number, begun) for number, begun in enumerate([0, *ends[:-1]], 1)] if ends else [(0, 0)]
    for trial_id, (number, begun) in itertools.product(trial_ids, parts):
        try:
            text = (run.part(trial_id, number) / "history.csv").read_text()
        except FileNotFoundError:  # it failed before its first epoch
            continue
        rows = csv.DictReader(io.StringIO(text))
        drawn = [row["energy_j"] for row in rows if int(row["epoch"]) > begun]
        if "" in drawn:
            return NAN
        total += sum(map(float, drawn))
    return total or NAN
