from collections.abc import Callable, Sequence
from itertools import islice

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from raypipe.figures import Frame, draw_frames, first_states, perform
from raypipe.samples import ClipSpec, draw_clip, plan_samples

SIZE = (160, 120)


def numbers(seed: int) -> Callable[[str], np.random.Generator]:
    return lambda purpose: np.random.default_rng((seed, *purpose.encode()))


def draw(seed: int, *, frames: int = 24, scuffle: bool = True) -> list[Frame]:
    return list(draw_frames(SIZE, frames=frames, fps=12, scuffle=scuffle, rng=numbers(seed)))


def test_frames_are_rgb_pictures_of_the_asked_size() -> None:
    frames = draw(0, frames=3)
    assert [(frame.shape, frame.dtype) for frame in frames] == [((120, 160, 3), np.uint8)] * 3


def test_drawing_is_deterministic_and_differs_by_seed() -> None:
    first, again, other = draw(3), draw(3), draw(4)
    np.testing.assert_array_equal(first, again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_the_first_frame_knows_no_label(seed: int) -> None:
    scuffle, stroll = draw(seed, scuffle=True), draw(seed, scuffle=False)
    np.testing.assert_array_equal(scuffle[0], stroll[0])
    assert (scuffle[-1] != stroll[-1]).any()


@pytest.mark.parametrize("scuffle", [False, True])
def test_figures_start_as_they_are_and_stay_in_the_picture(scuffle: bool) -> None:
    room = 2.0
    for seed in range(20):
        first = first_states(np.random.default_rng(seed), room=room)
        states = perform(first, 60, 24, np.random.default_rng(seed), scuffle=scuffle, room=room)
        assert states.shape == (60, *first.shape)
        np.testing.assert_array_equal(states[0], first)
        assert np.abs(states[..., 0]).max() < room


# --- what tells the classes of the sample clips apart ------------------------------------------------


def looks(frame: Frame) -> list[float]:
    """Block means of colour and of edge strength, 8 x 8 each: what a picture without time can show."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    edges = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    maps = [cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA) for image in (frame, edges)]
    return [*maps[0].ravel(), *maps[1].ravel(), float(edges.mean()), float(edges.std())]


def jerkiness(spec: ClipSpec) -> list[float]:
    """How strongly the busiest fifth of the picture moves, and how abruptly that changes (logarithms)."""
    frames = islice(draw_clip(spec), 0, None, round(spec.fps / 12))
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    small = [cv2.resize(grey, (80, 60), interpolation=cv2.INTER_AREA) for grey in greys]
    change = np.abs(np.diff(np.array(small, np.float64) / np.mean(small), axis=0))
    cells = change.reshape(len(change), 6, 10, 8, 10).mean(axis=(2, 4)).reshape(len(change), -1)
    energy = np.sort(cells, axis=1)[:, -10:].mean(axis=1)
    return [float(np.log(energy.mean())), float(np.log(np.abs(np.diff(energy)).mean()))]


def balanced_accuracy(features: Sequence[Sequence[float]], specs: Sequence[ClipSpec]) -> float:
    """Of a logistic regression, in five folds that keep each scene on one side."""
    labels, groups = [spec.label for spec in specs], [f"{spec.seed}/{spec.group}" for spec in specs]
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", C=0.1, max_iter=2000))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(model, np.array(features), labels, groups=groups, cv=folds)
    return float(balanced_accuracy_score(labels, predicted))


def test_looks_do_not_tell_the_class() -> None:
    specs = [spec for seed in range(2) for spec in plan_samples(seed)]
    assert balanced_accuracy([looks(next(draw_clip(spec))) for spec in specs], specs) <= 0.6


def test_motion_tells_the_class() -> None:
    strolls = [spec for spec in plan_samples(0) if spec.label == "stroll"]
    scuffles = [spec for spec in plan_samples(0) if spec.label == "scuffle"]
    balanced = strolls + scuffles[: len(strolls)]
    assert balanced_accuracy([jerkiness(spec) for spec in balanced], balanced) >= 0.75
