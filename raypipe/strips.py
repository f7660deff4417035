"""Strips of frames: what a clip shows, as one small picture for a page. Decoded in the killable child."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.containers import DecodeError
from raypipe.decode import ClipRequest, FailedClip
from raypipe.frames import Pictures, VideoFacts
from raypipe.sandbox import Limits, Sandbox
from raypipe.schema import FeatureSpec

FRAMES = 6
FRAME_HEIGHT = 96
JPEG_QUALITY = 72
LIMITS = Limits(timeout_s=20.0, max_memory_mb=2048)


@dataclass(frozen=True)
class Strip:
    """A JPEG of FRAMES frames side by side, or the reason why there is none."""

    jpeg: bytes = b""
    missing: str = ""


def strips(clips: Sequence[tuple[str, int]], spec: FeatureSpec) -> list[Strip]:
    """A strip for each clip, given as path and number of the clip in it, cut as `spec` says."""
    request = ClipRequest(
        frames=FRAMES,
        size=2 * FRAME_HEIGHT,
        view="rgb",
        motion_gap_s=spec.motion_gap_s,
        min_frames=1,
        max_pixels=1 << 26,
        max_packets=2_000_000,
        max_duration_s=172_800.0,
        window_s=spec.window_s,
        stride_s=spec.stride_s,
    )
    with Sandbox(request, LIMITS) as sandbox:
        return [strip(path, index, sandbox) for path, index in clips]


def strip(path: str, index: int, sandbox: Sandbox) -> Strip:
    """The strip of clip number `index` of the video at `path`, or why there is none."""
    try:
        clip = next(sandbox.decode(path, first=index))
    except DecodeError as error:
        return Strip(missing="the video is gone" if error.reason == "missing" else str(error))
    if isinstance(clip, FailedClip):
        return Strip(missing=clip.message)
    return Strip(jpeg=as_jpeg(clip.pictures, clip.facts))


def as_jpeg(pictures: Pictures, facts: VideoFacts) -> bytes:
    """Square pictures [n, H, W, 3] RGB side by side, each as wide as the video's shape has it."""
    import cv2

    shape = facts.width / facts.height if facts.width and facts.height else 1.0
    width = round(FRAME_HEIGHT * min(max(shape, 0.3), 3.0))
    frames = [cv2.resize(one, (width, FRAME_HEIGHT), interpolation=cv2.INTER_AREA) for one in pictures]
    row = cv2.cvtColor(np.concatenate(frames, axis=1), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", row, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return bytes(encoded)
