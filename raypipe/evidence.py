"""What a search has shown, as the report's values: scores by side, the worst mistakes, what to know first."""

import functools
import platform
import shlex
import sys
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.cluster import Claim
from raypipe.config import TuneConfig
from raypipe.dataset import Dataset, class_counts, leaks
from raypipe.leaderboard import Leaderboard
from raypipe.metrics import Evaluation, evaluate
from raypipe.report import BestResult, ClassCount, Miss, RunReport
from raypipe.splits import Splits
from raypipe.store import FeatureStore
from raypipe.training import ClipSet


def score(evaluation: Evaluation, metric: str) -> float:
    """The one number of an evaluation that ranks trials."""
    return float(getattr(evaluation, metric))


def evaluate_side(clips: ClipSet, probabilities: NDArray[np.float32]) -> Evaluation:
    """Scores over the clips that have probabilities; the rest are NaN."""
    rows = ~np.isnan(probabilities[:, 0])
    return evaluate(clips.labels[rows], probabilities[rows], clips.class_names)


MISSES_KEPT = 12


def worst_misses(clips: ClipSet, probabilities: NDArray[np.float32]) -> tuple[Miss, ...]:
    """The wrong answers that the model was surest of."""
    rows = np.flatnonzero(~np.isnan(probabilities[:, 0]))
    predicted = probabilities[rows].argmax(axis=1)
    wrong = rows[predicted != clips.labels[rows]]
    sure = probabilities[wrong].max(axis=1)
    return tuple(
        Miss(
            video_id=clips.video_ids[i],
            truth=clips.class_names[clips.labels[i]],
            predicted=clips.class_names[int(probabilities[i].argmax())],
            probability=float(probabilities[i].max()),
        )
        for i in wrong[np.argsort(-sure)][:MISSES_KEPT]
    )


def run_report(
    config: TuneConfig,
    folder: Path,
    store: FeatureStore,
    dataset: Dataset,
    splits: Splits,
    claim: Claim,
    board: Leaderboard,
    best: BestResult | None,
    *,
    started: datetime,
) -> RunReport:
    """The report's values as they stand."""
    spec = store.spec()
    return RunReport(
        name=folder.name,
        command=shlex.join(["python", "-m", "raypipe.tune", *sys.argv[1:]]),
        metric=config.metric,
        started=started.isoformat(timespec="seconds"),
        wall_s=(datetime.now().astimezone() - started).total_seconds(),
        features=str(store.path),
        view=spec.view,
        backbone=spec.backbone,
        classes=tuple(ClassCount(*row) for row in class_counts(dataset, splits)),
        folds=splits.folds,
        outcomes=dataset.outcomes,
        trials=tuple(board.trials),
        best=best,
        devices=claim.devices,
        versions=versions(),
        seed=config.seed,
        notes=tuple(notes(dataset, splits, claim)),
    )


def notes(dataset: Dataset, splits: Splits, claim: Claim) -> list[str]:
    """What a reader should know before believing the numbers."""
    said = []
    pairs = leaks(dataset, splits)
    if pairs:
        said.append(
            f"{len(pairs)} pairs of clips have the same content on two sides, for example "
            f"{pairs[0][0]} and {pairs[0][1]}: give both the same group, or scores look better than they are."
        )
    if all(group.startswith("video:") for group in dataset.groups):
        said.append(
            "The videos have no groups, so each is its own; if several were cut from one source, "
            "name it in a group column, or scores look better than they are."
        )
    if dataset.outcomes.get("failed"):
        said.append(f"{dataset.outcomes['failed']} videos failed in extraction and take no part.")
    if dataset.unlabelled:
        said.append(f"{dataset.unlabelled} clips have no label and take no part.")
    if len(set(dataset.groups)) < len(dataset.groups):
        said.append(
            "Intervals take clips as independent (Wilson). Clips of one group are alike, "
            "so the true intervals are wider."
        )
    gpu = "GPU use, memory and energy were not measured"
    said.append(f"{gpu}." if claim.gpus else f"{gpu}: the cluster has no GPU.")
    return said


@functools.cache  # looks through everything installed; the report is rewritten every few seconds
def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on, as installed."""
    names = ["raypipe", "ray", "keras", "tensorflow", "tensorflow-cpu", "numpy", "pyarrow"]
    installed = {d.metadata["Name"].replace("_", "-"): d.version for d in distributions()}
    found = {name.removesuffix("-cpu"): installed[name] for name in names if name in installed}
    return {"python": platform.python_version()} | found
