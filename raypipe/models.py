"""Classifiers over a clip's features [T, D], written with Keras ops only.

Each model ends in logits [classes], float32. `build_model` finds one by name.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from raypipe.config import TrialConfig

CLIPS_AT_ONCE = 1024
Row = NDArray[np.float32]


def feature_statistics(features: NDArray[np.floating], positions: NDArray[np.integer]) -> tuple[Row, Row]:
    """Mean and variance [D] over the steps of the clips at `positions` in features [N, T, D], which need not
    fit into memory, for the layer `standardize`."""
    parts = (clips.reshape(-1, features.shape[2]) for clips in _in_parts(features, positions))
    return _mean_and_variance(parts)


def pooled_statistics(
    features: NDArray[np.floating], positions: NDArray[np.integer], inputs: str, *, mean: Row, variance: Row
) -> tuple[Row, Row]:
    """The same of what `pool` gives for these clips, for the layer `standardize_pooled`; `mean` and
    `variance` are those of `feature_statistics`."""

    def pooled(clips: NDArray[np.floating]) -> NDArray[np.floating]:
        standardized = (clips.astype(np.float32) - mean) / np.sqrt(variance)
        return np.asarray(ops.convert_to_numpy(pool(select_inputs(standardized, inputs))))

    return _mean_and_variance(pooled(clips) for clips in _in_parts(features, positions))


def _in_parts(
    features: NDArray[np.floating], positions: NDArray[np.integer]
) -> Iterator[NDArray[np.floating]]:
    for start in range(0, len(positions), CLIPS_AT_ONCE):
        yield features[positions[start : start + CLIPS_AT_ONCE]]


def _mean_and_variance(parts: Iterable[NDArray[np.floating]]) -> tuple[Row, Row]:
    """Of all rows of `parts` [n, D] together."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for rows in parts:
        count += len(rows)
        total = total + rows.sum(axis=0, dtype=np.float64)
        squares = squares + np.einsum("nd,nd->d", rows, rows, dtype=np.float64)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 1e-6)
    return mean.astype(np.float32), variance.astype(np.float32)


def build_model(config: TrialConfig, *, steps: int, dim: int, classes: int) -> keras.Model:
    """The model that `config` names, for features [steps, dim]."""
    inputs = keras.Input((steps, dim), name="features", dtype="float32")
    x = select_inputs(frozen_norm("standardize")(inputs), config.inputs)
    x = MODELS[config.model](x, config)
    logits = layers.Dense(classes, kernel_initializer="zeros", dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits, name=config.model)


def frozen_norm(name: str) -> layers.Layer:
    """A batch norm that never learns: its statistics are set once, from the clips that train. It is a layer
    that plain Keras loads, and its statistics are weights, which folds can exchange."""
    return layers.BatchNormalization(center=False, scale=False, epsilon=0.0, trainable=False, name=name)


def select_inputs(x: Any, inputs: str) -> Any:
    """Features [B, T, D] as they are, their differences x[t] - x[t-1] (0 at the first step, so that T
    stays), or both side by side [B, T, 2 D]."""
    if inputs == "features":
        return x
    differences = ops.pad(x[:, 1:] - x[:, :-1], [[0, 0], [1, 0], [0, 0]])
    return differences if inputs == "differences" else ops.concatenate([x, differences], axis=-1)


def linear(x: Any, config: TrialConfig) -> Any:
    """The logits' own layer over what `pool` gives, a logistic regression on statistics of the steps as in
    Abu-El-Haija et al. 2016 (arXiv:1609.08675, video-level features): where clips are few, a line is hard to
    beat."""
    return layers.Dropout(config.dropout)(pooled(x))


def mean_pool(x: Any, config: TrialConfig) -> Any:
    """An MLP over what `pool` gives, its units GELUs (Hendrycks and Gimpel 2016, arXiv:1606.08415) with
    dropout after each layer (Srivastava et al. 2014)."""
    x = layers.Dropout(config.dropout)(pooled(x))
    for _ in range(config.depth):
        x = layers.Dense(config.width, activation="gelu")(x)
        x = layers.Dropout(config.dropout)(x)
    return x


def pooled(x: Any) -> Any:
    return frozen_norm("standardize_pooled")(pool(x))


def pool(x: Any) -> Any:
    """Steps [B, T, D] -> [B, 3 D]: their mean, their spread, and how rough they are in time, which is the
    mean of |x[t] - x[t-1]|. The last two as logarithms: one wild step must not rule."""
    spread = ops.sqrt(ops.var(x, axis=1))
    rough = ops.mean(ops.abs(select_inputs(x, "differences")), axis=1)
    return ops.concatenate([ops.mean(x, axis=1), ops.log(spread + 0.1), ops.log(rough + 0.1)], axis=-1)


POOLED = frozenset({"linear", "mean_pool"})
"""The models that need `pooled_statistics`."""


def gru(x: Any, config: TrialConfig) -> Any:
    """The last state of gated recurrent units (Cho et al. 2014, arXiv:1406.1078), `depth` of them."""
    x = _squeeze(x, config)
    for layer in range(config.depth):
        x = layers.GRU(config.width, return_sequences=layer < config.depth - 1)(x)
    return layers.Dropout(config.dropout)(x)


def bilstm_attention(x: Any, config: TrialConfig) -> Any:
    """Bidirectional LSTMs, their steps summed by additive attention (Bahdanau et al. 2015,
    arXiv:1409.0473, with a learned query; Yang et al. 2016)."""
    x = _squeeze(x, config)
    for _ in range(config.depth):
        x = layers.Bidirectional(layers.LSTM(config.width, return_sequences=True))(x)
    scores = layers.Dense(1, use_bias=False)(layers.Dense(config.width, activation="tanh")(x))
    attention = layers.Softmax(axis=1, name="attention")(scores)
    x = ops.sum(attention * x, axis=1)
    return layers.Dropout(config.dropout)(x)


HEADS = 4


def transformer(x: Any, config: TrialConfig) -> Any:
    """`depth` encoder blocks (Vaswani et al. 2017, arXiv:1706.03762), normed before each part, which trains
    without a careful warm-up (Xiong et al. 2020, arXiv:2002.04745); then the mean of the steps."""
    x = _squeeze(x, config) + step_positions(x.shape[1], config.width)
    for _ in range(config.depth):
        normed = layers.LayerNormalization()(x)
        attend = layers.MultiHeadAttention(HEADS, max(1, config.width // HEADS), dropout=config.dropout)
        x = x + layers.Dropout(config.dropout)(attend(normed, normed))
        hidden = layers.Dense(4 * config.width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(config.dropout)(layers.Dense(config.width)(hidden))
    x = ops.mean(layers.LayerNormalization()(x), axis=1)
    return layers.Dropout(config.dropout)(x)


def step_positions(steps: int, width: int) -> NDArray[np.float16]:
    """Sines and cosines of the step's number [T, width] (Vaswani et al. 2017, section 3.5)."""
    i = np.arange(width)
    angle = np.arange(steps)[:, None] / 10_000 ** (2 * (i // 2) / width)
    # float16 so that it takes the precision of what it is added to.
    return np.where(i % 2, np.cos(angle), np.sin(angle)).astype(np.float16)


KERNEL = 3


def tcn(x: Any, config: TrialConfig) -> Any:
    """A temporal convolutional network (Bai et al. 2018, arXiv:1803.01271): `depth` residual blocks of two
    convolutions each, dilated by 1, 2, 4, ...; then the mean of the steps. As the whole clip is known, it
    looks both ways where theirs looks back; layer norm stands for their weight norm."""
    x = _squeeze(x, config)
    for block in range(config.depth):
        y = x
        for _ in range(2):
            y = layers.Conv1D(config.width, KERNEL, padding="same", dilation_rate=2**block)(y)
            y = layers.Activation("relu")(layers.LayerNormalization()(y))
            y = layers.SpatialDropout1D(config.dropout)(y)
        x = layers.Activation("relu")(x + y)
    return layers.Dropout(config.dropout)(ops.mean(x, axis=1))


def _squeeze(x: Any, config: TrialConfig) -> Any:
    """Fewer numbers a step: features are wide and clips few."""
    return layers.Dense(config.width, name="squeeze")(layers.Dropout(config.dropout)(x))


MODELS: dict[str, Callable[[Any, TrialConfig], Any]] = {
    "linear": linear,
    "mean_pool": mean_pool,
    "gru": gru,
    "bilstm_attention": bilstm_attention,
    "transformer": transformer,
    "tcn": tcn,
}
