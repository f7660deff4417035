"""The whole of `compare` on real Ray and real TensorFlow, over features made up in a moment."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from features import make_store
from s3 import Bucket

from raypipe.cluster import Claim
from raypipe.compare import (
    CHANGES,
    NO_XLA_COLUMN,
    ablations,
    basis_of,
    notes,
    read_run,
    run_figures,
    run_folder,
    ways_of,
    write_run,
)
from raypipe.comparison import RunFigures
from raypipe.config import AFTER, BEFORE, CompareConfig, PricesConfig, ResourcesConfig, TrialConfig
from raypipe.dataset import data_digest, load_dataset, split_dataset
from raypipe.errors import UserError
from raypipe.reading import read_trial, write_yaml
from raypipe.splits import TEST, Splits
from raypipe.storage import RemotePath
from raypipe.telemetry import GpuFigures
from raypipe.trial import Epoch

NO_EFFECT_ON_RESULTS = {"checkpoint_every", "histograms", "profile"}


def test_every_field_that_could_differ_belongs_to_one_change():
    fields = [field for fields in CHANGES.values() for field in fields]
    assert sorted(fields) == sorted(TrialConfig.model_fields.keys() - NO_EFFECT_ON_RESULTS)


def test_the_columns_are_before_each_single_change_and_after():
    ways = ways_of(CompareConfig(ablate=True))
    assert (next(iter(ways)), list(ways)[-1]) == ("before", "after")
    assert (ways["before"], ways["after"]) == (BEFORE, AFTER)
    assert {"all views", "loss", "label smoothing", "warm-up and decay", "clipping", "feeding"} <= ways.keys()
    for name in list(ways)[1:-1]:
        changed = {f for f in TrialConfig.model_fields if getattr(ways[name], f) != getattr(BEFORE, f)}
        assert changed and changed <= set(CHANGES[name])
        assert all(getattr(ways[name], field) == getattr(AFTER, field) for field in changed)
    assert list(ways_of(CompareConfig())) == ["before", "after"]


def test_xla_has_a_column_where_it_makes_a_difference(caplog):
    """Keras' fit is not compiled, so over it XLA would measure nothing."""
    caplog.set_level("INFO", "raypipe")
    assert "XLA" not in ways_of(CompareConfig(ablate=True)) and NO_XLA_COLUMN in caplog.text
    fed = BEFORE.model_copy(update={"feeding": "device"})
    assert ablations(fed, AFTER)["XLA"] == fed.model_copy(update={"xla": "auto"})
    claim = Claim(cpus=1, gpus=0, replicas=2)
    for before, said in [(BEFORE, True), (fed, False)]:
        noted = notes(CompareConfig(ablate=True), {"before": before, "after": AFTER}, claim, 0)
        assert (NO_XLA_COLUMN in noted) == said


def test_jax_has_a_before_that_it_can_train():
    ways = ways_of(CompareConfig(backend="jax", ablate=True))
    assert ways["before"] == BEFORE.model_copy(update={"xla": "auto", "feeding": "auto"})
    assert {"model", "loss"} <= ways.keys() and not {"XLA", "feeding"} & ways.keys()


@pytest.mark.parametrize(
    "content",
    [
        "trial: {optimizer: adam}",
        "trial: {model: tcn, xla: true}",
        "trial: {model: gru}\nspace: {batch_size: [33]}\nscheduler: pbt",
    ],
)
def test_a_way_to_train_is_the_trial_of_a_file_and_nothing_else(tmp_path, content):
    """No space is drawn from, not even the built-in one."""
    file = tmp_path / "before.yaml"
    file.write_text(content)
    config = CompareConfig(before=str(file), resources=ResourcesConfig(gpus_per_trial=1))
    assert ways_of(config)["before"] == TrialConfig.model_validate(yaml.safe_load(content)["trial"])


def test_a_change_that_cannot_stand_alone_is_refused():
    before = BEFORE.model_copy(update={"class_weights": True})
    after = TrialConfig(class_weights=False, oversample=True)
    with pytest.raises(UserError, match="--ablate: oversampling alone over before: class_weights"):
        ablations(before, after)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("trial: {widht: 8}", r"after.yaml: trial.widht is not a field; did you mean width?"),
        ("trail: {width: 8}", "after.yaml: trail is not a field; did you mean trial?"),
        ("width: 8", "after.yaml: width is not a field; it belongs under trial:"),
        ("num_samples: 3", "after.yaml: has no `trial`, the way to train"),
        ("trial: 3", "after.yaml: trial = 3: must be a mapping"),
        ("trial: {batch_size: 33}\nspace: {}", "--batch-size 33 does not divide by --gpus-per-trial 2"),
        (
            "trial: {model: tcn, xla: true}\nresources: {gpus_per_trial: 1}\nspace: {}",
            "after: xla cannot compile",
        ),
        (
            "trial: {model: tcn, xla: true, feeding: fit}",
            "after.yaml: trial = {'model': 'tcn', 'xla': True, 'feeding': 'fit'}: xla true: feeding fit is",
        ),
    ],
)
def test_a_wrong_way_to_train_is_refused(tmp_path, content, said):
    file = tmp_path / "after.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        ways_of(CompareConfig(after=str(file)))
    assert said in str(caught.value)


def test_a_comparison_goes_on_only_with_the_config_it_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = CompareConfig(seeds=2)
    folder = run_folder(config)
    write_yaml(config, folder / "config.yaml")
    assert (folder.name, run_folder(config).name) == ("compare", "compare-2")
    assert run_folder(config.model_copy(update={"name": "compare"})) == folder
    with pytest.raises(UserError, match=r"--name compare: .* holds something else; choose another name"):
        run_folder(CompareConfig(seeds=3, name="compare"))


def test_a_kept_training_reads_as_it_was(tmp_path):
    probabilities = np.array([[0.25, 0.75], [np.nan, np.nan], [0.1, 0.9]], np.float32)
    run = RunFigures("before", 1, probabilities, 5, 3, 32, 0.5, 9.0, 0.01, None, None, None)
    file = tmp_path / "compare" / "runs" / "before-1.json"
    file.parent.mkdir(parents=True)
    write_run(file, run, "these settings and clips")
    again = read_run(file, "these settings and clips")
    np.testing.assert_array_equal(again.probabilities, probabilities)
    assert replace(again, probabilities=probabilities) == replace(run, probabilities=probabilities)
    json.loads(file.read_text(), parse_constant=pytest.fail)
    with pytest.raises(UserError, match=r"^--name compare: .*before-1.json was trained with other settings"):
        read_run(file, "others")


def test_the_basis_of_a_training_is_all_that_its_figures_depend_on():
    asked = {"trial": BEFORE, "data": "d", "backend": "tensorflow", "claim": Claim(1, 0, 2)}
    others = {"trial": AFTER, "data": "e", "backend": "jax", "claim": Claim(1, 2, 2)}
    bases = [basis_of(**asked)] + [basis_of(**asked | {name: other}) for name, other in others.items()]
    assert len(set(bases)) == len(bases) and basis_of(**asked) == bases[0]


def epoch(number, loss, *, data_s=0.1, **gpu):
    probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]], np.float32)
    return Epoch(number, 0.0, (loss,), probabilities, 0.001, float(number), data_s, GpuFigures(**gpu))


def test_figures_of_a_training_are_of_its_epochs():
    splits = Splits(np.array([0, TEST]), folds=1)
    measured = [
        epoch(1, 0.7, data_s=9.0, use=0.0, memory_mb=900.0, energy_j=50.0),
        epoch(2, 0.5, use=0.4, memory_mb=700.0, energy_j=10.0),
        epoch(3, 0.6, use=0.6, memory_mb=800.0, energy_j=10.0),
    ]
    run = run_figures("after", 3, TrialConfig(batch_size=64), measured, splits)
    assert (run.way, run.seed, run.epochs, run.best_epoch, run.batch_size) == ("after", 3, 3, 2, 64)
    assert (run.epoch_s, run.wall_s) == (2.5, 6.0)  # the first epoch compiles, so it is no typical one
    assert (run.data_share, run.gpu_use) == pytest.approx((0.2 / 5, 0.5))
    assert (run.gpu_memory_mb, run.energy_j) == (900.0, 70.0)
    unmeasured = run_figures("after", 3, TrialConfig(), [epoch(1, 0.7), epoch(2, 0.5)], splits)
    assert (unmeasured.gpu_use, unmeasured.gpu_memory_mb, unmeasured.energy_j) == (None, None, None)


# --- the command ------------------------------------------------------------------------------------

WAY = """trial: {{epochs: 3, width: 8, learning_rate: 0.01, batch_size: {batch}, feeding: {feeding}}}
space: {{}}
"""


def run_compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raypipe.compare", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ.copy(),
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> RemotePath:
    """A comparison that was stopped after one of its two trainings, and gone on with; kept in a bucket."""
    folder = tmp_path_factory.mktemp("compare")
    store = make_store(folder / "results" / "features")
    summary = {"videos": 60, "extracted": 0, "wall_s": 0.5, "full_run": {"videos": 60, "wall_s": 30.0}}
    (store.path / "summary.json").write_text(json.dumps(summary))
    (folder / "before.yaml").write_text(WAY.format(batch=8, feeding="fit"))
    (folder / "after.yaml").write_text(WAY.format(batch=16, feeding="auto"))
    results = RemotePath(Bucket().uri("results"))
    config = CompareConfig(
        before="before.yaml",
        after="after.yaml",
        seeds=1,
        prices=PricesConfig(price_per_hour=3.6),
        results=str(results),
    )
    begun = results / "mine"
    write_yaml(config, begun / "config.yaml")
    dataset = load_dataset(store)
    splits = split_dataset(dataset, config.splits, seed=0, store=store)
    sure = np.where(dataset.clips.labels[:, None] == np.arange(2), 0.9, 0.1).astype(np.float32)
    sure[splits.test] = np.nan
    write_run(
        begun / "runs" / "after-0.json",
        RunFigures("after", 0, sure, 3, 3, 16, 0.5, 1.5, 0.01, None, None, None),
        basis_of(
            read_trial(folder / "after.yaml", flag="--after"),
            data_digest(dataset, splits),
            config.backend,
            Claim(cpus=1, gpus=0, replicas=2),
        ),
    )
    run = run_compare(folder, "--config", str(begun / "config.yaml"), "--name", "mine")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "1 of 2 trainings were done before" in run.stderr
    assert "before, seed 0: accuracy" in run.stderr and "after, seed 0: accuracy" not in run.stderr
    assert "trainings/before-0/state/folds.npz" in begun.names()
    assert not any(file.name != "features" for file in (folder / "results").iterdir())
    return begun


def test_the_files_say_what_was_trained(compared):
    content = json.loads((compared / "comparison.json").read_text())
    assert [way["name"] for way in content["ways"]] == ["before", "after"]
    assert (content["folds"], content["seeds"]) == (5, [0])
    rows = {row["name"]: [cell["value"] for cell in row["cells"]] for row in content["rows"]}
    assert rows["batch"] == [8, 16]
    assert all(value > 0.9 for value in rows["ROC AUC"]), "classes that far apart are told apart"
    assert all(value > 0 for value in rows["time per epoch"] + rows["cost (EUR)"])
    assert all(0 <= value < 1 for value in rows["waiting for data"])
    assert rows["features, run again"] == [30.0, 0.5]
    assert rows["energy"] == rows["GPU use"] == rows["memory per GPU"] == [None, None]
    assert (compared / "comparison.html").exists() and (compared / "config.yaml").exists()
    assert "| energy | not measured |" in (compared / "comparison.md").read_text()


def test_the_test_side_takes_no_part(compared):
    clips = json.loads((compared / "comparison.json").read_text())["clips"]
    probabilities = json.loads((compared / "runs" / "before-0.json").read_text())["probabilities"]
    assert sum(row is not None for row in probabilities) == clips < 60 == len(probabilities)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "results/features: no feature store there; run python -m raypipe.extract first"),
        (["--seeds", "0"], "--seeds 0: must be greater than or equal to 1"),
        (["--after", "none.yaml", "--features", "."], "no feature store there"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(tmp_path, arguments, sentence):
    run = run_compare(tmp_path, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert sentence in run.stderr
    assert not (tmp_path / "results").exists(), "nothing was begun"
