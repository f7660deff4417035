"""From feature shards to the best model: split, search, choose on validation folds, refit, test once.

python -m raypipe.tune --features results/features --num-samples 5
"""

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raypipe.cluster import Claim, claim_for, connect
from raypipe.config import (
    Range,
    SearchSpace,
    TrialConfig,
    TuneConfig,
    load_config,
    write_yaml,
)
from raypipe.console import LiveLine, duration, run_command, shown_path
from raypipe.dataset import Dataset, class_counts, load_dataset, split_dataset
from raypipe.errors import RunFailed, UserError
from raypipe.evidence import evaluate_side, run_report, score, worst_misses
from raypipe.leaderboard import Leaderboard, epoch_result, pending_trial
from raypipe.metrics import wilson_interval
from raypipe.report import BestResult, TrialResult, write_report
from raypipe.splits import Splits
from raypipe.store import FeatureStore, write_json
from raypipe.training import ClipSet, Epoch, best_epoch, out_of_fold, refit, stopped, train_trial

if TYPE_CHECKING:
    from ray.tune import Callback

LOG = logging.getLogger("raypipe")

OUT_OF_FOLD_FILE = "out_of_fold.npy"
GRACE_EPOCHS = 15
"""Epochs every trial gets before another can push it out."""
REPORT_EVERY_S = 5.0


def main(config: TuneConfig) -> Path:
    """Runs the search; returns the folder of its results. Raises UserError and RunFailed."""
    started, started_s = datetime.now().astimezone(), time.monotonic()
    store = FeatureStore(config.features)
    dataset = load_dataset(store)
    splits = split_dataset(dataset, config.splits, seed=config.seed, store=store)
    check_search(config)
    folder = new_run_folder(config.name)
    write_yaml(config, folder / "config.yaml")
    counts = class_counts(dataset, splits)
    for name, train, test, groups in counts:
        LOG.info("class %s: %d training clips, %d test clips, %d groups", name, train, test, groups)

    with connect() as cluster:
        claim = claim_for(cluster, config.resources)
        LOG.info("%d trials, each on %s", config.num_samples, claim.devices)
        LOG.info("curves: tensorboard --logdir %s", shown_path(folder / "trials"))
        LOG.info("report, rewritten as trials finish: %s", shown_path(folder / "report.html"))
        board = Leaderboard(total=config.num_samples, metric=config.metric)

        def page(best: BestResult | None) -> None:
            board.write_csv(folder / "leaderboard.csv")
            report = run_report(config, folder, store, dataset, splits, claim, board, best, started=started)
            write_report(folder / "report.html", report)

        page(None)
        search(config, dataset.clips, splits, claim, folder, board, page=lambda: page(None))
        best = board.best
        if best is None:
            raise RunFailed(why_no_trial(board, folder))
        LOG.info("the trials:\n%s", board.table())
        LOG.info("trial %s leads; training it on all %d training clips", best.trial_id, len(splits.training))
        result = finish_best(config, best, store, dataset, splits, claim, folder)
        page(result)
    say_result(result, folder, time.monotonic() - started_s)
    return folder


# --- before anything starts --------------------------------------------------------------------------


def check_search(config: TuneConfig) -> None:
    """Raises UserError for a combination that no trial could train with."""
    replicas = config.resources.gpus_per_trial
    values = config.search.get("batch_size", [config.trial.batch_size])
    ends = [values.low, values.high] if isinstance(values, Range) else values
    if isinstance(values, Range) and replicas > 1:
        raise UserError("search.batch_size: give a list of sizes, each divisible by --gpus-per-trial")
    for size in ends:
        if int(size) % replicas:
            raise UserError(
                f"--batch-size {size} does not divide by --gpus-per-trial {replicas}: "
                "every device trains the same share of a batch"
            )


def new_run_folder(name: str | None) -> Path:
    """results/NAME, which must be new; without a name the next free tune, tune-2, ..."""
    results = Path("results").absolute()
    if name is None:
        names = (f"tune-{number}" if number > 1 else "tune" for number in itertools.count(1))
        name = next(free for free in names if not (results / free).exists())
    folder = results / name
    if folder.exists():
        raise UserError(f"--name {name}: {folder} exists; choose another name or remove it")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--name {name}: {folder} cannot be made: {error.strerror}") from None
    return folder


# --- the search -----------------------------------------------------------------------------------


def search(
    config: TuneConfig,
    clips: ClipSet,
    splits: Splits,
    claim: Claim,
    folder: Path,
    board: Leaderboard,
    *,
    page: Callable[[], None],
) -> None:
    """Runs all trials with Ray Tune; the board is complete afterwards."""
    # Ctrl-C is handled by raypipe; Tune's own handler would swallow it.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints whatever `verbose` says
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    # A failed trial is told by the board in one line; its traceback is in the trial's folder.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            clips=clips,
            splits=splits,
            fixed=config.trial,
            metric=config.metric,
            replicas=claim.replicas,
            seed=config.seed,
        ),
        claim.resources,
    )
    tuner = tune.Tuner(
        trainable,
        param_space=tune_space(config.search),
        tune_config=tune.TuneConfig(
            num_samples=config.num_samples,
            search_alg=BasicVariantGenerator(random_state=config.seed),
            # Epochs are comparable between trials, since each covers all folds.
            scheduler=ASHAScheduler(
                time_attr="epoch",
                metric="score",
                mode="max",
                max_t=config.trial.epochs,
                grace_period=min(GRACE_EPOCHS, config.trial.epochs),
                reduction_factor=3,
            ),
            trial_name_creator=lambda trial: f"trial-{trial_number(trial.trial_id)}",
            trial_dirname_creator=lambda trial: f"trial-{trial_number(trial.trial_id)}",
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(folder),
            callbacks=[board_callback(board, config.trial, page)],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    tuner.fit()


def run_trial(
    params: dict[str, Any],
    *,
    clips: ClipSet,
    splits: Splits,
    fixed: TrialConfig,
    metric: str,
    replicas: int,
    seed: int,
) -> None:
    """One trial inside its own process: trains, and reports each epoch to Tune."""
    import ray
    from ray import tune

    config = merged(fixed, params)
    gpu_ids = ray.get_gpu_ids()
    files = Path(tune.get_context().get_trial_dir())

    def report(epochs: list[Epoch]) -> None:
        probabilities = out_of_fold(epochs, splits)
        np.save(files / OUT_OF_FOLD_FILE, probabilities)
        chosen = evaluate_side(clips, probabilities)
        last = evaluate_side(clips, epochs[-1].probabilities)
        tune.report(
            {
                "epoch": epochs[-1].number,
                "train_loss": epochs[-1].train_loss,
                "loss": epochs[-1].loss,
                "epoch_score": score(last, metric),
                "epoch_accuracy": last.accuracy,
                "epoch_s": epochs[-1].wall_s,
                "best_epoch": best_epoch(epochs),
                "score": score(chosen, metric),
                "accuracy": chosen.accuracy,
                "validation_clips": chosen.clips,
                "finished": len(epochs) >= config.epochs or stopped(epochs, config.patience),
                "gpu_ids": ",".join(str(number) for number in gpu_ids),
                "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            }
        )

    train_trial(clips, splits, config, gpus=len(gpu_ids), replicas=replicas, seed=seed, on_epoch=report)


def merged(fixed: TrialConfig, params: dict[str, Any]) -> TrialConfig:
    """The trial's config: what the search drew over what is fixed."""
    return TrialConfig.model_validate(fixed.model_dump() | params)


def tune_space(space: SearchSpace) -> dict[str, Any]:
    """raypipe's search space in Ray Tune's terms. Fields that are whole numbers draw whole numbers."""
    from ray import tune

    def domain(name: str, values: Any) -> Any:
        if not isinstance(values, Range):
            return tune.choice(list(values))
        if TrialConfig.model_fields[name].annotation is int:
            draw = tune.lograndint if values.log else tune.randint
            return draw(int(values.low), int(values.high) + 1)
        return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)

    return {name: domain(name, values) for name, values in space.items()}


def trial_number(trial_id: str) -> str:
    """Tune's id ends in the trial's number from 0; people count from 1."""
    return str(int(trial_id.rsplit("_", 1)[1]) + 1)


def board_callback(board: Leaderboard, fixed: TrialConfig, page: Callable[[], None]) -> "Callback":
    """Tells the board what Tune's trials do, shows its line, and rewrites the report now and then."""
    from ray.tune import Callback

    class BoardCallback(Callback):
        def __init__(self) -> None:
            self._line = LiveLine()
            self._started_s = time.monotonic()
            self._written_s = time.monotonic()

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            number = trial_number(trial.trial_id)
            board.put(replace(pending_trial(number, merged(fixed, trial.config)), status="running"))
            self._show()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            before = board.get(trial_number(trial.trial_id))
            config = merged(fixed, trial.config)
            hits = round(result["accuracy"] * result["validation_clips"])
            board.put(
                replace(
                    before,
                    epochs=(*before.epochs, epoch_result(result, config)),
                    best_epoch=result["best_epoch"],
                    score=result["score"],
                    accuracy=result["accuracy"],
                    accuracy_interval=wilson_interval(hits, result["validation_clips"]),
                    wall_s=result["time_total_s"],
                )
            )
            self._show()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            finished = trial.last_result.get("finished", False)
            self._end(trial, "done" if finished else "pruned", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            message = error_sentence(Path(trial.error_file).read_text())
            self._line.close()
            LOG.warning("trial %s failed: %s", trial_number(trial.trial_id), message)
            self._end(trial, "failed", message)

        def _end(self, trial: Any, status: str, message: str) -> None:
            board.put(replace(board.get(trial_number(trial.trial_id)), status=status, message=message))
            self._show()
            page()

        def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
            self._line.close()

        def _show(self) -> None:
            now_s = time.monotonic()
            self._line.show(board.line(now_s - self._started_s))
            if now_s - self._written_s > REPORT_EVERY_S:
                self._written_s = now_s
                page()

    return BoardCallback()


def error_sentence(text: str) -> str:
    """The last line of an error, which says what went wrong; all of it is in the trial's error.txt."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "unknown error"


def why_no_trial(board: Leaderboard, folder: Path) -> str:
    failed = [trial for trial in board.trials if trial.status == "failed"]
    if failed:
        return (
            f"all {len(failed)} trials that ended failed; the first: {failed[0].message}; "
            f"their errors are in {folder / 'trials'}"
        )
    return f"no trial came to its end; see {folder / 'trials'}"


# --- the best trial -------------------------------------------------------------------------------


def finish_best(
    config: TuneConfig,
    best: TrialResult,
    store: FeatureStore,
    dataset: Dataset,
    splits: Splits,
    claim: Claim,
    folder: Path,
) -> BestResult:
    """Trains the best trial on the whole training side, reads the test side once, fills best/."""
    import ray

    clips, trial = dataset.clips, TrialConfig.model_validate(best.config)
    place = folder / "best"
    place.mkdir()
    # One call per process: TensorFlow cannot start a second strategy in it.
    task = ray.remote(max_calls=1)(refit_best).options(
        num_cpus=claim.cpus, num_gpus=claim.gpus, name=f"refit trial {best.trial_id}"
    )
    probabilities = ray.get(
        task.remote(
            clips,
            splits.training,
            trial,
            epochs=best.best_epoch,
            replicas=claim.replicas,
            seed=config.seed,
            save_to=str(place / "model.keras"),
        )
    )
    validation_file = folder / "trials" / f"trial-{best.trial_id}" / OUT_OF_FOLD_FILE
    out_of_fold_probabilities = np.load(validation_file)
    test_probabilities = np.full_like(probabilities, np.nan)
    test_probabilities[splits.test] = probabilities[splits.test]
    result = BestResult(
        trial_id=best.trial_id,
        validation=evaluate_side(clips, out_of_fold_probabilities),
        test=evaluate_side(clips, test_probabilities) if len(splits.test) else None,
        epochs=best.best_epoch,
        misses=worst_misses(clips, test_probabilities if len(splits.test) else out_of_fold_probabilities),
    )
    spec = store.spec()
    write_json(
        place / "metrics.json",
        {
            "trial": best.trial_id,
            "epochs": best.best_epoch,
            "metric": config.metric,
            "validation": asdict(result.validation),
            "test": asdict(result.test) if result.test else None,
        },
    )
    write_json(
        place / "model.json",
        {
            "classes": clips.class_names,
            # The class of the highest probability is the answer; for two classes that is 0.5.
            "threshold": 0.5 if len(clips.class_names) == 2 else None,
            "features": asdict(spec),
            "fingerprint": spec.fingerprint,
            "trial": trial.model_dump(),
        },
    )
    return result


def refit_best(
    clips: ClipSet,
    positions: NDArray[np.int64],
    trial: TrialConfig,
    *,
    epochs: int,
    replicas: int,
    seed: int,
    save_to: str,
) -> NDArray[np.float32]:
    """`refit` in a process of its own on the cluster, on the GPUs that Ray gave it."""
    import ray

    gpus = len(ray.get_gpu_ids())
    return refit(
        clips, positions, trial, epochs=epochs, gpus=gpus, replicas=replicas, seed=seed, save_to=save_to
    )


# --- what a person sees ----------------------------------------------------------------------------


def say_result(result: BestResult, folder: Path, wall_s: float) -> None:
    """The scores of both sides, and where the report is."""
    for side, evaluation in (("validation", result.validation), ("test", result.test)):
        if evaluation:
            low, high = evaluation.accuracy_interval
            LOG.info(
                "%s: accuracy %.3f (95 %% interval %.3f to %.3f), AUC %.3f, on %d clips",
                side,
                evaluation.accuracy,
                low,
                high,
                evaluation.auc,
                evaluation.clips,
            )
    LOG.info("done in %s: %s", duration(wall_s), shown_path(folder / "report.html"))


if __name__ == "__main__":
    run_command(
        lambda: main(load_config(TuneConfig, prog="python -m raypipe.tune")),
        when_stopped="the trials so far are in the run's report.html and leaderboard.csv",
    )
