"""The classic way to train and raypipe's, on the same grouped folds: what each gives and what it costs.

python -m raypipe.compare --features results/features --seeds 3 --ablate
"""

import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from raypipe.checkpoints import STATES
from raypipe.cluster import Claim, claim_for, connect
from raypipe.comparison import (
    Comparison,
    RunFigures,
    Way,
    change,
    change_bounds,
    cost_rows,
    figure,
    quality_rows,
    write_comparison,
)
from raypipe.config import (
    AFTER,
    BEFORE,
    BEFORE_ON_JAX,
    Backend,
    CompareConfig,
    TrialConfig,
    TuneConfig,
)
from raypipe.console import LiveLine, duration, run_command, shown_path, text_table
from raypipe.dataset import Dataset, check_trial, data_digest, load_dataset, split_dataset
from raypipe.errors import RunFailed, UserError
from raypipe.evidence import evaluate_side, versions
from raypipe.failures import sentence_of
from raypipe.files import write_json
from raypipe.folders import alone_in, is_blank, naming, new_run_folder, none_left_blank, storage_watched
from raypipe.mirror import mirrored
from raypipe.reading import load_config, read_trial, read_yaml, write_yaml
from raypipe.section import rule_of
from raypipe.splits import TEST, Splits
from raypipe.storage import Place, place
from raypipe.store import FeatureStore
from raypipe.training import train_trial
from raypipe.trial import ClipSet, Epoch, best_epoch, out_of_fold
from raypipe.tune import check_search

LOG = logging.getLogger("raypipe")

CHANGES: dict[str, tuple[str, ...]] = {
    "all views": ("view",),
    "model": ("model", "inputs", "width", "depth", "dropout"),
    "loss": ("loss", "focal_alpha", "focal_gamma"),
    "label smoothing": ("label_smoothing",),
    "class weights": ("class_weights",),
    "oversampling": ("oversample",),
    "optimizer": ("optimizer", "weight_decay"),
    "learning rate": ("learning_rate",),
    "clipping": ("clip_norm",),
    "warm-up and decay": ("schedule", "warmup_epochs", "final_share"),
    "plateau": ("plateau_factor", "plateau_patience"),
    "batch": ("batch_size",),
    "stopping": ("epochs", "patience"),
    "precision": ("precision",),
    "XLA": ("xla",),
    "feeding": ("feeding", "device_cache_mb"),
}
"""What counts as one change between two ways to train: a name, and the fields that belong together."""


def main(config: CompareConfig) -> Place:
    """Runs the comparison; returns the folder of its results. Raises UserError and RunFailed."""
    started, started_s = datetime.now().astimezone(), time.monotonic()
    store = FeatureStore(config.features)
    dataset = load_dataset(store)
    splits = split_dataset(dataset, config.splits, seed=config.seed, store=store)
    ways = ways_of(config)
    for trial in ways.values():
        check_trial(dataset.clips, trial)
    folder = run_folder(config)

    go_on = f"the same command with --name {folder.name}"
    with (
        storage_watched(folder, go_on=go_on),
        alone_in(folder),
        none_left_blank(folder),
        connect() as cluster,
    ):
        claim = claim_for(cluster, config.resources)
        write_yaml(config, folder / "config.yaml")
        LOG.info("%d ways to train, %d seeds each, each on %s", len(ways), config.seeds, claim.devices)
        LOG.info("kept in %s; if stopped, --name %s goes on", shown_path(folder), folder.name)
        data = data_digest(dataset, splits)
        runs = train_all(config, ways, dataset.clips, splits, claim, folder, data=data)
        comparison = compare(config, ways, runs, dataset, splits, store, claim, folder, started=started)
        write_comparison(folder, comparison)
    say_result(comparison)
    LOG.info("done in %s: %s", duration(time.monotonic() - started_s), shown_path(folder / "comparison.html"))
    return folder


# --- before anything starts --------------------------------------------------------------------------


def ways_of(config: CompareConfig) -> dict[str, TrialConfig]:
    """The columns: before, with --ablate before with each single change, after. Raises UserError for fields
    that cannot work together."""
    before = BEFORE_ON_JAX if config.backend == "jax" else BEFORE
    if config.before is not None:
        before = read_trial(Path(config.before), flag="--before")
    after = AFTER if config.after is None else read_trial(Path(config.after), flag="--after")
    ways = {"before": before}
    if config.ablate:
        ways |= ablations(before, after)
        if hides_xla(before, after):
            LOG.info("%s", NO_XLA_COLUMN)
    ways["after"] = after
    for name, trial in ways.items():
        try:
            checked = TuneConfig(trial=trial, space={}, resources=config.resources, backend=config.backend)
        except ValidationError as error:
            raise UserError(f"{name}: {rule_of(error)}") from None
        check_search(checked)
    return ways


def ablations(before: TrialConfig, after: TrialConfig) -> dict[str, TrialConfig]:
    """`before` with the fields of each change as they are in `after`, where they differ and that shows."""
    old, new = before.model_dump(), after.model_dump()
    found = {}
    for name, fields in CHANGES.items():
        if name == "XLA" and hides_xla(before, after):
            continue
        if any(old[field] != new[field] for field in fields):
            try:
                found[name] = TrialConfig.model_validate(old | {field: new[field] for field in fields})
            except ValidationError as error:
                raise UserError(f"--ablate: {name} alone over before: {rule_of(error)}") from None
    return found


def hides_xla(before: TrialConfig, after: TrialConfig) -> bool:
    """Whether XLA is a change that makes no difference to `before`."""
    return before.feeding == "fit" and before.xla != after.xla


NO_XLA_COLUMN = (
    "--ablate: no column for XLA, as feeding fit (before) is never compiled; "
    "to see what it gives, compare with a --before that has another feeding"
)


def run_folder(config: CompareConfig) -> Place:
    """RESULTS/NAME, new or begun with the same config; without a name the next free compare, compare-2."""
    results = place(config.results, flag="--results")
    if config.name is None:
        return new_run_folder(results, None, kind="compare")
    folder = results / config.name
    with naming(f"--results {results}"):
        begun = folder / "config.yaml"
        as_said = {"config": None, "name": None}
        if not is_blank(folder) and (
            not begun.is_file()
            or read_yaml(CompareConfig, begun).model_copy(update=as_said) != config.model_copy(update=as_said)
        ):
            raise UserError(
                f"--name {config.name}: {folder} holds something else; choose another name or remove it"
            )
    return folder


# --- training ---------------------------------------------------------------------------------------


def train_all(
    config: CompareConfig,
    ways: dict[str, TrialConfig],
    clips: ClipSet,
    splits: Splits,
    claim: Claim,
    folder: Place,
    *,
    data: str,
) -> dict[str, list[RunFigures]]:
    """Every way with every seed, seed by seed, each in a process of its own. What was trained before an
    interruption is read. Raises RunFailed where a training fails, UserError where one that was read is not
    of these ways or of this `data`, its digest."""
    import ray

    (folder / "runs").mkdir(exist_ok=True)
    seeds = range(config.seed, config.seed + config.seeds)
    order = [(way, seed) for seed in seeds for way in ways]
    files = {key: folder / "runs" / f"{key[0].replace(' ', '-')}-{key[1]}.json" for key in order}
    bases = {way: basis_of(trial, data, config.backend, claim) for way, trial in ways.items()}
    done = {key: read_run(file, bases[key[0]]) for key, file in files.items() if file.exists()}
    if done:
        LOG.info("%d of %d trainings were done before", len(done), len(order))
    waiting = [key for key in order if key not in done]
    # One call per process: TensorFlow cannot start a second strategy in it.
    task = ray.remote(max_calls=1)(train_run)
    shared_clips = ray.put(clips)
    running: dict[Any, tuple[str, int]] = {}
    line, started_s, before = LiveLine(), time.monotonic(), len(done)
    while waiting or running:
        while waiting and len(running) < config.at_once:
            way, seed = waiting.pop(0)
            training = folder / "trainings" / files[way, seed].name.removesuffix(".json")
            options = {"num_cpus": claim.cpus, "num_gpus": claim.gpus, "name": f"{way}, seed {seed}"}
            reference = task.options(**options).remote(
                way,
                shared_clips,
                splits,
                ways[way],
                backend=config.backend,
                replicas=claim.replicas,
                seed=seed,
                folder=training,
            )
            running[reference] = (way, seed)
        ended, _ = ray.wait(list(running), timeout=1.0)
        for reference in ended:
            way, seed = running.pop(reference)
            try:
                run = ray.get(reference)
            except ray.exceptions.RayError as error:
                line.close()
                raise RunFailed(f"{way}, seed {seed}: {sentence_of(str(error))}") from None
            write_run(files[way, seed], run, bases[way])
            done[way, seed] = run
            line.close()
            say_run(run, clips)
        now = ", ".join(f"{way} seed {seed}" for way, seed in running.values())
        line.show(progress(len(done), len(order), before, time.monotonic() - started_s, now))
    line.close()
    return {way: [done[way, seed] for seed in seeds] for way in ways}


def progress(done: int, total: int, before: int, elapsed_s: float, now: str) -> str:
    """
    >>> progress(3, 6, 1, 60.0, "after seed 1")
    'trainings 3/6 · now after seed 1 · 1:30 left'
    """
    parts = [f"trainings {done}/{total}", f"now {now}"]
    if done > before and done < total:
        parts.append(f"{duration(elapsed_s / (done - before) * (total - done))} left")
    return " · ".join(parts)


def train_run(
    way: str,
    clips: ClipSet,
    splits: Splits,
    trial: TrialConfig,
    *,
    backend: Backend,
    replicas: int,
    seed: int,
    folder: Place,
) -> RunFigures:
    """One training of all folds, in a process of its own on the cluster, on the GPUs that Ray gave it."""
    import ray

    with mirrored(folder, last=STATES) as mirror:
        epochs = train_trial(
            clips,
            splits,
            trial,
            gpus=len(ray.get_gpu_ids()),
            replicas=replicas,
            seed=seed,
            folder=mirror.folder,
            on_epoch=lambda _: mirror.push_in_passing(),
            backend=backend,
        )
    return run_figures(way, seed, trial, epochs, splits)


def run_figures(
    way: str, seed: int, trial: TrialConfig, epochs: Sequence[Epoch], splits: Splits
) -> RunFigures:
    """What the epochs of one training came to; also of one that was killed and went on."""
    steady = epochs[1:] or epochs
    energies = [epoch.gpu.energy_j for epoch in epochs]
    uses = [epoch.gpu.use for epoch in steady if epoch.gpu.use is not None]
    memories_mb = [epoch.gpu.memory_mb for epoch in epochs if epoch.gpu.memory_mb is not None]
    return RunFigures(
        way=way,
        seed=seed,
        probabilities=out_of_fold(epochs, splits),
        epochs=len(epochs),
        best_epoch=best_epoch(epochs),
        batch_size=trial.batch_size,
        epoch_s=float(np.median([epoch.wall_s for epoch in steady])),
        wall_s=sum(epoch.wall_s for epoch in epochs),
        data_share=sum(epoch.data_s for epoch in steady) / sum(epoch.wall_s for epoch in steady),
        gpu_use=float(np.mean(uses)) if uses else None,
        gpu_memory_mb=max(memories_mb, default=None),
        energy_j=None if None in energies else sum(joules for joules in energies if joules is not None),
    )


def basis_of(trial: TrialConfig, data: str, backend: Backend, claim: Claim) -> str:
    """A digest of all that the figures of a training depend on, but for its seed."""
    settings = json.dumps([trial.model_dump(mode="json"), data, backend, claim.devices], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:32]


def write_run(file: Place, run: RunFigures, basis: str) -> None:
    """As JSON, which has no NaN: a clip that takes no part is null."""
    rows = [None if np.isnan(row[0]) else row.tolist() for row in run.probabilities]
    write_json(file, asdict(run) | {"probabilities": rows, "basis": basis})


def read_run(file: Place, basis: str) -> RunFigures:
    """Raises UserError for one with another `basis`."""
    content: dict[str, Any] = json.loads(file.read_text())
    if content.pop("basis", None) != basis:
        raise UserError(
            f"--name {file.parent.parent.name}: {shown_path(file)} was trained with other settings, on other "
            "clips or on other devices; choose another --name"
        )
    rows = content.pop("probabilities")
    missing = [float("nan")] * max(len(row) for row in rows if row)
    return RunFigures(probabilities=np.array([row or missing for row in rows], np.float32), **content)


# --- what came out ------------------------------------------------------------------------------------


def compare(
    config: CompareConfig,
    ways: dict[str, TrialConfig],
    runs: dict[str, list[RunFigures]],
    dataset: Dataset,
    splits: Splits,
    store: FeatureStore,
    claim: Claim,
    folder: Place,
    *,
    started: datetime,
) -> Comparison:
    """All figures of all ways."""
    clips, training = dataset.clips, splits.sides != TEST
    compared = ~np.isnan(runs["before"][0].probabilities[:, 0])
    groups = [group for group, part in zip(dataset.groups, compared, strict=True) if part]
    quality = quality_rows(runs, clips.labels, dataset.groups, clips.class_names, seed=config.seed)
    costs = cost_rows(
        runs,
        price_per_kwh=config.prices.price_per_kwh,
        price_per_hour=config.prices.price_per_hour,
        currency=config.prices.currency,
        extraction_s=extraction_times(store.summary()),
    )
    return Comparison(
        name=folder.name,
        command=shlex.join(["python", "-m", "raypipe.compare", *sys.argv[1:]]),
        started=started,
        wall_s=(datetime.now().astimezone() - started).total_seconds(),
        features=str(store.path),
        clips=int(compared.sum()),
        groups=len(set(groups)),
        folds=splits.folds,
        classes={
            name: int((clips.labels[compared] == number).sum())
            for number, name in enumerate(clips.class_names)
        },
        seeds=tuple(range(config.seed, config.seed + config.seeds)),
        devices=claim.devices,
        versions=versions(),
        ways=tuple(Way(name, trial.model_dump()) for name, trial in ways.items()),
        rows=(*quality, *costs),
        notes=tuple(notes(config, ways, claim, int((~training).sum()))),
    )


def extraction_times(summary: dict[str, Any]) -> tuple[float | None, float | None]:
    """Seconds of the last extraction with everything to do, and of the re-run after it; None: not known.

    >>> full = {"videos": 9, "wall_s": 50.0}
    >>> extraction_times({"videos": 9, "extracted": 0, "wall_s": 0.7, "full_run": full})
    (50.0, 0.7)
    >>> extraction_times({"videos": 9, "extracted": 9, "wall_s": 50.0, "full_run": full})
    (50.0, None)
    >>> extraction_times({})
    (None, None)
    """
    full = summary.get("full_run") or {}
    full_s = full.get("wall_s") if full.get("videos") == summary.get("videos") else None
    return full_s, summary["wall_s"] if summary.get("extracted") == 0 else None


def notes(config: CompareConfig, ways: dict[str, TrialConfig], claim: Claim, test_clips: int) -> list[str]:
    """What a reader should know before believing the figures."""
    said = [
        "Each clip was predicted by a model that had not seen its group, at the epoch that was best for the "
        "other folds. Scores are means over the seeds.",
        "Intervals of scores come from drawing whole groups anew, the same for all columns; those of times "
        "from the seeds alone (Student's t).",
        "Where the settings of a way were chosen on these same clips, expect less on new ones.",
    ]
    if test_clips:
        said.append(f"The {test_clips} clips of the test side take no part.")
    if any(trial.feeding == "fit" for trial in ways.values()):
        said.append(
            "With feeding fit, Keras' fit is called for each fold and epoch; what it sets up anew each time "
            "is part of its time."
        )
    if config.ablate and hides_xla(ways["before"], ways["after"]):
        said.append(NO_XLA_COLUMN)
    if not claim.gpus:
        said.append("GPU use, memory and energy were not measured: the cluster has no GPU.")
    if config.prices.price_per_kwh is None and config.prices.price_per_hour is None:
        said.append("Cost was not measured: give --price-per-kwh or --price-per-hour.")
    if config.at_once > 1:
        said.append(f"{config.at_once} trainings ran at the same time: their times are too long.")
    return said


def say_run(run: RunFigures, clips: ClipSet) -> None:
    evaluation = evaluate_side(clips, run.probabilities)
    LOG.info(
        "%s, seed %d: accuracy %.3f, AUC %.3f, %d epochs of %.2f s, %s",
        run.way,
        run.seed,
        evaluation.accuracy,
        evaluation.auc,
        run.epochs,
        run.epoch_s,
        duration(run.wall_s),
    )


def say_result(comparison: Comparison) -> None:
    """The last column against the first, for the log."""
    first, last = comparison.ways[0].name, comparison.ways[-1].name
    table = [["", first, last, "difference", "95 % interval"]]
    for row in comparison.rows:
        old, new = row.cells[0], row.cells[-1]
        spread = change_bounds(new.difference_interval, row.unit) if new.difference_interval else ""
        table.append(
            [
                row.name,
                figure(old.value, row.unit),
                figure(new.value, row.unit),
                change(new.difference, row.unit),
                spread,
            ]
        )
    LOG.info("%s against %s:\n%s", last, first, text_table(table))


if __name__ == "__main__":
    run_command(
        lambda: main(load_config(CompareConfig, prog="python -m raypipe.compare")),
        when_stopped="finished trainings are kept; the same command with --name goes on",
    )
