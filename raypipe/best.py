"""The best trial: judged, compared with the yardstick, written down."""

import math
import time
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from raypipe.calibration import fit_calibration
from raypipe.evidence import differences, held_out_side, out_of_fold_side
from raypipe.files import write_atomically, write_json
from raypipe.history import csv_text
from raypipe.results import BestResult, SideResult, TrialResult, Yardstick
from raypipe.run import Run
from raypipe.splits import Splits
from raypipe.wording import NO_INTERVAL, scored
from raypipe.yardstick import predict_folds, predict_test, refuse_not_finite, yardstick_name


def judge_best(
    run: Run,
    trial: TrialResult,
    yardstick: Yardstick,
    *,
    out_of_fold: NDArray[np.float32],
    refit: NDArray[np.float32],
    random_folds: NDArray[np.float32] | None,
) -> BestResult:
    """What the best trial is worth, from raw probabilities [N, C]: of its folds, of the model refitted on the
    whole training side, and of the same settings on folds that ignore groups."""
    clips, groups, seed = run.dataset.clips, run.dataset.groups, run.config.seed
    known = ~np.isnan(out_of_fold[:, 0])
    calibration = fit_calibration(clips.labels[known], out_of_fold[known])
    validation = out_of_fold_side(clips, groups, run.splits, out_of_fold, seed=seed)
    by_chance, chance_yardstick = None, None
    if random_folds is not None:
        by_chance = out_of_fold_side(clips, groups, run.random_splits, random_folds, seed=seed)
        chance_line = predict_folds(clips, run.random_splits, seed=seed)
        chance_yardstick = out_of_fold_side(clips, groups, run.random_splits, chance_line, seed=seed)
    test = held_out_side(clips, groups, run.splits, refit, calibration, seed=seed)
    return BestResult(
        trial_id=trial.trial_id,
        config=trial.course.at(trial.best_epoch),
        epochs=trial.best_epoch,
        calibration=calibration,
        validation=validation,
        test=test,
        raw_test=refit[test.positions] if test else None,
        over_yardstick=differences(clips, groups, validation, yardstick.validation, seed=seed),
        random_folds=by_chance,
        random_yardstick=chance_yardstick,
    )


def measure_yardstick(run: Run, splits: Splits) -> Yardstick:
    """The simple model on these folds, judged as trials are."""
    clips, groups, seed = run.dataset.clips, run.dataset.groups, run.config.seed
    started_s = time.monotonic()
    refuse_not_finite(clips)
    out_of_fold, test = predict_folds(clips, splits, seed=seed), predict_test(clips, splits, seed=seed)
    wall_s = time.monotonic() - started_s
    known = ~np.isnan(out_of_fold[:, 0])
    calibration = fit_calibration(clips.labels[known], out_of_fold[known])
    return Yardstick(
        name=yardstick_name(clips),
        validation=out_of_fold_side(clips, groups, splits, out_of_fold, seed=seed),
        test=held_out_side(clips, groups, splits, test, calibration, seed=seed),
        wall_s=wall_s,
    )


def write_best(run: Run, best: BestResult, yardstick: Yardstick) -> None:
    """model.json, what the model needs and means; metrics.json and predictions.csv, how good it is."""

    def scores(side: SideResult | None) -> dict[str, object] | None:
        return asdict(side.evaluation) if side else None

    def sides(validation: SideResult, test: SideResult | None) -> dict[str, object]:
        return {"validation": scores(validation), "test": scores(test)}

    spec, clips = run.store.spec(), run.dataset.clips
    write_json(
        run.best / "model.json",
        {
            "classes": clips.class_names,
            "store": str(run.store.path),
            "temperature": best.calibration.temperature,
            "threshold": best.calibration.threshold,
            "features": asdict(spec),
            "fingerprint": spec.fingerprint,
            "view": best.config.view,
            "backend": run.config.backend,
            "trial": best.config.model_dump(),
        },
    )
    rows = [
        {
            "video_id": clips.video_ids[position],
            "label": clips.class_names[clips.labels[position]],
            "side": name,
            "answer": clips.class_names[side.answers[i]],
            **{f"p_{c}": float(p) for c, p in zip(clips.class_names, side.probabilities[i], strict=True)},
        }
        for name, side in (("validation", best.validation), ("test", best.test))
        if side
        for i, position in enumerate(side.positions)
    ]
    write_atomically(run.best / "predictions.csv", csv_text(rows).encode(errors="surrogateescape"))
    write_json(  # the last: where it lies, all lies
        run.best / "metrics.json",
        {
            "trial": best.trial_id,
            "epochs": best.epochs,
            "metric": run.config.metric,
            "protocol": "given" if any(run.dataset.splits) else run.config.splits.protocol,
            "calibration": asdict(best.calibration),
            **sides(best.validation, best.test),
            "yardstick": {"name": yardstick.name, **sides(yardstick.validation, yardstick.test)},
            "over_yardstick": {name: asdict(gain) for name, gain in best.over_yardstick.items()},
            "beats_yardstick": best.gain_over_yardstick(run.config.metric).is_gain,
            "random_folds": scores(best.random_folds),
            "random_folds_yardstick": scores(best.random_yardstick),
        },
    )


def sentences(best: BestResult, yardstick: Yardstick, metric: str) -> list[str]:
    """What a person is told at the end: the scores of each side, and whether they were worth it."""
    said = [side_sentence("validation", best.validation)]
    if best.random_folds and best.random_yardstick:
        said.append(side_sentence("the same on random folds, as in most papers", best.random_folds))
    if best.test:
        said.append(side_sentence("test", best.test))
    return [*said, yardstick_sentence(best, yardstick, metric)]


def side_sentence(name: str, side: SideResult) -> str:
    e = side.evaluation
    return (
        f"{name}: accuracy {scored(e.accuracy, e.accuracy_interval, '95 % interval ')}, "
        f"AUC {scored(e.auc, e.auc_interval)}, on {e.clips} clips"
    )


def yardstick_sentence(best: BestResult, yardstick: Yardstick, metric: str) -> str:
    """Whether the best trial beats the yardstick by more than chance explains."""
    gain = best.gain_over_yardstick(metric)
    verdict = "it is better"
    if not gain.is_gain:
        verdict = "not better by more than chance gives: the search has not earned its cost"
    e = yardstick.validation.evaluation
    known = NO_INTERVAL
    if math.isfinite(gain.low):
        known = f"95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
    return (
        f"yardstick, a {yardstick.name}: accuracy {e.accuracy:.3f}, AUC {e.auc:.3f} on the same folds; "
        f"trial {best.trial_id} over it: {metric} {gain.value:+.3f} ({known}); {verdict}"
    )
