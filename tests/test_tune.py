"""The whole of `tune` on real Ray and real TensorFlow, over features made up in a moment.

The machine has no GPU. Ray is told of four, and logical CPU devices stand in for them inside the trials;
what is tested is who gets which, and that everything after works the same.
"""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from features import SPEC, make_store
from s3 import Bucket

from raypipe.config import SplitConfig, TrialConfig, TuneConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.errors import UserError
from raypipe.folders import begin
from raypipe.reading import load_config
from raypipe.space import Range
from raypipe.storage import RemotePath
from raypipe.store import FeatureStore
from raypipe.tune import begun, check_search


@pytest.mark.parametrize(
    "config",
    [
        TuneConfig(trial=TrialConfig(batch_size=33)),
        TuneConfig(space={"batch_size": [32, 33]}),
        TuneConfig(space={"batch_size": Range(low=16, high=64)}),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(config):
    with pytest.raises(UserError, match="batch"):
        check_search(config)


def test_a_run_in_a_bucket_is_found_again():
    folder = RemotePath(Bucket().uri("results")) / "tune"
    begin(TuneConfig(seed=3), folder)
    assert begun(TuneConfig(resume=str(folder))) == (TuneConfig(seed=3), folder)
    with pytest.raises(UserError, match="no run there"):
        begun(TuneConfig(resume=str(folder.parent / "tune-2")))


@pytest.mark.parametrize("flag", ["--num-samples", "--num_samples", "--folds", "--config"])
def test_a_flag_beside_resume_is_refused_whatever_its_value(flag):
    default = {"--folds": "5", "--config": "configs/tune.yaml"}.get(flag, str(TuneConfig().num_samples))
    for words in ([flag, default], [f"{flag}={default}"]):
        with pytest.raises(UserError, match=r"^--[a-z-]+: with --resume a run goes on .* give no other flag"):
            load_config(TuneConfig, ["--resume", "results/tune", *words], prog="tune")


def test_a_run_is_asked_to_go_on():
    assert load_config(TuneConfig, ["--resume", "a", "--retry-failed"], prog="tune") == TuneConfig(
        resume="a", retry_failed=True
    )
    assert load_config(TuneConfig, ["--num-samples", "5"], prog="tune").num_samples == 5


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
        (["--retry-failed"], "--retry-failed: goes with --resume results/NAME"),
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


def test_what_no_trial_can_train_with_is_refused_before_anything_is_written(tmp_path):
    make_store(tmp_path / "features")
    run = run_tune(tmp_path, "--features", "features", "--batch-size", "33")
    assert run.returncode == 2 and run.stderr.startswith("error: --batch-size 33 does not divide")
    assert not (tmp_path / "features" / "splits").exists() and not (tmp_path / "results").exists()


def test_a_name_is_not_used_up_by_a_run_that_could_not_start(tmp_path):
    make_store(tmp_path / "features")
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-m", "raypipe.tune", "--features", "features", "--name", "mine"],
            cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
        )  # fmt: skip
        assert run.returncode == 1
        assert "RAY_ADDRESS 127.0.0.1:1: no Ray cluster answers there" in run.stderr.splitlines()[-1]
        assert not (tmp_path / "results" / "mine").exists()


# `tune` for real, on a cluster that says it has four GPUs.
FOUR_GPUS = """
import contextlib, sys, threading, time, ray
from pathlib import Path
from raypipe.config import TrialConfig, TuneConfig
from raypipe.console import run_command
from raypipe import refit, tune
from raypipe.tune import main

# A worker needs more than a second to import TensorFlow, on any machine: several lines.
tune.PLAIN_LINE_S = tune.SHOW_EVERY_S = refit.PLAIN_LINE_S = refit.SHOW_EVERY_S = 0.2

def watch():
    "What the trials' processes are called."
    seen = set()
    while True:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended
                title = file.read_bytes().decode(errors="replace").strip(chr(0))
                if title.startswith("ray::trial-") and title not in seen:
                    seen.add(title)
                    Path("titles").write_text(" ".join(seen))
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
trial = TrialConfig(epochs=6, width=8, learning_rate=0.05)
space = {"model": ["linear"], "dropout": [0.0, 0.1]}
run_command(lambda: main(
    TuneConfig(features="features", num_samples=int(sys.argv[1]), trial=trial, space=space)))
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
    (folder / "said").write_text(run.stderr)
    return folder / "results" / "tune"


def reports(run: Path) -> dict[str, list[dict]]:
    """What each trial reported, epoch by epoch, to Ray Tune; one that went on in another process has told of
    its epochs again."""
    found: dict[str, list[dict]] = {}
    for file in run.glob("ray-tune/trial-*/result.json"):
        told = [json.loads(line) for line in file.read_text().splitlines()]
        if told:
            found.setdefault(told[0]["config"]["number"], []).extend(told)
    return found


def test_two_trials_train_at_once_on_gpus_of_their_own(four_gpus):
    spans = []
    for trial in reports(four_gpus).values():
        devices = {report["cuda_visible_devices"] for report in trial}
        assert len(devices) == 1, "a trial keeps its GPUs"
        visible = set(devices.pop().split(","))
        assert len(visible) == 2
        # A report's time is its end, and `time_total_s` after the beginning. Ray cuts it to whole seconds: a
        # trial that follows another in the same process seems to begin up to a second before that one's end.
        end = trial[-1]["timestamp"]
        spans.append((end - trial[-1]["time_total_s"] + 1, end, visible))
    together = [
        (one[2], other[2])
        for i, one in enumerate(spans)
        for other in spans[i + 1 :]
        if one[0] < other[1] and other[0] < one[1]
    ]
    assert together, "some trials ran at the same time"
    for one, other in together:
        assert one.isdisjoint(other)


def test_progress_is_told_while_nothing_ends(four_gpus):
    said = (four_gpus.parents[1] / "said").read_text().splitlines()
    before_the_first_epoch = [
        line for line in said if "trials 0/4 · running 2" in line and "best" not in line
    ]
    assert len(before_the_first_epoch) >= 3, "two trials started at most: the others were told by the clock"
    refits = [line for line in said if "on all clips: 0:" in line]
    assert len(refits) >= 2, "so does the last training"


def test_a_person_finds_the_trials_among_the_processes(four_gpus):
    titles = (four_gpus.parents[1] / "titles").read_text().split()
    assert {"ray::trial-1", "ray::trial-2"} <= set(titles)


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
    logits = best.predict(dataset.clips.features[test].astype(np.float32), verbose=0)
    # Of two classes, the second one's calibrated probability is a sigmoid of the logits' difference.
    sure = 1 / (1 + np.exp((logits[:, 0] - logits[:, 1]) / model["temperature"]))
    answers = (sure >= model["threshold"]).astype(int)
    assert (answers == dataset.clips.labels[test]).mean() == metrics["test"]["accuracy"] > 0.8

    rows = list(csv.DictReader((four_gpus / "best" / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 60 and {row["side"] for row in rows} == {"validation", "test"}
    right = [row["answer"] == row["label"] for row in rows if row["side"] == "validation"]
    assert np.mean(right) == pytest.approx(metrics["validation"]["accuracy"])
    assert metrics["yardstick"]["validation"]["clips"] == len(right)

    page = (four_gpus / "report.html").read_text()
    for words in ("2 GPUs a trial", "2 clips failed in extraction", "Leaderboard"):
        assert words in page
    assert list(four_gpus.glob("trials/trial-1/events.out.tfevents.*")), "TensorBoard's curves"
    assert (four_gpus / "config.yaml").exists()


# Two equal trials, of which the test kills one.
TWINS = """
import ray
from raypipe.config import TrialConfig, TuneConfig
from raypipe.console import run_command
from raypipe.tune import main
ray.init(address="local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False)
trial = TrialConfig(model="mean_pool", epochs=40, patience=40, width=8, learning_rate=0.01)
run_command(lambda: main(TuneConfig(features="features", num_samples=2, trial=trial, space={})))
"""


def history(file: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(file.read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("epoch_s", "data_share")} for row in rows]


def open_in(trial: Path) -> int | None:
    """The process that writes this trial's curves."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            if any(os.readlink(file).startswith(f"{trial}/events.") for file in process.glob("fd/*")):
                return int(process.name)
    return None


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_as_if_it_had_not(tmp_path):
    make_store(tmp_path / "features")
    trials = tmp_path / "results" / "tune" / "trials"
    killed, pid = trials / "trial-1", None
    with subprocess.Popen(
        [sys.executable, "-c", TWINS],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAYPIPE_FAKE_GPUS": "1"},
    ) as run:
        while not (pid and (killed / "state" / "epoch-0002.npz").exists()):
            assert run.poll() is None
            pid = pid or open_in(killed)  # known early: its first epoch takes long, the others moments
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    began_after = [[int(f.name[-6:]) for f in sorted(trials.glob(f"trial-{n}/events.*"))] for n in (1, 2)]
    assert began_after[1] == [0], "nobody disturbed the other one"
    assert began_after[0][0] == 0 and 1 <= began_after[0][1] < 40, "it went on in another process"
    one, other = (history(trials / f"trial-{number}" / "history.csv") for number in (1, 2))
    assert one == other and len(one) == 40
    rows = csv.DictReader((trials.parent / "leaderboard.csv").read_text().splitlines())
    assert [(row["status"], row["epochs_run"]) for row in rows] == [("done", "40")] * 2


def test_all_trials_failing_is_one_sentence_and_status_1(tmp_path):
    make_store(tmp_path / "features")
    # Ray believes in GPUs, TensorFlow sees none: every trial fails for a true reason.
    run = tune_on_four_gpus(tmp_path, 1)
    assert run.returncode == 1, run.stderr[-2000:]
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: all 1 trials that ended failed")
    assert "TensorFlow sees 0" in last
    assert "Traceback" not in run.stderr
