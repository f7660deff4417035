"""A video in a bucket is read in pieces, and gives what it gives on a disk."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from clips import write_video
from s3 import Bucket, proxy

from raypipe import remote_file
from raypipe.containers import DecodeError
from raypipe.decode import ClipRequest, DecodedClip, decode_clips
from raypipe.frames import FrameReader, libav_messages
from raypipe.remote_file import RemoteFile, payload_spans
from raypipe.sandbox import Limits, Sandbox


def served(content: bytes) -> tuple[RemoteFile, bytes]:
    return RemoteFile(pa.BufferReader(content)), content


def test_whatever_is_read_is_what_is_there() -> None:
    rng = np.random.default_rng(0)
    file, content = served(rng.bytes(5_000_000))
    for _ in range(300):
        at, wanted = int(rng.integers(0, len(content))), int(rng.integers(1, 400_000))
        file.seek(at)
        assert file.read(wanted) == content[at : at + wanted]
    assert file.seek(0, os.SEEK_END) == len(content) and file.read(10) == b""


def test_reading_on_takes_few_requests_and_jumping_few_bytes() -> None:
    file, content = served(bytes(64_000_000))
    while file.read(1 << 18):
        pass
    assert file.requests <= 13 and file.fetched_bytes == len(content)
    file, content = served(bytes(64_000_000))
    for at in range(0, len(content), 4_000_000):
        file.seek(at)
        file.read(1000)
    assert file.fetched_bytes <= 17 << 18


REQUEST = ClipRequest(
    frames=8, size=64, view="rgb", motion_gap_s=0.07, min_frames=4,
    max_pixels=1 << 26, max_packets=2_000_000, max_duration_s=1e5,
)  # fmt: skip


def noise(number: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Some 28 MB of video each, the index at the end and at the start, and one that must be read whole."""
    folder = tmp_path_factory.mktemp("large")
    options = {"g": "2", "preset": "ultrafast", "qp": "10"}
    files = {}
    for name, first in (("end.mp4", False), ("start.mp4", True), ("whole.mkv", False)):
        path = write_video(
            folder / name, frames=60, size=(640, 480), options=options, draw=noise,
            index_first=first,
        )  # fmt: skip
        files[name] = path.read_bytes()
    return files


@pytest.mark.parametrize(("name", "most_share"), [("end.mp4", 0.25), ("start.mp4", 0.25), ("whole.mkv", 3.0)])
def test_a_large_video_is_not_downloaded_where_seeking_serves(
    name: str, most_share: float, large: dict[str, bytes], tmp_path: Path
) -> None:
    content = large[name]
    local = tmp_path / name
    local.write_bytes(content)
    (expected,) = decode_clips(str(local), REQUEST)
    bucket = Bucket().put({name: content})
    with proxy() as traffic:
        (clip,) = decode_clips(traffic.bucket(bucket).uri(name), REQUEST)
        assert isinstance(clip, DecodedClip) and isinstance(expected, DecodedClip)
        np.testing.assert_array_equal(clip.pictures, expected.pictures)
        assert (clip.facts, clip.frame_pts_s, clip.message) == (
            expected.facts, expected.frame_pts_s, expected.message,
        )  # fmt: skip
        share = traffic.sent_bytes / len(content)
    print(
        f"{name}: {len(content) / 1e6:.1f} MB, served {share:.3f} of it in {len(traffic.requests)} requests"
    )
    assert share < most_share


def scanned(content: bytes, name: str) -> tuple[object, int]:
    file, _ = served(content)
    with libav_messages() as messages:
        reader = FrameReader(file, name, messages, size=64, max_pixels=1 << 26, max_packets=2_000_000)  # type: ignore[arg-type]
        return reader.scan_packets(), file.fetched_bytes


def test_an_index_read_without_the_pictures_is_the_same(
    fights: Path, wild: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [*sorted(fights.rglob("*.mp4"))[:20], *sorted(wild.iterdir())]
    skimmed = 0
    for path in files:
        content = path.read_bytes()
        if not payload_spans(io.BytesIO(content), len(content)):  # type: ignore[arg-type]
            continue
        monkeypatch.setattr(remote_file, "SKIM_ABOVE_BYTES", 1 << 60)
        expected = scanned(content, path.name)[0]
        monkeypatch.setattr(remote_file, "SKIM_ABOVE_BYTES", 0)
        assert scanned(content, path.name)[0] == expected, path
        skimmed += 1
    assert skimmed >= 20


def test_the_child_reads_a_bucket_within_its_memory(clip_path: Path) -> None:
    bucket = Bucket().put({"a.mp4": clip_path.read_bytes(), "empty.mp4": b""})
    with Sandbox(REQUEST, Limits(60, 2048)) as sandbox:
        (clip,) = sandbox.decode(bucket.uri("a.mp4"))
        assert isinstance(clip, DecodedClip)
        for name, reason in (("none.mp4", "missing"), ("empty.mp4", "not_video")):
            with pytest.raises(DecodeError) as error:
                list(sandbox.decode(bucket.uri(name)))
            assert error.value.reason == reason
