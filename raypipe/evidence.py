"""What a search has shown, as the report's values: scores by side, the worst mistakes, what to know first."""

import functools
import platform
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import distributions

import numpy as np
import yaml
from numpy.typing import NDArray

from raypipe.calibration import Calibration, cross_fitted
from raypipe.cluster import Claim
from raypipe.console import shown_path
from raypipe.dataset import Dataset, class_counts, leaks, torn_groups
from raypipe.findings import find
from raypipe.leaderboard import Leaderboard
from raypipe.metrics import Difference, Evaluation, evaluate, paired_differences
from raypipe.report import ClassCount, Commands, RunReport
from raypipe.results import BestResult, EpochResult, SideResult, TrialResult, Yardstick
from raypipe.run import Run
from raypipe.splits import Splits, have_groups
from raypipe.trial import ClipSet, Epoch, best_epoch, out_of_fold


def score(evaluation: Evaluation, metric: str) -> float:
    """The one number of an evaluation that ranks trials."""
    return float(getattr(evaluation, metric))


def evaluate_side(clips: ClipSet, probabilities: NDArray[np.float32]) -> Evaluation:
    """Scores over the clips that have probabilities; the rest are NaN. Without intervals."""
    rows = ~np.isnan(probabilities[:, 0])
    return evaluate(clips.labels[rows], probabilities[rows], clips.class_names)


def epoch_result(run: Run, epochs: Sequence[Epoch], raw: NDArray[np.float32]) -> tuple[EpochResult, float]:
    """The last of a trial's epochs, and the accuracy so far; `raw` [N, C] are out of fold, each fold at the
    epoch that is best on the others."""
    clips, metric, last = run.dataset.clips, run.config.metric, epochs[-1]
    rows = np.flatnonzero(~np.isnan(raw[:, 0]))
    probabilities, answers = cross_fitted(clips.labels[rows], raw[rows], run.splits.sides[rows])
    so_far = evaluate(clips.labels[rows], probabilities, clips.class_names, predicted=answers)
    alone = evaluate_side(clips, last.probabilities)
    result = EpochResult(
        epoch=last.number,
        train_loss=last.train_loss,
        loss=last.loss,
        score=score(alone, metric),
        accuracy=alone.accuracy,
        learning_rate=last.learning_rate,
        epoch_s=last.wall_s,
        score_so_far=score(so_far, metric),
    )
    return result, so_far.accuracy


def ended_trial(
    run: Run,
    trial: TrialResult,
    epochs: Sequence[Epoch],
    curve: Sequence[EpochResult],
    *,
    cut: str,
    startup_s: float,
    begun: int = 0,
) -> TrialResult:
    """What a trial came to, of which `begun` epochs were there before; `cut` says why it was cut short, if it
    was. One that has not come to its last epoch otherwise has ended a round."""
    raw = out_of_fold(epochs, run.splits)
    side = out_of_fold_side(run.dataset.clips, run.dataset.groups, run.splits, raw, seed=run.config.seed)
    metric = run.config.metric
    waits = run.config.scheduler == "pbt" and len(epochs) < run.config.trial.epochs
    return replace(
        trial,
        status="pruned" if cut else "waiting" if waits else "done",
        epochs=tuple(curve),
        best_epoch=best_epoch(epochs),
        score=score(side.evaluation, metric),
        score_interval=getattr(side.evaluation, f"{metric}_interval"),
        accuracy=side.evaluation.accuracy,
        accuracy_interval=side.evaluation.accuracy_interval,
        wall_s=trial.wall_s + startup_s + sum(epoch.wall_s for epoch in epochs[begun:]),
        startup_s=startup_s + (0.0 if np.isnan(trial.startup_s) else trial.startup_s),
        reason=cut,
    )


def out_of_fold_side(
    clips: ClipSet, groups: Sequence[str], splits: Splits, raw: NDArray[np.float32], *, seed: int
) -> SideResult:
    """The validation folds, from probabilities [N, C] as models gave them, NaN elsewhere. Each fold is
    calibrated, and answered, by what the other folds say."""
    rows = np.flatnonzero(~np.isnan(raw[:, 0]))
    probabilities, answers = cross_fitted(clips.labels[rows], raw[rows], splits.sides[rows])
    return side_result(clips, groups, rows, probabilities, answers, seed=seed)


def held_out_side(
    clips: ClipSet,
    groups: Sequence[str],
    splits: Splits,
    raw: NDArray[np.float32],
    calibration: Calibration,
    *,
    seed: int,
) -> SideResult | None:
    """The test side, from probabilities [N, C] as the model gave them; None where there is no such side."""
    rows = splits.test
    if not len(rows):
        return None
    probabilities = calibration.probabilities(raw[rows])
    return side_result(clips, groups, rows, probabilities, calibration.answers(probabilities), seed=seed)


def side_result(
    clips: ClipSet,
    groups: Sequence[str],
    rows: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    answers: NDArray[np.int64],
    *,
    seed: int,
) -> SideResult:
    """The clips at `rows`, with intervals from their groups."""
    evaluation = evaluate(
        clips.labels[rows],
        probabilities,
        clips.class_names,
        predicted=answers,
        groups=[groups[row] for row in rows],
        seed=seed,
    )
    return SideResult(rows, probabilities, answers, evaluation)


def differences(
    clips: ClipSet, groups: Sequence[str], one: SideResult, other: SideResult, *, seed: int
) -> dict[str, Difference]:
    """`one` less `other`, which are of the same clips."""
    return paired_differences(
        clips.labels[one.positions],
        (one.probabilities, one.answers),
        (other.probabilities, other.answers),
        [groups[row] for row in one.positions],
        seed=seed,
    )


def run_report(
    run: Run, board: Leaderboard, best: BestResult | None, yardstick: Yardstick | None
) -> RunReport:
    """The report's values as they stand."""
    spec = run.store.spec()
    return RunReport(
        name=run.folder.name,
        commands=commands(run),
        config=yaml.safe_dump(run.config.model_dump(exclude={"config"}, mode="json"), sort_keys=False),
        metric=run.config.metric,
        started=run.started,
        wall_s=(datetime.now().astimezone() - run.started).total_seconds(),
        features=str(run.store.path),
        view=spec.view,
        backbone=spec.backbone,
        classes=tuple(ClassCount(*row) for row in class_counts(run.dataset, run.splits)),
        folds=run.splits.folds,
        validation_how=run.splits.validation_how,
        outcomes=run.dataset.outcomes,
        trials=tuple(board.trials),
        best=best,
        yardstick=yardstick,
        findings=find(run, board, best, yardstick) if best and yardstick else None,
        devices=run.claim.devices,
        versions=versions(),
        seed=run.config.seed,
        notes=tuple(
            notes(
                run.dataset,
                run.splits,
                run.claim,
                protocol=run.config.splits.protocol,
                scheduler=run.config.scheduler,
                retried=board.retried,
            )
        ),
    )


def commands(run: Run) -> Commands:
    """What to type for the same again, to go on, and to use the model."""
    folder, settings = shown_path(run.folder), shown_path(run.folder / "config.yaml")
    # Not the flags as they were given: a --name among them is taken now.
    again = ["--config", settings, "--name", f"{run.folder.name}-again"]
    return Commands(
        repeat=shlex.join(["python", "-m", "raypipe.tune", *again]),
        resume=shlex.join(["python", "-m", "raypipe.tune", "--resume", folder]),
        predict=shlex.join(["python", "-m", "raypipe.predict", "--model", folder, "--input", "new_videos/"]),
    )


def notes(
    dataset: Dataset,
    splits: Splits,
    claim: Claim,
    *,
    protocol: str = "grouped",
    scheduler: str = "none",
    retried: Sequence[str] = (),
) -> list[str]:
    """What a reader should know before believing the numbers."""
    said = []
    if scheduler == "pbt":
        said.append(
            "Settings were changed in mid-training by validation scores, many times (--scheduler pbt): "
            "the best validation score flatters more than in other searches: the test side tells."
        )
    if splits.folds == 1:
        said.append(
            "There is one validation side (the manifest's split column): trials were ranked, and epoch, "
            "temperature and threshold chosen, on the very clips that its scores are of, so they flatter: "
            "the test side tells."
        )
    if retried:
        said.append(
            f"Trials that failed at first and were trained once more (--retry-failed): {', '.join(retried)}. "
            "What was decided meanwhile stayed, so the same seed need not give this search again."
        )
    if protocol == "random":
        said.append(
            "Clips were dealt to the sides one by one (--protocol random), so a source may lie on several: "
            "compare with numbers that were made so, and expect less on new sources."
        )
    pairs = leaks(dataset, splits)
    if pairs:
        said.append(
            f"{len(pairs)} pairs of clips have the same content on two sides, for example "
            f"{pairs[0][0]} and {pairs[0][1]}: give both the same group, or scores look better than they are."
        )
    torn = torn_groups(dataset, splits) if protocol != "random" else []
    if torn:
        said.append(
            f"The manifest's split column has {len(torn)} groups on several sides, for example {torn[0]}: "
            "clips of one source are alike, so scores look better than they are."
        )
    if not have_groups(dataset.groups):
        said.append(
            "The videos have no groups, so each is its own; if several were cut from one source, "
            "name it in a group column, or scores look better than they are."
        )
    failed = dataset.outcomes.get("failed", 0)
    if dataset.zero_filled:
        said.append(f"{dataset.zero_filled} clips failed in extraction and take part as zeros.")
    if failed > dataset.zero_filled:
        said.append(f"{failed - dataset.zero_filled} clips failed in extraction and take no part.")
    if dataset.unlabelled:
        said.append(f"{dataset.unlabelled} clips have no label and take no part.")
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
