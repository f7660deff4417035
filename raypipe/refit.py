"""The best trial trained once more on Ray: on the whole training side, which gives the model that is kept,
and, where asked for, on random folds."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raypipe.checkpoints import STATES
from raypipe.console import LiveLine, duration, resume_command
from raypipe.errors import RunFailed
from raypipe.failures import failure_of_process
from raypipe.files import write_atomically
from raypipe.mirror import mirrored
from raypipe.results import TrialResult
from raypipe.run import Run
from raypipe.scratch import scratch
from raypipe.steering import RETRIES
from raypipe.training import Part, refit, train_trial
from raypipe.trial import out_of_fold

if TYPE_CHECKING:
    from ray import ObjectRef

PLAIN_LINE_S = 30.0
SHOW_EVERY_S = 1.0


def train_best(run: Run, best: TrialResult) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Trains the best trial on the whole training side into best/, and with --protocol both once more on
    random folds: raw probabilities of all clips [N, C], and out of those folds."""
    import ray

    run.best.mkdir(exist_ok=True)
    # A process of its own each: its devices may differ from the trials'.
    trainer = ray.remote(BestTrainer).options(
        num_cpus=run.claim.cpus, num_gpus=run.claim.gpus, max_restarts=RETRIES, max_task_retries=RETRIES
    )
    shared = ray.put(run)
    trainings = {"refit": f"refit trial {best.trial_id}"}
    if run.config.splits.protocol == "both":
        trainings["random_folds"] = "random folds"
    work = {}
    for training, name in trainings.items():
        actor = trainer.remote()
        work[getattr(actor, training).options(name=name).remote(shared, best)] = actor
    del actor
    try:
        refitted, *rest = results_of(work, f"training trial {best.trial_id} on all clips")
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"trial {best.trial_id} could not be trained on all clips: {failure_of_process(str(error))[1]}; "
            f"to try again: {resume_command(run.folder)}"
        ) from error
    return refitted, rest[0] if rest else None


def results_of(work: dict["ObjectRef", Any], what: str) -> list[NDArray[np.float32]]:
    """What the tasks return, once all have ended; says meanwhile how long it has been. Raises what the first
    that fails has raised.

    `work`: each task and the actor at it, which is taken out and so let go when it has ended: where there is
    room for one actor alone, the next one waits for that.
    """
    import ray

    line, started_s, tasks = LiveLine(plain_s=PLAIN_LINE_S), time.monotonic(), list(work)
    try:
        while work:
            ended, _ = ray.wait(list(work), timeout=SHOW_EVERY_S)
            ray.get(ended)
            for task in ended:
                del work[task]
            line.show(f"{what}: {duration(time.monotonic() - started_s)}")
    finally:
        line.close()
    return list(ray.get(tasks))


class BestTrainer:
    """Trains the best trial once more, on the GPUs that Ray gave its process. An actor: Ray waits for ever
    for a task on a node that falls silent (decision 22)."""

    def refit(self, run: Run, best: TrialResult) -> NDArray[np.float32]:
        """On the whole training side."""
        import ray

        with scratch() as folder:
            model = folder / "model.keras"
            probabilities = refit(
                run.dataset.clips,
                run.splits.training,
                best.course.config,
                losses=[epoch.loss for epoch in best.epochs[: best.best_epoch]],
                gpus=len(ray.get_gpu_ids()),
                replicas=run.claim.replicas,
                seed=run.config.seed,
                save_to=str(model),
                backend=run.config.backend,
                earlier=best.course.earlier,
            )
            write_atomically(run.best / "model.keras", model.read_bytes())
        return probabilities

    def random_folds(self, run: Run, best: TrialResult) -> NDArray[np.float32]:
        """On folds that ignore groups."""
        import ray

        with mirrored(run.best / "random-folds", last=STATES) as mirror:
            epochs = train_trial(
                run.dataset.clips,
                run.random_splits,
                best.course.config,
                gpus=len(ray.get_gpu_ids()),
                replicas=run.claim.replicas,
                seed=run.config.seed,
                folder=mirror.folder,
                on_epoch=lambda _: mirror.push_in_passing(),
                backend=run.config.backend,
                part=Part(until=best.course.config.epochs, earlier=best.course.earlier),
            )
        return out_of_fold(epochs, run.random_splits)
