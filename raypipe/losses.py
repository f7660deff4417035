"""What training makes small: cross-entropy and focal loss for any number of classes, with Keras ops only."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from raypipe.config import TrialConfig

Loss = Callable[[Any, Any], Any]
"""Of labels [B] int and logits [B, C], the loss of each clip [B] float32, in nats."""

LEAST_DOUBT = 1e-7
"""1 - p counts as no less than this: its power's slope would be infinite at 0 for gamma below 1."""


def build_loss(config: TrialConfig, class_counts: Sequence[int] | NDArray[np.integer]) -> Loss:
    """The loss that `config` names; `class_counts` [C] are the training clips of each class.

    With p = softmax(logits) and the label y as a distribution q over C classes, smoothed by s
    (Szegedy et al. 2016, arXiv:1512.00567, section 7): q_c = (1 - s) [c = y] + s / C,

        cross-entropy  = -sum_c q_c log p_c
        focal          = -sum_c q_c alpha_c (1 - p_c)^gamma log p_c

    which for s = 0 is -alpha_y (1 - p_y)^gamma log p_y (Lin et al. 2017, arXiv:1708.02002, equation 5), and
    for gamma = 0 and alpha = 1 is cross-entropy.

    log p comes from log-softmax in float32, so that no p is rounded to 0 or 1 before its logarithm is
    taken; 1 - p is -expm1(log p), which keeps its digits where p is close to 1.
    """
    classes, smoothing = len(class_counts), config.label_smoothing
    alpha = focal_alpha(config.focal_alpha, class_counts)

    def loss(labels: Any, logits: Any) -> Any:
        log_p = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
        q = ops.one_hot(labels, classes, dtype="float32") * (1 - smoothing) + smoothing / classes
        if config.loss == "focal":
            doubt = ops.maximum(-ops.expm1(log_p), LEAST_DOUBT)
            q = q * alpha * ops.power(doubt, config.focal_gamma)
        return -ops.sum(q * log_p, axis=-1)

    return loss


def focal_alpha(
    alpha: float | Sequence[float] | str | None, class_counts: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.float32]:
    """The focal loss' factor of each class [C]. Raises ValueError for a list of another length.

    A number is Lin et al.'s alpha with the rarest class as their foreground; the others get 1 - alpha.
    `balanced` makes all classes weigh the same in total, with a mean of 1 over the clips.

    >>> focal_alpha(0.75, [10, 30]), focal_alpha("balanced", [10, 30])
    (array([0.75, 0.25], dtype=float32), array([2.       , 0.6666667], dtype=float32))
    """
    counts = np.asarray(class_counts)
    if alpha is None:
        factors = np.ones(len(counts))
    elif alpha == "balanced":
        factors = counts.sum() / (len(counts) * np.maximum(counts, 1))
    elif isinstance(alpha, float):
        factors = np.where(np.arange(len(counts)) == counts.argmin(), alpha, 1 - alpha)
    else:
        factors = np.asarray(alpha, float)
        if factors.shape != counts.shape:
            raise ValueError(f"focal_alpha has {len(factors)} numbers for {len(counts)} classes")
    return factors.astype(np.float32)
