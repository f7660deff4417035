"""Classifiers over a clip's features [T, D], written with Keras ops only.

Each model ends in logits [classes], float32. `build_model` finds one by name.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from raypipe.config import TrialConfig


def feature_statistics(features: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and variance [D] over clips and steps of features [N, T, D], for the layer `standardize`."""
    flat = features.reshape(-1, features.shape[-1])
    mean = flat.mean(axis=0, dtype=np.float64)
    square = np.einsum("nd,nd->d", flat, flat, dtype=np.float64) / len(flat)
    variance = np.maximum(square - mean**2, 1e-6)
    return mean.astype(np.float32), variance.astype(np.float32)


def build_model(config: TrialConfig, *, steps: int, dim: int, classes: int) -> keras.Model:
    """The model that `config` names, for features [steps, dim]."""
    inputs = keras.Input((steps, dim), name="features", dtype="float32")
    # A batch norm that never learns: its statistics are set once, from the clips that train. It is a
    # layer that plain Keras loads, and its statistics are weights, which folds can exchange.
    standardize = layers.BatchNormalization(
        center=False, scale=False, epsilon=0.0, trainable=False, name="standardize"
    )
    x = standardize(inputs)
    x = MODELS[config.model](x, config)
    logits = layers.Dense(classes, kernel_initializer="zeros", dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits, name=config.model)


def mean_pool(x: Any, config: TrialConfig) -> Any:
    """An MLP over the mean and the spread of the steps: what is seen, and how much it changes."""
    mean = ops.mean(x, axis=1)
    spread = 0.5 * ops.log(ops.var(x, axis=1) + 1e-4)  # its logarithm: one wild step must not rule
    x = ops.concatenate([mean, spread], axis=-1)
    x = layers.Dropout(config.dropout)(x)
    x = layers.Dense(config.width, activation="gelu")(x)
    return layers.Dropout(config.dropout)(x)


def bilstm_attention(x: Any, config: TrialConfig) -> Any:
    """A bidirectional LSTM, its steps summed by additive attention (Bahdanau et al. 2015,
    arXiv:1409.0473, with a learned query; Yang et al. 2016)."""
    x = layers.Dropout(config.dropout)(x)
    x = layers.Dense(config.width, name="squeeze")(x)
    x = layers.Bidirectional(layers.LSTM(config.width, return_sequences=True))(x)
    scores = layers.Dense(1, use_bias=False)(layers.Dense(config.width, activation="tanh")(x))
    attention = layers.Softmax(axis=1, name="attention")(scores)
    x = ops.sum(attention * x, axis=1)
    return layers.Dropout(config.dropout)(x)


MODELS: dict[str, Callable[[Any, TrialConfig], Any]] = {
    "mean_pool": mean_pool,
    "bilstm_attention": bilstm_attention,
}
