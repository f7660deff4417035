import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from clips import write_video
from features import SPEC

from raypipe.strips import FRAME_HEIGHT, FRAMES, strips


def picture(jpeg: bytes) -> np.ndarray:
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded


def test_a_strip_shows_frames_of_the_videos_shape_from_its_start_to_its_end(tmp_path: Path) -> None:
    def draw(number: int, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 8 * number, np.uint8)

    path = write_video(tmp_path / "a.mp4", frames=30, size=(128, 64), draw=draw)
    (strip,) = strips([(str(path), 0)], SPEC)
    shown = picture(strip.jpeg)
    assert shown.shape == (FRAME_HEIGHT, FRAMES * 2 * FRAME_HEIGHT, 3)
    greys = shown.reshape(FRAME_HEIGHT, FRAMES, -1).mean(axis=(0, 2))
    assert (np.diff(greys) > 20).all()
    assert len(strip.jpeg) < 30_000


def test_a_window_is_shown_and_not_the_whole_video(tmp_path: Path) -> None:
    def draw(number: int, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 250 if number >= 30 else 5, np.uint8)

    path = write_video(tmp_path / "a.mp4", frames=60, size=(64, 64), draw=draw)
    spec = replace(SPEC, window_s=1.0, stride_s=1.0)
    dark, light = (picture(one.jpeg).mean() for one in strips([(str(path), 0), (str(path), 1)], spec))
    assert dark < 30 and light > 220


def test_where_there_is_nothing_to_show_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    good = write_video(tmp_path / "good.mp4")
    names = ["gone.mp4", "text.mp4", "pipe.mp4", "good.mp4"]
    shown = strips([(str(tmp_path / name), 0) for name in names], SPEC)
    assert [bool(one.jpeg) for one in shown] == [False, False, False, True]
    assert shown[0].missing == "the video is gone"
    assert "Invalid data" in shown[1].missing
    assert shown[2].missing == "not a regular file"
    assert good.exists()
