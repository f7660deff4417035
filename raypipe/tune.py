"""From feature shards to the best model: split, search, choose on validation folds, refit, test once.

python -m raypipe.tune --features results/features --num-samples 5
python -m raypipe.tune --resume results/tune
python -m raypipe.tune --features s3://bucket/features --results s3://bucket/results
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.best import judge_best, measure_yardstick, sentences, write_best
from raypipe.checkpoints import STATES, Superseded
from raypipe.cluster import (
    Claim,
    Cluster,
    claim_for,
    connect,
    keep_credentials_home,
    name_process,
    outlive_memory_monitor,
)
from raypipe.config import TrialConfig, TuneConfig
from raypipe.console import LiveLine, duration, resume_command, run_command, shown_path
from raypipe.dataset import check_trial, class_counts, data_digest, load_dataset, split_dataset
from raypipe.engines import refuse_missing
from raypipe.errors import RunFailed, UserError
from raypipe.evidence import ended_trial, epoch_result, run_report
from raypipe.failures import (
    NO_FAULT_OF_A_TRIAL,
    failure_of,
    failure_of_process,
)
from raypipe.files import read_array, write_array, write_json
from raypipe.folders import alone_in, begin, naming, new_run_folder, none_left_blank, storage_watched
from raypipe.leaderboard import Leaderboard, pending_trial, read_trial, read_trials, with_epoch
from raypipe.mirror import borrowed, mirrored
from raypipe.reading import NO_OTHER_FLAG, load_config, read_yaml
from raypipe.refit import PLAIN_LINE_S, SHOW_EVERY_S, train_best
from raypipe.report import write_report
from raypipe.results import BestResult, EpochResult, TrialResult, trial_as_json
from raypipe.run import FAILED_FILE, Run
from raypipe.scratch import scratch
from raypipe.search import warm_settings
from raypipe.space import Range
from raypipe.steering import TIME_UP, Assignment, Steering
from raypipe.storage import Place, StorageError, place
from raypipe.store import FeatureStore
from raypipe.training import train_trial
from raypipe.trial import Epoch, best_epoch, out_of_fold, stopped

if TYPE_CHECKING:
    from ray.tune import Callback
    from ray.tune.search import Searcher

LOG = logging.getLogger("raypipe")

REPORT_EVERY_S = 30.0
"""The page is also rewritten whenever a trial ends; drawing it takes the driver about a second."""
ROOM_BYTES = 64 << 20
"""A disk with less is full."""


def main(config: TuneConfig) -> Place:
    """Runs the search, or goes on with one; returns the folder of its results. Raises UserError and
    RunFailed."""
    started, started_s = datetime.now().astimezone(), time.monotonic()
    folder, retry = None, config.retry_failed
    if config.resume is not None:
        config, folder = begun(config)
    elif retry:
        raise UserError("--retry-failed: goes with --resume results/NAME, the run whose trials failed")
    store = FeatureStore(config.features)
    check_search(config)
    dataset = load_dataset(store, zero_fill=config.zero_fill_failed)
    for trial in config.trials():
        check_trial(dataset.clips, trial)
    first = warm_settings(config, earlier_trials(config.warm_start)) if config.warm_start else []
    splits = split_dataset(dataset, config.splits, seed=config.seed, store=store)  # kept from here on
    goes_on = folder is not None
    folder = folder or new_run_folder(place(config.results, flag="--results"), config.name)
    for name, train, test, groups in class_counts(dataset, splits):
        LOG.info("class %s: %d training clips, %d test clips, %d groups", name, train, test, groups)

    go_on = resume_command(folder)
    with (
        storage_watched(folder, go_on=go_on),
        alone_in(folder) as check_alone,
        none_left_blank(folder),
        connect() as cluster,
    ):
        claim = claim_for(cluster, config.resources)
        if not goes_on:
            begin(config, folder)
        at_once = planned_at_once(folder, config, cluster, claim, data_digest(dataset, splits))
        run = Run(config, folder, store, dataset, splits, claim, at_once, started)
        LOG.info("%d trials, %d at once, each on %s", config.num_samples, run.at_once, claim.devices)
        reader = "tensorboard --logdir " if isinstance(run.trials, Path) else ""
        LOG.info("curves: %s%s", reader, shown_path(run.trials))
        LOG.info("report, rewritten as trials finish: %s", shown_path(run.report))
        LOG.info("if stopped: %s", go_on)
        if first:
            LOG.info("%d settings of %s are tried first", len(first), config.warm_start)
        failed = take_failed(run, retry=retry)
        board = Leaderboard(
            total=config.num_samples,
            metric=config.metric,
            gpus=(claim.gpus, cluster.gpus),
            # A population goes through its rounds again, which cost nothing where they have ended.
            before=read_trials(run.trials) if config.scheduler != "pbt" else (),
            retried=[trial.trial_id for trial in failed],
        )
        again = [trial for trial in failed if not board.has(trial.trial_id)]
        if again:
            LOG.info("trained once more, as they failed: trials %s", ", ".join(t.trial_id for t in again))
        yardstick = measure_yardstick(run, splits)

        def page(best: BestResult | None) -> None:
            try:
                check_alone()
                board.write_csv(run.leaderboard)
                write_report(run.report, run_report(run, board, best, yardstick))
            except StorageError as error:
                if best:
                    raise
                LOG.warning("%s: takes no report now: %s", run.folder, error)  # it will be drawn again

        page(None)
        search(Steering(run, board, first, again=again), page=lambda: page(None))
        leader = board.best
        if leader is None:
            raise RunFailed(why_no_trial(board, run))
        LOG.info("the trials:\n%s", board.table())
        clips = len(splits.training)
        LOG.info("trial %s leads; training it on all %d training clips", leader.trial_id, clips)
        whole, dealt = train_best(run, leader)
        folds = read_array(run.out_of_fold(leader.trial_id))
        best = judge_best(run, leader, yardstick, out_of_fold=folds, refit=whole, random_folds=dealt)
        write_best(run, best, yardstick)
        page(best)
    for sentence in sentences(best, yardstick, config.metric):
        LOG.info("%s", sentence)
    LOG.info("done in %s: %s", duration(time.monotonic() - started_s), shown_path(run.report))
    return folder


# --- before anything starts --------------------------------------------------------------------------


def begun(config: TuneConfig) -> tuple[TuneConfig, Place]:
    """The settings and the folder of the run that --resume names. Raises UserError where there is none."""
    folder = place(str(config.resume), flag="--resume")
    if config.model_copy(update={"resume": None, "config": None, "retry_failed": False}) != TuneConfig():
        raise UserError(f"--resume: {NO_OTHER_FLAG}")
    with naming(f"--resume {config.resume}"):
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"--resume {config.resume}: no run there; give a folder that tune made, results/NAME"
            )
    kept = read_yaml(TuneConfig, folder / "config.yaml", flag="--resume")
    if config.retry_failed and kept.scheduler == "pbt":
        raise UserError(
            "--retry-failed: the others of a population have gone on without the trials that failed "
            "(scheduler pbt); start a new run, perhaps with --warm-start"
        )
    return kept, folder


def check_search(config: TuneConfig) -> None:
    """Raises UserError for a combination that no trial could train with."""
    refuse_missing(config.backend)
    replicas = config.resources.gpus_per_trial
    spaces = [config.space, *config.space_by_model.values()]
    for values in [space["batch_size"] for space in spaces if "batch_size" in space]:
        if isinstance(values, Range) and replicas > 1:
            raise UserError("space.batch_size: give a list of sizes, each divisible by --gpus-per-trial")
    for trial in config.trials():
        if trial.batch_size % replicas:
            raise UserError(
                f"--batch-size {trial.batch_size} does not divide by --gpus-per-trial {replicas}: "
                "every device trains the same share of a batch"
            )


def earlier_trials(folder: str) -> list[TrialResult]:
    """The trials of the run that --warm-start names. Raises UserError where there are none."""
    with naming(f"--warm-start {folder}"):
        found = read_trials(place(folder, flag="--warm-start") / "trials")
    if not found:
        raise UserError(f"--warm-start {folder}: no trials there; give a folder that tune made, results/NAME")
    return found


def planned_at_once(folder: Place, config: TuneConfig, cluster: Cluster, claim: Claim, data: str) -> int:
    """How many trials train at the same time; a run that goes on keeps what it began with, since its
    decisions depend on it. Raises UserError where the clips are others than they were."""
    file = folder / "run.json"
    if not file.exists():
        places = [
            cluster.most_cpus // claim.cpus,
            config.num_samples,
            config.max_concurrent or config.num_samples,
        ]
        places += [cluster.most_gpus // claim.gpus] if claim.gpus else []
        write_json(file, {"at_once": max(1, min(places)), "data": data})
    kept = json.loads(file.read_text())
    if kept["data"] != data:
        raise UserError(
            f"--resume {shown_path(folder)}: the clips of {config.features} have changed since it began; "
            "start a new run, perhaps with --warm-start"
        )
    return int(kept["at_once"])


# --- the search -----------------------------------------------------------------------------------


def take_failed(run: Run, *, retry: bool) -> list[TrialResult]:
    """With `retry` makes room for the trials that have failed to be trained once more. All such trials as
    they had failed, also those of which an earlier --retry-failed made room."""
    for trial in read_trials(run.trials) if retry else ():
        if trial.status == "failed":
            write_json(run.failed_file(trial.trial_id), trial_as_json(trial))
            run.trial_file(trial.trial_id).unlink()
    return read_trials(run.trials, FAILED_FILE)


def search(steering: Steering, *, page: Callable[[], None]) -> None:
    """Runs all trials; the board is complete afterwards. Raises RunFailed where the disk is full."""
    run, board = steering.run, steering.board
    if not steering.nothing_left():
        with ray_tunes_notes(run) as notes:
            run_trials(run, board, steering, page=page, notes=notes)
    if run.config.scheduler == "pbt":
        end_population(run, board)


def end_population(run: Run, board: Leaderboard) -> None:
    """Writes down how the trials of a population ended, as other trials do themselves."""
    for trial in board.trials:
        if trial.status == "waiting":
            trial = replace(trial, status="pruned", reason=TIME_UP)
            board.put(trial)
        if trial.ended:
            run.trial(trial.trial_id).mkdir(parents=True, exist_ok=True)
            write_json(run.trial_file(trial.trial_id), trial_as_json(trial))


@contextlib.contextmanager
def ray_tunes_notes(run: Run) -> Iterator[Path]:
    """A folder for what Ray Tune writes down. Nothing is read from there again, so where it cannot be in the
    run's folder it is not kept."""
    if isinstance(run.tune, Path):
        yield run.tune
        return
    with scratch() as folder:
        yield folder / run.tune.name


def run_trials(
    run: Run, board: Leaderboard, steering: Steering, *, page: Callable[[], None], notes: Path
) -> None:
    """Has Ray Tune place and run what the steering asks for."""
    board.begin()
    # Ctrl-C is handled by raypipe; Tune's own handler would swallow it.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints whatever `verbose` says
    # A trial writes its own curves; Tune's would stand beside them.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # With a searcher Tune would have one trial wait for its place at a time.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(run.at_once)
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    keep_credentials_home()
    outlive_memory_monitor()
    # A failed trial is told by the board in one line; its traceback is in the trial's folder.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    reports = JsonLoggerCallback()
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, run=run), run.claim.resources),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # the searcher knows when to end, also where trials are tried again
            search_alg=searcher(steering),
            # Importing TensorFlow takes as long as many a trial, and a process' one strategy serves all.
            reuse_actors=True,
            trial_name_creator=lambda trial: Assignment(**trial.config).name,
            trial_dirname_creator=lambda trial: Assignment(**trial.config).name,
        ),
        run_config=tune.RunConfig(
            name=notes.name,
            storage_path=str(notes.parent),
            callbacks=[board_callback(run, board, steering, page), reports],
            failure_config=tune.FailureConfig(max_failures=0),  # `Steering.try_again` knows when it pays
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        # Where the disk is full they cannot be flushed, which Python would complain about at its end.
        for file in reports._trial_files.values():
            with contextlib.suppress(OSError):
                file.close()


def searcher(steering: Steering) -> "Searcher":
    """Ray Tune's view of the steering."""
    from ray.tune.search import Searcher

    class Numbered(Searcher):
        def suggest(self, trial_id: str) -> Any:
            assignment = steering.next()
            if assignment is None:
                return Searcher.FINISHED if steering.finished else None
            return asdict(assignment)

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass  # the board hears of it

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()  # a run goes on from its trials' own files

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Numbered()


def board_callback(run: Run, board: Leaderboard, steering: Steering, page: Callable[[], None]) -> "Callback":
    """Tells the board what Tune's trials do, shows its line, and rewrites the report now and then."""
    from ray.tune import Callback

    from raypipe.monitoring import RunMeter

    class BoardCallback(Callback):
        def __init__(self) -> None:
            self._line, self._meter = LiveLine(plain_s=PLAIN_LINE_S), RunMeter()
            self._started_s = self._written_s = self._shown_s = time.monotonic()

        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            # Ray Tune's loop turns many times a second, also while nothing happens.
            if time.monotonic() - self._shown_s > SHOW_EVERY_S:
                self._show()

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            number = trial.config["number"]
            board.put(replace(board.get(number), status="running"))
            self._show()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            before = board.get(trial.config["number"])
            epoch = EpochResult(**{name: result[name] for name in EpochResult.__dataclass_fields__})
            board.put(
                replace(
                    before,
                    epochs=with_epoch(before.epochs, epoch),
                    best_epoch=result["best_epoch"],
                    score=epoch.score_so_far,
                    accuracy=result["accuracy_so_far"],
                    wall_s=trial.config["before"].get("wall_s", 0.0) + result["time_total_s"],
                )
            )
            self._meter.epoch(trial.config["number"], epoch.score_so_far)
            self._show()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(Assignment(**trial.config), "it ended without a word")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(Assignment(**trial.config), Path(trial.error_file).read_text())

        def _end(self, assignment: Assignment, said: str) -> None:
            if told := read_trial(run.trial_file(assignment.number, assignment.round)):
                board.put(told)
            else:
                self._end_untold(assignment, said)
            trial = board.get(assignment.number)
            if trial.status == "failed":
                self._line.close()
                LOG.warning("trial %s failed (%s): %s", assignment.number, trial.reason, trial.message)
            self._show()
            page()

        def _end_untold(self, assignment: Assignment, said: str) -> None:
            """Its process did not say how it ended: killed, on a node that was, or with nowhere to write."""
            number, (reason, message) = assignment.number, failure_of_process(said)
            if reason in NO_FAULT_OF_A_TRIAL:
                steering.stop()
                if reason == "storage":
                    raise StorageError(message)
                if not has_room(run.folder):
                    raise OSError(errno.ENOSPC, message)
                raise RunFailed(
                    f"trial {number} on node {node_of(said)}: {message}; "
                    f"when there is room on that node, go on: {resume_command(run.folder)}"
                )
            if steering.try_again(number):
                self._line.close()
                LOG.warning("trial %s goes on from its last epoch: %s", number, message)
                board.put(replace(board.get(number), status="pending"))
            else:
                failed = replace(board.get(number), status="failed", reason=reason, message=message)
                board.put(failed)
                run.part(number, assignment.round).mkdir(parents=True, exist_ok=True)
                write_json(run.trial_file(number, assignment.round), trial_as_json(failed))

        def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
            self._line.close()

        def _show(self) -> None:
            now_s = self._shown_s = time.monotonic()
            elapsed_s = now_s - self._started_s
            self._line.show(board.live_table(elapsed_s), plain=board.line(elapsed_s))
            if now_s - self._written_s > REPORT_EVERY_S:
                self._written_s = now_s
                page()

    return BoardCallback()


def has_room(folder: Place) -> bool:
    """Whether what a trial writes has room there."""
    return not isinstance(folder, Path) or shutil.disk_usage(folder).free > ROOM_BYTES


def node_of(said: str) -> str:
    """
    >>> node_of("ray::ImplicitFunc.train() (pid=6102, ip=10.0.0.3, actor_id=59)")
    '10.0.0.3'
    """
    found = re.search(r"ip=([^,)\s]+)", said)
    return found[1] if found else "unknown"


def run_trial(params: dict[str, Any], *, run: Run) -> None:
    """One trial inside its process: trains, reports each epoch to Tune, and writes down how it ended."""
    import ray

    assignment = Assignment(**params)
    gpu_ids = ray.get_gpu_ids()
    name_process(assignment.name)
    folder = run.part(assignment.number, assignment.round)
    file = run.trial_file(assignment.number, assignment.round)
    try:
        result = train_and_tell(run, assignment, gpu_ids)
    except Superseded:  # its node had been given up; the trial is another process's now
        raise
    except Exception as error:
        reason, message = failure_of(error)
        if reason not in NO_FAULT_OF_A_TRIAL:
            failed = pending_trial(assignment.number, TrialConfig.model_validate(assignment.config))
            failed = replace(failed, status="failed", reason=reason, message=message)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(traceback.format_exc())
            write_json(file, trial_as_json(failed))
        raise
    write_json(file, trial_as_json(result))


def train_and_tell(run: Run, assignment: Assignment, gpu_ids: Sequence[int]) -> TrialResult:
    """Trains until the trial ends, is cut short, or time is up; its result."""
    from ray import tune

    trial = assignment.trial()
    config = trial.course.config
    bars = {int(epoch): score for epoch, score in assignment.bars.items()}
    started_s = time.monotonic()
    curve, begun = list(trial.epochs), len(trial.epochs)
    startup_s, cut = float("nan"), ""

    def on_epoch(epochs: list[Epoch]) -> bool:
        nonlocal startup_s, cut
        if len(curve) == begun:
            # Of a trial that goes on the epoch may have been trained, and counted, before.
            startup_s = max(0.0, time.monotonic() - started_s - epochs[-1].wall_s)
        mirror.push_in_passing()
        result, accuracy = epoch_result(run, epochs, out_of_fold(epochs, run.splits))
        curve.append(result)
        tune.report(
            asdict(result)
            | {
                "best_epoch": best_epoch(epochs),
                "accuracy_so_far": accuracy,
                "gpu_ids": ",".join(map(str, gpu_ids)),
                "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                "data_share": epochs[-1].data_share,
            }
        )
        name_process(assignment.name)  # Ray has called it by its class again
        number = epochs[-1].number
        if not (number >= (assignment.until or config.epochs) or stopped(epochs, config.patience)):
            if result.score_so_far < bars.get(number, -np.inf):
                cut = f"below {bars[number]:.3f} after epoch {number}"
            elif assignment.ends_at_s is not None and time.time() > assignment.ends_at_s:
                cut = TIME_UP
        return not cut

    with (
        mirrored(run.part(assignment.number, assignment.round), last=STATES) as mirror,
        borrowed(assignment.source_in(run)) as source,
    ):
        epochs = train_trial(
            run.dataset.clips,
            run.splits,
            config,
            gpus=len(gpu_ids),
            replicas=run.claim.replicas,
            seed=run.config.seed,
            folder=mirror.folder,
            on_epoch=on_epoch,
            backend=run.config.backend,
            part=assignment.part(source),
        )
    write_array(run.out_of_fold(assignment.number), out_of_fold(epochs, run.splits))
    return ended_trial(run, trial, epochs, curve, cut=cut, startup_s=startup_s, begun=begun)


def why_no_trial(board: Leaderboard, run: Run) -> str:
    failed = [trial for trial in board.trials if trial.status == "failed"]
    if not failed:
        return f"no trial came to its end; see {run.trials}"
    first = failed[0]
    return (
        f"all {len(failed)} trials that ended failed; the first ({first.reason}): {first.message}; "
        f"their errors are in {run.trials}"
    )


if __name__ == "__main__":
    run_command(
        lambda: main(load_config(TuneConfig, prog="python -m raypipe.tune")),
        when_stopped="what was finished is kept; --resume and the run's folder goes on",
    )
