import csv
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from raypipe.samples import (
    CUT_CLIP,
    ENCODINGS,
    TEXT_CLIP,
    ClipSpec,
    Frame,
    draw_clip,
    make_samples,
    plan_samples,
)

BROKEN = {CUT_CLIP, TEXT_CLIP}
PLAN = plan_samples(0)
BY_LABEL = {label: [spec for spec in PLAN if spec.label == label] for label in ("scuffle", "stroll")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_samples(tmp_path_factory.mktemp("samples")).parent


def frame_sizes(path: Path) -> list[tuple[int, int]]:
    with av.open(str(path)) as container:
        return [(frame.width, frame.height) for frame in container.decode(video=0)]


# The plan.


def test_78_to_22_by_class_and_two_broken_in_the_larger() -> None:
    assert {label: len(specs) for label, specs in BY_LABEL.items()} == {"scuffle": 50, "stroll": 14}
    assert {spec.name for spec in BY_LABEL["scuffle"]} > BROKEN
    assert len({spec.name for spec in PLAN}) == 64


def test_groups_are_small_and_each_class_spans_many() -> None:
    assert set(Counter(spec.group for spec in PLAN).values()) == {2, 3, 4}
    assert all(len({spec.group for spec in specs}) >= 7 for specs in BY_LABEL.values())


@pytest.mark.parametrize("trait", ["size", "fps", "codec"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_classes_have_the_same_mix(trait: str, seed: int) -> None:
    def shares(label: str) -> dict[object, float]:
        counts = Counter(getattr(spec, trait) for spec in plan_samples(seed) if spec.label == label)
        return {value: count / counts.total() for value, count in counts.items()}

    assert shares("stroll") == pytest.approx(shares("scuffle"), abs=0.09)


def test_neither_length_nor_place_in_the_list_tells_the_class() -> None:
    durations_s = {label: [spec.frames / spec.fps for spec in specs] for label, specs in BY_LABEL.items()}
    quartiles = [np.quantile(durations, [0, 0.25, 0.5, 0.75, 1]) for durations in durations_s.values()]
    np.testing.assert_allclose(quartiles[0], quartiles[1], atol=0.1)
    assert np.mean([spec.number for spec in BY_LABEL["stroll"]]) == pytest.approx(31.5, abs=10)


# The drawing.


def test_drawing_is_deterministic_and_differs_by_seed() -> None:
    assert plan_samples(3) == plan_samples(3)
    first, again, other = (np.stack(list(islice(draw_clip(plan_samples(n)[5]), 9))) for n in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


def test_the_first_frame_knows_no_label() -> None:
    for spec in PLAN[:8]:
        frames = [list(draw_clip(replace(spec, label=label))) for label in BY_LABEL]
        np.testing.assert_array_equal(frames[0][0], frames[1][0])
        assert (frames[0][-1] != frames[1][-1]).any()


def looks(frame: Frame) -> list[float]:
    """Block means of colour and of edge strength, 8 x 8 each: what a picture without time can show."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    edges = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    maps = [cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA) for image in (frame, edges)]
    return [*maps[0].ravel(), *maps[1].ravel(), float(edges.mean()), float(edges.std())]


def jerkiness(spec: ClipSpec) -> list[float]:
    """How strongly the busiest fifth of the picture moves, and how abruptly that changes (logarithms)."""
    frames = list(draw_clip(spec))[:: round(spec.fps / 12)]
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


def test_looks_do_not_tell_the_class_but_motion_does() -> None:
    specs = [spec for seed in range(4) for spec in plan_samples(seed)]
    assert balanced_accuracy([looks(next(draw_clip(spec))) for spec in specs], specs) <= 0.6

    balanced = [spec for label in BY_LABEL for spec in [s for s in specs if s.label == label][:28]]
    assert balanced_accuracy([jerkiness(spec) for spec in balanced], balanced) >= 0.75


# The files.


def test_the_manifest_lists_every_clip(samples: Path) -> None:
    with open(samples / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "group"]
    assert {row["path"] for row in rows} == {path.name for path in samples.iterdir()} - {"labels.csv"}
    assert [(row["path"], row["label"]) for row in rows] == [(spec.name, spec.label) for spec in PLAN]
    assert len({row["group"] for row in rows}) == 20


def test_good_clips_decode_as_planned(samples: Path) -> None:
    for spec in PLAN:
        if spec.name not in BROKEN:
            assert frame_sizes(samples / spec.name) == [spec.size] * spec.frames, spec


@pytest.mark.parametrize("codec", ENCODINGS)
def test_decoded_frames_look_like_the_drawn_ones(samples: Path, codec: str) -> None:
    spec = next(spec for spec in PLAN if spec.codec == codec and spec.name not in BROKEN)
    with av.open(str(samples / spec.name)) as container:
        assert container.streams.video[0].average_rate == spec.fps
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(decoded.astype(int) - np.stack(list(draw_clip(spec)))).mean() < 8


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_clips_do_not_open(samples: Path, name: str) -> None:
    assert (samples / name).stat().st_size > 0
    with pytest.raises(av.error.InvalidDataError):
        frame_sizes(samples / name)


def test_a_second_call_does_nothing(samples: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in samples.iterdir()}
    assert make_samples(samples, seed=1) == samples / "labels.csv"
    assert {path: path.stat().st_mtime_ns for path in samples.iterdir()} == before


def test_a_killed_run_is_finished_by_the_next(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(samples, tmp_path / "samples")
    missing = [folder / spec.name for spec in PLAN[-24:]]
    for path in (folder / "labels.csv", *missing):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    code = "import sys, pathlib, raypipe.samples as s; s.make_samples(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as run:
        while run.poll() is None and not missing[2].exists():
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not (folder / "labels.csv").exists()

    make_samples(folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (folder / "labels.csv").read_bytes() == (samples / "labels.csv").read_bytes()
    for spec in PLAN[-24:]:
        if spec.name not in BROKEN:
            assert len(frame_sizes(folder / spec.name)) == spec.frames
