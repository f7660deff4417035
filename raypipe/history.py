"""What a person reads of a trial while it trains, in the trial's folder:

history.csv            a row per epoch; empty where a figure was not measured
hard_examples.csv      the clips with the highest loss, each judged by a model that had not seen its group
events.out.tfevents.*  the same curves for TensorBoard, and histograms of the weights if wanted
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from raypipe.events import EventFile
from raypipe.files import write_atomically
from raypipe.metrics import cross_entropies, evaluate
from raypipe.splits import Splits
from raypipe.trial import ClipSet, Epoch, out_of_fold

Row = dict[str, int | float | None]

HARD_EXAMPLES = 1000
"""Clips that the report of hard examples holds at the most."""


class History:
    """Writes the files above after each epoch. On a trial that goes on, `epochs` are those it had."""

    def __init__(self, folder: Path, clips: ClipSet, splits: Splits, epochs: Sequence[Epoch]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._clips, self._splits = folder, clips, splits
        self._rows = [epoch_row(clips, epoch) for epoch in epochs]
        self._events = EventFile(folder, len(epochs))

    def __enter__(self) -> "History":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.__exit__(kind, error, trace)

    def add(self, epochs: Sequence[Epoch], weights: Mapping[str, NDArray[np.floating]]) -> None:
        """After an epoch, the last of `epochs`; `weights` by name, for histograms."""
        row = epoch_row(self._clips, epochs[-1])
        self._rows.append(row)
        write_atomically(self._folder / "history.csv", csv_text(self._rows).encode())
        hard = hard_examples(self._clips, out_of_fold(epochs, self._splits), epochs)
        write_atomically(self._folder / "hard_examples.csv", csv_text(hard).encode(errors="surrogateescape"))
        for name, value in row.items():
            if value is not None and name != "epoch":
                self._events.scalar(name, value, epochs[-1].number)
        for name, values in weights.items():
            self._events.histogram(name, values, epochs[-1].number)
        self._events.flush()


def epoch_row(clips: ClipSet, epoch: Epoch) -> Row:
    """An epoch's line: scores of its out-of-fold predictions, means over the classes where not of one."""
    rows = ~np.isnan(epoch.probabilities[:, 0])
    scores = evaluate(clips.labels[rows], epoch.probabilities[rows], clips.class_names)
    seen = [one for one in scores.classes if one.clips]
    return {
        "epoch": epoch.number,
        "train_loss": epoch.train_loss,
        "loss": epoch.loss,
        "accuracy": scores.accuracy,
        "precision": float(np.mean([one.precision for one in seen])),
        "recall": scores.balanced_accuracy,
        "f1": scores.macro_f1,
        "auc": None if np.isnan(scores.auc) else scores.auc,
        **{f"recall_{one.name}": one.recall if one.clips else None for one in scores.classes},
        "learning_rate": epoch.learning_rate,
        "epoch_s": epoch.wall_s,
        "data_share": epoch.data_share,
        "gpu_use": epoch.gpu.use,
        "gpu_memory_mb": epoch.gpu.memory_mb,
        "energy_j": epoch.gpu.energy_j,
    }


def hard_examples(
    clips: ClipSet, probabilities: NDArray[np.float32], epochs: Sequence[Epoch]
) -> list[dict[str, str | float]]:
    """The clips with the highest cross-entropy first, by probabilities [N, C] that are NaN for clips without
    a prediction; `mean_loss` is over all epochs, which tells clips never learned from those unlearned."""
    rows = np.flatnonzero(~np.isnan(probabilities[:, 0]))
    losses = cross_entropies(clips.labels[rows], probabilities[rows])
    hardest = np.argsort(-losses, kind="stable")[:HARD_EXAMPLES]
    kept = rows[hardest]
    means = np.mean([cross_entropies(clips.labels[kept], e.probabilities[kept]) for e in epochs], axis=0)
    return [
        {
            "video_id": clips.video_ids[row],
            "label": clips.class_names[clips.labels[row]],
            "predicted": clips.class_names[int(probabilities[row].argmax())],
            "probability": float(probabilities[row, clips.labels[row]]),
            "loss": float(loss),
            "mean_loss": float(mean),
        }
        for row, loss, mean in zip(kept, losses[hardest], means, strict=True)
    ]


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as CSV; None is empty, floats keep all digits."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
