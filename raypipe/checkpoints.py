"""What a trial keeps on disk so that it goes on after a kill as if nothing had happened.

    FOLDER/state/epoch-0001.npz ...    each finished epoch, written once
    FOLDER/state/folds.npz             every fold's state after the last of them: this file is the commit
    FOLDER/state/owner                 the process that trains here: the latest that began
    FOLDER/checkpoints/fold-1-best.keras, fold-1-epoch-0010.keras ...   models for a person to load

All are written under another name first. What a kill left half-done is done again, with the same result.
A process that was only taken for dead, as on a node that hung, finds another owner and writes nothing more.
"""

import dataclasses
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.engines import State
from raypipe.errors import RunFailed
from raypipe.files import write_atomically
from raypipe.telemetry import GpuFigures
from raypipe.trial import Epoch

STATES = "state/folds.npz"


class Superseded(RunFailed):
    """Another process has taken over the trial."""


class TrialState:
    """The state of a trial in its folder. `settles` is all that its results depend on."""

    def __init__(self, folder: Path, settles: object) -> None:
        self._states = folder / STATES
        self._folder = self._states.parent
        self._folder.mkdir(parents=True, exist_ok=True)
        for torn in self._folder.glob(".*"):
            torn.unlink(missing_ok=True)
        self._key = hashlib.sha256(json.dumps(settles, sort_keys=True).encode()).hexdigest()
        self._own = uuid.uuid4().hex

    def take_over(self) -> None:
        """From here on the trial is this process's."""
        write_atomically(self._folder / "owner", self._own.encode())

    def check_owned(self) -> None:
        """Raises Superseded where another process has begun on the trial since."""
        if (self._folder / "owner").read_text() != self._own:
            raise Superseded(f"{self._folder}: another process has taken over the trial")

    def load(self) -> tuple[list[State], list[Epoch]]:
        """Every fold's state and all epochs, as after the last finished epoch; both empty where none has.

        Raises RunFailed where the folder holds those of another trial.
        """
        if not self._states.exists():
            return [], []
        with np.load(self._states) as content:
            if str(content["key"]) != self._key:
                raise RunFailed(f"{self._folder}: is the state of another trial; choose another folder")
            count = int(content["epochs"])
            stacks = [content[f"variable{i}"] for i in range(len(content.files) - 2)]
        states = [[np.array(stack[fold]) for stack in stacks] for fold in range(len(stacks[0]))]
        return states, [self._read_epoch(number) for number in range(1, count + 1)]

    def begin_from(self, other: "TrialState") -> None:
        """Takes over all that another trial has, unless it has epochs of its own. Raises RunFailed where the
        other has none."""
        if self._states.exists():
            return
        states, epochs = other.load()
        if not epochs:
            raise RunFailed(f"{other._folder}: holds no state to go on from; start the run anew")
        for epoch in epochs[:-1]:
            self._write_epoch(epoch)
        self.save(states, epochs)

    def save(self, states: Sequence[State], epochs: Sequence[Epoch]) -> None:
        """After an epoch: that epoch, then the states of all folds."""
        self._write_epoch(epochs[-1])
        stacks = {f"variable{i}": np.stack(values) for i, values in enumerate(zip(*states, strict=True))}
        _write(self._states, key=self._key, epochs=len(epochs), **stacks)

    def _write_epoch(self, epoch: Epoch) -> None:
        figures = {
            f.name: getattr(epoch, f.name) for f in dataclasses.fields(epoch) if f.name != "probabilities"
        }
        figures["gpu"] = dataclasses.asdict(epoch.gpu)
        _write(self._epoch_file(epoch.number), probabilities=epoch.probabilities, figures=json.dumps(figures))

    def _epoch_file(self, number: int) -> Path:
        return self._folder / f"epoch-{number:04}.npz"

    def _read_epoch(self, number: int) -> Epoch:
        with np.load(self._epoch_file(number)) as content:
            figures = json.loads(str(content["figures"]))
            figures["fold_losses"] = tuple(figures["fold_losses"])
            figures["gpu"] = GpuFigures(**figures["gpu"])
            return Epoch(probabilities=content["probabilities"], **figures)


def save_models(folder: Path, name: str, folds: int, save: Callable[[int, str], None]) -> None:
    """`save(fold, path)` writes a fold's model; when whole, it is FOLDER/checkpoints/fold-1-NAME.keras."""
    place = folder / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    for fold in range(folds):
        temporary = place / ".unfinished.keras"
        save(fold, str(temporary))
        os.replace(temporary, place / f"fold-{fold + 1}-{name}.keras")


def _write(path: Path, **arrays: Any) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getbuffer())
