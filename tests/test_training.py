"""A trial that was killed goes on with the same results to the last digit: real processes, real SIGKILL."""

import csv
import json
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_trial import CONFIG, clips

from raypipe.errors import Diverged
from raypipe.training import refuse_diverged

pytestmark = pytest.mark.timeout(900)  # starts several processes, on machines that may be busy
SCRIPT = Path(__file__).with_name("train_trial.py")
TIMES = {"epoch_s", "data_share"}
KILLS = [
    [("epoch", 1), ("fold", 5), ("epoch", 6)],  # after epoch 1, in the midst of epoch 3, after epoch 6
    [("rename", 12), ("fold", 2), ("rename", 11)],  # all in epoch 2; the last one is the commit itself
]
"""Two trials, and where each is killed, one kill after the other."""


def run(folder: Path, how: str = "", where: int = 0) -> None:
    command = [sys.executable, SCRIPT, folder, *([how, str(where)] if how else [])]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == (-signal.SIGKILL if how else 0), process.stderr[-3000:]


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> list[Path]:
    """The same trial's folder: never killed, and killed as KILLS has it."""
    folder = tmp_path_factory.mktemp("trials")

    def train(number: int, kills: list[tuple[str, int]]) -> Path:
        for how, where in kills:
            run(folder / str(number), how, where)
        run(folder / str(number))
        return folder / str(number)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(train, range(3), [[], *KILLS]))


def history(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "history.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(model: Path) -> dict[str, np.ndarray]:
    found = {}
    with zipfile.ZipFile(model) as file, h5py.File(file.open("model.weights.h5")) as tree:
        tree.visititems(lambda name, item: found.update({name: item[()]} if hasattr(item, "shape") else {}))
    return found


def curves(folder: Path) -> dict[str, list[tuple]]:
    """What TensorBoard shows: scalars and histograms."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    shown |= {
        tag: [(e.step, e.tensor_proto.tensor_content) for e in events.Tensors(tag)] for tag in tags["tensors"]
    }
    return {tag: points for tag, points in shown.items() if tag not in TIMES}


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_trial_goes_on_to_the_last_digit(trials, number):
    whole, killed = trials[0], trials[number]
    assert json.loads((killed / "epochs.json").read_text()) == json.loads((whole / "epochs.json").read_text())
    assert history(killed) == history(whole)
    assert (killed / "hard_examples.csv").read_text() == (whole / "hard_examples.csv").read_text()
    with np.load(whole / "state/folds.npz") as one, np.load(killed / "state/folds.npz") as other:
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert curves(killed) == curves(whole)


@pytest.mark.parametrize("number", [1, 2])
def test_its_checkpoints_are_those_of_a_trial_never_killed(trials, number):
    models = sorted(file.name for file in (trials[0] / "checkpoints").iterdir())
    assert sorted(file.name for file in (trials[number] / "checkpoints").iterdir()) == models
    for model in models:
        one, other = (weights(folder / "checkpoints" / model) for folder in (trials[0], trials[number]))
        assert one.keys() == other.keys() and len(one) > 5
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{model} {name}")


def test_what_a_kill_could_have_lost_was_in_use_here(trials):
    rows = history(trials[0])
    rates = [float(row["learning_rate"]) for row in rows]
    assert len(rows) == CONFIG.epochs
    with np.load(trials[0] / "state/folds.npz") as state:
        singles = [state[name][0] for name in state.files if state[name].shape == (3,)]
    assert any(0 < value < 1 for value in singles), "the plateau lowered its factor"
    assert rates[0] > rates[-1] > 0


def test_what_is_kept_of_a_trial(trials):
    folder = trials[0]
    kept = {file.name for file in (folder / "checkpoints").iterdir()}
    folds = ("fold-1", "fold-2", "fold-3")
    names = ("best", *(f"epoch-{number:04}" for number in range(1, CONFIG.epochs + 1)))
    assert kept == {f"{fold}-{name}.keras" for fold in folds for name in names}
    row = history(folder)[-1]
    assert (row["gpu_use"], row["gpu_memory_mb"], row["energy_j"]) == ("", "", ""), "not measured here"
    assert {"recall_calm", "recall_fight", "precision", "recall", "f1", "auc", "train_loss"} <= row.keys()
    hard = list(csv.DictReader((folder / "hard_examples.csv").read_text().splitlines()))
    assert len(hard) == 27 and float(hard[0]["loss"]) > float(hard[-1]["loss"])
    histograms = [tag for tag in curves(folder) if tag.startswith("fold-2/") and "kernel" in tag]
    assert histograms
    assert len(list(folder.rglob("*.xplane.pb"))) == 1, "a profile of one epoch"


def test_the_best_checkpoint_is_of_the_best_epoch(trials):
    losses = [float(row["loss"]) for row in history(trials[0])]
    best = losses.index(min(losses)) + 1
    another = best % CONFIG.epochs + 1
    kept, same, other = (
        weights(trials[0] / "checkpoints" / f"fold-1-{name}.keras")
        for name in ("best", f"epoch-{best:04}", f"epoch-{another:04}")
    )
    assert len(kept) > 5
    for name in kept:
        np.testing.assert_array_equal(kept[name], same[name])
    assert any((kept[name] != other[name]).any() for name in kept)


TWICE = """
import sys
from pathlib import Path
from train_trial import main
for name in ("first", "second"):
    main(Path(sys.argv[1]) / name)
"""


def test_what_a_process_trained_before_leaves_no_trace(trials, tmp_path):
    command = [sys.executable, "-c", TWICE, tmp_path]
    subprocess.run(command, cwd=SCRIPT.parent, check=True, capture_output=True)
    assert any("dense/kernel" in tag for tag in curves(trials[0]))
    assert curves(tmp_path / "second") == curves(tmp_path / "first") == curves(trials[0])


# --- a model whose answers are no numbers any more ------------------------------------------------------

BROKEN = """
import sys
from pathlib import Path
import train_trial
broken = train_trial.clips()
broken.features[5] = float("inf")
train_trial.clips = lambda: broken
train_trial.main(Path(sys.argv[1]))
"""


def test_a_fold_that_diverges_ends_the_trial(tmp_path):
    command = [sys.executable, "-c", BROKEN, tmp_path]
    said = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True).stderr
    last = said.strip().splitlines()[-1]
    assert last.startswith("raypipe.errors.Diverged: fold 1 diverged in epoch 1: the features of clip5.mp4")
    assert not (tmp_path / "history.csv").exists(), "no epoch counts in which a fold is missing"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_divergence_says_what_to_change(bad):
    answers = np.full((4, 2), 0.5, np.float32)
    refuse_diverged(answers, clips(), what="fold 3", epoch=7)
    answers[2, 1] = bad
    with pytest.raises(Diverged, match=r"^fold 3 diverged in epoch 7: a lower learning_rate"):
        refuse_diverged(answers, clips(), what="fold 3", epoch=7)
