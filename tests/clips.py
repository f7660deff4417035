"""Small real videos for tests: coloured squares that move over a gradient, no frame like another."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]


def draw_black(number: int, width: int, height: int) -> Frame:
    return np.zeros((height, width, 3), np.uint8)


def draw_frame(number: int, width: int, height: int) -> Frame:
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x * 255 // width, y * 255 // height, (x + y + 3 * number) % 256], axis=-1)
    left, top = (number * 3) % (width - 16), (number * 2) % (height - 16)
    frame[top : top + 16, left : left + 16] = (number * 37 % 256, number * 91 % 256, 255)
    return frame.astype(np.uint8)


def write_video(
    path: Path,
    *,
    frames: int = 60,
    size: tuple[int, int] = (128, 96),
    fps: int = 30,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    draw: Callable[[int, int, int], Frame] = draw_frame,
    index_first: bool = False,
) -> Path:
    """Encodes `frames` frames into the container that the path's suffix names.

    An MP4's index is at its end, or with `index_first` at its start.
    """
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = {"movflags": "+faststart"} if index_first and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(number, width, height), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


QUARTER_TURN = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
"""The display matrix of a telephone that was held upright, as an MP4 stores it."""


def turn_video(path: Path) -> Path:
    """Gives an MP4 the display matrix of a quarter turn: its track header holds it at a fixed place."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = np.array(QUARTER_TURN, ">i4").tobytes()
    path.write_bytes(content)
    return path
