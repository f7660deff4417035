"""The model that a tune run leaves in its best/ folder: what it needs, and how it answers.

model.keras    loads in plain Keras; gives logits
model.json     classes, threshold, temperature, and the FeatureSpec of the features that it takes
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.calibration import Calibration
from raypipe.console import TENSORFLOW_GREETINGS, without_lines
from raypipe.errors import UserError
from raypipe.mirror import on_disk
from raypipe.schema import SCHEMA_VERSION, FeatureSpec
from raypipe.storage import Place, StorageError, is_remote, place
from raypipe.store import FeatureStore
from raypipe.trial import view_of

CLIPS_AT_ONCE = 256
"""Clips that the network sees together: some 20 MB of features by default."""


@dataclass(frozen=True)
class SavedModel:
    """A model and how its numbers become answers. The network is loaded when it is first needed."""

    folder: Place
    classes: tuple[str, ...]
    spec: FeatureSpec
    """Of the features that it was trained on, and takes."""
    view: str
    """Which of them: all, or the half of one view."""
    calibration: Calibration
    """Makes probabilities and answers of what the network says."""
    features: str | None
    """The feature store that it was tuned on, wherever that is now."""

    @cached_property
    def network(self) -> Any:
        """The Keras model. Raises UserError where it does not load."""
        _choose_backend()
        file = self.folder / "model.keras"
        with without_lines(*TENSORFLOW_GREETINGS):
            import keras

            try:
                with on_disk(file) as here:
                    return keras.models.load_model(here, compile=False)
            except (OSError, ValueError, TypeError) as error:
                words = " ".join(str(error).split())
                raise UserError(f"{file}: does not load in Keras {keras.__version__}: {words}") from None

    def predict(self, features: NDArray[np.float16]) -> NDArray[np.float32]:
        """Probabilities [N, C] for features [N, T, D] as `spec` describes them."""
        seen = view_of(features, self.spec.view, self.view)
        logits = [self.network.predict_on_batch(part) for part in _parts(seen)]
        raw = np.concatenate([np.zeros((0, len(self.classes)), np.float32), *logits])
        return self.calibration.probabilities(softmax(raw))

    def content_digests(self) -> set[str]:
        """Of the clips that the model was tuned on, as far as their features are still there."""
        if self.features is None:
            return set()
        try:
            store = FeatureStore(self.features)
            digests = store.read(["content_digest"])["content_digest"].to_pylist() if store.exists() else []
        except (UserError, OSError):  # a bucket that cannot be reached, or features of another version
            return set()
        return {digest for digest in digests if digest}


def _parts(features: NDArray[np.float16]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(features), CLIPS_AT_ONCE):
        yield features[start : start + CLIPS_AT_ONCE].astype(np.float32)


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """
    >>> softmax(np.log(np.array([[1.0, 3.0]]))).round(3).tolist()
    [[0.25, 0.75]]
    """
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.floating] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _choose_backend() -> None:
    """Keras takes its backend when it is first imported: TensorFlow, else what is there."""
    there = next((name for name in ("tensorflow", "jax") if importlib.util.find_spec(name)), None)
    if there is None:
        raise UserError("neither TensorFlow nor JAX is installed; install raypipe[cpu] or raypipe[gpu]")
    os.environ.setdefault("KERAS_BACKEND", there)


# --- finding and opening ------------------------------------------------------------------------------


def find_model(given: str | None, *, results: Path) -> Place:
    """The best/ folder of the run at `given`, or of the newest one in `results`. Raises UserError."""
    if given is None:
        files = sorted(results.glob("*/best/model.json"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise UserError(
                f"{results}/ holds no model yet; run python -m raypipe.tune first, or name a run with --model"
            )
        return files[-1].parent
    run = place(given, flag="--model") if is_remote(given) else Path(given)
    try:
        for folder in (run, run / "best"):
            if (folder / "model.json").is_file():
                return folder
        there = run.exists()
    except StorageError as error:
        raise UserError(f"--model {given}: cannot be read: {error}") from None
    if there:
        raise UserError(
            f"--model {given}: has no best/ with a model; its search has not ended, or it is no run"
        )
    raise UserError(f"--model {given}: no such folder; name one that python -m raypipe.tune wrote")


def open_model(folder: Place) -> SavedModel:
    """What model.json in `folder` says. Raises UserError where it is not one that this version reads."""
    file = folder / "model.json"
    try:
        content = json.loads(file.read_text())
        if content["features"]["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"features of schema_version {content['features']['schema_version']}")
        return SavedModel(
            folder=folder.absolute() if isinstance(folder, Path) else folder,
            classes=tuple(content["classes"]),
            spec=FeatureSpec.from_json(content["features"]),
            view=content["view"],
            calibration=Calibration(float(content["temperature"]), content["threshold"]),
            features=content.get("store"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: is not a model of this version of raypipe: {what}; tune again") from None
