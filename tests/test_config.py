"""The fields: which go together, and the presets that hold them."""

import re
from pathlib import Path

import pytest
from mistakes import error_of, load

from raypipe.config import (
    AFTER,
    BEFORE,
    Command,
    CompareConfig,
    ExtractConfig,
    PredictConfig,
    TrialConfig,
    TuneConfig,
)
from raypipe.reading import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs"


# --- fields that contradict each other ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--oversample", "class_weights and oversample each make rare classes count as much as common ones"),
        ("--loss focal --focal-alpha balanced", "class_weights and focal_alpha balanced each make"),
        (
            "--loss focal --focal-alpha 1.5",
            "focal_alpha 1.5 must be below 1: the other classes get 1 - alpha",
        ),
        ("--focal-alpha -1", "--focal-alpha -1: must be greater than 0"),
        ("--warmup-epochs 40", "warmup_epochs 40 must be below epochs 40: the learning rate would never"),
        (
            "--plateau-factor 0.5 --plateau-patience 10",
            "plateau_patience 10 must be below patience 10: the trial would stop before",
        ),
        ("--xla True --model gru", "xla cannot compile the cuDNN kernels of model gru"),
        (
            "--xla True --model tcn",
            "xla cannot compile a step that several devices share in TensorFlow;",
        ),
        (
            "--xla True --feeding fit --model tcn",
            "xla true: feeding fit is Keras' fit as in classic",
        ),
        ("--xla False --backend jax", "xla false: JAX always compiles with XLA"),
        ("--feeding fit --backend jax", "feeding fit is there to compare with the classic way"),
    ],
)
def test_fields_that_cannot_work_together_are_refused(arguments: str, said: str) -> None:
    assert error_of(TuneConfig, *arguments.split()).startswith(said)


@pytest.mark.parametrize(
    "arguments",
    [
        "--oversample --no-class-weights",
        "--loss focal --focal-alpha balanced --no-class-weights",
        "--loss focal --focal-alpha 0.25 0.75",
        "--focal-alpha balanced",  # cross-entropy has no alpha
        "--warmup-epochs 0.5 --epochs 1",
        "--plateau-factor 0.5",
        "--xla True --model tcn --gpus-per-trial 1",
        "--xla True --model tcn --backend jax",
        "--clip-norm None",
    ],
)
def test_fields_that_go_together_are_not(arguments: str) -> None:
    load(TuneConfig, *arguments.split())


# --- presets ----------------------------------------------------------------------------------------

KINDS: dict[str, type[Command]] = {
    "extract": ExtractConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "compare": CompareConfig,
}


def kind_of(preset: Path) -> type[Command]:
    """The config of the command that the preset's comment gives."""
    command = re.search(rf"# .*python -m raypipe\.(\w+) --config configs/{preset.name}", preset.read_text())
    assert command, f"{preset.name} does not say which command uses it"
    return KINDS[command[1]]


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_loads_and_says_how_to_use_it(preset: Path) -> None:
    read_yaml(kind_of(preset), preset)


@pytest.mark.parametrize("name", KINDS)
def test_the_preset_of_a_command_is_its_built_in_default(name: str) -> None:
    assert read_yaml(KINDS[name], CONFIGS / f"{name}.yaml") == KINDS[name]()


@pytest.mark.parametrize(("name", "trial"), [("before", BEFORE), ("after", AFTER)])
def test_the_preset_of_a_way_to_train_is_the_built_in_one(name: str, trial: TrialConfig) -> None:
    preset = read_yaml(TuneConfig, CONFIGS / f"{name}.yaml")
    assert preset == TuneConfig(trial=trial, space={})
