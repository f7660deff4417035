"""The learning rate over a training: warm-up, cosine decay and plateau reduction as one schedule."""

import math
from typing import Any

import keras
from keras import ops

from raypipe.config import TrialConfig


@keras.saving.register_keras_serializable("raypipe")
class WarmupCosinePlateau(keras.optimizers.schedules.LearningRateSchedule):
    """peak * share(step) * factor, the factor lowered by `observe` when the loss has stopped falling.

        share(step) = (step + 1) / (warmup_steps + 1)                          while step < warmup_steps
                    = final_share + (1 - final_share) (1 + cos(pi * done)) / 2   then,

    done = (step - warmup_steps) / decay_steps, at most 1 (Loshchilov and Hutter 2017, arXiv:1608.03983,
    equation 5, without restarts; warm-up as in Goyal et al. 2017, arXiv:1706.02677, section 2.2). It is 1 at
    the end of warm-up from both sides. A `final_share` of 1 keeps the rate constant after warm-up.

    The factor is a variable, as Keras' ReduceLROnPlateau can only set rates that are plain numbers.
    `variables` hold all that changes; `get_config` has them as well, so a saved optimizer goes on alike.
    """

    def __init__(
        self,
        peak: float,
        *,
        warmup_steps: int = 0,
        decay_steps: int = 1,
        final_share: float = 1.0,
        plateau_factor: float = 1.0,
        plateau_patience: int = 1,
        plateau_min_delta: float = 1e-4,
        plateau_floor: float = 0.01,
        factor: float = 1.0,
        best_loss: float | None = None,
        waited: int = 0,
        name: str = "WarmupCosinePlateau",
    ) -> None:
        if decay_steps < 1:
            raise ValueError(f"decay_steps {decay_steps} must be at least 1")
        self.peak, self.warmup_steps, self.decay_steps = peak, warmup_steps, decay_steps
        self.final_share = final_share
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self.plateau_min_delta, self.plateau_floor = plateau_min_delta, plateau_floor
        self.name = name

        def variable(value: float, name: str) -> keras.Variable:
            return keras.Variable(
                value, dtype="float32", trainable=False, aggregation="only_first_replica", name=name
            )

        self.factor = variable(factor, "plateau_factor")
        self.best_loss = variable(math.inf if best_loss is None else best_loss, "plateau_best_loss")
        self.waited = variable(waited, "plateau_waited")

    @property
    def variables(self) -> list[keras.Variable]:
        return [self.factor, self.best_loss, self.waited]

    def __call__(self, step: Any) -> Any:
        """The learning rate, float32, of the step that follows `step` others."""
        step = ops.cast(step, "float32")
        warming = (step + 1) / (self.warmup_steps + 1)
        done = ops.clip((step - self.warmup_steps) / self.decay_steps, 0.0, 1.0)
        cosine = self.final_share + (1 - self.final_share) * 0.5 * (1 + ops.cos(math.pi * done))
        return self.peak * ops.where(step < self.warmup_steps, warming, cosine) * self.factor

    def observe(self, loss: float) -> None:
        """Takes the validation loss of an epoch: after `plateau_patience` epochs without one that is lower
        by more than `plateau_min_delta`, the factor is multiplied, down to `plateau_floor` at the least."""
        if loss < _number(self.best_loss) - self.plateau_min_delta:
            self.best_loss.assign(loss)
            self.waited.assign(0.0)
            return
        waited = int(_number(self.waited)) + 1
        if waited >= self.plateau_patience:
            self.factor.assign(max(_number(self.factor) * self.plateau_factor, self.plateau_floor))
            waited = 0
        self.waited.assign(float(waited))

    def get_config(self) -> dict[str, Any]:
        best_loss = _number(self.best_loss)
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "final_share": self.final_share,
            "plateau_factor": self.plateau_factor,
            "plateau_patience": self.plateau_patience,
            "plateau_min_delta": self.plateau_min_delta,
            "plateau_floor": self.plateau_floor,
            "factor": _number(self.factor),
            "best_loss": None if math.isinf(best_loss) else best_loss,
            "waited": int(_number(self.waited)),
            "name": self.name,
        }


def _number(variable: keras.Variable) -> float:
    """Its value; `float(variable)` fails on one that TensorFlow mirrors over devices."""
    return float(ops.convert_to_numpy(variable.value))


def build_schedule(config: TrialConfig, *, steps_per_epoch: int) -> WarmupCosinePlateau:
    """The schedule that `config` names, for an optimizer that makes so many steps an epoch."""
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    return WarmupCosinePlateau(
        config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(1, config.epochs * steps_per_epoch - warmup_steps),
        final_share=config.final_share if config.schedule == "cosine" else 1.0,
        plateau_factor=config.plateau_factor,
        plateau_patience=config.plateau_patience,
    )
