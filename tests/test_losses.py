import numpy as np
import pytest
from keras import ops

from raypipe.config import TrialConfig
from raypipe.losses import build_loss, focal_alpha

COUNTS = {2: [30, 10], 3: [5, 20, 15], 7: [1, 2, 3, 4, 5, 6, 7]}


def plain(labels, logits, *, alpha, gamma, smoothing):
    """Lin et al. 2017, equation 5, with smoothed labels, clip by clip and class by class."""
    losses = []
    for label, z in zip(labels, logits.astype(np.float64), strict=True):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        loss = 0.0
        for c in range(len(z)):
            q = (1 - smoothing) * (c == label) + smoothing / len(z)
            loss -= q * alpha[c] * (1 - p[c]) ** gamma * np.log(p[c])
        losses.append(loss)
    return np.array(losses)


@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25, "balanced", "list"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_is_the_plain_form(classes, gamma, alpha, smoothing):
    rng = np.random.default_rng(classes)
    labels, logits = rng.integers(0, classes, 40), 3 * rng.normal(size=(40, classes))
    alpha = list(rng.uniform(0.1, 2, classes)) if alpha == "list" else alpha
    config = TrialConfig(
        loss="focal", focal_alpha=alpha, focal_gamma=gamma, label_smoothing=smoothing, class_weights=False
    )
    losses = build_loss(config, COUNTS[classes])(labels, logits.astype(np.float32))
    factors = focal_alpha(alpha, COUNTS[classes])
    expected = plain(labels, logits, alpha=factors, gamma=gamma, smoothing=smoothing)
    np.testing.assert_allclose(ops.convert_to_numpy(losses), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_kerass_and_focal_loss_without_gamma(smoothing):
    import keras

    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 20), rng.normal(size=(20, 3)).astype(np.float32)
    losses = build_loss(TrialConfig(label_smoothing=smoothing), COUNTS[3])(labels, logits)
    one_hot = keras.utils.to_categorical(labels, 3)
    theirs = keras.losses.categorical_crossentropy(
        one_hot, logits, from_logits=True, label_smoothing=smoothing
    )
    np.testing.assert_allclose(losses, theirs, rtol=1e-5)
    focal = TrialConfig(loss="focal", focal_gamma=0.0, label_smoothing=smoothing)
    np.testing.assert_allclose(build_loss(focal, COUNTS[3])(labels, logits), losses, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_probabilities_of_0_and_1_in_float16_keep_loss_and_slope_finite(gamma, smoothing, loss):
    import tensorflow as tf

    most = float(np.finfo(np.float16).max)
    logits = np.array([[most, -most], [20, -20], [0, 0], [-20, 20], [-most, most]], np.float16)
    p = tf.nn.softmax(logits).numpy()
    assert p.dtype == np.float16 and p.min() == 0 and p.max() == 1
    config = TrialConfig(loss=loss, focal_gamma=gamma, label_smoothing=smoothing)
    for label in (0, 1):
        x = tf.constant(logits)
        with tf.GradientTape() as tape:
            tape.watch(x)
            losses = build_loss(config, [3, 3])(np.full(5, label), x)
        assert losses.dtype == tf.float32
        assert np.isfinite(losses.numpy()).all()
        assert np.isfinite(tape.gradient(losses, x).numpy()).all()


def test_focal_loss_counts_sure_clips_less():
    logits = np.array([[4.0, 0.0], [0.0, 0.0], [0.0, 4.0]], np.float32)
    labels = np.zeros(3, int)
    plain_losses = np.array(build_loss(TrialConfig(), [1, 1])(labels, logits))
    focal_losses = np.array(build_loss(TrialConfig(loss="focal"), [1, 1])(labels, logits))
    kept = focal_losses / plain_losses
    assert kept.tolist() == pytest.approx([0.0003, 0.25, 0.9643], abs=1e-4)


@pytest.mark.parametrize(
    ("alpha", "counts", "factors"),
    [
        (None, [3, 1], [1, 1]),
        (0.75, [30, 10], [0.25, 0.75]),  # the rarest class is the foreground
        (0.75, [30, 40, 10], [0.25, 0.25, 0.75]),
        ("balanced", [30, 10], [2 / 3, 2]),
        ("balanced", [6, 0], [0.5, 3]),  # a class without clips does not divide by zero
        ([0.5, 2.0], [1, 1], [0.5, 2]),
    ],
)
def test_alpha_of_each_class(alpha, counts, factors):
    assert focal_alpha(alpha, counts).tolist() == pytest.approx(factors)


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError, match="focal_alpha has 2 numbers for 3 classes"):
        focal_alpha([0.5, 0.5], [1, 1, 1])
