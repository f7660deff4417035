import csv
import io
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from raypipe.samples import (
    CUT_CLIP,
    ENCODINGS,
    TEXT_CLIP,
    draw_clip,
    encode,
    make_samples,
    plan_samples,
)

BROKEN = {CUT_CLIP, TEXT_CLIP}
PLAN = plan_samples(0)
SHORT = [replace(spec, frames=6) for spec in PLAN]
"""The same clips, cut to a tenth of their length where only the files matter."""
MAKE_SHORT = """
import sys, dataclasses, pathlib
from raypipe.samples import make_samples, plan_samples
make_samples(pathlib.Path(sys.argv[1]), [dataclasses.replace(spec, frames=6) for spec in plan_samples(0)])
"""
BY_LABEL = {label: [spec for spec in PLAN if spec.label == label] for label in ("scuffle", "stroll")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_samples(tmp_path_factory.mktemp("samples"), SHORT).parent


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


# The files.


def test_the_manifest_lists_every_clip(samples: Path) -> None:
    with open(samples / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "group"]
    assert {row["path"] for row in rows} == {path.name for path in samples.iterdir()} - {"labels.csv"}
    assert [(row["path"], row["label"]) for row in rows] == [(spec.name, spec.label) for spec in PLAN]
    assert len({row["group"] for row in rows}) == 20


def test_good_clips_decode_as_planned(samples: Path) -> None:
    for spec in SHORT:
        if spec.name not in BROKEN:
            assert frame_sizes(samples / spec.name) == [spec.size] * spec.frames, spec


@pytest.mark.parametrize("codec", ENCODINGS)
def test_a_clip_of_full_length_decodes_to_the_drawn_frames(codec: str) -> None:
    spec = next(spec for spec in PLAN if spec.codec == codec)
    drawn = list(draw_clip(spec))
    with av.open(io.BytesIO(encode(spec, drawn))) as container:
        assert container.streams.video[0].average_rate == spec.fps
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == spec.frames
    assert np.abs(np.subtract(decoded, drawn, dtype=np.int16)).mean() < 8


@pytest.mark.slow
def test_all_clips_of_full_length_decode_as_planned(tmp_path: Path) -> None:
    make_samples(tmp_path)
    for spec in PLAN:
        if spec.name not in BROKEN:
            assert frame_sizes(tmp_path / spec.name) == [spec.size] * spec.frames, spec


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_clips_do_not_open(samples: Path, name: str) -> None:
    assert (samples / name).stat().st_size > 0
    with pytest.raises(av.error.InvalidDataError):
        frame_sizes(samples / name)


def test_a_second_call_does_nothing(samples: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in samples.iterdir()}
    assert make_samples(samples, plan_samples(1)) == samples / "labels.csv"
    assert {path: path.stat().st_mtime_ns for path in samples.iterdir()} == before


def test_a_killed_run_is_finished_by_the_next(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(samples, tmp_path / "samples")
    missing = [folder / spec.name for spec in SHORT[-24:]]
    for path in (folder / "labels.csv", *missing):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    with subprocess.Popen([sys.executable, "-c", MAKE_SHORT, str(folder)]) as run:
        while run.poll() is None and not missing[2].exists():
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not (folder / "labels.csv").exists()

    make_samples(folder, SHORT)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (folder / "labels.csv").read_bytes() == (samples / "labels.csv").read_bytes()
    for spec in SHORT[-24:]:
        if spec.name not in BROKEN:
            assert len(frame_sizes(folder / spec.name)) == spec.frames
