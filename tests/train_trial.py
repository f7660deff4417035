"""Trains one small trial in a folder, and kills its own process with SIGKILL where it is told to.

python train_trial.py FOLDER            to the end
python train_trial.py FOLDER epoch 2    killed after epoch 2
python train_trial.py FOLDER fold 5     killed in mid-epoch, when the fifth fold since the start was trained
python train_trial.py FOLDER rename 5   killed just before the fifth file it wrote gets its name
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raypipe.config import TrialConfig
from raypipe.splits import TEST, Splits
from raypipe.training import train_trial
from raypipe.trial import ClipSet, Epoch

# Everything that has a state of its own: dropout, moments, schedule, plateau, shuffling, early stopping.
CONFIG = TrialConfig(
    model="mean_pool",
    width=4,
    dropout=0.3,
    learning_rate=0.1,
    batch_size=8,
    class_weights=False,
    oversample=True,
    schedule="cosine",
    warmup_epochs=1,
    plateau_factor=0.5,
    plateau_patience=1,
    epochs=7,
    patience=4,
    checkpoint_every=1,
    histograms=True,
    profile=True,
)


def clips() -> ClipSet:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 36)
    features = (rng.normal(size=(36, 4, 6)) + 0.5 * labels[:, None, None]).astype(np.float16)
    return ClipSet([f"clip{i}.mp4" for i in range(36)], features, labels, ["calm", "fight"])


def splits() -> Splits:
    return Splits(np.array([TEST, 0, 1, 2] * 9), folds=3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, how: str = "", where: int = 0, backend: str = "tensorflow") -> None:
    renamed = predicted = 0

    def watch(event: str, arguments: Sequence[object]) -> None:
        nonlocal renamed
        if event == "os.rename" and str(folder) in str(arguments[0]):
            renamed += 1
            if renamed == where:
                die()

    if how == "rename":
        sys.addaudithook(watch)

    if how == "fold":
        from raypipe.replicas import Replicas

        predict = Replicas.predict

        def die_or_predict(engine: Replicas, positions: np.ndarray) -> np.ndarray:
            nonlocal predicted
            predicted += 1
            if predicted == where:
                die()
            return predict(engine, positions)

        Replicas.predict = die_or_predict

    def on_epoch(epochs: list[Epoch]) -> None:
        if how == "epoch" and len(epochs) == where:
            die()

    epochs = train_trial(
        clips(),
        splits(),
        CONFIG,
        gpus=0,
        replicas=2,
        seed=3,
        folder=folder,
        on_epoch=on_epoch,
        backend=backend,
    )
    numbers = [
        [e.number, e.train_loss, e.fold_losses, e.learning_rate, e.probabilities.tolist()] for e in epochs
    ]
    (folder / "epochs.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(a) if a.isdecimal() else a for a in sys.argv[2:]))
