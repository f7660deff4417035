"""A model as `tune` leaves it, made up in a moment: random weights, real Keras."""

import json
from dataclasses import asdict
from pathlib import Path

from raypipe.config import TrialConfig
from raypipe.schema import FeatureSpec

CLASSES = ["calm", "fight"]


def save_model(
    folder: Path,
    spec: FeatureSpec,
    *,
    view: str = "all",
    temperature: float = 2.0,
    threshold: float | None = 0.5,
    store: Path | None = None,
) -> Path:
    """A run's folder with a best/ in it, whose model takes features of `spec`."""
    import keras

    from raypipe.models import build_model

    keras.utils.set_random_seed(0)
    dim = spec.dim // 2 if view != "all" else spec.dim
    model = build_model(TrialConfig(model="mean_pool", width=8), steps=spec.steps, dim=dim, classes=2)
    logits = model.get_layer("logits")
    logits.set_weights([keras.random.normal(weight.shape, seed=1) for weight in logits.weights])
    best = folder / "best"
    best.mkdir(parents=True)
    model.save(best / "model.keras")
    content = {
        "classes": CLASSES,
        "temperature": temperature,
        "threshold": threshold,
        "store": str(store) if store else None,
        "features": asdict(spec),
        "fingerprint": spec.fingerprint,
        "view": view,
    }
    (best / "model.json").write_text(json.dumps(content))
    return folder
