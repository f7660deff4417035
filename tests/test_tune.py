"""The whole of `tune` on real Ray and real TensorFlow, over features made up in a moment.

The machine has no GPU. Ray is told of four, and logical CPU devices stand in for them inside the trials;
what is tested is who gets which, and that everything after works the same.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from features import SPEC, make_store

from raypipe.config import Range, SplitConfig, TrialConfig, TuneConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.errors import UserError
from raypipe.store import FeatureStore
from raypipe.tune import check_search, error_sentence, merged, new_run_folder


@pytest.mark.parametrize(
    "config",
    [
        TuneConfig(trial=TrialConfig(batch_size=33)),
        TuneConfig(search={"batch_size": [32, 33]}),
        TuneConfig(search={"batch_size": Range(low=16, high=64)}),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(config):
    with pytest.raises(UserError, match="batch"):
        check_search(config)


def test_a_run_never_overwrites_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_run_folder(None).name for _ in range(3)] == ["tune", "tune-2", "tune-3"]
    assert new_run_folder("mine").name == "mine"
    with pytest.raises(UserError, match=r"--name mine: .* exists; choose another name"):
        new_run_folder("mine")


def test_the_search_draws_over_what_is_fixed():
    config = merged(TrialConfig(width=32, dropout=0.1), {"width": 64})
    assert (config.width, config.dropout) == (64, 0.1)


def test_an_error_is_one_sentence():
    assert error_sentence("Failure # 1\nTraceback ...\nValueError: no memory\n") == "ValueError: no memory"
    assert error_sentence("") == "unknown error"


def run_tune(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raypipe.tune", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--features", "nowhere"], "no feature store there; run python -m raypipe.extract first"),
        (["--num-samples", "0"], "--num-samples 0: must be greater than or equal to 1"),
        (["--model", "resnet"], "invalid choice 'resnet'"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(tmp_path, arguments, sentence):
    run = run_tune(tmp_path, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert sentence in run.stderr
    assert not (tmp_path / "results").exists(), "nothing was begun"


# `tune` for real, on a cluster that says it has four GPUs.
FOUR_GPUS = """
import sys, ray
from raypipe.config import TrialConfig, TuneConfig
from raypipe.console import run_command
from raypipe.tune import main
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False)
trial = TrialConfig(epochs=6, width=8, learning_rate=0.01)
search = {"model": ["mean_pool"], "dropout": [0.0, 0.1]}
run_command(lambda: main(
    TuneConfig(features="features", num_samples=int(sys.argv[1]), trial=trial, search=search)))
"""


def tune_on_four_gpus(folder: Path, trials: int, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FOUR_GPUS, str(trials)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | env)


@pytest.fixture(scope="module")
def four_gpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpus")
    make_store(folder / "features", failed=2)
    run = tune_on_four_gpus(folder, 4, RAYPIPE_FAKE_GPUS="1")
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "results" / "tune"


def reports(run: Path) -> list[list[dict]]:
    """What each trial reported, epoch by epoch."""
    files = sorted(run.glob("trials/trial-*/result.json"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_two_trials_train_at_once_on_gpus_of_their_own(four_gpus):
    spans = []
    for trial in reports(four_gpus):
        devices = {report["cuda_visible_devices"] for report in trial}
        assert len(devices) == 1, "a trial keeps its GPUs"
        visible = set(devices.pop().split(","))
        assert len(visible) == 2
        # A report's time is its end; the trial began `time_total_s` before its last one.
        end = trial[-1]["timestamp"]
        spans.append((end - trial[-1]["time_total_s"], end, visible))
    together = [
        (one[2], other[2])
        for i, one in enumerate(spans)
        for other in spans[i + 1 :]
        if one[0] < other[1] and other[0] < one[1]
    ]
    assert together, "some trials ran at the same time"
    for one, other in together:
        assert one.isdisjoint(other)


def test_everything_a_user_was_promised_is_there(four_gpus):
    import keras

    rows = list(csv.DictReader((four_gpus / "leaderboard.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows if row["status"] in ("done", "pruned")]
    assert len(rows) == 4
    assert float(rows[0]["score"]) > 0.9, "classes that far apart are told apart"

    metrics = json.loads((four_gpus / "best" / "metrics.json").read_text())
    assert metrics["validation"]["clips"] + metrics["test"]["clips"] == 60
    model = json.loads((four_gpus / "best" / "model.json").read_text())
    assert (model["classes"], model["fingerprint"]) == (["calm", "fight"], SPEC.fingerprint)

    # The saved model, in plain Keras, is right on as many test clips as the metrics say.
    store = FeatureStore(four_gpus.parents[1] / "features")
    dataset = load_dataset(store)
    test = split_dataset(dataset, SplitConfig(), seed=0, store=store).test
    best = keras.models.load_model(four_gpus / "best" / "model.keras")
    answers = best.predict(dataset.clips.features[test].astype(np.float32), verbose=0).argmax(axis=1)
    assert (answers == dataset.clips.labels[test]).mean() == metrics["test"]["accuracy"] > 0.8

    page = (four_gpus / "report.html").read_text()
    for words in ("2 GPUs a trial", "2 videos failed in extraction", "Leaderboard"):
        assert words in page
    assert list(four_gpus.glob("trials/trial-1/events.out.tfevents.*")), "TensorBoard's curves"
    assert (four_gpus / "config.yaml").exists()


def test_all_trials_failing_is_one_sentence_and_status_1(tmp_path):
    make_store(tmp_path / "features")
    # Ray believes in GPUs, TensorFlow sees none: every trial fails for a true reason.
    run = tune_on_four_gpus(tmp_path, 1)
    assert run.returncode == 1, run.stderr[-2000:]
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: all 1 trials that ended failed")
    assert "TensorFlow sees 0" in last
    assert "Traceback" not in run.stderr
