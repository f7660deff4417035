import numpy as np
import pytest

from raypipe.checkpoints import Superseded, TrialState, save_models
from raypipe.errors import RunFailed
from raypipe.telemetry import GpuFigures
from raypipe.trial import Epoch

EPOCH = Epoch(
    number=1,
    train_loss=1 / 3,
    fold_losses=(0.1, 0.7),
    probabilities=np.array([[0.25, 0.75], [np.nan, np.nan]], np.float32),
    learning_rate=2e-4,
    wall_s=1.5,
    data_s=0.01,
    gpu=GpuFigures(use=0.5),
)
STATES = [[np.ones(3, np.float32) * fold, np.array(7, np.int64)] for fold in range(2)]


def test_a_state_is_read_as_it_was_written(tmp_path):
    kept = TrialState(tmp_path, ["config", 1])
    assert kept.load() == ([], [])
    kept.save(STATES, [EPOCH])
    states, (epoch,) = TrialState(tmp_path, ["config", 1]).load()
    for fold, state in enumerate(STATES):
        for one, other in zip(state, states[fold], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    np.testing.assert_array_equal(epoch.probabilities, EPOCH.probabilities)
    assert (epoch.train_loss, epoch.fold_losses, epoch.gpu) == (1 / 3, (0.1, 0.7), GpuFigures(use=0.5))


def test_an_epoch_whose_states_were_not_written_does_not_count(tmp_path):
    kept = TrialState(tmp_path, "config")
    kept.save(STATES, [EPOCH])
    (tmp_path / "state/epoch-0002.npz").write_bytes(b"of a killed trial")
    (tmp_path / "state/.folds.npz.123").write_bytes(b"torn")
    kept = TrialState(tmp_path, "config")
    assert len(kept.load()[1]) == 1
    assert not list((tmp_path / "state").glob(".*"))


def test_who_was_taken_for_dead_writes_no_more(tmp_path):
    first, second = TrialState(tmp_path, "config"), TrialState(tmp_path, "config")
    first.take_over()
    first.check_owned()
    second.take_over()
    with pytest.raises(Superseded, match="another process has taken over"):
        first.check_owned()
    second.check_owned()


def test_the_state_of_another_trial_is_refused(tmp_path):
    TrialState(tmp_path, {"seed": 1}).save(STATES, [EPOCH])
    with pytest.raises(RunFailed, match="is the state of another trial"):
        TrialState(tmp_path, {"seed": 2}).load()


def test_a_model_has_its_name_only_when_it_is_whole(tmp_path):
    def save(fold: int, path: str) -> None:
        if fold == 1:
            raise OSError("disk full")
        with open(path, "w") as file:
            file.write("model")

    with pytest.raises(OSError, match="disk full"):
        save_models(tmp_path, "best", 2, save)
    assert (tmp_path / "checkpoints/fold-1-best.keras").read_text() == "model"
    assert not (tmp_path / "checkpoints/fold-2-best.keras").exists()
